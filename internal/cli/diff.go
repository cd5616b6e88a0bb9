package cli

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
)

func (a *app) diffCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "diff [VM]",
		Short: "what changed inside, as a patch",
		Long: `Diff prints what was changed in the repository inside, since it was brought in, as a
git patch that keeps binary files and modes; a file that was renamed is one removed and
one added. Commits made inside count. It is empty when nothing changed. On a terminal
control characters are shown as escapes.`,
		Example:     "  banger diff\n  banger diff shop > shop.patch",
		Args:        arguments(0, 1, "VM"),
		Annotations: exits(),
		RunE:        a.diff,
	}
}

func (a *app) diff(cmd *cobra.Command, args []string) error {
	c, err := a.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer c.close()
	ref, err := a.oneVM(cmd.Context(), c, args)
	if err != nil {
		return err
	}
	patch, _, err := a.fetchPatch(cmd.Context(), c, &bangerv1.ExportWorkspaceRequest{Ref: ref})
	if err != nil {
		return err
	}
	defer patch.Close()
	return a.printPatch(cmd.Context(), patch)
}

// oneVM is the VM that args name, or that of the repository here.
func (a *app) oneVM(ctx context.Context, c *client, args []string) (string, error) {
	if len(args) == 1 {
		return args[0], nil
	}
	found, err := a.repositoryVM(ctx, c)
	if err != nil {
		return "", err
	}
	return found.Vm.Id, nil
}

// fetchPatch fetches a whole patch into a file without a name, and prints what there is to
// note about it. The VM's workspace is busy for as long as the patch is on its way, so
// nobody but the disk may hold it up: not a pager, and not git.
func (a *app) fetchPatch(ctx context.Context, c *client, req *bangerv1.ExportWorkspaceRequest) (_ *os.File, _ *bangerv1.ExportMeta, err error) {
	patch, err := os.CreateTemp("", "banger-*.patch")
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			patch.Close()
		}
	}()
	if err := os.Remove(patch.Name()); err != nil {
		return nil, nil, err
	}
	meta, err := a.export(ctx, c, req, patch)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		err = api.Errorf(api.NoSpace, "cannot keep the patch: %w", err).WithHint("df -h %s", os.TempDir())
	}
	if err != nil {
		return nil, nil, err
	}
	_, err = patch.Seek(0, io.SeekStart)
	return patch, meta, err
}

// export writes a patch to w, and what there is to note about it to stderr. Like a unary
// call it is made to the next daemon when its own is being replaced just now.
func (a *app) export(ctx context.Context, c *client, req *bangerv1.ExportWorkspaceRequest, w io.Writer) (*bangerv1.ExportMeta, error) {
	meta, err := a.exportOnce(ctx, c, req, w)
	if meta == nil && c.succeeded(ctx, err) {
		meta, err = a.exportOnce(ctx, c, req, w)
	}
	return meta, err
}

// exportOnce returns no ExportMeta when nothing of the patch has come.
func (a *app) exportOnce(ctx context.Context, c *client, req *bangerv1.ExportWorkspaceRequest, w io.Writer) (*bangerv1.ExportMeta, error) {
	stream, err := c.workspaces.Export(ctx, req)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var meta *bangerv1.ExportMeta
	for stream.Receive() {
		m := stream.Msg()
		if m.Meta != nil {
			meta = m.Meta
			for _, line := range meta.Notes {
				a.ui.note("%s", line)
			}
		}
		if meta == nil {
			return nil, api.Errorf(api.Internal, "the daemon does not say what the patch is of")
		}
		if _, err := w.Write(m.Patch); err != nil {
			return meta, err
		}
	}
	if err := stream.Err(); err != nil {
		return meta, err
	}
	if meta == nil {
		return nil, api.Errorf(api.Internal, "the daemon ended the patch before it began")
	}
	return meta, nil
}

// printPatch prints to stdout, until ctx ends.
func (a *app) printPatch(ctx context.Context, patch io.Reader) (err error) {
	w := a.stdout
	if isTerminal(w) {
		p := &patchPrinter{w: w, colour: a.colour()}
		defer func() { err = cmp.Or(err, p.flush()) }()
		w = p
	}
	buf := make([]byte, 64<<10)
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := patch.Read(buf)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
	}
}

// patchPrinter shows a patch on a terminal: it is the guest's text, so it is cleaned.
type patchPrinter struct {
	w      io.Writer
	colour bool
	rest   string // a line that is not whole yet
}

func (p *patchPrinter) Write(b []byte) (int, error) {
	p.rest += string(b)
	for {
		line, rest, whole := strings.Cut(p.rest, "\n")
		if !whole {
			return len(b), nil
		}
		p.rest = rest
		if err := p.print(line + "\n"); err != nil {
			return 0, err
		}
	}
}

func (p *patchPrinter) flush() error {
	if p.rest == "" {
		return nil
	}
	return p.print(p.rest)
}

func (p *patchPrinter) print(line string) error {
	line = clean(line)
	if p.colour {
		line = paint(line)
	}
	_, err := io.WriteString(p.w, line)
	return err
}

// paint gives a line of a patch the colour that git gives it.
func paint(line string) string {
	colour := ""
	switch {
	case strings.HasPrefix(line, "diff "), strings.HasPrefix(line, "+++ "), strings.HasPrefix(line, "--- "), strings.HasPrefix(line, "index "):
		colour = "\x1b[1m"
	case strings.HasPrefix(line, "@@"):
		colour = "\x1b[36m"
	case strings.HasPrefix(line, "+"):
		colour = "\x1b[32m"
	case strings.HasPrefix(line, "-"):
		colour = "\x1b[31m"
	default:
		return line
	}
	return colour + strings.TrimSuffix(line, "\n") + "\x1b[0m\n"
}

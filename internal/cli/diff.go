package cli

import (
	"context"
	"io"
	"strings"

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
	w := a.stdout
	if isTerminal(w) {
		p := &patchPrinter{w: w, colour: a.colour()}
		defer p.flush()
		w = p
	}
	_, err = a.export(cmd.Context(), c, &bangerv1.ExportWorkspaceRequest{Ref: ref}, w)
	return err
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

// export writes a patch to w, and what there is to note about it to stderr.
func (a *app) export(ctx context.Context, c *client, req *bangerv1.ExportWorkspaceRequest, w io.Writer) (*bangerv1.ExportMeta, error) {
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

func (p *patchPrinter) flush() {
	if p.rest != "" {
		p.print(p.rest)
	}
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

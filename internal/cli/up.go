package cli

import (
	"context"
	"errors"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

func (a *app) upCommand() *cobra.Command {
	f := &enterFlags{}
	cmd := &cobra.Command{
		Use:   "up [PATH] [-- CMD…]",
		Short: "find, start or create the VM of a repository, then a shell or CMD",
		Long: `Up finds the VM of the repository that PATH (default: here) lies in, starts it if it
is stopped, or creates it. The repository is brought in at the same path as on the
host, with what is changed in tracked files; then a login shell is opened, or CMD run,
in the same subdirectory. A second up brings in what has changed on the host since,
and leaves alone what was changed inside.

The VM goes on running afterwards. With --rm, which is for a new VM, it is removed.

A missing kernel and image are made first. Ctrl-C undoes what this up began; a new VM
is also removed again when CMD cannot be begun. If a VM that was there cannot be brought
up to date, up says why and goes in all the same.
A piped or redirected stdin goes to CMD.`,
		Example: `  banger up
  banger up -- make test
  banger up --rm ~/shop -- sh -c 'make test 2>&1 | tail'`,
		Annotations: guestsExits(),
	}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		before, argv, dashed := splitDash(cmd, args)
		place := "."
		switch {
		case len(before) > 1:
			return usage(cmd, "%q is one argument too many: a command comes after --", before[1]).
				WithHint("banger up %s -- %s", before[0], strings.Join(before[1:], " "))
		case len(before) == 1:
			place = before[0]
		}
		if dashed && len(argv) == 0 {
			return usage(cmd, "no command after --")
		}
		return a.up(cmd, f, place, argv)
	}
	return cmd
}

// up is also what run does with a path.
func (a *app) up(cmd *cobra.Command, f *enterFlags, place string, argv []string) error {
	ctx := cmd.Context()
	if err := f.check(a, cmd, argv); err != nil {
		return err
	}
	if _, err := a.command(cmd, &f.exec, "/", argv, true); err != nil {
		return err
	}
	typed := place
	place, err := a.absolute(typed)
	if err != nil {
		return err
	}
	c, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer c.close()
	e := &entry{app: a, client: c, cmd: cmd, flags: f}
	return e.close(hintPlace(e.up(ctx, place, argv), typed, place))
}

// hintPlace names the folder in a hint that is right only in the folder itself.
func hintPlace(err error, typed, place string) error {
	return rehint(err, func(hint string) string {
		if hint != "git init" || typed == "." {
			return hint
		}
		if strings.HasPrefix(typed, "~") {
			typed = place // quoted it is no home directory
		}
		return hint + " " + shellWord(typed)
	})
}

func (e *entry) up(ctx context.Context, place string, argv []string) error {
	find := func() (*bangerv1.FindWorkspaceResponse, error) {
		found, err := e.client.workspaces.Find(ctx, &bangerv1.FindWorkspaceRequest{Path: place})
		e.vm = found.GetVm()
		return found, err
	}
	found, err := find()
	if err != nil {
		return err
	}
	if e.vm == nil {
		req := e.flags.vm.request()
		req.NameHint, req.Repository = filepath.Base(found.Repository), found.Repository
		err := e.create(ctx, req)
		if codeOf(err) == api.Exists && !e.created {
			// Another up may have been faster.
			if found, ferr := find(); ferr != nil || found.Vm == nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	before := ""
	if !e.created {
		before = e.vm.GetWorkspace().GetGuestPath()
		if err := e.existing(); err != nil {
			return err
		}
		if e.vm.RemoveOnRelease {
			e.ui.note("%s is removed when the command that holds it ends", e.vm.Name)
		}
		if err := e.start(); err != nil {
			return err
		}
	}
	top, err := e.update(found.Repository, before)
	if err != nil {
		return err
	}
	if e.flags.detach {
		return e.printVM(e.vm)
	}
	x, err := e.command(e.cmd, &e.flags.exec, path.Join(top, found.Prefix), argv, true)
	if err != nil {
		return err
	}
	return e.execute(ctx, x, top)
}

// update brings the repository in and returns where it is in the guest. before is
// where it was already, or "": what the guest or the repository does not allow then
// keeps nobody from going in.
func (e *entry) update(repository, before string) (string, error) {
	prepared, err := e.prepare(e.client, e.vm, repository, e.flags.untracked)
	if err == nil {
		return prepared.Workspace.GuestPath, nil
	}
	code := codeOf(err)
	if full := asError(err); e.created && code == api.NoSpace && strings.HasPrefix(full.Hint, "banger exec ") {
		// The VM that the hint names is removed again.
		return "", &api.Error{Code: code, Message: full.Message, Hint: "banger up --disk " + config.FormatSize(2*e.vm.Disk), Err: err}
	}
	if before == "" || code != api.Refused && code != api.NoSpace || e.signals.interrupted() {
		return "", err
	}
	// Also with --quiet: what runs now does not see what it should.
	reason := asError(err)
	e.ui.print(clean(e.vm.Name + " is not up to date: " + reason.Message))
	if reason.Hint != "" {
		e.ui.print("hint: " + clean(reason.Hint))
	}
	return before, nil
}

// existing refuses flags that a VM which is there already cannot obey.
func (e *entry) existing() error {
	if e.flags.remove {
		return api.Errorf(api.Refused, "--rm is for a new VM, and this repository has one: %s", e.vm.Name).
			WithHint("banger show %s", e.vm.Name)
	}
	for _, flag := range e.flags.vm.given(e.cmd) {
		if flag == "--name" && string(e.flags.vm.name) == e.vm.Name {
			continue
		}
		return api.Errorf(api.Refused, "%s is for a new VM, and this repository has one: %s", flag, e.vm.Name).
			WithHint("banger show %s", e.vm.Name)
	}
	if flag := e.flags.vm.network.missing(e.vm.Network); flag != "" {
		return api.Errorf(api.Refused, "%s is for a new VM, and this repository has one: %s", flag, e.vm.Name).
			WithHint("banger set %s %s", e.vm.Name, e.flags.vm.network.arguments())
	}
	return nil
}

// absolute makes a path of the host absolute; a "~" that no shell has replaced is the
// home directory.
func (a *app) absolute(place string) (string, error) {
	if rest, ok := strings.CutPrefix(place, "~"); ok && (rest == "" || rest[0] == '/') {
		home := a.env.get("HOME")
		if home == "" {
			return "", api.Errorf(api.Invalid, "cannot tell where ~ is: HOME is not set")
		}
		place = home + rest
	}
	place, err := filepath.Abs(place)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(place); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return "", api.Errorf(api.NotFound, "there is no %s", place).WithHint("banger up --help")
		}
		return "", err
	}
	return place, nil
}

// repositoryVM finds the VM of the repository that banger was called in, and the
// subdirectory in which.
func (a *app) repositoryVM(ctx context.Context, c *client) (*bangerv1.FindWorkspaceResponse, error) {
	here, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	found, err := c.workspaces.Find(ctx, &bangerv1.FindWorkspaceRequest{Path: here})
	if err != nil {
		e := asError(err)
		if isLost(err) || e.Code == api.Internal || e.Code == api.Cancelled {
			return nil, err
		}
		return nil, api.Errorf(api.Invalid, "no VM is named, and this is no repository that could have one: %s", e.Message).WithHint("banger ps")
	}
	if found.Vm == nil {
		return nil, api.Errorf(api.NotFound, "no VM is named, and %s has none", found.Repository).WithHint("banger up")
	}
	return found, nil
}

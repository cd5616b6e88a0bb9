package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) runCommand() *cobra.Command {
	f := &enterFlags{}
	cmd := &cobra.Command{
		Use:   "run [IMAGE] [-- CMD…]",
		Short: "a new VM, then a shell or CMD in it",
		Long: `Run creates a VM from IMAGE (default: the configured one) and opens a login shell, or
runs CMD, in it. The VM goes on running afterwards; with --rm it is removed, whatever
happened.

A missing kernel and image are made first. Ctrl-C undoes what this run began, and so
does a CMD that cannot be begun.
An argument that begins with ".", "/" or "~" is a repository: then run is up.
A piped or redirected stdin goes to CMD.`,
		Example: `  banger run --rm -- uname -a
  banger run --name box --cpus 2 --memory 1G
  tar c . | banger run --rm -- tar tv`,
		Annotations: guestsExits(),
	}
	f.add(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		before, argv, dashed := splitDash(cmd, args)
		switch {
		case len(before) > 1:
			return usage(cmd, "%q is one argument too many: a command comes after --", before[1]).
				WithHint("%s %s -- %s", cmd.CommandPath(), before[0], strings.Join(before[1:], " "))
		case dashed && len(argv) == 0:
			return usage(cmd, "no command after --")
		case len(before) == 1 && isPath(before[0]):
			return a.up(cmd, f, before[0], argv)
		case len(before) == 1 && f.vm.image != "" && f.vm.image != before[0]:
			return usage(cmd, "two images are named: %s and %s", before[0], f.vm.image)
		case len(before) == 1:
			f.vm.image = before[0]
		}
		if f.untracked {
			return usage(cmd, "--include-untracked needs a repository").WithHint("banger up --include-untracked")
		}
		if err := f.check(a, cmd, argv); err != nil {
			return err
		}
		c, err := a.connect(cmd.Context())
		if err != nil {
			return err
		}
		defer c.close()
		e := &entry{app: a, client: c, cmd: cmd, flags: f}
		return e.close(e.fresh(cmd.Context(), argv))
	}
	return cmd
}

// fresh makes a VM without a repository and goes in.
func (e *entry) fresh(ctx context.Context, argv []string) error {
	x, err := e.command(e.cmd, &e.flags.exec, "", argv, true)
	if err != nil {
		return err
	}
	if err := e.create(ctx, e.flags.vm.request()); err != nil {
		return err
	}
	if e.flags.detach {
		return e.printVM(e.vm)
	}
	return e.execute(ctx, x, "")
}

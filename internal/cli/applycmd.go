package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/apply"
)

func (a *app) applyCommand() *cobra.Command {
	var o apply.Options
	cmd := &cobra.Command{
		Use:   "apply [VM]",
		Short: "bring what changed inside back to the host",
		Long: `Apply puts what was changed in the repository inside onto the host's working tree, all
or nothing: it checks first, and refuses where the host's files have changed in the
same places. With --branch it becomes a commit on a new branch, and the working tree
stays as it is. The commit stands on the host's, so it also holds the files that were
changed on the host before they came in; a note counts them. Where nothing was changed
inside there is nothing to apply, and no branch. An earlier apply that was killed is
ended first, also with --branch and --check.`,
		Example: `  banger apply
  banger apply --check
  banger apply --branch banger/shop`,
		Args:        arguments(0, 1, "VM"),
		Annotations: exits(),
	}
	cmd.Flags().StringVar(&o.Branch, "branch", "", "put it on a new branch `NAME`, not onto the working tree")
	cmd.Flags().BoolVar(&o.Check, "check", false, "only tell whether it would go")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		c, err := a.connect(cmd.Context())
		if err != nil {
			return err
		}
		defer c.close()
		ref, err := a.oneVM(cmd.Context(), c, args)
		if err != nil {
			return err
		}
		vm, err := c.vms.Show(cmd.Context(), &bangerv1.ShowVMRequest{Ref: ref})
		if err != nil {
			return err
		}
		// A branch stands on a commit, so what was uncommitted there is part of the patch.
		patch, meta, err := a.fetchPatch(cmd.Context(), c, &bangerv1.ExportWorkspaceRequest{Ref: vm.Id, FromHead: o.Branch != ""})
		if err != nil {
			return err
		}
		defer patch.Close()
		o.Head, o.Message = meta.GetHead(), "banger: changes from VM "+vm.Name
		r, err := apply.Patch(cmd.Context(), meta.GetHostPath(), patch, o)
		for _, line := range r.Notes {
			a.ui.note("%s", line)
		}
		if err == nil {
			a.ui.note("%s", applied(r, o.Check))
		}
		return err
	}
	return cmd
}

// applied says what came of a patch.
func applied(r apply.Result, check bool) string {
	switch {
	case r.Present:
		return "nothing to apply: the host has these changes already"
	case r.Files == 0:
		return "nothing to apply"
	case check:
		return "it applies: " + count(r.Files, "file")
	case r.Branch != "":
		return fmt.Sprintf("branch %s is at %s", cleanLine(r.Branch), r.Commit[:min(7, len(r.Commit))])
	}
	return "applied " + count(r.Files, "file")
}

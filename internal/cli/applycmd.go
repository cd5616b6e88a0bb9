package cli

import (
	"os"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func (a *app) applyCommand() *cobra.Command {
	var o applyOptions
	cmd := &cobra.Command{
		Use:   "apply [VM]",
		Short: "bring what changed inside back to the host",
		Long: `Apply puts what was changed in the repository inside onto the host's working tree, all
or nothing: it checks first, and refuses where the host's files have changed in the
same places. With --branch it becomes a commit on a new branch, and the working tree
stays as it is. The commit stands on the host's, so it also holds the files that were
changed on the host before they came in; a note counts them. Where nothing was changed
inside there is nothing to apply, and no branch.`,
		Example: `  banger apply
  banger apply --check
  banger apply --branch banger/shop`,
		Args:        arguments(0, 1, "VM"),
		Annotations: exits(),
	}
	cmd.Flags().StringVar(&o.branch, "branch", "", "put it on a new branch `NAME`, not onto the working tree")
	cmd.Flags().BoolVar(&o.check, "check", false, "only tell whether it would go")
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
		o.vm = vm.Name
		patch, err := os.CreateTemp("", "banger-*.patch")
		if err != nil {
			return err
		}
		defer os.Remove(patch.Name())
		defer patch.Close()
		// A branch stands on a commit, so what was uncommitted there is part of the patch.
		meta, err := a.export(cmd.Context(), c, &bangerv1.ExportWorkspaceRequest{Ref: vm.Id, FromHead: o.branch != ""}, patch)
		if err != nil {
			return err
		}
		return a.applyPatch(cmd.Context(), meta, patch, o)
	}
	return cmd
}

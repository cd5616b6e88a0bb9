package cli

import (
	"github.com/spf13/cobra"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
)

// exportCommand is diff under the name of the founding document.
func (a *app) exportCommand() *cobra.Command {
	cmd := a.diffCommand()
	cmd.Use = "export [VM]"
	cmd.Example = "  banger workspace export shop > shop.patch"
	return cmd
}

func (a *app) prepareCommand() *cobra.Command {
	var untracked bool
	cmd := &cobra.Command{
		Use:   "prepare [VM] [PATH]",
		Short: "bring a repository into a running VM",
		Long: `Workspace prepare brings the repository that PATH (default: here) lies in into a VM
that runs, by default the repository's own, as up does before it runs a command.`,
		Example:     "  banger workspace prepare\n  banger workspace prepare shop ~/shop",
		Args:        arguments(0, 2, "VM"),
		Annotations: exits(),
	}
	cmd.Flags().BoolVar(&untracked, "include-untracked", false, "bring untracked files in too; ignored ones never")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		place := "."
		if len(args) == 2 {
			place, args = args[1], args[:1]
		} else if len(args) == 1 && isPath(args[0]) {
			place, args = args[0], nil
		}
		typed := place
		place, err := a.absolute(typed)
		if err != nil {
			return err
		}
		c, err := a.connect(cmd.Context())
		if err != nil {
			return err
		}
		defer c.close()
		var vm *bangerv1.VM
		if len(args) == 1 {
			vm, err = c.vms.Show(cmd.Context(), &bangerv1.ShowVMRequest{Ref: args[0]})
		} else {
			var found *bangerv1.FindWorkspaceResponse
			found, err = c.workspaces.Find(cmd.Context(), &bangerv1.FindWorkspaceRequest{Path: place})
			if vm = found.GetVm(); err == nil && vm == nil {
				err = api.Errorf(api.NotFound, "%s has no VM", found.Repository).WithHint("banger up %s", place)
			}
		}
		if err != nil {
			return hintPlace(err, typed, place)
		}
		p, err := a.prepare(c, vm, place, untracked)
		if err == nil && a.json {
			return a.printJSON(p)
		}
		return hintPlace(err, typed, place)
	}
	return cmd
}

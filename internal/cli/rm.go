package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func (a *app) rmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "rm VM…",
		Aliases: []string{"delete"},
		Short:   "remove VMs and their disks",
		Long: `Rm removes VMs with everything in them, and prints what it was called with. A VM is
named in full here: a prefix is refused. One that runs is removed only with -f.`,
		Example: `  banger rm shop
  banger rm -f shop web`,
		Args:        arguments(1, -1, "VM"),
		Annotations: exits(),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also a VM that runs, without asking its guest")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		return a.each(cmd, args, verb{
			begin: func(ctx context.Context, c *client, ref string) (*bangerv1.Operation, error) {
				return c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: ref, Force: force})
			},
			removes: true,
		})
	}
	return cmd
}

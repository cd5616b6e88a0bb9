package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func (a *app) startCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "start [VM…]",
		Short: "start VMs",
		Long: `Start starts stopped VMs, by default that of the repository here, waits until their
systems are ready, and prints their names. One that runs already is left as it is.
Ctrl-C undoes a start.`,
		Example: `  banger start
  banger start shop web`,
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.each(cmd, args, verb{
				begin: func(ctx context.Context, c *client, ref string) (*bangerv1.Operation, error) {
					return c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: ref})
				},
			})
		},
	}
}

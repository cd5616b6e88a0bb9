package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

// stopTimeout is how long a guest may take to shut down if nobody says so.
const stopTimeout = 30 * time.Second

func (a *app) stopCommand() *cobra.Command {
	timeout := timeValue(stopTimeout)
	cmd := &cobra.Command{
		Use:   "stop [VM…]",
		Short: "shut VMs down",
		Long: `Stop asks the guests to shut down, by default that of the repository here, ends after
--timeout those that have not, and prints the names. Disks stay.
Ctrl-C while a guest shuts down lets banger stop waiting for it.`,
		Example: `  banger stop
  banger stop --timeout 2m shop web
  banger stop --timeout 0s shop`,
		Annotations: exits(),
	}
	cmd.Flags().Var(&timeout, "timeout", "how long a guest may take; 0s ends it at once")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		seconds := time.Duration(timeout).Seconds()
		if seconds == 0 {
			seconds = -1
		}
		return a.each(cmd, args, verb{
			begin: func(ctx context.Context, c *client, ref string) (*bangerv1.Operation, error) {
				return c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: ref, TimeoutSeconds: seconds})
			},
		})
	}
	return cmd
}

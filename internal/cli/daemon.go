package cli

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"banger/api"
)

func (a *app) daemonCommand() *cobra.Command {
	return a.parent("daemon", "the daemon, which banger starts by itself", a.daemonStatusCommand(), a.daemonStopCommand())
}

func (a *app) daemonStatusCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "status",
		Short:       "whether the daemon runs, and what it is",
		Long:        "Daemon status prints what the running daemon says of itself. It starts none: the exit code\nis 3 when none runs.",
		Example:     "  banger daemon status",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.running(cmd.Context())
			if errors.Is(err, errNoDaemon) {
				return api.Errorf(api.NotFound, "no daemon is running").WithHint("any command starts it, for example banger ps")
			}
			if err != nil {
				return err
			}
			defer c.close()
			if c.status == nil {
				return api.Errorf(api.Stopping, "the daemon is shutting down").WithHint("banger ps")
			}
			if a.json {
				return a.printJSON(c.status)
			}
			s := c.status
			t := &table{}
			t.row("version:", orElse(s.Version, "-"))
			t.row("pid:", fmt.Sprint(s.Pid))
			t.row("socket:", s.Socket)
			t.row("state:", s.StateDir)
			t.row("log:", c.layout.Log())
			t.row("instance:", s.Instance)
			t.row("started:", a.ago(s.StartedAt))
			t.row("VMs:", fmt.Sprintf("%d, of which %d run", s.Vms, s.RunningVms))
			t.row("busy with:", count(s.BusyOperations, "job"))
			t.row("VMM:", s.Vmm)
			t.row("accelerator:", s.Accelerator)
			if s.AcceleratorReason != "" {
				t.row("no KVM:", s.AcceleratorReason)
			}
			return t.write(a.stdout)
		},
	}
}

func (a *app) daemonStopCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stop",
		Short: "end the daemon",
		Long: `Daemon stop ends the daemon and waits until it is gone. VMs go on running; jobs that
run are undone, commands in guests lose their connection, and a guest that is rebooting
comes up with the next daemon. The next banger starts that.`,
		Example:     "  banger daemon stop",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.running(cmd.Context())
			if errors.Is(err, errNoDaemon) {
				a.ui.note("no daemon is running")
				return nil
			}
			if err != nil {
				return err
			}
			defer c.close()
			return c.shutdown(cmd.Context(), false)
		},
	}
}

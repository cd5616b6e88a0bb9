package cli

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/fcproc"
)

func (a *app) setupCommand() *cobra.Command {
	return a.parent("setup", "what banger can use of this machine, made ready", a.setupFirecrackerCommand())
}

func (a *app) setupFirecrackerCommand() *cobra.Command {
	var from string
	var undo bool
	cmd := &cobra.Command{
		Use:   "firecracker",
		Short: "install Firecracker for the system's daemon",
		Long: `Setup firecracker puts firecracker and jailer, release ` + fcproc.Tested + `, into the state directory
of the system's daemon (BANGER_STATE_DIR, else /var/lib/banger), from the project's
releases or from a file that you have. Their checksums must be the release's; another
version is taken too, and is untested. VMs that run keep theirs. --undo removes them.
It needs root.`,
		Example:     "  sudo banger setup firecracker\n  sudo banger setup firecracker --from firecracker-v" + fcproc.Tested + "-x86_64.tgz",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if undo && from != "" {
				return usage(cmd, "--undo takes no --from")
			}
			if undo {
				return undoFirecracker()
			}
			l, err := systemState()
			if err != nil {
				return err
			}
			version, err := fcproc.Install(cmd.Context(), l.Firecracker(), l.Cache(), from, a.ui.print)
			a.ui.clear()
			if err != nil {
				return err
			}
			if version != fcproc.Tested {
				a.ui.note("Firecracker %s is untested: banger is tested with %s", version, fcproc.Tested)
			}
			_, err = fmt.Fprintln(a.stdout, version)
			return err
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "a release's .tgz, or a directory with both programs")
	cmd.Flags().BoolVar(&undo, "undo", false, "remove what setup installed")
	return cmd
}

// systemState makes the state directory of the system's daemon, if it is not there.
func systemState() (config.Layout, error) {
	l, err := config.SystemDir()
	if err != nil {
		return l, err
	}
	if err := onlyRoot("sudo banger setup firecracker"); err != nil {
		return l, err
	}
	if err := errors.Join(l.Prepare(), l.MarkSystem()); err != nil {
		return l, err
	}
	_, err = l.Instance()
	return l, err
}

// undoFirecracker makes nothing: in a directory that is not the system's daemon's nothing
// was installed, and what lies there is somebody's.
func undoFirecracker() error {
	l, err := config.SystemDir()
	if err != nil {
		return err
	}
	if err := onlyRoot("sudo banger setup firecracker --undo"); err != nil || !l.IsSystem() {
		return err
	}
	return fcproc.Uninstall(l.Firecracker())
}

func onlyRoot(hint string) error {
	if os.Geteuid() != 0 {
		return api.Errorf(api.Refused, "only root sets up the system's daemon").WithHint("%s", hint)
	}
	return nil
}

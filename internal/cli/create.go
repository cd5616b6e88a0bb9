package cli

import (
	"github.com/spf13/cobra"

	"banger/api"
)

func (a *app) createCommand() *cobra.Command {
	f := &vmFlags{}
	var noStart bool
	cmd := &cobra.Command{
		Use:   "create [IMAGE]",
		Short: "a new VM, without going in",
		Long: `Create makes a VM from IMAGE (default: the configured one), starts it, and prints its
name. A missing kernel and image are made first. Ctrl-C undoes it all.`,
		Example: `  banger create --name box
  banger create --no-start --memory 8G --disk 100G debian-bookworm`,
		Args:        arguments(0, 1, "an image"),
		Annotations: exits(),
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&noStart, "no-start", false, "make it only; banger start starts it")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) == 1 {
			if isPath(args[0]) {
				return usage(cmd, "%s is a path, and create takes an image", args[0]).WithHint("banger up -d %s", args[0])
			}
			if f.image != "" && f.image != args[0] {
				return usage(cmd, "two images are named: %s and %s", args[0], f.image)
			}
			f.image = args[0]
		}
		c, err := a.connect(cmd.Context())
		if err != nil {
			return err
		}
		defer c.close()
		req := f.request()
		req.NoStart = noStart
		vm, err := a.createVM(c, cmd, req)
		if vm == nil && err == nil {
			err = api.Errorf(api.Internal, "the daemon does not say what it made")
		}
		if err != nil && vm != nil {
			// Ctrl-C came too late to undo it there.
			e := &entry{app: a, client: c, cmd: cmd, flags: &enterFlags{}, vm: vm, created: true}
			return e.close(err)
		}
		if err != nil {
			return err
		}
		return a.printVM(vm)
	}
	return cmd
}

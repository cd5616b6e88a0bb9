package cli

import (
	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

func (a *app) kernelCommand() *cobra.Command {
	return a.parent("kernel", "kernels: list, get", a.kernelLsCommand(), a.kernelPullCommand())
}

func (a *app) kernelLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "ls",
		Aliases:     []string{"list"},
		Short:       "kernels that are here or can be pulled",
		Long:        `Kernel ls lists the kernels that are here, and those that can be pulled. -q prints names only.`,
		Example:     "  banger kernel ls",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			res, err := c.kernels.List(cmd.Context(), &bangerv1.ListKernelsRequest{})
			if err != nil {
				return err
			}
			switch {
			case a.json:
				return printJSONList(a, res.Kernels)
			case a.ui.quiet:
				return printNames(a, res.Kernels)
			}
			t := &table{}
			t.row("NAME", "STATE", "VERSION", "SIZE", "USED BY", "CREATED", "SOURCE")
			for _, k := range res.Kernels {
				if k.Available {
					t.row(k.Name, "can be pulled", orElse(k.Version, "-"), "-", "-", "-", k.Source)
				} else {
					t.row(k.Name, "here", orElse(k.Version, "-"), config.FormatSize(k.Size), count(k.InUse, "VM"), a.ago(k.CreatedAt), k.Source)
				}
			}
			return a.printTable(t)
		},
	}
}

func (a *app) kernelPullCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "pull [NAME]",
		Short: "get a kernel",
		Long: `Kernel pull gets a kernel with its modules, by default the one that VMs boot, and
prints its name. One that is here already and would come out the same is left alone.
Ctrl-C undoes it.`,
		Example:     "  banger kernel pull\n  banger kernel pull debian-cloud",
		Args:        arguments(0, 1, "NAME"),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.pull(cmd, args, func(c *client, name string) (*bangerv1.Operation, error) {
				return c.kernels.Pull(a.signals.hard, &bangerv1.PullKernelRequest{Name: name})
			})
		},
	}
}

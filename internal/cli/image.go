package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

func (a *app) imageCommand() *cobra.Command {
	return a.parent("image", "root file systems: list, get", a.imageLsCommand(), a.imagePullCommand())
}

func (a *app) imageLsCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "ls",
		Aliases:     []string{"list"},
		Short:       "images that are here or can be pulled",
		Long:        `Image ls lists the images that are here, and those that can be pulled. -q prints names only.`,
		Example:     "  banger image ls",
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			res, err := c.images.List(cmd.Context(), &bangerv1.ListImagesRequest{})
			if err != nil {
				return err
			}
			switch {
			case a.json:
				return printJSONList(a, res.Images)
			case a.ui.quiet:
				return printNames(a, res.Images)
			}
			t := &table{}
			t.row("NAME", "STATE", "KERNEL", "SIZE", "USED BY", "CREATED", "SOURCE")
			for _, i := range res.Images {
				if i.Available {
					t.row(i.Name, "can be pulled", orElse(i.Kernel, "-"), "-", "-", "-", i.Source)
				} else {
					t.row(i.Name, "here", orElse(i.Kernel, "-"), config.FormatSize(i.Size), count(i.InUse, "VM"), a.ago(i.CreatedAt), i.Source)
				}
			}
			return a.printTable(t)
		},
	}
}

func (a *app) imagePullCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "pull [NAME]",
		Short: "get an image",
		Long: `Image pull gets an image, by default the one that VMs are made from, and prints its
name. One that is here already and would come out the same is left alone.
Ctrl-C undoes it.`,
		Example:     "  banger image pull\n  banger image pull debian-bookworm",
		Args:        arguments(0, 1, "NAME"),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.pull(cmd, args, func(c *client, name string) (*bangerv1.Operation, error) {
				return c.images.Pull(a.signals.hard, &bangerv1.PullImageRequest{Name: name})
			})
		},
	}
}

// pull runs a pull of an image or a kernel and prints what came.
func (a *app) pull(cmd *cobra.Command, args []string, begin func(c *client, name string) (*bangerv1.Operation, error)) error {
	name := ""
	if len(args) == 1 {
		name = args[0]
	}
	c, err := a.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer c.close()
	op, err := begin(c, name)
	if err != nil {
		return err
	}
	if op, err = a.await(c, op); err != nil {
		return err
	}
	switch {
	case a.json && op.GetImage() != nil:
		return a.printJSON(op.GetImage())
	case a.json && op.GetKernel() != nil:
		return a.printJSON(op.GetKernel())
	case op.GetImage() != nil:
		name = op.GetImage().Name
	case op.GetKernel() != nil:
		name = op.GetKernel().Name
	}
	_, err = fmt.Fprintln(a.stdout, cleanLine(name))
	return err
}

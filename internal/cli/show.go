package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

func (a *app) showCommand() *cobra.Command {
	return &cobra.Command{
		Use:         "show [VM]",
		Aliases:     []string{"inspect"},
		Short:       "everything about one VM",
		Long:        `Show prints what banger knows of a VM, by default that of the repository here.`,
		Example:     "  banger show shop\n  banger show --format json shop",
		Args:        arguments(0, 1, "VM"),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			vm, err := a.showOrHere(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(vm)
			}
			return a.showVM(vm)
		},
	}
}

// showOrHere asks for the VM that args name, without any for that of the repository here.
func (a *app) showOrHere(ctx context.Context, c *client, args []string) (*bangerv1.VM, error) {
	ref := ""
	if len(args) > 0 {
		ref = args[0]
	} else {
		found, err := a.repositoryVM(ctx, c)
		if err != nil {
			return nil, err
		}
		ref = found.Vm.Id
	}
	return c.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: ref})
}

func (a *app) showVM(vm *bangerv1.VM) error {
	t := &table{}
	line := t.line
	line("name", vm.Name)
	line("id", vm.Id)
	line("state", stateOf(vm))
	line("problem", vm.Problem)
	line("last error", vm.LastError)
	line("ended", vm.Ended)
	line("image", vm.Image)
	line("kernel", vm.Kernel)
	line("cpus", fmt.Sprint(vm.Cpus))
	line("memory", config.FormatSize(vm.Memory))
	line("disk", config.FormatSize(vm.Disk))
	networkLines(vm, line)
	line("user", vm.User)
	line("created", a.ago(vm.CreatedAt))
	if vm.RemoveOnRelease {
		line("removed", "when the command that holds it ends")
	}
	if w := vm.Workspace; w != nil {
		line("repository", w.HostPath)
		line("inside at", w.GuestPath)
		line("taken at", orElse(w.Head, "no commit"))
		line("prepared", a.ago(w.PreparedAt))
		line("changes", a.changesOf(vm))
	}
	for _, key := range slices.Sorted(maps.Keys(vm.Handles)) {
		line(key, vm.Handles[key])
	}
	return t.write(a.stdout)
}

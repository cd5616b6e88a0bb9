package cli

import (
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
			var ref string
			if len(args) == 1 {
				ref = args[0]
			} else {
				found, err := a.repositoryVM(cmd.Context(), c)
				if err != nil {
					return err
				}
				ref = found.Vm.Id
			}
			vm, err := c.vms.Show(cmd.Context(), &bangerv1.ShowVMRequest{Ref: ref})
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

func (a *app) showVM(vm *bangerv1.VM) error {
	t := &table{}
	line := func(key, value string) {
		if value != "" {
			t.row(key+":", value)
		}
	}
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

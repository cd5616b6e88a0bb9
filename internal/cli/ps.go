package cli

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

func (a *app) psCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ps",
		Aliases: []string{"ls", "list"},
		Short:   "all VMs",
		Long: `Ps lists all VMs. It asks no guest: CHANGES is how many files were changed inside when
that was last seen, and says when. -q prints the names only.`,
		Example: `  banger ps
  banger rm -f $(banger ps -q)`,
		Args:        arguments(0, 0, ""),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			res, err := c.vms.List(cmd.Context(), &bangerv1.ListVMsRequest{})
			if err != nil {
				return err
			}
			return a.printVMs(res.Vms)
		},
	}
}

func (a *app) printVMs(vms []*bangerv1.VM) error {
	switch {
	case a.json:
		return printJSONList(a, vms)
	case a.ui.quiet:
		return printNames(a, vms)
	}
	t := &table{}
	t.row("NAME", "STATE", "IMAGE", "CPUS", "MEM", "DISK", "CHANGES", "CREATED")
	for _, vm := range vms {
		t.row(vm.Name, stateOf(vm), vm.Image, fmt.Sprint(vm.Cpus), config.FormatSize(vm.Memory),
			config.FormatSize(vm.Disk), a.changesOf(vm), a.ago(vm.CreatedAt))
	}
	if err := a.printTable(t); err != nil {
		return err
	}
	for _, vm := range vms {
		if vm.Problem != "" {
			a.ui.note("%s: %s", vm.Name, cleanLine(vm.Problem))
		}
	}
	return nil
}

// printNames prints one name per line.
func printNames[M interface{ GetName() string }](a *app, list []M) error {
	for _, m := range list {
		if _, err := fmt.Fprintln(a.stdout, cleanLine(m.GetName())); err != nil {
			return err
		}
	}
	return nil
}

// stateOf is the state as people read it; "!" marks a problem, which is told below.
func stateOf(vm *bangerv1.VM) string {
	state := strings.ToLower(vm.State.String())
	if vm.Problem != "" {
		state += "!"
	}
	return state
}

func (a *app) changesOf(vm *bangerv1.VM) string {
	w := vm.Workspace
	if w == nil || w.ChangesAt == nil {
		return "-"
	}
	return fmt.Sprintf("%s, %s", count(w.Changes, "file"), a.ago(w.ChangesAt))
}

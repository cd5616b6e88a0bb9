package cli

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
)

func (a *app) psCommand() *cobra.Command {
	var wide bool
	cmd := &cobra.Command{
		Use:     "ps",
		Aliases: []string{"ls", "list"},
		Short:   "all VMs",
		Long: `Ps lists all VMs. It asks no guest: CHANGES is how many files were changed inside when
that was last seen, and says when. -q prints the names only.

--wide adds what a VM may reach, with the number of its rules, and how many connections
were refused since its network began.`,
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
			if wide && !a.ui.quiet {
				showRunning(cmd.Context(), c, res.Vms)
			}
			return a.printVMs(res.Vms, wide)
		},
	}
	cmd.Flags().BoolVar(&wide, "wide", false, "more columns: NETWORK and REFUSED")
	return cmd
}

// showTimeout bounds how long ps --wide waits for all that it asks.
const showTimeout = 2 * time.Second

// showRunning puts into vms what Show knows more of those that run. One that does not
// answer in time stays as it is.
func showRunning(ctx context.Context, c *client, vms []*bangerv1.VM) {
	ctx, cancel := context.WithTimeout(ctx, showTimeout)
	defer cancel()
	places := make(chan struct{}, maxAtOnce)
	var wg sync.WaitGroup
	for i, vm := range vms {
		if vm.State != bangerv1.VM_RUNNING {
			continue
		}
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			if shown, err := c.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: vm.Id}); err == nil {
				vms[i] = shown
			}
		})
	}
	wg.Wait()
}

func (a *app) printVMs(vms []*bangerv1.VM, wide bool) error {
	switch {
	case a.json:
		return printJSONList(a, vms)
	case a.ui.quiet:
		return printNames(a, vms)
	}
	t := &table{}
	row := func(columns ...string) {
		if !wide {
			columns = columns[:len(columns)-2]
		}
		t.row(columns...)
	}
	row("NAME", "STATE", "IMAGE", "CPUS", "MEM", "DISK", "CHANGES", "CREATED", "NETWORK", "REFUSED")
	for _, vm := range vms {
		row(vm.Name, stateOf(vm), vm.Image, fmt.Sprint(vm.Cpus), config.FormatSize(vm.Memory),
			config.FormatSize(vm.Disk), a.changesOf(vm), a.ago(vm.CreatedAt), networkOf(vm), refusedOf(vm))
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

// networkOf is short: "none, 2 rules".
func networkOf(vm *bangerv1.VM) string {
	n := vm.Network
	if n == nil {
		return "-"
	}
	rules := len(n.Allow) + len(n.Deny)
	if rules == 0 {
		return n.Preset
	}
	return n.Preset + ", " + count(rules, "rule")
}

func refusedOf(vm *bangerv1.VM) string {
	if t := vm.Traffic; t == nil || uncounted(t) {
		return "-"
	}
	return fmt.Sprint(vm.Traffic.Refused)
}

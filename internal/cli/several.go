package cli

import (
	"context"
	"encoding/json"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

// maxAtOnce bounds how many VMs one command works on side by side.
const maxAtOnce = 16

// verb is a command that does one thing to each of several VMs.
type verb struct {
	begin   func(ctx context.Context, c *client, ref string) (*bangerv1.Operation, error)
	removes bool // there is no VM afterwards, only what it was called
}

// each runs v on the VMs side by side: good ones go on when others fail, and the worst
// exit code is returned. Without refs it is the VM of the repository here.
func (a *app) each(cmd *cobra.Command, refs []string, v verb) error {
	c, err := a.connect(cmd.Context())
	if err != nil {
		return err
	}
	defer c.close()
	if len(refs) == 0 {
		found, err := a.repositoryVM(cmd.Context(), c)
		if err != nil {
			return err
		}
		refs = []string{found.Vm.Name}
	}
	refs = unique(refs)
	var (
		mu    sync.Mutex // results are reported one at a time
		worst error      // nil, or of the worst exit code
		wg    sync.WaitGroup
	)
	done := make([]*bangerv1.VM, len(refs)) // nil where it failed
	places := make(chan struct{}, maxAtOnce)
	for i, ref := range refs {
		wg.Go(func() {
			places <- struct{}{}
			defer func() { <-places }()
			label := ""
			if len(refs) > 1 {
				label = ref
			}
			vm, err := a.one(cmd.Context(), c, ref, label, v)
			mu.Lock()
			defer mu.Unlock()
			if err == nil && !a.json {
				err = a.printVM(vm)
			}
			if err == nil {
				done[i] = vm
			} else if len(refs) > 1 {
				a.report(err)
				err = exit(exitCodeOf(err, false))
			}
			if exitCodeOf(err, false) > exitCodeOf(worst, false) {
				worst = err
			}
		})
	}
	wg.Wait()
	if a.json {
		if err := a.printDone(done, v.removes); err != nil {
			return err
		}
	}
	return worst
}

// printDone prints one array: the VMs, or the names of those that are gone.
func (a *app) printDone(vms []*bangerv1.VM, removed bool) error {
	vms = slices.DeleteFunc(vms, func(vm *bangerv1.VM) bool { return vm == nil })
	if !removed {
		return printJSONList(a, vms)
	}
	names := []string{}
	for _, vm := range vms {
		names = append(names, vm.Name)
	}
	b, err := json.Marshal(names)
	if err != nil {
		return err
	}
	return a.printIndented(b)
}

// one returns the VM that the operation left, after rm one with the name only that it
// was called by.
func (a *app) one(ctx context.Context, c *client, ref, label string, v verb) (*bangerv1.VM, error) {
	if ctx.Err() != nil {
		return nil, errInterrupted
	}
	op, err := v.begin(a.signals.hard, c, ref)
	if err != nil {
		return nil, err
	}
	op, err = a.watch(c, op, watch{ctx: a.signals.hard, cancel: a.signals.soft, label: label})
	if err != nil {
		return nil, err
	}
	if vm := op.GetVm(); vm != nil && !v.removes {
		return vm, nil
	}
	return &bangerv1.VM{Name: ref}, nil
}

// unique drops what was named before.
func unique(refs []string) []string {
	var out []string
	for _, ref := range refs {
		if !slices.Contains(out, ref) {
			out = append(out, ref)
		}
	}
	return out
}

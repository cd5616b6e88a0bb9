package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/guest/wire"
)

// enterFlags are those of the commands that go into a VM: up and run.
type enterFlags struct {
	vm        vmFlags
	exec      execFlags
	detach    bool
	remove    bool
	untracked bool
}

func (f *enterFlags) add(cmd *cobra.Command) {
	f.vm.add(cmd)
	f.exec.add(cmd, "pass stdin on (default: when stdin and stdout are terminals, and when it is a pipe or a file)")
	fs := cmd.Flags()
	fs.BoolVarP(&f.detach, "detach", "d", false, "only see to it that the VM runs, and print its name")
	fs.BoolVar(&f.remove, "rm", false, "remove the VM at the end, whatever happens")
	fs.BoolVar(&f.untracked, "include-untracked", false, "bring untracked files in too; ignored ones never")
}

// check refuses what cannot be meant, before anything is begun.
func (f *enterFlags) check(a *app, cmd *cobra.Command, argv []string) error {
	switch {
	case f.detach && len(argv) > 0:
		return usage(cmd, "-d and a command exclude each other")
	case f.detach && f.remove:
		return usage(cmd, "-d and --rm exclude each other: nothing would tell when the VM is no longer needed")
	case !f.detach && len(argv) == 0 && !a.onTerminal():
		return usage(cmd, "a shell needs a terminal: give a command, or -d").WithHint("%s -- COMMAND", cmd.CommandPath())
	}
	return nil
}

// entry is one way into a VM. What it did itself it undoes, as long as no command has
// begun in it.
type entry struct {
	*app
	client *client
	cmd    *cobra.Command
	flags  *enterFlags

	vm      *bangerv1.VM
	created bool // by this entry
	started bool // by this entry; the VM was there, and stopped
	entered bool // the command has begun
	lease   *lease
}

// close ends the entry: a VM that is to be removed, or that was made for nothing, goes,
// and one that was started before Ctrl-C stops again.
func (e *entry) close(err error) error {
	if e.started && !e.entered && err != nil && e.signals.interrupted() {
		if serr := e.stopVM(); serr != nil && e.signals.hard.Err() == nil {
			e.report(serr)
		}
	}
	if e.created && (e.flags.remove || err != nil && !e.entered) {
		// The exit code stays that of the command: it is what the caller asked for.
		if rerr := e.removeVM(); rerr != nil && e.signals.hard.Err() == nil {
			e.report(rerr)
		}
	}
	if e.lease != nil {
		e.lease.drop()
	}
	return err
}

// removeVM is not cancelled by the Ctrl-C that led here; a second one leaves the rest
// to the daemon.
func (e *entry) removeVM() error {
	return e.undo("removing", func(ctx context.Context) (*bangerv1.Operation, error) {
		return e.client.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: e.vm.Id, Force: true})
	})
}

// stopVM is like removeVM.
func (e *entry) stopVM() error {
	return e.undo("stopping", func(ctx context.Context) (*bangerv1.Operation, error) {
		return e.client.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: e.vm.Id, TimeoutSeconds: stopTimeout.Seconds()})
	})
}

func (e *entry) undo(what string, begin func(context.Context) (*bangerv1.Operation, error)) error {
	op, err := begin(e.signals.hard)
	if isLost(err) {
		if err = e.ensure(e.signals.hard, e.client); err == nil {
			op, err = begin(e.signals.hard)
		}
	}
	if err == nil {
		_, err = e.watch(e.client, op, watch{ctx: e.signals.hard, label: what + " " + e.vm.Name})
	}
	if codeOf(err) == api.NotFound {
		return nil
	}
	return err
}

// create makes the VM and starts it.
func (e *entry) create(ctx context.Context, req *bangerv1.CreateVMRequest) error {
	if ctx.Err() != nil {
		return errInterrupted
	}
	req.RemoveOnRelease = e.flags.remove
	vm, err := e.createVM(e.client, e.cmd, req)
	if vm != nil {
		e.vm, e.created = vm, true
	}
	if err != nil {
		return err
	}
	if e.flags.remove {
		e.lease, err = e.hold(e.client, vm.Id)
	}
	return err
}

// createVM is makeVM for cmd, which the daemon does not know: its hints name create.
func (a *app) createVM(c *client, cmd *cobra.Command, req *bangerv1.CreateVMRequest) (*bangerv1.VM, error) {
	vm, err := a.makeVM(c, req)
	return vm, rehint(err, func(hint string) string {
		if rest, ok := strings.CutPrefix(hint, "banger create "); ok {
			hint = cmd.CommandPath() + " " + rest
		}
		return hint
	})
}

// makeVM runs a create and says what is made. The VM comes back also with
// errInterrupted, when the wish to cancel came too late to undo it.
func (a *app) makeVM(c *client, req *bangerv1.CreateVMRequest) (*bangerv1.VM, error) {
	a.noteAccelerator(c)
	op, err := c.vms.Create(a.signals.hard, req)
	if err != nil {
		return nil, err
	}
	told := false
	op, err = a.watch(c, op, watch{ctx: a.signals.hard, cancel: a.signals.soft, seen: func(op *bangerv1.Operation) {
		if vm := op.GetVm(); vm != nil && !told {
			told = true
			verb := "creating"
			if op.State != bangerv1.Operation_RUNNING {
				verb = "created"
			}
			a.ui.note("%s %s: %s, %s memory, %s disk", verb, vm.Name, count(vm.Cpus, "cpu"),
				config.FormatSize(vm.Memory), config.FormatSize(vm.Disk))
		}
	}})
	if op.GetState() != bangerv1.Operation_DONE {
		return nil, err
	}
	return op.GetVm(), err
}

// noteAccelerator says once in the life of a state directory, and again when the
// reason changes, why VMs do not run on KVM.
func (a *app) noteAccelerator(c *client) {
	reason := c.status.AcceleratorReason
	if reason == "" || a.ui.quiet {
		return
	}
	marker := filepath.Join(c.layout.Cache(), "accelerator-note")
	if said, err := os.ReadFile(marker); err == nil && string(said) == reason {
		return
	}
	a.ui.note("KVM is not used: %s; VMs are emulated, which is slower", reason)
	// If it cannot be written the note comes again.
	_ = os.WriteFile(marker, []byte(reason), 0o600)
}

// start sees to it that an existing VM runs.
func (e *entry) start() error {
	if e.vm.State == bangerv1.VM_RUNNING {
		return nil
	}
	if e.signals.interrupted() {
		return errInterrupted
	}
	stopped := e.vm.State == bangerv1.VM_STOPPED
	op, err := e.client.vms.Start(e.signals.hard, &bangerv1.StartVMRequest{Ref: e.vm.Id, Ready: bangerv1.Ready(e.flags.vm.ready)})
	if err != nil {
		return err
	}
	op, err = e.await(e.client, op)
	e.started = stopped && op.GetState() == bangerv1.Operation_DONE
	if vm := op.GetVm(); vm != nil {
		e.vm = vm
	}
	return err
}

// prepare brings a repository into a running VM and says so.
func (a *app) prepare(c *client, vm *bangerv1.VM, repository string, untracked bool) (*bangerv1.Prepared, error) {
	if a.signals.interrupted() {
		return nil, errInterrupted
	}
	op, err := c.workspaces.Prepare(a.signals.hard, &bangerv1.PrepareWorkspaceRequest{
		Ref: vm.Id, Repository: repository, IncludeUntracked: untracked})
	if err != nil {
		return nil, err
	}
	if op, err = a.await(c, op); err != nil {
		return nil, err
	}
	p := op.GetPrepared()
	if p.GetWorkspace() == nil {
		return nil, api.Errorf(api.Internal, "the daemon does not say where it put the repository")
	}
	a.ui.note("%s", describePrepared(vm.Name, p))
	if len(p.Kept) > 0 {
		a.ui.note("changed on both sides and left as they are inside: %s", strings.Join(p.Kept, ", "))
	}
	for _, line := range p.Notes {
		a.ui.note("%s", line)
	}
	return p, nil
}

// describePrepared is one line: "shop: /home/ann/shop at 3f2c1ab + 2 changed files".
func describePrepared(name string, p *bangerv1.Prepared) string {
	at := "at " + p.HeadShort
	if p.HeadShort == "" {
		at = "without commits"
	}
	line := fmt.Sprintf("%s: %s %s", name, p.Workspace.GuestPath, at)
	if p.Changed > 0 {
		line += " + " + count(p.Changed, "changed file")
	}
	if p.SkippedUntracked > 0 {
		line += fmt.Sprintf(", without %s", count(p.SkippedUntracked, "untracked file"))
	}
	return cleanLine(line)
}

// execute runs the command, or a shell without one, and ends with its exit code.
func (e *entry) execute(ctx context.Context, x wire.Exec, fallback string) error {
	if ctx.Err() != nil {
		return errInterrupted
	}
	cmd := command{vm: e.vm.Id, name: e.vm.Name, exec: x, begun: func() { e.entered = true }}
	if e.flags.exec.dir != "" {
		fallback = ""
	}
	if err := e.passProxies(ctx, e.client, &cmd, e.vm); err != nil {
		return err
	}
	code, err := e.inGuest(ctx, e.client, cmd, fallback)
	if e.entered && !e.flags.remove && !e.vm.RemoveOnRelease && (len(x.Argv) == 0 || e.created && e.cmd.Name() == "run") {
		e.ui.note("%s goes on running; banger stop %s stops it, banger rm -f %s removes it", e.vm.Name, e.vm.Name, e.vm.Name)
	}
	if err == nil && code != 0 {
		err = exit(code)
	}
	return err
}

// printVM prints a VM that a command is done with: its name, or all of it as JSON.
func (a *app) printVM(vm *bangerv1.VM) error {
	if a.json {
		return a.printJSON(vm)
	}
	_, err := fmt.Fprintln(a.stdout, cleanLine(vm.Name))
	return err
}

// lease keeps a VM that goes when nobody holds it any more.
type lease struct {
	end  context.CancelFunc
	done chan struct{}
}

// hold takes the lease of a VM and keeps it, also over restarts of the daemon, until
// it is dropped. It returns when the lease is held.
func (a *app) hold(c *client, id string) (*lease, error) {
	ctx, cancel := context.WithCancel(a.signals.hard)
	l := &lease{end: cancel, done: make(chan struct{})}
	held := make(chan error, 1)
	go func() {
		defer close(l.done)
		told := false
		var lost time.Time
		for ctx.Err() == nil {
			err := holdOnce(ctx, c, id, func() {
				lost = time.Time{}
				if !told {
					told = true
					held <- nil
				}
			})
			if lost.IsZero() {
				lost = time.Now()
			}
			if !isLost(err) || time.Since(lost) > reconnectTimeout {
				if !told {
					held <- err
				}
				return
			}
			retry, done := context.WithTimeout(ctx, reconnectTimeout)
			if err := a.ensure(retry, c); err != nil && !told {
				told = true
				held <- err
			}
			done()
		}
	}()
	select {
	case err := <-held:
		if err != nil {
			l.drop()
			return nil, err
		}
		return l, nil
	case <-a.signals.hard.Done():
		l.drop()
		return nil, errInterrupted
	}
}

// holdOnce holds until the stream breaks.
func holdOnce(ctx context.Context, c *client, id string, held func()) error {
	stream, err := c.vms.Hold(ctx, &bangerv1.HoldVMRequest{Ref: id})
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		held()
	}
	if err := stream.Err(); err != nil {
		return err
	}
	return errNoDaemon
}

func (l *lease) drop() {
	l.end()
	<-l.done
}

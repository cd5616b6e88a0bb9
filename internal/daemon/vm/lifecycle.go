package vm

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"banger/api"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
	"banger/internal/shim"
)

// defaultStopTimeout is how long a guest may take to shut down before it is ended
// by force.
const defaultStopTimeout = 30 * time.Second

// Start starts a stopped VM. A VM that runs is a success.
func (m *Manager) Start(ctx context.Context, id string, readyAgent bool, p Progress) (store.VM, error) {
	ctx, end, err := m.begin(ctx, id, opstate.VerbStart, p)
	if err != nil {
		return store.VM{}, err
	}
	defer end()
	rec, err := m.record(ctx, id)
	if err != nil {
		return rec, err
	}
	v, err := m.machine(ctx, rec)
	if err != nil {
		return rec, m.wrap("start", rec.Name, err)
	}
	switch rec.State {
	case store.Failed:
		return rec, api.Errorf(api.Refused, "cannot start %s: something it held could not be released: %s", rec.Name, rec.LastError).
			WithHint("banger stop %s", rec.Name)
	case store.Running:
		if held, err := shim.Held(v.dir.Path()); err == nil && held {
			return rec, nil
		}
		// It ended just now and its watcher found the slot taken.
		if err := m.undoRun(ctx, v, "start", false); err != nil {
			return v.rec, m.wrap("start", rec.Name, err)
		}
	}
	err = m.boot(ctx, v, readyAgent, false, m.steps("start", p, m.startSteps(readyAgent)))
	if err != nil && v.rec.State == store.Running {
		// It runs, but the system did not get ready. Whoever cancels wants it as it
		// was; a slow system is left to itself.
		held, herr := shim.Held(v.dir.Path())
		if ctx.Err() != nil || herr == nil && !held {
			err = errors.Join(err, m.undoRun(ctx, v, "start", false))
		}
	}
	return v.rec, m.wrap("start", rec.Name, err)
}

func (m *Manager) startSteps(readyAgent bool) int {
	n := len(m.rows(scopeRun))
	if !readyAgent {
		n++
	}
	return n
}

// boot takes v from stopped to running, or back to stopped with LastError. reboot says
// that the guest asked for it: the wish outlives a boot that is broken off.
func (m *Manager) boot(ctx context.Context, v *machine, readyAgent, reboot bool, s steps) error {
	err := m.transition(ctx, v, store.Starting, func(r *store.VM) { r.LastError, r.Ended, r.Reboot = "", "", reboot })
	if err != nil {
		return err
	}
	err, stuck := m.acquireAll(ctx, v, scopeRun, s)
	if err == nil {
		if err = m.checkPublished(ctx, v); err == nil {
			err = m.transition(ctx, v, store.Running, func(r *store.VM) { r.Reboot = false })
		}
		if err != nil {
			undo, cancel := undoContext(ctx)
			defer cancel()
			stuck = m.releaseAll(undo, v, scopeRun, s.verb)
		}
	}
	if err != nil {
		as := outcome{lastError: err.Error(), reboot: reboot && ctx.Err() != nil}
		if stuck != nil {
			stuck = hinted(stuck, "banger stop "+v.rec.Name)
		}
		return errors.Join(err, stuck, m.settle(ctx, v, as, stuck))
	}
	m.watch(v)
	if readyAgent {
		return nil
	}
	s.step("system")
	return m.waitSystem(ctx, v, s.verb)
}

// outcome is what a record says of the run that is over.
type outcome struct {
	lastError, ended string
	reboot           bool
}

// settle writes where a VM is after its run rows were released: stopped, or failed
// when something is stuck. When that fails too, Recover finds the record in its old
// state and settles it.
func (m *Manager) settle(ctx context.Context, v *machine, as outcome, stuck error) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	to := store.Stopped
	if stuck != nil {
		to, as.lastError, as.reboot = store.Failed, stuck.Error(), false
	}
	return m.transition(ctx, v, to, func(r *store.VM) { r.LastError, r.Ended, r.Reboot = as.lastError, as.ended, as.reboot })
}

// Stop shuts a VM down, by force after timeout (zero: the default; negative: at
// once). A VM that is stopped is a success.
func (m *Manager) Stop(ctx context.Context, id string, timeout time.Duration, p Progress) (store.VM, error) {
	verb := opstate.VerbStop
	if timeout < 0 {
		verb = opstate.VerbKill
	}
	ctx, end, err := m.begin(ctx, id, verb, p)
	if err != nil {
		return store.VM{}, err
	}
	defer end()
	rec, err := m.store.VM(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return rec, nil // the create that was taken over has undone itself
	}
	if err != nil || rec.State == store.Stopped && !rec.Reboot {
		return rec, err
	}
	v, err := m.machine(ctx, rec)
	if err != nil {
		return rec, m.wrap("stop", rec.Name, err)
	}
	if rec.State == store.Stopped { // and about to reboot
		return v.rec, m.wrap("stop", rec.Name, m.settle(ctx, v, outcome{ended: rec.Ended}, nil))
	}
	s := m.steps("stop", p, 2)
	m.interruptWorkspaces(ctx, v)
	if rec.State == store.Running && timeout >= 0 {
		if timeout == 0 {
			timeout = defaultStopTimeout
		}
		s.step("shutdown")
		ask, cancel := context.WithTimeout(ctx, timeout)
		err := m.askShutdown(ask, v)
		cancel()
		if ctx.Err() != nil {
			return rec, m.wrap("stop", rec.Name, context.Cause(ctx)) // cancelled: it goes on running
		}
		if err != nil {
			m.log.Info("a guest did not shut down in time", "vm", rec.Name, "err", err)
		}
	}
	s.step("release")
	return v.rec, m.wrap("stop", rec.Name, m.undoRun(ctx, v, "stop", false))
}

// undoRun is halt, not cancelled half way.
func (m *Manager) undoRun(ctx context.Context, v *machine, verb string, reboot bool) error {
	ctx, cancel := undoContext(ctx)
	defer cancel()
	return m.halt(ctx, v, verb, reboot)
}

// halt releases what a VM holds while it runs and settles the record. reboot is written
// first: whoever finishes a halt that was broken off knows whether a start follows.
func (m *Manager) halt(ctx context.Context, v *machine, verb string, reboot bool) error {
	stopping := func() error {
		return m.transition(ctx, v, store.Stopping, func(r *store.VM) { r.Reboot = reboot })
	}
	// On a full disk the release comes first: it is what makes room.
	full := stopping()
	if full != nil && !isDiskFull(full) {
		return full
	}
	m.interruptWorkspaces(ctx, v)
	stuck := m.releaseAll(ctx, v, scopeRun, verb)
	if full != nil {
		if err := stopping(); err != nil {
			return errors.Join(stuck, err)
		}
	}
	ended := ""
	if e, err := shim.ReadExit(v.dir.Path()); err == nil {
		ended = m.describeExit(e)
	}
	return errors.Join(stuck, m.settle(ctx, v, outcome{ended: ended, reboot: reboot}, stuck))
}

// Delete removes a VM and its disk. A running one only by force.
func (m *Manager) Delete(ctx context.Context, id string, force bool, p Progress) error {
	// Asked before the slot is taken too: a refused rm must not end a stop.
	if _, err := m.removable(ctx, id, force); err != nil {
		return err
	}
	ctx, end, err := m.begin(ctx, id, opstate.VerbDelete, p)
	if err != nil {
		return err
	}
	defer end()
	rec, err := m.removable(ctx, id, force)
	if api.CodeOf(err) == api.NotFound {
		return nil // the create that was taken over has undone itself
	}
	if err != nil {
		return err
	}
	v, err := m.machine(ctx, rec)
	if err != nil {
		return m.wrap("remove", rec.Name, err)
	}
	m.steps("rm", p, 1).step("release")
	undo, cancel := undoContext(ctx)
	defer cancel()
	return m.wrap("remove", rec.Name, m.destroy(undo, v, "rm"))
}

func (m *Manager) removable(ctx context.Context, id string, force bool) (store.VM, error) {
	rec, err := m.record(ctx, id)
	if err != nil {
		return rec, err
	}
	if rec.State == store.Running && !force {
		return rec, api.Errorf(api.Refused, "cannot remove %s: it is running", rec.Name).WithHint("banger rm -f %s", rec.Name)
	}
	return rec, nil
}

// destroy releases everything that a VM holds, its disk included, and removes the
// record last.
func (m *Manager) destroy(ctx context.Context, v *machine, verb string) error {
	err := m.transition(ctx, v, store.Deleting, nil)
	if isDiskFull(err) {
		// What the run holds makes room. The disk must wait for the record: a disk that is
		// gone while its record says otherwise would be a loss.
		if stuck := m.releaseAll(ctx, v, scopeRun, verb); stuck != nil {
			return errors.Join(err, stuck)
		}
		err = m.transition(ctx, v, store.Deleting, nil)
	}
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	rec := v.rec
	m.interruptWorkspaces(ctx, v)
	stuck := m.releaseAll(ctx, v, scopeRun, verb)
	if stuck == nil {
		stuck = m.releaseAll(ctx, v, scopeVM, verb)
	}
	if stuck != nil {
		// It stays deleting: what is gone already must not look like a VM again. The next
		// delete, or the next Open, goes on.
		return errors.Join(stuck, m.transition(ctx, v, store.Deleting, func(r *store.VM) { r.LastError = stuck.Error() }))
	}
	if err := m.at(verb, "row", "release", "before"); err != nil {
		return err
	}
	m.leases.forget(rec.ID)
	unlock := m.vmLocks.Lock(rec.ID)
	defer unlock()
	return m.store.DeleteVM(ctx, rec.ID)
}

// interruptTimeout bounds the wait for a workspace job that is cancelled. What it does
// in the guest breaks off with the VMM; a release must not wait for it, and not twice.
const interruptTimeout = 10 * time.Second

func (m *Manager) interruptWorkspaces(ctx context.Context, v *machine) {
	if m.workspaces == nil {
		return
	}
	patience := interruptTimeout
	if v.jobHangs {
		patience = 0
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := m.workspaces.Interrupt(ctx, v.rec.ID); err != nil {
		v.jobHangs = true
		m.log.Warn("a workspace job did not end", "vm", v.rec.Name, "err", err)
	}
}

// wrap says which verb failed on which VM, and keeps code and hint.
func (m *Manager) wrap(verb, name string, err error) error {
	if err == nil {
		return nil
	}
	code := api.CodeOf(err)
	if code == api.Internal {
		switch {
		case isDiskFull(err):
			code = api.NoSpace
		case errors.Is(err, context.Canceled), errors.Is(err, opstate.ErrCancelled), errors.Is(err, opstate.ErrClosed):
			code = api.Cancelled
		case errors.Is(err, store.ErrConflict):
			code = api.Busy
		}
	}
	hint := api.HintOf(err)
	if code == api.NoSpace && hint == "" {
		hint = "df -h " + m.layout.Root
	}
	return &api.Error{Code: code, Message: fmt.Sprintf("cannot %s %s: %v", verb, name, err), Hint: hint, Err: err}
}

func isDiskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, store.ErrFull)
}

package vm

import (
	"context"
	"errors"
	"time"

	"banger/api"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/proc"
	"banger/internal/daemon/store"
	"banger/internal/shim"
)

// reapPoll is how often a watcher looks again while an operation holds the slot,
// or while the pid of a VM is not known. A VM's state is to be true within a second.
const (
	reapPoll = 100 * time.Millisecond
	// reapPause bounds the pauses after clean-ups that failed.
	reapPause = 10 * time.Second
)

// watch begins to wait for the end of a running VM.
func (m *Manager) watch(v *machine) {
	id, dir := v.rec.ID, v.dir.Path()
	var identity *proc.Identity
	if v.h.Shim != nil {
		copied := *v.h.Shim
		identity = &copied
	}
	m.background(func(ctx context.Context) {
		if identity != nil {
			if err := identity.Wait(ctx); ctx.Err() != nil {
				return
			} else if err != nil {
				m.log.Warn("cannot wait for a shim, polling its lock", "vm", id, "err", err)
			}
		}
		m.reap(ctx, id, dir)
	})
}

// reap cleans up after a VM that ended by itself. While an operation holds the slot,
// that one sees its VMM die and deals with it. A clean-up that fails is tried again.
func (m *Manager) reap(ctx context.Context, id, dir string) {
	pause := reapPoll
	for {
		if held, err := shim.Held(dir); err == nil && !held {
			if release, ok := m.slots.TryAcquire(id, opstate.VerbReap); ok {
				err := m.reapHeld(ctx, id)
				release()
				if err == nil {
					return
				}
				m.log.Error("cannot clean up after a VM that ended", "vm", id, "err", err)
				pause = min(2*pause, reapPause)
			}
		}
		if rec, err := m.store.VM(ctx, id); err == nil && !unsettled(rec) || errors.Is(err, store.ErrNotFound) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// unsettled is true of a record that says that its VM holds something, or is about to
// let go of it: with the slot free and the lock too, nobody else will settle it.
func unsettled(rec store.VM) bool {
	return rec.State == store.Running || rec.State == store.Stopping
}

// reapHeld releases what the ended VM held, and remembers a reboot that the guest
// asked for.
func (m *Manager) reapHeld(ctx context.Context, id string) error {
	rec, err := m.store.VM(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil || !unsettled(rec) {
		return err // an operation has dealt with it
	}
	v, err := m.machine(ctx, rec)
	if err != nil {
		return err
	}
	undo, cancel := undoContext(ctx)
	defer cancel()
	if err := m.haltEnded(undo, v, "reap"); err != nil {
		return err
	}
	m.log.Info("a VM ended by itself", "vm", rec.Name, "how", v.rec.Ended)
	m.rebootIfAsked(v.rec)
	return nil
}

// haltEnded is halt for a VM that ended by itself, or whose halt was broken off.
func (m *Manager) haltEnded(ctx context.Context, v *machine, verb string) error {
	reboot := v.rec.Reboot // as the halt that was broken off has written it
	if v.rec.State == store.Running {
		e, err := shim.ReadExit(v.dir.Path())
		reboot = err == nil && e.Intent == "reboot"
	}
	return m.halt(ctx, v, verb, reboot)
}

// rebootIfAsked starts a VM in the background when its guest has asked for a reboot. An
// operation of a user that gets the slot first has the last word.
func (m *Manager) rebootIfAsked(rec store.VM) {
	if !rec.Reboot || rec.State != store.Stopped {
		return
	}
	id, name := rec.ID, rec.Name
	m.background(func(ctx context.Context) {
		m.reboots.Add(1)
		defer m.reboots.Add(-1)
		for {
			begun, err := m.reboot(ctx, id)
			again := !begun && api.CodeOf(err) == api.Busy
			if api.CodeOf(err) == api.Cancelled {
				m.log.Info("a reboot was broken off", "vm", name, "by", err)
				again = true // whoever took over may give up and leave the wish
			}
			if ctx.Err() != nil {
				return // the record still has it, for the next daemon
			}
			if !again {
				if err != nil {
					m.log.Error("cannot carry out a reboot", "vm", name, "err", err)
				}
				return
			}
			select {
			case <-ctx.Done():
			case <-time.After(reapPoll):
			}
		}
	})
}

// reboot starts a VM if the wish of its guest still stands when the slot is granted.
// begun is false when it was not.
func (m *Manager) reboot(ctx context.Context, id string) (begun bool, err error) {
	ctx, end, err := m.begin(ctx, id, opstate.VerbStart, noProgress{})
	if err != nil {
		return false, err
	}
	defer end()
	rec, err := m.store.VM(ctx, id)
	if errors.Is(err, store.ErrNotFound) || err == nil && !rec.Reboot {
		return true, nil
	}
	if err != nil {
		return true, err
	}
	v, err := m.machine(ctx, rec)
	if err != nil {
		return true, err
	}
	return true, m.boot(ctx, v, true, true, m.steps("reboot", noProgress{}, 0))
}

// Reboots counts the reboots that are under way: a daemon that has one is not idle.
func (m *Manager) Reboots() int { return int(m.reboots.Load()) }

// noProgress is for work that nobody watches.
type noProgress struct{}

func (noProgress) Step(k, n int, name string) {}
func (noProgress) Bytes(done, total int64)    {}
func (noProgress) ID() string                 { return "" }

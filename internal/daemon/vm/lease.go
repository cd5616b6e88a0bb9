package vm

import (
	"context"
	"sync"
	"time"

	"banger/api"
)

// leaseGrace is how long a VM that is removed on release lives without a holder:
// from its creation to the client's first Hold, and after a restart of the daemon.
const leaseGrace = 10 * time.Second

// leases counts the holders of VMs that are removed on release. Its mutex is a leaf.
type leases struct {
	mu      sync.Mutex
	holders map[string]int
	timers  map[string]*time.Timer
	waiting []string // expected before start
	started bool
	closed  bool
	expire  func(id string)
}

func newLeases(expire func(id string)) *leases {
	return &leases{holders: make(map[string]int), timers: make(map[string]*time.Timer), expire: expire}
}

// expect gives a VM without a holder its grace, which begins with start at the earliest.
func (l *leases) expect(id string) {
	l.mu.Lock()
	started := l.started
	if !started {
		l.waiting = append(l.waiting, id)
	}
	l.mu.Unlock()
	if started {
		l.after(id, leaseGrace)
	}
}

// start begins the grace of all that were expected: clients can hold from now on.
func (l *leases) start() {
	l.mu.Lock()
	waiting := l.waiting
	l.waiting, l.started = nil, true
	l.mu.Unlock()
	for _, id := range waiting {
		l.after(id, leaseGrace)
	}
}

func (l *leases) after(id string, d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.holders[id] > 0 {
		return
	}
	if t := l.timers[id]; t != nil {
		t.Stop()
	}
	l.timers[id] = time.AfterFunc(d, func() {
		l.mu.Lock()
		due := !l.closed && l.holders[id] == 0 && l.timers[id] != nil
		delete(l.timers, id)
		l.mu.Unlock()
		if due {
			l.expire(id)
		}
	})
}

func (l *leases) hold(id string) (release func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.holders[id]++
	if t := l.timers[id]; t != nil {
		t.Stop()
		delete(l.timers, id)
	}
	return func() {
		l.mu.Lock()
		l.holders[id]--
		last := l.holders[id] == 0
		if last {
			delete(l.holders, id)
		}
		l.mu.Unlock()
		if last {
			l.after(id, 0)
		}
	}
}

// forget is called when the VM is gone.
func (l *leases) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t := l.timers[id]; t != nil {
		t.Stop()
		delete(l.timers, id)
	}
}

// close stops all timers: the leases are given a new grace at the next Recover.
func (l *leases) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, t := range l.timers {
		t.Stop()
	}
}

// StartLeases is called when clients can reach the daemon: from then on VMs that are
// removed on release want a holder.
func (m *Manager) StartLeases() { m.leases.start() }

// SuspendLeases is called before clients are cut off: no lease ends any more, and the
// next daemon gives all of them a new grace.
func (m *Manager) SuspendLeases() { m.leases.close() }

// Hold holds the lease of a VM that is removed on release until ctx ends. held is
// called when it is.
func (m *Manager) Hold(ctx context.Context, id string, held func() error) error {
	rec, err := m.record(ctx, id)
	if err != nil {
		return err
	}
	if !rec.RemoveOnRelease {
		return api.Errorf(api.Refused, "%s was not created with --rm", rec.Name).WithHint("banger rm %s", rec.Name)
	}
	release := m.leases.hold(id)
	defer release()
	if err := held(); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-m.ctx.Done(): // the daemon ends; the client holds again at the next one
	}
	return nil
}

// expire removes a VM whose lease has ended.
func (m *Manager) expire(id string) {
	m.background(func(ctx context.Context) {
		if err := m.Delete(ctx, id, true, noProgress{}); err != nil && api.CodeOf(err) != api.NotFound && ctx.Err() == nil {
			m.log.Error("cannot remove a VM whose lease ended, trying again", "vm", id, "err", err)
			m.leases.expect(id)
		}
	})
}

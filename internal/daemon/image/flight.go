package image

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"banger/internal/daemon/opstate"
)

// leavePatience bounds how long the last caller to leave a pull waits for its
// clean-up.
const leavePatience = time.Minute

var errAbandoned = errors.New("nobody waits for it any more")

// flight is one pull and the callers who wait for it.
type flight struct {
	broadcast broadcast
	cancel    context.CancelCauseFunc
	done      chan struct{}
	err       error // set before done is closed

	waiting   int  // guarded by Manager.mu
	abandoned bool // guarded by Manager.mu: it was cancelled and is cleaning up
}

// share runs fn, or joins the run of the same key that is under way. fn's context
// ends when the last of its callers has gone; whoever is the last waits for the end
// of fn's clean-up.
func (m *Manager) share(ctx context.Context, key string, p opstate.Progress, fn func(context.Context, opstate.Progress) error) error {
	m.checker.AssertNone("a pull")
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		f, joined, err := m.board(key, fn)
		if err != nil {
			return err
		}
		if !joined {
			select {
			case <-f.done:
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		unsubscribe := f.broadcast.subscribe(p)
		select {
		case <-f.done:
			unsubscribe()
			return f.err
		case <-ctx.Done():
			unsubscribe()
			m.leave(f)
			return context.Cause(ctx)
		}
	}
}

// board joins the flight of key or starts one. joined is false for one that is
// cleaning up after everybody left: the caller waits for its end and tries again.
func (m *Manager) board(key string, fn func(context.Context, opstate.Progress) error) (f *flight, joined bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, false, errClosed
	}
	if f := m.flights[key]; f != nil {
		if f.abandoned {
			return f, false, nil
		}
		f.waiting++
		return f, true, nil
	}
	ctx, cancel := context.WithCancelCause(m.ctx)
	f = &flight{cancel: cancel, done: make(chan struct{}), waiting: 1}
	m.flights[key] = f
	m.work.Add(1)
	go func() {
		defer m.work.Done()
		f.err = protect(ctx, &f.broadcast, fn)
		m.mu.Lock()
		delete(m.flights, key)
		m.mu.Unlock()
		close(f.done)
		cancel(nil)
	}()
	return f, true, nil
}

// leave is called by a caller who does not wait any longer.
func (m *Manager) leave(f *flight) {
	m.mu.Lock()
	f.waiting--
	last := f.waiting == 0
	f.abandoned = f.abandoned || last
	m.mu.Unlock()
	if !last {
		return
	}
	f.cancel(errAbandoned)
	select {
	case <-f.done:
	case <-time.After(leavePatience):
		m.log.Warn("a cancelled pull does not end")
	}
}

// protect turns a panic into an error: a flight has no caller to take the panic.
func protect(ctx context.Context, p opstate.Progress, fn func(context.Context, opstate.Progress) error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("cannot pull: %w", &opstate.PanicError{Value: v, Stack: debug.Stack()})
		}
	}()
	return fn(ctx, p)
}

// broadcast passes progress on to all who wait, and tells a newcomer where it is.
type broadcast struct {
	mu   sync.Mutex // a leaf
	subs map[*opstate.Progress]struct{}

	k, n        int
	name        string
	done, total int64
}

func (b *broadcast) subscribe(p opstate.Progress) (unsubscribe func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.subs == nil {
		b.subs = make(map[*opstate.Progress]struct{})
	}
	b.subs[&p] = struct{}{}
	if b.n > 0 {
		p.Step(b.k, b.n, b.name)
		p.Bytes(b.done, b.total)
	}
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.subs, &p)
	}
}

func (b *broadcast) Step(k, n int, name string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.k, b.n, b.name, b.done, b.total = k, n, name, 0, 0
	for p := range b.subs {
		(*p).Step(k, n, name)
	}
}

func (b *broadcast) Bytes(done, total int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done, b.total = done, total
	for p := range b.subs {
		(*p).Bytes(done, total)
	}
}

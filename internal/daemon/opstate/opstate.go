// Package opstate keeps the daemon's asynchronous operations. A Registry runs each
// in a goroutine of its own, under a context of the daemon and not of the request
// that began it, and remembers it for a while after its end. Slots keeps two long
// jobs on one VM apart: who holds a VM's slot may change what the VM holds on the
// host, and one table says which verb takes the slot over from which.
//
// Whoever watches an operation takes Changed before Snapshot, so that no change
// falls between the two. A slot is acquired before any lock of package locks, and
// never waited for while one is held.
package opstate

import (
	"context"
	"crypto/rand"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"banger/api"
)

// Progress is how a job tells where it is. Calls are cheap and safe from any goroutine.
type Progress interface {
	// Step begins step k of n, counted from 1, and resets the bytes.
	Step(k, n int, name string)
	// Bytes tells how far the step is; total is 0 when it is not known.
	Bytes(done, total int64)
}

// State is where an operation is.
type State int

// The states of an operation. Only Running is followed by another.
const (
	Running   State = iota
	Done            // the job returned no error, cancelled or not
	Failed          // the job returned an error
	Cancelled       // the job returned an error after Cancel, or after the registry was closed
)

// Snapshot is an operation at one moment.
type Snapshot[R any] struct {
	ID, Kind, Target      string
	State                 State
	Step, Steps           int // "3/7", both 0 before the first Step
	StepName              string
	BytesDone, BytesTotal int64
	CreatedAt, FinishedAt time.Time // FinishedAt is zero while it runs
	Err                   error     // nil unless Failed or Cancelled
	Cancelling            bool      // Cancel was called and the job still runs
	Result                R         // what the job returned, also beside an error
}

// PanicError is the error of a job that panicked: a defect of banger.
type PanicError struct {
	Value any
	Stack []byte // of the goroutine that panicked, for the log
}

func (e *PanicError) Error() string { return fmt.Sprintf("internal error: %v", e.Value) }

// ErrClosed is the cause of the cancellation of operations that Close ended, and
// the error of those begun after it.
var ErrClosed error = &api.Error{Code: api.Cancelled, Message: "the daemon is shutting down"}

// ErrCancelled is the cause of the cancellation of an operation by Op.Cancel.
var ErrCancelled error = &api.Error{Code: api.Cancelled, Message: "operation was cancelled"}

// Registry holds the operations that run, and those finished not long ago.
type Registry[R any] struct {
	base    context.Context
	keep    int
	keepFor time.Duration
	jobs    sync.WaitGroup

	mu     sync.Mutex
	byID   map[string]*Op[R]
	order  []*Op[R] // as begun, oldest first
	closed bool
}

// NewRegistry makes a registry whose operations end with base at the latest. It
// remembers up to keep finished operations, each for keepFor.
func NewRegistry[R any](base context.Context, keep int, keepFor time.Duration) *Registry[R] {
	return &Registry[R]{base: base, keep: keep, keepFor: keepFor, byID: make(map[string]*Op[R])}
}

// Begin runs fn as an operation, which is given to it as its Progress. kind is the
// verb, target the name of what it works on. The context of fn ends with Cancel, whose cause is ErrCancelled, with Close,
// whose cause is ErrClosed, or with the registry's base. A panic in fn becomes a
// *PanicError. After Close nothing is run: the operation is Cancelled from the
// beginning.
func (r *Registry[R]) Begin(kind, target string, fn func(ctx context.Context, op *Op[R]) (R, error)) *Op[R] {
	ctx, cancel := context.WithCancelCause(r.base)
	o := &Op[R]{cancel: cancel, done: make(chan struct{})}
	o.snap = Snapshot[R]{Kind: kind, Target: target, CreatedAt: time.Now()}
	r.mu.Lock()
	closed := r.closed
	o.snap.ID = r.newIDLocked()
	o.id = o.snap.ID
	r.pruneLocked(o.snap.CreatedAt)
	r.byID[o.id] = o
	r.order = append(r.order, o)
	if !closed {
		r.jobs.Add(1)
	}
	r.mu.Unlock()
	if closed {
		var none R
		cancel(ErrClosed)
		o.finish(none, api.Errorf(api.Cancelled, "cannot %s %s: %w", kind, target, ErrClosed), true)
		return o
	}
	go func() {
		defer r.jobs.Done()
		result, err := run(ctx, fn, o)
		cancelled := ctx.Err() != nil
		o.finish(result, err, cancelled)
		cancel(nil)
		r.mu.Lock()
		r.pruneLocked(time.Now())
		r.mu.Unlock()
	}()
	return o
}

func run[R any](ctx context.Context, fn func(context.Context, *Op[R]) (R, error), o *Op[R]) (result R, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &PanicError{Value: v, Stack: debug.Stack()}
		}
	}()
	return fn(ctx, o)
}

// newIDLocked makes an id that is short enough to type and free.
func (r *Registry[R]) newIDLocked() string {
	for {
		id := strings.ToLower(rand.Text()[:8])
		if r.byID[id] == nil {
			return id
		}
	}
}

// Get finds an operation by its full id.
func (r *Registry[R]) Get(id string) (*Op[R], bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pruneLocked(time.Now())
	o, ok := r.byID[id]
	return o, ok
}

// List returns all operations, the newest first.
func (r *Registry[R]) List() []*Op[R] {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pruneLocked(time.Now())
	ops := slices.Clone(r.order)
	slices.Reverse(ops)
	return ops
}

// Running counts the operations that have not finished.
func (r *Registry[R]) Running() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, o := range r.order {
		if o.finished.Load() == 0 {
			n++
		}
	}
	return n
}

// Close cancels all operations and waits for them until ctx ends; its error is then
// the cause of that, and the operations go on towards their end by themselves.
func (r *Registry[R]) Close(ctx context.Context) error {
	r.mu.Lock()
	r.closed = true
	ops := slices.Clone(r.order)
	r.mu.Unlock()
	for _, o := range ops {
		o.cancelFor(ErrClosed)
	}
	for _, o := range ops {
		select {
		case <-o.done:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s %s to end: %w", o.snap.Kind, o.snap.Target, context.Cause(ctx))
		}
	}
	r.jobs.Wait()
	return nil
}

// pruneLocked forgets finished operations that are too old, then the oldest of
// those that are too many.
func (r *Registry[R]) pruneLocked(now time.Time) {
	finished := 0
	kept := make([]*Op[R], 0, len(r.order))
	for _, o := range slices.Backward(r.order) {
		if at := o.finished.Load(); at != 0 {
			finished++
			if finished > r.keep || now.Sub(time.Unix(0, at)) > r.keepFor {
				delete(r.byID, o.id)
				continue
			}
		}
		kept = append(kept, o)
	}
	slices.Reverse(kept)
	r.order = kept
}

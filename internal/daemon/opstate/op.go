package opstate

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// Op is one operation. All methods are safe from any goroutine and never block.
type Op[R any] struct {
	id     string
	cancel context.CancelCauseFunc
	done   chan struct{}
	// finished is Snapshot.FinishedAt in nanoseconds since 1970, for the registry,
	// which must not take mu under its own.
	finished atomic.Int64

	mu      sync.Mutex // a leaf: nothing is called under it
	snap    Snapshot[R]
	changed chan struct{} // closed at the next change; nil while nobody asked for it
}

var _ Progress = (*Op[struct{}])(nil)

// ID names the operation.
func (o *Op[R]) ID() string { return o.id }

// Snapshot tells how the operation stands.
func (o *Op[R]) Snapshot() Snapshot[R] {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.snap
}

// Changed is closed at the next change of the snapshot. Once the operation has
// finished there is none, and it is closed already.
func (o *Op[R]) Changed() <-chan struct{} {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.snap.State != Running {
		return o.done
	}
	if o.changed == nil {
		o.changed = make(chan struct{})
	}
	return o.changed
}

// Done is closed when the operation has finished: the snapshot is final then.
func (o *Op[R]) Done() <-chan struct{} { return o.done }

// Cancel asks the job to undo what it did; Done tells when it has. It does nothing
// to an operation that has finished.
func (o *Op[R]) Cancel() { o.cancelFor(ErrCancelled) }

func (o *Op[R]) cancelFor(cause error) {
	o.change(func(s *Snapshot[R]) bool {
		if s.State != Running || s.Cancelling {
			return false
		}
		s.Cancelling = true
		return true
	})
	o.cancel(cause)
}

// Step implements Progress.
func (o *Op[R]) Step(k, n int, name string) {
	o.change(func(s *Snapshot[R]) bool {
		if s.State != Running {
			return false
		}
		s.Step, s.Steps, s.StepName, s.BytesDone, s.BytesTotal = k, n, name, 0, 0
		return true
	})
}

// Bytes implements Progress.
func (o *Op[R]) Bytes(done, total int64) {
	o.change(func(s *Snapshot[R]) bool {
		if s.State != Running || s.BytesDone == done && s.BytesTotal == total {
			return false
		}
		s.BytesDone, s.BytesTotal = done, total
		return true
	})
}

// Announce tells what the operation works on, and as much of its result as is known,
// while it runs.
func (o *Op[R]) Announce(target string, result R) {
	o.change(func(s *Snapshot[R]) bool {
		if s.State != Running {
			return false
		}
		s.Target, s.Result = target, result
		return true
	})
}

func (o *Op[R]) finish(result R, err error, cancelled bool) {
	o.change(func(s *Snapshot[R]) bool {
		s.Result, s.Err, s.FinishedAt, s.Cancelling = result, err, time.Now(), false
		switch {
		case err == nil:
			s.State = Done
		case cancelled:
			s.State = Cancelled
		default:
			s.State = Failed
		}
		o.finished.Store(s.FinishedAt.UnixNano())
		close(o.done)
		return true
	})
}

// change edits the snapshot and, when edit says that it did, wakes who watches.
func (o *Op[R]) change(edit func(*Snapshot[R]) bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if edit(&o.snap) && o.changed != nil {
		close(o.changed)
		o.changed = nil
	}
}

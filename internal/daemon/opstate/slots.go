package opstate

import (
	"context"
	"errors"
	"sync"

	"banger/api"
)

// Verb is a long job on one VM that needs its slot.
type Verb string

// The verbs. VerbReap is the clean-up after a guest that ended by itself: it uses
// TryAcquire only, because an operation that holds the slot sees its VMM die and
// deals with it.
const (
	VerbCreate  Verb = "create"
	VerbStart   Verb = "start"
	VerbStop    Verb = "stop"
	VerbKill    Verb = "kill"
	VerbRestart Verb = "restart"
	VerbDelete  Verb = "delete"
	VerbReap    Verb = "reap"
)

// rule is what a verb does about another that holds the slot.
type rule int

const (
	refuse   rule = iota // api.Busy, at once
	takeover             // cancel it and wait until it has released the slot
	join                 // wait for the same verb's end, then find the work done
	wait                 // it is short and cannot be cancelled
)

// ruling is the table of takeovers:
//
//	new ╲ running   create   start    stop     kill   restart  delete  reap
//	create          join     -        -        -      -        -       wait
//	start           -        join     -        -      -        -       wait
//	stop            takeover takeover join     -      takeover -       wait
//	kill            takeover takeover takeover join   takeover -       wait
//	restart         -        -        -        -      join     -       wait
//	delete          takeover takeover takeover wait   takeover join    wait
//	reap            -        -        -        -      -        -       -
//
// "-" refuses. A verb that is not in the table is refused.
func ruling(next, running Verb) rule {
	switch {
	case next == VerbReap:
		return refuse
	case running == VerbReap:
		return wait
	case next == running:
		return join
	case next == VerbDelete && running == VerbKill:
		return wait
	}
	switch next {
	case VerbStop:
		if running == VerbCreate || running == VerbStart || running == VerbRestart {
			return takeover
		}
	case VerbKill, VerbDelete:
		if running == VerbCreate || running == VerbStart || running == VerbRestart || running == VerbStop {
			return takeover
		}
	}
	return refuse
}

// Slots holds one slot per VM. The first in a line holds the slot, the others wait
// for it in order; a release hands the slot to the next at once, so that nobody
// can come in between.
type Slots struct {
	mu    sync.Mutex // a leaf: nothing is called under it
	lines map[string][]*claim
}

// claim is one verb in the line of a VM. granted is closed when it becomes the
// first, evicted when another verb takes over before that.
type claim struct {
	verb    Verb
	opID    string
	cancel  func() // nil: cannot be cancelled
	granted chan struct{}
	evicted chan struct{}
	by      Verb // who evicted it; set before evicted is closed
}

// NewSlots makes a set of free slots.
func NewSlots() *Slots { return &Slots{lines: make(map[string][]*claim)} }

// Current tells who holds the slot of key.
func (s *Slots) Current(key string) (verb Verb, opID string, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := s.lines[key]
	if len(line) == 0 {
		return "", "", false
	}
	return line[0].verb, line[0].opID, true
}

// Acquire takes the slot of key for verb. The table is asked about the holder and
// about everybody who waits: one "-" refuses with api.Busy and changes nothing; a
// takeover calls the cancel of the holder, and sends away those who wait, with
// api.Cancelled; then Acquire waits for its turn. It may wait as long as a rollback
// takes; ctx bounds it, and ends with api.Cancelled or, at a deadline, api.Busy.
// Somebody who was cancelled for a takeover stays so when the taker gives up. The
// errors say what is in the way, not what could not be done: the caller knows names.
//
// cancel must make the job of this claim end and release; it is called at most once,
// from another goroutine, and must not wait. release may be called more than once.
func (s *Slots) Acquire(ctx context.Context, key string, verb Verb, opID string, cancel func()) (release func(), err error) {
	if ctx.Err() != nil {
		return nil, waitError(ctx, "")
	}
	c := &claim{verb: verb, opID: opID, cancel: cancel, granted: make(chan struct{}), evicted: make(chan struct{})}
	holder, cancels, err := s.enter(key, c)
	if err != nil {
		return nil, err
	}
	for _, f := range cancels {
		f()
	}
	select {
	case <-c.granted:
		return func() { s.leave(key, c) }, nil
	case <-c.evicted:
		return nil, api.Errorf(api.Cancelled, "%s took over", c.by)
	case <-ctx.Done():
		// The slot may have come at the same moment; leave passes it on.
		s.leave(key, c)
		return nil, waitError(ctx, holder)
	}
}

// TryAcquire takes the slot of key when it is free. Nobody can take it over.
func (s *Slots) TryAcquire(key string, verb Verb) (release func(), ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lines[key]) > 0 {
		return nil, false
	}
	c := &claim{verb: verb, granted: make(chan struct{}), evicted: make(chan struct{})}
	close(c.granted)
	s.lines[key] = []*claim{c}
	return func() { s.leave(key, c) }, true
}

// enter puts c into the line of key as the table says. It returns who held the slot
// and the cancel functions to call, outside the lock.
func (s *Slots) enter(key string, c *claim) (holder Verb, cancels []func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := s.lines[key]
	for _, other := range line {
		if ruling(c.verb, other.verb) == refuse {
			return "", nil, api.Errorf(api.Busy, "%s is under way", other.verb)
		}
	}
	var kept []*claim
	for i, other := range line {
		taken := ruling(c.verb, other.verb) == takeover
		if taken && other.cancel != nil {
			cancels = append(cancels, other.cancel)
			other.cancel = nil
		}
		if taken && i > 0 {
			other.by = c.verb
			close(other.evicted)
			continue
		}
		kept = append(kept, other)
	}
	s.lines[key] = append(kept, c)
	if len(kept) == 0 {
		close(c.granted)
		return c.verb, cancels, nil
	}
	return kept[0].verb, cancels, nil
}

// leave takes c out of the line, wherever it stands, and grants the slot to the
// new first. It does nothing when c has left already.
func (s *Slots) leave(key string, c *claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	line := s.lines[key]
	for i, other := range line {
		if other != c {
			continue
		}
		rest := append(line[:i:i], line[i+1:]...)
		if len(rest) == 0 {
			delete(s.lines, key)
			return
		}
		s.lines[key] = rest
		if i == 0 {
			close(rest[0].granted)
		}
		return
	}
}

// waitError says why the wait for running ended, or did not begin.
func waitError(ctx context.Context, running Verb) error {
	cause := context.Cause(ctx)
	if running != "" && errors.Is(cause, context.DeadlineExceeded) {
		return api.Errorf(api.Busy, "%s did not end in time: %w", running, cause)
	}
	return &api.Error{Code: api.Cancelled, Message: cause.Error(), Err: cause}
}

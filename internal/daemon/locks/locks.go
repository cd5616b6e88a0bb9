// Package locks holds the mutexes of the daemon that have a place in the order
//
//	networkLocks[id] → vmLocks[id] → workspaceLocks[id] → {createVMMu, imageOpsMu} → subsystem-local locks
//
// Acquire in this order, release in reverse, never hold two of one rank, and never
// hold a VM lock and a workspace lock together. A Mutex is one lock, a Set one lock
// per id. Both report to a Checker: in tests it panics on the first step out of
// order, before anything can deadlock; in the daemon it is nil and costs nothing.
// docs/locking.md says what each lock guards.
package locks

import (
	"context"
	"sync"
)

// Rank is the place of a lock in the order; a higher one is taken later.
type Rank int

// The ranks. RankCreate and RankImageOps are one rank: neither is taken under the other.
const (
	RankNetwork   Rank = 0 // one change of a VM's network, the answer of its process included
	RankVM        Rank = 1 // short validation and database changes of one VM
	RankWorkspace Rank = 2 // one prepare or export of one VM; the only lock held over guest I/O
	RankCreate    Rank = 3 // the reservation of name and slot
	RankImageOps  Rank = 3 // the publication of a change of the registry
	RankLeaf      Rank = 4 // a lock inside one subsystem: nothing is taken under it
)

// Mutex is one lock with a rank.
type Mutex struct {
	mu      sync.Mutex
	checker *Checker
	rank    Rank
	name    string
}

// NewMutex makes a lock. name is what the checker calls it; c may be nil.
func NewMutex(c *Checker, rank Rank, name string) *Mutex {
	return &Mutex{checker: c, rank: rank, name: name}
}

// Lock locks m.
func (m *Mutex) Lock() {
	m.checker.before(m.rank, m.name, "")
	m.mu.Lock()
	m.checker.acquired(m, m.rank, m.name, "")
}

// Unlock unlocks m; the goroutine that locked it calls it.
func (m *Mutex) Unlock() {
	m.checker.released(m, m.name, "")
	m.mu.Unlock()
}

// Set is one lock per id. An entry exists only while somebody holds it or waits
// for it, so ids may come and go for ever.
type Set struct {
	checker *Checker
	rank    Rank
	name    string

	mu      sync.Mutex
	entries map[string]*entry
}

// entry is the lock of one id: a channel of capacity one, because a wait for it
// must be able to end with a context.
type entry struct {
	held chan struct{}
	refs int // holder and waiters, guarded by Set.mu
}

// NewSet makes a set of locks of one rank. name is what the checker calls it; c may be nil.
func NewSet(c *Checker, rank Rank, name string) *Set {
	return &Set{checker: c, rank: rank, name: name, entries: make(map[string]*entry)}
}

// Lock locks id, however long that takes. The goroutine that locked it calls
// unlock, once: a second call panics.
func (s *Set) Lock(id string) (unlock func()) {
	s.checker.before(s.rank, s.name, id)
	e := s.ref(id)
	e.held <- struct{}{}
	return s.holding(id, e)
}

// LockContext is Lock bounded by ctx; its error is the cause of ctx's end.
func (s *Set) LockContext(ctx context.Context, id string) (unlock func(), err error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s.checker.before(s.rank, s.name, id)
	e := s.ref(id)
	select {
	case e.held <- struct{}{}:
		return s.holding(id, e), nil
	case <-ctx.Done():
		s.unref(id, e)
		return nil, context.Cause(ctx)
	}
}

func (s *Set) holding(id string, e *entry) (unlock func()) {
	s.checker.acquired(e, s.rank, s.name, id)
	done := false
	return func() {
		if done {
			panic("locks: " + lockName(s.name, id) + " unlocked twice")
		}
		done = true
		s.checker.released(e, s.name, id)
		<-e.held
		s.unref(id, e)
	}
}

func (s *Set) ref(id string) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil {
		e = &entry{held: make(chan struct{}, 1)}
		s.entries[id] = e
	}
	e.refs++
	return e
}

func (s *Set) unref(id string, e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.refs--
	if e.refs == 0 {
		delete(s.entries, id)
	}
}

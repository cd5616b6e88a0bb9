package locks

import (
	"bytes"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"sync"
)

// Checker watches the order in which each goroutine takes ranked locks and panics,
// naming both locks, when it is broken. A nil *Checker is valid and checks nothing.
// It is for tests: it asks the runtime for the goroutine's id at each step, which
// costs microseconds.
type Checker struct {
	mu   sync.Mutex
	held map[uint64][]holding // by goroutine, in the order of acquiring
}

// holding is one lock that a goroutine holds.
type holding struct {
	lock any // identity of the lock
	rank Rank
	name string
}

// NewChecker makes a checker; all locks of one daemon share one.
func NewChecker() *Checker {
	return &Checker{held: make(map[uint64][]holding)}
}

// AssertNone panics when this goroutine holds any ranked lock. what says what is
// about to happen, for example "a boot".
func (c *Checker) AssertNone(what string) {
	c.assert(what, func(holding) bool { return false })
}

// AssertGuestIO panics when this goroutine holds a ranked lock other than a
// workspace lock, the one that exists to be held over guest I/O.
func (c *Checker) AssertGuestIO(what string) {
	c.assert(what, func(h holding) bool { return h.rank == RankWorkspace })
}

func (c *Checker) assert(what string, allowed func(holding) bool) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.held[goroutineID()] {
		if !allowed(h) {
			panic(fmt.Sprintf("locks: %s while holding %s", what, h.name))
		}
	}
}

// before is called ahead of the wait for a lock: a goroutine that would break the
// order panics instead of waiting for another that broke it the other way round.
func (c *Checker) before(rank Rank, name, id string) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, h := range c.held[goroutineID()] {
		switch {
		case h.rank == RankVM && rank == RankWorkspace:
			panic(fmt.Sprintf("locks: %s taken while holding %s: a VM lock and a workspace lock are never held together", lockName(name, id), h.name))
		case h.rank == rank:
			panic(fmt.Sprintf("locks: %s taken while holding %s of the same rank", lockName(name, id), h.name))
		case h.rank > rank:
			panic(fmt.Sprintf("locks: %s taken while holding %s: the order is the other way round", lockName(name, id), h.name))
		}
	}
}

func (c *Checker) acquired(lock any, rank Rank, name, id string) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g := goroutineID()
	c.held[g] = append(c.held[g], holding{lock: lock, rank: rank, name: lockName(name, id)})
}

func (c *Checker) released(lock any, name, id string) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	g := goroutineID()
	held := c.held[g]
	if len(held) == 0 {
		panic(fmt.Sprintf("locks: %s unlocked by a goroutine that does not hold it", lockName(name, id)))
	}
	last := held[len(held)-1]
	if last.lock != lock {
		panic(fmt.Sprintf("locks: %s unlocked before %s, which was taken later", lockName(name, id), last.name))
	}
	if len(held) == 1 {
		delete(c.held, g)
		return
	}
	c.held[g] = held[:len(held)-1]
}

func lockName(name, id string) string {
	if id == "" {
		return name
	}
	return name + "[" + id + "]"
}

// goroutineID reads the number in "goroutine 18 [running]:", the first line of a
// stack trace. The runtime offers no other way, on purpose: do not use this for
// anything but assertions in tests.
func goroutineID() uint64 {
	var buf [64]byte
	b := buf[:runtime.Stack(buf[:], false)]
	b = bytes.TrimPrefix(b, []byte("goroutine "))
	digits, _, _ := strings.Cut(string(b), " ")
	id, err := strconv.ParseUint(digits, 10, 64)
	if err != nil {
		panic("locks: cannot read the goroutine's id from " + strconv.Quote(string(b)))
	}
	return id
}

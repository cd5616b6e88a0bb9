package locks

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// daemonLocks is one lock of each kind that the daemon has.
type daemonLocks struct {
	c                          *Checker
	network, vm, workspace     *Set
	create, imageOps, tap, ops *Mutex
}

func newDaemonLocks() *daemonLocks {
	c := NewChecker()
	return &daemonLocks{
		c:         c,
		network:   NewSet(c, RankNetwork, "networkLocks"),
		vm:        NewSet(c, RankVM, "vmLocks"),
		workspace: NewSet(c, RankWorkspace, "workspaceLocks"),
		create:    NewMutex(c, RankCreate, "createVMMu"),
		imageOps:  NewMutex(c, RankImageOps, "imageOpsMu"),
		tap:       NewMutex(c, RankLeaf, "tapPool.mu"),
		ops:       NewMutex(c, RankLeaf, "opstate.mu"),
	}
}

// take names a lock and takes it; what it returns gives it back.
type take struct {
	name string
	rank Rank
	f    func() (unlock func())
}

func (d *daemonLocks) takes() []take {
	mutex := func(m *Mutex) func() func() {
		return func() func() { m.Lock(); return m.Unlock }
	}
	return []take{
		{"networkLocks[a]", RankNetwork, func() func() { return d.network.Lock("a") }},
		{"vmLocks[a]", RankVM, func() func() { return d.vm.Lock("a") }},
		{"vmLocks[b]", RankVM, func() func() { return d.vm.Lock("b") }},
		{"workspaceLocks[a]", RankWorkspace, func() func() { return d.workspace.Lock("a") }},
		{"workspaceLocks[b]", RankWorkspace, func() func() {
			unlock, err := d.workspace.LockContext(context.Background(), "b")
			if err != nil {
				panic(err)
			}
			return unlock
		}},
		{"createVMMu", RankCreate, mutex(d.create)},
		{"imageOpsMu", RankImageOps, mutex(d.imageOps)},
		{"tapPool.mu", RankLeaf, mutex(d.tap)},
		{"opstate.mu", RankLeaf, mutex(d.ops)},
	}
}

// panics returns what f panics with, "" when it does not.
func panics(f func()) (message string) {
	defer func() {
		if v := recover(); v != nil {
			message = v.(string)
		}
	}()
	f()
	return ""
}

// TestOrderOfAllPairs takes each lock under each other one, itself included: the
// order of docs/locking.md, written once more.
func TestOrderOfAllPairs(t *testing.T) {
	for i := range newDaemonLocks().takes() {
		for k := range newDaemonLocks().takes() {
			d := newDaemonLocks()
			outer, inner := d.takes()[i], d.takes()[k]
			both := outer.rank == RankVM && inner.rank == RankWorkspace
			good := outer.rank < inner.rank && !both
			unlock := outer.f()
			message := panics(func() { inner.f()() })
			unlock()
			if good != (message == "") {
				t.Errorf("%s then %s: %q", outer.name, inner.name, message)
			}
			if !good && !(strings.Contains(message, outer.name) && strings.Contains(message, inner.name)) {
				t.Errorf("%s then %s: the panic does not name both: %q", outer.name, inner.name, message)
			}
			if both && !strings.Contains(message, "never held together") {
				t.Errorf("%s then %s: %q", outer.name, inner.name, message)
			}
			// A refused lock was not taken: it can be had by another goroutine.
			if i != k {
				done := make(chan string)
				go func() { done <- panics(func() { inner.f()() }) }()
				if m := <-done; m != "" {
					t.Errorf("%s then %s: afterwards %s", outer.name, inner.name, m)
				}
			}
			d.c.AssertNone("the end")
		}
	}
}

func TestThreeDeep(t *testing.T) {
	d := newDaemonLocks()
	vm := d.vm.Lock("a")
	d.create.Lock()
	d.tap.Lock()
	if m := panics(d.create.Unlock); !strings.Contains(m, "createVMMu unlocked before tapPool.mu") {
		t.Errorf("release out of order: %q", m)
	}
	d.tap.Unlock()
	if m := panics(vm); !strings.Contains(m, "vmLocks[a] unlocked before createVMMu") {
		t.Errorf("release out of order: %q", m)
	}
}

func TestAnotherGoroutineIsNotInTheWay(t *testing.T) {
	d := newDaemonLocks()
	leaf := make(chan string)
	d.create.Lock()
	defer d.create.Unlock()
	go func() {
		leaf <- panics(func() { d.vm.Lock("a")(); d.c.AssertNone("guest I/O") })
	}()
	if m := <-leaf; m != "" {
		t.Error(m)
	}
}

func TestUnlockElsewhere(t *testing.T) {
	d := newDaemonLocks()
	unlock := d.vm.Lock("a")
	got := make(chan string)
	go func() { got <- panics(unlock) }()
	if m := <-got; !strings.Contains(m, "vmLocks[a] unlocked by a goroutine that does not hold it") {
		t.Error(m)
	}
}

func TestUnlockTwice(t *testing.T) {
	for _, s := range []*Set{NewSet(nil, RankVM, "vmLocks"), NewSet(NewChecker(), RankVM, "vmLocks")} {
		unlock := s.Lock("a")
		unlock()
		if m := panics(unlock); !strings.Contains(m, "vmLocks[a] unlocked twice") {
			t.Error(m)
		}
	}
}

func TestAsserts(t *testing.T) {
	d := newDaemonLocks()
	d.c.AssertNone("guest I/O")
	for _, tk := range d.takes() {
		unlock := tk.f()
		if m := panics(func() { d.c.AssertNone("a boot") }); !strings.Contains(m, "a boot while holding "+tk.name) {
			t.Errorf("AssertNone under %s: %q", tk.name, m)
		}
		m := panics(func() { d.c.AssertGuestIO("guest I/O") })
		if tk.rank == RankWorkspace != (m == "") {
			t.Errorf("AssertGuestIO under %s: %q", tk.name, m)
		}
		unlock()
	}
	unlock := d.workspace.Lock("a")
	d.imageOps.Lock()
	if m := panics(func() { d.c.AssertGuestIO("guest I/O") }); !strings.Contains(m, "imageOpsMu") {
		t.Errorf("AssertGuestIO under two locks: %q", m)
	}
	d.imageOps.Unlock()
	unlock()
}

func TestNilCheckerCostsNothing(t *testing.T) {
	var c *Checker
	c.AssertNone("guest I/O")
	c.AssertGuestIO("guest I/O")
	m := NewMutex(nil, RankLeaf, "mu")
	if n := testing.AllocsPerRun(100, func() { m.Lock(); defer m.Unlock() }); n != 0 {
		t.Errorf("%v allocations per lock", n)
	}
	vm, leaf := NewSet(nil, RankVM, "vmLocks"), NewMutex(nil, RankLeaf, "mu")
	leaf.Lock()
	vm.Lock("a")() // the wrong order: nobody looks
	leaf.Unlock()
}

func TestSetKeepsIdsApartAndForgetsThem(t *testing.T) {
	s := NewSet(NewChecker(), RankVM, "vmLocks")
	var wg sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for range 8 {
		for id, n := range counts {
			wg.Go(func() {
				for range 200 {
					unlock := s.Lock(id)
					*n++ // the race detector and the sum tell two holders
					unlock()
				}
			})
		}
	}
	wg.Wait()
	for id, n := range counts {
		if *n != 1600 {
			t.Errorf("%s: %d", id, *n)
		}
	}
	if len(s.entries) != 0 {
		t.Errorf("entries left: %v", s.entries)
	}
}

func TestSetDoesNotBlockOtherIds(t *testing.T) {
	s := NewSet(nil, RankVM, "vmLocks")
	a := s.Lock("a")
	s.Lock("b")()
	a()
}

func TestLockContextEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSet(NewChecker(), RankWorkspace, "workspaceLocks")
		unlock := s.Lock("a")
		got := make(chan error)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			_, err := s.LockContext(ctx, "a")
			s.checker.AssertNone("anything")
			got <- err
		}()
		start := time.Now()
		if err := <-got; !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Minute {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		unlock()
		if len(s.entries) != 0 {
			t.Errorf("entries left: %v", s.entries)
		}
		reason := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(reason)
		if _, err := s.LockContext(ctx, "a"); err != reason {
			t.Errorf("a free lock under an ended context: %v", err)
		}
	})
}

func BenchmarkMutexNilChecker(b *testing.B) {
	m := NewMutex(nil, RankLeaf, "mu")
	for b.Loop() {
		func() { m.Lock(); defer m.Unlock() }()
	}
}

package netstack

import (
	"runtime"
	"runtime/metrics"
	"sync"
	"sync/atomic"
)

// heapLimit is how much memory the guest's connections may hold in all, stacks included,
// in bytes. The other bounds keep below it whatever was thought of; this one is for the
// rest. What the collector needs and the program itself come on top, 14 MiB.
const heapLimit = 44 << 20

// heapGuard watches what is alive after each collection. It costs nothing in between: the
// collector itself calls it.
type heapGuard struct {
	limit   uint64
	over    func()
	stopped atomic.Bool

	taken atomic.Int64 // bytes since the last look
	mu    sync.Mutex   // one looks, others that come wait
}

// A breath is how much is taken in without a look at the memory, in bytes; a piece counts
// for at least pieceCost.
const (
	breath    = 1 << 20
	pieceCost = 1 << 10
)

// tick is garbage from the start: its finalizer runs after each collection.
type tick struct {
	guard *heapGuard
	_     [16]byte // an object of its own, see runtime.SetFinalizer on tiny ones
}

// guardHeap calls over after each collection that leaves more than limit bytes alive.
func guardHeap(limit uint64, over func()) *heapGuard {
	g := &heapGuard{limit: limit, over: over}
	g.arm()
	return g
}

func (g *heapGuard) arm() {
	runtime.SetFinalizer(&tick{guard: g}, func(t *tick) {
		g := t.guard
		if g.stopped.Load() {
			return
		}
		if g.exceeded() {
			go g.over() // the finalizers of all wait for this one
		}
		g.arm()
	})
}

// took counts what is taken in, and looks after each breath.
func (g *heapGuard) took(size int) {
	if g.taken.Add(int64(max(size, pieceCost))) < breath {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken.Store(0)
	g.check()
}

// check looks at once. Garbage counts until it is collected, so a full heap is collected
// first: whoever takes in more than the collector can follow waits for it here.
func (g *heapGuard) check() {
	if read("/memory/classes/heap/objects:bytes")+stacks() <= g.limit {
		return
	}
	runtime.GC()
	if g.exceeded() {
		g.over()
	}
}

func (g *heapGuard) exceeded() bool { return read("/gc/heap/live:bytes")+stacks() > g.limit }

func stacks() uint64 { return read("/memory/classes/heap/stacks:bytes") }

// read reads one of the runtime's numbers, which all are 0 where they have gone.
func read(name string) uint64 {
	sample := []metrics.Sample{{Name: name}}
	metrics.Read(sample)
	if sample[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return sample[0].Value.Uint64()
}

func (g *heapGuard) stop() { g.stopped.Store(true) }

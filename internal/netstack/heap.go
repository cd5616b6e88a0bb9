package netstack

import (
	"runtime"
	"runtime/metrics"
	"sync/atomic"
)

// heapLimit is how much memory the guest's connections may hold in all, in bytes. The
// other bounds keep below it whatever was thought of; this one is for the rest.
const heapLimit = 48 << 20

// heapGuard watches what is alive after each collection. It costs nothing in between: the
// collector itself calls it.
type heapGuard struct {
	limit   uint64
	over    func()
	stopped atomic.Bool
}

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
		sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
		metrics.Read(sample)
		if sample[0].Value.Kind() == metrics.KindUint64 && sample[0].Value.Uint64() > g.limit {
			go g.over() // the finalizers of all wait for this one
		}
		g.arm()
	})
}

func (g *heapGuard) stop() { g.stopped.Store(true) }

package opstate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"banger/api"
)

// table is the one of docs/locking.md: what the verb of a row does about the verb
// of a column that holds the slot. "T" takes over, "J" joins, "W" waits, "-" refuses.
const table = `
	         create start stop kill restart delete reap
	create   J      -     -    -    -       -      W
	start    -      J     -    -    -       -      W
	stop     T      T     J    -    T       -      W
	kill     T      T     T    J    T       -      W
	restart  -      -     -    -    J       -      W
	delete   T      T     T    W    T       J      W
	reap     -      -     -    -    -       -      -
`

// eachPair calls f for every cell of table.
func eachPair(f func(next, running Verb, want string)) int {
	lines := strings.Split(strings.TrimSpace(table), "\n")
	columns := strings.Fields(lines[0])
	n := 0
	for _, line := range lines[1:] {
		cells := strings.Fields(line)
		for i, column := range columns {
			f(Verb(cells[0]), Verb(column), cells[i+1])
			n++
		}
	}
	return n
}

func verbs() []Verb {
	return []Verb{VerbCreate, VerbStart, VerbStop, VerbKill, VerbRestart, VerbDelete, VerbReap}
}

func TestTakeoverTable(t *testing.T) {
	n := eachPair(func(next, running Verb, want string) {
		t.Run(fmt.Sprintf("%s-over-%s", next, running), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testPair(t, next, running, want) })
		})
	})
	if n != len(verbs())*len(verbs()) {
		t.Errorf("the table has %d cells for %d verbs", n, len(verbs()))
	}
}

// testPair holds the slot with running, asks for it with next, and looks.
func testPair(t *testing.T, next, running Verb, want string) {
	s := NewSlots()
	var cancelled atomic.Int32
	var release func()
	if running == VerbReap {
		release, _ = s.TryAcquire("vm", running)
	} else {
		var err error
		release, err = s.Acquire(t.Context(), "vm", running, "op1", func() { cancelled.Add(1) })
		if err != nil {
			t.Fatal(err)
		}
	}
	type result struct {
		release func()
		err     error
	}
	got := make(chan result, 1)
	go func() {
		r, err := s.Acquire(t.Context(), "vm", next, "op2", func() {})
		got <- result{r, err}
	}()
	synctest.Wait()
	if wantCancel := want == "T"; wantCancel != (cancelled.Load() == 1) {
		t.Errorf("the holder was cancelled %d times", cancelled.Load())
	}
	if verb, _, ok := s.Current("vm"); !ok || verb != running {
		t.Errorf("current is %s, %v", verb, ok)
	}
	if want == "-" {
		select {
		case r := <-got:
			if api.CodeOf(r.err) != api.Busy || !strings.Contains(r.err.Error(), string(running)+" is under way") {
				t.Errorf("got %v (%s)", r.err, api.CodeOf(r.err))
			}
		default:
			t.Fatal("it waits instead of refusing")
		}
		release()
		return
	}
	if len(got) != 0 {
		t.Fatalf("it did not wait for the release: %v", (<-got).err)
	}
	release()
	synctest.Wait()
	r := <-got
	if r.err != nil {
		t.Fatal(r.err)
	}
	if verb, op, ok := s.Current("vm"); verb != next || op != "op2" || !ok {
		t.Errorf("current is %s %s %v", verb, op, ok)
	}
	release() // again, by mistake: not the new holder's
	if _, _, ok := s.Current("vm"); !ok {
		t.Error("a second release of the old holder freed the slot")
	}
	r.release()
	if _, _, ok := s.Current("vm"); ok || len(s.lines) != 0 {
		t.Error("the slot is not free")
	}
}

// waiting starts an Acquire and returns where its error goes; on success it gives
// the slot back at once.
func waiting(ctx context.Context, s *Slots, verb Verb, cancel func()) chan error {
	got := make(chan error, 1)
	go func() {
		release, err := s.Acquire(ctx, "vm", verb, string(verb), cancel)
		if err == nil {
			release()
		}
		got <- err
	}()
	synctest.Wait()
	return got
}

// TestTakeoverOfWaiter: start runs, stop has cancelled it and waits, delete comes.
func TestTakeoverOfWaiter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSlots()
		var startCancels, stopCancels int
		release, err := s.Acquire(t.Context(), "vm", VerbStart, "1", func() { startCancels++ })
		if err != nil {
			t.Fatal(err)
		}
		stop := waiting(t.Context(), s, VerbStop, func() { stopCancels++ })
		if err := <-waiting(t.Context(), s, VerbStart, nil); api.CodeOf(err) != api.Busy || !strings.Contains(err.Error(), "stop is under way") {
			t.Errorf("a start after the stop: %v", err)
		}
		del := waiting(t.Context(), s, VerbDelete, func() {})
		if err := <-stop; api.CodeOf(err) != api.Cancelled || !strings.Contains(err.Error(), "delete took over") {
			t.Errorf("the stop got %v", err)
		}
		if startCancels != 1 || stopCancels != 1 {
			t.Errorf("cancels: start %d, stop %d", startCancels, stopCancels)
		}
		if len(del) != 0 {
			t.Error("the delete did not wait for the start's release")
		}
		release()
		if err := <-del; err != nil {
			t.Error(err)
		}
	})
}

// TestJoinersKeepTheirPlace: everybody who joined gets the slot in order of coming.
func TestJoinersKeepTheirPlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSlots()
		release, err := s.Acquire(t.Context(), "vm", VerbStart, "0", nil)
		if err != nil {
			t.Fatal(err)
		}
		var order []int
		for i := range 5 {
			go func() {
				r, err := s.Acquire(t.Context(), "vm", VerbStart, fmt.Sprint(i), nil)
				if err != nil {
					t.Error(err)
					return
				}
				order = append(order, i) // guarded by the slot
				r()
			}()
			synctest.Wait()
		}
		release()
		synctest.Wait()
		if fmt.Sprint(order) != "[0 1 2 3 4]" {
			t.Error(order)
		}
	})
}

func TestAcquireIsBoundByItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSlots()
		release, err := s.Acquire(t.Context(), "vm", VerbKill, "1", nil)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		if _, err := s.Acquire(ctx, "vm", VerbDelete, "2", nil); api.CodeOf(err) != api.Busy || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "kill did not end in time") {
			t.Errorf("got %v (%s)", err, api.CodeOf(err))
		}
		if time.Since(start) != time.Minute {
			t.Errorf("it took %v", time.Since(start))
		}
		cause := errors.New("the user went away")
		ctx2, cancel2 := context.WithCancelCause(t.Context())
		del := waiting(ctx2, s, VerbDelete, nil)
		cancel2(cause)
		if err := <-del; api.CodeOf(err) != api.Cancelled || !errors.Is(err, cause) {
			t.Errorf("got %v (%s)", err, api.CodeOf(err))
		}
		release()
		if _, err := s.Acquire(ctx2, "vm", VerbStart, "3", nil); api.CodeOf(err) != api.Cancelled {
			t.Errorf("an ended context took a free slot: %v", err)
		}
		if len(s.lines) != 0 {
			t.Errorf("left behind: %v", s.lines)
		}
	})
}

func TestReapYields(t *testing.T) {
	s := NewSlots()
	for _, verb := range verbs() {
		release, ok := s.TryAcquire("vm", verb)
		if !ok {
			t.Fatalf("%s: the slot is not free", verb)
		}
		if _, ok := s.TryAcquire("vm", VerbReap); ok {
			t.Errorf("reap took the slot of %s", verb)
		}
		if other, ok := s.TryAcquire("another", VerbReap); !ok {
			t.Error("the slot of another VM is not free")
		} else {
			other()
		}
		release()
	}
}

// TestSlotsUnderRandomLoad runs jobs that come at random, some with a deadline, and
// that end when they are done or cancelled, after a rollback. Never do two hold a
// slot, and everybody gets an answer: synctest fails the test when all goroutines
// wait for ever, which is what a lost wake-up looks like.
func TestSlotsUnderRandomLoad(t *testing.T) {
	for seed := range uint64(150) {
		synctest.Test(t, func(t *testing.T) { randomLoad(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func randomLoad(t *testing.T, r *rand.Rand) {
	s := NewSlots()
	holders := map[string]*atomic.Int32{"a": {}, "b": {}}
	var wg sync.WaitGroup
	var granted, refused, taken, late atomic.Int32
	for range 60 {
		key := []string{"a", "b"}[r.IntN(2)]
		verb := verbs()[r.IntN(len(verbs()))]
		begin, work, rollback := time.Duration(r.IntN(100))*time.Millisecond, time.Duration(r.IntN(20))*time.Millisecond, time.Duration(r.IntN(5))*time.Millisecond
		patience := time.Duration(1+r.IntN(60)) * time.Millisecond
		wg.Go(func() {
			time.Sleep(begin)
			wait, done := context.WithTimeout(context.Background(), patience)
			defer done()
			ctx, cancel := context.WithCancel(wait)
			defer cancel()
			var release func()
			var err error
			if verb == VerbReap {
				var ok bool
				if release, ok = s.TryAcquire(key, verb); !ok {
					refused.Add(1)
					return
				}
			} else if release, err = s.Acquire(ctx, key, verb, "op", cancel); err != nil {
				switch {
				case api.CodeOf(err) == api.Busy && wait.Err() == nil:
					refused.Add(1)
				case api.CodeOf(err) == api.Cancelled:
					taken.Add(1)
				case wait.Err() != nil:
					late.Add(1)
				default:
					t.Errorf("unexpected: %v", err)
				}
				return
			}
			granted.Add(1)
			if n := holders[key].Add(1); n != 1 {
				t.Errorf("%d holders", n)
			}
			select {
			case <-time.After(work):
			case <-ctx.Done():
				time.Sleep(rollback)
			}
			holders[key].Add(-1)
			release()
		})
	}
	wg.Wait()
	if len(s.lines) != 0 {
		t.Errorf("lines left: %v", s.lines)
	}
	if sum := granted.Load() + refused.Load() + taken.Load() + late.Load(); sum != 60 || granted.Load() == 0 {
		t.Errorf("%d granted, %d refused, %d taken over, %d late", granted.Load(), refused.Load(), taken.Load(), late.Load())
	}
}

// TestSlotsForReal is the same without a fake clock, for the race detector.
func TestSlotsForReal(t *testing.T) {
	s := NewSlots()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var wg sync.WaitGroup
	held := 0 // guarded by the slot
	for i := range 16 {
		wg.Go(func() {
			for k := range 200 {
				verb := verbs()[(i+k)%6]
				release, err := s.Acquire(ctx, "vm", verb, "op", func() {})
				if err != nil {
					if ctx.Err() != nil {
						t.Error(err)
						return
					}
					continue
				}
				held++
				release()
			}
		})
	}
	wg.Wait()
	if held == 0 || len(s.lines) != 0 {
		t.Errorf("held %d times, left %v", held, s.lines)
	}
}

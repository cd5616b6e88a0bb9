package opstate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"banger/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ids(ops []*Op[string]) string {
	var s []string
	for _, o := range ops {
		s = append(s, o.Snapshot().Target)
	}
	return strings.Join(s, " ")
}

func TestOperationRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry[string](t.Context(), 10, time.Hour)
		step := make(chan struct{})
		o := r.Begin("create", "dev", func(ctx context.Context, p *Op[string]) (string, error) {
			p.Step(1, 2, "disk")
			p.Bytes(10, 100)
			<-step
			p.Step(2, 2, "boot")
			<-step
			return "vm", nil
		})
		synctest.Wait()
		s := o.Snapshot()
		if s.ID != o.ID() || len(s.ID) != 8 || s.Kind != "create" || s.Target != "dev" || s.State != Running || s.CreatedAt.IsZero() || !s.FinishedAt.IsZero() {
			t.Errorf("%+v", s)
		}
		if s.Step != 1 || s.Steps != 2 || s.StepName != "disk" || s.BytesDone != 10 || s.BytesTotal != 100 {
			t.Errorf("%+v", s)
		}
		changed := o.Changed()
		time.Sleep(time.Second)
		step <- struct{}{}
		<-changed
		if s := o.Snapshot(); s.Step != 2 || s.StepName != "boot" || s.BytesDone != 0 || s.BytesTotal != 0 {
			t.Errorf("a new step keeps the bytes: %+v", s)
		}
		if r.Running() != 1 {
			t.Errorf("%d run", r.Running())
		}
		step <- struct{}{}
		<-o.Done()
		s = o.Snapshot()
		if s.State != Done || s.Result != "vm" || s.Err != nil || s.FinishedAt.Sub(s.CreatedAt) != time.Second || r.Running() != 0 {
			t.Errorf("%+v", s)
		}
		<-o.Changed() // closed: nobody waits for what does not come
		o.Step(9, 9, "late")
		o.Bytes(9, 9)
		o.Cancel()
		if after := o.Snapshot(); after != s {
			t.Errorf("a finished operation changed: %+v", after)
		}
		if got, ok := r.Get(o.ID()); !ok || got != o {
			t.Error("not found")
		}
		if _, ok := r.Get("nosuchop"); ok {
			t.Error("found what is not there")
		}
	})
}

func TestHowOperationsEnd(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name   string
		cancel bool
		fn     func(ctx context.Context, p *Op[string]) (string, error)
		state  State
		err    error
	}{
		{"done", false, func(context.Context, *Op[string]) (string, error) { return "r", nil }, Done, nil},
		{"failed", false, func(context.Context, *Op[string]) (string, error) { return "r", broken }, Failed, broken},
		{"cancelled", true, func(ctx context.Context, _ *Op[string]) (string, error) {
			<-ctx.Done()
			return "r", fmt.Errorf("rolled back: %w", context.Cause(ctx))
		}, Cancelled, ErrCancelled},
		{"cancelled with another error", true, func(ctx context.Context, _ *Op[string]) (string, error) { <-ctx.Done(); return "r", broken }, Cancelled, broken},
		{"cancelled too late", true, func(ctx context.Context, _ *Op[string]) (string, error) { <-ctx.Done(); return "r", nil }, Done, nil},
		{"its own timeout", false, func(ctx context.Context, _ *Op[string]) (string, error) {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			<-ctx.Done()
			return "r", ctx.Err()
		}, Failed, context.DeadlineExceeded},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := NewRegistry[string](t.Context(), 10, time.Hour)
				o := r.Begin("start", "dev", c.fn)
				if c.cancel {
					synctest.Wait()
					changed := o.Changed()
					o.Cancel()
					<-changed
					o.Cancel()
				}
				<-o.Done()
				s := o.Snapshot()
				if s.State != c.state || !errors.Is(s.Err, c.err) || s.Result != "r" || s.Cancelling {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

func TestCancellingIsSeen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry[string](t.Context(), 10, time.Hour)
		o := r.Begin("start", "dev", func(ctx context.Context, _ *Op[string]) (string, error) {
			<-ctx.Done()
			time.Sleep(time.Minute) // the rollback
			return "", ctx.Err()
		})
		o.Cancel()
		if s := o.Snapshot(); !s.Cancelling || s.State != Running {
			t.Errorf("%+v", s)
		}
		<-o.Done()
	})
}

func TestPanicBecomesAnError(t *testing.T) {
	r := NewRegistry[string](t.Context(), 10, time.Hour)
	o := r.Begin("start", "dev", func(context.Context, *Op[string]) (string, error) { panic("no such row") })
	<-o.Done()
	s := o.Snapshot()
	var p *PanicError
	if s.State != Failed || !errors.As(s.Err, &p) || s.Err.Error() != "internal error: no such row" {
		t.Fatalf("%+v", s)
	}
	if api.CodeOf(s.Err) != api.Internal || !strings.Contains(string(p.Stack), "TestPanicBecomesAnError") {
		t.Errorf("%s\n%s", api.CodeOf(s.Err), p.Stack)
	}
	if err := r.Close(t.Context()); err != nil {
		t.Error(err)
	}
}

// quick runs an operation to its end.
func quick(r *Registry[string], target string) *Op[string] {
	o := r.Begin("start", target, func(context.Context, *Op[string]) (string, error) { return "", nil })
	<-o.Done()
	synctest.Wait()
	return o
}

func TestFinishedOnesAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry[string](t.Context(), 3, time.Hour)
		stop := make(chan struct{})
		long := r.Begin("pull", "long", func(context.Context, *Op[string]) (string, error) { <-stop; return "", nil })
		first := quick(r, "1")
		for i := 2; i <= 5; i++ {
			quick(r, fmt.Sprint(i))
		}
		if got := ids(r.List()); got != "5 4 3 long" {
			t.Errorf("by count: %q", got)
		}
		if _, ok := r.Get(first.ID()); ok {
			t.Error("the first is still found")
		}
		time.Sleep(59 * time.Minute)
		quick(r, "6")
		if got := ids(r.List()); got != "6 5 4 long" {
			t.Errorf("after 59 minutes: %q", got)
		}
		time.Sleep(2 * time.Minute)
		if got := ids(r.List()); got != "6 long" {
			t.Errorf("by age: %q", got)
		}
		time.Sleep(24 * time.Hour)
		if _, ok := r.Get(long.ID()); !ok || ids(r.List()) != "long" {
			t.Error("one that runs was forgotten")
		}
		close(stop)
		<-long.Done()
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRegistry[string](context.Background(), 10, time.Hour)
		undo := make(chan struct{})
		slow := r.Begin("start", "slow", func(ctx context.Context, _ *Op[string]) (string, error) {
			<-ctx.Done()
			<-undo
			return "", context.Cause(ctx)
		})
		fast := r.Begin("start", "fast", func(ctx context.Context, _ *Op[string]) (string, error) {
			<-ctx.Done()
			return "", context.Cause(ctx)
		})
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := r.Close(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "start slow") {
			t.Errorf("got %v", err)
		}
		if s := fast.Snapshot(); s.State != Cancelled || !errors.Is(s.Err, ErrClosed) {
			t.Errorf("%+v", s)
		}
		if s := slow.Snapshot(); s.State != Running || !s.Cancelling {
			t.Errorf("%+v", s)
		}
		late := r.Begin("start", "late", func(context.Context, *Op[string]) (string, error) {
			t.Error("it runs after Close")
			return "", nil
		})
		<-late.Done()
		if s := late.Snapshot(); s.State != Cancelled || !errors.Is(s.Err, ErrClosed) || api.CodeOf(s.Err) != api.Cancelled {
			t.Errorf("%+v", s)
		}
		close(undo)
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
		if s := slow.Snapshot(); s.State != Cancelled || r.Running() != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestBaseEndsOperations(t *testing.T) {
	base, cancel := context.WithCancel(context.Background())
	r := NewRegistry[string](base, 10, time.Hour)
	o := r.Begin("start", "dev", func(ctx context.Context, _ *Op[string]) (string, error) { <-ctx.Done(); return "", ctx.Err() })
	cancel()
	<-o.Done()
	if s := o.Snapshot(); s.State != Cancelled {
		t.Errorf("%+v", s)
	}
}

// TestWatchersMissNothing: a watcher in the documented loop sees the last snapshot
// whatever the timing, and what it sees never goes back.
func TestWatchersMissNothing(t *testing.T) {
	r := NewRegistry[string](t.Context(), 10, time.Hour)
	const steps = 500
	begin := make(chan struct{})
	o := r.Begin("pull", "debian", func(_ context.Context, p *Op[string]) (string, error) {
		<-begin
		for i := range steps {
			p.Step(i+1, steps, "layer")
			p.Bytes(int64(i), steps)
		}
		return "ok", nil
	})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			last := 0
			for {
				changed := o.Changed()
				s := o.Snapshot()
				if s.Step < last {
					t.Errorf("step %d after %d", s.Step, last)
				}
				last = s.Step
				if s.State != Running {
					if s.State != Done || s.Step != steps || s.Result != "ok" {
						t.Errorf("%+v", s)
					}
					return
				}
				<-changed
			}
		})
	}
	close(begin)
	wg.Wait()
}

func TestRegistryUnderLoad(t *testing.T) {
	r := NewRegistry[string](context.Background(), 5, time.Hour)
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			o := r.Begin("start", "dev", func(ctx context.Context, p *Op[string]) (string, error) {
				p.Step(1, 1, "x")
				if i%2 == 0 {
					<-ctx.Done()
				}
				return "", ctx.Err()
			})
			r.List()
			r.Running()
			if i%2 == 0 {
				o.Cancel()
			}
			<-o.Done()
		})
	}
	wg.Wait()
	if err := r.Close(t.Context()); err != nil {
		t.Error(err)
	}
	if n := len(r.List()); n != 5 || r.Running() != 0 {
		t.Errorf("%d kept, %d run", n, r.Running())
	}
}

package cli

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// signals turns what the user asks by signals into two contexts. The first signal
// ends soft: what runs is cancelled and undone. The second ends hard: banger leaves at
// once and the daemon finishes alone. While a command runs in a guest, forward takes
// the signals instead.
type signals struct {
	soft, hard context.Context
	endSoft    context.CancelFunc
	endHard    context.CancelFunc
	release    func()
	done       chan struct{}

	mu      sync.Mutex
	forward func(os.Signal) // nil: the contexts
}

// osSignals sends the process's signals to ch until stop is called. A signal that the
// parent made banger ignore (nohup, a background job) stays ignored. A broken pipe is
// an error of a write, not the end of the process: a VM may be left to remove.
func osSignals(ch chan<- os.Signal) (stop func()) {
	for _, s := range []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE} {
		if !signal.Ignored(s) {
			signal.Notify(ch, s)
		}
	}
	return func() { signal.Stop(ch) }
}

func watchSignals(source func(chan<- os.Signal) (stop func())) *signals {
	s := &signals{done: make(chan struct{})}
	s.hard, s.endHard = context.WithCancel(context.Background())
	s.soft, s.endSoft = context.WithCancel(s.hard)
	ch := make(chan os.Signal, 8)
	stop := source(ch)
	quit := make(chan struct{})
	s.release = func() { stop(); close(quit) }
	go func() {
		defer close(s.done)
		for {
			select {
			case sig := <-ch:
				s.take(sig)
			case <-quit:
				return
			}
		}
	}()
	return s
}

func (s *signals) take(sig os.Signal) {
	if sig == syscall.SIGPIPE {
		return
	}
	s.mu.Lock()
	forward := s.forward
	s.mu.Unlock()
	switch {
	case forward != nil:
		forward(sig)
	case s.soft.Err() == nil:
		s.endSoft()
	default:
		s.endHard()
	}
}

// divert hands signals to fn until the returned function is called.
func (s *signals) divert(fn func(os.Signal)) (back func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forward = fn
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.forward = nil
	}
}

func (s *signals) interrupted() bool { return s.soft.Err() != nil }

func (s *signals) stop() {
	s.release()
	<-s.done
	s.endHard()
}

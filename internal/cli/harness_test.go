package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/internal/config"
)

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }

// text writes a message in one line, without the fields that are not set.
func text(m any) string {
	b, err := json.Marshal(m)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// safeBuffer is a buffer that is read while it is written.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// call is one run of banger in this process.
type call struct {
	t       testing.TB
	layout  config.Layout
	stdin   io.Reader
	stdout  io.Writer // nil: out
	stderr  io.Writer // nil: err
	env     []string
	out     safeBuffer
	err     safeBuffer
	signals chan<- os.Signal
	code    chan int
}

func (d *fakeDaemon) call() *call {
	return &call{t: d.t, layout: d.layout, stdin: strings.NewReader("")}
}

// start runs banger in the background.
func (c *call) start(args ...string) *call {
	stdout, stderr := c.stdout, c.stderr
	if stdout == nil {
		stdout = &c.out
	}
	if stderr == nil {
		stderr = &c.err
	}
	env := append([]string{"BANGERD=/nonexistent/bangerd", "TERM=xterm", "HOME=" + os.Getenv("HOME")}, c.env...)
	a := newApp(c.stdin, stdout, stderr, env)
	a.now = now
	a.layout = func() (config.Layout, error) { return c.layout, nil }
	ready := make(chan struct{})
	a.signals = watchSignals(func(ch chan<- os.Signal) func() {
		c.signals = ch
		close(ready)
		return func() {}
	})
	<-ready
	c.code = make(chan int, 1)
	go func() {
		code := a.run(args)
		a.signals.stop()
		c.code <- code
	}()
	return c
}

func (c *call) wait() int {
	c.t.Helper()
	select {
	case code := <-c.code:
		return code
	case <-time.After(30 * time.Second):
		c.t.Fatalf("banger does not end\nstdout: %s\nstderr: %s", c.out.String(), c.err.String())
		return -1
	}
}

func (c *call) kill(sig syscall.Signal) { c.signals <- sig }

// run runs banger and returns what it did.
func (d *fakeDaemon) run(args ...string) result {
	d.t.Helper()
	c := d.call().start(args...)
	code := c.wait()
	return result{code, c.out.String(), c.err.String()}
}

type result struct {
	code     int
	out, err string
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\n--- stdout\n%s--- stderr\n%s", r.code, r.out, r.err)
}

// eventually polls a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := poll(ctx, func() (bool, error) { return ok(), nil }); err != nil {
		t.Fatalf("never: %s", what)
	}
}

func want(t testing.TB, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s:\n got: %s\nwant: %s", what, g, w)
	}
}

func contains(t testing.TB, what, got string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(got, part) {
			t.Errorf("%s lacks %q:\n%s", what, part, got)
		}
	}
}

func stamp(t time.Time) *timestamppb.Timestamp { return timestamppb.New(t) }

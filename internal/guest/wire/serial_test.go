package wire

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// testDialer counts the connections that it makes.
type testDialer struct {
	t       testing.TB
	connect func(testing.TB) net.Conn
	dials   atomic.Int32
	open    atomic.Int32
	most    atomic.Int32
	fail    atomic.Int32 // so many dials fail
	last    atomic.Pointer[countedConn]
}

type countedConn struct {
	net.Conn
	d    *testDialer
	once sync.Once
}

func (c *countedConn) Close() error {
	c.once.Do(func() { c.d.open.Add(-1) })
	return c.Conn.Close()
}

func (d *testDialer) dial(ctx context.Context) (net.Conn, error) {
	d.dials.Add(1)
	if d.fail.Add(-1) >= 0 {
		return nil, errors.New("connection refused")
	}
	n := d.open.Add(1)
	for m := d.most.Load(); n > m && !d.most.CompareAndSwap(m, n); m = d.most.Load() {
	}
	c := &countedConn{Conn: d.connect(d.t), d: d}
	d.last.Store(c)
	return c, nil
}

// newTestSerial makes a channel to a guest behind a bad port.
func newTestSerial(t *testing.T) (*Serial, *testDialer, *badPort) {
	magic := randomBytes(MagicLen)
	port := newBadPort(uint64(len(t.Name())), magic)
	serveTestGuest(t, port, magic)
	d := &testDialer{t: t, connect: port.connect}
	s := NewSerial(d.dial, magic)
	t.Cleanup(func() {
		s.Close()
		if n := d.most.Load(); n > 1 {
			t.Errorf("%d connections at a time", n)
		}
		within(t, 10*time.Second, "closed connection", func() bool { return d.open.Load() == 0 })
	})
	return s, d, port
}

func dialEcho(t *testing.T, s *Serial) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := s.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := echo(c, randomBytes(1000)); err != nil {
		t.Fatal(err)
	}
}

func TestSerialSharesOneConnection(t *testing.T) {
	s, d, _ := newTestSerial(t)
	d.fail.Store(3)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			c, err := s.Dial(t.Context())
			if err == nil {
				err = echo(c, randomBytes(10000))
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := d.dials.Load(); n != 4 {
		t.Errorf("%d dials instead of 3 that fail and one", n)
	}
}

func TestSerialRedials(t *testing.T) {
	s, d, _ := newTestSerial(t)
	for round := range int32(10) {
		dialEcho(t, s)
		c, err := s.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("b"))
		if err := readBulk(c, 1000); err != nil {
			t.Fatal(err)
		}
		if n := d.dials.Load(); n != round+1 {
			t.Fatalf("%d dials in round %d", n, round)
		}
		d.last.Load().Conn.Close() // the VMM drops the connection
	}
}

// The guest's end may be gone without the host seeing it: here it begins a session
// and never speaks in it.
func TestSerialNoticesSilence(t *testing.T) {
	s, d, port := newTestSerial(t)
	s.patience = 50 * time.Millisecond
	s.trust = 0
	d.connect = func(t testing.TB) net.Conn {
		if d.dials.Load() > 1 {
			return port.connect(t)
		}
		host, guest := socketPair(t)
		go func() {
			preamble := make([]byte, MagicLen+NonceLen)
			io.ReadFull(guest, preamble)
			guest.Write(preamble[MagicLen:])
			io.Copy(io.Discard, guest)
			guest.Close()
		}()
		return host
	}
	dialEcho(t, s)
	if n := d.dials.Load(); n != 2 {
		t.Errorf("%d dials", n)
	}
}

func TestSerialEndsWithContext(t *testing.T) {
	d := &testDialer{t: t}
	d.fail.Store(1 << 30)
	s := NewSerial(d.dial, randomBytes(MagicLen))
	defer s.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := s.Dial(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "connection refused") {
		t.Fatalf("got %v", err)
	}
	// Nobody waits, so nobody dials.
	within(t, 5*time.Second, "end of the attempt", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.attempt == nil
	})
}

// A guest that takes the connection and never answers.
func TestSerialSilentGuest(t *testing.T) {
	var ends []net.Conn
	d := &testDialer{t: t, connect: func(t testing.TB) net.Conn {
		ours, theirs := socketPair(t)
		ends = append(ends, theirs)
		return ours
	}}
	s := NewSerial(d.dial, randomBytes(MagicLen))
	cause := errors.New("enough of it")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 30*time.Millisecond, cause)
	defer cancel()
	if _, err := s.Dial(ctx); !errors.Is(err, cause) {
		t.Fatalf("got %v", err)
	}
	// Close ends a Dial that waits.
	done := make(chan error, 1)
	go func() {
		_, err := s.Dial(context.Background())
		done <- err
	}()
	within(t, 5*time.Second, "second connection", func() bool { return d.dials.Load() == 2 })
	s.Close()
	select {
	case err := <-done:
		if !errors.Is(err, net.ErrClosed) {
			t.Fatalf("got %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Dial goes on after Close")
	}
	for _, c := range ends {
		c.Close()
	}
}

func TestDialUnixLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	if err := os.MkdirAll(filepath.Join(dir, "run"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	l, err := net.Listen("unix", "run/agent.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := DialUnix(t.Context(), dir, "run/agent.sock")
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := DialUnix(t.Context(), dir, "run/none"); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("got %v", err)
	}
}

// What stands where a directory should be is an error at once, a FIFO too.
func TestDialUnixNoDirectory(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fifo", "file"} {
		ended := make(chan error, 1)
		go func() {
			_, err := DialUnix(t.Context(), filepath.Join(dir, name), "agent.sock")
			ended <- err
		}()
		select {
		case err := <-ended:
			if !errors.Is(err, syscall.ENOTDIR) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%s: DialUnix hangs", name)
		}
	}
}

package wire

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// badPort is a serial port at its worst: the guest reads pieces of any size and is
// not told of hosts that come and go; what was under way then is cut anywhere, and
// garbage stands before and after.
type badPort struct {
	mu     sync.Mutex
	change sync.Cond
	rnd    *mrand.Rand
	magic  []byte
	in     []byte // to the guest
	host   net.Conn
	cutOff bool // the write deadline lies in the past
	closed bool
	reads  int
}

func newBadPort(seed uint64, magic []byte) *badPort {
	p := &badPort{rnd: mrand.New(mrand.NewPCG(seed, 1)), magic: magic}
	p.change.L = &p.mu
	return p
}

// connect replaces the host and returns the new one's end.
func (p *badPort) connect(t testing.TB) net.Conn {
	t.Helper()
	ours, theirs := socketPair(t)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.host != nil {
		p.host.Close()
	}
	p.in = p.in[:p.rnd.IntN(len(p.in)+1)]
	p.in = append(p.in, p.magic[:p.rnd.IntN(MagicLen)]...)
	p.host = ours
	go p.receive(ours)
	p.change.Broadcast()
	return theirs
}

func (p *badPort) receive(host net.Conn) {
	buf := make([]byte, 70000)
	for {
		p.mu.Lock()
		size := 1 + p.rnd.IntN(len(buf))
		p.mu.Unlock()
		n, err := host.Read(buf[:size])
		if err != nil {
			return
		}
		p.mu.Lock()
		for len(p.in) > 100000 && p.host == host {
			p.change.Wait()
		}
		if p.host != host {
			p.mu.Unlock()
			return
		}
		p.in = append(p.in, buf[:n]...)
		p.mu.Unlock()
		p.change.Broadcast()
	}
}

func (p *badPort) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reads++
	if p.reads%7 == 0 && len(p.in) == 0 && p.host == nil {
		return 0, io.EOF
	}
	for len(p.in) == 0 && !p.closed {
		p.change.Wait()
	}
	if p.closed {
		return 0, os.ErrClosed
	}
	n := min(1+p.rnd.IntN(1<<p.rnd.IntN(16)), len(p.in), len(b))
	copy(b, p.in[:n])
	p.in = p.in[n:]
	p.change.Broadcast()
	return n, nil
}

// Write writes to whatever host there is; a frame may begin at one host and end at
// the next.
func (p *badPort) Write(b []byte) (int, error) {
	total := 0
	for total < len(b) {
		p.mu.Lock()
		for p.host == nil && !p.closed && !p.cutOff {
			p.change.Wait()
		}
		host, cut, closed := p.host, p.cutOff, p.closed
		size := min(len(b)-total, 1+p.rnd.IntN(40000))
		p.mu.Unlock()
		switch {
		case closed:
			return total, os.ErrClosed
		case cut:
			return total, os.ErrDeadlineExceeded
		}
		host.SetWriteDeadline(time.Now().Add(5 * time.Millisecond))
		n, err := host.Write(b[total : total+size])
		total += n
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			p.mu.Lock()
			if p.host == host {
				p.host = nil
			}
			p.mu.Unlock()
		}
	}
	return total, nil
}

func (p *badPort) SetWriteDeadline(t time.Time) error {
	p.mu.Lock()
	p.cutOff = !t.IsZero()
	p.mu.Unlock()
	p.change.Broadcast()
	return nil
}

func (p *badPort) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.host != nil {
		p.host.Close()
	}
	p.change.Broadcast()
	return nil
}

func socketPair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := make([]net.Conn, 2)
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if conns[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return conns[0], conns[1]
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// bulk sends a sequence of numbers for ever, which shows any byte that is lost,
// doubled or foreign.
func bulk(w io.Writer) {
	buf := make([]byte, 8*4096)
	for k := uint64(0); ; {
		for i := 0; i < len(buf); i += 8 {
			binary.BigEndian.PutUint64(buf[i:], k)
			k++
		}
		if _, err := w.Write(buf); err != nil {
			return
		}
	}
}

func readBulk(r io.Reader, numbers int) error {
	buf := make([]byte, 8*numbers)
	if _, err := io.ReadFull(r, buf); err != nil {
		return err
	}
	for k := range uint64(numbers) {
		if got := binary.BigEndian.Uint64(buf[8*k:]); got != k {
			return fmt.Errorf("number %d is %d", k, got)
		}
	}
	return nil
}

// testGuest serves port: streams begin with 'b' for bulk or 'e' for an echo.
type testGuest struct {
	running atomic.Int32
	done    chan error
}

func serveTestGuest(t testing.TB, port io.ReadWriteCloser, magic []byte) *testGuest {
	g := &testGuest{done: make(chan error, 1)}
	go func() { g.done <- ServeGuest(port, magic, g.handle) }()
	t.Cleanup(func() {
		port.Close()
		within(t, 10*time.Second, "the guest's end", func() bool { return len(g.done) == 1 })
		within(t, 10*time.Second, "the end of all handlers", func() bool { return g.running.Load() == 0 })
	})
	return g
}

func (g *testGuest) handle(c net.Conn) {
	g.running.Add(1)
	defer g.running.Add(-1)
	defer c.Close()
	var what [1]byte
	if _, err := io.ReadFull(c, what[:]); err != nil {
		return
	}
	switch what[0] {
	case 'b':
		go func() { // as the agent does: the end of the stream ends the sender
			io.Copy(io.Discard, c)
			c.Close()
		}()
		bulk(c)
	case 'e':
		io.Copy(c, c)
	}
}

// echo sends data over a new stream of s and wants exactly them back.
func echo(c net.Conn, data []byte) error {
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	go func() { c.Write(append([]byte("e"), data...)) }()
	got := make([]byte, len(data))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if !bytes.Equal(got, data) {
		return errors.New("other bytes came back")
	}
	return nil
}

func within(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %s", what, d)
		}
	}
}

package wire

import (
	"bytes"
	"context"
	"errors"
	"io"
	mrand "math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/yamux"
)

// A host dies in the middle of bulk data in both directions, 50 times; the next
// finds a clean channel, and nothing of the last one's streams lives on.
func TestReconnectUnderBulk(t *testing.T) {
	magic := randomBytes(MagicLen)
	port := newBadPort(7, magic)
	guest := serveTestGuest(t, port, magic)
	rnd := mrand.New(mrand.NewPCG(7, 2))
	for round := range 50 {
		raw := port.connect(t)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		sess, err := HostSession(ctx, raw, magic)
		cancel()
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		clean, err := openStream(t.Context(), sess)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := echo(clean, randomBytes(100000)); err != nil {
			t.Fatalf("round %d: echo: %v", round, err)
		}
		for range 2 {
			c, err := openStream(t.Context(), sess)
			if err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			c.Write([]byte("b"))
			go bulk(c) // ends with the session
			if err := readBulk(c, 1+rnd.IntN(20000)); err != nil {
				t.Fatalf("round %d: bulk: %v", round, err)
			}
		}
		if n := guest.running.Load(); n > 2 {
			within(t, 10*time.Second, "end of the old streams", func() bool { return guest.running.Load() <= 2 })
		}
		raw.Close() // as the kernel does for a daemon that is killed
		sess.Close()
	}
}

// A guest that opens streams, which no guest of ours does, is refused: nobody would
// accept them, and what it writes would lie in the host's memory.
func TestStreamsOfTheGuestAreRefused(t *testing.T) {
	magic := randomBytes(MagicLen)
	hostEnd, guestEnd := socketPair(t)
	guestEnd.SetDeadline(time.Now().Add(20 * time.Second))
	const evil = 50
	replies := make(chan error, 1)
	go func() {
		preamble := make([]byte, MagicLen+NonceLen)
		_, err := io.ReadFull(guestEnd, preamble)
		// In one write with the nonce, so that the host has no moment in between. Frames
		// as in yamux's spec.md: version, type (1: window update), flags (1: SYN), stream,
		// window.
		out := bytes.Clone(preamble[MagicLen:])
		for k := range evil {
			out = append(out, 0, 1, 0, 1, 0, 0, 0, byte(2*k+2), 0, 0, 0, 0)
		}
		_, werr := guestEnd.Write(out)
		resets := 0
		for err = errors.Join(err, werr); err == nil && resets < evil; {
			frame := make([]byte, 12)
			if _, err = io.ReadFull(guestEnd, frame); err == nil && frame[1] == 1 && frame[3] == 8 { // 8: RST
				resets++
			}
		}
		replies <- err
	}()
	sess, err := HostSession(t.Context(), hostEnd, magic)
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	if err := <-replies; err != nil {
		t.Errorf("the guest's streams were not all refused: %v", err)
	}
	if n := sess.NumStreams(); n != 0 {
		t.Errorf("the host keeps %d streams of the guest", n)
	}
}

// A write that the last host never took must not hold up the next one, and not
// appear after its nonce.
func TestBlockedWriteOfOldSession(t *testing.T) {
	magic := randomBytes(MagicLen)
	port := newBadPort(3, magic)
	serveTestGuest(t, port, magic)
	old := port.connect(t)
	sess, err := HostSession(t.Context(), old, magic)
	if err != nil {
		t.Fatal(err)
	}
	c, err := openStream(t.Context(), sess)
	if err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("b"))
	if err := readBulk(c, 10); err != nil {
		t.Fatal(err)
	}

	// The next preamble comes over the same connection, of which nobody reads: the
	// guest's write is blocked in the port.
	sess.Close()
	ours, theirs := socketPair(t)
	defer ours.Close()
	port.mu.Lock()
	port.host = ours
	port.mu.Unlock()
	go port.receive(ours)
	nonce := randomBytes(NonceLen)
	theirs.Write(append(bytes.Clone(magic), nonce...))
	defer theirs.Close()
	theirs.SetReadDeadline(time.Now().Add(10 * time.Second))
	if err := readThrough(theirs, nonce); err != nil {
		t.Fatalf("the guest did not answer: %v", err)
	}
	// After the nonce only silence: a server speaks when it is spoken to.
	theirs.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := theirs.Read(make([]byte, 1)); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d bytes after the nonce, %v", n, err)
	}
}

// readThrough reads up to the end of nonce, one byte at a time.
func readThrough(r io.Reader, nonce []byte) error {
	m := newMatcher(nonce)
	var b [1]byte
	for {
		if _, err := io.ReadFull(r, b[:]); err != nil {
			return err
		}
		if _, ok := m.scan(b[:]); ok {
			return nil
		}
	}
}

// stuckPort never takes a write unless its deadline lies in the past.
type stuckPort struct {
	*badPort
	stuck atomic.Bool
}

func (p *stuckPort) Write(b []byte) (int, error) {
	if !p.stuck.Load() {
		return p.badPort.Write(b)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.cutOff && !p.closed {
		p.change.Wait()
	}
	return 0, os.ErrDeadlineExceeded
}

// While the port takes no byte at all, hosts come and go, and the last one is served
// as soon as it does.
func TestPortThatTakesNothing(t *testing.T) {
	magic := randomBytes(MagicLen)
	port := &stuckPort{badPort: newBadPort(5, magic)}
	serveTestGuest(t, port, magic)
	port.stuck.Store(true)
	for range 5 {
		raw := port.connect(t)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := HostSession(ctx, raw, magic); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		cancel()
	}
	port.stuck.Store(false)
	raw := port.connect(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	sess, err := HostSession(ctx, raw, magic)
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	c, err := openStream(ctx, sess)
	if err != nil {
		t.Fatal(err)
	}
	if err := echo(c, []byte("hello")); err != nil {
		t.Fatal(err)
	}
}

// The host finds its nonce behind garbage, parts of the nonce included, and loses
// nothing of what follows.
func TestHostFindsNonce(t *testing.T) {
	magic := randomBytes(MagicLen)
	guest, raw := socketPair(t)
	defer guest.Close()
	defer raw.Close()
	go func() {
		preamble := make([]byte, MagicLen+NonceLen)
		io.ReadFull(guest, preamble)
		nonce := preamble[MagicLen:]
		guest.Write(randomBytes(100000))
		for cut := 1; cut < NonceLen; cut++ {
			guest.Write(nonce[:cut])
		}
		guest.Write(append(bytes.Clone(nonce), "the session"...))
	}()
	rest, err := greet(raw, magic)
	if err != nil {
		t.Fatal(err)
	}
	c := &gatedConn{Conn: raw, open: make(chan struct{}), rest: rest}
	close(c.open)
	got := make([]byte, len("the session"))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "the session" {
		t.Fatalf("got %q, %v", got, err)
	}
}

// A preamble that was lost is sent again, with another nonce; the answer to the
// first one does not count then.
func TestPreambleIsSentAgain(t *testing.T) {
	guest, raw := socketPair(t)
	defer guest.Close()
	defer raw.Close()
	type result struct {
		rest []byte
		err  error
	}
	got := make(chan result, 1)
	go func() {
		rest, err := greet(raw, make([]byte, MagicLen))
		got <- result{rest, err}
	}()
	first, second := make([]byte, MagicLen+NonceLen), make([]byte, MagicLen+NonceLen)
	guest.SetReadDeadline(time.Now().Add(10 * time.Second))
	for _, preamble := range [][]byte{first, second} {
		if _, err := io.ReadFull(guest, preamble); err != nil {
			t.Fatal(err)
		}
	}
	if bytes.Equal(first[MagicLen:], second[MagicLen:]) {
		t.Fatal("the nonce is the same")
	}
	guest.Write(first[MagicLen:])
	guest.Write(second[MagicLen:])
	guest.Write([]byte("x"))
	select {
	case r := <-got:
		if r.err != nil {
			t.Fatal(r.err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the answer was not seen")
	}
}

// A byte that could begin a magic is delivered all the same, soon.
func TestHeldBackByteIsDelivered(t *testing.T) {
	magic := randomBytes(MagicLen)
	port := newBadPort(11, magic)
	serveTestGuest(t, port, magic)
	sess, err := HostSession(t.Context(), port.connect(t), magic)
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	c, err := openStream(t.Context(), sess)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write([]byte("e")); err != nil {
		t.Fatal(err)
	}
	for n := 1; n < MagicLen; n++ {
		if _, err := c.Write(magic[:n]); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, n)
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, magic[:n]) {
			t.Fatalf("%d bytes: %v", n, err)
		}
	}
}

// eofPort reports the end at every read.
type eofPort struct {
	reads  atomic.Int32
	closed chan struct{}
}

func (p *eofPort) Read([]byte) (int, error) {
	select {
	case <-p.closed:
		return 0, os.ErrClosed
	default:
		p.reads.Add(1)
		return 0, nil
	}
}
func (p *eofPort) Write(b []byte) (int, error) { return len(b), nil }
func (p *eofPort) Close() error                { return nil }

func TestPortThatEndsAllTheTimeIsNotPolled(t *testing.T) {
	p := &eofPort{closed: make(chan struct{})}
	done := make(chan error, 1)
	go func() { done <- ServeGuest(p, randomBytes(MagicLen), nil) }()
	time.Sleep(300 * time.Millisecond) // the time over which reads are counted
	if n := p.reads.Load(); n > 10 {
		t.Errorf("%d reads in 300 ms", n)
	}
	close(p.closed)
	select {
	case err := <-done:
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("got %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it goes on after the port was closed")
	}
}

// sinkPort takes all writes and has nothing to read.
type sinkPort struct {
	mu sync.Mutex
	bytes.Buffer
}

func (p *sinkPort) Read([]byte) (int, error) { select {} }
func (p *sinkPort) Close() error             { return nil }
func (p *sinkPort) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.Buffer.Write(b)
}
func (p *sinkPort) written() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.String()
}

// Nothing of a session is written once the next has begun, whoever is late.
func TestOldSessionCannotWrite(t *testing.T) {
	port := new(sinkPort)
	g := &guest{port: port}
	defer g.drop()
	g.begin([]byte("first nonce 0000"))
	old := g.conn
	within(t, 5*time.Second, "first nonce", func() bool { return port.written() == "first nonce 0000" })
	if _, err := old.Write([]byte("+")); err != nil {
		t.Fatal(err)
	}
	g.drop()
	if _, err := old.Write([]byte("late")); err == nil {
		t.Error("written after the session was dropped")
	}
	g.begin([]byte("second nonce 000"))
	if err := old.first([]byte("late")); err == nil {
		t.Error("a nonce was written after the next session had begun")
	}
	const want = "first nonce 0000+second nonce 000"
	within(t, 5*time.Second, "second nonce", func() bool { return len(port.written()) >= len(want) })
	old.Write([]byte("late"))
	if got := port.written(); got != want {
		t.Errorf("got %q", got)
	}
}

// Close ends a Read and a Write that wait, as that of a net.Conn does, with a peer
// that does not care.
func TestStreamCloseUnblocks(t *testing.T) {
	host, guest := socketPair(t)
	peer, err := yamux.Server(guest, sessionConfig()) // accepts nothing
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	sess, err := yamux.Client(host, sessionConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close()
	for name, wait := range map[string]func(net.Conn) error{
		"Read":  func(c net.Conn) error { _, err := c.Read(make([]byte, 1)); return err },
		"Write": func(c net.Conn) error { _, err := c.Write(make([]byte, 64<<20)); return err },
	} {
		c, err := openStream(t.Context(), sess)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- wait(c) }()
		select {
		case err := <-done:
			t.Fatalf("%s does not wait: %v", name, err)
		case <-time.After(50 * time.Millisecond):
		}
		c.Close()
		select {
		case err := <-done:
			if err == nil {
				t.Errorf("%s succeeded", name)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s goes on after Close", name)
		}
	}
}

package wire

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// The channel carries many streams over one byte stream whose ends do not see each
// other come and go: over virtio-serial a guest is not told that the host's side
// was closed and opened again. So each connection of the host begins with a
// preamble below yamux:
//
//	host → guest   magic (MagicLen bytes, of this boot)  nonce (NonceLen bytes, fresh)
//	guest → host   nonce
//
// The guest looks for the magic in every byte, whatever goes on; on it, the session
// that was is dropped. The host drops all that comes before its nonce. What follows
// on both sides is a new yamux session.

const (
	// holdBack is how long the guest keeps back the last bytes it has read when
	// they could be the beginning of a magic. Their rest, if there is one, is on its
	// way already: the host writes a preamble with one write.
	holdBack = 5 * time.Millisecond
	// inboxSize bounds what the guest has read for a session that does not take it.
	inboxSize = 1 << 20
	// inboxPatience is how long the guest waits for a session to take what was read
	// before it drops the session: the guest must go on looking for a magic.
	inboxPatience = 5 * time.Second
	// resendFirst and resendMax are the times after which a host sends another
	// preamble, doubling. Bytes may be lost while a guest boots or restarts.
	resendFirst = time.Second
	resendMax   = 30 * time.Second
)

// sessionConfig is the yamux configuration of both ends. There is no keepalive and
// no short timeout: a guest may stall for a long time (a busy host, a debugger, a
// suspended laptop) and must find its streams when it goes on.
func sessionConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.EnableKeepAlive = false
	c.MaxStreamWindowSize = 1 << 20
	c.ConnectionWriteTimeout = time.Hour
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = time.Minute
	c.LogOutput = io.Discard
	return c
}

// HostSession begins a session on raw, a fresh connection to the guest's port: it
// sends the preamble and waits, until ctx ends, for the guest's answer. Of what
// comes before the answer nothing is kept. After an error raw is closed; after
// success ctx has no meaning for the session any more.
func HostSession(ctx context.Context, raw net.Conn, magic []byte) (*yamux.Session, error) {
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	sess, err := hostSession(raw, magic)
	if !stop() || err != nil {
		raw.Close()
		if sess != nil {
			sess.Close()
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("cannot begin a session with the guest: %w", err)
	}
	return sess, nil
}

func hostSession(raw net.Conn, magic []byte) (*yamux.Session, error) {
	rest, err := greet(raw, magic)
	if err != nil {
		return nil, err
	}
	gated := &gatedConn{Conn: raw, open: make(chan struct{}), rest: rest}
	sess, err := yamux.Client(gated, sessionConfig())
	if err != nil {
		return nil, err
	}
	// Nobody here accepts a stream: those of a hostile guest would only fill memory.
	err = sess.GoAway()
	close(gated.open)
	return sess, err
}

// greet sends preambles until the nonce of the last one comes back, and returns what
// was read after it.
func greet(raw net.Conn, magic []byte) (rest []byte, err error) {
	if len(magic) != MagicLen {
		return nil, fmt.Errorf("the magic has %d bytes instead of %d", len(magic), MagicLen)
	}
	defer raw.SetReadDeadline(time.Time{})
	buf := make([]byte, 32<<10)
	for wait := resendFirst; ; wait = min(2*wait, resendMax) {
		preamble := make([]byte, MagicLen+NonceLen)
		copy(preamble, magic)
		rand.Read(preamble[MagicLen:])
		if _, err := raw.Write(preamble); err != nil {
			return nil, err
		}
		// An answer to an earlier preamble is of no use: the guest will drop that
		// session when it reads the later one.
		answer := newMatcher(preamble[MagicLen:])
		if err := raw.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return nil, err
		}
		for {
			n, err := raw.Read(buf)
			if end, ok := answer.scan(buf[:n]); ok {
				return bytes.Clone(buf[end:n]), nil
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return nil, err
			}
		}
	}
}

// gatedConn is a connection of which the beginning, rest, was read already; no more is
// read before open is closed.
type gatedConn struct {
	net.Conn
	open chan struct{}
	rest []byte
}

func (c *gatedConn) Read(b []byte) (int, error) {
	<-c.open
	if len(c.rest) > 0 {
		n := copy(b, c.rest)
		c.rest = c.rest[n:]
		return n, nil
	}
	return c.Conn.Read(b)
}

// conn is a stream whose Close unblocks Read and Write, as that of any net.Conn
// should (yamux's own only ends the sending), and never waits for the peer.
type conn struct {
	*yamux.Stream
	once sync.Once
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.Stream.SetDeadline(time.Unix(1, 0))
		go c.Stream.Close()
	})
	return nil
}

// openStream opens a stream of sess, in the time of ctx.
func openStream(ctx context.Context, sess *yamux.Session) (net.Conn, error) {
	type opened struct {
		stream *yamux.Stream
		err    error
	}
	ch := make(chan opened, 1)
	go func() {
		s, err := sess.OpenStream()
		ch <- opened{s, err}
	}()
	select {
	case o := <-ch:
		if o.err != nil {
			return nil, o.err
		}
		return &conn{Stream: o.stream}, nil
	case <-ctx.Done():
		go func() {
			if o := <-ch; o.err == nil {
				o.stream.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// writeDeadliner is what a port should have, so that a blocked write of a dropped
// session does not hold up the next one.
type writeDeadliner interface {
	SetWriteDeadline(t time.Time) error
}

// ServeGuest is the guest's end of the channel: it serves the sessions of one host
// after another on port, which is one endless byte stream, and calls handle in a
// goroutine of its own for each stream. It returns, and closes port, when reading
// the port fails; handlers may still run then, on broken streams.
//
// A read of 0 bytes or io.EOF means that no host is connected: the session is over,
// the port goes on. A good port says so once and then blocks (see package agent);
// with a worse one ServeGuest slows down by itself. When port has SetWriteDeadline
// it is used to cut short what a dropped session still writes.
//
// Bytes of a magic are no data of the session that they end, unless more than a few
// milliseconds lie between them; a stream whose data end like the beginning of a
// magic is delayed by so much.
func ServeGuest(port io.ReadWriteCloser, magic []byte, handle func(net.Conn)) error {
	if len(magic) != MagicLen {
		port.Close()
		return fmt.Errorf("the magic has %d bytes instead of %d", len(magic), MagicLen)
	}
	g := &guest{port: port, handle: handle}
	defer g.drop()
	defer port.Close()
	done := make(chan struct{})
	defer close(done)
	chunks := make(chan chunk)
	go pump(port, chunks, done)

	d := newDemux(magic, g)
	held := time.NewTimer(holdBack)
	defer held.Stop()
	for {
		select {
		case c := <-chunks:
			if c.err != nil {
				return c.err
			}
			d.feed(c.data)
			if c.eof {
				d.flush()
				g.drop()
			}
			c.taken <- struct{}{}
			if d.held > 0 {
				held.Reset(holdBack)
			}
		case <-held.C:
			d.flush()
		}
	}
}

// chunk is what one read of the port returned. data may be used until taken is sent.
type chunk struct {
	data  []byte
	eof   bool
	err   error
	taken chan<- struct{}
}

// pump reads port until it fails.
func pump(port io.Reader, chunks chan<- chunk, done <-chan struct{}) {
	buf := make([]byte, 64<<10)
	taken := make(chan struct{}, 1)
	idle := time.Duration(0)
	for {
		n, err := port.Read(buf)
		c := chunk{data: buf[:n], eof: err == io.EOF || n == 0 && err == nil, taken: taken}
		if !c.eof && err != nil {
			c.err = fmt.Errorf("cannot read the agent's port: %w", err)
		}
		select {
		case chunks <- c:
		case <-done:
			return
		}
		if c.err != nil {
			return
		}
		select {
		case <-taken:
		case <-done:
			return
		}
		if n > 0 {
			idle = 0
			continue
		}
		// The first end costs no wait; a port that ends again and again is asked
		// once a second.
		if idle > 0 {
			select {
			case <-time.After(idle):
			case <-done:
				return
			}
		}
		idle = min(max(2*idle, 10*time.Millisecond), time.Second)
	}
}

// guest holds the one session of a port.
type guest struct {
	port   io.ReadWriteCloser
	handle func(net.Conn)
	conn   *guestConn // the session's end; nil for none. Of the reading goroutine only.

	// generation says which session may write. It is raised before the write
	// deadline is set into the past, and read after the deadline was cleared, with
	// writeMu held: so no write of an earlier session follows a later one's nonce,
	// and none goes on blocking.
	generation atomic.Uint64
	writeMu    sync.Mutex
}

// data takes what was read for the session.
func (g *guest) data(p []byte) {
	if g.conn != nil && len(p) > 0 && !g.conn.in.put(p, inboxPatience) {
		g.drop()
	}
}

// drop ends the session.
func (g *guest) drop() {
	g.generation.Add(1)
	if d, ok := g.port.(writeDeadliner); ok {
		d.SetWriteDeadline(time.Unix(1, 0))
	}
	if g.conn != nil {
		g.conn.Close()
		g.conn = nil
	}
}

// begin starts the session of a host that sent nonce.
func (g *guest) begin(nonce []byte) {
	g.conn = &guestConn{guest: g, generation: g.generation.Add(1), in: newInbox(inboxSize)}
	go g.serve(g.conn, bytes.Clone(nonce))
}

func (g *guest) serve(c *guestConn, nonce []byte) {
	defer c.Close()
	if err := c.first(nonce); err != nil {
		return
	}
	sess, err := yamux.Server(c, sessionConfig())
	if err != nil {
		return
	}
	defer sess.Close()
	for {
		stream, err := sess.AcceptStream()
		if err != nil {
			return
		}
		go g.handle(&conn{Stream: stream})
	}
}

// guestConn is the byte stream below one session of the guest.
type guestConn struct {
	guest      *guest
	generation uint64
	in         *inbox
}

func (c *guestConn) Read(b []byte) (int, error) { return c.in.get(b) }

func (c *guestConn) Close() error {
	c.in.close()
	return nil
}

func (c *guestConn) Write(b []byte) (int, error) {
	c.guest.writeMu.Lock()
	defer c.guest.writeMu.Unlock()
	if c.guest.generation.Load() != c.generation || c.in.isClosed() {
		return 0, io.ErrClosedPipe
	}
	return c.guest.port.Write(b)
}

// first writes the nonce, with which the writing becomes c's.
func (c *guestConn) first(nonce []byte) error {
	c.guest.writeMu.Lock()
	if d, ok := c.guest.port.(writeDeadliner); ok {
		d.SetWriteDeadline(time.Time{})
	}
	c.guest.writeMu.Unlock()
	_, err := c.Write(nonce)
	return err
}

// inbox is a bounded queue of bytes with one writer and one reader.
type inbox struct {
	size               int
	readable, writable chan struct{} // notices, of capacity 1

	mu     sync.Mutex
	buf    []byte
	closed bool
}

func newInbox(size int) *inbox {
	return &inbox{size: size, readable: make(chan struct{}, 1), writable: make(chan struct{}, 1)}
}

func notify(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// put appends a copy of p, which may exceed the size once. It reports false when
// the inbox was closed or stayed full for so long.
func (q *inbox) put(p []byte, patience time.Duration) bool {
	var timeout <-chan time.Time
	for {
		q.mu.Lock()
		if q.closed {
			q.mu.Unlock()
			return false
		}
		if len(q.buf) < q.size {
			q.buf = append(q.buf, p...)
			q.mu.Unlock()
			notify(q.readable)
			return true
		}
		q.mu.Unlock()
		if timeout == nil {
			t := time.NewTimer(patience)
			defer t.Stop()
			timeout = t.C
		}
		select {
		case <-q.writable:
		case <-timeout:
			return false
		}
	}
}

// get returns what is there, waiting for it; io.EOF after close, at once.
func (q *inbox) get(b []byte) (int, error) {
	for {
		q.mu.Lock()
		if q.closed {
			q.mu.Unlock()
			return 0, io.EOF
		}
		if n := copy(b, q.buf); n > 0 {
			q.buf = q.buf[n:]
			if len(q.buf) == 0 {
				q.buf = nil
			}
			q.mu.Unlock()
			notify(q.writable)
			return n, nil
		}
		q.mu.Unlock()
		<-q.readable
	}
}

func (q *inbox) isClosed() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.closed
}

func (q *inbox) close() {
	q.mu.Lock()
	q.closed = true
	q.buf = nil
	q.mu.Unlock()
	notify(q.readable)
	notify(q.writable)
}

package wire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	defaultPatience = 5 * time.Second
	// redialFirst and redialMax are the waits between attempts to connect, doubling.
	redialFirst = 5 * time.Millisecond
	redialMax   = 250 * time.Millisecond
	// maxSessions bounds how many sessions one Dial sees break.
	maxSessions = 16
)

var errGuestSilent = errors.New("the guest has not answered yet")

// Serial is a driver.Channel over a serial port of the VMM: one raw connection and
// one session at a time, made when somebody dials and made anew when it broke.
type Serial struct {
	dial  func(ctx context.Context) (net.Conn, error)
	magic []byte
	ctx   context.Context // ends with Close
	close context.CancelFunc
	// patience is how long a session without streams may take to answer before it is
	// replaced.
	patience time.Duration
	// trust is how long a word of the guest spares it the question whether it is still
	// there, which costs an exec one more way there and back.
	trust time.Duration
	// heardAt is when the guest was last heard, nanoseconds since 1970.
	heardAt atomic.Int64

	mu      sync.Mutex
	sess    *yamux.Session
	attempt *attempt
}

// attempt is one go at making the session, shared by all who wait for it. It ends
// when it has succeeded or nobody waits any more.
type attempt struct {
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{}
	sess   *yamux.Session // after done; nil when cancelled

	waiters int   // guarded by Serial.mu
	last    error // guarded by Serial.mu: why it has not succeeded so far
}

// NewSerial makes a channel of what dial connects to. It does no I/O.
func NewSerial(dial func(ctx context.Context) (net.Conn, error), magic []byte) *Serial {
	s := &Serial{dial: dial, magic: magic, patience: defaultPatience, trust: time.Second}
	s.ctx, s.close = context.WithCancel(context.Background())
	return s
}

// Dial opens a stream to the guest's agent. While there is no guest it waits until
// ctx ends. After Close the error wraps net.ErrClosed.
func (s *Serial) Dial(ctx context.Context) (net.Conn, error) {
	var err error
	for range maxSessions {
		var sess *yamux.Session
		if sess, err = s.session(ctx); err != nil {
			return nil, err
		}
		if err = s.probe(ctx, sess); err == nil {
			var c net.Conn
			if c, err = openStream(ctx, sess); err == nil {
				return &heard{c, s}, nil
			}
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("cannot open a stream to the guest: %w", context.Cause(ctx))
		}
		sess.Close()
	}
	return nil, fmt.Errorf("cannot open a stream to the guest: %w", err)
}

// Close ends the session and all streams. It takes no notice of the guest.
func (s *Serial) Close() error {
	s.close()
	s.mu.Lock()
	sess := s.sess
	s.sess = nil
	s.mu.Unlock()
	if sess != nil {
		return sess.Close()
	}
	return nil
}

// probe asks an idle session whether the guest still knows it: the guest's end may
// be gone without the host having seen it. A session with streams is left alone: a
// guest that only stalls must not lose them.
func (s *Serial) probe(ctx context.Context, sess *yamux.Session) error {
	if sess.NumStreams() > 0 || time.Since(time.Unix(0, s.heardAt.Load())) < s.trust {
		return nil
	}
	answer := make(chan error, 1)
	go func() {
		_, err := sess.Ping()
		answer <- err
	}()
	timeout := time.NewTimer(s.patience)
	defer timeout.Stop()
	select {
	case err := <-answer:
		if err == nil {
			s.heardNow()
		}
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timeout.C:
		if sess.NumStreams() > 0 {
			return nil
		}
		return errGuestSilent
	}
}

func (s *Serial) heardNow() { s.heardAt.Store(time.Now().UnixNano()) }

// heard is a stream whose every byte from the guest is a sign of life.
type heard struct {
	net.Conn
	s *Serial
}

func (h *heard) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if n > 0 {
		h.s.heardNow()
	}
	return n, err
}

// session returns the living session, or waits for one.
func (s *Serial) session(ctx context.Context) (*yamux.Session, error) {
	for {
		s.mu.Lock()
		if s.ctx.Err() != nil {
			s.mu.Unlock()
			return nil, fmt.Errorf("cannot dial the guest: the channel is closed: %w", net.ErrClosed)
		}
		if s.sess != nil && !s.sess.IsClosed() {
			defer s.mu.Unlock()
			return s.sess, nil
		}
		if s.attempt == nil {
			s.attempt = &attempt{done: make(chan struct{}), last: errGuestSilent}
			s.attempt.ctx, s.attempt.cancel = context.WithCancel(s.ctx)
			go s.connect(s.attempt, s.sess)
			s.sess = nil
		}
		a := s.attempt
		a.waiters++
		s.mu.Unlock()

		var err error
		select {
		case <-a.done:
		case <-ctx.Done():
			err = context.Cause(ctx)
		}

		s.mu.Lock()
		if a.waiters--; a.waiters == 0 {
			a.cancel()
		}
		last := a.last
		s.mu.Unlock()
		switch {
		case err != nil:
			return nil, fmt.Errorf("cannot reach the guest's agent: %w (%v)", err, last)
		case a.sess != nil:
			return a.sess, nil
		}
	}
}

// connect makes a session in place of old, however long it takes.
func (s *Serial) connect(a *attempt, old *yamux.Session) {
	if old != nil {
		old.Close() // waits until its raw connection is closed
	}
	defer close(a.done)
	defer a.cancel()
	for wait := redialFirst; ; wait = min(2*wait, redialMax) {
		raw, err := s.dial(a.ctx)
		var sess *yamux.Session
		if err == nil {
			s.note(a, errGuestSilent)
			sess, err = HostSession(a.ctx, raw, s.magic)
		}
		if err == nil {
			s.adopt(a, sess)
			return
		}
		if a.ctx.Err() == nil {
			s.note(a, err)
		}
		select {
		case <-time.After(wait):
		case <-a.ctx.Done():
			s.adopt(a, nil)
			return
		}
	}
}

func (s *Serial) note(a *attempt, err error) {
	s.mu.Lock()
	a.last = err
	s.mu.Unlock()
}

// adopt ends the attempt a with the session that it made.
func (s *Serial) adopt(a *attempt, sess *yamux.Session) {
	s.mu.Lock()
	closed := s.ctx.Err() != nil
	if !closed {
		s.sess, a.sess = sess, sess
		s.heardNow()
	}
	s.attempt = nil
	s.mu.Unlock()
	if closed && sess != nil {
		sess.Close()
	}
}

// DialUnix connects to the Unix socket name below dir. The way goes through a
// descriptor of dir, so that no path is too long (sun_path has 108 bytes) as long as
// name itself is short.
func DialUnix(ctx context.Context, dir, name string) (net.Conn, error) {
	// A FIFO in its place would be waited for, and no context ends an open.
	d, err := os.OpenFile(dir, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	raw, err := d.SyscallConn()
	if err != nil {
		return nil, err
	}
	var conn net.Conn
	var dialErr error
	err = raw.Control(func(fd uintptr) {
		p := path.Join("/proc/self/fd", strconv.Itoa(int(fd)), name)
		conn, dialErr = new(net.Dialer).DialContext(ctx, "unix", p)
	})
	if err != nil {
		return nil, err
	}
	if dialErr != nil {
		return nil, fmt.Errorf("cannot connect to %s: %w", path.Join(dir, name), dialErr)
	}
	return conn, nil
}

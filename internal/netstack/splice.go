package netstack

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// splice is a connection of the guest and the one outside that goes with it. Each end of
// stream is passed on by itself, each reset too.
type splice struct {
	gate *gate

	mu      sync.Mutex // a leaf
	aborted bool
	ends    []net.Conn
}

func newSplice(g *gate) *splice { return &splice{gate: g} }

// halfCloser is a connection whose sending side can be ended by itself.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

// run copies both ways until both ends have ended, size bytes at a time. It closes both.
func (s *splice) run(guest, outside net.Conn, size int) {
	s.mu.Lock()
	s.ends = []net.Conn{guest, outside}
	aborted := s.aborted
	s.mu.Unlock()
	if aborted {
		s.abort()
		return
	}
	if g, ok := guest.(guestEnd); ok {
		defer g.OnReset(s.abort)()
	}
	var up sync.WaitGroup
	up.Go(func() { s.copy(outside, guest, &s.gate.sent, size) })
	s.copy(guest, outside, &s.gate.received, size)
	up.Wait()
	outside.Close()
	if g, ok := guest.(guestEnd); ok {
		g.Finish()
	}
	guest.Close()
}

// guestEnd is what an end of the guest's is, see guestConn.
type guestEnd interface {
	OnReset(f func()) (stop func())
	Finish()
	Abort()
}

// abort resets both ends, now or when run begins.
func (s *splice) abort() {
	s.mu.Lock()
	s.aborted = true
	ends := s.ends
	s.mu.Unlock()
	for _, conn := range ends {
		abort(conn)
	}
}

func (s *splice) isAborted() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.aborted
}

// copy passes on what src sends. Whatever breaks ends both ways.
func (s *splice) copy(dst, src net.Conn, count *atomic.Int64, size int) {
	buf := make([]byte, size)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			count.Add(int64(n))
			s.gate.took(n)
			if _, err := dst.Write(buf[:n]); err != nil {
				s.abort()
				return
			}
		}
		if s.isAborted() {
			return // what looks like an end may be the abort
		}
		if errors.Is(err, io.EOF) {
			if half, ok := dst.(halfCloser); !ok || half.CloseWrite() != nil {
				s.abort()
			}
			return
		}
		if err != nil {
			s.abort()
			return
		}
	}
}

// abort closes conn so that its peer sees a reset.
func abort(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	if guest, ok := conn.(guestEnd); ok {
		guest.Abort()
	}
	conn.Close()
}

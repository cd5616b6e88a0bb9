package main

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// port makes one endless byte stream of the connections to a socket, as
// virtio-serial does: a new connection takes the place of the old, bytes under way
// are lost, and the guest sees that a host is gone only when no other has come.
type port struct {
	mu     sync.Mutex
	change sync.Cond
	host   net.Conn
	away   bool // the reader was told that there is no host
	cutOff bool // the write deadline lies in the past
}

func newPort() *port {
	p := &port{away: true}
	p.change.L = &p.mu
	return p
}

func (p *port) accept(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		if p.host != nil {
			p.host.Close()
		}
		p.host = conn
		if p.cutOff {
			conn.SetWriteDeadline(time.Unix(1, 0))
		}
		p.mu.Unlock()
		p.change.Broadcast()
	}
}

// lost takes note that conn is gone.
func (p *port) lost(conn net.Conn) {
	conn.Close()
	p.mu.Lock()
	if p.host == conn {
		p.host = nil
	}
	p.mu.Unlock()
}

func (p *port) Read(b []byte) (int, error) {
	for {
		p.mu.Lock()
		for p.host == nil && p.away {
			p.change.Wait()
		}
		host := p.host
		p.away = host == nil
		p.mu.Unlock()
		if host == nil {
			return 0, io.EOF
		}
		n, err := host.Read(b)
		if err != nil {
			p.lost(host)
		}
		if n > 0 {
			return n, nil
		}
	}
}

func (p *port) Write(b []byte) (int, error) {
	total := 0
	for total < len(b) {
		p.mu.Lock()
		for p.host == nil && !p.cutOff {
			p.change.Wait()
		}
		host, cut := p.host, p.cutOff
		p.mu.Unlock()
		if cut {
			return total, os.ErrDeadlineExceeded
		}
		n, err := host.Write(b[total:])
		total += n
		if err != nil && !os.IsTimeout(err) {
			p.lost(host)
		}
	}
	return total, nil
}

func (p *port) SetWriteDeadline(t time.Time) error {
	p.mu.Lock()
	p.cutOff = !t.IsZero()
	if p.host != nil {
		p.host.SetWriteDeadline(t)
	}
	p.mu.Unlock()
	p.change.Broadcast()
	return nil
}

func (p *port) Close() error { return nil }

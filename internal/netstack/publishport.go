package netstack

import (
	"context"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"banger/internal/netwire"
)

// publishedPort is one host's side and what came through it.
type publishedPort struct {
	p      *publisher
	side   hostSide
	guest  atomic.Uint32 // the port
	ctx    context.Context
	cancel context.CancelFunc

	mu    sync.Mutex
	tcp   *net.TCPListener // one of the two, nil while shut
	udp   *net.UDPConn
	conns map[net.Conn]struct{} // both sides of the TCP connections
	over  bool                  // cut: no more of them
}

func (p *publisher) newPort(pub netwire.Publication) *publishedPort {
	o := &publishedPort{p: p, side: sideOf(pub), conns: make(map[net.Conn]struct{})}
	o.guest.Store(uint32(pub.Guest))
	o.ctx, o.cancel = context.WithCancel(p.ctx)
	return o
}

func (o *publishedPort) publication() netwire.Publication {
	return netwire.Publication{Protocol: o.side.protocol, Host: o.side.addr, Guest: uint16(o.guest.Load())}
}

// listen opens the host's side. What comes waits for begin.
func (o *publishedPort) listen() error {
	var config net.ListenConfig
	config.SetMultipathTCP(false) // nothing here has two paths
	family := "6"
	if o.side.addr.Addr().Is4() {
		family = "4"
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.side.protocol == "udp" {
		c, err := config.ListenPacket(o.ctx, "udp"+family, o.side.addr.String())
		if err != nil {
			return err
		}
		o.udp = c.(*net.UDPConn)
		return nil
	}
	l, err := config.Listen(o.ctx, "tcp"+family, o.side.addr.String())
	if err != nil {
		return err
	}
	o.tcp = l.(*net.TCPListener)
	return nil
}

// begin serves what comes until shut.
func (o *publishedPort) begin() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if l := o.tcp; l != nil {
		o.p.running.Go(func() { o.accept(l) })
	}
	if c := o.udp; c != nil {
		o.p.running.Go(func() { o.receive(c) })
	}
}

// shut closes the host's side. UDP flows end with it, TCP connections stay.
func (o *publishedPort) shut() {
	o.mu.Lock()
	if o.tcp != nil {
		o.tcp.Close()
	}
	if o.udp != nil {
		o.udp.Close()
	}
	o.tcp, o.udp = nil, nil
	o.mu.Unlock()
	o.p.flows.end(o, nil)
}

// cut ends the TCP connections and lets none begin.
func (o *publishedPort) cut() {
	o.cancel()
	o.mu.Lock()
	defer o.mu.Unlock()
	o.over = true
	for c := range o.conns {
		reset(c)
	}
}

// interrupt ends the TCP connections that there are.
func (o *publishedPort) interrupt() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		reset(c)
	}
}

// retarget leads what is new to another port of the guest.
func (o *publishedPort) retarget(guest uint16) {
	if o.guest.Load() != uint32(guest) {
		o.p.flows.end(o, func() { o.guest.Store(uint32(guest)) })
	}
}

// hold has c reset by cut. It is false, and c is reset, after that.
func (o *publishedPort) hold(c net.Conn) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.over {
		reset(c)
		return false
	}
	o.conns[c] = struct{}{}
	return true
}

// drop closes c.
func (o *publishedPort) drop(c net.Conn) {
	o.mu.Lock()
	delete(o.conns, c)
	o.mu.Unlock()
	c.Close()
}

// reset closes c so that the peer sees that it did not end well, where that can be, and
// wakes who reads or writes.
func reset(c net.Conn) {
	c.SetDeadline(time.Unix(1, 0))
	abort(c)
}

// accept leads connections to the guest until l is closed.
func (o *publishedPort) accept(l *net.TCPListener) {
	for pause := (acceptPause{}); ; {
		host, err := l.AcceptTCP()
		if err != nil {
			if !pause.after(o.ctx, err) {
				return
			}
			continue
		}
		pause = acceptPause{}
		if o.p.connected.Add(1) > publishConns {
			o.p.connected.Add(-1)
			reset(host)
			continue
		}
		o.p.running.Go(func() {
			defer o.p.connected.Add(-1)
			o.lead(host)
		})
	}
}

// lead connects one client to the guest and returns when both are done.
func (o *publishedPort) lead(host *net.TCPConn) {
	if !o.hold(host) {
		return
	}
	defer o.drop(host)
	ctx, cancel := context.WithTimeout(o.ctx, publishDial)
	guest, err := o.p.dial(ctx, "tcp", uint16(o.guest.Load()))
	cancel()
	if err != nil {
		reset(host)
		return
	}
	if !o.hold(guest) {
		return
	}
	defer o.drop(guest)
	o.p.splice(host, guest)
}

package netstack

import (
	"container/list"
	"context"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// handshakes bounds the guest's connections that are being made, on either side. When
// there are maxHandshakes, an old one gives way to a new one: addresses where nobody
// answers, and connections that the guest itself never completes, must not keep it from
// those that work. Nothing is said to the guest about either: it tries again, and its own
// timeout tells its programs.
type handshakes struct {
	mu     sync.Mutex // a leaf
	open   list.List  // of *handshake, the oldest first
	target map[netip.Addr]int
	// made has those that have not ended, also those that gave way: a packet sent again is
	// no other one, and what is left of one that gave way must not end the next.
	made map[stack.TransportEndpointID]struct{}
}

type handshake struct {
	to     netip.Addr
	began  time.Time
	cancel func()
	over   bool
}

// The least age of what gives way: to a connection to an address that has fewer, and to
// any. A kernel sends its first packet again after 1 and 3 s.
const (
	handshakeShare    = 250 * time.Millisecond
	handshakePatience = 2 * time.Second
)

func newHandshakes() *handshakes {
	return &handshakes{target: make(map[netip.Addr]int), made: make(map[stack.TransportEndpointID]struct{})}
}

// begin makes room for one to an address, which end gives back; cancel takes it away.
// Without room, or when it is being made already, end is nil. full says that one was
// dropped for want of room, this one or the one that gave way.
func (h *handshakes) begin(id stack.TransportEndpointID, to netip.Addr, cancel func()) (end func(), full bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, twice := h.made[id]; twice {
		return nil, false
	}
	now := time.Now()
	if full = h.open.Len() >= maxHandshakes; full && !h.evictLocked(to, now) {
		return nil, true
	}
	element := h.open.PushBack(&handshake{to: to, began: now, cancel: cancel})
	h.target[to]++
	h.made[id] = struct{}{}
	ended := false
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.removeLocked(element)
		if !ended { // later it may be another's
			ended = true
			delete(h.made, id)
		}
	}, full
}

// evictLocked ends the oldest one that must give way to one to an address.
func (h *handshakes) evictLocked(to netip.Addr, now time.Time) bool {
	for e := h.open.Front(); e != nil; e = e.Next() {
		s := e.Value.(*handshake)
		age := now.Sub(s.began)
		if age < handshakeShare {
			return false // and so are the others
		}
		if age >= handshakePatience || h.target[s.to] > h.target[to]+1 {
			h.removeLocked(e)
			s.cancel()
			return true
		}
	}
	return false
}

// removeLocked does nothing for one that has gone.
func (h *handshakes) removeLocked(e *list.Element) {
	s := e.Value.(*handshake)
	if s.over {
		return
	}
	s.over = true
	h.open.Remove(e)
	if h.target[s.to]--; h.target[s.to] == 0 {
		delete(h.target, s.to)
	}
}

// accept completes the guest's connection. The stack alone would try for two minutes.
func (n *network) accept(ctx context.Context, r *tcp.ForwarderRequest) (guestConn, bool) {
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	id, done := r.ID(), make(chan struct{})
	stop := context.AfterFunc(ctx, func() { n.abandon(id, done) })
	var queue waiter.Queue
	endpoint, problem := r.CreateEndpoint(&queue)
	close(done)
	inTime := stop()
	if problem != nil {
		return guestConn{}, false
	}
	if !inTime {
		endpoint.Abort()
		return guestConn{}, false
	}
	return newGuestConn(&queue, endpoint), true
}

// abandon ends a handshake, which may not have begun yet, until done is closed.
func (n *network) abandon(id stack.TransportEndpointID, done <-chan struct{}) {
	for {
		if e, ok := n.stack.FindTransportEndpoint(ipv4.ProtocolNumber, tcp.ProtocolNumber, id, card).(*tcp.Endpoint); ok {
			e.Abort()
		}
		select {
		case <-done:
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

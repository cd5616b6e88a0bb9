package netstack

import (
	"container/list"
	"context"
	"errors"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// errGaveWay ends a handshake that took long, in favour of a new one.
var errGaveWay = errors.New("nobody has answered yet, and others wait")

// handshakes bounds the guest's connections that are being made, on either side. When
// there are maxHandshakes, the oldest one gives way to a new one if it has taken
// handshakePatience: addresses where nobody answers, and connections that the guest itself
// never completes, must not keep it from those that work.
type handshakes struct {
	mu   sync.Mutex // a leaf
	open list.List  // of *handshake, the oldest first
}

type handshake struct {
	began  time.Time
	cancel context.CancelCauseFunc
}

// begin makes room for one, which end gives back; cancel takes it away. Without room ok is
// false.
func (h *handshakes) begin(cancel context.CancelCauseFunc) (end func(), ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if h.open.Len() >= maxHandshakes {
		oldest := h.open.Front()
		shake := oldest.Value.(*handshake)
		if now.Sub(shake.began) < handshakePatience {
			return nil, false
		}
		h.open.Remove(oldest)
		shake.cancel(errGaveWay)
	}
	element := h.open.PushBack(&handshake{began: now, cancel: cancel})
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.open.Remove(element) // which is nothing if it gave way
	}, true
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
	if problem != nil {
		return guestConn{}, false
	}
	if !stop() {
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

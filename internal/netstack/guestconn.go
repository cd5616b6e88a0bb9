package netstack

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// guestConn is a TCP connection with the guest that can be reset.
type guestConn struct {
	*gonet.TCPConn
	queue    *waiter.Queue
	endpoint tcpip.Endpoint
}

func newGuestConn(queue *waiter.Queue, endpoint tcpip.Endpoint) guestConn {
	return guestConn{gonet.NewTCPConn(queue, endpoint), queue, endpoint}
}

// OnReset calls f, once, when the guest has reset the connection, until stop is called.
// Whoever waits for the other side would not see it.
func (c guestConn) OnReset(f func()) (stop func()) {
	var once sync.Once // to end the connection is an event, too
	entry := waiter.NewFunctionEntry(waiter.EventErr|waiter.EventHUp, func(waiter.EventMask) {
		if tcp.EndpointState(c.endpoint.State()) == tcp.StateError {
			once.Do(func() { go f() }) // the stack's locks are held
		}
	})
	c.queue.EventRegister(&entry)
	return func() { c.queue.EventUnregister(&entry) }
}

// Finish closes the connection and waits until the guest has taken the rest, at most
// lingerTime: what waits for it is this process's memory.
func (c guestConn) Finish() {
	entry, changed := waiter.NewChannelEntry(waiter.EventHUp)
	c.queue.EventRegister(&entry)
	defer c.queue.EventUnregister(&entry)
	dead := tcpip.TCPUserTimeoutOption(deadTime)
	c.endpoint.SetSockOpt(&dead)
	c.Close()
	late := time.NewTimer(lingerTime)
	defer late.Stop()
	for {
		switch tcp.EndpointState(c.endpoint.State()) {
		case tcp.StateClose, tcp.StateError, tcp.StateTimeWait:
			return
		}
		select {
		case <-changed:
		case <-late.C:
			c.Abort()
			return
		}
	}
}

// Abort ends the connection with a reset.
func (c guestConn) Abort() { c.endpoint.Abort() }

// errRefused is a guest that answers a connection with a reset.
var errRefused = errors.New("the guest refuses the connection")

// dialGuest connects to a port of the guest, from the gateway.
func (n *network) dialGuest(ctx context.Context, protocol string, port uint16) (net.Conn, error) {
	to := tcpip.FullAddress{NIC: card, Addr: guestAddress(), Port: port}
	from := tcpip.FullAddress{NIC: card, Addr: gatewayAddress()}
	if protocol == "udp" {
		return gonet.DialUDP(n.stack, &from, &to, ipv4.ProtocolNumber)
	}
	ctx, cancel := context.WithTimeout(ctx, guestTimeout)
	defer cancel()
	var queue waiter.Queue
	endpoint, err := n.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if err != nil {
		return nil, errors.New(err.String())
	}
	tune(endpoint, n.connections())
	connected, ready := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&connected)
	defer queue.EventUnregister(&connected)
	if err = endpoint.Bind(from); err == nil {
		err = endpoint.Connect(to)
	}
	if _, started := err.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			endpoint.Abort()
			return nil, ctx.Err()
		case <-ready:
		}
		err = endpoint.LastError()
	}
	if err != nil {
		endpoint.Close()
		if _, refused := err.(*tcpip.ErrConnectionRefused); refused {
			return nil, errRefused
		}
		return nil, errors.New(err.String())
	}
	return newGuestConn(&queue, endpoint), nil
}

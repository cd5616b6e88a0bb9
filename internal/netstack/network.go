package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
)

// card is the number of the only network card that the stack has.
const card tcpip.NICID = 1

func gatewayAddress() tcpip.Address { return tcpip.AddrFrom4(netwire.Gateway().As4()) }
func guestAddress() tcpip.Address   { return tcpip.AddrFrom4(netwire.Guest().Addr().As4()) }

func addrPort(a tcpip.Address, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4(a.As4()), port)
}

// network is the stack with what listens in it.
type network struct {
	gate     *gate
	link     *link
	stack    *stack.Stack
	resolver *resolver
	wide     *tcp.Forwarder // for the first connections
	narrow   *tcp.Forwarder // for the others, with a small first window
	shakes   *handshakes
	pings    chan struct{}
	// published counts the connections of published ports, see connections.
	published func() int
	lookups   chan struct{}
	// datagrams are buffers of maxDatagram bytes, *[]byte.
	datagrams sync.Pool
	guests    sync.WaitGroup // goroutines that serve the guest

	ctx    context.Context
	cancel context.CancelFunc
}

// newNetwork makes the stack. close ends it.
func newNetwork(mac net.HardwareAddr, g *gate, r *resolver) (*network, error) {
	n := &network{
		gate: g, resolver: r,
		pings: make(chan struct{}, maxPings), lookups: make(chan struct{}, maxLookups),
		datagrams: sync.Pool{New: func() any { b := make([]byte, maxDatagram); return &b }},
		published: func() int { return 0 }, shakes: newHandshakes(),
	}
	n.link = newLink(mac, g.refuse, n.refuseUnroutable)
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	if err := n.configure(); err != nil {
		n.close()
		return nil, fmt.Errorf("cannot make the network: %w", err)
	}
	return n, nil
}

func (n *network) configure() error {
	sack := tcpip.TCPSACKEnabled(true)
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferLeast, Default: synWindow, Max: bufferMost}
	send := tcpip.TCPSendBufferSizeRangeOption{Min: bufferLeast, Default: synWindow, Max: bufferMost}
	late := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &receive, &send, &late} {
		if err := n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return errors.New(err.String())
		}
	}
	for _, step := range []func() tcpip.Error{
		func() tcpip.Error { return n.stack.CreateNIC(card, n.link) },
		// With spoofing on, the stack would ask for the guest's address in the name of
		// whoever the guest talks to.
		func() tcpip.Error {
			return n.stack.AddStaticNeighbor(card, ipv4.ProtocolNumber, guestAddress(), n.link.guest)
		},
		func() tcpip.Error {
			return n.stack.AddProtocolAddress(card, tcpip.ProtocolAddress{
				Protocol: ipv4.ProtocolNumber, AddressWithPrefix: gatewayAddress().WithPrefix(),
			}, stack.AddressProperties{})
		},
		func() tcpip.Error { return n.stack.SetPromiscuousMode(card, true) }, // take what is for others
		func() tcpip.Error { return n.stack.SetSpoofing(card, true) },        // answer in their name
	} {
		if err := step(); err != nil {
			return errors.New(err.String())
		}
	}
	n.stack.SetRouteTable([]tcpip.Route{{Destination: guestAddress().WithPrefix().Subnet(), NIC: card}})

	// The forwarders drop what is too much: their bounds only cap what shakes has yet to see.
	n.wide = tcp.NewForwarder(n.stack, synWindow, 2*maxHandshakes, n.serveTCP)
	n.narrow = tcp.NewForwarder(n.stack, bufferLeast, 2*maxHandshakes, n.serveTCP)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, p *stack.PacketBuffer) bool {
		if n.connections() > manyConnections {
			return n.narrow.HandlePacket(id, p)
		}
		return n.wide.HandlePacket(id, p)
	})
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, udp.NewForwarder(n.stack, n.serveUDP).HandlePacket)
	n.stack.SetTransportProtocolHandler(icmp.ProtocolNumber4, n.servePing)
	return n.listenDNS()
}

// run carries packets until ctx ends.
func (n *network) run(ctx context.Context, socket string) error { return n.link.run(ctx, socket) }

// connections counts what has TCP buffers.
func (n *network) connections() int { return n.gate.count("tcp") + n.published() }

// close ends all flows.
func (n *network) close() {
	n.cancel()
	n.gate.cut(func(*flow) bool { return true })
	n.stack.Close()
	n.guests.Wait()
	n.stack.Wait()
}

// serveTCP answers the guest's first packet of a connection. The outside is asked first,
// so that the guest sees what it would see there.
func (n *network) serveTCP(r *tcp.ForwarderRequest) {
	n.guests.Add(1)
	defer n.guests.Done()
	to := addrPort(r.ID().LocalAddress, r.ID().LocalPort)
	f, ok := n.gate.judge("tcp", to)
	if !ok {
		r.Complete(true)
		return
	}
	ctx, cancel := context.WithCancel(n.ctx)
	defer cancel()
	made, full := n.shakes.begin(r.ID(), f.Address, cancel)
	if full {
		n.gate.log.add(netwire.Entry{Event: "dropped", Protocol: "tcp", Target: "a new connection",
			Reason: fmt.Sprintf("the VM is making %d already", maxHandshakes)})
	}
	if made == nil {
		r.Complete(false) // the guest asks again
		return
	}
	defer made()
	conn := newSplice(n.gate)
	kept, reason := n.gate.enter(f, maxConnections, func() { cancel(); conn.abort() })
	if kept == nil {
		n.gate.refuse("tcp", to, reason)
		r.Complete(true)
		return
	}
	defer n.gate.leave(kept)
	late, stop := context.WithTimeout(ctx, dialTimeout)
	outside, err := dialOutside(late, f)
	stop()
	if err != nil {
		n.explain("tcp", to, err)
		r.Complete(ctx.Err() == nil) // what gave way, the guest asks for again
		return
	}
	guest, ok := n.accept(ctx, r)
	r.Complete(false)
	made()
	if !ok {
		abort(outside)
		return
	}
	count := n.connections()
	tune(guest.endpoint, count)
	keep(outside)
	narrow(outside, count)
	conn.run(guest, outside, copySize(count))
}

// tune bounds what the stack keeps for a connection.
func tune(endpoint tcpip.Endpoint, count int) {
	options := endpoint.SocketOptions()
	options.SetReceiveBufferSize(int64(bufferSize(count)), true)
	options.SetSendBufferSize(int64(bufferSize(count)), true)
	options.SetKeepAlive(true)
	options.SetDelayOption(false)
}

// narrow bounds what the host's kernel keeps for the later ones of many connections.
func narrow(outside net.Conn, count int) {
	if tcp, ok := outside.(*net.TCPConn); ok && count > manyConnections {
		tcp.SetReadBuffer(kernelBuffer)
		tcp.SetWriteBuffer(kernelBuffer)
	}
}

// keep finds out when the other end is gone. It comes after the guest has its answer, which
// waits for each call of the kernel.
func keep(outside net.Conn) {
	if tcp, ok := outside.(*net.TCPConn); ok {
		tcp.SetKeepAliveConfig(keepAlive())
	}
}

// keepAlive finds connections whose other end is gone, within minutes.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 6}
}

// errOwn is an address that has become the host's since it was judged.
var errOwn = errors.New("an address of this host")

func dialOutside(ctx context.Context, f netpolicy.Flow) (net.Conn, error) {
	d := net.Dialer{KeepAlive: -1, Control: noBroadcast}
	conn, err := d.DialContext(ctx, f.Protocol, netip.AddrPortFrom(f.Address, f.Port).String())
	if f.Gateway && f.Protocol == "tcp" && errors.Is(err, syscall.ECONNREFUSED) {
		// Some programs bind "localhost" to its IPv6 address alone.
		if six, failed := d.DialContext(ctx, "tcp", netip.AddrPortFrom(netip.IPv6Loopback(), f.Port).String()); failed == nil {
			return six, nil
		}
	}
	if err == nil && !f.Own && !f.Gateway && isOwn(conn.LocalAddr(), f.Address) {
		abort(conn)
		return nil, errOwn
	}
	return conn, err
}

// noBroadcast: a network's broadcast address is its hosts' own services, this one's too.
// Go lets all sockets send there.
func noBroadcast(_, _ string, raw syscall.RawConn) error {
	var err error
	if failed := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
	}); failed != nil {
		return failed
	}
	return err
}

// isOwn tells a socket's own address that is the one it is connected to.
func isOwn(local net.Addr, to netip.Addr) bool {
	at, err := netip.ParseAddrPort(local.String())
	return err == nil && at.Addr().Unmap() == to
}

// endsHere tells whether the host keeps what is sent to an address, though no interface
// has it: a route of type local. Connecting a UDP socket sends nothing.
func endsHere(to netip.Addr) bool {
	d := net.Dialer{Control: noBroadcast}
	conn, err := d.Dial("udp", netip.AddrPortFrom(to, 1).String())
	if err != nil {
		return false
	}
	defer conn.Close()
	return isOwn(conn.LocalAddr(), to)
}

// explain logs what a user would look for on the side of the guest and cannot find there.
func (n *network) explain(protocol string, to netip.AddrPort, err error) {
	switch {
	case errors.Is(err, syscall.ENETUNREACH):
		n.gate.refuseHint(protocol, to, "the host has no network that leads there", "ip route")
	case errors.Is(err, errOwn):
		n.gate.refuse(protocol, to, errOwn.Error())
	case errors.Is(err, syscall.EACCES):
		n.gate.refuse(protocol, to, "a broadcast address, or the host's firewall forbids it")
	case errors.Is(err, syscall.EPERM):
		n.gate.refuse(protocol, to, "the host's firewall forbids it")
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		n.gate.refuse(protocol, to, "the host gives no more open files")
	}
}

// listenDNS listens on the gateway's port 53.
func (n *network) listenDNS() error {
	at := tcpip.FullAddress{NIC: card, Addr: gatewayAddress(), Port: 53}
	datagrams, err := gonet.DialUDP(n.stack, &at, nil, ipv4.ProtocolNumber)
	if err != nil {
		return err
	}
	listener, err := n.listen(at)
	if err != nil {
		datagrams.Close()
		return err
	}
	context.AfterFunc(n.ctx, func() {
		datagrams.Close()
		listener.Shutdown()
		listener.Close()
	})
	n.guests.Go(func() { n.answerDatagrams(datagrams) })
	n.guests.Go(func() { n.answerConnections(listener) })
	return nil
}

// listen listens for connections that end when the guest takes nothing for a while: what
// has been closed holds its last answer until then.
func (n *network) listen(at tcpip.FullAddress) (*gonet.TCPListener, error) {
	var queue waiter.Queue
	endpoint, problem := n.stack.NewEndpoint(tcp.ProtocolNumber, ipv4.ProtocolNumber, &queue)
	if problem != nil {
		return nil, errors.New(problem.String())
	}
	patience := tcpip.TCPUserTimeoutOption(guestTimeout)
	for _, step := range []func() tcpip.Error{
		func() tcpip.Error { return endpoint.SetSockOpt(&patience) },
		func() tcpip.Error { return endpoint.Bind(at) },
		func() tcpip.Error { return endpoint.Listen(resolverBacklog) },
	} {
		if problem := step(); problem != nil {
			endpoint.Close()
			return nil, errors.New(problem.String())
		}
	}
	return gonet.NewTCPListener(n.stack, &queue, endpoint), nil
}

func (n *network) answerDatagrams(conn net.PacketConn) {
	buf := make([]byte, header.UDPMinimumSize+netwire.MTU)
	for {
		size, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		select {
		case n.lookups <- struct{}{}:
		default:
			continue // the guest asks again
		}
		question := append([]byte(nil), buf[:min(size, dnsQuery+1)]...)
		n.guests.Go(func() {
			defer func() { <-n.lookups }()
			if answer := n.resolver.exchange(n.ctx, question, false); answer != nil {
				conn.WriteTo(answer, from)
			}
		})
	}
}

// maxResolverConns bounds the connections to the resolver, resolverBacklog those that
// nobody has accepted yet.
const (
	maxResolverConns = 32
	resolverBacklog  = 10
)

func (n *network) answerConnections(listener net.Listener) {
	slots := make(chan struct{}, maxResolverConns)
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		default:
			conn.Close()
			continue
		}
		n.guests.Go(func() {
			defer func() { <-slots }()
			stop := context.AfterFunc(n.ctx, func() { conn.Close() })
			defer stop()
			defer conn.Close()
			n.resolver.serveTCP(n.ctx, conn)
		})
	}
}

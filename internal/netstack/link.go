package netstack

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"banger/internal/netwire"
)

// lengthSize is the length before each frame, big endian: see net/stream.c of QEMU.
const lengthSize = 4

// maxFrame is the largest frame of either side, in bytes.
const maxFrame = header.EthernetMinimumSize + netwire.MTU

// link is the stack's network card. Frames come from QEMU and go to it over one
// connection after the other; while there is none, what the stack sends is dropped, as on
// a wire.
type link struct {
	guest   tcpip.LinkAddress
	gateway tcpip.LinkAddress
	// odd is told of a packet that the guest must not send.
	odd func(protocol string, to netip.AddrPort, reason string)
	// unroutable is told of a packet that the stack would drop without a word, and of its
	// first bytes.
	unroutable func(to netip.Addr, packet []byte)
	// took is told of each frame's size, and may take its time.
	took func(size int)

	mu         sync.Mutex // a leaf
	wake       *sync.Cond
	conn       net.Conn // nil while there is none
	queue      []*stack.PacketBuffer
	queued     int // bytes
	dispatcher stack.NetworkDispatcher
	closed     bool
}

func newLink(guest net.HardwareAddr, odd func(string, netip.AddrPort, string), unroutable func(netip.Addr, []byte)) *link {
	l := &link{
		guest: tcpip.LinkAddress(guest), gateway: tcpip.LinkAddress(netwire.GatewayMAC()),
		odd: odd, unroutable: unroutable, took: func(int) {},
	}
	l.wake = sync.NewCond(&l.mu)
	return l
}

// MTU implements stack.LinkEndpoint, as do the methods below.
func (l *link) MTU() uint32 { return netwire.MTU }

// SetMTU does nothing: both sides know it.
func (l *link) SetMTU(uint32) {}

// MaxHeaderLength is Ethernet's.
func (l *link) MaxHeaderLength() uint16 { return header.EthernetMinimumSize }

// LinkAddress is the gateway's.
func (l *link) LinkAddress() tcpip.LinkAddress { return l.gateway }

// SetLinkAddress does nothing.
func (l *link) SetLinkAddress(tcpip.LinkAddress) {}

// Capabilities: what comes over a local socket is as it was sent, so that checksums need
// no look.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired | stack.CapabilityRXChecksumOffload
}

// Attach keeps who gets the packets.
func (l *link) Attach(d stack.NetworkDispatcher) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dispatcher = d
}

// IsAttached tells whether somebody gets the packets.
func (l *link) IsAttached() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dispatcher != nil
}

// Wait does nothing: run waits for itself.
func (l *link) Wait() {}

// Close does nothing: run closes its connection.
func (l *link) Close() {}

// SetOnCloseAction does nothing.
func (l *link) SetOnCloseAction(func()) {}

// ARPHardwareType is Ethernet's.
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }

// ParseHeader takes the Ethernet header off.
func (l *link) ParseHeader(p *stack.PacketBuffer) bool {
	_, ok := p.LinkHeader().Consume(header.EthernetMinimumSize)
	return ok
}

// AddHeader puts the Ethernet header on. All comes from the gateway.
func (l *link) AddHeader(p *stack.PacketBuffer) {
	header.Ethernet(p.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: l.gateway, DstAddr: l.guest, Type: p.NetworkProtocolNumber,
	})
}

// WritePackets queues packets for QEMU. It never waits: with a full queue they are lost,
// and TCP sends them again.
func (l *link) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range list.AsSlice() {
		if l.conn == nil || l.queued >= linkQueue {
			continue
		}
		l.queue = append(l.queue, p.IncRef())
		l.queued += p.MemSize() // a small packet is mostly what is around it
	}
	l.wake.Signal()
	return list.Len(), nil
}

// dialPause is how long to wait before QEMU is dialled again. It listens once the
// previous connection has ended.
const dialPause = 5 * time.Millisecond

// run dials QEMU at path, and again when it hangs up, until ctx ends.
func (l *link) run(ctx context.Context, path string) error {
	var writer sync.WaitGroup
	writer.Go(l.write)
	defer writer.Wait()
	defer l.stop()
	var dialer net.Dialer
	for pause := dialPause; ctx.Err() == nil; {
		conn, err := dialer.DialContext(ctx, "unix", path)
		if err == nil {
			pause = dialPause
			err = l.serve(ctx, conn)
		}
		if errors.Is(err, errFrame) {
			// QEMU and we do not agree where frames begin: there is no way back.
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, 100*time.Millisecond)
	}
	return nil
}

func (l *link) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.wake.Signal()
}

// serve makes conn the way to QEMU and reads frames from it until it ends.
func (l *link) serve(ctx context.Context, conn net.Conn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	l.mu.Lock()
	l.conn = conn
	l.mu.Unlock()
	defer func() {
		conn.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		l.conn = nil
		l.dropLocked()
	}()
	return l.read(conn)
}

func (l *link) dropLocked() {
	for i, p := range l.queue {
		p.DecRef()
		l.queue[i] = nil
	}
	l.queue, l.queued = l.queue[:0], 0
}

// errFrame is a length that no frame has.
var errFrame = errors.New("QEMU sent no frame")

// readAhead is small: what is larger goes past it into the packet.
const readAhead = 16 << 10

// read reads frames until conn ends.
func (l *link) read(conn io.Reader) error {
	r := bufio.NewReaderSize(conn, readAhead)
	var length [lengthSize]byte
	for {
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return err
		}
		n := int(binary.BigEndian.Uint32(length[:]))
		l.took(n)
		if n > 1<<20 {
			return fmt.Errorf("%w, but a length of %d", errFrame, n)
		}
		if n > maxFrame || n < header.EthernetMinimumSize {
			l.odd("ethernet", netip.AddrPort{}, fmt.Sprintf("a frame of %d bytes", n))
			if _, err := r.Discard(n); err != nil {
				return err
			}
			continue
		}
		// The headers of Ethernet and IPv4 get a chunk of their own: whoever looks at the
		// first bytes of a packet would else copy all that lies in the same one.
		first := min(n, header.EthernetMinimumSize+header.IPv4MinimumSize)
		head := buffer.NewViewSize(first)
		if _, err := io.ReadFull(r, head.AsSlice()); err != nil {
			head.Release()
			return err
		}
		frame := buffer.MakeWithView(head)
		if rest := n - first; rest > 0 {
			body := buffer.NewViewSize(rest)
			if _, err := io.ReadFull(r, body.AsSlice()); err != nil {
				body.Release()
				frame.Release()
				return err
			}
			if err := frame.Append(body); err != nil {
				return err
			}
		}
		l.deliver(frame)
	}
}

// deliver gives a frame to the stack, or not. It owns frame.
func (l *link) deliver(frame buffer.Buffer) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: frame})
	defer p.DecRef()
	raw, ok := p.LinkHeader().Consume(header.EthernetMinimumSize)
	if !ok {
		return
	}
	eth := header.Ethernet(raw)
	if !l.admit(eth, p) {
		return
	}
	l.mu.Lock()
	d := l.dispatcher
	l.mu.Unlock()
	if d != nil {
		d.DeliverNetworkPacket(eth.Type(), p)
	}
}

// admit tells what the stack may see: IPv4 from the guest's own addresses to the gateway,
// and questions for the gateway's address. The stack is promiscuous and would answer more.
func (l *link) admit(eth header.Ethernet, p *stack.PacketBuffer) bool {
	kind := eth.Type()
	if kind == header.IPv6ProtocolNumber {
		return false // there is none, and a guest's kernel tries by itself at each boot
	}
	if eth.SourceAddress() != l.guest {
		l.odd("ethernet", netip.AddrPort{}, "a forged source: "+eth.SourceAddress().String())
		return false
	}
	switch kind {
	case header.ARPProtocolNumber:
		raw, ok := p.Data().PullUp(header.ARPSize)
		arp := header.ARP(raw)
		return ok && arp.IsValid() && tcpip.AddrFromSlice(arp.ProtocolAddressTarget()) == gatewayAddress() &&
			tcpip.AddrFromSlice(arp.ProtocolAddressSender()) == guestAddress()
	case header.IPv4ProtocolNumber:
		raw, ok := p.Data().PullUp(header.IPv4MinimumSize)
		return ok && l.admitIPv4(eth, header.IPv4(raw), p)
	}
	l.odd("ethernet", netip.AddrPort{}, fmt.Sprintf("an unknown protocol: 0x%04x", uint32(kind)))
	return false
}

func (l *link) admitIPv4(eth header.Ethernet, ip header.IPv4, p *stack.PacketBuffer) bool {
	to := netip.AddrFrom4(ip.DestinationAddress().As4())
	switch {
	case ip.SourceAddress() != guestAddress():
		if ip.SourceAddress().Unspecified() {
			return false // DHCP: there is no need of it
		}
		l.odd("ip", netip.AddrPortFrom(to, 0), "a forged source: "+ip.SourceAddress().String())
		return false
	case to.IsMulticast() || to == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		l.odd("ip", netip.AddrPortFrom(to, 0), "multicast")
		return false
	case to.IsLoopback() || to.As4()[0] == 0:
		if raw, ok := p.Data().PullUp(min(p.Data().Size(), int(ip.HeaderLength())+quotedPayload)); ok {
			l.unroutable(to, raw)
		}
		return false
	}
	return eth.DestinationAddress() == l.gateway
}

// write sends what is queued until stop.
func (l *link) write() {
	var batch []*stack.PacketBuffer
	var lengths []byte
	var out net.Buffers
	for {
		l.mu.Lock()
		for len(l.queue) == 0 && !l.closed {
			l.wake.Wait()
		}
		if l.closed {
			l.dropLocked()
			l.mu.Unlock()
			return
		}
		batch, l.queue, l.queued = l.queue, batch[:0], 0
		conn := l.conn
		l.mu.Unlock()

		lengths, out = lengths[:0], out[:0]
		for _, p := range batch {
			lengths = binary.BigEndian.AppendUint32(lengths, uint32(p.Size()))
		}
		for i, p := range batch {
			out = append(out, lengths[i*lengthSize:(i+1)*lengthSize])
			out = append(out, p.AsSlices()...)
		}
		if conn != nil {
			all := out // WriteTo eats what it is called on
			if _, err := all.WriteTo(conn); err != nil {
				conn.Close() // the reader sees it
			}
		}
		for i, p := range batch {
			p.DecRef()
			batch[i] = nil
		}
		clear(out)
	}
}

package netstack

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"banger/internal/netpolicy"
)

func newPayload(b []byte) tcpip.Payloader { return bytes.NewReader(b) }

// servePing passes the guest's echo request on through a socket of the host that sends
// echo requests only, see icmp(7). Whatever keeps it from going out is told the guest as
// "prohibited". The stack itself answers for the gateway.
func (n *network) servePing(id stack.TransportEndpointID, p *stack.PacketBuffer) bool {
	h := header.ICMPv4(p.TransportHeader().Slice())
	if len(h) < header.ICMPv4MinimumSize || h.Type() != header.ICMPv4Echo || id.LocalAddress == gatewayAddress() {
		return false
	}
	to := addrPort(id.LocalAddress, 0)
	request := append(append([]byte(nil), h...), p.Data().AsRange().ToSlice()...)
	quoted := append([]byte(nil), p.NetworkHeader().Slice()...)
	quoted = append(quoted, request[:quotedPayload]...)
	prohibited := func() { n.sendICMP(id.LocalAddress, prohibition(quoted)) }
	f, ok := n.gate.judge("icmp", to)
	if !ok {
		prohibited()
		return true
	}
	select {
	case n.pings <- struct{}{}:
	default:
		return true // lost, as when a network is busy
	}
	n.guests.Go(func() {
		defer func() { <-n.pings }()
		answer, err := n.ping(f.Address, request)
		switch {
		case err == nil:
			n.sendICMP(id.LocalAddress, answer)
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, errPingClosed):
			n.gate.refuseHint("icmp", to, "the host lets this user send no echo requests: sysctl net.ipv4.ping_group_range",
				`sudo sysctl -w net.ipv4.ping_group_range="0 2147483647"`)
			prohibited()
		default:
			n.explain("icmp", to, err)
			prohibited()
		}
	})
	return true
}

// quotedPayload is what an ICMP error quotes beyond the packet's header, see RFC 792.
const quotedPayload = 8

// refuseUnroutable refuses a packet to 127/8 or 0/8, which the stack would drop.
func (n *network) refuseUnroutable(to netip.Addr, packet []byte) {
	verdict := n.gate.policy.Load().Judge(netpolicy.Flow{Protocol: "icmp", Address: to})
	n.gate.refuse("ip", netip.AddrPortFrom(to, 0), verdict.Reason)
	n.sendICMP(gatewayAddress(), prohibition(packet))
}

// errPingClosed: net.ipv4.ping_group_range has no group of this user.
var errPingClosed = errors.New("no sockets for echo requests")

// ping sends an echo request of ICMP and returns the answer with the guest's identifier.
func (n *network) ping(to netip.Addr, request []byte) ([]byte, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMP)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		return nil, errPingClosed
	}
	if err != nil {
		return nil, err
	}
	socket := os.NewFile(uintptr(fd), "icmp")
	defer socket.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
		return nil, err
	}
	socket.SetDeadline(time.Now().Add(pingWait))
	if _, err := socket.Write(request); err != nil {
		return nil, err
	}
	answer := make([]byte, len(request)+1)
	for {
		size, err := socket.Read(answer)
		if err != nil {
			return nil, err
		}
		if size == len(request) && header.ICMPv4(answer).Type() == header.ICMPv4EchoReply {
			// The kernel has put an identifier of its own.
			copy(answer[4:6], request[4:6])
			return answer[:size], nil
		}
	}
}

// prohibition is "communication administratively prohibited" (RFC 1812, 5.2.7.1) about
// the packet whose first bytes are quoted.
func prohibition(quoted []byte) []byte { return unreachability(header.ICMPv4HostProhibited, quoted) }

// portUnreachable is "port unreachable" about a datagram that the guest has sent to to. Nobody
// has kept it: the message quotes its headers, by which the guest's kernel knows the socket.
func portUnreachable(guestPort uint16, to netip.AddrPort) []byte {
	quoted := make([]byte, header.IPv4MinimumSize+header.UDPMinimumSize)
	ip := header.IPv4(quoted)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(quoted)), TTL: 64, Protocol: uint8(header.UDPProtocolNumber),
		SrcAddr: guestAddress(), DstAddr: tcpip.AddrFrom4(to.Addr().As4()),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.UDP(ip.Payload()).Encode(&header.UDPFields{SrcPort: guestPort, DstPort: to.Port(), Length: header.UDPMinimumSize})
	return unreachability(header.ICMPv4PortUnreachable, quoted)
}

func unreachability(code header.ICMPv4Code, quoted []byte) []byte {
	message := make([]byte, header.ICMPv4MinimumSize, header.ICMPv4MinimumSize+len(quoted))
	h := header.ICMPv4(message)
	h.SetType(header.ICMPv4DstUnreachable)
	h.SetCode(code)
	return append(message, quoted...)
}

// sendICMP sends the guest a message in the name of from. It sets the checksum.
func (n *network) sendICMP(from tcpip.Address, message []byte) {
	route, err := n.stack.FindRoute(card, from, guestAddress(), ipv4.ProtocolNumber, false)
	if err != nil {
		return
	}
	defer route.Release()
	h := header.ICMPv4(message)
	h.SetChecksum(0)
	h.SetChecksum(^checksum.Checksum(message, 0))
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()), Payload: buffer.MakeWithData(message),
	})
	defer p.DecRef()
	route.WritePacket(stack.NetworkHeaderParams{Protocol: header.ICMPv4ProtocolNumber, TTL: 64}, p)
}

package flood

import (
	"encoding/binary"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// Where the headers begin in a frame without IP options.
const (
	ipAt  = header.EthernetMinimumSize
	tcpAt = ipAt + header.IPv4MinimumSize
	udpAt = tcpAt
)

// ethernetFrame is a frame from the guest to the gateway.
func ethernetFrame(kind tcpip.NetworkProtocolNumber, payload []byte) []byte {
	frame := make([]byte, header.EthernetMinimumSize, header.EthernetMinimumSize+len(payload))
	header.Ethernet(frame).Encode(&header.EthernetFields{
		SrcAddr: tcpip.LinkAddress(fakeguest.MAC()), DstAddr: tcpip.LinkAddress(netwire.GatewayMAC()), Type: kind,
	})
	return append(frame, payload...)
}

// ipFields is what differs between packets.
type ipFields struct {
	protocol tcpip.TransportProtocolNumber
	to       netip.Addr
	id       uint16
	offset   uint16 // of a fragment, in bytes
	more     bool   // fragments come
}

func ipFrame(f ipFields, payload []byte) []byte {
	packet := make([]byte, header.IPv4MinimumSize, header.IPv4MinimumSize+len(payload))
	var flags uint8
	if f.more {
		flags = header.IPv4FlagMoreFragments
	}
	h := header.IPv4(packet)
	h.Encode(&header.IPv4Fields{
		TotalLength: uint16(min(header.IPv4MinimumSize+len(payload), 0xffff)), TTL: 64, Protocol: uint8(f.protocol), ID: f.id,
		Flags: flags, FragmentOffset: f.offset, SrcAddr: fakeguest.Address(), DstAddr: tcpip.AddrFrom4(f.to.As4()),
	})
	h.SetChecksum(^h.CalculateChecksum())
	return ethernetFrame(header.IPv4ProtocolNumber, append(packet, payload...))
}

// tcpFrame has no checksum: the link is a socket of this host, nobody looks.
func tcpFrame(to netip.AddrPort, f header.TCPFields, options, payload []byte) []byte {
	for len(options)%4 != 0 {
		options = append(options, header.TCPOptionNOP)
	}
	segment := make([]byte, header.TCPMinimumSize, header.TCPMinimumSize+len(options)+len(payload))
	f.DstPort, f.DataOffset = to.Port(), uint8(header.TCPMinimumSize+len(options))
	header.TCP(segment).Encode(&f)
	segment = append(append(segment, options...), payload...)
	return ipFrame(ipFields{protocol: header.TCPProtocolNumber, to: to.Addr()}, segment)
}

func udpFrame(from uint16, to netip.AddrPort, payload []byte) []byte {
	return ipFrame(ipFields{protocol: header.UDPProtocolNumber, to: to.Addr()}, udpDatagram(from, to.Port(), payload))
}

func udpDatagram(from, to uint16, payload []byte) []byte {
	datagram := make([]byte, header.UDPMinimumSize, header.UDPMinimumSize+len(payload))
	header.UDP(datagram).Encode(&header.UDPFields{SrcPort: from, DstPort: to, Length: uint16(header.UDPMinimumSize + len(payload))})
	return append(datagram, payload...)
}

func pingFrame(to netip.Addr, ident, number uint16) []byte {
	h := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize+56))
	h.SetType(header.ICMPv4Echo)
	h.SetIdent(ident)
	h.SetSequence(number)
	h.SetChecksum(header.ICMPv4Checksum(h, 0))
	return ipFrame(ipFields{protocol: header.ICMPv4ProtocolNumber, to: to}, h)
}

// fromGateway is the source port of a datagram of the gateway's to port 80.
func fromGateway(frame []byte) (port uint16, ok bool) {
	if len(frame) < udpAt+header.UDPMinimumSize || header.Ethernet(frame).Type() != header.IPv4ProtocolNumber ||
		header.IPv4(frame[ipAt:]).Protocol() != uint8(header.UDPProtocolNumber) {
		return 0, false
	}
	h := header.UDP(frame[udpAt:])
	return h.SourcePort(), h.DestinationPort() == 80
}

func arpFrame(target netip.Addr) []byte {
	packet := make([]byte, header.ARPSize)
	h := header.ARP(packet)
	h.SetIPv4OverEthernet()
	h.SetOp(header.ARPRequest)
	copy(h.HardwareAddressSender(), fakeguest.MAC())
	copy(h.ProtocolAddressSender(), netwire.Guest().Addr().AsSlice())
	copy(h.ProtocolAddressTarget(), target.AsSlice())
	return ethernetFrame(header.ARPProtocolNumber, packet)
}

// synOptions are those of a guest with a window scale, so that one window is large.
func synOptions(mss uint16) []byte {
	options := []byte{header.TCPOptionMSS, 4, 0, 0, header.TCPOptionWS, 3, 14, header.TCPOptionNOP}
	binary.BigEndian.PutUint16(options[2:], mss)
	return options
}

package boot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// netlinkPatience bounds the wait for the kernel's answer, which is there at once.
const netlinkPatience = 5 * time.Second

// netlink is a socket of NETLINK_ROUTE, see rtnetlink(7).
type netlink struct {
	fd  int
	seq uint32
}

// netlinkMessage is a request without its header.
type netlinkMessage struct {
	kind, flags uint16
	body        []byte
}

func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cannot speak to the kernel's network: %w", err)
	}
	patience := unix.NsecToTimeval(int64(netlinkPatience))
	err = errors.Join(unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}))
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot speak to the kernel's network: %w", err)
	}
	return &netlink{fd: fd}, nil
}

// do sends the request and waits for the kernel's word on it.
func (nl *netlink) do(m netlinkMessage) error {
	nl.seq++
	msg := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(m.body)))
	msg = binary.NativeEndian.AppendUint16(msg, m.kind)
	msg = binary.NativeEndian.AppendUint16(msg, m.flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	msg = binary.NativeEndian.AppendUint32(msg, nl.seq)
	msg = binary.NativeEndian.AppendUint32(msg, 0)
	msg = append(msg, m.body...)
	if err := unix.Sendto(nl.fd, msg, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 8192)
	for {
		n, _, err := unix.Recvfrom(nl.fd, answer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		return netlinkAnswer(answer[:n], nl.seq)
	}
}

// netlinkAnswer reads the acknowledgement of request seq, see netlink(7).
func netlinkAnswer(b []byte, seq uint32) error {
	if len(b) < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(b[4:]) != unix.NLMSG_ERROR ||
		binary.NativeEndian.Uint32(b[8:]) != seq {
		return errors.New("the kernel answers something else")
	}
	if code := int32(binary.NativeEndian.Uint32(b[unix.NLMSG_HDRLEN:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}

// attribute appends an attribute, whose length is a multiple of 4 here.
func attribute(b []byte, kind uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return append(b, value...)
}

func native32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// linkUp sets the interface up; an mtu of 0 is left as it is. The body is a struct
// ifinfomsg.
func linkUp(index, mtu int) netlinkMessage {
	body := []byte{unix.AF_UNSPEC, 0, 0, 0}
	body = append(body, native32(uint32(index))...)
	body = append(body, native32(unix.IFF_UP)...) // the flags
	body = append(body, native32(unix.IFF_UP)...) // which of them to change
	if mtu > 0 {
		body = attribute(body, unix.IFLA_MTU, native32(uint32(mtu)))
	}
	return netlinkMessage{unix.RTM_NEWLINK, 0, body}
}

// addAddress gives the interface an address. The body is a struct ifaddrmsg.
func addAddress(index int, p netip.Prefix) netlinkMessage {
	body := []byte{family(p.Addr()), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	body = append(body, native32(uint32(index))...)
	body = attribute(body, unix.IFA_LOCAL, p.Addr().AsSlice())
	body = attribute(body, unix.IFA_ADDRESS, p.Addr().AsSlice())
	return netlinkMessage{unix.RTM_NEWADDR, unix.NLM_F_CREATE | unix.NLM_F_REPLACE, body}
}

// addNeighbour says that the one address is behind the interface, whatever the prefix of
// the interface's own.
func addNeighbour(index int, a netip.Addr) netlinkMessage {
	return addRoute(index, netip.PrefixFrom(a, a.BitLen()), unix.RT_SCOPE_LINK, unix.RTA_DST, a)
}

// addDefault makes gateway the default route.
func addDefault(index int, gateway netip.Addr) netlinkMessage {
	return addRoute(index, netip.PrefixFrom(gateway, 0), unix.RT_SCOPE_UNIVERSE, unix.RTA_GATEWAY, gateway)
}

// addRoute adds a route to the prefix to, with one attribute. The body is a struct rtmsg.
func addRoute(index int, to netip.Prefix, scope byte, kind uint16, value netip.Addr) netlinkMessage {
	body := []byte{family(to.Addr()), byte(to.Bits()), 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_BOOT, scope, unix.RTN_UNICAST}
	body = append(body, native32(0)...) // flags
	body = attribute(body, kind, value.AsSlice())
	body = attribute(body, unix.RTA_OIF, native32(uint32(index)))
	return netlinkMessage{unix.RTM_NEWROUTE, unix.NLM_F_CREATE | unix.NLM_F_REPLACE, body}
}

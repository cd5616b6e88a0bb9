package netwire

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// Publication is a port of the host that leads to one of the guest.
type Publication struct {
	Protocol string         // "tcp" or "udp"
	Host     netip.AddrPort // where the host listens
	Guest    uint16
}

// String is the full form, which ParsePublication takes: "127.0.0.1:8080:80/tcp".
func (p Publication) String() string {
	return fmt.Sprintf("%s:%d/%s", p.Host, p.Guest, p.Protocol)
}

// ParsePublication reads [ADDRESS:]PORT:GUEST_PORT[/PROTOCOL] or PORT[/PROTOCOL]. The
// address is 127.0.0.1 when it is left out, IPv6 addresses stand in brackets, the protocol
// is tcp or udp, and PORT alone is both ports.
func ParsePublication(s string) (Publication, error) {
	p, err := parsePublication(s)
	if err != nil {
		return Publication{}, fmt.Errorf("cannot publish %q: %w", s, err)
	}
	return p, nil
}

func parsePublication(s string) (p Publication, err error) {
	rest, protocol, slash := strings.Cut(s, "/")
	if !slash {
		protocol = "tcp"
	}
	if protocol != "tcp" && protocol != "udp" {
		return p, fmt.Errorf("the protocol is tcp or udp, not %q", protocol)
	}
	p.Protocol = protocol
	address := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if cut := strings.LastIndexByte(rest, ':'); cut >= 0 {
		host, guest := rest[:cut], rest[cut+1:]
		if p.Guest, err = parsePort(guest); err != nil {
			return p, err
		}
		if cut := strings.LastIndexByte(host, ':'); cut >= 0 {
			text := host[:cut]
			if strings.HasPrefix(text, "[") && strings.HasSuffix(text, "]") {
				text = text[1 : len(text)-1]
			} else if strings.Contains(text, ":") {
				return p, errors.New("an IPv6 address stands in brackets: [::1]:8080:80")
			}
			if address, err = netip.ParseAddr(text); err != nil || address.Zone() != "" {
				return p, fmt.Errorf("%q is no address of the host", text)
			}
			address = address.Unmap() // the host has one port for both spellings
			host = host[cut+1:]
		}
		port, err := parsePort(host)
		p.Host = netip.AddrPortFrom(address, port)
		return p, err
	}
	if p.Guest, err = parsePort(rest); err != nil {
		return p, err
	}
	p.Host = netip.AddrPortFrom(address, p.Guest)
	return p, nil
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || strings.HasPrefix(s, "+") {
		return 0, fmt.Errorf("%q is no port: it is 1 to 65535", s)
	}
	return uint16(n), nil
}

package netwire

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"syscall"
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
	rest, protocol, err := cutProtocol(s)
	if err != nil {
		return p, err
	}
	p.Protocol = cmp.Or(protocol, "tcp")
	host, guest := "", rest
	cut := strings.LastIndexByte(rest, ':')
	if cut >= 0 {
		host, guest = rest[:cut], rest[cut+1:]
	}
	if p.Guest, err = parsePort(guest); err != nil {
		return p, err
	}
	side := HostSide{Port: p.Guest}
	if cut >= 0 {
		if side, err = parseHost(host); err != nil {
			return p, err
		}
	}
	if !side.Addr.IsValid() {
		side.Addr = loopback()
	}
	p.Host = netip.AddrPortFrom(side.Addr, side.Port)
	return p, nil
}

// HostSide is the host's side of publications; what is left out fits all.
type HostSide struct {
	Addr     netip.Addr // not valid when it is left out
	Port     uint16
	Protocol string // "tcp", "udp", or "" when it is left out
}

// ParseHostSide reads [ADDRESS:]PORT[/PROTOCOL].
func ParseHostSide(s string) (HostSide, error) {
	host, protocol, err := cutProtocol(s)
	var side HostSide
	if err == nil {
		side, err = parseHost(host)
	}
	if err != nil {
		return HostSide{}, fmt.Errorf("cannot read %q: %w", s, err)
	}
	side.Protocol = protocol
	return side, nil
}

// Fits tells whether p has such a side.
func (s HostSide) Fits(p Publication) bool {
	return p.Host.Port() == s.Port && (!s.Addr.IsValid() || p.Host.Addr() == s.Addr) &&
		(s.Protocol == "" || p.Protocol == s.Protocol)
}

// cutProtocol returns "" for a protocol that is left out.
func cutProtocol(s string) (rest, protocol string, err error) {
	rest, protocol, slash := strings.Cut(s, "/")
	if slash && protocol != "tcp" && protocol != "udp" {
		return rest, protocol, fmt.Errorf("the protocol is tcp or udp, not %q", protocol)
	}
	return rest, protocol, nil
}

// parseHost reads [ADDRESS:]PORT.
func parseHost(s string) (side HostSide, err error) {
	if cut := strings.LastIndexByte(s, ':'); cut >= 0 {
		text := s[:cut]
		if strings.HasPrefix(text, "[") && strings.HasSuffix(text, "]") {
			text = text[1 : len(text)-1]
		} else if strings.Contains(text, ":") {
			return side, errors.New("an IPv6 address stands in brackets: [::1]:8080:80")
		}
		addr, err := netip.ParseAddr(text)
		if err != nil || addr.Zone() != "" {
			return side, fmt.Errorf("%q is no address of the host", text)
		}
		side.Addr = addr.Unmap() // the host has one port for both spellings
		s = s[cut+1:]
	}
	side.Port, err = parsePort(s)
	return side, err
}

func parsePort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || strings.HasPrefix(s, "+") {
		return 0, fmt.Errorf("%q is no port: it is 1 to 65535", s)
	}
	return uint16(n), nil
}

// loopback is the address that is meant when there is none.
func loopback() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// Short is what ParsePublication takes for p, without what it adds by itself: "8080:80".
func (p Publication) Short() string {
	return fmt.Sprintf("%s:%d%s", p.shortHost(), p.Guest, p.suffix())
}

// ShortHostSide is what ParseHostSide takes for p's side of the host: "8080".
func (p Publication) ShortHostSide() string { return p.shortHost() + p.suffix() }

func (p Publication) shortHost() string {
	if p.Host.Addr() == loopback() {
		return strconv.Itoa(int(p.Host.Port()))
	}
	return p.Host.String()
}

// HostPort is p's side of the host in words: "127.0.0.1:8080", "[::1]:53/udp".
func (p Publication) HostPort() string { return p.Host.String() + p.suffix() }

func (p Publication) suffix() string {
	if p.Protocol == "tcp" {
		return ""
	}
	return "/" + p.Protocol
}

// Overlaps tells publications of which the host can open one at a time only.
func (p Publication) Overlaps(o Publication) bool {
	a, b := p.Host.Addr(), o.Host.Addr()
	return p.Protocol == o.Protocol && p.Host.Port() == o.Host.Port() && a.Is4() == b.Is4() &&
		(a == b || a.IsUnspecified() || b.IsUnspecified())
}

// Clash says why p cannot be beside other, nil when it can, or is the same.
func (p Publication) Clash(other Publication) error {
	if p == other || !p.Overlaps(other) {
		return nil
	}
	return fmt.Errorf("the host's port %s/%s cannot lead to %d: it is in use by %s", p.Host, p.Protocol, p.Guest, other)
}

// Refused says in words for a user why the host does not give p's port; err is what it said
// to who wanted to listen.
func (p Publication) Refused(err error) string {
	port := "port " + p.HostPort()
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return port + " is in use"
	case errors.Is(err, syscall.EACCES) && p.Host.Port() < 1024:
		return port + ": permission denied: ports below 1024 need rights"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Sprintf("%s is no address of this host", p.Host.Addr())
	}
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		err = errno
	}
	return fmt.Sprintf("%s: %v", port, err)
}

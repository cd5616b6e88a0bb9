package netpolicy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
)

// SyntaxError says what is wrong with the text of a rule, and where.
type SyntaxError struct {
	Text    string
	Column  int // 1 is the first byte of Text
	Message string
}

func (e *SyntaxError) Error() string {
	return fmt.Sprintf("rule %q: column %d: %s", e.Text, e.Column, e.Message)
}

// ParseRule reads
//
//	[tcp|udp|icmp ] CIDR|ADDRESS|NAME|*.NAME [:PORT|:FROM-TO]
//
// with one space after the protocol and none elsewhere. IPv6 stands in brackets, which may
// be left out where there is no port. Errors are *SyntaxError.
func ParseRule(action Action, text string) (Rule, error) {
	r, fault := parseRule(action, text)
	if fault != nil {
		fault.Text = text
		return Rule{}, fault
	}
	return r, nil
}

// faultf makes an error at an offset of what is parsed.
func faultf(at int, format string, args ...any) *SyntaxError {
	return &SyntaxError{Column: at + 1, Message: fmt.Sprintf(format, args...)}
}

// within moves an error of a part to where the part begins.
func within(at int, fault *SyntaxError) *SyntaxError {
	if fault != nil {
		fault.Column += at
	}
	return fault
}

func parseRule(action Action, text string) (r Rule, fault *SyntaxError) {
	r.Action = action
	rest, at := text, 0
	if i := strings.IndexByte(text, ' '); i == 0 {
		return r, faultf(0, "a protocol, a name or an address is expected, not a space")
	} else if i > 0 {
		r.Protocol = lower(text[:i])
		if !isProtocol(r.Protocol) {
			return r, faultf(0, "the word before a space is a protocol: tcp, udp or icmp")
		}
		rest, at = text[i+1:], i+1
	}
	if i := strings.IndexAny(rest, " \t\r\n\v\f"); i >= 0 {
		return r, faultf(at+i, "only one space is expected, after the protocol")
	}
	if rest == "" {
		return r, faultf(at, "a name or an address is expected")
	}
	if strings.Contains(rest, "://") {
		return r, faultf(at, "expected is a name or an address, not a URL")
	}
	parts, fault := split(rest)
	if fault != nil {
		return r, within(at, fault)
	}
	if parts.six {
		fault = r.parsePrefix(parts.target, 128)
	} else {
		fault = r.parseTarget(parts.target)
	}
	if fault != nil {
		return r, within(at+parts.at, fault)
	}
	if parts.port > 0 {
		if r.Protocol == "icmp" {
			return r, faultf(at+parts.port-1, "icmp has no ports")
		}
		fault = within(at+parts.port, r.parsePorts(rest[parts.port:]))
	}
	return r, fault
}

func isProtocol(s string) bool { return s == "tcp" || s == "udp" || s == "icmp" }

// parts are the offsets of what colons and brackets divide.
type parts struct {
	target string
	at     int  // of target
	six    bool // target is to be IPv6
	port   int  // 0 if there is none
}

func split(s string) (p parts, fault *SyntaxError) {
	if s[0] == '[' {
		end := strings.IndexByte(s, ']')
		switch {
		case end < 0:
			return p, faultf(len(s), "a ] is expected")
		case !strings.Contains(s[:end], ":"):
			return p, faultf(0, "only an IPv6 address stands in brackets")
		case end == len(s)-1:
			return parts{s[1:end], 1, true, 0}, nil
		case s[end+1] != ':':
			return p, faultf(end+1, "a : with a port is expected, or the end")
		}
		return parts{s[1:end], 1, true, end + 2}, nil
	}
	first, last := strings.IndexByte(s, ':'), strings.LastIndexByte(s, ':')
	switch {
	case first < 0:
		return parts{target: s}, nil
	case first == last:
		return parts{target: s[:first], port: first + 1}, nil
	case strings.Trim(s[:first], "0123456789abcdefABCDEF") != "":
		return p, faultf(last, "one port is expected, as the end of the rule")
	}
	// fd00::1:443 may be an address, or one with a port. Nobody should have to guess.
	_, notPort := parsePort(s[last+1:])
	_, notPrefix := netip.ParsePrefix(s[:last])
	_, notAddress := netip.ParseAddr(s[:last])
	if notPort == nil && (notPrefix == nil || notAddress == nil) {
		return p, faultf(0, "IPv6 with a port stands in brackets: [%s]%s; [%s] is without one", s[:last], s[last:], s)
	}
	return parts{target: s, six: true}, nil
}

// parseTarget reads what is not to be IPv6.
func (r *Rule) parseTarget(s string) *SyntaxError {
	host, _, slash := strings.Cut(s, "/")
	switch {
	case isNumeric(host):
		return r.parsePrefix(s, 32)
	case slash:
		return faultf(len(host), "expected is a name or an address, not a URL")
	case s == "":
		return faultf(0, "a name or an address is expected")
	case s == "*":
		return faultf(0, "a * alone is no name: it is *.example.org, or 0.0.0.0/0 for every public address")
	}
	name := s
	if strings.HasPrefix(s, "*.") {
		r.Wildcard, name = true, s[2:]
	}
	if fault := nameFault(name); fault != nil {
		return within(len(s)-len(name), fault)
	}
	r.Name = cleanName(name)
	return nil
}

// isNumeric tells what the C library or a browser may take for an IPv4 address, in one of
// its odd forms too: its last label is a number.
func isNumeric(host string) bool {
	host = strings.TrimSuffix(host, ".")
	label := lower(host[strings.LastIndexByte(host, '.')+1:])
	if hex, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return label != "" && strings.Trim(label, "0123456789") == ""
}

// parsePrefix reads an address or a CIDR of so many bits.
func (r *Rule) parsePrefix(s string, most int) *SyntaxError {
	text, length, slash := strings.Cut(s, "/")
	a, err := netip.ParseAddr(text)
	switch {
	case most == 32 && err != nil:
		return faultf(0, "an IPv4 address is four decimal numbers from 0 to 255, without leading zeros; odd forms are refused")
	case err != nil || most == 128 && a.Is4():
		return faultf(0, "%q is no IPv6 address", text)
	case a.Zone() != "":
		return faultf(strings.IndexByte(text, '%'), "an address without a zone is expected")
	case a.Is4In6():
		return faultf(0, "an IPv4 address is written as such: %s", a.Unmap())
	}
	r.Prefix = single(a)
	if slash {
		n, err := strconv.Atoi(length)
		if err != nil || n > most || strconv.Itoa(n) != length || n < 0 {
			return faultf(len(text)+1, "a prefix length from 0 to %d is expected", most)
		}
		if r.Prefix = netip.PrefixFrom(a, n).Masked(); r.Prefix.Addr() != a {
			return faultf(0, "%s has bits set beyond its first %d: the network is %s, the one address %s", a, n, r.Prefix, a)
		}
	}
	z := zoneOfAddress(r.Prefix.Addr())
	switch {
	case r.Prefix.Bits() < z.bits || !z.class.closed():
	case z.class == loopback:
		return faultf(0, "the host's loopback is named %s", HostName)
	case z.class == nowhere:
		return faultf(0, "nothing is reached at %s; the host's loopback is named %s", r.Prefix.Addr(), HostName)
	case r.Action == Allow:
		return faultf(0, "no rule can allow it: %s is never forwarded", z.class)
	}
	return nil
}

// nameFault says why a name cannot stand in a rule, without *. and with or without the
// last dot.
func nameFault(s string) *SyntaxError {
	name := cleanName(s)
	switch {
	case name == "localhost" || strings.HasSuffix(name, ".localhost"):
		return faultf(0, "the host's loopback is named %s", HostName)
	case isProtocol(name):
		return faultf(0, "a name or an address is expected; a protocol stands before it, with a space")
	case isNumeric(name):
		return faultf(0, "a name does not end in a number")
	}
	at := 0
	for label := range strings.SplitSeq(name, ".") {
		if fault := labelFault(label); fault != nil {
			return within(at, fault)
		}
		at += len(label) + 1
	}
	if len(name) > 253 {
		return faultf(253, "a name has at most 253 characters")
	}
	return nil
}

func labelFault(label string) *SyntaxError {
	if label == "" {
		return faultf(0, "a label of a name is expected")
	}
	for i := range len(label) {
		switch c := label[i]; {
		case c >= 0x80:
			return faultf(i, "a name is written in ASCII: others in punycode, which begins with xn--")
		case c == '*':
			return faultf(i, "a * stands only as the first label, as in *.example.org")
		case c == '-' && (i == 0 || i == len(label)-1):
			return faultf(i, "a label does not begin or end with -")
		case c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z'):
			return faultf(i, "a name has letters, digits, - and _, not %q", c)
		case i == 63:
			return faultf(i, "a label has at most 63 characters")
		}
	}
	return nil
}

// parsePorts reads PORT or FROM-TO.
func (r *Rule) parsePorts(s string) (fault *SyntaxError) {
	from, to, ranged := strings.Cut(s, "-")
	if r.From, fault = parsePort(from); fault != nil {
		return fault
	}
	if r.To = r.From; !ranged {
		return nil
	}
	if r.To, fault = parsePort(to); fault != nil {
		return within(len(from)+1, fault)
	}
	if r.To < r.From {
		return faultf(len(from)+1, "a range of ports goes up: %d-%d", r.To, r.From)
	}
	return nil
}

func parsePort(s string) (uint16, *SyntaxError) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || s[0] == '0' {
		return 0, faultf(0, "a port from 1 to 65535 is expected")
	}
	return uint16(n), nil
}

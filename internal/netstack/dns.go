package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
)

// The bounds of what the guest may ask. A question fits into dnsQuery several times over.
const (
	dnsQuery     = 4096
	dnsLargest   = 4096 // bytes of an answer by UDP
	dnsIdle      = 10 * time.Second
	dnsPipelined = 4  // questions that are open on one connection
	dnsLocalTTL  = 60 // seconds, of the answers that are ours
)

// The names below which the answers are ours, beside netwire.HostName.
const (
	dnsOurs      = "banger.internal"
	dnsLocalhost = "localhost"
	// A resolver tells here how else it can be reached (RFC 9462): ours cannot, and the
	// host's is none of the guest's business.
	dnsDiscovery = "resolver.arpa"
)

// resolverOptions is what a resolver works with.
type resolverOptions struct {
	policy     func() netpolicy.Policy // the one in force
	own        func(netip.Addr) bool   // tells the addresses of the host's interfaces
	refuse     func(netwire.Entry)     // counts and logs
	names      *names                  // learns the answers
	resolvConf string                  // path of the host's resolv.conf
	hostAddr   netip.Addr              // of netwire.HostName
}

// resolver answers the guest's questions: from the host's resolvers as far as the policy
// goes, and by itself for what is inside. It knows neither sockets of the guest nor
// their limits, except those of one connection.
type resolver struct {
	resolverOptions
	upstream *upstream
}

func newResolver(o resolverOptions) *resolver {
	return &resolver{resolverOptions: o, upstream: newUpstream(o.resolvConf)}
}

// reply is an answer that is being made.
type reply struct {
	dns.Msg
	edns    bool
	dnssec  bool
	size    int // that the guest takes
	problem *dns.EDNS0_EDE
}

// exchange answers one message of the guest. It is nil for what is no question at all.
func (r *resolver) exchange(ctx context.Context, packet []byte, tcp bool) []byte {
	if len(packet) < dnsHeader || packet[2]&0x80 != 0 {
		return nil // an answer to an answer could go on for ever
	}
	if opcode := packet[2] >> 3 & 15; opcode != dns.OpcodeQuery {
		return headerOnly(packet, dns.RcodeNotImplemented)
	}
	count := func(section int) int { return int(binary.BigEndian.Uint16(packet[4+2*section:])) }
	// The counts bound what Unpack makes: an OPT and a signature are all that may follow.
	if len(packet) > dnsQuery || count(0) != 1 || count(1) != 0 || count(2) != 0 || count(3) > 2 {
		return headerOnly(packet, dns.RcodeFormatError)
	}
	var m dns.Msg
	if err := m.Unpack(packet); err != nil || len(m.Question) != 1 {
		return headerOnly(packet, dns.RcodeFormatError)
	}
	a := &reply{size: dns.MinMsgSize}
	a.Id, a.Response, a.Question = m.Id, true, m.Question
	a.RecursionDesired, a.RecursionAvailable, a.CheckingDisabled = m.RecursionDesired, true, m.CheckingDisabled
	q := query{question: m.Question[0], unchecked: m.CheckingDisabled, authentic: m.AuthenticatedData}
	bad := false
	for _, rr := range m.Extra {
		if opt, ok := rr.(*dns.OPT); ok {
			bad = bad || a.edns || opt.Hdr.Name != "."
			a.edns, a.dnssec, a.size = true, opt.Do(), min(max(int(opt.UDPSize()), dns.MinMsgSize), dnsLargest)
			if opt.Version() != 0 {
				a.Rcode = dns.RcodeBadVers
			}
		}
	}
	if tcp {
		a.size = dns.MaxMsgSize
	}
	q.dnssec = a.dnssec
	switch {
	case bad:
		return headerOnly(packet, dns.RcodeFormatError)
	case a.Rcode == 0:
		r.answer(ctx, q, a)
	}
	return a.pack(packet)
}

// answer fills in a.
func (r *resolver) answer(ctx context.Context, q query, a *reply) {
	kind, name := q.question.Qtype, policyName(q.question.Name)
	switch {
	case q.question.Qclass != dns.ClassINET:
		a.Rcode = dns.RcodeRefused
		return
	case kind == dns.TypeANY:
		a.Answer = []dns.RR{&dns.HINFO{Hdr: a.header(dns.TypeHINFO), Cpu: "RFC8482"}}
		return
	case kind == 0 || kind == dns.TypeOPT || kind >= 128 && kind <= 255:
		a.Rcode = dns.RcodeRefused // transfers, and what is no kind of record
		return
	case r.local(name, kind, a):
		return
	}
	v := r.policy().Resolve(name)
	if dotInLabel(name) {
		v = netpolicy.Verdict{Reason: "a dot inside a label"}
	}
	if !v.Allowed {
		r.refuse(netwire.Entry{Protocol: "dns", Target: name, Name: name, Reason: v.Reason, Rule: v.Rule})
		a.Rcode = dns.RcodeRefused
		a.explain(dns.ExtendedErrorCodeBlocked, v.Reason)
		return
	}
	if reason := r.reverse(name); reason != "" {
		a.Rcode = dns.RcodeNameError
		a.explain(dns.ExtendedErrorCodeFiltered, reason)
		return
	}
	if kind == dns.TypeAAAA {
		return // the guest has no IPv6
	}
	r.forward(ctx, q, a)
}

// local answers for the names that are inside, and is false for the others.
func (r *resolver) local(name string, kind uint16, a *reply) bool {
	address := func(addr netip.Addr) {
		if kind == dns.TypeA {
			a.Answer = []dns.RR{&dns.A{Hdr: a.header(dns.TypeA), A: addr.AsSlice()}}
		}
	}
	gateway, _ := dns.ReverseAddr(r.hostAddr.String())
	switch {
	case name == netwire.HostName:
		address(r.hostAddr)
	case within(name, dnsLocalhost):
		address(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	case dns.Fqdn(name) == gateway:
		if kind == dns.TypePTR {
			a.Answer = []dns.RR{&dns.PTR{Hdr: a.header(dns.TypePTR), Ptr: dns.Fqdn(netwire.HostName)}}
		}
	case name == dnsOurs, within(name, dnsDiscovery):
	case within(name, dnsOurs):
		a.Rcode = dns.RcodeNameError
	default:
		return false
	}
	return true
}

func within(name, zone string) bool {
	return name == zone || strings.HasSuffix(name, "."+zone)
}

// reverse says why the guest may not ask about the address or the network that name
// stands for in the reverse zones, "" if it may or name stands for none. Of a network the
// first and the last address decide, so that a zone with public addresses stays open.
func (r *resolver) reverse(name string) string {
	prefix, ok := reversePrefix(name)
	if !ok || prefix.Bits() == 0 {
		return ""
	}
	reason := ""
	for _, addr := range []netip.Addr{prefix.Addr().Unmap(), lastOf(prefix).Unmap()} {
		inner, embeds := netpolicy.Embedded(addr)
		v := r.policy().Answer(name, addr, r.own(addr) || embeds && r.own(inner))
		if v.Allowed {
			return ""
		}
		reason = v.Reason
	}
	return reason
}

// reversePrefix returns the network of a name below in-addr.arpa or ip6.arpa. Labels that
// are no part of an address, and what is left of them, are ignored: the servers of that
// network answer for them too.
func reversePrefix(name string) (netip.Prefix, bool) {
	var bytes [16]byte
	labels, step, base, most := strings.Split(name, "."), 8, 10, 32
	switch {
	case within(name, "in-addr.arpa"):
	case within(name, "ip6.arpa"):
		step, base, most = 4, 16, 128
	default:
		return netip.Prefix{}, false
	}
	bits := 0
	for i := len(labels) - 3; i >= 0 && bits < most; i-- {
		n, err := strconv.ParseUint(labels[i], base, step)
		if err != nil || strconv.FormatUint(n, base) != labels[i] {
			break
		}
		bytes[bits/8] |= byte(n << (8 - step - bits%8))
		bits += step
	}
	addr := netip.AddrFrom16(bytes)
	if most == 32 {
		addr = netip.AddrFrom4([4]byte(bytes[:4]))
	}
	return netip.PrefixFrom(addr, bits), true
}

func lastOf(p netip.Prefix) netip.Addr {
	bytes := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(bytes); i++ {
		bytes[i/8] |= 0x80 >> (i % 8)
	}
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}

// forward answers from the host's resolver.
func (r *resolver) forward(ctx context.Context, q query, a *reply) {
	m, err := r.upstream.ask(ctx, q)
	if err != nil {
		a.Rcode = dns.RcodeServerFailure
		a.explain(dns.ExtendedErrorCodeNoReachableAuthority, err.Error())
		var away *unreachable
		if errors.As(err, &away) && ctx.Err() == nil {
			target := r.upstream.path
			if len(away.servers) > 0 {
				target = away.servers[0].String()
			}
			r.refuse(netwire.Entry{Protocol: "dns", Target: target, Reason: err.Error()})
		}
		return
	}
	if a.Rcode = m.Rcode; a.Rcode > 15 {
		a.Rcode = dns.RcodeServerFailure
	}
	c := r.clean(m)
	a.Answer, a.Ns, a.Extra = c.answer, c.ns, c.extra
	a.AuthenticatedData = m.AuthenticatedData && !c.changed
	if c.emptied != "" {
		a.explain(dns.ExtendedErrorCodeFiltered, c.emptied)
	}
}

func (a *reply) header(kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: a.Question[0].Name, Rrtype: kind, Class: dns.ClassINET, Ttl: dnsLocalTTL}
}

// explain adds what a user's tools show of an error (RFC 8914).
func (a *reply) explain(code uint16, text string) {
	a.problem = &dns.EDNS0_EDE{InfoCode: code, ExtraText: text}
}

// pack writes a, cut to what the guest takes.
func (a *reply) pack(packet []byte) []byte {
	if a.edns {
		a.SetEdns0(dnsLargest, a.dnssec)
		if a.problem != nil {
			opt := a.IsEdns0()
			opt.Option = append(opt.Option, a.problem)
		}
	}
	a.Truncate(a.size)
	a.Compress = true
	out, err := a.Pack()
	if err != nil || len(out) > a.size {
		return headerOnly(packet, dns.RcodeServerFailure)
	}
	return out
}

// headerOnly answers what cannot be understood, or its answer not be written.
func headerOnly(packet []byte, rcode byte) []byte {
	out := make([]byte, dnsHeader)
	copy(out, packet[:4])
	out[2] = out[2]&0x79 | 0x80         // of the bits stay the opcode and RD; it is an answer,
	out[3] = out[3]&0x10 | 0x80 | rcode // CD stays, recursion is to be had
	return out
}

// serveTCP answers the messages of one connection until the guest has no more, is silent
// for dnsIdle, or ctx ends. It closes conn.
func (r *resolver) serveTCP(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer conn.Close()
	defer cancel()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	var open sync.WaitGroup
	defer open.Wait() // who only ended its own side still gets its answers
	slots := make(chan struct{}, dnsPipelined)
	var writing sync.Mutex
	for {
		conn.SetReadDeadline(time.Now().Add(dnsIdle))
		packet, err := readFrame(conn, dnsQuery)
		if err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		open.Go(func() {
			defer func() { <-slots }()
			answer := r.exchange(ctx, packet, true)
			if answer == nil {
				cancel()
				return
			}
			writing.Lock()
			defer writing.Unlock()
			conn.SetWriteDeadline(time.Now().Add(dnsIdle))
			if _, err := conn.Write(frame(answer)); err != nil {
				cancel()
			}
		})
	}
}

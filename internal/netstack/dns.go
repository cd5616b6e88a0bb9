package netstack

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

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

// The names below which the answers are ours, beside netpolicy.HostName.
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
	hostAddr   netip.Addr              // of netpolicy.HostName
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
	dnsMessage
	edns   bool
	dnssec bool
	size   int // that the guest takes
	// problem says what tools show of an error, its code first (RFC 8914).
	problem []byte
}

// The codes of a problem.
const (
	problemBlocked  = 15
	problemFiltered = 17
	problemNoServer = 22
	problemText     = 200 // bytes: the smallest answer has room for it
)

// The fields of OPT, which is a record like others to who does not know it (RFC 6891).
const (
	optDNSSEC  = 1 << 15 // of the TTL, as are the version and the upper bits of the rcode
	optProblem = 15
)

// exchange answers one message of the guest. It is nil for what is no question at all.
func (r *resolver) exchange(ctx context.Context, packet []byte, tcp bool) []byte {
	if len(packet) < dnsHeader || packet[2]&0x80 != 0 {
		return nil // an answer to an answer could go on for ever
	}
	if opcode := packet[2] >> 3 & 15; opcode != 0 {
		return headerOnly(packet, rcodeNotImplemented)
	}
	q, a, ok := readQuery(packet)
	if !ok {
		return headerOnly(packet, rcodeFormatError)
	}
	if tcp {
		a.size = dnsMost
	}
	if a.rcode == 0 {
		r.answer(ctx, q, a)
	}
	return a.finish(packet)
}

// readQuery reads the guest's question, and begins the answer to it. ok is false for one
// that is broken. An OPT and a signature are all that may follow a question.
func readQuery(packet []byte) (q query, a *reply, ok bool) {
	count := func(section int) int { return int(binary.BigEndian.Uint16(packet[4+2*section:])) }
	if len(packet) > dnsQuery || count(0) != 1 || count(1) != 0 || count(2) != 0 || count(3) > 2 {
		return q, nil, false
	}
	question, off, err := parseQuestion(packet)
	if err != nil {
		return q, nil, false
	}
	bits := binary.BigEndian.Uint16(packet[2:])
	a = &reply{size: dnsLeast}
	a.id, a.question = binary.BigEndian.Uint16(packet), question
	a.bits = bitResponse | bitRecursionAvailable | bits&(bitRecursionDesired|bitUnchecked)
	for range count(3) {
		var rr dnsRecord
		if rr, off, err = parseRecord(packet, off); err != nil {
			return q, nil, false
		}
		if rr.kind != typeOPT {
			continue
		}
		if a.edns || rr.name != "\x00" {
			return q, nil, false
		}
		a.edns, a.dnssec, a.size = true, rr.ttl&optDNSSEC != 0, min(max(int(rr.class), dnsLeast), dnsLargest)
		if version := rr.ttl >> 16 & 255; version != 0 {
			a.rcode = rcodeBadVersion
		}
	}
	return query{question: question, dnssec: a.dnssec, unchecked: bits&bitUnchecked != 0, authentic: bits&bitAuthentic != 0}, a, true
}

// answer fills in a.
func (r *resolver) answer(ctx context.Context, q query, a *reply) {
	kind, name := q.question.kind, policyName(q.question.name)
	switch {
	case q.question.class != classINET:
		a.rcode = rcodeRefused
		return
	case kind == typeANY:
		a.own(typeHINFO, []byte("\aRFC8482\x00"))
		return
	case kind == 0 || kind == typeOPT || kind >= 128 && kind <= 255:
		a.rcode = rcodeRefused // transfers, and what is no kind of record
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
		// Not REFUSED: some resolvers, musl's among them, go on waiting after it.
		a.rcode = rcodeNameError
		a.explain(problemBlocked, v.Reason)
		return
	}
	if reason := r.reverse(name); reason != "" {
		a.rcode = rcodeNameError
		a.explain(problemFiltered, reason)
		return
	}
	if kind == typeAAAA {
		return // the guest has no IPv6
	}
	r.forward(ctx, q, a)
}

// local answers for the names that are inside, and is false for the others.
func (r *resolver) local(name string, kind uint16, a *reply) bool {
	address := func(addr netip.Addr) {
		if kind == typeA {
			a.own(typeA, addr.AsSlice())
		}
	}
	four := r.hostAddr.As4()
	gateway := fmt.Sprintf("%d.%d.%d.%d.in-addr.arpa", four[3], four[2], four[1], four[0])
	switch {
	case name == netpolicy.HostName:
		address(r.hostAddr)
	case within(name, dnsLocalhost):
		address(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	case name == gateway:
		if kind == typePTR {
			a.own(typePTR, []byte(newName(netpolicy.HostName)))
		}
	case name == dnsOurs, within(name, dnsDiscovery):
	case within(name, dnsOurs):
		a.rcode = rcodeNameError
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
		a.rcode = rcodeServerFailure
		a.explain(problemNoServer, err.Error())
		var away *unreachable
		if errors.As(err, &away) && ctx.Err() == nil {
			target := r.upstream.path
			if len(away.servers) > 0 {
				target = away.servers[0].String()
			}
			r.refuse(netwire.Entry{Protocol: "dns", Target: target, Reason: err.Error(), Hint: "cat /etc/resolv.conf"})
		}
		return
	}
	if name := policyName(q.question.name); m.rcode == rcodeNameError && r.policy().AllowsName(name) {
		r.refuse(netwire.Entry{Event: "failed", Protocol: "dns", Target: name, Name: name,
			Reason: "does not resolve, though a rule allows it", Hint: "getent hosts " + name})
	}
	if a.rcode = m.rcode; a.rcode > 15 {
		a.rcode = rcodeServerFailure
	}
	c := r.clean(m)
	a.answer, a.ns, a.extra = c.answer, c.ns, c.extra
	if !c.changed {
		a.bits |= m.bits & bitAuthentic
	}
	if c.emptied != "" {
		a.explain(problemFiltered, c.emptied)
	}
}

// own adds a record that is ours.
func (a *reply) own(kind uint16, data []byte) {
	a.answer = append(a.answer, dnsRecord{name: a.question.name, kind: kind, class: classINET, ttl: dnsLocalTTL, data: data})
}

// explain adds what a user's tools show of an error.
func (a *reply) explain(code uint16, text string) {
	a.problem = append(binary.BigEndian.AppendUint16(nil, code), text[:min(len(text), problemText)]...)
}

// finish writes a, cut to what the guest takes.
func (a *reply) finish(packet []byte) []byte {
	var opt *dnsRecord
	if a.edns {
		opt = newOPT(dnsLargest, a.rcode, a.dnssec)
		if a.problem != nil {
			opt.data = binary.BigEndian.AppendUint16(opt.data, optProblem)
			opt.data = binary.BigEndian.AppendUint16(opt.data, uint16(len(a.problem)))
			opt.data = append(opt.data, a.problem...)
		}
	}
	out := a.pack(a.size, opt)
	if len(out) > a.size {
		return headerOnly(packet, rcodeServerFailure)
	}
	return out
}

func newOPT(size uint16, rcode int, dnssec bool) *dnsRecord {
	opt := &dnsRecord{name: "\x00", kind: typeOPT, class: size, ttl: uint32(rcode>>4) << 24}
	if dnssec {
		opt.ttl |= optDNSSEC
	}
	return opt
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

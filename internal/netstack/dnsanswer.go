package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"

	"banger/internal/netwire"
)

// The bounds of one answer. The rest of a longer one is left out: whoever has that many
// addresses can be reached by the first.
const (
	answerRecords = 256
	answerAliases = 16
	answerLogged  = 8 // refused addresses that are logged one by one
	dnsHeader     = 12
)

var errShortAnswer = errors.New("the answer has fewer records than it promises")

// parseAnswer reads the answer to the question m. It reads no more records than are kept,
// whatever the header promises: 4,000 records with long names would unpack to megabytes.
// The error is errNotTheAnswer for a packet that anybody could have sent.
func parseAnswer(packet []byte, m *dns.Msg) (*dns.Msg, error) {
	if len(packet) < dnsHeader || binary.BigEndian.Uint16(packet) != m.Id {
		return nil, errNotTheAnswer
	}
	bits := binary.BigEndian.Uint16(packet[2:])
	const response, opcode, truncated, authentic = 1 << 15, 15 << 11, 1 << 9, 1 << 5
	if bits&response == 0 || bits&opcode != 0 {
		return nil, errNotTheAnswer
	}
	count := func(section int) int { return int(binary.BigEndian.Uint16(packet[4+2*section:])) }
	answer := &dns.Msg{Question: m.Question}
	answer.Id, answer.Response, answer.Rcode = m.Id, true, int(bits&15)
	answer.Truncated, answer.AuthenticatedData = bits&truncated != 0, bits&authentic != 0
	if count(0) == 0 && !usable(answer) {
		return answer, nil // some servers send errors without the question
	}
	if count(0) != 1 {
		return nil, errNotTheAnswer
	}
	name, off, err := dns.UnpackDomainName(packet, dnsHeader)
	if err != nil || len(packet) < off+4 {
		return nil, errNotTheAnswer
	}
	kind, class := binary.BigEndian.Uint16(packet[off:]), binary.BigEndian.Uint16(packet[off+2:])
	if q := m.Question[0]; dns.CanonicalName(name) != dns.CanonicalName(q.Name) || kind != q.Qtype || class != q.Qclass {
		return nil, errNotTheAnswer
	}
	if answer.Truncated {
		return answer, nil
	}
	off += 4
	room := answerRecords
	for i, section := range []*[]dns.RR{&answer.Answer, &answer.Ns, &answer.Extra} {
		for range min(count(i+1), room) {
			var rr dns.RR
			if off >= len(packet) {
				return nil, errShortAnswer // UnpackRR would make an empty record of it
			}
			if rr, off, err = dns.UnpackRR(packet, off); err != nil {
				return nil, fmt.Errorf("cannot understand the answer: %w", err)
			}
			*section = append(*section, rr)
		}
		if room -= len(*section); count(i+1) > len(*section) {
			break
		}
	}
	if opt := answer.IsEdns0(); opt != nil {
		answer.Rcode |= opt.ExtendedRcode()
	}
	return answer, nil
}

// policyName is a name as policies and people write it.
func policyName(name string) string {
	if name == "." {
		return name
	}
	return strings.TrimSuffix(dns.CanonicalName(name), ".")
}

// aliases returns the question's name and those that it leads to by CNAME, in order.
func aliases(question string, answer []dns.RR) []string {
	target := make(map[string]string)
	for _, rr := range answer {
		if c, ok := rr.(*dns.CNAME); ok && c.Hdr.Class == dns.ClassINET {
			if owner := policyName(c.Hdr.Name); target[owner] == "" {
				target[owner] = policyName(c.Target)
			}
		}
	}
	chain := []string{policyName(question)}
	for len(chain) <= answerAliases {
		next := target[chain[len(chain)-1]]
		if next == "" || slices.Contains(chain, next) {
			break
		}
		chain = append(chain, next)
	}
	return chain
}

// cleaned is what of an answer the guest gets.
type cleaned struct {
	answer, ns, extra []dns.RR
	// changed: records are missing, so that nobody can vouch for the rest.
	changed bool
	// emptied says why an answer that had addresses has none; "" else.
	emptied string
}

// clean takes from the upstream answer m what the guest may not learn, logs the addresses
// among it, and notes by which names it learns the rest. Addresses count in the answer to
// a question for addresses only: elsewhere they are a service to whoever believes them,
// and a guest that asks for them by name gets them judged by name.
func (r *resolver) clean(m *dns.Msg) (c cleaned) {
	question := m.Question[0]
	chain := aliases(question.Name, m.Answer)
	kept, refused := 0, 0
	for _, rr := range m.Answer {
		address, isA := rr.(*dns.A)
		if !isA || question.Qtype != dns.TypeA || address.Hdr.Class != dns.ClassINET {
			c.keep(&c.answer, rr)
			continue
		}
		addr, ok := netip.AddrFromSlice(address.A.To4())
		at := slices.Index(chain, policyName(address.Hdr.Name))
		if !ok || at < 0 {
			c.changed = true
			continue
		}
		if reason := r.judge(chain[0], addr, refused < answerLogged); reason != "" {
			refused++
			c.changed, c.emptied = true, reason
			continue
		}
		kept++
		r.names.learn(chain[:at+1], addr, time.Duration(address.Hdr.Ttl)*time.Second)
		capTTL(rr)
		c.answer = append(c.answer, rr)
	}
	if kept > 0 {
		c.emptied = ""
	}
	if c.emptied != "" {
		return cleaned{changed: true, emptied: c.emptied}
	}
	for _, rr := range m.Ns {
		c.keep(&c.ns, rr)
	}
	for _, rr := range m.Extra {
		c.keep(&c.extra, rr)
	}
	return c
}

// judge says why the guest may not learn that name has addr, "" when it may.
func (r *resolver) judge(name string, addr netip.Addr, log bool) string {
	v := r.policy().Answer(name, addr, r.own(addr))
	if v.Allowed {
		return ""
	}
	if log {
		r.refuse(netwire.Entry{
			Protocol: "dns", Target: name + " → " + addr.String(), Name: name,
			Reason: "answer left out: " + v.Reason, Rule: v.Rule,
		})
	}
	return "the answer " + addr.String() + " is left out: " + v.Reason
}

// keep adds a record that is no answer with an address, without the addresses in it.
func (c *cleaned) keep(section *[]dns.RR, rr dns.RR) {
	h := rr.Header()
	switch h.Rrtype {
	case dns.TypeOPT:
		return
	case dns.TypeA, dns.TypeAAAA, dns.TypeTSIG, dns.TypeSIG, dns.TypeTKEY:
		c.changed = true
		return
	}
	if h.Class != dns.ClassINET || !c.withoutHints(rr) {
		c.changed = true
		return
	}
	capTTL(rr)
	*section = append(*section, rr)
}

// withoutHints takes the addresses out of HTTPS and SVCB records. It is false for a
// record that is nothing without them.
func (c *cleaned) withoutHints(rr dns.RR) bool {
	var svcb *dns.SVCB
	switch rr := rr.(type) {
	case *dns.SVCB:
		svcb = rr
	case *dns.HTTPS:
		svcb = &rr.SVCB
	default:
		return true
	}
	before := len(svcb.Value)
	hint := func(key dns.SVCBKey) bool { return key == dns.SVCB_IPV4HINT || key == dns.SVCB_IPV6HINT }
	svcb.Value = slices.DeleteFunc(svcb.Value, func(v dns.SVCBKeyValue) bool { return hint(v.Key()) })
	c.changed = c.changed || len(svcb.Value) < before
	return !slices.ContainsFunc(svcb.Value, func(v dns.SVCBKeyValue) bool {
		mandatory, ok := v.(*dns.SVCBMandatory)
		return ok && slices.ContainsFunc(mandatory.Code, hint)
	})
}

// capTTL keeps the guest from believing a record for longer than its names are known.
func capTTL(rr dns.RR) {
	rr.Header().Ttl = min(rr.Header().Ttl, uint32(answerTTL/time.Second))
}

package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"banger/internal/netwire"
)

// The bounds of one answer. The rest of a longer one is left out: whoever has that many
// addresses can be reached by the first.
const (
	answerRecords = 256
	answerAliases = 16
	answerLogged  = 8 // refused addresses that are logged one by one
)

var errShortAnswer = errors.New("the answer has fewer records than it promises")

// parseAnswer reads the answer to the question m. It reads no more records than are kept,
// whatever the header promises: 4,000 records with long names would unpack to megabytes.
// The error is errNotTheAnswer for a packet that anybody could have sent.
func parseAnswer(packet []byte, m *dnsMessage) (*dnsMessage, error) {
	if len(packet) < dnsHeader || binary.BigEndian.Uint16(packet) != m.id {
		return nil, errNotTheAnswer
	}
	bits := binary.BigEndian.Uint16(packet[2:])
	if bits&bitResponse == 0 || bits&bitsOpcode != 0 {
		return nil, errNotTheAnswer
	}
	count := func(section int) int { return int(binary.BigEndian.Uint16(packet[4+2*section:])) }
	answer := &dnsMessage{id: m.id, bits: bits &^ 15, rcode: int(bits & 15), question: m.question}
	if count(0) == 0 && !usable(answer) {
		return answer, nil // some servers send errors without the question
	}
	if count(0) != 1 {
		return nil, errNotTheAnswer
	}
	q, off, err := parseQuestion(packet)
	if err != nil || policyName(q.name) != policyName(m.question.name) || q.kind != m.question.kind || q.class != m.question.class {
		return nil, errNotTheAnswer
	}
	if answer.truncated() {
		return answer, nil
	}
	room := answerRecords
	for i, section := range []*[]dnsRecord{&answer.answer, &answer.ns, &answer.extra} {
		for range min(count(i+1), room) {
			var rr dnsRecord
			if off >= len(packet) {
				return nil, errShortAnswer
			}
			if rr, off, err = parseRecord(packet, off); err != nil {
				return nil, fmt.Errorf("cannot understand the answer: %w", err)
			}
			if rr.kind == typeOPT && section == &answer.extra {
				answer.rcode |= int(rr.ttl>>24) << 4
			}
			*section = append(*section, rr)
		}
		if room -= len(*section); count(i+1) > len(*section) {
			break
		}
	}
	return answer, nil
}

func (m *dnsMessage) truncated() bool { return m.bits&bitTruncated != 0 }

// aliases returns the question's name and those that it leads to by CNAME, in order.
func aliases(question dnsName, answer []dnsRecord) []string {
	target := make(map[string]string)
	for _, rr := range answer {
		if rr.kind == typeCNAME && rr.class == classINET && len(rr.data) > 0 {
			if owner := policyName(rr.name); target[owner] == "" {
				target[owner] = policyName(dnsName(rr.data))
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
	answer, ns, extra []dnsRecord
	// changed: records are missing, so that nobody can vouch for the rest.
	changed bool
	// emptied says why an answer that had addresses has none; "" else.
	emptied string
}

// clean takes from the upstream answer m what the guest may not learn, logs the addresses
// among it, and notes by which names it learns the rest. Addresses count in the answer to
// a question for addresses only: elsewhere they are a service to whoever believes them,
// and a guest that asks for them by name gets them judged by name.
func (r *resolver) clean(m *dnsMessage) (c cleaned) {
	chain := aliases(m.question.name, m.answer)
	kept, refused := 0, 0
	for _, rr := range m.answer {
		if rr.kind != typeA || m.question.kind != typeA || rr.class != classINET {
			c.keep(&c.answer, rr)
			continue
		}
		addr, ok := netip.AddrFromSlice(rr.data)
		at := slices.Index(chain, policyName(rr.name))
		if !ok || !addr.Is4() || at < 0 {
			c.changed = true
			continue
		}
		if reason := r.judge(chain[0], addr, refused < answerLogged); reason != "" {
			refused++
			c.changed, c.emptied = true, reason
			continue
		}
		kept++
		r.names.learn(chain[:at+1], addr, time.Duration(rr.ttl)*time.Second)
		c.answer = append(c.answer, rr.capped())
	}
	if kept > 0 {
		c.emptied = ""
	}
	if c.emptied != "" {
		return cleaned{changed: true, emptied: c.emptied}
	}
	for _, rr := range m.ns {
		c.keep(&c.ns, rr)
	}
	for _, rr := range m.extra {
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
func (c *cleaned) keep(section *[]dnsRecord, rr dnsRecord) {
	switch rr.kind {
	case typeOPT:
		return
	case typeA, typeAAAA, typeTSIG, typeSIG, typeTKEY:
		c.changed = true
		return
	case typeSVCB, typeHTTPS:
		data, ok := withoutHints(rr.data)
		if !ok {
			c.changed = true
			return
		}
		c.changed = c.changed || len(data) < len(rr.data)
		rr.data = data
	}
	if rr.class != classINET {
		c.changed = true
		return
	}
	*section = append(*section, rr.capped())
}

// The parameters of HTTPS and SVCB records that have to do with addresses (RFC 9460, 14.3.2).
const (
	paramMandatory = 0
	paramIPv4Hint  = 4
	paramIPv6Hint  = 6
)

// withoutHints takes the addresses out of the data of an HTTPS or SVCB record. It is false
// for one that is nothing without them, or broken.
func withoutHints(data []byte) (kept []byte, ok bool) {
	if len(data) == 0 {
		return nil, false
	}
	hint := func(key uint16) bool { return key == paramIPv4Hint || key == paramIPv6Hint }
	at := 2 + nameSize(data[2:]) // behind the priority and the target
	kept = slices.Clone(data[:at])
	for rest := data[at:]; len(rest) > 0; {
		if len(rest) < 4 {
			return nil, false
		}
		key, size := binary.BigEndian.Uint16(rest), 4+int(binary.BigEndian.Uint16(rest[2:]))
		if size > len(rest) {
			return nil, false
		}
		if key == paramMandatory {
			for i := 4; i+2 <= size; i += 2 {
				if hint(binary.BigEndian.Uint16(rest[i:])) {
					return nil, false
				}
			}
		}
		if !hint(key) {
			kept = append(kept, rest[:size]...)
		}
		rest = rest[size:]
	}
	return kept, true
}

// capped keeps the guest from believing a record for longer than its names are known.
func (r dnsRecord) capped() dnsRecord {
	r.ttl = min(r.ttl, uint32(answerTTL/time.Second))
	return r
}

package netstack

import (
	"encoding/binary"
	"errors"
	"strings"
)

// The numbers of DNS that the resolver knows, as IANA has them.
const (
	typeA     = 1
	typeCNAME = 5
	typePTR   = 12
	typeHINFO = 13
	typeSIG   = 24
	typeAAAA  = 28
	typeOPT   = 41
	typeSVCB  = 64
	typeHTTPS = 65
	typeTKEY  = 249
	typeTSIG  = 250
	typeANY   = 255

	classINET = 1

	rcodeSuccess        = 0
	rcodeFormatError    = 1
	rcodeServerFailure  = 2
	rcodeNameError      = 3
	rcodeNotImplemented = 4
	rcodeRefused        = 5
	rcodeBadVersion     = 16
)

// The bits of a message's third and fourth byte, beside the rcode.
const (
	bitResponse           = 1 << 15
	bitsOpcode            = 15 << 11
	bitTruncated          = 1 << 9
	bitRecursionDesired   = 1 << 8
	bitRecursionAvailable = 1 << 7
	bitAuthentic          = 1 << 5
	bitUnchecked          = 1 << 4
)

const (
	dnsHeader = 12
	dnsLeast  = 512       // bytes that everybody takes by UDP
	dnsMost   = 1<<16 - 1 // bytes of a message
	// A name has up to 255 bytes, so that more pointers than it can have labels go round.
	nameMost     = 255
	namePointers = nameMost / 2
)

var errMessage = errors.New("a DNS message is broken")

// dnsMessage is a message with one question.
type dnsMessage struct {
	id                uint16
	bits              uint16 // without the rcode
	rcode             int    // with the upper bits, which OPT has
	question          dnsQuestion
	answer, ns, extra []dnsRecord
}

type dnsQuestion struct {
	name        dnsName
	kind, class uint16
}

// dnsRecord is a record of any type. The names in its data are never compressed.
type dnsRecord struct {
	name        dnsName
	kind, class uint16
	ttl         uint32
	data        []byte
}

// dnsName is a name as in a message: each label behind its length, up to the empty one.
type dnsName string

// newName is for names without escapes.
func newName(text string) dnsName {
	var b strings.Builder
	for label := range strings.SplitSeq(text, ".") {
		b.WriteByte(byte(len(label)))
		b.WriteString(label)
	}
	b.WriteByte(0)
	return dnsName(b.String())
}

// policyName is a name as policies and people write it: in lower case, without the last
// dot, a dot or a backslash in a label behind a backslash, and what does not print as \DDD.
func policyName(n dnsName) string {
	if n == "\x00" {
		return "."
	}
	b := make([]byte, 0, len(n))
	for rest := n; rest[0] != 0; rest = rest[1+rest[0]:] {
		if len(b) > 0 {
			b = append(b, '.')
		}
		for _, c := range []byte(rest[1 : 1+rest[0]]) {
			switch {
			case c == '.' || c == '\\':
				b = append(b, '\\', c)
			case c <= ' ' || c > '~':
				b = append(b, '\\', '0'+c/100, '0'+c/10%10, '0'+c%10)
			case 'A' <= c && c <= 'Z':
				b = append(b, c+'a'-'A')
			default:
				b = append(b, c)
			}
		}
	}
	return string(b)
}

// parseName reads the name at off, and says where what is behind it begins.
func parseName(msg []byte, off int) (name dnsName, next int, err error) {
	var out []byte
	for pointers := 0; ; {
		if off >= len(msg) {
			return "", 0, errMessage
		}
		length := int(msg[off])
		switch length & 0xc0 {
		case 0:
			if off+1+length > len(msg) || len(out)+1+length > nameMost {
				return "", 0, errMessage
			}
			out = append(out, msg[off:off+1+length]...)
			off += 1 + length
			if length > 0 {
				continue
			}
			if pointers == 0 {
				next = off
			}
			return dnsName(out), next, nil
		case 0xc0:
			if off+2 > len(msg) || pointers >= namePointers {
				return "", 0, errMessage
			}
			if pointers == 0 {
				next = off + 2
			}
			pointers++
			off = int(binary.BigEndian.Uint16(msg[off:]) & 0x3fff)
		default:
			return "", 0, errMessage
		}
	}
}

// parseQuestion reads the question of a message, and says where it ends.
func parseQuestion(msg []byte) (q dnsQuestion, off int, err error) {
	if q.name, off, err = parseName(msg, dnsHeader); err != nil {
		return q, 0, err
	}
	if off+4 > len(msg) {
		return q, 0, errMessage
	}
	q.kind, q.class = binary.BigEndian.Uint16(msg[off:]), binary.BigEndian.Uint16(msg[off+2:])
	return q, off + 4, nil
}

// parseRecord reads the record at off, and says where it ends.
func parseRecord(msg []byte, off int) (r dnsRecord, end int, err error) {
	if r.name, off, err = parseName(msg, off); err != nil {
		return r, 0, err
	}
	if off+10 > len(msg) {
		return r, 0, errMessage
	}
	r.kind, r.class = binary.BigEndian.Uint16(msg[off:]), binary.BigEndian.Uint16(msg[off+2:])
	r.ttl = binary.BigEndian.Uint32(msg[off+4:])
	off += 10
	if end = off + int(binary.BigEndian.Uint16(msg[off-2:])); end > len(msg) {
		return r, 0, errMessage
	}
	r.data, err = expand(msg[:end], off, r.kind)
	return r, end, err
}

// layout says where the data of a record has names that a server may have compressed, see
// RFC 3597, 4: n is a name, s a string behind its length, a digit so many bytes.
func layout(kind uint16) string {
	switch kind {
	case 2, 3, 4, typeCNAME, 7, 8, 9, typePTR, 30, 39, 47: // NS MD MF MB MG MR NXT DNAME NSEC
		return "n"
	case 6, 14, 17: // SOA MINFO RP
		return "nn"
	case 15, 18, 21, 36, typeSVCB, typeHTTPS: // MX AFSDB RT KX
		return "2n"
	case 26: // PX
		return "2nn"
	case 33: // SRV
		return "6n"
	case 35: // NAPTR
		return "4sssn"
	case typeSIG, 46: // RRSIG
		return "99n"
	}
	return ""
}

// mayCompress tells the types whose names all others know to be compressed: RFC 1035's.
func mayCompress(kind uint16) bool { return kind < 16 }

// expand copies a record's data, from off to the end of msg, with its names in full.
func expand(msg []byte, off int, kind uint16) (data []byte, err error) {
	if off == len(msg) {
		return nil, nil
	}
	for _, part := range layout(kind) {
		if part == 'n' {
			var name dnsName
			if name, off, err = parseName(msg, off); err != nil {
				return nil, err
			}
			data = append(data, name...)
			continue
		}
		size := int(part - '0')
		if part == 's' {
			if off >= len(msg) {
				return nil, errMessage
			}
			size = 1 + int(msg[off])
		}
		if off+size > len(msg) {
			return nil, errMessage
		}
		data = append(data, msg[off:off+size]...)
		off += size
	}
	return append(data, msg[off:]...), nil
}

// pack writes m, with opt behind it if there is one, in at most size bytes as long as the
// question fits. The records that do not are left out, which is told.
func (m *dnsMessage) pack(size int, opt *dnsRecord) []byte {
	w := dnsWriter{out: make([]byte, dnsHeader, dnsLeast), seen: make(map[dnsName]int)}
	w.name(m.question.name)
	w.numbers(m.question.kind, m.question.class)
	bits := m.bits
	if opt != nil {
		size -= 11 + len(opt.data)
	}
	var counts [3]int
sections:
	for i, section := range [][]dnsRecord{m.answer, m.ns, m.extra} {
		for _, r := range section {
			fits := len(w.out)
			w.record(r)
			if len(w.out) > size {
				w.out = w.out[:fits] // what w has seen there, nobody writes again
				bits |= bitTruncated
				break sections
			}
			counts[i]++
		}
	}
	if opt != nil {
		w.record(*opt)
		counts[2]++
	}
	head := w.out[:0]
	for _, n := range []int{int(m.id), int(bits) | m.rcode&15, 1, counts[0], counts[1], counts[2]} {
		head = binary.BigEndian.AppendUint16(head, uint16(n))
	}
	return w.out
}

// dnsWriter writes a message, and each name once.
type dnsWriter struct {
	out  []byte
	seen map[dnsName]int // where a name stands
}

func (w *dnsWriter) numbers(all ...uint16) {
	for _, n := range all {
		w.out = binary.BigEndian.AppendUint16(w.out, n)
	}
}

func (w *dnsWriter) name(n dnsName) {
	for ; n[0] != 0; n = n[1+n[0]:] {
		if at, ok := w.seen[n]; ok {
			w.numbers(0xc000 | uint16(at))
			return
		}
		if at := len(w.out); at < 1<<14 { // a pointer is no longer
			w.seen[n] = at
		}
		w.out = append(w.out, n[:1+n[0]]...)
	}
	w.out = append(w.out, 0)
}

func (w *dnsWriter) record(r dnsRecord) {
	w.name(r.name)
	w.numbers(r.kind, r.class, uint16(r.ttl>>16), uint16(r.ttl), 0)
	begin, rest := len(w.out), r.data
	if mayCompress(r.kind) && len(rest) > 0 {
		for _, part := range layout(r.kind) {
			size := int(part - '0')
			if part == 'n' {
				size = nameSize(rest)
				w.name(dnsName(rest[:size]))
			} else {
				w.out = append(w.out, rest[:size]...)
			}
			rest = rest[size:]
		}
	}
	w.out = append(w.out, rest...)
	binary.BigEndian.PutUint16(w.out[begin-2:], uint16(len(w.out)-begin))
}

// nameSize is that of the name which data, as expand returns it, begins with.
func nameSize(data []byte) (size int) {
	for data[size] != 0 {
		size += 1 + int(data[size])
	}
	return size + 1
}

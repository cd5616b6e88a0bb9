package netstack

import (
	"context"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
)

// asked is a resolver with what it needs, and what came out beside the answers.
type asked struct {
	*resolver
	t      *testing.T
	policy atomic.Pointer[netpolicy.Policy]

	mu      sync.Mutex
	entries []netwire.Entry
}

// newAsked makes a resolver with the servers of conf, which is resolv.conf's text.
func newAsked(t *testing.T, conf string) *asked {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	a := &asked{t: t}
	a.setPolicy(netpolicy.Internet, nil, nil)
	a.resolver = newResolver(resolverOptions{
		policy: func() netpolicy.Policy { return *a.policy.Load() },
		own:    func(addr netip.Addr) bool { return addr == netip.MustParseAddr("203.0.113.200") },
		refuse: func(e netwire.Entry) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.entries = append(a.entries, e)
		},
		names: newNames(), resolvConf: path, hostAddr: netwire.Gateway(),
	})
	return a
}

func (a *asked) setPolicy(preset netpolicy.Preset, allow, deny []string) {
	a.t.Helper()
	p, err := netpolicy.New(preset, allow, deny)
	if err != nil {
		a.t.Fatal(err)
	}
	a.policy.Store(&p)
}

// refusals returns the log as lines and empties it.
func (a *asked) refusals() (lines []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.entries {
		lines = append(lines, strings.Join([]string{e.Protocol, e.Target, e.Reason, e.Rule}, "|"))
	}
	a.entries = nil
	return lines
}

func question(name string, kind uint16) *dns.Msg {
	m := new(dns.Msg).SetQuestion(name, kind)
	return m.SetEdns0(4096, false)
}

// send has m answered, and checks what holds for every answer.
func (a *asked) send(m *dns.Msg, tcp bool) *dns.Msg {
	a.t.Helper()
	packet, err := m.Pack()
	if err != nil {
		a.t.Fatal(err)
	}
	out := a.exchange(a.t.Context(), packet, tcp)
	var answer dns.Msg
	if err := answer.Unpack(out); err != nil {
		a.t.Fatalf("%v: %x", err, out)
	}
	if answer.Id != m.Id || !answer.Response || answer.RecursionDesired != m.RecursionDesired || !answer.RecursionAvailable ||
		!slices.Equal(answer.Question, m.Question) || (answer.IsEdns0() != nil) != (m.IsEdns0() != nil) {
		a.t.Fatalf("asked\n%v\nand answered\n%v", m, &answer)
	}
	for _, rr := range slices.Concat(answer.Answer, answer.Ns, answer.Extra) {
		if h := rr.Header(); h.Rrtype != dns.TypeOPT && h.Ttl > 3600 {
			a.t.Errorf("longer than the names live: %v", rr)
		}
	}
	return &answer
}

func (a *asked) ask(name string, kind uint16) *dns.Msg {
	a.t.Helper()
	return a.send(question(name, kind), false)
}

// summary is the rcode and the records without their TTL, and the text of the problem.
func summary(m *dns.Msg) string {
	s := dns.RcodeToString[m.Rcode]
	for _, rr := range slices.Concat(m.Answer, m.Ns, m.Extra) {
		opt, ok := rr.(*dns.OPT)
		if !ok {
			s += "; " + strings.Join(slices.Delete(strings.Fields(rr.String()), 1, 3), " ")
			continue
		}
		for _, o := range opt.Option {
			if e, ok := o.(*dns.EDNS0_EDE); ok {
				s += fmt.Sprintf("; %d %s", e.InfoCode, e.ExtraText)
			}
		}
	}
	return s
}

func TestDNSAnswersItself(t *testing.T) {
	a := newAsked(t, "") // whatever is forwarded fails
	for _, c := range []struct {
		name string
		kind uint16
		want string
	}{
		{"host.banger.internal.", dns.TypeA, "NOERROR; host.banger.internal. A 10.0.2.2"},
		{"HOST.Banger.internal.", dns.TypeA, "NOERROR; HOST.Banger.internal. A 10.0.2.2"},
		{"host.banger.internal.", dns.TypeAAAA, "NOERROR"},
		{"host.banger.internal.", dns.TypeTXT, "NOERROR"},
		{"other.banger.internal.", dns.TypeA, "NXDOMAIN"},
		{"a.host.banger.internal.", dns.TypeA, "NXDOMAIN"},
		{"banger.internal.", dns.TypeA, "NOERROR"},
		{"localhost.", dns.TypeA, "NOERROR; localhost. A 127.0.0.1"},
		{"a.localhost.", dns.TypeA, "NOERROR; a.localhost. A 127.0.0.1"},
		{"localhost.", dns.TypeAAAA, "NOERROR"},
		{"2.2.0.10.in-addr.arpa.", dns.TypePTR, "NOERROR; 2.2.0.10.in-addr.arpa. PTR host.banger.internal."},
		{"_dns.resolver.arpa.", dns.TypeSVCB, "NOERROR"},
		{"example.org.", dns.TypeAAAA, "NOERROR"},
		{"example.org.", dns.TypeANY, "NOERROR; example.org. HINFO \"RFC8482\" \"\""},
		{"example.org.", dns.TypeAXFR, "REFUSED"},
		{"example.org.", dns.TypeMAILB, "REFUSED"},
	} {
		if got := summary(a.ask(c.name, c.kind)); got != c.want {
			t.Errorf("%s %s: %q, want %q", c.name, dns.TypeToString[c.kind], got, c.want)
		}
	}
	m := question("version.bind.", dns.TypeTXT)
	m.Question[0].Qclass = dns.ClassCHAOS
	if got := summary(a.send(m, false)); got != "REFUSED" {
		t.Errorf("class CH: %q", got)
	}
	if got := a.refusals(); len(got) != 0 {
		t.Errorf("logged %q", got)
	}
}

// TestDNSReverseZones: names of networks that the guest may not reach stay unknown.
func TestDNSReverseZones(t *testing.T) {
	const forwarded = "SERVFAIL"
	a := newAsked(t, "")
	for name, want := range map[string]string{
		"1.2.3.10.in-addr.arpa.": "private network", "2.3.10.in-addr.arpa.": "private network", "10.in-addr.arpa.": "private network",
		"b._dns-sd._udp.0.0.168.192.in-addr.arpa.": "private network", "168.192.in-addr.arpa.": "private network",
		"X.10.in-addr.ARPA.": "private network", "16.172.in-addr.arpa.": "private network", "31.172.in-addr.arpa.": "private network",
		"127.100.in-addr.arpa.": "private network", "1.0.0.127.in-addr.arpa.": "loopback address",
		"254.169.in-addr.arpa.": "link-local address", "254.169.254.169.in-addr.arpa.": "metadata address",
		"200.113.0.203.in-addr.arpa.": "an address of this host",
		"c.f.ip6.arpa.":               "private network", "8.e.f.ip6.arpa.": "link-local address",
		strings.Repeat("0.", 20) + "f.f.f.f.1.0.0.0.0.0.0.a.ip6.arpa.":      "reserved address",
		"1.0.0.0.0.0.a.0.f.f.f.f." + strings.Repeat("0.", 20) + "ip6.arpa.": "private network", // ::ffff:10.0.0.1
		"1.113.0.203.in-addr.arpa.":                                         forwarded, "113.0.203.in-addr.arpa.": forwarded, "172.in-addr.arpa.": forwarded,
		"192.in-addr.arpa.": forwarded, "100.in-addr.arpa.": forwarded, "in-addr.arpa.": forwarded, "32.172.in-addr.arpa.": forwarded,
		"010.in-addr.arpa.": forwarded, "256.in-addr.arpa.": forwarded, "8.b.d.0.1.0.0.2.ip6.arpa.": forwarded,
		"10.in-addr.arpa.example.": forwarded,
	} {
		if want != forwarded {
			want = "NXDOMAIN; 17 " + want
		}
		for _, kind := range []uint16{dns.TypePTR, dns.TypeSOA} {
			if got := summary(a.ask(name, kind)); !strings.HasPrefix(got, want) {
				t.Errorf("%s: %q, want %q", name, got, want)
			}
		}
	}
	a.setPolicy(netpolicy.Internet, []string{"10.3.2.1:80"}, nil)
	if got := summary(a.ask("1.2.3.10.in-addr.arpa.", dns.TypePTR)); !strings.HasPrefix(got, forwarded) {
		t.Errorf("an address that a rule opens: %q", got)
	}
	a.setPolicy(netpolicy.LAN, nil, nil)
	if got := summary(a.ask("10.in-addr.arpa.", dns.TypeSOA)); !strings.HasPrefix(got, forwarded) {
		t.Errorf("a network that the preset opens: %q", got)
	}
}

// zone answers like a server that has these records, by UDP cut to what was asked for.
func zone(records ...string) dns.HandlerFunc {
	return func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		for _, text := range records {
			section := &m.Answer
			if rest, ok := strings.CutPrefix(text, "+"); ok {
				text, section = rest, &m.Extra
			}
			if rest, ok := strings.CutPrefix(text, "-"); ok {
				text, section = rest, &m.Ns
			}
			rr, err := dns.NewRR(text)
			if err != nil {
				panic(err)
			}
			*section = append(*section, rr)
		}
		m.Truncate(dns.MaxMsgSize)
		if w.LocalAddr().Network() == "udp" {
			m.Truncate(upstreamUDP)
		}
		w.WriteMsg(m)
	}
}

func TestDNSAnswersAreJudged(t *testing.T) {
	const q = "q.example."
	for _, c := range []struct {
		about   string
		kind    uint16
		records []string
		want    string
		learned string // names of 203.0.113.9
		logged  []string
	}{
		{"public", dns.TypeA, []string{"q.example. 999999 A 203.0.113.9"}, "NOERROR; q.example. A 203.0.113.9", "q.example", nil},
		{"a chain in any order", dns.TypeA, []string{"c.example. A 203.0.113.9", "B.example. CNAME c.example.", "q.example. CNAME b.example."},
			"NOERROR; c.example. A 203.0.113.9; B.example. CNAME c.example.; q.example. CNAME b.example.", "b.example c.example q.example", nil},
		{"a loop", dns.TypeA, []string{"q.example. CNAME b.example.", "b.example. CNAME q.example.", "b.example. A 203.0.113.9"},
			"NOERROR; q.example. CNAME b.example.; b.example. CNAME q.example.; b.example. A 203.0.113.9", "b.example q.example", nil},
		{"an alias with an address", dns.TypeA, []string{"q.example. CNAME b.example.", "b.example. CNAME c.example.", "b.example. A 203.0.113.9"},
			"NOERROR; q.example. CNAME b.example.; b.example. CNAME c.example.; b.example. A 203.0.113.9", "b.example q.example", nil},
		{"beside the chain", dns.TypeA, []string{"other.example. A 203.0.113.9", "q.example. A 203.0.113.8"}, "NOERROR; q.example. A 203.0.113.8", "", nil},
		{"private", dns.TypeA, []string{"q.example. A 10.1.2.3"}, "NOERROR; 17 the answer 10.1.2.3 is left out: private network", "",
			[]string{"dns|q.example → 10.1.2.3|answer left out: private network|10.1.2.3"}},
		{"private at the end of a chain", dns.TypeA, []string{"q.example. CNAME b.example.", "b.example. A 127.0.0.1"},
			"NOERROR; 17 the answer 127.0.0.1 is left out: loopback address", "",
			[]string{"dns|q.example → 127.0.0.1|answer left out: loopback address|"}},
		{"metadata among public", dns.TypeA, []string{"q.example. A 169.254.169.254", "q.example. A 203.0.113.9"},
			"NOERROR; q.example. A 203.0.113.9", "q.example",
			[]string{"dns|q.example → 169.254.169.254|answer left out: metadata address|169.254.169.254"}},
		{"the host's own", dns.TypeA, []string{"q.example. A 203.0.113.200"},
			"NOERROR; 17 the answer 203.0.113.200 is left out: an address of this host", "",
			[]string{"dns|q.example → 203.0.113.200|answer left out: an address of this host|203.0.113.200"}},
		{"another class", dns.TypeA, []string{"q.example. CH A 203.0.113.9"}, "NOERROR", "", nil},
		{"addresses beside the answer", dns.TypeMX, []string{"q.example. MX 1 m.example.", "+m.example. A 10.1.2.3", "+m.example. A 203.0.113.9", "-q.example. NS n.example.", "-n.example. A 127.0.0.1"},
			"NOERROR; q.example. MX 1 m.example.; q.example. NS n.example.", "", nil},
		{"addresses of IPv6", dns.TypeA, []string{"q.example. A 203.0.113.9", "q.example. AAAA ::1"}, "NOERROR; q.example. A 203.0.113.9", "q.example", nil},
		{"addresses that nobody asked for", dns.TypeTXT, []string{"q.example. TXT \"x\"", "q.example. A 203.0.113.9"}, "NOERROR; q.example. TXT \"x\"", "", nil},
		{"hints", dns.TypeHTTPS, []string{`q.example. HTTPS 1 . alpn="h2" ipv4hint="10.1.2.3" ipv6hint="::1"`}, `NOERROR; q.example. HTTPS 1 . alpn="h2"`, "", nil},
		{"hints that must be", dns.TypeSVCB, []string{`q.example. SVCB 1 . mandatory="ipv4hint" ipv4hint="10.1.2.3"`}, "NOERROR", "", nil},
		{"no answer", dns.TypeA, []string{"-example. SOA a. b. 1 2 3 4 5"}, "NOERROR; example. SOA a. b. 1 2 3 4 5", "", nil},
	} {
		t.Run(c.about, func(t *testing.T) {
			a := newAsked(t, "nameserver "+serve(t, zone(c.records...)))
			if got := summary(a.ask(q, c.kind)); got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
			if got := strings.Join(a.names.lookup(netip.MustParseAddr("203.0.113.9")), " "); got != c.learned {
				t.Errorf("learned %q, want %q", got, c.learned)
			}
			if got := a.refusals(); !slices.Equal(got, c.logged) {
				t.Errorf("logged %q, want %q", got, c.logged)
			}
		})
	}
}

func TestDNSForwards(t *testing.T) {
	for kind, data := range map[uint16]string{
		dns.TypeTXT: `"some text"`, dns.TypeMX: "10 m.example.", dns.TypeSRV: "1 2 443 s.example.", dns.TypePTR: "p.example.", dns.TypeNS: "n.example.",
		dns.TypeSOA: `n.example. a\.b.example. 1 2 3 4 5`, dns.TypeCAA: `0 issue "ca.example"`, dns.TypeCNAME: "c.example.", 65280: `\# 3 010203`,
		dns.TypeMINFO: "a.example. b.example.", dns.TypeRP: "a.example. b.example.", dns.TypePX: "1 a.example. b.example.", dns.TypeHINFO: `"c" "o"`,
		dns.TypeNAPTR: `1 2 "s" "" "!^.*$!x!" r.example.`, dns.TypeDNAME: "d.example.", dns.TypeAFSDB: "1 a.example.", dns.TypeNSEC: "n.example. A MX",
		dns.TypeRRSIG: "A 13 2 300 20260101000000 20250101000000 7 example. AQID",
	} {
		record := "Q.eXample. " + dns.Type(kind).String() + " " + data
		a := newAsked(t, "nameserver "+serve(t, zone(record)))
		m := question("Q.eXample.", kind)
		m.RecursionDesired = false
		if got := summary(a.send(m, false)); got != "NOERROR; "+record {
			t.Errorf("%q, want %q", got, record)
		}
	}
}

// TestDNSNamesInData: a pointer means something else in another message, so the names that
// it stands for are written in full, or as a pointer of ours.
func TestDNSNamesInData(t *testing.T) {
	// The record's own name stands in full behind the question, where ours has a pointer.
	const own, name = "\x01q\x07example\x00", "\xc0\x1d" // example
	soa := name + "\x03a.b" + name + strings.Repeat("\x00", 20)
	for kind, c := range map[uint16]struct{ data, want string }{
		dns.TypeRP:    {"\x01m" + name + name, "m.example. example."},
		dns.TypeNAPTR: {"\x00\x01\x00\x02\x01s\x00\x00" + name, `1 2 "s" "" "" example.`},
		dns.TypeSRV:   {"\x00\x01\x00\x02\x00\x03\x01s" + name, "1 2 3 s.example."},
		dns.TypeMX:    {"\x00\x01" + name, "1 example."},
		dns.TypeSOA:   {soa, `example. a\.b.example. 0 0 0 0 0`},
		dns.TypeHTTPS: {"\x00\x01\x01s" + name + "\x00\x04\x00\x04\x0a\x00\x00\x01", "1 s.example."},
		dns.TypeAFSDB: {"\x00\x01" + name, "1 example."},
	} {
		a := newAsked(t, "nameserver "+deaf(t, func(p []byte, from net.Addr, conn net.PacketConn) {
			p[2], p[7], p[11] = p[2]|0x80, 1, 0
			p = p[:len(p)-11] // OPT
			p = binary.BigEndian.AppendUint16(append(p, own...), kind)
			p = binary.BigEndian.AppendUint16(append(p, 0, 1, 0, 0, 0, 9), uint16(len(c.data)))
			conn.WriteTo(append(p, c.data...), from)
		}))
		m := question("q.example.", kind)
		want := "NOERROR; q.example. " + dns.Type(kind).String() + " " + c.want
		if got := summary(a.send(m, false)); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// TestDNSLongMessage: a name that begins beyond 16 KiB is nothing that a pointer can say.
func TestDNSLongMessage(t *testing.T) {
	m := &dnsMessage{bits: bitResponse, question: dnsQuestion{newName("q.example"), dns.TypeTXT, classINET}}
	for i := range 400 {
		name := fmt.Sprintf("n%d.example", i/2)
		m.answer = append(m.answer, dnsRecord{newName(name), dns.TypeTXT, classINET, 9, append([]byte{99}, strings.Repeat("x", 99)...)})
	}
	var got dns.Msg
	if err := got.Unpack(m.pack(dnsMost, nil)); err != nil || got.Truncated || len(got.Answer) != len(m.answer) {
		t.Fatalf("%v, %d records", err, len(got.Answer))
	}
	for i, rr := range got.Answer {
		if want := fmt.Sprintf("n%d.example.", i/2); rr.Header().Name != want {
			t.Errorf("record %d is of %s, not %s", i, rr.Header().Name, want)
		}
	}
}

// TestDNSRebinding: a name that was public turns into the host's loopback.
func TestDNSRebinding(t *testing.T) {
	var address atomic.Value
	address.Store("203.0.113.9")
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		zone("q.example. 0 A "+address.Load().(string))(w, q)
	}))
	if got := summary(a.ask("q.example.", dns.TypeA)); got != "NOERROR; q.example. A 203.0.113.9" {
		t.Errorf("first: %q", got)
	}
	for _, second := range []string{"127.0.0.1", "0.0.0.0", "10.0.2.2", "192.168.1.1"} {
		address.Store(second)
		if m := a.ask("q.example.", dns.TypeA); len(m.Answer) != 0 {
			t.Errorf("then: %v", m)
		}
		if got := a.names.lookup(netip.MustParseAddr(second)); got != nil {
			t.Errorf("%s has the names %q", second, got)
		}
	}
}

func TestDNSNamesOfThePolicy(t *testing.T) {
	var questions atomic.Int64
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		questions.Add(1)
		zone(q.Question[0].Name+" A 203.0.113.9")(w, q)
	}))
	a.setPolicy(netpolicy.None, []string{"*.allowed.test:443"}, nil)
	if m := a.ask("A.Allowed.test.", dns.TypeA); len(m.Answer) != 1 || questions.Load() != 1 {
		t.Errorf("allowed: %v", m)
	}
	if got := a.names.lookup(netip.MustParseAddr("203.0.113.9")); !slices.Equal(got, []string{"a.allowed.test"}) {
		t.Errorf("learned %q", got)
	}
	for name, want := range map[string]string{
		"Other.test.":         "dns|other.test|not on the allow-list|other.test",
		"evil-allowed.test.":  "dns|evil-allowed.test|not on the allow-list|evil-allowed.test",
		`evil\.allowed.test.`: `dns|evil\.allowed.test|a dot inside a label|`,
		`a\010b\255.test.`:    `dns|a\010b\255.test|not on the allow-list|`,
	} {
		for _, kind := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeTXT} {
			got := summary(a.ask(name, kind))
			reason := strings.Split(want, "|")[2]
			if got != "NXDOMAIN; 15 "+reason {
				t.Errorf("%s: %q", name, got)
			}
			if got := a.refusals(); !slices.Equal(got, []string{want}) {
				t.Errorf("%s: logged %q", name, got)
			}
		}
	}
	if questions.Load() != 1 {
		t.Errorf("%d questions left the host", questions.Load())
	}
	a.setPolicy(netpolicy.Internet, nil, []string{"*.allowed.test"})
	if got := summary(a.ask("other.test.", dns.TypeA)); !strings.HasPrefix(got, "NOERROR") {
		t.Errorf("after a change: %q", got)
	}
	if got := summary(a.ask("a.allowed.test.", dns.TypeA)); !strings.HasPrefix(got, "NXDOMAIN; 15 denied by the rule") {
		t.Errorf("after a change: %q", got)
	}
	if got := summary(a.ask("host.banger.internal.", dns.TypeA)); !strings.HasSuffix(got, "10.0.2.2") {
		t.Errorf("the gateway: %q", got)
	}
}

// TestDNSBlockedWithoutEDNS: what the answer has no room for is left out.
func TestDNSBlockedWithoutEDNS(t *testing.T) {
	label := strings.Repeat("x", 60)
	name := strings.Join([]string{label, label, label, label, "example"}, ".")
	a := newAsked(t, "")
	a.setPolicy(netpolicy.Internet, nil, []string{name})
	m := question(name+".", dns.TypeA)
	m.IsEdns0().SetUDPSize(dnsLeast)
	if got := summary(a.send(m, false)); !strings.HasPrefix(got, "NXDOMAIN; 15 denied by the rule") {
		t.Errorf("with EDNS: %q", got)
	}
	m.Extra = nil
	if got := summary(a.send(m, false)); got != "NXDOMAIN" {
		t.Errorf("without EDNS: %q", got)
	}
	if got := a.refusals(); len(got) != 2 {
		t.Errorf("logged %q", got)
	}
}

// TestDNSAllowedButUnknown: a rule with a name that nobody has is told, and no other name.
func TestDNSAllowedButUnknown(t *testing.T) {
	var rcode atomic.Int64
	rcode.Store(dns.RcodeNameError)
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		w.WriteMsg(new(dns.Msg).SetRcode(q, int(rcode.Load())))
	}))
	a.setPolicy(netpolicy.Internet, []string{"typo.test:443", "*.wide.test"}, []string{"denied.test:80"})
	for _, name := range []string{"TYPO.test.", "typo.test.search.example.", "a.wide.test.", "denied.test.", "other.test."} {
		if got := summary(a.ask(name, dns.TypeA)); got != "NXDOMAIN" {
			t.Errorf("%s: %q", name, got)
		}
	}
	want := netwire.Entry{Event: "failed", Protocol: "dns", Target: "typo.test", Name: "typo.test",
		Reason: "does not resolve, though a rule allows it", Hint: "getent hosts typo.test"}
	if len(a.entries) != 1 || a.entries[0] != want {
		t.Errorf("logged %+v", a.entries)
	}
	rcode.Store(dns.RcodeSuccess)
	a.ask("typo.test.", dns.TypeA)
	if len(a.entries) != 1 {
		t.Errorf("a name without addresses is logged: %+v", a.entries[1:])
	}
}

// TestDNSHugeAnswer: the header promises 60,000 records, the packet has as many as fit.
func TestDNSHugeAnswer(t *testing.T) {
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		m := new(dns.Msg).SetReply(q)
		m.Truncated = w.LocalAddr().Network() == "udp"
		packet, _ := m.Pack()
		for i := 0; !m.Truncated && len(packet)+16 <= dns.MaxMsgSize; i++ {
			packet = append(packet, 0xc0, dnsHeader, 0, 1, 0, 1, 0, 0, 1, 0, 0, 4, 203, 0, byte(i>>8), byte(i))
		}
		packet[6], packet[7] = 0xea, 0x60
		w.Write(packet)
	}))
	m := a.send(question("q.example.", dns.TypeA), true)
	if m.Rcode != dns.RcodeSuccess || len(m.Answer) != answerRecords || m.Truncated {
		t.Errorf("%s with %d records", dns.RcodeToString[m.Rcode], len(m.Answer))
	}
	if got := len(a.names.byAddr); got != answerRecords {
		t.Errorf("learned %d addresses", got)
	}
	m = a.send(question("q.example.", dns.TypeA), false)
	if len(m.Answer) < 100 || !m.Truncated {
		t.Errorf("by UDP: %d records", len(m.Answer))
	}
	a.setPolicy(netpolicy.Internet, nil, nil)
	a.own = func(netip.Addr) bool { return true }
	if m = a.send(question("q.example.", dns.TypeA), true); len(m.Answer) != 0 || len(a.refusals()) != answerLogged {
		t.Errorf("refused: %v", m)
	}
}

func TestDNSTruncates(t *testing.T) {
	var records []string
	for i := range 200 {
		records = append(records, fmt.Sprintf("q.example. A 203.0.113.%d", i))
	}
	a := newAsked(t, "nameserver "+serve(t, zone(records...)))
	for _, c := range []struct {
		size, most int
		tcp        bool
	}{{0, 512, false}, {100, 512, false}, {1232, 1232, false}, {65535, 4096, false}, {0, 65535, true}, {512, 65535, true}} {
		m := new(dns.Msg).SetQuestion("q.example.", dns.TypeA)
		if c.size > 0 {
			m.SetEdns0(uint16(c.size), false)
		}
		packet, _ := m.Pack()
		out := a.exchange(t.Context(), packet, c.tcp)
		var got dns.Msg
		if err := got.Unpack(out); err != nil {
			t.Fatal(err)
		}
		whole := len(got.Answer) == len(records)
		if len(out) > c.most || len(out) < min(c.most, 3000)*9/10 || got.Truncated == whole {
			t.Errorf("%+v: %d bytes, %d records, cut: %t", c, len(out), len(got.Answer), got.Truncated)
		}
	}
}

func TestDNSWhatIsNoQuestion(t *testing.T) {
	a := newAsked(t, "")
	good, _ := question("host.banger.internal.", dns.TypeA).Pack()
	with := func(change func(p []byte) []byte) []byte { return change(slices.Clone(good)) }
	for about, c := range map[string]struct {
		packet []byte
		rcode  int // -1: silence
	}{
		"nothing":         {nil, -1},
		"a short header":  {good[:11], -1},
		"an answer":       {with(func(p []byte) []byte { p[2] |= 0x80; return p }), -1},
		"a header alone":  {good[:12], dns.RcodeFormatError},
		"cut":             {good[:20], dns.RcodeFormatError},
		"notify":          {with(func(p []byte) []byte { p[2] = 4 << 3; return p }), dns.RcodeNotImplemented},
		"no question":     {with(func(p []byte) []byte { p[5] = 0; return p }), dns.RcodeFormatError},
		"two questions":   {with(func(p []byte) []byte { p[5] = 2; return p }), dns.RcodeFormatError},
		"with an answer":  {with(func(p []byte) []byte { p[7] = 1; return p }), dns.RcodeFormatError},
		"much additional": {with(func(p []byte) []byte { p[11] = 3; return p }), dns.RcodeFormatError},
		"too long":        {append(slices.Clone(good), make([]byte, dnsQuery)...), dns.RcodeFormatError},
		"a loop":          {with(func(p []byte) []byte { p[12], p[13] = 0xc0, 12; return p }), dns.RcodeFormatError},
		"a long label":    {with(func(p []byte) []byte { p[12] = 0x80; return p }), dns.RcodeFormatError},
		"bytes after":     {append(slices.Clone(good), 1, 2, 3), dns.RcodeSuccess},
		"EDNS version 1":  {with(func(p []byte) []byte { p[len(p)-5] = 1; return p }), dns.RcodeBadVers},
		"two OPT":         {with(func(p []byte) []byte { p[11] = 2; return append(p, p[len(p)-11:]...) }), dns.RcodeFormatError},
	} {
		out := a.exchange(t.Context(), c.packet, false)
		if c.rcode < 0 {
			if out != nil {
				t.Errorf("%s: %x", about, out)
			}
			continue
		}
		var m dns.Msg
		if err := m.Unpack(out); err != nil || m.Rcode != c.rcode || !m.Response || out[0] != good[0] || out[1] != good[1] || !m.RecursionDesired != (about == "notify") {
			t.Errorf("%s: %v, %v", about, err, &m)
		}
	}
}

func TestDNSEndsWithItsContext(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		once.Do(func() { close(started) })
		<-release
	}))
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithCancel(t.Context())
	packet, _ := question("q.example.", dns.TypeA).Pack()
	done := make(chan []byte, 1)
	go func() { done <- a.exchange(ctx, packet, false) }()
	<-started
	cancel()
	select {
	case out := <-done:
		if len(out) < 12 || out[3]&15 != dns.RcodeServerFailure {
			t.Errorf("%x", out)
		}
	case <-time.After(time.Minute):
		t.Fatal("it goes on")
	}
	if got := a.refusals(); len(got) != 0 {
		t.Errorf("logged %q", got)
	}
}

package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"reflect"
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

// serve runs a DNS server on the loopback, by UDP and TCP on one port, and returns its
// address as resolv.conf has it.
func serve(t *testing.T, handler dns.HandlerFunc) string {
	t.Helper()
	for range 20 {
		packets, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listener, err := net.Listen("tcp", packets.LocalAddr().String())
		if err != nil {
			packets.Close() // somebody has that port for TCP
			continue
		}
		for _, s := range []*dns.Server{{PacketConn: packets, Handler: handler}, {Listener: listener, Handler: handler}} {
			started := make(chan struct{})
			s.NotifyStartedFunc = func() { close(started) }
			go s.ActivateAndServe()
			<-started
			t.Cleanup(func() {
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				s.ShutdownContext(ctx)
			})
		}
		return bracketed(packets.LocalAddr())
	}
	t.Fatal("no port is free for UDP and TCP")
	return ""
}

func bracketed(addr net.Addr) string {
	host, port, _ := net.SplitHostPort(addr.String())
	return "[" + host + "]:" + port
}

// deaf is a server that answers by hand: raw gets each packet and a function that answers.
func deaf(t *testing.T, raw func(packet []byte, from net.Addr, conn net.PacketConn)) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		buffer := make([]byte, 4096)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			raw(slices.Clone(buffer[:n]), from, conn)
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return bracketed(conn.LocalAddr())
}

// closedPort is a server that is not there.
func closedPort(t *testing.T) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	return bracketed(conn.LocalAddr())
}

func TestResolvConf(t *testing.T) {
	for text, want := range map[string]string{
		"":                        "[]",
		"nameserver 127.0.0.53\n": "[127.0.0.53:53]",
		"# nameserver 192.0.2.9\n;x\nsearch a b\nnameserver\t192.0.2.1 # x\nnameserver 192.0.2.1\nnameserver ::1\noptions ndots:5\nnameserver fe80::1%eth0\nnameserver 192.0.2.4": "[192.0.2.1:53 [::1]:53 [fe80::1%eth0]:53]",
		"nameserver\nnameserver x\nnameserver 1.2.3\nnameserver [192.0.2.1]:5353\nnameserver [::1]:54\nnameserver [::1]:0":                                                        "[192.0.2.1:5353 [::1]:54]",
		strings.Repeat("x", 1<<17) + "\nnameserver 192.0.2.1": "[]",
	} {
		if got := fmt.Sprint(parseResolvConf([]byte(text))); got != want {
			t.Errorf("%.80q: %s, want %s", text, got, want)
		}
	}
}

// TestUpstreamIsAway: the answer says why. One that waited would say that the resolver
// does not answer.
func TestUpstreamIsAway(t *testing.T) {
	closed := closedPort(t)
	address := strings.NewReplacer("[", "", "]", "").Replace(closed)
	for conf, want := range map[string]string{
		"":                     "the host has no resolver",
		"search example\n":     "the host has no resolver",
		"nameserver " + closed: "the host cannot reach its resolver",
		"nameserver " + closed + "\nnameserver " + closedPort(t): "the host cannot reach its resolver",
	} {
		a := newAsked(t, conf)
		target := address
		if !strings.Contains(conf, "nameserver") {
			target = a.upstream.path
		}
		if got := summary(a.ask("q.example.", dns.TypeA)); got != "SERVFAIL; 22 "+want {
			t.Errorf("%q: %q", conf, got)
		}
		if a.entries[0].Hint != "cat /etc/resolv.conf" {
			t.Errorf("%q: the hint is %q", conf, a.entries[0].Hint)
		}
		if got := a.refusals(); !slices.Equal(got, []string{"dns|" + target + "|" + want + "|"}) {
			t.Errorf("%q: logged %q", conf, got)
		}
	}
	a := newAsked(t, "")
	os.Remove(a.upstream.path)
	if got := summary(a.ask("q.example.", dns.TypeA)); got != "SERVFAIL; 22 the host has no resolver" {
		t.Errorf("no file: %q", got)
	}
}

func TestUpstreamFollowsResolvConf(t *testing.T) {
	a := newAsked(t, "nameserver "+serve(t, zone("q.example. A 203.0.113.1")))
	second := serve(t, zone("q.example. A 203.0.113.2"))
	first := summary(a.ask("q.example.", dns.TypeA))
	if !strings.HasSuffix(first, "203.0.113.1") {
		t.Fatal(first)
	}
	until := func(want, how string) {
		deadline := time.Now().Add(30 * time.Second)
		for {
			got := summary(a.ask("q.example.", dns.TypeA))
			if strings.Contains(got, want) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: still %q", how, got)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
	next := a.upstream.path + ".new"
	if err := os.WriteFile(next, []byte("nameserver "+second), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, a.upstream.path); err != nil {
		t.Fatal(err)
	}
	until("203.0.113.2", "replaced")
	if err := os.Remove(a.upstream.path); err != nil {
		t.Fatal(err)
	}
	until("the host has no resolver", "removed")
	if err := os.WriteFile(a.upstream.path, []byte("nameserver "+second), 0o600); err != nil {
		t.Fatal(err)
	}
	until("203.0.113.2", "back")
}

func TestUpstreamAsksAgainByTCP(t *testing.T) {
	var records []string
	for i := range 100 {
		records = append(records, fmt.Sprintf("q.example. TXT \"%d %s\"", i, strings.Repeat("x", 200)))
	}
	var tcp atomic.Int64
	handler := zone(records...)
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		if w.LocalAddr().Network() == "tcp" {
			tcp.Add(1)
		}
		handler(w, q)
	}))
	m := a.send(question("q.example.", dns.TypeTXT), true)
	if len(m.Answer) != len(records) || tcp.Load() != 1 {
		t.Errorf("%d records, %d times by TCP", len(m.Answer), tcp.Load())
	}
}

// TestUpstreamIgnoresStrays: what does not answer the question does not end the wait.
func TestUpstreamIgnoresStrays(t *testing.T) {
	other, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	server := deaf(t, func(packet []byte, from net.Addr, conn net.PacketConn) {
		var q dns.Msg
		if q.Unpack(packet) != nil {
			return
		}
		send := func(via net.PacketConn, address string, change func(m *dns.Msg)) {
			m := new(dns.Msg).SetReply(&q)
			m.Question = slices.Clone(m.Question)
			rr, _ := dns.NewRR(q.Question[0].Name + " A " + address)
			m.Answer = []dns.RR{rr}
			change(m)
			out, _ := m.Pack()
			via.WriteTo(out, from)
		}
		send(other, "203.0.113.1", func(m *dns.Msg) {})
		conn.WriteTo([]byte("x"), from)
		send(conn, "203.0.113.2", func(m *dns.Msg) { m.Id++ })
		send(conn, "203.0.113.3", func(m *dns.Msg) { m.Question[0].Name = "other.example." })
		send(conn, "203.0.113.4", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeMX })
		send(conn, "203.0.113.5", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS })
		send(conn, "203.0.113.6", func(m *dns.Msg) { m.Question = nil })
		send(conn, "203.0.113.7", func(m *dns.Msg) { m.Response = false })
		send(conn, "203.0.113.8", func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify })
		send(conn, "203.0.113.9", func(m *dns.Msg) { m.Question[0].Name = strings.ToUpper(m.Question[0].Name) })
	})
	a := newAsked(t, "nameserver "+server)
	if got := summary(a.ask("q.example.", dns.TypeA)); got != "NOERROR; q.example. A 203.0.113.9" {
		t.Errorf("%q", got)
	}
}

func TestUpstreamNextServer(t *testing.T) {
	good := serve(t, zone("q.example. A 203.0.113.9"))
	failing := func(rcode int) string {
		return serve(t, func(w dns.ResponseWriter, q *dns.Msg) { w.WriteMsg(new(dns.Msg).SetRcode(q, rcode)) })
	}
	for about, first := range map[string]string{
		"SERVFAIL": failing(dns.RcodeServerFailure),
		"REFUSED":  failing(dns.RcodeRefused),
		"closed":   closedPort(t),
		"silent":   deaf(t, func([]byte, net.Addr, net.PacketConn) {}),
		"garbage": deaf(t, func(p []byte, from net.Addr, conn net.PacketConn) {
			p[2] |= 0x80
			p[7] = 9
			conn.WriteTo(p, from)
		}),
		"a header alone": deaf(t, func(p []byte, from net.Addr, conn net.PacketConn) {
			conn.WriteTo([]byte{p[0], p[1], 0x80, dns.RcodeRefused, 0, 0, 0, 0, 0, 0, 0, 0}, from)
		}),
		"cut without TCP": deaf(t, func(p []byte, from net.Addr, conn net.PacketConn) {
			p[2] |= 0x82
			conn.WriteTo(p, from)
		}),
	} {
		t.Run(about, func(t *testing.T) {
			t.Parallel()
			a := newAsked(t, "nameserver "+first+"\nnameserver "+good)
			if got := summary(a.ask("q.example.", dns.TypeA)); got != "NOERROR; q.example. A 203.0.113.9" {
				t.Errorf("%q", got)
			}
			if got := a.refusals(); len(got) != 0 {
				t.Errorf("logged %q", got)
			}
		})
	}
	t.Run("none is good", func(t *testing.T) {
		t.Parallel()
		a := newAsked(t, "nameserver "+closedPort(t)+"\nnameserver "+failing(dns.RcodeServerFailure))
		if got := summary(a.ask("q.example.", dns.TypeA)); got != "SERVFAIL" {
			t.Errorf("%q", got)
		}
	})
	t.Run("all are silent", func(t *testing.T) {
		t.Parallel()
		a := newAsked(t, "nameserver "+deaf(t, func([]byte, net.Addr, net.PacketConn) {}))
		if got := summary(a.ask("q.example.", dns.TypeA)); got != "SERVFAIL; 22 the host's resolver does not answer" {
			t.Errorf("%q", got)
		}
	})
}

// TestUpstreamWithoutEDNS: an old server gets the question once more as it knows it.
func TestUpstreamWithoutEDNS(t *testing.T) {
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		if q.IsEdns0() != nil {
			w.WriteMsg(new(dns.Msg).SetRcode(q, dns.RcodeFormatError))
			return
		}
		zone("q.example. A 203.0.113.9")(w, q)
	}))
	if got := summary(a.ask("q.example.", dns.TypeA)); got != "NOERROR; q.example. A 203.0.113.9" {
		t.Errorf("%q", got)
	}
}

// TestUpstreamSeesLittle: of the guest's packet only the question and three bits leave the
// host, each time with another id from another port.
func TestUpstreamSeesLittle(t *testing.T) {
	type seen struct {
		m    *dns.Msg
		from string
	}
	var mu sync.Mutex
	var all []seen
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		mu.Lock()
		all = append(all, seen{q.Copy(), w.RemoteAddr().String()})
		mu.Unlock()
		m := new(dns.Msg).SetReply(q)
		m.AuthenticatedData = true
		w.WriteMsg(m)
	}))
	ids, ports := make(map[uint16]bool), make(map[string]bool)
	for i := range 32 {
		m := question("q.example.", dns.TypeTXT)
		m.Id, m.RecursionDesired, m.CheckingDisabled = 7, i%2 == 0, i%4 == 0
		opt := m.IsEdns0()
		if i%2 == 0 {
			opt.SetDo()
		}
		opt.Option = append(opt.Option, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.IPv4(203, 0, 113, 0)})
		answer := a.send(m, false)
		if !answer.AuthenticatedData || answer.CheckingDisabled != m.CheckingDisabled || answer.IsEdns0().Do() != opt.Do() {
			t.Errorf("%v", answer)
		}
		mu.Lock()
		got := all[len(all)-1]
		mu.Unlock()
		sent := got.m.IsEdns0()
		if !got.m.RecursionDesired || got.m.CheckingDisabled != m.CheckingDisabled || sent == nil || sent.Do() != opt.Do() || sent.UDPSize() != upstreamUDP || len(sent.Option) != 0 {
			t.Errorf("sent %v", got.m)
		}
		ids[got.m.Id], ports[got.from] = true, true
	}
	if len(ids) < 16 || len(ports) < 16 {
		t.Errorf("%d ids and %d ports in 32 questions", len(ids), len(ports))
	}
}

func TestUpstreamIsBounded(t *testing.T) {
	a := newAsked(t, "nameserver "+serve(t, zone("q.example. A 203.0.113.9")))
	for range upstreamInFlight {
		a.upstream.slots <- struct{}{}
	}
	if got := summary(a.ask("q.example.", dns.TypeA)); got != "SERVFAIL; 22 too many questions are open" {
		t.Errorf("%q", got)
	}
	<-a.upstream.slots
	if got := summary(a.ask("q.example.", dns.TypeA)); got != "NOERROR; q.example. A 203.0.113.9" {
		t.Errorf("%q", got)
	}
	if len(a.upstream.slots) != upstreamInFlight-1 || len(a.upstream.tcp) != 0 {
		t.Error("a slot is not given back")
	}
}

// tcpPair connects two ends on the loopback.
func tcpPair(t *testing.T) (client *net.TCPConn, server net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); server.Close() })
	conn.SetDeadline(time.Now().Add(time.Minute))
	return conn.(*net.TCPConn), server
}

// TestDNSByTCP: many questions at once, answered even to a client that sends no more.
func TestDNSByTCP(t *testing.T) {
	a := newAsked(t, "nameserver "+serve(t, func(w dns.ResponseWriter, q *dns.Msg) {
		zone(q.Question[0].Name+" A 203.0.113.9")(w, q)
	}))
	client, server := tcpPair(t)
	done := make(chan struct{})
	go func() { defer close(done); a.serveTCP(t.Context(), server) }()
	const questions = 3 * dnsPipelined
	for i := range questions {
		m := question(fmt.Sprintf("%d.example.", i), dns.TypeA)
		m.Id = uint16(i)
		packet, _ := m.Pack()
		if _, err := client.Write(frame(packet)); err != nil {
			t.Fatal(err)
		}
	}
	client.CloseWrite()
	got := make(map[uint16]string)
	for range questions {
		packet, err := readFrame(client, dns.MaxMsgSize)
		if err != nil {
			t.Fatal(err)
		}
		var m dns.Msg
		if err := m.Unpack(packet); err != nil {
			t.Fatal(err)
		}
		got[m.Id] = summary(&m)
	}
	for i := range questions {
		if want := fmt.Sprintf("NOERROR; %d.example. A 203.0.113.9", i); got[uint16(i)] != want {
			t.Errorf("%q, want %q", got[uint16(i)], want)
		}
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("after the last answer: %v", err)
	}
	<-done
}

// TestDNSByTCPEnds: with its context, and with a client that sends no DNS.
func TestDNSByTCPEnds(t *testing.T) {
	a := newAsked(t, "")
	for about, c := range map[string]struct {
		send   []byte
		cancel bool
	}{
		"cancelled":   {nil, true},
		"too long":    {[]byte{0xff, 0xff, 1, 2, 3}, false},
		"no question": {[]byte{0, 0}, false},
	} {
		client, server := tcpPair(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan struct{})
		go func() { defer close(done); a.serveTCP(ctx, server) }()
		client.Write(c.send)
		if c.cancel {
			cancel()
		}
		if _, err := client.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
			t.Errorf("%s: %v", about, err)
		}
		<-done
	}
}

// FuzzExchange: whatever a guest sends, and a policy that forbids all.
func FuzzExchange(f *testing.F) {
	good, _ := question("q.example.", dns.TypeA).Pack()
	f.Add(good, false)
	f.Add(good[:12], true)
	local, _ := question(`a\.b.host.banger.internal.`, dns.TypeANY).Pack()
	f.Add(local, true)
	reversed, _ := question("1.0.0.10.in-addr.arpa.", dns.TypePTR).Pack()
	f.Add(reversed, false)
	internet, err := netpolicy.New(netpolicy.Internet, nil, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, packet []byte, open bool) {
		r := newResolver(resolverOptions{
			policy: func() netpolicy.Policy {
				if open {
					return internet
				}
				return netpolicy.Policy{}
			},
			own: func(netip.Addr) bool { return false }, refuse: func(netwire.Entry) {},
			names: newNames(), resolvConf: "/nonexistent", hostAddr: netwire.Gateway(),
		})
		out := r.exchange(t.Context(), packet, open)
		if out == nil {
			if len(packet) >= 12 && packet[2]&0x80 == 0 {
				t.Fatal("silence")
			}
			return
		}
		if len(out) < 12 || out[0] != packet[0] || out[1] != packet[1] || out[2]&0x80 == 0 || !open && len(out) > 4096 {
			t.Fatalf("%x", out)
		}
		if new(dns.Msg).Unpack(out) != nil {
			t.Fatalf("cannot be read: %x", out)
		}
	})
}

// FuzzAnswer: whatever a server sends, no address passes that the policy forbids, and what
// passes is written so that it is read as the same.
func FuzzAnswer(f *testing.F) {
	m := &dnsMessage{id: 1, question: dnsQuestion{newName("q.example"), typeA, classINET}}
	reply := question("q.example.", dns.TypeA)
	reply.Id, reply.Response, reply.Compress = 1, true, true
	for _, text := range []string{
		"q.example. A 203.0.113.9", "q.example. A 10.0.0.1", "q.example. CNAME b.example.", `q.example. HTTPS 1 . ipv4hint="10.1.2.3"`,
		`q.example. SVCB 1 b.example. mandatory="alpn" alpn="h2" ipv6hint="::1"`, "q.example. MX 1 m.q.example.", `q.example. NAPTR 1 2 "s" "x" "" b.example.`,
	} {
		rr, err := dns.NewRR(text)
		if err != nil {
			f.Fatal(err)
		}
		reply.Answer = append(reply.Answer, rr)
		reply.Extra = append(reply.Extra, rr)
		packet, err := reply.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packet)
	}
	internet, err := netpolicy.New(netpolicy.Internet, nil, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, packet []byte) {
		answer, err := parseAnswer(packet, m)
		if err != nil {
			return
		}
		r := newResolver(resolverOptions{
			policy: func() netpolicy.Policy { return internet },
			own:    func(netip.Addr) bool { return false }, refuse: func(netwire.Entry) {},
			names: newNames(), hostAddr: netwire.Gateway(),
		})
		c := r.clean(answer)
		for _, rr := range slices.Concat(c.answer, c.ns, c.extra) {
			switch rr.kind {
			case typeAAAA:
				t.Fatalf("%v", rr)
			case typeA:
				addr, ok := netip.AddrFromSlice(rr.data)
				if !ok || !internet.Answer("q.example", addr, false).Allowed || r.names.lookup(addr) == nil {
					t.Fatalf("%v", rr)
				}
			}
		}
		cleaned := &dnsMessage{id: 1, bits: bitResponse, question: m.question, answer: c.answer, ns: c.ns, extra: c.extra}
		again, err := parseAnswer(cleaned.pack(dnsMost, nil), m)
		if err != nil {
			t.Fatal(err)
		}
		if !again.truncated() && !reflect.DeepEqual(again, cleaned) {
			t.Fatalf("written %v, read %v", cleaned, again)
		}
	})
}

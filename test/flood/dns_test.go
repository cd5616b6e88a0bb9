package flood

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"banger/internal/netwire"
)

func dnsAttacks() []attack {
	return []attack{
		{name: "100,000 questions", network: internet(), run: questions},
		{name: "20,000 questions that nobody answers", network: internet(), run: unanswered},
		{name: "2,000 questions, answers of 10,000 records", network: internet(), run: bigRecords},
		{name: "20,000 long names with 16 addresses each", network: internet(), run: longNames},
		{name: "50,000 half-open connections to the resolver", network: internet(), run: resolverHalfOpen},
		{name: "500 connections to the resolver, unread", network: internet(), run: resolverUnread},
	}
}

// serveDNS is the host's resolver: names below silent get no answer, those below big 10,000
// records, those below many 16 addresses, all others one.
func serveDNS(t *testing.T, there func(func())) {
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		name := q.Question[0].Name
		answer := new(dns.Msg)
		answer.SetReply(q)
		count := 1
		switch {
		case strings.HasSuffix(name, "silent."):
			return
		case strings.HasSuffix(name, "many."):
			count = 16
		case strings.HasSuffix(name, "big."):
			if count = 10_000; w.RemoteAddr().Network() == "udp" {
				answer.Truncated, count = true, 0
			}
		}
		if count < 10_000 {
			for i := range count {
				answer.Answer = append(answer.Answer, &dns.A{
					Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60},
					A:   net.IPv4(203, byte(len(name)), q.Question[0].Name[0], byte(i)),
				})
			}
			w.WriteMsg(answer)
			return
		}
		w.Write(manyRecords(answer))
	})
	var datagrams net.PacketConn
	var listener net.Listener
	var errs [2]error
	there(func() {
		datagrams, errs[0] = net.ListenPacket("udp", resolver+":53")
		listener, errs[1] = net.Listen("tcp", resolver+":53")
	})
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: datagrams, Handler: handler}, {Listener: listener, Handler: handler}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go s.ActivateAndServe()
		<-started
		t.Cleanup(func() { s.Shutdown() })
	}
}

// manyRecords is an answer with as many addresses as fit, which says that there are 10,000.
func manyRecords(answer *dns.Msg) []byte {
	packet, err := answer.Pack()
	if err != nil {
		panic(err)
	}
	binary.BigEndian.PutUint16(packet[6:], 10_000)
	for i := 0; len(packet)+16 < dns.MaxMsgSize; i++ {
		packet = append(packet, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, byte(i>>8), byte(i))
	}
	return packet
}

func question(name string, id uint16) []byte {
	q := new(dns.Msg)
	q.SetQuestion(name, dns.TypeA)
	q.Id = id
	q.SetEdns0(4096, false)
	packet, err := q.Pack()
	if err != nil {
		panic(err)
	}
	return packet
}

func ask(g *guest, count int, name func(i int) string) {
	for i := range count {
		g.push(udpFrame(uint16(1024+i%40_000), at(53), question(name(i), uint16(i))))
	}
	g.settle()
}

func questions(t *testing.T, g *guest) {
	ask(g, 100_000, func(i int) string { return fmt.Sprintf("n%d.test.", i) })
}

func unanswered(t *testing.T, g *guest) {
	ask(g, 20_000, func(i int) string { return fmt.Sprintf("n%d.silent.", i) })
}

func bigRecords(t *testing.T, g *guest) {
	for i := range 20 {
		ask(g, 100, func(j int) string { return fmt.Sprintf("n%d-%d.big.", i, j) })
		time.Sleep(20 * time.Millisecond) // not all at once, of which most would be lost
	}
}

func longNames(t *testing.T, g *guest) {
	label := strings.Repeat("x", 60)
	for i := range 200 {
		ask(g, 100, func(j int) string {
			return fmt.Sprintf("%c%d-%d.%s.%s.%s.many.", 'a'+rune(i%26), i, j, label, label, label)
		})
		time.Sleep(5 * time.Millisecond)
	}
}

func resolverHalfOpen(t *testing.T, g *guest) {
	h := newHand(g)
	h.greets = false
	for i := range 50_000 {
		h.open(uint16(1024+i), at(53))
	}
	g.settle()
	h.leave()
}

// resolverUnread: connections with big answers, which nobody takes.
func resolverUnread(t *testing.T, g *guest) {
	h := newHand(g)
	h.opened = func(c *handConn) {
		q := question(fmt.Sprintf("n%d.big.", c.from), 1)
		framed := append(binary.BigEndian.AppendUint16(nil, uint16(len(q))), q...)
		for range 40 {
			h.segment(c, header.TCPFlagPsh, framed)
		}
	}
	for i := range 500 {
		h.open(uint16(1024+i), at(53))
	}
	g.settle()
	g.steady()
	time.Sleep(2 * time.Second)
	g.until("the resolver is free", func() bool { return g.asks(netip.AddrPortFrom(netwire.Gateway(), 53)) == nil })
	h.leave()
}

// asks asks the resolver by TCP, ordinarily.
func (g *guest) asks(at netip.AddrPort) error {
	conn, err := g.dial(at)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	client := &dns.Conn{Conn: conn}
	q := new(dns.Msg)
	q.SetQuestion("ordinary.test.", dns.TypeA)
	if err := client.WriteMsg(q); err != nil {
		return err
	}
	_, err = client.ReadMsg()
	return err
}

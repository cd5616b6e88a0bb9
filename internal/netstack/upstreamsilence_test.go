package netstack

import (
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestUpstreamRemembersSilence: a server that was silent costs one question its time, not
// each; it is asked again, by one question, and has its place back when it answers.
func TestUpstreamRemembersSilence(t *testing.T) {
	var asked atomic.Int64
	var speaks atomic.Bool
	first := deaf(t, func(p []byte, from net.Addr, conn net.PacketConn) {
		asked.Add(1)
		var q dns.Msg
		if !speaks.Load() || q.Unpack(p) != nil {
			return
		}
		m := new(dns.Msg).SetReply(&q)
		rr, _ := dns.NewRR("q.example. A 203.0.113.1")
		m.Answer = []dns.RR{rr}
		out, _ := m.Pack()
		conn.WriteTo(out, from)
	})
	a := newAsked(t, "nameserver "+first+"\nnameserver "+serve(t, zone("q.example. A 203.0.113.2")))
	server := a.upstream.current()[0]
	over := func() { // as if upstreamSilence had gone by
		a.upstream.mu.Lock()
		defer a.upstream.mu.Unlock()
		if _, ok := a.upstream.silent[server]; !ok {
			t.Error("the silence is not remembered")
		}
		a.upstream.silent[server] = time.Now()
	}
	want := func(answer string, questions int64) {
		t.Helper()
		if got := summary(a.ask("q.example.", dns.TypeA)); !strings.HasSuffix(got, answer) || asked.Load() != questions {
			t.Errorf("%q; the first server has %d questions, want %d", got, asked.Load(), questions)
		}
	}
	for range 3 {
		want("203.0.113.2", 1)
	}
	over()
	for range 3 {
		want("203.0.113.2", 2)
	}
	over()
	if order := a.upstream.inOrder(a.upstream.current()); order[0] != server {
		t.Errorf("the silent one is not asked again: %v", order)
	}
	if order := a.upstream.inOrder(a.upstream.current()); order[1] != server {
		t.Errorf("it is asked again by each: %v", order)
	}
	speaks.Store(true)
	over()
	for i := range int64(3) {
		want("203.0.113.1", 3+i)
	}
	if len(a.upstream.silent) != 0 {
		t.Errorf("still remembered: %v", a.upstream.silent)
	}
}

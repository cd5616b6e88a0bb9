package netstack

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// stopped is a clock that a test moves.
type stopped struct{ at time.Time }

func (c *stopped) now() time.Time { return c.at }

func stoppedNames() (*names, *stopped) {
	clock := &stopped{time.Unix(1_000_000, 0)}
	n := newNames()
	n.now = clock.now
	return n, clock
}

func TestNamesLiveAsLongAsTheAnswer(t *testing.T) {
	addr := netip.MustParseAddr("203.0.113.7")
	for ttl, want := range map[time.Duration]time.Duration{
		0:                nameLeast + namesGrace,
		10 * time.Minute: 10*time.Minute + namesGrace,
		1 << 31 * 1e9:    answerTTL + namesGrace,
	} {
		n, clock := stoppedNames()
		n.learn([]string{"b.example", "a.example"}, addr, ttl)
		clock.at = clock.at.Add(want - 1)
		if got := n.lookup(netip.AddrFrom16(addr.As16())); !slices.Equal(got, []string{"a.example", "b.example"}) {
			t.Errorf("ttl %s: just before the end: %q", ttl, got)
		}
		n.learn([]string{"a.example"}, addr, 0) // does not shorten, and here prolongs
		clock.at = clock.at.Add(1)
		if got := n.lookup(addr); !slices.Equal(got, []string{"a.example"}) {
			t.Errorf("ttl %s: at the end: %q", ttl, got)
		}
		clock.at = clock.at.Add(time.Hour)
		if got := n.lookup(addr); got != nil || len(n.byAddr) != 0 || n.total != 0 {
			t.Errorf("ttl %s: later: %q, %d addresses, %d names", ttl, got, len(n.byAddr), n.total)
		}
	}
}

func TestNamesThatNoRuleMayMatch(t *testing.T) {
	n, _ := stoppedNames()
	addr := netip.MustParseAddr("203.0.113.7")
	n.learn([]string{`evil\.example.org`, `evil\046example.org`, strings.Repeat("a", 254), ""}, addr, time.Hour)
	if got := n.lookup(addr); got != nil {
		t.Errorf("learned %q", got)
	}
	n.learn([]string{`a\\.example.org`, `a\032b.example.org`}, addr, time.Hour)
	if got := n.lookup(addr); len(got) != 2 {
		t.Errorf("learned only %q", got)
	}
}

func TestNamesAreBounded(t *testing.T) {
	n, clock := stoppedNames()
	address := func(i int) netip.Addr { return netip.AddrFrom4([4]byte{203, byte(i >> 16), byte(i >> 8), byte(i)}) }
	for i := range namesAddresses + 10 {
		n.learn([]string{"name.example"}, address(i), time.Hour)
		n.learn([]string{"first.example"}, address(0), time.Hour) // keeps it the youngest
	}
	if len(n.byAddr) != namesAddresses || n.order.Len() != namesAddresses {
		t.Errorf("%d addresses, %d in order", len(n.byAddr), n.order.Len())
	}
	if n.lookup(address(1)) != nil || n.lookup(address(0)) == nil || n.lookup(address(namesAddresses)) == nil {
		t.Error("not the oldest went")
	}
	for i := range namesPerAddress + 1 {
		n.learn([]string{fmt.Sprintf("%d.example", i)}, address(2), time.Hour)
		clock.at = clock.at.Add(time.Second)
	}
	got := n.lookup(address(2))
	if len(got) != namesPerAddress || slices.Contains(got, "0.example") || !slices.Contains(got, "16.example") {
		t.Errorf("names of one address: %q", got)
	}
	for i := range 2 * namesTotal {
		n.learn([]string{fmt.Sprintf("%d.example", i)}, address(i%namesAddresses), time.Hour)
	}
	if n.total > namesTotal {
		t.Errorf("%d names", n.total)
	}
}

// TestNamesAgainstModel: whatever is learned in which order, lookup gives what lives.
func TestNamesAgainstModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, clock := stoppedNames()
		model := make(map[netip.Addr]map[string]time.Time)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			addr := netip.AddrFrom4([4]byte{203, 0, 113, byte(rapid.IntRange(0, 5).Draw(t, "addr"))})
			if rapid.Bool().Draw(t, "wait") {
				clock.at = clock.at.Add(time.Duration(rapid.IntRange(0, 300).Draw(t, "seconds")) * time.Second)
			} else {
				name := fmt.Sprintf("%d.example", rapid.IntRange(0, namesPerAddress-1).Draw(t, "name"))
				ttl := time.Duration(rapid.IntRange(0, 400).Draw(t, "ttl")) * time.Second
				n.learn([]string{name}, addr, ttl)
				if model[addr] == nil {
					model[addr] = make(map[string]time.Time)
				}
				until := clock.at.Add(max(ttl, nameLeast) + namesGrace)
				if model[addr][name].Before(until) {
					model[addr][name] = until
				}
			}
			var want []string
			for name, until := range model[addr] {
				if clock.at.Before(until) {
					want = append(want, name)
				}
			}
			slices.Sort(want)
			if got := n.lookup(addr); !slices.Equal(got, want) {
				t.Fatalf("%s: %q, want %q", addr, got, want)
			}
			total := 0
			for _, e := range n.byAddr {
				total += len(e.Value.(*addressNames).until)
			}
			if total != n.total || n.order.Len() != len(n.byAddr) {
				t.Fatalf("counted %d of %d names, %d of %d addresses", n.total, total, n.order.Len(), len(n.byAddr))
			}
		}
	})
}

func TestNamesInParallel(t *testing.T) {
	n := newNames()
	var all sync.WaitGroup
	for g := range 8 {
		all.Go(func() {
			for i := range 500 {
				addr := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
				n.learn([]string{fmt.Sprintf("%d.example", g)}, addr, time.Hour)
				n.lookup(addr)
			}
		})
	}
	all.Wait()
	if got := n.lookup(netip.MustParseAddr("203.0.113.9")); len(got) != 8 {
		t.Errorf("%q", got)
	}
}

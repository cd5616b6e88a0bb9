package flood

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"banger/internal/netwire"
)

// at is the gateway's port, which is one of the host's loopback.
func at(port uint16) netip.AddrPort { return netip.AddrPortFrom(netwire.Gateway(), port) }

// The treatments of a service.
func readNothing(conn net.Conn) { waitForEnd(conn) }

// waitForEnd returns when the peer has reset the connection, or the service closes it.
func waitForEnd(conn net.Conn) {
	for conn.SetReadDeadline(time.Time{}) == nil {
		time.Sleep(50 * time.Millisecond)
	}
}

func sendForEver(conn net.Conn) {
	block := make([]byte, 64<<10)
	for {
		if _, err := conn.Write(block); err != nil {
			return
		}
	}
}

func readAll(conn net.Conn) { io.Copy(io.Discard, conn) }

func tcpAttacks() []attack {
	return []attack{
		{name: "100,000 half-open connections", network: host(), run: halfOpen},
		{name: "50,000 refused connections", network: internet(), run: func(t *testing.T, g *guest) { refused(g, false) }},
		{name: "50,000 refused, answers unread", network: internet(), run: func(t *testing.T, g *guest) { refused(g, true) }},
		{name: "2,000 connections to a black hole", network: host(), run: blackHole},
		{name: "1,024 downloads, nothing acknowledged", network: host(), run: func(t *testing.T, g *guest) { downloads(t, g, 1460, 0xffff) }},
		{name: "1,024 downloads, segments of 64 bytes", network: host(), run: func(t *testing.T, g *guest) { downloads(t, g, 64, 0xffff) }},
		{name: "1,024 downloads, a window of zero", network: host(), run: func(t *testing.T, g *guest) { downloads(t, g, 1460, 0) }},
	}
}

func halfOpen(t *testing.T, g *guest) {
	port := service(t, "0.0.0.0", readAll)
	h := newHand(g)
	h.greets = false
	for i := range 100_000 {
		h.open(uint16(1024+i%50_000), netip.AddrPortFrom(somewhereAt(byte(1+i/50_000)), port))
	}
	g.settle()
	g.remark("%d connections at once", g.stats().Connections)
	g.remark("echo meanwhile after %s", g.echo().Round(time.Millisecond))
}

func refused(g *guest, unread bool) {
	h := newHand(g)
	if unread {
		g.deaf.Lock()
	}
	for i := range 50_000 {
		h.open(uint16(1024+i), netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), 80))
	}
	g.flush()
	if unread {
		g.deaf.Unlock()
	}
	g.settle()
	g.remark("%d resets", h.resets.Load())
}

func blackHole(t *testing.T, g *guest) {
	h := newHand(g)
	spray := func() {
		for i := range 2000 {
			h.open(uint16(1024+i), netip.AddrPortFrom(nowhereAt(byte(2+i%8)), 80))
		}
		g.settle()
	}
	spray()
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() { // as a kernel does
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				for i := range 2000 {
					h.open(uint16(1024+i), netip.AddrPortFrom(nowhereAt(byte(2+i%8)), 80))
				}
				g.flush()
			}
		}
	}()
	took := g.echo()
	close(stop)
	<-done
	g.remark("echo meanwhile after %s", took.Round(time.Millisecond))
}

func downloads(t *testing.T, g *guest, mss, window uint16) {
	port := service(t, "127.0.0.1", sendForEver)
	h := newHand(g)
	h.mss, h.window = mss, window
	h.openAll(1024, 1020, at(port))
	g.steady()
	g.remark("%d open, %d reset", h.count.Load(), h.resets.Load())
	h.resetAll()
	g.settle()
}

package flood

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// at is the gateway's port, which is one of the host's loopback.
func at(port uint16) netip.AddrPort { return netip.AddrPortFrom(netwire.Gateway(), port) }

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

func tcpAttacks(there func(func())) []attack {
	return []attack{
		{name: "100,000 half-open connections", network: host(), run: func(t *testing.T, g *guest) { halfOpen(t, g, there) }},
		{name: "50,000 refused connections", network: internet(), run: func(t *testing.T, g *guest) { refused(g, false) }},
		{name: "50,000 refused, answers unread", network: internet(), run: func(t *testing.T, g *guest) { refused(g, true) }},
		{name: "2,000 connections to 8 black holes", network: host(), run: func(t *testing.T, g *guest) { blackHole(g, 8) }},
		{name: "2,000 connections to 250 black holes", network: host(), run: func(t *testing.T, g *guest) { blackHole(g, 250) }},
		{name: "1,020 downloads, nothing acknowledged", network: host(), run: func(t *testing.T, g *guest) { downloads(t, g, 1460, 0xffff) }},
		{name: "1,020 downloads, segments of 64 bytes", network: host(), mayCut: true, run: func(t *testing.T, g *guest) { downloads(t, g, 64, 0xffff) }},
		{name: "1,020 downloads, a window of zero", network: host(), run: func(t *testing.T, g *guest) { downloads(t, g, 1460, 0) }},
		{name: "16 trickles, nothing acknowledged", network: host(), mayCut: true, run: func(t *testing.T, g *guest) { trickles(t, g, 16) }},
		{name: "1,020 trickles, nothing acknowledged", network: host(), mayCut: true, run: func(t *testing.T, g *guest) { trickles(t, g, most) }},
		{name: "1,020 uploads, nothing read", network: host(), run: func(t *testing.T, g *guest) { uploads(t, g, waitForEnd) }},
		{name: "1,020 connections, both ways full", network: host(), mayCut: true, run: func(t *testing.T, g *guest) { uploads(t, g, sendForEver) }},
		{name: "1,020 uploads that ignore the window", network: host(), mayCut: true, run: rudeUploads},
		{name: "1,020 uploads, each byte out of order", network: host(), mayCut: true, run: disorder},
		{name: "400 downloads, given up unread", network: host(), run: orphans},
		{name: "10,000 connections that the host ends", network: host(), run: churn},
		{name: "200,000 empty segments", network: host(), run: emptySegments},
	}
}

func halfOpen(t *testing.T, g *guest, there func(func())) {
	var port uint16
	there(func() { port = fakeguest.Service(t, "0.0.0.0", readAll) })
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

// blackHole dials where nobody answers, again every second, as a kernel does.
func blackHole(g *guest, holes int) {
	h := newHand(g)
	dial := func() {
		for i := range 2000 {
			h.open(uint16(1024+i), netip.AddrPortFrom(nowhereAt(byte(2+i%holes)), 80))
		}
		g.flush()
	}
	dial()
	g.settle()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				dial()
			}
		}
	}()
	took := g.echo()
	close(stop)
	<-done
	g.until("the log says that connections are dropped", func() bool { return g.logged("dropped") })
	g.remark("echo meanwhile after %s", took.Round(time.Millisecond))
}

// most is how many connections an attack opens: with the echo's they are all that there
// may be.
const most = 1020

func downloads(t *testing.T, g *guest, mss, window uint16) {
	port := fakeguest.Service(t, "127.0.0.1", sendForEver)
	h := newHand(g)
	h.mss, h.window = mss, window
	h.openAll(1024, most, at(port))
	g.steady()
	h.leave()
}

// leave resets what is open, until nothing is: the guest's programs have died.
func (h *hand) leave() {
	h.g.t.Helper()
	h.g.remark("%d open, %d reset", h.count.Load(), h.resets.Load())
	h.mu.Lock()
	h.leaves = true
	h.mu.Unlock()
	h.g.until("the network has let all go", func() bool {
		h.each(func(c *handConn) {
			h.segmentAt(c, c.taken, header.TCPFlagRst, nil)
			// Where an answer was lost, that is not the number which the network expects.
			// It tells to whoever sends another one.
			h.segmentAt(c, c.taken-1, 0, []byte{0})
		})
		h.g.settle()
		return h.g.stats().Connections == 0
	})
}

// trickles: each byte is a segment of its own.
func trickles(t *testing.T, g *guest, count int) {
	port := fakeguest.Service(t, "127.0.0.1", func(conn net.Conn) {
		for range 2_000_000 / count {
			if _, err := conn.Write([]byte{1}); err != nil {
				return
			}
		}
		waitForEnd(conn)
	})
	h := newHand(g)
	h.openAll(1024, count, at(port))
	g.steady()
	h.leave()
}

// uploads send what the window allows.
func uploads(t *testing.T, g *guest, treat func(net.Conn)) {
	port := fakeguest.Service(t, "127.0.0.1", treat)
	h := newHand(g)
	block := make([]byte, 32<<10)
	h.pull = func(c *handConn) {
		for c.room > 0 {
			size := min(c.room, len(block))
			h.segment(c, 0, block[:size])
			c.room -= size
		}
	}
	h.opened = h.pull
	h.openAll(1024, most, at(port))
	if h.lastWindow > 4<<10 {
		t.Errorf("the last of many connections begins with a window of %d bytes", h.lastWindow)
	}
	g.steady()
	h.leave()
}

// rudeUploads send segments of 60,000 bytes, which the stack takes whole when their first
// byte has room.
func rudeUploads(t *testing.T, g *guest) {
	port := fakeguest.Service(t, "127.0.0.1", waitForEnd)
	h := newHand(g)
	h.openAll(1024, most, at(port))
	block := make([]byte, 60_000)
	for range 6 {
		h.each(func(c *handConn) { h.segment(c, 0, block) })
	}
	g.steady()
	h.leave()
}

func disorder(t *testing.T, g *guest) {
	port := fakeguest.Service(t, "127.0.0.1", waitForEnd)
	h := newHand(g)
	h.openAll(1024, most, at(port))
	for i := range uint32(100) {
		h.each(func(c *handConn) { h.segmentAt(c, c.next+2+2*i, 0, []byte{1}) })
	}
	g.steady()
	h.leave()
}

// orphans: the host's side has sent all and is gone, the guest's has ended too, and the
// data waits in the stack for a guest that never acknowledges it.
func orphans(t *testing.T, g *guest) {
	const size = 900 << 10
	port := fakeguest.Service(t, "127.0.0.1", func(conn net.Conn) { conn.Write(make([]byte, size)) })
	h := newHand(g)
	for i := range 200 {
		before := g.stats().Received
		h.openAll(uint16(1024+2*i), 2, at(port))
		h.each(func(c *handConn) {
			if c.next == 1 {
				h.segment(c, header.TCPFlagFin, nil)
			}
		})
		g.flush()
		for range 20 { // with the first ones, all of it goes into the stack
			if g.stats().Received >= before+2*size {
				break
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	g.steady()
	h.leave()
}

func churn(t *testing.T, g *guest) {
	port := fakeguest.Service(t, "127.0.0.1", func(net.Conn) {})
	h := newHand(g)
	h.acks = true
	for i := range 100 {
		h.openAll(uint16(1024+100*i), 100, at(port))
		g.until("the connections have ended", func() bool { return h.ends.Load()+h.resets.Load() >= int64(100*(i+1)) })
	}
	h.leave()
}

func emptySegments(t *testing.T, g *guest) {
	port := fakeguest.Service(t, "127.0.0.1", waitForEnd)
	h := newHand(g)
	h.openAll(1024, 4, at(port))
	for range 50_000 {
		h.each(func(c *handConn) { h.segment(c, 0, nil) })
	}
	g.steady()
	h.leave()
}

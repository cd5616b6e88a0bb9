package flood

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// Ports of the namespace that are published, one for each attack: they run side by side.
const publishedFrom = 20_000

func portAttacks() []attack {
	published := func(i int, protocol string) netwire.Network {
		n := host()
		n.Publish = []string{fmt.Sprintf("127.0.0.1:%d:80/%s", publishedFrom+i, protocol)}
		return n
	}
	return []attack{
		{name: "1,100 clients, the guest accepts none", network: published(0, "tcp"), run: func(t *testing.T, g *guest) { clients(t, g, 0, false, false, 0) }},
		{name: "1,100 clients, the guest reads nothing", network: published(1, "tcp"), run: func(t *testing.T, g *guest) { clients(t, g, 1, true, false, 0) }},
		{name: "1,100 clients that read nothing", network: published(2, "tcp"), run: func(t *testing.T, g *guest) { clients(t, g, 2, true, true, 0) }},
		{name: "1,100 clients and 1,020 downloads, unread", mayCut: true, network: published(4, "tcp"), run: func(t *testing.T, g *guest) { clients(t, g, 4, true, true, most) }},
		{name: "400 clients by UDP, answers of 60,000 bytes", network: published(3, "udp"), run: datagramClients},
	}
}

// clients are programs on the host that connect to a published port, and send for ever,
// or have the guest send. It has downloads of its own beside.
func clients(t *testing.T, g *guest, port int, accepts, down bool, downloads int) {
	h := newHand(g)
	h.accepts = accepts
	if down {
		block := make([]byte, 32<<10)
		h.pull = func(c *handConn) {
			for c.room > 0 {
				size := min(c.room, len(block))
				h.segment(c, 0, block[:size])
				c.room -= size
			}
		}
	}
	var work sync.WaitGroup
	var open []net.Conn
	for range 1100 {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", publishedFrom+port))
		if errors.Is(err, syscall.ECONNRESET) {
			continue // there are too many
		} else if err != nil {
			t.Error(err)
			break
		}
		open = append(open, conn)
		if !down {
			work.Go(func() { sendForEver(conn) })
		}
	}
	g.until("some connections are there", func() bool { return g.stats().Connections >= 1000 })
	if downloads > 0 {
		h.openAll(1024, downloads, at(fakeguest.Service(t, "127.0.0.1", sendForEver)))
	}
	g.steady()
	g.remark("%d connections", g.stats().Connections)
	for _, conn := range open {
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
	work.Wait()
	h.leave()
}

// datagramClients: each has a flow, and the guest answers each with what it can.
func datagramClients(t *testing.T, g *guest) {
	answer := make([]byte, 60_000)
	var mu sync.Mutex
	ports := make(map[uint16]bool)
	g.onFrame(func(frame []byte) {
		if port, ok := fromGateway(frame); ok {
			mu.Lock()
			ports[port] = true
			mu.Unlock()
		}
	})
	var clients []net.Conn
	for range 400 {
		conn, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", publishedFrom+3))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		clients = append(clients, conn)
	}
	g.until("the guest has datagrams of many", func() bool {
		for _, conn := range clients { // again, as some are lost
			conn.Write(make([]byte, 1000))
		}
		mu.Lock()
		defer mu.Unlock()
		return len(ports) >= 256
	})
	mu.Lock()
	all := slices.Collect(maps.Keys(ports))
	mu.Unlock()
	for range 40 {
		for _, port := range all {
			g.push(udpFrame(80, at(port), answer))
		}
	}
	g.settle()
	g.remark("%d flows", g.stats().Connections)
	g.cut()
}

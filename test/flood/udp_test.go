package flood

import (
	"net"
	"net/netip"
	"testing"
)

func udpAttacks(there func(func())) []attack {
	return []attack{
		{name: "100,000 datagrams to 10,000 addresses", network: host(), run: func(t *testing.T, g *guest) { manyFlows(t, g, there) }},
		{name: "512 flows, 20,000 datagrams of 60,000 bytes", network: host(), run: bigDatagrams},
		{name: "200,000 empty datagrams", network: host(), run: emptyDatagrams},
		{name: "512 flows, big answers unread", network: host(), run: bigAnswers},
	}
}

func manyFlows(t *testing.T, g *guest, there func(func())) {
	var port uint16
	there(func() { _, port = datagramService(t, "0.0.0.0") })
	for i := range 100_000 {
		to := i % 10_000
		g.push(udpFrame(uint16(1024+i%7), netip.AddrPortFrom(somewhereAt(byte(to%250)), port+uint16(to/250)), make([]byte, 100)))
	}
	g.settle()
	flows := g.stats().Connections
	if flows > 512 {
		t.Errorf("%d flows at once", flows)
	}
	g.remark("%d flows", flows)
	g.cut()
}

// bigDatagrams go to a service that never reads.
func bigDatagrams(t *testing.T, g *guest) {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	port := uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	for i := range 20_000 {
		g.push(udpFrame(uint16(1024+i%512), at(port), make([]byte, 60_000)))
	}
	g.settle()
	g.cut()
}

// emptyDatagrams count nothing where bytes are counted.
func emptyDatagrams(t *testing.T, g *guest) {
	server, port := datagramService(t, "127.0.0.1")
	for i := range 200_000 {
		g.push(udpFrame(uint16(1024+i/10%500), at(port), nil))
	}
	g.settle()
	g.remark("%d arrived", server.received.Load())
	g.cut()
}

// bigAnswers: the service answers each datagram with many large ones.
func bigAnswers(t *testing.T, g *guest) {
	conn, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		buf, answer := make([]byte, 100), make([]byte, 60_000)
		for {
			_, from, err := conn.ReadFrom(buf)
			if err != nil {
				return
			}
			for range 20 {
				conn.WriteTo(answer, from)
			}
		}
	}()
	port := uint16(conn.LocalAddr().(*net.UDPAddr).Port)
	g.deaf.Lock()
	for i := range 512 {
		g.push(udpFrame(uint16(1024+i), at(port), []byte("?")))
	}
	g.flush()
	g.until("all has come", func() bool { return g.stats().Received > 512*60_000 })
	g.deaf.Unlock()
	g.settle()
	g.cut()
}

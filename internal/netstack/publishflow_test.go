package netstack

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"banger/internal/netwire"
)

// silence is what guestUDP does not answer.
const silence = "silence"

// guestUDP answers a datagram with its name, the client that it sees and the text.
func guestUDP(t *testing.T, name string) (port uint16) {
	t.Helper()
	c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for buf := make([]byte, datagramSize); ; {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			if string(buf[:n]) != silence {
				c.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %d %s", name, from.Port(), buf[:n]), from)
			}
		}
	})
	t.Cleanup(func() { c.Close(); running.Wait() })
	return uint16(c.LocalAddr().(*net.UDPAddr).Port)
}

func dialUDP(t *testing.T, addr netip.AddrPort) net.Conn {
	t.Helper()
	c, err := net.Dial("udp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// askUDP sends text until the server called name answers to it, and returns the port
// that the flow has inside.
func askUDP(t *testing.T, c net.Conn, name, text string) (flow int) {
	t.Helper()
	buf := make([]byte, datagramSize)
	untilTrue(t, name+" answers", func() bool {
		if _, err := c.Write([]byte(text)); err != nil {
			return false
		}
		c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		n, err := c.Read(buf)
		if err != nil {
			return false
		}
		var who string
		if _, err := fmt.Sscanf(string(buf[:min(n, 100)]), "%s %d", &who, &flow); err != nil {
			t.Fatalf("the answer is %.100q", buf[:n])
		}
		return who == name && string(buf[:n]) == fmt.Sprintf("%s %d %s", name, flow, text)
	})
	return flow
}

func TestPublishedUDP(t *testing.T) {
	p := testPublisher(t)
	pub := publication("udp", hostPort(t), guestUDP(t, "one"))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	a, b := dialUDP(t, pub.Host), dialUDP(t, pub.Host)
	of := askUDP(t, a, "one", "from a")
	if other := askUDP(t, b, "one", "from b"); other == of {
		t.Error("two clients have one flow")
	}
	if again := askUDP(t, a, "one", string(make([]byte, 60000))); again != of {
		t.Error("a client has two flows")
	}
	if n := p.connections(); n != 2 {
		t.Errorf("%d flows", n)
	}
	// Another guest port: the flows begin anew.
	pub.Guest = guestUDP(t, "two")
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	if n := p.connections(); n != 0 {
		t.Errorf("%d flows to the old port", n)
	}
	askUDP(t, a, "two", "from a")
	if err := p.set(nil); err != nil {
		t.Fatal(err)
	}
	if n := p.connections(); n != 0 {
		t.Errorf("%d flows of a port that is gone", n)
	}
	c, err := net.ListenPacket("udp4", pub.Host.String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func TestPublishedUDPFlowsExpire(t *testing.T) {
	p := testPublisher(t)
	p.idle = 300 * time.Millisecond
	pub := publication("udp", hostPort(t), guestUDP(t, "one"))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	c := dialUDP(t, pub.Host)
	// Use keeps a flow beyond its first deadline, if the test was not kept from using it.
	used := false
	for range 20 {
		flow := askUDP(t, c, "one", "a")
		last, pause := time.Now(), time.Duration(0)
		for end := last.Add(2 * p.idle); last.Before(end); time.Sleep(p.idle / 20) {
			c.Write([]byte(silence))
			pause = max(pause, time.Since(last))
			last = time.Now()
		}
		again := askUDP(t, c, "one", "a")
		if pause = max(pause, time.Since(last)); pause > p.idle/2 {
			continue
		}
		if used = true; again != flow {
			t.Error("a flow in use was replaced")
		}
		break
	}
	if !used {
		t.Error("the machine is too slow for this test")
	}
	untilTrue(t, "the flow is idle and over", func() bool { return p.connections() == 0 })
	fresh := dialUDP(t, pub.Host)
	askUDP(t, fresh, "one", "c")
}

// TestPublishedUDPMakesRoom: more clients than flows; the last ones are served.
func TestPublishedUDPMakesRoom(t *testing.T) {
	p := testPublisher(t)
	pub := publication("udp", hostPort(t), guestUDP(t, "one"))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	steady := dialUDP(t, pub.Host)
	flow := askUDP(t, steady, "one", "steady")
	var clients []net.Conn
	var flows []int
	for i := range publishFlows + 50 {
		clients = append(clients, dialUDP(t, pub.Host))
		flows = append(flows, askUDP(t, clients[i], "one", fmt.Sprint(i)))
		if n := p.connections(); n > publishFlows {
			t.Fatalf("%d flows", n)
		}
		if i%50 == 0 && askUDP(t, steady, "one", "steady") != flow {
			t.Fatal("a flow in use made room for another")
		}
	}
	if n := p.connections(); n != publishFlows {
		t.Errorf("%d flows", n)
	}
	for i := 100; i < len(clients); i++ {
		if askUDP(t, clients[i], "one", "again") != flows[i] {
			t.Fatalf("of %d flows, that of client %d made room", len(clients), i)
		}
	}
}

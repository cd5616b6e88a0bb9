package netstack

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// ipTool runs ip(8) in the network namespace of the test.
func ipTool(t *testing.T, args string) {
	t.Helper()
	if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
		t.Fatalf("ip %s: %v\n%s", args, err, out)
	}
}

// What the host keeps for itself is the host's own, though no interface has the address:
// by a route of type local, as a broadcast, and from the moment that an interface gets it.
func TestHostsOwn(t *testing.T) {
	if !inNetns(t) {
		return
	}
	ipTool(t, "link set lo up")
	ipTool(t, "link add v0 type veth peer name v1")
	ipTool(t, "link set v0 up")
	ipTool(t, "link set v1 up")
	ipTool(t, "addr add 198.51.100.5/24 broadcast 198.51.100.255 dev v0")
	ipTool(t, "route add local 203.0.113.77/32 dev v0")
	const port = 9999
	l, err := net.Listen("tcp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	service, err := net.ListenPacket("udp4", fmt.Sprintf("0.0.0.0:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	reached := make(chan string, 16)
	go func() {
		buf := make([]byte, 100)
		for {
			n, _, err := service.ReadFrom(buf)
			if err != nil {
				return
			}
			reached <- string(buf[:n])
		}
	}()

	w := newWorld(t, netwire.Network{Preset: "internet"})
	w.ask(netwire.OpStats)
	for _, to := range []string{"198.51.100.5", "203.0.113.77"} {
		at := netip.AddrPortFrom(netip.MustParseAddr(to), port)
		if conn, err := w.dial(at); err == nil {
			conn.Close()
			t.Errorf("the guest reached %s", at)
		}
		w.logged("tcp", at.String(), "an address of this host")
		w.guest.DialUDP(at).Write([]byte("to " + to))
		w.logged("udp", at.String(), "an address of this host")
	}
	for _, e := range w.log() {
		if e.Rule == "" {
			t.Errorf("%s was tried first, and refused then: %+v", e.Target, e)
		}
	}
	w.guest.DialUDP(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.255"), port)).Write([]byte("to all"))
	w.logged("udp", fmt.Sprintf("198.51.100.255:%d", port), "broadcast")

	later := w.guest.DialUDP(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.99"), port))
	later.Write([]byte("to nobody"))
	w.until("a flow is open", func() bool { return w.ask(netwire.OpStats).Stats.Connections == 1 })
	ipTool(t, "addr add 198.51.100.99/32 dev v0")
	w.until("the flow is cut", func() bool { return w.ask(netwire.OpStats).Stats.Connections == 0 })
	later.Write([]byte("to the new address"))
	w.logged("udp", fmt.Sprintf("198.51.100.99:%d", port), "an address of this host")
	select {
	case text := <-reached:
		t.Errorf("the host's service got %q", text)
	default:
	}
}

// The host's loopback is its IPv6 address too, where nobody listens at the other one.
func TestIPv6Loopback(t *testing.T) {
	if !inNetns(t) {
		return
	}
	ipTool(t, "link set lo up")
	answer := func(text string) func(net.Conn) {
		return func(conn net.Conn) { conn.Write([]byte(text)) }
	}
	six := fakeguest.Service(t, "::1", answer("six"))
	w := newWorld(t, host())
	w.ask(netwire.OpStats)
	if got := exchange(t, w.mustDial(six), nil); string(got) != "six" {
		t.Errorf("the guest got %q", got)
	}
	at := netip.AddrPortFrom(netwire.Gateway(), six)
	if conn, err := w.dial(netip.AddrPortFrom(netwire.Gateway(), six-1)); err == nil {
		conn.Close()
		t.Error("the guest reached a port where nobody listens")
	} else if !strings.Contains(err.Error(), "refused") {
		t.Errorf("where nobody listens the guest sees: %v", err)
	}
	w.set(netwire.Network{Preset: "internet"})
	if conn, err := w.dial(at); err == nil {
		conn.Close()
		t.Error("the guest reached it though the policy forbids the loopback")
	}
	w.logged("tcp", at.String(), "loopback")
	w.set(host())
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", six))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("four"))
			conn.Close()
		}
	}()
	if got := exchange(t, w.mustDial(six), nil); string(got) != "four" {
		t.Errorf("with both, the guest got %q", got)
	}
}

// A guest that has said its last gets all the rest, however slowly it reads.
func TestSlowReader(t *testing.T) {
	w := newGuest(t, host())
	small := tcpip.TCPReceiveBufferSizeRangeOption{Min: 4096, Default: 16384, Max: 16384}
	if err := w.guest.Stack.SetTransportProtocolOption(tcp.ProtocolNumber, &small); err != nil {
		t.Fatal(err)
	}
	w.start(noHeapLimit)
	w.ask(netwire.OpStats)
	const size = 1 << 20
	port := hostService(t, func(c net.Conn) {
		io.Copy(io.Discard, c) // the request, to its end
		c.Write(make([]byte, size))
	})
	conn := w.mustDial(port)
	conn.Write([]byte("all, please"))
	conn.CloseWrite()
	total, buf := 0, make([]byte, 2048)
	for {
		n, err := conn.Read(buf)
		if total += n; err != nil {
			if err != io.EOF || total != size {
				t.Errorf("the guest got %d bytes of %d, then: %v", total, size, err)
			}
			return
		}
		time.Sleep(5 * time.Millisecond) // the slowness that is tested: 3 s in all
	}
}

// A packet that the guest sends again begins nothing, also after the first one gave way to
// another: it may come by the other forwarder, while the first still lets go of the
// endpoint that both would have.
func TestRepeatedHandshake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHandshakes()
		id := func(port int) stack.TransportEndpointID {
			return stack.TransportEndpointID{LocalPort: 80, RemotePort: uint16(port), LocalAddress: gatewayAddress(), RemoteAddress: guestAddress()}
		}
		to := netip.MustParseAddr("203.0.113.1")
		var ends []func()
		cancelled := -1
		for i := range maxHandshakes {
			end, full := h.begin(id(i), to, func() { cancelled = i })
			if end == nil || full {
				t.Fatalf("there is no room for the %dth", i+1)
			}
			ends = append(ends, end)
			if again, full := h.begin(id(i), to, func() {}); again != nil || full {
				t.Error("the same packet again began another one")
			}
		}
		if end, full := h.begin(id(maxHandshakes), to, func() {}); end != nil || !full {
			t.Error("there is room for one more")
		}
		time.Sleep(handshakePatience)
		last, full := h.begin(id(maxHandshakes), to, func() {})
		if last == nil || !full || cancelled != 0 {
			t.Fatalf("the oldest one did not give way, but %d", cancelled)
		}
		if end, _ := h.begin(id(0), to, func() {}); end != nil {
			t.Error("the one that gave way began again before it had ended")
		}
		ends[0]()
		last()
		second, full := h.begin(id(0), to, func() {})
		if second == nil || full {
			t.Fatal("an ended one cannot begin again")
		}
		ends[0]() // twice, as serveTCP may
		if end, _ := h.begin(id(0), to, func() {}); end != nil {
			t.Error("the end of the first one was taken for that of the second")
		}
	})
}

// A thousand connections through a published port, half of which the client ends first,
// half the guest: no byte is lost.
func TestPublishedHalfClose(t *testing.T) {
	const all, atOnce = 1000, 50
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := free.Addr().String()
	free.Close()
	w := newWorld(t, netwire.Network{Preset: "none", Publish: []string{at + ":80/tcp"}})
	inside := w.guest.Listen(80)
	go func() {
		for {
			conn, err := inside.Accept()
			if err != nil {
				return
			}
			go serveHalfClosed(conn.(*gonet.TCPConn))
		}
	}()
	w.ask(netwire.OpStats)
	slots := make(chan struct{}, atOnce)
	var work sync.WaitGroup
	for i := range all {
		slots <- struct{}{}
		work.Go(func() {
			defer func() { <-slots }()
			if err := halfClosed(at, i); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	work.Wait()
	w.until("all are over", func() bool { return w.ask(netwire.OpStats).Stats.Connections == 0 })
}

// serveHalfClosed obeys the first byte: 'e' sends back what comes once it has ended, 's'
// sends a pattern, ends, and counts what still comes.
func serveHalfClosed(conn *gonet.TCPConn) {
	defer conn.Close()
	order := make([]byte, 2)
	if _, err := io.ReadFull(conn, order); err != nil {
		return
	}
	if order[0] == 'e' {
		in, _ := io.ReadAll(conn)
		conn.Write(in)
		conn.CloseWrite()
		return
	}
	conn.Write(pattern(30_000, order[1]))
	conn.CloseWrite()
	io.Copy(io.Discard, conn)
}

func halfClosed(at string, i int) error {
	conn, err := net.Dial("tcp", at)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	order, seed := byte('e'), byte(i)
	if i%2 == 1 {
		order = 's'
	}
	conn.Write([]byte{order, seed})
	want := pattern(30_000, seed)
	if order == 'e' {
		if _, err := conn.Write(want); err != nil {
			return err
		}
		conn.(*net.TCPConn).CloseWrite()
	}
	got, err := io.ReadAll(conn)
	if err == nil && !bytes.Equal(got, want) {
		err = fmt.Errorf("%d bytes came of %d, or others", len(got), len(want))
	}
	if err == nil && order == 's' {
		if _, err = conn.Write(want); err == nil {
			err = conn.(*net.TCPConn).CloseWrite()
		}
	}
	return err
}

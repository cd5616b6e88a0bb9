package netstack

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// pattern is n bytes that differ with seed.
func pattern(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) ^ byte(i>>8) ^ seed
	}
	return b
}

// exchange sends out, ends its side, and returns all that comes back.
func exchange(t *testing.T, conn *gonet.TCPConn, out []byte) []byte {
	t.Helper()
	conn.SetDeadline(time.Now().Add(patience))
	var up sync.WaitGroup
	up.Go(func() {
		if _, err := conn.Write(out); err != nil {
			t.Errorf("sending: %v", err)
		}
		conn.CloseWrite()
	})
	in, err := io.ReadAll(conn)
	up.Wait()
	if err != nil {
		t.Errorf("receiving: %v", err)
	}
	return in
}

func TestTCP(t *testing.T) {
	w := newWorld(t, host())
	port := hostService(t, fakeguest.Echo)
	for _, size := range []int{0, 1, 100, 64 << 10, 16 << 20} {
		sent := pattern(size, byte(size))
		if got := exchange(t, w.mustDial(port), sent); sha256.Sum256(got) != sha256.Sum256(sent) {
			t.Errorf("%d bytes: %d came back, or others", size, len(got))
		}
	}
	stats := w.ask(netwire.OpStats).Stats
	if stats.Sent < 16<<20 || stats.Received < 16<<20 || stats.Refused != 0 {
		t.Errorf("counted %+v; %+v", stats, w.log())
	}
	w.until("all connections are over", func() bool { return w.ask(netwire.OpStats).Stats.Connections == 0 })
}

// The server ends first: what the guest sends afterwards still arrives.
func TestHalfClose(t *testing.T) {
	w := newWorld(t, host())
	got := make(chan []byte, 1)
	port := hostService(t, func(conn net.Conn) {
		conn.Write([]byte("hello"))
		conn.(*net.TCPConn).CloseWrite()
		in, _ := io.ReadAll(conn)
		got <- in
	})
	conn := w.mustDial(port)
	conn.SetDeadline(time.Now().Add(patience))
	if in, err := io.ReadAll(conn); err != nil || string(in) != "hello" {
		t.Fatalf("the guest got %q, %v", in, err)
	}
	want := pattern(1<<20, 3)
	if _, err := conn.Write(want); err != nil {
		t.Fatal(err)
	}
	conn.CloseWrite()
	select {
	case in := <-got:
		if !bytes.Equal(in, want) {
			t.Errorf("the server got %d bytes of %d, or others", len(in), len(want))
		}
	case <-time.After(patience):
		t.Error("the server never saw the end")
	}
}

// A reset goes through, both ways.
func TestReset(t *testing.T) {
	w := newWorld(t, host())
	begun, ended := make(chan bool, 2), make(chan error, 1)
	port := hostService(t, func(conn net.Conn) {
		var b [1]byte
		conn.Read(b[:])
		begun <- true
		if b[0] == 'r' {
			conn.(*net.TCPConn).SetLinger(0)
			return
		}
		_, err := conn.Read(b[:])
		ended <- err
	})
	conn := w.mustDial(port)
	conn.SetDeadline(time.Now().Add(patience))
	conn.Write([]byte("r"))
	if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "reset") {
		t.Errorf("the guest read %d, %v: no reset", n, err)
	}
	conn = w.mustDial(port)
	conn.Write([]byte("g"))
	<-begun
	<-begun
	w.set(netwire.Network{Preset: "none"}) // which cuts it
	select {
	case err := <-ended:
		if err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the server saw %v: no reset", err)
		}
	case <-time.After(patience):
		t.Error("the connection was not cut")
	}
}

// Each refusal is told at once and logged with what would permit it.
func TestRefusals(t *testing.T) {
	w := newWorld(t, netwire.Network{Preset: "internet"})
	w.ask(netwire.OpStats) // it is there
	for _, tt := range []struct{ to, reason, rule string }{
		{"10.0.2.2:80", "loopback", "host.banger.internal:80"},
		{"192.168.1.1:80", "private network", "192.168.1.1:80"},
		{"10.0.2.3:53", "private network", "10.0.2.3:53"},
		{"169.254.169.254:80", "metadata", "169.254.169.254:80"},
		{"169.254.1.1:80", "link-local", "169.254.1.1:80"},
		{"100.64.0.1:80", "", "100.64.0.1:80"},
		{"240.0.0.1:80", "reserved", "240.0.0.1:80"},
	} {
		to := netip.MustParseAddrPort(tt.to)
		if conn, err := w.dial(to); err == nil {
			conn.Close()
			t.Errorf("the guest reached %s", to)
		} else if !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s: %v, which is no refusal", to, err)
		}
		w.logged("tcp", tt.to, tt.reason)
		for _, e := range w.log() {
			if e.Target == tt.to && e.Rule != tt.rule {
				t.Errorf("%s is to be permitted by %q, not %q", to, e.Rule, tt.rule)
			}
		}
		w.guest.DialUDP(to).Write([]byte("hello")) // that it is told the guest, a real one shows
		w.logged("udp", tt.to, tt.reason)
	}
}

// Nothing but the guest's own packets to the gateway get in.
func TestOddFrames(t *testing.T) {
	w := newWorld(t, host())
	w.ask(netwire.OpStats)
	port := hostService(t, fakeguest.Echo)
	exchange(t, w.mustDial(port), []byte("x")) // it is connected
	frame := func(change func([]byte)) []byte {
		f := make([]byte, 14+20+8)
		copy(f, netwire.GatewayMAC())
		copy(f[6:], fakeguest.MAC())
		f[12], f[13] = 8, 0
		f[14], f[17], f[22], f[23] = 0x45, 28, 64, 17 // IPv4, its length, TTL, UDP
		copy(f[26:], []byte{10, 0, 2, 15})
		copy(f[30:], []byte{10, 0, 2, 2})
		change(f)
		return f
	}
	for _, tt := range []struct {
		frame                    []byte
		protocol, target, reason string
	}{
		{frame(func(f []byte) { f[11] = 9 }), "ethernet", "", "forged"},
		{frame(func(f []byte) { f[29] = 16 }), "ip", "10.0.2.2", "forged"},
		{frame(func(f []byte) { f[30] = 224 }), "ip", "224.0.2.2", "multicast"},
		{frame(func(f []byte) { copy(f[30:], []byte{255, 255, 255, 255}) }), "ip", "255.255.255.255", "multicast"},
		{frame(func(f []byte) { copy(f[30:], []byte{127, 0, 0, 1}) }), "ip", "127.0.0.1", "loopback"},
		{frame(func(f []byte) { f[30] = 0 }), "ip", "0.0.2.2", "reserved address"},
		{frame(func(f []byte) { f[12] = 0x81 }), "ethernet", "", "0x8100"},
		{make([]byte, 13), "ethernet", "", "13 bytes"},
		{make([]byte, 70_000), "ethernet", "", "70000 bytes"},
	} {
		w.send(tt.frame)
		w.logged(tt.protocol, tt.target, tt.reason)
	}
	if got := exchange(t, w.mustDial(port), []byte("still there")); string(got) != "still there" {
		t.Errorf("afterwards %q comes back", got)
	}
}

func TestUDP(t *testing.T) {
	w := newWorld(t, host())
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	go func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			server.WriteTo(buf[:n], from)
		}
	}()
	conn := w.guest.DialUDP(netip.AddrPortFrom(netwire.Gateway(), uint16(server.LocalAddr().(*net.UDPAddr).Port)))
	for _, size := range []int{1, 1472, 60_000} {
		sent := pattern(size, 1)
		got := make([]byte, 64<<10)
		conn.SetDeadline(time.Now().Add(patience))
		conn.Write(sent)
		n, err := conn.Read(got)
		if err != nil || !bytes.Equal(got[:n], sent) {
			t.Errorf("%d bytes: %d came back, %v", size, n, err)
		}
	}
	if n := w.ask(netwire.OpStats).Stats.Connections; n != 1 {
		t.Errorf("%d flows are open, want 1", n)
	}
	w.set(netwire.Network{Preset: "internet"})
	w.until("the flow is cut", func() bool { return w.ask(netwire.OpStats).Stats.Connections == 0 })
	// What comes before the flow is taken down goes with it, as datagrams may.
	w.until("the next datagram is refused", func() bool {
		conn.Write([]byte("again"))
		return w.ask(netwire.OpStats).Stats.Refused > 0
	})
	w.logged("udp", conn.RemoteAddr().String(), "loopback")
}

// Where nobody takes a datagram, the guest is told so as by any network.
func TestUDPToNobody(t *testing.T) {
	w := newWorld(t, host())
	taken, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := taken.LocalAddr().(*net.UDPAddr).Port
	taken.Close()
	conn := w.guest.DialUDP(netip.AddrPortFrom(netwire.Gateway(), uint16(port)))
	// gonet tells of an error with the next packet only.
	w.until("the guest is told", func() bool {
		_, err := conn.Write([]byte("hello"))
		return err != nil && strings.Contains(err.Error(), "connection was refused")
	})
}

// The network dies and is started again: new connections work, published ports too.
func TestRestart(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(free.Addr().(*net.TCPAddr).Port)
	free.Close()
	n := host()
	n.Publish = []string{netwire.Publication{Protocol: "tcp", Host: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port), Guest: 80}.String()}
	w := newWorld(t, n)
	service := hostService(t, fakeguest.Echo)
	inside := w.guest.Listen(80)
	go func() {
		for {
			conn, err := inside.Accept()
			if err != nil {
				return
			}
			go func() {
				io.Copy(conn, conn)
				conn.(*gonet.TCPConn).CloseWrite()
			}()
		}
	}()
	for round := range 3 {
		w.ask(netwire.OpStats)
		if got := exchange(t, w.mustDial(service), []byte("out")); string(got) != "out" {
			t.Errorf("round %d: %q came back", round, got)
		}
		var conn net.Conn
		w.until("the published port is open", func() bool {
			conn, err = net.Dial("tcp", free.Addr().String())
			return err == nil
		})
		conn.SetDeadline(time.Now().Add(patience))
		conn.Write([]byte("in"))
		conn.(*net.TCPConn).CloseWrite()
		if got, err := io.ReadAll(conn); err != nil || string(got) != "in" {
			t.Errorf("round %d: %q came back, %v", round, got, err)
		}
		conn.Close()
		w.stop()
		w.start(noHeapLimit)
	}
}

// A guest that resets a connection ends it, though the server neither reads nor sends:
// both copies wait for the server then.
func TestResetUnread(t *testing.T) {
	w := newWorld(t, host())
	end := make(chan struct{})
	ended := make(chan error, 1)
	port := hostService(t, func(conn net.Conn) {
		conn.Write([]byte("x"))
		<-end
		_, err := io.Copy(io.Discard, conn)
		ended <- err
	})
	defer close(end)
	conn := w.mustDial(port)
	block := make([]byte, 64<<10)
	for err := error(nil); err == nil; { // until all buffers on the way are full
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, err = conn.Write(block)
	}
	conn.Close() // with a byte that was not read, which makes it a reset
	w.until("the connection has ended", func() bool { return w.ask(netwire.OpStats).Stats.Connections == 0 })
}

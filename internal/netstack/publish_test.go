package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"banger/internal/netwire"
)

// dialLocal takes the ports of the loopback for those of the guest.
func dialLocal(ctx context.Context, protocol string, port uint16) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, protocol, fmt.Sprintf("127.0.0.1:%d", port))
}

// spliceSimply is a splice of a few lines.
func spliceSimply(host, guest net.Conn) {
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{host, guest}, {guest, host}} {
		both.Go(func() {
			if _, err := io.Copy(way[0], way[1]); err != nil {
				reset(host)
				reset(guest)
			}
			way[0].(*net.TCPConn).CloseWrite()
		})
	}
	both.Wait()
}

// testPublisher ends with the test.
func testPublisher(t *testing.T) *publisher {
	t.Helper()
	leak := goleak.IgnoreCurrent()
	p := newPublisher(dialLocal, spliceSimply)
	t.Cleanup(func() {
		p.close()
		goleak.VerifyNone(t, leak)
	})
	return p
}

// guestTCP is a server inside the "guest".
func guestTCP(t *testing.T, serve func(*net.TCPConn)) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(time.Minute))
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { l.Close(); running.Wait() })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// greet is a server that says who it is and then echoes.
func greet(name string) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		fmt.Fprintln(c, name)
		io.Copy(c, c)
	}
}

// hostPort finds a free port outside the range from which the kernel gives ports.
func hostPort(t *testing.T) uint16 {
	t.Helper()
	for range 100 {
		port := uint16(12000 + rand.IntN(18000))
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		l.Close()
		return port
	}
	t.Fatal("no port is free")
	return 0
}

func publication(protocol string, host, guest uint16) netwire.Publication {
	return netwire.Publication{Protocol: protocol, Host: netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), host), Guest: guest}
}

func dialTCP(t *testing.T, addr netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	return c.(*net.TCPConn)
}

// readLine reads without taking more than the line.
func readLine(c net.Conn) (line string, err error) {
	for b := make([]byte, 1); ; line += string(b) {
		if _, err = io.ReadFull(c, b); err != nil || b[0] == '\n' {
			return line, err
		}
	}
}

// wantGreeting connects to addr and fails unless the server called name answers.
func wantGreeting(t *testing.T, addr netip.AddrPort, name string) *net.TCPConn {
	t.Helper()
	c := dialTCP(t, addr)
	if got, err := readLine(c); got != name || err != nil {
		t.Fatalf("%s: %q answers, not %q: %v", addr, got, name, err)
	}
	wantEcho(t, c)
	return c
}

func wantEcho(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := io.WriteString(c, "still here\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := readLine(c); got != "still here" || err != nil {
		t.Fatalf("the echo is %q, %v", got, err)
	}
}

func wantClosed(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	if c, err := net.Dial("tcp", addr.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("%s: %v %v, not refused", addr, c, err)
	}
}

// wantReset connects to addr and fails unless that ends by a reset, which may come before
// the client knows that it is connected.
func wantReset(t *testing.T, addr netip.AddrPort) {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %v, not a reset", addr, err)
	}
}

// payload begins with its seed and is long enough to fill the buffers at times.
func payload(seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	data := binary.BigEndian.AppendUint64(nil, seed)
	for n := r.IntN(1 << (8 + seed%11)); n >= 0; n -= 8 {
		data = binary.BigEndian.AppendUint64(data, r.Uint64())
	}
	return data
}

// speakFirst sends and half-closes, and only then reads all that the other sends.
func speakFirst(c *net.TCPConn, seed uint64) error {
	if _, err := c.Write(payload(seed)); err != nil {
		return err
	}
	if err := c.CloseWrite(); err != nil {
		return err
	}
	got, err := io.ReadAll(c)
	if err == nil && !bytes.Equal(got, payload(seed+1)) {
		err = fmt.Errorf("%d bytes came back, not the %d that were sent", len(got), len(payload(seed+1)))
	}
	return err
}

// listenFirst reads to the end, and then sends.
func listenFirst(c *net.TCPConn) error {
	got, err := io.ReadAll(c)
	if err != nil {
		return err
	}
	if len(got) < 8 {
		return fmt.Errorf("%d bytes came", len(got))
	}
	seed := binary.BigEndian.Uint64(got)
	if !bytes.Equal(got, payload(seed)) {
		return fmt.Errorf("%d bytes came, not the %d that were sent", len(got), len(payload(seed)))
	}
	if _, err := c.Write(payload(seed + 1)); err != nil {
		return err
	}
	return c.CloseWrite()
}

// TestPublishedTCPLosesNothing: 500 connections that the client half-closes first, and
// 500 where it is the server.
func TestPublishedTCPLosesNothing(t *testing.T) {
	p := testPublisher(t)
	const each, atOnce = 500, 25
	var served, seeds atomic.Int64
	count := func(err error) {
		if err != nil {
			t.Error("server:", err)
			return
		}
		served.Add(1)
	}
	quiet := publication("tcp", hostPort(t), guestTCP(t, func(c *net.TCPConn) { count(listenFirst(c)) }))
	talks := publication("tcp", hostPort(t), guestTCP(t, func(c *net.TCPConn) { count(speakFirst(c, uint64(seeds.Add(2)))) }))
	if err := p.set([]netwire.Publication{quiet, talks}); err != nil {
		t.Fatal(err)
	}
	var clients sync.WaitGroup
	for range atOnce {
		clients.Go(func() {
			for range each / atOnce {
				for _, pub := range []netwire.Publication{quiet, talks} {
					conn, err := net.Dial("tcp", pub.Host.String())
					if err != nil {
						t.Error(err)
						return
					}
					c := conn.(*net.TCPConn)
					c.SetDeadline(time.Now().Add(time.Minute))
					if pub == quiet {
						err = speakFirst(c, uint64(seeds.Add(2)))
					} else {
						err = listenFirst(c)
					}
					if err != nil {
						t.Error("client:", err)
					}
					c.Close()
				}
			}
		})
	}
	clients.Wait()
	untilTrue(t, "the servers have all", func() bool { return served.Load() == 2*each || t.Failed() })
	untilTrue(t, "no connection is left", func() bool { return p.connections() == 0 })
}

func TestPublishBusyPortChangesNothing(t *testing.T) {
	p := testPublisher(t)
	one, two := guestTCP(t, greet("one")), guestTCP(t, greet("two"))
	first := publication("tcp", hostPort(t), one)
	if err := p.set([]netwire.Publication{first}); err != nil {
		t.Fatal(err)
	}
	open := wantGreeting(t, first.Host, "one")
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	second := publication("tcp", hostPort(t), two)
	taken := publication("tcp", uint16(other.Addr().(*net.TCPAddr).Port), two)
	err = p.set([]netwire.Publication{second, taken})
	var busy *busyError
	if !errors.As(err, &busy) || busy.Publication != taken || !busy.busy() || err.Error() != "port "+taken.Host.String()+" is in use" {
		t.Fatalf("the error is %v", err)
	}
	if p.problem() != "" || len(p.busy()) > 0 {
		t.Errorf("a refused set is a problem: %s", p.problem())
	}
	wantClosed(t, second.Host)
	wantEcho(t, open)
	wantGreeting(t, first.Host, "one")

	err = p.set([]netwire.Publication{second, publication("tcp", second.Host.Port(), one)})
	if !errors.As(err, &busy) || busy.busy() || !strings.HasSuffix(err.Error(), ": it is published twice") {
		t.Errorf("one port twice: %v", err)
	}
	wantClosed(t, second.Host)
	wantGreeting(t, first.Host, "one")
}

func TestPublishErrorsInWords(t *testing.T) {
	pub := publication("udp", 53, 53)
	for errno, want := range map[syscall.Errno]string{
		syscall.EADDRINUSE:    "port 127.0.0.1:53/udp is in use",
		syscall.EACCES:        "port 127.0.0.1:53/udp: permission denied: ports below 1024 need rights",
		syscall.EADDRNOTAVAIL: "127.0.0.1 is no address of this host",
		syscall.EMFILE:        "port 127.0.0.1:53/udp: too many open files",
	} {
		e := &busyError{pub, &net.OpError{Op: "listen", Err: os.NewSyscallError("bind", errno)}}
		if e.Error() != want {
			t.Errorf("%v: %s", errno, e)
		}
	}
}

func TestPublishChangedGuestPort(t *testing.T) {
	p := testPublisher(t)
	pub := publication("tcp", hostPort(t), guestTCP(t, greet("one")))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	before := wantGreeting(t, pub.Host, "one")
	pub.Guest = guestTCP(t, greet("two"))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	wantEcho(t, before)
	wantGreeting(t, pub.Host, "two")
	if n := p.connections(); n != 2 {
		t.Errorf("%d connections, not 2", n)
	}
}

func TestPublishRemovalCuts(t *testing.T) {
	p := testPublisher(t)
	ended := make(chan error, 1)
	guest := guestTCP(t, func(c *net.TCPConn) {
		fmt.Fprintln(c, "one")
		_, err := io.Copy(c, c)
		ended <- err
	})
	stays, goes := publication("tcp", hostPort(t), guestTCP(t, greet("two"))), publication("tcp", hostPort(t), guest)
	if err := p.set([]netwire.Publication{stays, goes}); err != nil {
		t.Fatal(err)
	}
	kept, cut := wantGreeting(t, stays.Host, "two"), wantGreeting(t, goes.Host, "one")
	if err := p.set([]netwire.Publication{stays}); err != nil {
		t.Fatal(err)
	}
	wantClosed(t, goes.Host)
	if _, err := cut.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection of a port that is gone: %v", err)
	}
	<-ended
	wantEcho(t, kept)
	untilTrue(t, "one connection is left", func() bool { return p.connections() == 1 })
	// The port is free for others at once.
	l, err := net.Listen("tcp", goes.Host.String())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

// TestPublishRefusedByTheGuest: the client sees a reset, not an empty answer.
func TestPublishRefusedByTheGuest(t *testing.T) {
	p := testPublisher(t)
	pub := publication("tcp", hostPort(t), hostPort(t))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	wantReset(t, pub.Host)
}

// TestPublishStartRetries: a port that another program has is opened when it is free.
func TestPublishStartRetries(t *testing.T) {
	p := testPublisher(t)
	p.retry = 5 * time.Millisecond
	guest := guestTCP(t, greet("one"))
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	free := publication("tcp", hostPort(t), guest)
	taken := publication("tcp", uint16(other.Addr().(*net.TCPAddr).Port), guest)
	p.start([]netwire.Publication{taken, free})
	wantGreeting(t, free.Host, "one")
	problem := "port " + taken.Host.String() + " is in use by another program"
	if busy := p.busy(); p.problem() != problem || len(busy) != 1 || busy[0] != taken.String() {
		t.Errorf("the problem is %q, busy are %q", p.problem(), busy)
	}
	// A change of something else neither fails for it nor gives it up.
	more := publication("tcp", hostPort(t), guest)
	if err := p.set([]netwire.Publication{taken, free, more}); err != nil || p.problem() != problem {
		t.Fatalf("a change beside it: %v; the problem is %q", err, p.problem())
	}
	other.Close()
	untilTrue(t, "the port is open", func() bool { return p.problem() == "" })
	wantGreeting(t, taken.Host, "one")
	wantGreeting(t, more.Host, "one")
	untilTrue(t, "no timer is left", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.timer == nil
	})
}

// TestPublishBoundsConnections: the guest does not answer, and the clients are many.
func TestPublishBoundsConnections(t *testing.T) {
	p := testPublisher(t)
	p.dial = func(ctx context.Context, _ string, _ uint16) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	pub := publication("tcp", hostPort(t), 1)
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	for range publishConns {
		dialTCP(t, pub.Host)
	}
	untilTrue(t, "all are connected", func() bool { return p.connections() == publishConns })
	wantReset(t, pub.Host)
	if n := p.connections(); n != publishConns {
		t.Errorf("%d connections", n)
	}
	if err := p.set(nil); err != nil {
		t.Fatal(err)
	}
	untilTrue(t, "none is left", func() bool { return p.connections() == 0 })
}

// loopbackUp is for a network of the test's own.
func loopbackUp(t *testing.T) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	lo.SetUint16(unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		t.Fatal(err)
	}
}

// TestPublishWidens: 127.0.0.1 becomes all addresses and back, and IPv6 stands beside it.
func TestPublishWidens(t *testing.T) {
	if !inNetns(t) {
		return
	}
	loopbackUp(t)
	p := testPublisher(t)
	for _, address := range []string{"127.0.0.1", "::1"} {
		narrow := publication("tcp", 8080, guestTCP(t, greet("one")))
		narrow.Host = netip.AddrPortFrom(netip.MustParseAddr(address), 8080)
		wide := narrow
		wide.Host = netip.AddrPortFrom(netip.IPv4Unspecified(), 8080)
		if narrow.Host.Addr().Is6() {
			wide.Host = netip.AddrPortFrom(netip.IPv6Unspecified(), 8080)
		}
		both := []netwire.Publication{narrow, wide}
		for i, pub := range append(both, both...) {
			if err := p.set([]netwire.Publication{pub}); err != nil {
				t.Fatal(err)
			}
			c := wantGreeting(t, narrow.Host, "one")
			if i != 1 {
				continue
			}
			// What fails after the wide one made room brings it back.
			other, err := net.Listen("tcp", "127.0.0.1:9999")
			if err != nil {
				t.Fatal(err)
			}
			if err := p.set([]netwire.Publication{narrow, publication("tcp", 9999, 1)}); err == nil {
				t.Fatal("a busy port is no error")
			}
			other.Close()
			wantEcho(t, c)
			wantGreeting(t, narrow.Host, "one")
			if p.open[sideOf(wide)] == nil || len(p.open) != 1 || p.problem() != "" {
				t.Errorf("the wide port is gone: %v", p.open)
			}
		}
	}
}

// TestPublishWithoutDescriptors: who comes while the process has none left is served
// when it has some.
func TestPublishWithoutDescriptors(t *testing.T) {
	if !inNetns(t) {
		return
	}
	loopbackUp(t)
	p := testPublisher(t)
	pub := publication("tcp", 8080, guestTCP(t, greet("one")))
	if err := p.set([]netwire.Publication{pub}); err != nil {
		t.Fatal(err)
	}
	wantGreeting(t, pub.Host, "one").Close()
	untilTrue(t, "the connection is over", func() bool { return p.connections() == 0 })
	limit := unix.Rlimit{Cur: 64, Max: 64}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	var files []*os.File
	for {
		f, err := os.Open(os.DevNull)
		if err != nil {
			break
		}
		defer f.Close()
		files = append(files, f)
	}
	files[0].Close()
	c := dialTCP(t, pub.Host)
	untilTrue(t, "accept fails", func() bool {
		stacks := make([]byte, 1<<20)
		return strings.Contains(string(stacks[:runtime.Stack(stacks, true)]), "acceptPause).after")
	})
	for _, f := range files {
		f.Close()
	}
	if got, err := readLine(c); got != "one" || err != nil {
		t.Fatalf("%q, %v", got, err)
	}
	wantEcho(t, c)
}

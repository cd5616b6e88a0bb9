package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// listen is a service of the guest: handle gets each connection in a goroutine.
func listen(t *testing.T, network, address string, handle func(service)) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			all.Go(func() { defer conn.Close(); handle(conn.(service)) })
		}
	})
	t.Cleanup(func() { l.Close(); all.Wait() })
	return l.Addr().String()
}

func (a *testAgent) dialGuest(network, address string) (*wire.GuestConn, error) {
	a.t.Helper()
	conn, _ := a.dial()
	ctx, cancel := context.WithTimeout(a.t.Context(), 20*time.Second)
	defer cancel()
	c, err := wire.DialGuest(ctx, conn, wire.Dial{Network: network, Address: address})
	if err == nil {
		// Nothing here may wait for ever.
		stop := time.AfterFunc(30*time.Second, func() { c.Close() })
		a.t.Cleanup(func() { stop.Stop(); c.Close() })
	}
	return c, err
}

func (a *testAgent) mustDial(network, address string) *wire.GuestConn {
	a.t.Helper()
	c, err := a.dialGuest(network, address)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

// 10 MB there and 10 MB back at once, over TCP and a Unix socket with a long path.
func TestDialBothWays(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	const size = 10 << 20
	up, down := make([]byte, size), make([]byte, size)
	rand.Read(up)
	rand.Read(down)
	got := make(chan [32]byte, 2)
	serve := func(conn service) {
		var sender sync.WaitGroup
		sender.Go(func() { conn.Write(down); conn.CloseWrite() })
		data, _ := io.ReadAll(conn)
		got <- sha256.Sum256(data)
		sender.Wait()
	}
	dir := t.TempDir()
	for range 3 {
		dir = filepath.Join(dir, strings.Repeat("d", 60))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(t.TempDir(), "s")
	listen(t, "unix", short, serve)
	if err := os.Rename(short, filepath.Join(dir, "app.sock")); err != nil {
		t.Fatal(err)
	}
	for network, address := range map[string]string{
		"tcp": listen(t, "tcp", "127.0.0.1:0", serve), "unix": filepath.Join(dir, "app.sock"),
	} {
		c := a.mustDial(network, address)
		var sender sync.WaitGroup
		sender.Go(func() {
			if _, err := c.Write(up); err != nil {
				t.Errorf("%s: %v", network, err)
			}
			c.CloseWrite()
		})
		data, err := io.ReadAll(c)
		sender.Wait()
		if err != nil || !bytes.Equal(data, down) {
			t.Errorf("%s: %d bytes came, %v", network, len(data), err)
		}
		if <-got != sha256.Sum256(up) {
			t.Errorf("%s: other bytes arrived", network)
		}
	}
}

// Who sends without reading is not held up by what the other sends meanwhile.
func TestDialDirectionsAreIndependent(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	const size = 8 << 20
	got := make(chan int64, 1)
	c := a.mustDial("tcp", listen(t, "tcp", "127.0.0.1:0", func(conn service) {
		var sender sync.WaitGroup
		sender.Go(func() { conn.Write(make([]byte, size)); conn.CloseWrite() })
		n, _ := io.Copy(io.Discard, conn)
		got <- n
		sender.Wait()
	}))
	if _, err := c.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if n := <-got; n != size {
		t.Errorf("%d bytes arrived", n)
	}
	if n, err := io.Copy(io.Discard, c); n != size || err != nil {
		t.Errorf("%d bytes came back, %v", n, err)
	}
}

func TestDialHalfClose(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	// The host first: the service answers after the end of the question.
	c := a.mustDial("tcp", listen(t, "tcp", "127.0.0.1:0", func(conn service) {
		question, _ := io.ReadAll(conn)
		conn.Write(bytes.ToUpper(question))
	}))
	c.Write([]byte("question"))
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(c); string(answer) != "QUESTION" || err != nil {
		t.Errorf("%q, %v", answer, err)
	}
	if _, err := c.Write([]byte("more")); err == nil {
		t.Error("written after the end")
	}

	// The service first: its end is seen while the host still sends.
	rest := make(chan string, 1)
	c = a.mustDial("tcp", listen(t, "tcp", "127.0.0.1:0", func(conn service) {
		conn.Write([]byte("greeting"))
		conn.CloseWrite()
		data, _ := io.ReadAll(conn)
		rest <- string(data)
	}))
	if greeting, err := io.ReadAll(c); string(greeting) != "greeting" || err != nil {
		t.Fatalf("%q, %v", greeting, err)
	}
	c.Write([]byte("still "))
	c.Write([]byte("here"))
	c.CloseWrite()
	if got := <-rest; got != "still here" {
		t.Errorf("%q arrived", got)
	}
}

// An end that is none is told as such, in both directions.
func TestDialReset(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	c := a.mustDial("tcp", listen(t, "tcp", "127.0.0.1:0", func(conn service) {
		conn.Write([]byte("half"))
		conn.Read(make([]byte, 1)) // the client has it: a reset would take it away
		conn.(*net.TCPConn).SetLinger(0)
	}))
	half := make([]byte, 4)
	if _, err := io.ReadFull(c, half); err != nil {
		t.Fatal(err)
	}
	c.Write([]byte("x"))
	if _, err := c.Read(half); err == nil || err == io.EOF || !strings.Contains(err.Error(), "connection reset by peer") {
		t.Errorf("after a reset of the service: %v", err)
	}
	within(t, 10*time.Second, "error of a write", func() bool { _, err := c.Write([]byte("x")); return err != nil })

	seen := make(chan error, 1)
	c = a.mustDial("tcp", listen(t, "tcp", "127.0.0.1:0", func(conn service) {
		conn.Write([]byte("half"))
		_, err := io.ReadAll(conn)
		seen <- err
	}))
	if _, err := io.ReadFull(c, half); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if err := <-seen; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the service saw the host's going away as %v", err)
	}
	if _, err := c.Read(half); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a read after Close: %v", err)
	}
}

func TestDialRefusals(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, free, _ := net.SplitHostPort(l.Addr().String())
	l.Close()
	dir := t.TempDir()
	write(t, dir+"/file", "", 0o644)
	gram, err := net.ListenPacket("unixgram", dir+"/gram")
	if err != nil {
		t.Fatal(err)
	}
	defer gram.Close()
	for _, c := range []struct{ network, address, code, message string }{
		{"tcp", "127.0.0.1:" + free, wire.ErrRefused, "nothing listens on port " + free + " in the guest"},
		{"tcp", "localhost:" + free, wire.ErrRefused, "nothing listens on port " + free + " in the guest"},
		{"tcp", "127.0.0.1", wire.ErrInvalid, "HOST:PORT"},
		{"tcp", "127.0.0.1:0", wire.ErrInvalid, "HOST:PORT"},
		{"tcp", "127.0.0.1:65536", wire.ErrInvalid, "HOST:PORT"},
		{"tcp", "example.org:80", wire.ErrInvalid, "neither"},
		{"unix", dir + "/none", wire.ErrNotFound, "the guest has no socket " + dir + "/none"},
		{"unix", dir + "/file/none", wire.ErrNotFound, "no socket"},
		{"unix", dir + "/file", wire.ErrRefused, "nothing listens on " + dir + "/file"},
		{"unix", dir + "/gram", wire.ErrInvalid, "no stream socket"},
		{"unix", "relative", wire.ErrInvalid, "absolute"},
		{"udp", "127.0.0.1:53", wire.ErrInvalid, "udp"},
	} {
		_, err := a.dialGuest(c.network, c.address)
		var refused *wire.Error
		if !errors.As(err, &refused) || refused.Code != c.code || !strings.Contains(refused.Message, c.message) {
			t.Errorf("%s %s: %v", c.network, c.address, err)
		}
	}
	if err := a.call(wire.Request{Op: wire.OpDial}, nil); err == nil {
		t.Error("a dial without an address was taken")
	}
}

// "localhost" finds a service that listens on ::1 only, where there is IPv6.
func TestDialLocalhost(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		l, err = net.Listen("tcp", "127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	c := a.mustDial("tcp", "localhost:"+port)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Write([]byte("six"))
	conn.Close()
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "six" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// Connections take no slots of other requests, and have a bound of their own.
func TestDialSlots(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	address := listen(t, "tcp", "127.0.0.1:0", func(conn service) { io.Copy(io.Discard, conn) })
	for range maxDials {
		a.mustDial("tcp", address)
	}
	var refused *wire.Error
	if _, err := a.dialGuest("tcp", address); !errors.As(err, &refused) || refused.Code != wire.ErrOverloaded {
		t.Errorf("one more: %v", err)
	}
	if err := a.call(wire.Request{Op: wire.OpHello}, nil); err != nil {
		t.Errorf("another request: %v", err)
	}
}

// A host that sends more than the window is cut off.
func TestDialBeyondWindow(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	stop := make(chan struct{})
	defer close(stop)
	address := listen(t, "tcp", "127.0.0.1:0", func(conn service) { <-stop })
	conn, ended := a.dial()
	s := wire.NewStream(conn)
	s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpDial, Dial: &wire.Dial{Network: "tcp", Address: address}})
	for range 64 << 20 / wire.MaxPayload {
		if s.Send(wire.KindStdin, make([]byte, wire.MaxPayload)) != nil {
			break
		}
	}
	within(t, 10*time.Second, "end of the stream", func() bool { return closed(ended) })
}

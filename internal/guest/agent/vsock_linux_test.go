package agent

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/daemon/fcproc"
	"banger/internal/guest/wire"
)

func TestVsockKnowsTheHost(t *testing.T) {
	for _, tt := range []struct {
		from unix.Sockaddr
		want bool
	}{
		{&unix.SockaddrVM{CID: unix.VMADDR_CID_HOST, Port: 1073741824}, true},
		{&unix.SockaddrVM{CID: unix.VMADDR_CID_LOCAL, Port: 1021}, false},
		{&unix.SockaddrVM{CID: unix.VMADDR_CID_HYPERVISOR}, false},
		{&unix.SockaddrVM{CID: 3, Port: 1021}, false}, // the guest itself
		{&unix.SockaddrVM{CID: unix.VMADDR_CID_ANY}, false},
		{&unix.SockaddrUnix{Name: "host"}, false},
		{nil, false},
	} {
		if got := fromHost(tt.from); got != tt.want {
			t.Errorf("fromHost(%+v) = %v", tt.from, got)
		}
	}
}

// listenLikeVsock listens on a Unix socket; from is asked for its clients' addresses.
func listenLikeVsock(t *testing.T, from func(unix.Sockaddr) bool) (v *Vsock, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "guest")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "vsock")
	t.Cleanup(func() { file.Close() })
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, vsockBacklog); err != nil {
		t.Fatal(err)
	}
	if v, err = newVsock(file, from); err != nil {
		t.Fatal(err)
	}
	return v, path
}

func anybody(unix.Sockaddr) bool { return true }

func dialUnix(t *testing.T, local, path string) *net.UnixConn {
	t.Helper()
	var from *net.UnixAddr
	if local != "" {
		from = &net.UnixAddr{Net: "unix", Name: local}
	}
	conn, err := net.DialUnix("unix", from, &net.UnixAddr{Net: "unix", Name: path})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn
}

// Whoever is not the host gets no word, and the host is served after that.
func TestVsockSendsOthersAway(t *testing.T) {
	a := newTestAgent(t)
	me := fmt.Sprint("@banger-test-host", os.Getpid())
	v, path := listenLikeVsock(t, func(from unix.Sockaddr) bool {
		u, ok := from.(*unix.SockaddrUnix)
		return ok && u.Name == me
	})
	served := make(chan error, 1)
	go func() { served <- a.ServeVsock(v) }()
	for range 3 {
		other := dialUnix(t, "", path)
		if n, err := other.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("another peer reads %d bytes, %v", n, err)
		}
	}
	var hello wire.Hello
	err := wire.Call(t.Context(), dialUnix(t, me, path), wire.Request{Op: wire.OpHello, Nonce: "once"}, &hello)
	if err != nil || hello.Nonce != "once" {
		t.Errorf("%+v, %v", hello, err)
	}
	within(t, 5*time.Second, "end of all connections but the one awaited", func() bool { return len(v.slots) == 1 })
	v.Close()
	within(t, 5*time.Second, "end of the serving", func() bool { return len(served) == 1 })
}

// accepted is one connection of v, from both its ends.
func accepted(t *testing.T, v *Vsock, path string) (host *net.UnixConn, guest net.Conn) {
	t.Helper()
	host = dialUnix(t, "", path)
	guest, err := v.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { guest.Close() })
	return host, guest
}

// After its last frame the guest waits for the host to close, and takes what it sends.
func TestVsockLeavesTheClosingToTheHost(t *testing.T) {
	a := newTestAgent(t)
	v, path := listenLikeVsock(t, anybody)
	host, guest := accepted(t, v, path)
	ended := make(chan struct{})
	go func() { defer close(ended); a.Handle(guest) }()
	s := wire.NewStream(host)
	if err := s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpHello}); err != nil {
		t.Fatal(err)
	}
	within(t, 10*time.Second, "end of the request", func() bool { return closed(ended) })
	if _, err := guest.Read(make([]byte, 1)); err == nil {
		t.Error("the guest's end can be read on")
	}
	if err := s.Send(wire.KindStdin, make([]byte, wire.MaxPayload)); err != nil {
		t.Errorf("the guest has closed the connection: %v", err)
	}
	if kind, _, err := s.Recv(); kind != wire.KindReply || err != nil {
		t.Errorf("kind %d, %v", kind, err)
	}
	if len(v.slots) != 1 {
		t.Errorf("%d connections are counted, not one", len(v.slots))
	}
	host.Close()
	within(t, 10*time.Second, "end of the connection", func() bool { return len(v.slots) == 0 })
}

// What is broken off is closed at once: only a last frame is waited for.
func TestVsockClosesWhatIsBrokenOff(t *testing.T) {
	a := newTestAgent(t)
	v, path := listenLikeVsock(t, anybody)
	host, guest := accepted(t, v, path)
	go a.Handle(guest)
	s := wire.NewStream(host)
	s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"sleep", "60"}, Stdin: true}})
	if kind, _, err := s.Recv(); kind != wire.KindStarted || err != nil {
		t.Fatalf("kind %d, %v", kind, err)
	}
	s.Send(wire.KindExit, nil) // which is no frame of a host
	if _, _, err := s.Recv(); err == nil {
		t.Error("a stream out of step goes on")
	}
	within(t, 10*time.Second, "end of the connection", func() bool { return len(v.slots) == 0 })
}

func TestVsockFinishEndsWaits(t *testing.T) {
	v, path := listenLikeVsock(t, anybody)
	host, guest := accepted(t, v, path)
	ended := make(chan error, 1)
	go func() {
		_, err := guest.Read(make([]byte, 1))
		ended <- err
	}()
	if err := guest.(wire.Finisher).Finish(); err != nil {
		t.Fatal(err)
	}
	within(t, 5*time.Second, "end of the read", func() bool { return len(ended) == 1 })
	if err := <-ended; err == nil {
		t.Error("a read of what was finished succeeds")
	}
	if err := guest.Close(); err == nil || len(v.slots) != 1 {
		t.Errorf("Close after Finish: %v, %d connections are counted", err, len(v.slots))
	}
	host.Close()
	within(t, 5*time.Second, "end of the connection", func() bool { return len(v.slots) == 0 })
}

// More connections than the agent takes wait, and are served when there is room.
func TestVsockBounds(t *testing.T) {
	a := newTestAgent(t)
	v, path := listenLikeVsock(t, anybody)
	v.slots = make(chan struct{}, 2)
	go a.ServeVsock(v)
	first, second := dialUnix(t, "", path), dialUnix(t, "", path)
	within(t, 5*time.Second, "two connections", func() bool { return len(v.slots) == 2 })
	third := dialUnix(t, "", path)
	answered := make(chan error, 1)
	go func() { answered <- wire.Call(t.Context(), third, wire.Request{Op: wire.OpHello}, nil) }()
	if err := wire.Call(t.Context(), second, wire.Request{Op: wire.OpHello}, nil); err != nil {
		t.Fatal(err)
	}
	within(t, 10*time.Second, "answer", func() bool { return len(answered) == 1 })
	if err := <-answered; err != nil {
		t.Error(err)
	}
	first.Close()
}

// firecracker stands for Firecracker's vsock: a Unix socket for the host, connections to
// the guest's at path. Of each end it knows what Firecracker knows, see Vsock; what it
// has not got rid of when the guest closes it drops at once, not after 2 s.
type firecracker struct {
	path string
	mu   sync.Mutex
	open []net.Conn
}

func startFirecracker(t *testing.T, path string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	run := filepath.Join(dir, "run/jail/firecracker/vm/root/run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := os.Open(run)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/v.sock", fd.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	f := &firecracker{path: path}
	t.Cleanup(func() {
		l.Close()
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, c := range f.open {
			c.Close()
		}
	})
	go func() {
		for {
			host, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(host)
		}
	}()
	return dir
}

func (f *firecracker) serve(host net.Conn) {
	defer host.Close()
	line := make([]byte, 0, 32)
	for !bytes.HasSuffix(line, []byte("\n")) && len(line) < cap(line) {
		if _, err := host.Read(line[len(line) : len(line)+1]); err != nil {
			return
		}
		line = line[:len(line)+1]
	}
	if string(line) != fmt.Sprintf("CONNECT %d\n", wire.VsockPort) {
		return
	}
	guest, err := net.Dial("unix", f.path)
	if err != nil {
		return
	}
	defer guest.Close()
	f.mu.Lock()
	f.open = append(f.open, host, guest)
	f.mu.Unlock()
	host.(*net.UnixConn).SetWriteBuffer(4 << 10)
	fmt.Fprintf(host, "OK 1073741824\n")
	go func() {
		io.Copy(guest, host)
		guest.Close() // both ways, also when the host has ended its writing alone
	}()
	f.toHost(host, guest)
}

// toHost passes on what the guest sends, with a buffer of 64 KiB between.
func (f *firecracker) toHost(host, guest net.Conn) {
	chunks := make(chan []byte, 16)
	go func() {
		defer guest.Close()
		for c := range chunks {
			if _, err := host.Write(c); err != nil {
				return
			}
		}
	}()
	defer close(chunks)
	for {
		chunk := make([]byte, 4<<10)
		n, err := guest.Read(chunk)
		if err != nil {
			host.Close()
			return
		}
		select {
		case chunks <- chunk[:n]:
		case <-time.After(20 * time.Second):
			return
		}
	}
}

// The host's half and the guest's half together.
func TestVsockConformance(t *testing.T) {
	a := newTestAgent(t)
	v, path := listenLikeVsock(t, anybody)
	dir := startFirecracker(t, path)
	go a.ServeVsock(v)
	conformance.Channel(t, conformance.GuestHost{
		Open: func(magic []byte) driver.Channel { return fcproc.New().Channel(dir, magic) },
		ID:   a.opts.Config.Identity.ID, Exec: true, NoMagic: true,
	})
	within(t, 20*time.Second, "end of all connections", func() bool { return len(v.slots) == 1 && len(a.slots) == 0 })
}

// A host that reads late gets all there was, and how it ended.
func TestVsockSlowHost(t *testing.T) {
	a := newTestAgent(t)
	v, path := listenLikeVsock(t, anybody)
	go a.ServeVsock(v)
	ch := fcproc.New().Channel(startFirecracker(t, path), nil)
	defer ch.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	conn, err := ch.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const size = 40 << 10
	s := wire.NewStream(conn)
	s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{
		Argv: []string{"sh", "-c", fmt.Sprintf("head -c %d /dev/zero; exit 7", size)},
	}})
	if kind, _, err := s.Recv(); kind != wire.KindStarted || err != nil {
		t.Fatalf("kind %d, %v", kind, err)
	}
	within(t, 20*time.Second, "end of the command", func() bool { return len(a.slots) == 0 })
	got := 0
	for {
		kind, payload, err := s.Recv()
		if err != nil {
			t.Fatalf("after %d of %d bytes: %v", got, size, err)
		}
		if kind == wire.KindStdout {
			got += len(payload)
			continue
		}
		if kind != wire.KindExit || !strings.Contains(string(payload), `"code":7`) || got != size {
			t.Errorf("kind %d: %s, after %d bytes of %d", kind, payload, got, size)
		}
		return
	}
}

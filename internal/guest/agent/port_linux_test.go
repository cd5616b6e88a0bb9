package agent

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// openRawTerminal opens a terminal that passes all bytes, which behaves like a port
// that has a host.
func openRawTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	m, s, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	defer s.Close()
	tio, err := unix.IoctlGetTermios(int(s.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	tio.Iflag, tio.Oflag, tio.Lflag = 0, 0, 0
	tio.Cflag = tio.Cflag&^unix.CSIZE | unix.CS8
	tio.Cc[unix.VMIN], tio.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(s.Fd()), unix.TCSETS, tio); err != nil {
		t.Fatal(err)
	}
	nonblocking := func(f *os.File) *os.File {
		fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			err = unix.SetNonblock(fd, true)
		}
		if err != nil {
			t.Fatal(err)
		}
		f = os.NewFile(uintptr(fd), "terminal")
		t.Cleanup(func() { f.Close() })
		return f
	}
	return nonblocking(m), nonblocking(s)
}

// A named pipe behaves like a port as a reader sees it: while nobody has it open for
// writing a read returns 0 at once, and poll reports POLLHUP all the time.
func openPipePort(t *testing.T) (*Port, func() *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "port")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPort(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p, func() *os.File {
		t.Helper()
		w, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
}

type read struct {
	data string
	err  error
}

// reads passes on what reading returns.
func reads(p *Port) <-chan read {
	ch := make(chan read)
	go func() {
		buf := make([]byte, 100)
		for {
			n, err := p.Read(buf)
			ch <- read{string(buf[:n]), err}
			if err != nil && err != io.EOF {
				return
			}
		}
	}()
	return ch
}

func want(t *testing.T, ch <-chan read, data string, err error) {
	t.Helper()
	select {
	case got := <-ch:
		if got.data != data || !errors.Is(got.err, err) {
			t.Fatalf("got %q, %v, want %q, %v", got.data, got.err, data, err)
		}
	case <-time.After(edgeGuard / 2):
		t.Fatal("the reader was not woken")
	}
}

func TestPortSeesHostsComeAndGo(t *testing.T) {
	p, connect := openPipePort(t)
	ch := reads(p)
	want(t, ch, "", io.EOF)
	for range 3 {
		w := connect()
		w.Write([]byte("hello"))
		want(t, ch, "hello", nil)
		w.Write([]byte("again"))
		want(t, ch, "again", nil)
		w.Close()
		want(t, ch, "", io.EOF)
	}
	p.Close()
	want(t, ch, "", os.ErrClosed)
}

// While no host is connected the port costs nothing.
func TestPortWithoutHostBurnsNoCPU(t *testing.T) {
	p, connect := openPipePort(t)
	ch := reads(p)
	want(t, ch, "", io.EOF)
	w := connect()
	w.Write([]byte("x"))
	want(t, ch, "x", nil)
	w.Close()
	want(t, ch, "", io.EOF) // from now on poll reports POLLHUP

	const span = 3 * time.Second // longer than edgeGuard
	before := cpuTime(t)
	select {
	case got := <-ch:
		t.Fatalf("got %+v", got)
	case <-time.After(span):
	}
	if used := cpuTime(t) - before; used > span/100 {
		t.Errorf("%s of CPU in %s", used, span)
	} else {
		t.Logf("%s of CPU in %s", used, span)
	}
	w = connect()
	defer w.Close()
	w.Write([]byte("y"))
	want(t, ch, "y", nil)
}

func cpuTime(t *testing.T) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// A write that nobody takes is cut short by the deadline, later ones fail until it is
// lifted.
func TestPortWriteDeadline(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	p, err := newPort(os.NewFile(uintptr(fds[0]), "port"))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	other := os.NewFile(uintptr(fds[1]), "host")
	defer other.Close()
	host, err := net.FileConn(other)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()

	type written struct {
		n   int
		err error
	}
	done := make(chan written, 1)
	big := bytes.Repeat([]byte("0123456789"), 100000)
	go func() {
		n, err := p.Write(big)
		done <- written{n, err}
	}()
	host.SetReadDeadline(time.Now().Add(10 * time.Second))
	head := make([]byte, 10)
	if _, err := io.ReadFull(host, head); err != nil {
		t.Fatal(err)
	}
	select {
	case w := <-done:
		t.Fatalf("not blocked: %+v", w)
	case <-time.After(50 * time.Millisecond):
	}
	p.SetWriteDeadline(time.Unix(1, 0))
	var cut written
	select {
	case cut = <-done:
	case <-time.After(edgeGuard / 2):
		t.Fatal("the deadline did not end the write")
	}
	if !errors.Is(cut.err, os.ErrDeadlineExceeded) || cut.n < 10 || cut.n == len(big) {
		t.Fatalf("%+v", cut)
	}
	if n, err := p.Write([]byte("x")); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("%d, %v", n, err)
	}
	p.SetWriteDeadline(time.Time{})
	go func() {
		n, err := p.Write(big[cut.n:])
		done <- written{n, err}
	}()
	got := append(head, make([]byte, len(big)-len(head))...)
	if _, err := io.ReadFull(host, got[len(head):]); err != nil || !bytes.Equal(got, big) {
		t.Fatalf("other bytes arrived, %v", err)
	}
	if w := <-done; w.err != nil {
		t.Fatal(w.err)
	}
}

func TestOpenPortRefusesFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenPort(path); err == nil {
		t.Error("a file can be waited for")
	}
	if _, err := OpenPort(path + "x"); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("got %v", err)
	}
}

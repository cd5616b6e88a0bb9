package fcproc

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"banger/internal/guest/wire"
)

// fakeVsock listens where Firecracker does. answer gets each connection with its number,
// from 1, after the host has said what it wants.
func fakeVsock(t *testing.T, dir string, answer func(n int64, conn net.Conn)) (asked *atomic.Int64) {
	t.Helper()
	run := filepath.Join(dir, root(firecracker, "0f9a"), "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(run, "v.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	asked = new(atomic.Int64)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				line, err := bufio.NewReader(conn).ReadString('\n')
				if want := "CONNECT " + strconv.Itoa(wire.VsockPort) + "\n"; err != nil || line != want {
					if err == nil {
						t.Errorf("the host says %q, want %q", line, want)
					}
					return
				}
				answer(asked.Add(1), conn)
			}()
		}
	}()
	return asked
}

// patience bounds each wait for what must happen.
const patience = 20 * time.Second

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// shortDir is a directory whose sockets fit into an address.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "fc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// While nobody listens in the guest Firecracker closes each connection without a word. The
// guest's first bytes may come with the answer.
func TestDialWaitsForTheGuest(t *testing.T) {
	dir := shortDir(t)
	c := New().Channel(dir, nil)
	defer c.Close()
	dialled := make(chan net.Conn, 1)
	go func() { // before there is a socket
		conn, err := c.Dial(within(t))
		if err != nil {
			t.Error(err)
		}
		dialled <- conn
	}()
	asked := fakeVsock(t, dir, func(n int64, conn net.Conn) {
		switch n {
		case 1: // nobody listens
		case 2:
			io.WriteString(conn, "OK")
		case 3:
			io.WriteString(conn, "FAULT 7\n")
		default:
			io.WriteString(conn, "OK 1073741824\nhello")
			io.Copy(conn, conn)
		}
	})
	conn := <-dialled
	if conn == nil {
		t.FailNow()
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if n := asked.Load(); n != 4 {
		t.Errorf("%d attempts", n)
	}
	if _, err := io.WriteString(conn, " you"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("hello you"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "hello you" {
		t.Errorf("%q, %v", got, err)
	}
}

// What answers is not trusted, nor waited for beyond the context.
func TestDialOfWhatIsNoGuest(t *testing.T) {
	for name, answer := range map[string]func(net.Conn){
		"a long answer": func(conn net.Conn) { io.WriteString(conn, "OK "+strings.Repeat("1", 1<<20)) },
		"an empty line": func(conn net.Conn) { io.WriteString(conn, "\n") },
		"no port":       func(conn net.Conn) { io.WriteString(conn, "OK \n") },
		"silence":       func(conn net.Conn) { io.Copy(io.Discard, conn) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			why := errors.New("enough")
			ctx, cancel := context.WithCancelCause(t.Context())
			fakeVsock(t, dir, func(n int64, conn net.Conn) {
				if n == 2 || name == "silence" {
					cancel(why)
				}
				answer(conn)
			})
			c := New().Channel(dir, nil)
			defer c.Close()
			conn, err := c.Dial(ctx)
			if !errors.Is(err, why) {
				t.Errorf("%v, %v", conn, err)
			}
		})
	}
}

func TestCloseEndsConnectionsAndDials(t *testing.T) {
	dir := shortDir(t)
	waits := make(chan struct{}, 1)
	fakeVsock(t, dir, func(n int64, conn net.Conn) {
		if n == 1 {
			io.WriteString(conn, "OK 1\n")
		} else {
			waits <- struct{}{}
		}
		io.Copy(io.Discard, conn)
	})
	c := New().Channel(dir, nil)
	conn, err := c.Dial(within(t))
	if err != nil {
		t.Fatal(err)
	}
	dialled := make(chan error, 1)
	go func() {
		_, err := c.Dial(within(t))
		dialled <- err
	}()
	<-waits
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	conn.SetDeadline(time.Now().Add(patience)) // fails where it is closed
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a connection of a closed channel: %v", err)
	}
	if err := <-dialled; !errors.Is(err, net.ErrClosed) {
		t.Errorf("a Dial that Close met: %v", err)
	}
	if _, err := c.Dial(within(t)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a Dial after Close: %v", err)
	}
}

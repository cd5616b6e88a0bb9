package cli

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// closeInOrder closes a connection without a reset. The kernel forgets a TCP connection
// that was closed so after a second, and not a minute.
func closeInOrder(t *testing.T, conn halfConn) {
	t.Helper()
	if tcp, ok := conn.(*net.TCPConn); ok {
		raw, err := tcp.SyscallConn()
		if err == nil {
			cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_LINGER2, 1) })
			if err == nil {
				err = cerr
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	conn.Close()
}

// TestForwardClientLeaves: a client that has closed in order keeps no place while the
// service stands still; one that has ended its half waits as long as it likes.
func TestForwardClientLeaves(t *testing.T) {
	for _, local := range []string{"0:80", "SOCKET:80"} {
		t.Run(local, func(t *testing.T) {
			t.Parallel()
			d := withShop(t)
			got, told, answer := make(chan string, 3), make(chan bool, 3), make(chan bool)
			d.net.dial = func(_ wire.Dial, g *guestEnd) {
				g.started()
				all := g.stdin()
				if all == "both halves ended" {
					g.outEOF()
				}
				got <- all
				if all == "waits" {
					<-answer
					g.out("at last")
					g.outEOF()
					g.exit(0)
					return
				}
				g.conn.SetReadDeadline(time.Now().Add(4 * stallTimeout))
				_, _, err := wire.ReadFrame(g.r, nil)
				told <- err != nil && !strings.Contains(err.Error(), "timeout")
			}
			call, address := forwarding(t, d, "shop", strings.Replace(local, "SOCKET", filepath.Join(t.TempDir(), "s"), 1))
			begin := func(text string) halfConn {
				conn := connectTo(t, address)
				conn.SetDeadline(time.Now().Add(8 * stallTimeout))
				io.WriteString(conn, text)
				conn.CloseWrite()
				want(t, "what came", <-got, text)
				return conn
			}
			waits := begin("waits")
			closeInOrder(t, begin("leaves"))
			both := begin("both halves ended") // and it never closes
			want(t, "the guest's stream is closed", <-told, true)
			want(t, "the guest's stream is closed", <-told, true)
			answer <- true
			said, err := io.ReadAll(waits)
			if err != nil || string(said) != "at last" {
				t.Errorf("to who waited: %q, %v", said, err)
			}
			both.Close()
			call.kill(syscall.SIGINT)
			call.wait()
			want(t, "stderr", strings.Count(call.err.String(), "\n"), 2) // the address, and "interrupted"
		})
	}
}

// TestForwardSlowService: what a client leaves behind gets to a service that takes it
// slowly, however long that lasts.
func TestForwardSlowService(t *testing.T) {
	t.Parallel()
	d := withShop(t)
	const size = wire.StdinWindow + 6*maxStdin // which takes longer than a stall
	got := make(chan int, 1)
	d.net.dial = func(_ wire.Dial, g *guestEnd) {
		g.started()
		tick := time.NewTicker(stallTimeout / 5) // the slowness is what is tested
		defer tick.Stop()
		all, held, ended := 0, 0, false
		g.conn.SetReadDeadline(time.Now().Add(8 * stallTimeout))
		for !ended {
			kind, payload, err := wire.ReadFrame(g.r, nil)
			if err != nil {
				t.Error(err)
				break
			}
			ended = kind == wire.KindStdinEOF
			if kind == wire.KindStdin {
				all, held = all+len(payload), held+len(payload)
			}
			if held > wire.StdinWindow-maxStdin {
				<-tick.C
				wire.WriteFrame(g.conn, wire.KindStdinAck, binary.BigEndian.AppendUint32(nil, maxStdin))
				held -= maxStdin
			}
		}
		got <- all
		g.outEOF()
		g.exit(0)
	}
	call, address := forwarding(t, d, "shop", filepath.Join(t.TempDir(), "s")+":80")
	conn := connectTo(t, address)
	conn.SetDeadline(time.Now().Add(8 * stallTimeout))
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	conn.Close()
	want(t, "bytes that came", <-got, size)
	call.kill(syscall.SIGINT)
	call.wait()
}

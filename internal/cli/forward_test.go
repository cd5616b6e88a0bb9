package cli

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

func TestParseForward(t *testing.T) {
	for text, wanted := range map[string]string{
		"5432":                      "tcp 127.0.0.1:5432 → tcp localhost:5432",
		"0:5432":                    "tcp 127.0.0.1:0 → tcp localhost:5432",
		"15432:5432":                "tcp 127.0.0.1:15432 → tcp localhost:5432",
		"0.0.0.0:15432:5432":        "tcp 0.0.0.0:15432 → tcp localhost:5432",
		"[::1]:15432:5432":          "tcp [::1]:15432 → tcp localhost:5432",
		"3000:/run/app.sock":        "tcp 127.0.0.1:3000 → unix /run/app.sock",
		"./db.sock:5432":            "unix ./db.sock → tcp localhost:5432",
		"/tmp/db.sock:5432":         "unix /tmp/db.sock → tcp localhost:5432",
		"/tmp/a:/b.sock:/run/c:d/e": "unix /tmp/a:/b.sock → unix /run/c:d/e",
	} {
		s, err := parseForward(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		want(t, text, fmt.Sprintf("%s %s → %s %s", s.network, s.local, s.dial.Network, s.dial.Address), wanted)
		// What a forward in the background is given is the same.
		again, err := parseForward(s.String())
		want(t, "again", fmt.Sprint(again, err), fmt.Sprint(s, nil))
	}
}

// forwarding is a forward that runs, and where.
func forwarding(t *testing.T, d *fakeDaemon, args ...string) (*call, string) {
	t.Helper()
	call := d.call().start(append([]string{"forward"}, args...)...)
	eventually(t, "an address", func() bool { return strings.HasSuffix(call.out.String(), "\n") || len(call.code) > 0 })
	return call, strings.TrimSpace(call.out.String())
}

func connectTo(t *testing.T, address string) halfConn {
	t.Helper()
	network := "tcp"
	if strings.HasPrefix(address, "/") {
		network = "unix"
	}
	conn, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	return conn.(halfConn)
}

func randomText(n int) string {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{byte(n)}).Read(b)
	return string(b)
}

// TestForward: bytes and ends of both halves, many side by side, to both kinds of
// services and from both kinds of addresses.
func TestForward(t *testing.T) {
	for _, c := range []struct{ spec, service string }{
		{"0:5432", "tcp localhost:5432"}, {"0:/run/app.sock", "unix /run/app.sock"}, {"/SOCKET:5432", "tcp localhost:5432"},
	} {
		t.Run(c.spec, func(t *testing.T) {
			d := withShop(t)
			d.net.dial = func(_ wire.Dial, g *guestEnd) {
				g.started()
				g.answer(func(all string) string { return strings.ToUpper(all[:1]) + all[1:] })
			}
			socket := filepath.Join(t.TempDir(), "s")
			call, address := forwarding(t, d, "shop", strings.Replace(c.spec, "/SOCKET", socket, 1))
			if strings.Contains(c.spec, "SOCKET") {
				want(t, "address", address, socket)
				info, err := os.Lstat(socket)
				want(t, "mode", fmt.Sprint(info.Mode(), err), "Srw------- <nil>")
			}
			_, remote, _ := strings.Cut(c.service, " ")
			remote = strings.TrimPrefix(remote, "localhost:")
			want(t, "stderr", call.err.String(), address+" → shop:"+remote+"\n")
			var all sync.WaitGroup
			for i := range 20 {
				conn := connectTo(t, address)
				text := "a" + randomText(i*i*i*100)
				all.Go(func() {
					go func() {
						io.WriteString(conn, text)
						conn.CloseWrite()
					}()
					got, err := io.ReadAll(conn)
					if err != nil || string(got) != "A"+text[1:] {
						t.Errorf("%d bytes came back as %d: %v", len(text), len(got), err)
					}
				})
			}
			all.Wait()
			want(t, "dials", strings.Count(d.called(), "\ndial shop "+c.service), 20)
			call.kill(syscall.SIGINT)
			want(t, "exit code", call.wait(), 130)
			if _, err := os.Lstat(socket); err == nil {
				t.Error("the socket is still there")
			}
		})
	}
}

// TestForwardServiceEndsFirst: a service that ends its half first still gets what comes.
func TestForwardServiceEndsFirst(t *testing.T) {
	d := withShop(t)
	got := make(chan string, 1)
	d.net.dial = func(_ wire.Dial, g *guestEnd) {
		g.started()
		g.out("bye")
		g.outEOF()
		got <- g.stdin()
		g.exit(0)
	}
	call, address := forwarding(t, d, "shop", "0:80")
	conn := connectTo(t, address)
	said, err := io.ReadAll(conn)
	want(t, "the service's half", fmt.Sprintf("%s %v", said, err), "bye <nil>")
	io.WriteString(conn, "and more")
	conn.CloseWrite()
	want(t, "the client's half", <-got, "and more")
	call.kill(syscall.SIGTERM)
	want(t, "exit code", call.wait(), 130)
}

// TestForwardBothFull: a client that reads nothing until it has sent all gets through,
// although the service talks all the while: neither direction waits for the other.
func TestForwardBothFull(t *testing.T) {
	d := withShop(t)
	const size = 8 << 20
	spoken := randomText(wire.StdinWindow)
	d.net.dial = func(_ wire.Dial, g *guestEnd) {
		g.started()
		for i := 0; i < len(spoken); i += 1 << 14 {
			g.out(spoken[i : i+1<<14])
		}
		// It says no more than its window until it has all.
		want(t, "bytes that came", len(g.stdin()), size)
		g.outEOF()
		g.exit(0)
	}
	// A Unix socket, because TCP on the loopback takes all of a window by itself.
	call, address := forwarding(t, d, "shop", filepath.Join(t.TempDir(), "s")+":80")
	conn := connectTo(t, address)
	if _, err := conn.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	conn.CloseWrite()
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != spoken {
		t.Errorf("%d bytes of %d: %v", len(got), len(spoken), err)
	}
	call.kill(syscall.SIGINT)
	call.wait()
}

// TestForwardRefused: a connection that goes wrong is reset and one line, and the forward
// goes on.
func TestForwardRefused(t *testing.T) {
	d := withShop(t)
	next := atomic.Pointer[func(g *guestEnd)]{}
	d.net.dial = func(_ wire.Dial, g *guestEnd) { (*next.Load())(g) }
	call, address := forwarding(t, d, "shop", "0:80")
	for _, c := range []struct {
		service func(g *guestEnd)
		line    string
		ended   bool // the service's half had ended before
	}{
		{func(g *guestEnd) { g.fail(wire.ErrRefused, "nothing listens\n at 80\x1b") }, "shop:80: nothing listens  at 80\n", false},
		{func(g *guestEnd) { g.started(); g.out("some"); g.exit(1) }, "shop:80: the service broke the connection\n", false},
		{func(g *guestEnd) { g.started() }, "shop:80: the connection to the guest was lost", false},
		{func(g *guestEnd) { g.started(); g.outEOF(); g.out("late") }, "shop:80: the guest sends more than it may\n", true},
		{func(g *guestEnd) {
			g.started()
			for range 10_000 { // more than the client's connection holds
				if g.out(strings.Repeat("x", 10_000)) != nil {
					return
				}
			}
		}, "shop:80: the guest sends more than it may\n", false},
	} {
		next.Store(&c.service)
		before := len(call.err.String())
		conn, err := net.Dial("tcp", address)
		eventually(t, c.line, func() bool { return strings.HasPrefix(call.err.String()[before:], c.line) })
		if err == nil { // the reset may be faster than the connection
			_, err = io.Copy(io.Discard, conn)
			conn.Close()
		}
		if err == nil && !c.ended {
			t.Errorf("%q: the client takes it for the end of the data", c.line)
		}
	}
	// A client that goes is no news, and the guest is told.
	told := make(chan bool, 1)
	gone := func(g *guestEnd) { g.started(); told <- g.gone() }
	next.Store(&gone)
	before := call.err.String()
	conn := connectTo(t, address)
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
	want(t, "the guest's stream is closed", <-told, true)
	call.kill(syscall.SIGINT)
	want(t, "exit code", call.wait(), 130)
	want(t, "stderr", call.err.String(), before+"banger: interrupted\n")
}

// TestForwardStalled: the service takes nothing any more. What comes after that is passed
// on when it goes on, and a client that breaks the connection ends it after a while.
func TestForwardStalled(t *testing.T) {
	for _, local := range []string{"0:80", "SOCKET:80"} {
		t.Run(local, func(t *testing.T) {
			t.Parallel()
			d := withShop(t)
			full, goOn, told := make(chan bool), make(chan bool), make(chan bool, 1)
			got := make(chan int, 1)
			d.net.dial = func(_ wire.Dial, g *guestEnd) {
				g.started()
				g.out("here")
				taken := 0
				for taken+maxStdin <= wire.StdinWindow {
					kind, payload, err := wire.ReadFrame(g.r, nil)
					if err != nil {
						t.Error(err)
						break
					}
					if kind == wire.KindStdin {
						taken += len(payload)
					}
				}
				full <- true
				if <-goOn {
					wire.WriteFrame(g.conn, wire.KindStdinAck, binary.BigEndian.AppendUint32(nil, uint32(taken)))
					got <- taken + len(g.stdin())
					g.outEOF()
					g.exit(0)
					return
				}
				g.conn.SetReadDeadline(time.Now().Add(4 * stallTimeout))
				var err error
				for err == nil { // without an acknowledgement
					_, _, err = wire.ReadFrame(g.r, nil)
				}
				told <- !errors.Is(err, os.ErrDeadlineExceeded)
			}
			call, address := forwarding(t, d, "shop", strings.Replace(local, "SOCKET", filepath.Join(t.TempDir(), "s"), 1))
			const size = 1 << 20
			send := func() (net.Conn, chan error) {
				conn := connectTo(t, address)
				conn.SetDeadline(time.Now().Add(8 * stallTimeout))
				sent := make(chan error, 1)
				go func() {
					_, err := conn.Write(make([]byte, size))
					if err == nil {
						err = conn.CloseWrite()
					}
					sent <- err
				}()
				<-full
				return conn, sent
			}
			conn, sent := send()
			goOn <- true
			want(t, "bytes that came", <-got, size)
			said, err := io.ReadAll(conn)
			want(t, "what came back", fmt.Sprintf("%s %v %v", said, err, <-sent), "here <nil> <nil>")

			conn, _ = send()
			if tcp, ok := conn.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
			conn.Close() // a Unix socket with bytes that nobody has read is reset too
			goOn <- false
			want(t, "the guest's stream is closed", <-told, true)
			call.kill(syscall.SIGINT)
			call.wait()
		})
	}
}

// TestForwardLimit: so many at once and no more; the next one waits for its turn.
func TestForwardLimit(t *testing.T) {
	d := withShop(t)
	var open, most atomic.Int32
	release := make(chan struct{})
	d.net.dial = func(_ wire.Dial, g *guestEnd) {
		n := open.Add(1)
		defer open.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		g.started()
		<-release
		g.answer(func(string) string { return "done" })
	}
	call, address := forwarding(t, d, "-q", "shop", "0:80")
	var all sync.WaitGroup
	for range maxConnections + 20 {
		conn := connectTo(t, address)
		conn.CloseWrite()
		all.Go(func() {
			if got, err := io.ReadAll(conn); err != nil || string(got) != "done" {
				t.Errorf("%q %v", got, err)
			}
		})
	}
	eventually(t, "all places are taken", func() bool { return open.Load() == maxConnections })
	close(release)
	all.Wait()
	if most.Load() > maxConnections {
		t.Errorf("%d connections at once", most.Load())
	}
	call.kill(syscall.SIGINT)
	call.wait()
	want(t, "quiet", call.err.String(), "banger: interrupted\n")
}

// TestForwardEndsWithVM: also while a connection is open, and not because a daemon ended.
func TestForwardEndsWithVM(t *testing.T) {
	for how, end := range map[string]func(d *fakeDaemon){
		"stopped": func(d *fakeDaemon) { d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED}) },
		"removed": func(d *fakeDaemon) {
			d.mu.Lock()
			defer d.mu.Unlock()
			delete(d.vms, "shop")
		},
		"with another daemon": func(d *fakeDaemon) {
			d.close()
			d.listen()
			d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED})
		},
		"without any daemon": func(d *fakeDaemon) { d.close() },
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			d := withShop(t)
			d.net.dial = func(_ wire.Dial, g *guestEnd) { g.started(); g.out("here"); g.gone() }
			call, address := forwarding(t, d, "shop", "0:80")
			conn := connectTo(t, address)
			if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			end(d)
			want(t, "exit code", call.wait(), 0)
			contains(t, "stderr", call.err.String(), "shop does not run any more\n")
			if _, err := net.Dial("tcp", address); err == nil {
				t.Error("the address is still there")
			}
		})
	}
}

// TestForwardCannot: said before anything else, with one hint.
func TestForwardCannot(t *testing.T) {
	d := withShop(t)
	d.add(&bangerv1.VM{Name: "box", State: bangerv1.VM_STOPPED})
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	busy := taken.Addr().String()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	long := "/" + strings.Repeat("x", maxSocketPath)
	for _, c := range []struct {
		args string
		code int
		says string
	}{
		{"shop " + busy + ":5432", 5, "banger: cannot forward: port " + busy + " is in use\nhint: banger forward shop 0:5432\n"},
		{"-d shop " + busy + ":5432", 5, "banger: cannot forward: port " + busy + " is in use\nhint: banger forward -d shop 0:5432\n"},
		{"shop " + file + ":5432", 5, "cannot forward " + file + ": there is such a file already\nhint: ls -l "},
		{"shop /does/not/exist/s:5432", 3, "cannot forward /does/not/exist/s: there is no such directory"},
		{"shop " + long + ":5432", 2, "the path of a socket has at most 107 bytes"},
		{"shop 203.0.113.1:0:5432", 2, "banger: cannot forward: 203.0.113.1 is no address of this host\nhint: banger forward shop 0:5432\n"},
		{"nope 0:5432", 3, "no VM named nope"},
		{"box 0:5432", 5, "banger: box does not run: it is stopped\nhint: banger start box\n"},
		{"-d box 0:5432", 5, "banger: box does not run: it is stopped\nhint: banger start box\n"},
	} {
		call := d.call()
		call.env = []string{daemonMode + "=" + bangerMode}
		code := call.start(append([]string{"forward"}, strings.Fields(c.args)...)...).wait()
		want(t, c.args, code, c.code)
		want(t, c.args, call.out.String(), "")
		contains(t, c.args, call.err.String(), c.says)
	}
}

// TestForwardDetached: it goes on when banger has ended, and ends with the VM or when it
// is told to.
func TestForwardDetached(t *testing.T) {
	d := withShop(t)
	d.net.dial = func(_ wire.Dial, g *guestEnd) { g.started(); g.answer(func(all string) string { return "re: " + all }) }
	begin := func(args ...string) (address string, pid int) {
		t.Helper()
		call := d.call()
		call.env = []string{daemonMode + "=" + bangerMode}
		want(t, "exit code", call.start(append([]string{"forward", "-d"}, args...)...).wait(), 0)
		address = strings.TrimSpace(call.out.String())
		head, number, _ := strings.Cut(call.err.String(), "; ends with the VM, or: kill ")
		want(t, "stderr", head, address+" → shop:5432")
		pid, err := strconv.Atoi(strings.TrimSpace(number))
		if err != nil || pid < 2 {
			t.Fatalf("pid: %q", number)
		}
		t.Cleanup(func() { syscall.Kill(pid, syscall.SIGKILL) })
		return address, pid
	}
	works := func(address string) {
		t.Helper()
		conn := connectTo(t, address)
		io.WriteString(conn, "hello")
		conn.CloseWrite()
		got, err := io.ReadAll(conn)
		want(t, "answer", fmt.Sprintf("%s %v", got, err), "re: hello <nil>")
	}
	t.Chdir(t.TempDir())
	address, pid := begin("shop", "./s.sock:5432") // relative to where banger was called
	want(t, "address", filepath.Base(address), "s.sock")
	works(address)
	if sid, err := syscall.Getpgid(pid); err != nil || sid != pid {
		t.Errorf("it leads no session of its own: %d %v", sid, err)
	}
	syscall.Kill(pid, syscall.SIGTERM)
	eventually(t, "the socket goes", func() bool { _, err := os.Lstat(address); return err != nil })

	address, pid = begin("id-shop", "0:5432")
	works(address)
	d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_STOPPED})
	eventually(t, "it ends with the VM", func() bool { return ended(pid) })
}

// ended tells that a process does not run any more, also while nobody has waited for it.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || bytes.Contains(stat, []byte(") Z "))
}

func TestForwardJSON(t *testing.T) {
	d := withShop(t)
	call, _ := forwarding(t, d, "--format", "json", "shop", "0:5432")
	eventually(t, "all of it", func() bool { return strings.HasSuffix(call.out.String(), "}\n") })
	var about struct{ Address, VM, Remote string }
	if err := json.Unmarshal([]byte(call.out.String()), &about); err != nil || about.VM != "shop" || about.Remote != "5432" || about.Address == "" {
		t.Errorf("%v %+v", err, about)
	}
	call.kill(syscall.SIGINT)
	call.wait()
}

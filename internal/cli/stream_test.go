package cli

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

func withBox(t *testing.T, exec func(x wire.Exec, g *guestEnd)) *fakeDaemon {
	d := newFake(t)
	d.add(&bangerv1.VM{Name: "box", State: bangerv1.VM_RUNNING})
	d.exec = exec
	return d
}

// TestExecStreams: three streams, apart, byte by byte, with a half-close in between.
func TestExecStreams(t *testing.T) {
	in := bytes.Repeat([]byte("\x00\xff\r\n\x1b[31m"), 100_000)
	d := withBox(t, func(x wire.Exec, g *guestEnd) {
		g.started()
		got := g.stdin()
		// Only now, after the end of stdin.
		g.err("\x00err\xff")
		for len(got) > 0 {
			n := min(len(got), wire.MaxPayload)
			g.out(got[:n])
			got = got[n:]
		}
		g.exit(42)
	})
	c := d.call()
	c.stdin = bytes.NewReader(in)
	want(t, "exit code", c.start("exec", "-i", "box", "cat").wait(), 42)
	if c.out.String() != string(in) {
		t.Errorf("%d bytes came back, not %d", len(c.out.String()), len(in))
	}
	want(t, "stderr", fmt.Sprintf("%q", c.err.String()), `"\x00err\xff"`)
}

// TestExecWithoutStdin: without -i a pipe is not emptied, so that exec works in a loop.
func TestExecWithoutStdin(t *testing.T) {
	d := withBox(t, func(x wire.Exec, g *guestEnd) {
		if x.Stdin {
			t.Error("stdin was asked for")
		}
		g.started()
		g.exit(0)
	})
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(w, "next")
	w.Close()
	c := d.call()
	c.stdin = r
	want(t, "exit code", c.start("exec", "box", "true").wait(), 0)
	rest, _ := io.ReadAll(r)
	want(t, "what is left", string(rest), "next\n")
}

func TestExecEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		exec func(x wire.Exec, g *guestEnd)
		code int
		says string
	}{
		{"a signal", func(x wire.Exec, g *guestEnd) {
			g.started()
			wire.NewStream(g.conn).SendJSON(wire.KindExit, wire.Exit{Code: 137, Signal: "KILL"})
		}, 137, ""},
		{"255", func(x wire.Exec, g *guestEnd) { g.started(); g.exit(255) }, 255, ""},
		{"not found", func(x wire.Exec, g *guestEnd) { g.fail(wire.ErrNotFound, "nope: not found\x1b[2J") }, 127, "banger: box: nope: not found\\x1b[2J\n"},
		{"not executable", func(x wire.Exec, g *guestEnd) { g.fail(wire.ErrNotExecutable, "/etc/passwd: permission denied") }, 126, "banger: box: /etc/passwd: permission denied\n"},
		{"no user", func(x wire.Exec, g *guestEnd) { g.fail(wire.ErrNoUser, "there is no user bob") }, 125, "banger: box: there is no user bob\n"},
		{"lost", func(x wire.Exec, g *guestEnd) { g.started(); g.out("par") }, 125, "banger: lost the connection to box while the command ran\nhint: banger show box\n"},
		{"garbage", func(x wire.Exec, g *guestEnd) { g.conn.Write([]byte{byte(wire.KindStdout), 0xff, 0xff, 0xff, 0xff}) }, 125, "banger: lost the connection to box"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := withBox(t, c.exec).run("exec", "box", "cmd")
			want(t, "exit code", r.code, c.code)
			if c.says == "" {
				want(t, "stderr", r.err, "")
			}
			contains(t, "stderr", r.err, c.says)
		})
	}
	t.Run("refused", func(t *testing.T) {
		d := withBox(t, nil)
		want(t, "no VM", d.run("exec", "nope", "true"), result{125, "", "banger: no VM named nope\nhint: banger ps\n"})
		d.refuse["exec"] = api.Errorf(api.Refused, "box is stopped").WithHint("banger start box")
		want(t, "stopped", d.run("exec", "box", "true"), result{125, "", "banger: box is stopped\nhint: banger start box\n"})
	})
	t.Run("too long", func(t *testing.T) {
		d := withBox(t, func(x wire.Exec, g *guestEnd) { t.Error("it ran") })
		r := d.run("exec", "box", "echo", strings.Repeat("x", wire.MaxPayload))
		want(t, "exit code", r.code, 125)
		contains(t, "stderr", r.err, "banger: the command and its environment are too long: ")
	})
}

// TestExecSignals: without a tty signals go to the command; a second Ctrl-C leaves.
func TestExecSignals(t *testing.T) {
	got := make(chan string)
	d := withBox(t, func(x wire.Exec, g *guestEnd) {
		g.started()
		got <- "started"
		for range 2 {
			kind, payload, err := g.next()
			if err != nil || kind != wire.KindSignal {
				t.Errorf("no signal: %d %v", kind, err)
			}
			got <- payload
		}
		if !g.gone() {
			t.Error("the stream goes on")
		}
		close(got)
	})
	c := d.call().start("exec", "box", "sleep")
	want(t, "first", <-got, "started")
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		c.kill(sig)
		want(t, "signal", <-got, `{"name":"`+strings.TrimPrefix(unix.SignalName(sig), "SIG")+`"}`)
	}
	c.kill(syscall.SIGINT)
	want(t, "exit code", c.wait(), 130)
	<-got
}

// terminalPair is a terminal for banger and the other end of it.
func terminalPair(t *testing.T) (person, tty *os.File) {
	t.Helper()
	person, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { person.Close(); tty.Close() })
	if err := pty.Setsize(person, &pty.Winsize{Rows: 30, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	return person, tty
}

// screen collects what is written to a terminal.
func screen(t *testing.T, person *os.File) *safeBuffer {
	var b safeBuffer
	go io.Copy(&b, person)
	return &b
}

func flags(t *testing.T, tty *os.File) unix.Termios {
	t.Helper()
	s, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *s
}

// TestTerminal: on a terminal a command gets a tty of the same size, keys go to it as
// they are, it learns of a new size, and the terminal comes back as it was.
func TestTerminal(t *testing.T) {
	person, tty := terminalPair(t)
	before := flags(t, tty)
	seen := screen(t, person)
	var keys safeBuffer
	sizes := make(chan string, 16)
	d := withBox(t, func(x wire.Exec, g *guestEnd) {
		want(t, "exec", describeExec(x), `["sh"] env=TERM=xterm tty 100x30 stdin`)
		g.started()
		for {
			kind, payload, err := g.next()
			if err != nil {
				return
			}
			switch kind {
			case wire.KindStdin:
				keys.Write([]byte(payload))
				g.out("<" + payload + ">")
				if payload == "\x04" {
					g.exit(5)
					return
				}
			case wire.KindResize:
				sizes <- payload
			}
		}
	})
	c := d.call()
	c.stdin, c.stdout = tty, tty
	c.start("exec", "box", "sh")
	want(t, "first size", <-sizes, `{"rows":30,"cols":100}`)
	if s := flags(t, tty); s.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 || s.Oflag&unix.OPOST != 0 {
		t.Errorf("the terminal is not raw: %+v", s)
	}
	io.WriteString(person, "a\x03")
	eventually(t, "Ctrl-C is a key", func() bool { return keys.String() == "a\x03" })
	if err := pty.Setsize(person, &pty.Winsize{Rows: 40, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	// The tests' process has no controlling terminal that would send it.
	if err := syscall.Kill(os.Getpid(), syscall.SIGWINCH); err != nil {
		t.Fatal(err)
	}
	want(t, "new size", <-sizes, `{"rows":40,"cols":120}`)
	io.WriteString(person, "\x04")
	want(t, "exit code", c.wait(), 5)
	want(t, "terminal", flags(t, tty), before)
	contains(t, "screen", seen.String(), "<a")
}

// TestTerminalComesBack whatever ends the stream.
func TestTerminalComesBack(t *testing.T) {
	for name, end := range map[string]func(g *guestEnd, c *call){
		"lost":    func(g *guestEnd, c *call) { g.conn.Close() },
		"SIGTERM": func(g *guestEnd, c *call) { c.kill(syscall.SIGTERM); g.gone() },
		"SIGHUP":  func(g *guestEnd, c *call) { c.kill(syscall.SIGHUP); g.gone() },
	} {
		t.Run(name, func(t *testing.T) {
			person, tty := terminalPair(t)
			screen(t, person)
			before := flags(t, tty)
			var c *call
			d := withBox(t, func(x wire.Exec, g *guestEnd) {
				g.started()
				eventually(t, "raw", func() bool { return flags(t, tty).Lflag&unix.ICANON == 0 })
				end(g, c)
			})
			c = d.call()
			c.stdin, c.stdout = tty, tty
			code := c.start("exec", "box", "sh").wait()
			if name == "lost" && code != 125 || name != "lost" && code != 130 {
				t.Errorf("exit code %d", code)
			}
			want(t, "terminal", flags(t, tty), before)
		})
	}
}

// TestShell: up without a command is a login shell, and one line says how to go on.
func TestShell(t *testing.T) {
	person, tty := terminalPair(t)
	screen(t, person)
	d := withShop(t)
	d.exec = func(x wire.Exec, g *guestEnd) {
		want(t, "exec", describeExec(x), `[] dir=/home/ann/shop/lib/deep env=TERM=xterm tty 100x30 stdin`)
		g.started()
		g.exit(0)
	}
	c := d.call()
	c.stdin, c.stdout = tty, tty
	want(t, "exit code", c.start("up").wait(), 0)
	contains(t, "stderr", c.err.String(), "\nshop goes on running; banger stop shop stops it, banger rm -f shop removes it\n")
}

// TestHalfATerminal: a tty by itself only when both ends are terminals; -t and -i say
// otherwise.
func TestHalfATerminal(t *testing.T) {
	_, tty := terminalPair(t)
	for args, asked := range map[string]string{
		"exec box cat":           `["cat"]`,
		"exec -i box cat":        `["cat"] stdin`,
		"exec -t box cat":        `["cat"] env=TERM=xterm tty 100x30 stdin`,
		"exec -t -i=false box c": `["c"] env=TERM=xterm tty 100x30`,
	} {
		d := withBox(t, func(x wire.Exec, g *guestEnd) {
			want(t, args, describeExec(x), asked)
			g.started()
			g.exit(0)
		})
		c := d.call()
		c.stdin = tty // and stdout is none
		want(t, args, c.start(strings.Fields(args)...).wait(), 0)
	}
	d := withBox(t, nil)
	c := d.call()
	c.stdin = tty
	want(t, "a shell", c.start("run").wait(), 125)
}

// TestTerminalWithoutOne: -t gives a terminal to a command whose stdin is none. A pipe
// does not go through it: unasked it is left for whoever comes next, asked for it is
// refused. /dev/null is no input.
func TestTerminalWithoutOne(t *testing.T) {
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	const size = " env=TERM=xterm tty 80x24"
	for _, c := range []struct {
		args  string
		stdin io.Reader
		asked string // empty: refused
	}{
		{"exec -t box ls", nil, `["ls"]` + size},
		{"exec -t box ls", null, `["ls"]` + size},
		{"exec -t -i box ls", nil, ""},
		{"exec -t -i box ls", null, ""},
		{"run -t -- ls", nil, ""},
		{"run -t -i=false -- ls", nil, `["ls"]` + size},
		{"run -t -- ls", null, `["ls"]` + size},
		{"run -- ls", null, `["ls"] stdin`},
	} {
		var asked string
		d := withBox(t, func(x wire.Exec, g *guestEnd) {
			asked = describeExec(x)
			g.started()
			g.exit(0)
		})
		pipe := strings.NewReader("next\n")
		call := d.call()
		if call.stdin = c.stdin; c.stdin == nil {
			call.stdin = pipe
		}
		code := call.start(strings.Fields(c.args)...).wait()
		want(t, c.args, asked, c.asked)
		want(t, c.args+": left in the pipe", pipe.Len(), 5)
		if c.asked != "" {
			want(t, c.args, code, 0)
			continue
		}
		want(t, c.args, code, 125)
		verb := strings.Fields(c.args)[0]
		want(t, c.args, call.err.String(), "banger: -t: stdin is no terminal, and cannot be passed on through one\nhint: banger "+verb+" -i, without -t\n")
		want(t, c.args+": VMs", len(d.vms), 1)
	}
}

// TestProgressOnTerminal: one line that is rewritten, cut to the width, and erased.
func TestProgressOnTerminal(t *testing.T) {
	person, tty := terminalPair(t)
	seen := screen(t, person)
	d := newFake(t)
	d.script["pull"] = func(op *fakeOp) {
		op.step(1, 2, "packages")
		eventually(t, "first step", func() bool { return strings.Contains(seen.String(), "1/2 packages") })
		op.set(func(m *bangerv1.Operation) {
			m.Step, m.StepName, m.BytesDone, m.BytesTotal = 2, strings.Repeat("x", 200), 1<<20, 3<<20
		})
		eventually(t, "second step", func() bool { return strings.Contains(seen.String(), "2/2 xxx") })
	}
	c := d.call()
	c.stderr = tty
	want(t, "exit code", c.start("image", "pull").wait(), 0)
	want(t, "stdout", c.out.String(), "debian-bookworm\n")
	wide := "2/2 " + strings.Repeat("x", 95)
	eventually(t, "the line is erased", func() bool {
		return seen.String() == eraseLine+"1/2 packages"+eraseLine+wide+eraseLine
	})
}

// TestColours on a terminal only, and not when they are not wanted.
func TestColours(t *testing.T) {
	for _, c := range []struct {
		args []string
		env  string
		bold bool
	}{{[]string{"ps"}, "X=1", true}, {[]string{"ps", "--no-color"}, "X=1", false}, {[]string{"ps"}, "NO_COLOR=1", false}, {[]string{"ps"}, "TERM=dumb", false}} {
		person, tty := terminalPair(t)
		seen := screen(t, person)
		call := newFake(t).call()
		call.stdout, call.env = tty, []string{c.env}
		want(t, "exit code", call.start(c.args...).wait(), 0)
		eventually(t, "the header", func() bool { return strings.Contains(seen.String(), "CREATED") })
		if bold := strings.Contains(seen.String(), "\x1b[1mNAME"); bold != c.bold {
			t.Errorf("%v %s: bold %v", c.args, c.env, bold)
		}
	}
}

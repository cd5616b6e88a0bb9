package agent

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/guest/wire"
)

func TestExecBinarySafe(t *testing.T) {
	a := newTestAgent(t)
	in := make([]byte, 3<<20)
	rand.Read(in)
	r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", "tee /dev/stderr; exit 42"}}, bytes.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	if r.Code != 42 || r.Signal != "" {
		t.Errorf("exit %+v", r.Exit)
	}
	if r.out != string(in) || r.err != string(in) {
		t.Errorf("%d and %d bytes came back of %d", len(r.out), len(r.err), len(in))
	}
}

func TestExecHalfClose(t *testing.T) {
	a := newTestAgent(t)
	// The end of the input is seen while the command goes on.
	r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", "cat >/dev/null; echo after"}}, strings.NewReader("x"))
	if err != nil || r.out != "after\n" {
		t.Fatalf("%+v, %v", r, err)
	}
	// Without stdin there is none.
	if out := a.sh("readlink /proc/self/fd/0; cat"); out != "/dev/null\n" {
		t.Errorf("%q", out)
	}
	// Input that the command does not want is no error.
	r, err = a.exec(wire.Exec{Argv: []string{"true"}}, bytes.NewReader(make([]byte, 5<<20)))
	if err != nil || r.Code != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestExecStatus(t *testing.T) {
	a := newTestAgent(t)
	for script, want := range map[string]wire.Exit{
		"exit 0":        {},
		"exit 255":      {Code: 255},
		"kill -KILL $$": {Code: 137, Signal: "KILL"},
		"kill -TERM $$": {Code: 143, Signal: "TERM"},
		"kill -HUP $$":  {Code: 129, Signal: "HUP"},
	} {
		r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", script}}, nil)
		if err != nil || r.Exit != want {
			t.Errorf("%s: %+v, %v", script, r.Exit, err)
		}
	}
}

func TestExecNotBegun(t *testing.T) {
	a := newTestAgent(t)
	write(t, a.home+"/text", "not a program", 0o644)
	write(t, a.home+"/orphan", "#!/missing/interpreter\n", 0o755)
	write(t, a.home+"/bin/tool", "#!/bin/sh\necho tool\n", 0o755)
	if err := os.Mkdir(a.home+"/dir", 0o755); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, path, code string }{
		{"no-such-command", "", wire.ErrNotFound},
		{"./missing", "", wire.ErrNotFound},
		{"", "", wire.ErrNotFound},
		{"./text", "", wire.ErrNotExecutable},
		{"./dir", "", wire.ErrNotExecutable},
		{"./orphan", "", wire.ErrNotExecutable},
		{"text", ".", wire.ErrNotExecutable},
		{"tool", "/bin", wire.ErrNotFound},
	} {
		e := wire.Exec{Argv: []string{test.name}}
		if test.path != "" {
			e.Env = []string{"PATH=" + test.path}
		}
		_, err := a.exec(e, nil)
		var refused *wire.Error
		if !errors.As(err, &refused) || refused.Code != test.code {
			t.Errorf("%q in %q: %v, want %s", test.name, test.path, err, test.code)
		}
	}
	for _, path := range []string{"/missing:" + a.home + "/bin", "dir:bin", "text:" + a.home + "/bin"} {
		r, err := a.exec(wire.Exec{Argv: []string{"tool"}, Env: []string{"PATH=" + path}}, nil)
		if err != nil || r.out != "tool\n" {
			t.Errorf("PATH=%s: %+v, %v", path, r, err)
		}
	}
}

// A script without an interpreter line runs, as execvp(3) has it.
func TestExecScriptWithoutInterpreter(t *testing.T) {
	a := newTestAgent(t)
	write(t, a.home+"/script", "echo \"$0\" \"$1\"\n", 0o755)
	r, err := a.exec(wire.Exec{Argv: []string{"./script", "arg"}}, nil)
	if err != nil || r.out != a.home+"/script arg\n" {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestExecEnvironment(t *testing.T) {
	a := newTestAgent(t)
	r, err := a.exec(wire.Exec{Argv: []string{"env"}, Env: []string{"LANG=de", "MORE=1=2"}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for line := range strings.Lines(r.out) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), "=")
		if _, twice := got[k]; twice {
			t.Errorf("%s is there twice", k)
		}
		got[k] = v
	}
	want := map[string]string{"HOME": a.home, "USER": "root", "LOGNAME": "root", "SHELL": "/bin/sh", "PATH": defaultPath,
		"GREETING": "hello there", "LANG": "de", "MORE": "1=2"}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s is %q, want %q", k, got[k], v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("too much: %v", got)
	}
	if out := a.sh("pwd"); out != a.home+"\n" {
		t.Errorf("runs in %q", out)
	}
	if r, err := a.exec(wire.Exec{Argv: []string{"pwd"}, Dir: "/usr/bin"}, nil); err != nil || r.out != "/usr/bin\n" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestExecLoginShell(t *testing.T) {
	a := newTestAgent(t)
	r, err := a.exec(wire.Exec{}, strings.NewReader("echo $0; exit 3\n"))
	if err != nil || r.out != "-sh\n" || r.Code != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
}

// startedExec is a command that runs, driven frame by frame.
type startedExec struct {
	*wire.Stream
	conn  net.Conn
	pid   int
	ended <-chan struct{}
	t     *testing.T
}

func (a *testAgent) start(e wire.Exec) *startedExec { a.t.Helper(); return a.startAcks(e, false) }

func (a *testAgent) startAcks(e wire.Exec, acks bool) *startedExec {
	a.t.Helper()
	conn, ended := a.dial()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	x := &startedExec{Stream: wire.NewStream(conn), conn: conn, ended: ended, t: a.t}
	x.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Exec: &e, Acks: acks})
	kind, payload, err := x.Recv()
	var s wire.Started
	if err != nil || kind != wire.KindStarted || json.Unmarshal(payload, &s) != nil {
		a.t.Fatalf("not started: %v %s %v", kind, payload, err)
	}
	x.pid = s.PID
	return x
}

// expect reads output up to and including text.
func (x *startedExec) expect(text string) {
	x.t.Helper()
	var got strings.Builder
	for !strings.Contains(got.String(), text) {
		kind, payload, err := x.Recv()
		if err != nil || kind != wire.KindStdout {
			x.t.Fatalf("after %q: %v %s %v", got.String(), kind, payload, err)
		}
		got.Write(payload)
	}
}

// exit reads the rest of the output and the exit.
func (x *startedExec) exit() (out string, exit wire.Exit) {
	x.t.Helper()
	for {
		kind, payload, err := x.Recv()
		if err != nil {
			x.t.Fatalf("no exit after %q: %v", out, err)
		}
		switch kind {
		case wire.KindStdout, wire.KindStderr:
			out += string(payload)
		case wire.KindExit:
			if err := json.Unmarshal(payload, &exit); err != nil {
				x.t.Fatal(err)
			}
			return out, exit
		}
	}
}

func TestExecSignals(t *testing.T) {
	a := newTestAgent(t)
	x := a.start(wire.Exec{Argv: []string{"sh", "-c", `trap 'echo got usr1' USR1; trap 'echo got term; exit 7' TERM; echo up; while :; do :; done`}}) // no child: the shell would report its end by USR1
	x.expect("up\n")
	x.SendJSON(wire.KindSignal, wire.Signal{Name: "USR1"})
	x.expect("got usr1\n")
	x.SendJSON(wire.KindSignal, wire.Signal{Name: "NOSUCH"})
	x.SendJSON(wire.KindSignal, wire.Signal{Name: "SIGTERM"})
	if out, exit := x.exit(); exit.Code != 7 || !strings.Contains(out, "got term") {
		t.Errorf("%q %+v", out, exit)
	}
	// The whole group gets it.
	x = a.start(wire.Exec{Argv: []string{"sh", "-c", `sleep 1000 & echo up; wait`}})
	x.expect("up\n")
	x.SendJSON(wire.KindSignal, wire.Signal{Name: "KILL"})
	if _, exit := x.exit(); exit != (wire.Exit{Code: 137, Signal: "KILL"}) {
		t.Errorf("%+v", exit)
	}
}

// A signal passes input that the command does not take.
func TestExecSignalPassesInput(t *testing.T) {
	a := newTestAgent(t)
	x := a.startAcks(wire.Exec{Argv: []string{"sleep", "1000"}, Stdin: true}, true)
	for range wire.StdinWindow / wire.MaxPayload {
		if err := x.Send(wire.KindStdin, make([]byte, wire.MaxPayload)); err != nil {
			t.Fatal(err)
		}
	}
	x.SendJSON(wire.KindSignal, wire.Signal{Name: "INT"})
	if _, exit := x.exit(); exit.Code != 130 {
		t.Fatalf("%+v", exit)
	}
}

// A host that does not ask for acknowledgements may send any amount.
func TestExecWithoutAcks(t *testing.T) {
	a := newTestAgent(t)
	x := a.start(wire.Exec{Argv: []string{"sh", "-c", "wc -c"}, Stdin: true})
	for range 64 {
		if err := x.Send(wire.KindStdin, make([]byte, wire.MaxPayload)); err != nil {
			t.Fatal(err)
		}
	}
	x.Send(wire.KindStdinEOF, nil)
	if out, exit := x.exit(); strings.TrimSpace(out) != fmt.Sprint(64*wire.MaxPayload) || exit.Code != 0 {
		t.Errorf("%q %+v", out, exit)
	}
}

// One that does ask is held to the window.
func TestExecBeyondWindow(t *testing.T) {
	a := newTestAgent(t)
	conn, ended := a.dial()
	s := wire.NewStream(conn)
	s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Acks: true, Exec: &wire.Exec{Argv: []string{"sleep", "1000"}, Stdin: true}})
	for range 3 * wire.StdinWindow / wire.MaxPayload {
		if s.Send(wire.KindStdin, make([]byte, wire.MaxPayload)) != nil {
			break
		}
	}
	within(t, 10*time.Second, "end of the stream", func() bool { return closed(ended) })
}

func TestExecHangUp(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	// What the command writes while it cleans up does not kill it.
	x := a.start(wire.Exec{Argv: []string{"sh", "-c", `trap 'echo bye; echo bye >&2; echo $$ >cleaned; exit' HUP; echo up; while :; do sleep 0.01; done`}})
	x.expect("up\n")
	x.Close()
	if pid := pidIn(t, a.home+"/cleaned"); pid != x.pid {
		t.Errorf("%d cleaned up", pid)
	}
	within(t, 10*time.Second, "end of the request", func() bool { return closed(x.ended) })

	// The group gets it, stopped processes too.
	x = a.start(wire.Exec{Argv: []string{"sh", "-c", `sleep 1000 & echo $! >child; kill -STOP $!; echo up; wait`}})
	x.expect("up\n")
	child := pidIn(t, a.home+"/child")
	x.Close()
	within(t, 10*time.Second, "end of the group", func() bool { return !alive(x.pid) && !alive(child) })

	// A command that is stopped gets its chance too.
	x = a.start(wire.Exec{Argv: []string{"sh", "-c", `trap 'echo $$ >woken; exit' HUP; echo up; kill -STOP $$`}})
	x.expect("up\n")
	within(t, 10*time.Second, "stopped command", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", x.pid))
		return err == nil && bytes.Contains(stat, []byte(") T "))
	})
	x.Close()
	pidIn(t, a.home+"/woken")

	// Who ignores it is killed.
	x = a.start(wire.Exec{Argv: []string{"sh", "-c", `trap '' HUP; echo up; while :; do sleep 0.01; done`}})
	x.expect("up\n")
	begin := time.Now()
	x.Close()
	within(t, 15*time.Second, "end of the command", func() bool { return !alive(x.pid) })
	if d := time.Since(begin); d < hangupGrace {
		t.Errorf("killed after %s", d)
	}

	// Who is to finish does not get it.
	x = a.start(wire.Exec{Argv: []string{"sh", "-c", `trap 'echo $$ >hungup; exit' HUP; echo up; sleep 0.5; echo $$ >finished`}, Finish: true})
	x.expect("up\n")
	x.Close()
	if pid := pidIn(t, a.home+"/finished"); pid != x.pid {
		t.Errorf("%d finished", pid)
	}
}

// A background process that keeps the output open does not hold up the exit.
func TestExecBackgroundProcess(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	begin := time.Now()
	r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", `setsid sleep 1000 & echo $! >child; echo done; exit 5`}}, nil)
	if err != nil || r.out != "done\n" || r.Code != 5 {
		t.Fatalf("%+v, %v", r, err)
	}
	child := pidIn(t, a.home+"/child")
	defer syscall.Kill(child, syscall.SIGKILL)
	lingered := time.Since(begin)
	if lingered < lingerTime {
		t.Errorf("took %s", lingered)
	}
	if !alive(child) {
		t.Error("the background process was ended")
	}
	// One that has its own output does not delay it.
	begin = time.Now()
	r, err = a.exec(wire.Exec{Argv: []string{"sh", "-c", `setsid sleep 1000 >/dev/null 2>&1 </dev/null & echo $!`}}, nil)
	var pid int
	fmt.Sscan(r.out, &pid)
	defer syscall.Kill(pid, syscall.SIGKILL)
	if took := time.Since(begin); err != nil || pid == 0 || took >= lingered {
		t.Errorf("%+v, %v after %s, with its output %s", r, err, took, lingered)
	}
}

// A slow host blocks the command, and loses nothing: what the command wrote is
// delivered however long it takes, also when somebody keeps the output open.
func TestExecSlowReader(t *testing.T) {
	t.Parallel()
	a := newTestAgent(t)
	a.sendBuffer = 4096
	const size = 60000 // fits into the pipe: the command ends, unread
	x := a.start(wire.Exec{Argv: []string{"sh", "-c", fmt.Sprintf(`setsid sleep 1000 & echo $! >child; head -c %d /dev/zero`, size)}})
	child := pidIn(t, a.home+"/child")
	defer syscall.Kill(child, syscall.SIGKILL)
	within(t, 10*time.Second, "end of the command", func() bool { return !alive(x.pid) })
	time.Sleep(lingerTime + 300*time.Millisecond) // the slowness that is tested
	if out, exit := x.exit(); len(out) != size || exit.Code != 0 {
		t.Errorf("%d bytes of %d, %+v", len(out), size, exit)
	}

	x = a.start(wire.Exec{Argv: []string{"head", "-c", "1000000", "/dev/zero"}})
	time.Sleep(300 * time.Millisecond) // in which the command could run away
	if !alive(x.pid) {
		t.Error("the command did not wait for its reader")
	}
	if out, exit := x.exit(); len(out) != 1000000 || exit.Code != 0 {
		t.Errorf("%d bytes, %+v", len(out), exit)
	}
}

func TestExecTerminal(t *testing.T) {
	a := newTestAgent(t)
	x := a.start(wire.Exec{
		Argv: []string{"sh", "-c", `tty; stty size; echo $TERM; trap 'stty size' WINCH; test -t 0 && test -t 2 && echo yes; until [ "$line" = second ]; do read line; done; echo "got $line"`},
		TTY:  true, Stdin: true, Rows: 33, Cols: 99,
	})
	x.expect("33 99\r\nxterm\r\nyes\r\n")
	x.SendJSON(wire.KindResize, wire.Resize{Rows: 44, Cols: 111})
	x.Send(wire.KindStdin, []byte("first\n"))
	x.expect("44 111\r\n")
	x.Send(wire.KindStdin, []byte("second\n"))
	if out, exit := x.exit(); exit.Code != 0 || !strings.Contains(out, "got second\r\n") {
		t.Errorf("%q %+v", out, exit)
	}
	// Ctrl-c goes the way of the terminal.
	x = a.start(wire.Exec{Argv: []string{"sleep", "1000"}, TTY: true, Stdin: true})
	x.Send(wire.KindStdin, []byte{3})
	if _, exit := x.exit(); exit.Code != 130 {
		t.Errorf("%+v", exit)
	}
	// The end of the input is ctrl-d, in the midst of a line twice.
	for input, want := range map[string]string{"line\n": "line\r\nend\r\n", "li": "liend\r\n", "": "end\r\n"} {
		r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", "cat; echo end"}, TTY: true}, strings.NewReader(input))
		if err != nil || !strings.HasSuffix(r.out, want) {
			t.Errorf("%q: %+v, %v", input, r, err)
		}
	}
	// A large output comes whole, last bytes included.
	for range 20 {
		r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", "seq 20000; echo last"}, TTY: true}, nil)
		if err != nil || !strings.HasSuffix(r.out, "20000\r\nlast\r\n") || strings.Count(r.out, "\n") != 20001 {
			t.Fatalf("%d bytes, %v", len(r.out), err)
		}
	}
}

func TestExecTerminalHangUp(t *testing.T) {
	a := newTestAgent(t)
	x := a.start(wire.Exec{Argv: []string{"sh", "-c", "set -m; sh -c 'echo $$ >child; echo up; exec sleep 1000'"}, TTY: true, Stdin: true})
	x.expect("up\r\n")
	child := pidIn(t, a.home+"/child") // in a process group of its own
	x.Close()
	within(t, 10*time.Second, "end of the terminal's processes", func() bool { return !alive(x.pid) && !alive(child) })
}

func TestExecUser(t *testing.T) {
	needRoot(t)
	a := newTestAgent(t)
	r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", `id -u; id -g; id -G; echo $HOME $USER; pwd; echo x >/dev/stderr; echo y >/dev/stdout`}, User: "user"}, nil)
	want := "1000\n1000\n1000 2001 2002\n/home/none user\n/\ny\n"
	if err != nil || r.out != want || r.err != "x\n" {
		t.Errorf("%+v, %v", r, err)
	}
	r, err = a.exec(wire.Exec{Argv: []string{"sh", "-c", "id -u; id -g; id -G"}, User: "4711:12"}, nil)
	if err != nil || r.out != "4711\n12\n12\n" {
		t.Errorf("%+v, %v", r, err)
	}
	r, err = a.exec(wire.Exec{Argv: []string{"sh", "-c", "stat -c %u $(tty); echo x >$(tty); echo z >/dev/tty"}, User: "user", TTY: true}, strings.NewReader(""))
	if err != nil || r.out != "1000\r\nx\r\nz\r\n" {
		t.Errorf("%+v, %v", r, err)
	}
}

// What a user may not execute or enter is refused with the user's rights, not ours.
func TestExecUsersRights(t *testing.T) {
	needRoot(t)
	a := newTestAgent(t)
	open, err := os.MkdirTemp("/tmp", "agent-test")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(open)
	os.Chmod(open, 0o755)
	write(t, open+"/private", "#!/bin/sh\n", 0o700)
	write(t, open+"/a/tool", "#!/bin/sh\necho a\n", 0o700)
	write(t, open+"/b/tool", "#!/bin/sh\necho b\n", 0o755)
	write(t, open+"/closed/x", "", 0o644)
	os.Chmod(open+"/closed", 0o700)
	refusedWith := func(e wire.Exec, code string) {
		t.Helper()
		e.User = "user"
		_, err := a.exec(e, nil)
		var refused *wire.Error
		if !errors.As(err, &refused) || refused.Code != code {
			t.Errorf("%v %s: %v, want %s", e.Argv, e.Dir, err, code)
		}
	}
	refusedWith(wire.Exec{Argv: []string{open + "/private"}}, wire.ErrNotExecutable)
	refusedWith(wire.Exec{Argv: []string{"true"}, Dir: open + "/closed"}, wire.ErrNoDir)
	r, err := a.exec(wire.Exec{Argv: []string{"tool"}, User: "user", Env: []string{"PATH=" + open + "/a:" + open + "/b"}}, nil)
	if err != nil || r.out != "b\n" {
		t.Errorf("the search goes on after a file that the user may not execute: %+v, %v", r, err)
	}
}

// The agent holds on to nothing of a command that has ended.
func TestExecLeaksNothing(t *testing.T) {
	a := newTestAgent(t)
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	a.sh("true")
	before := count()
	for range 20 {
		a.sh("true")
		a.exec(wire.Exec{Argv: []string{"missing"}}, nil)
		a.exec(wire.Exec{Argv: []string{"true"}, TTY: true}, strings.NewReader("x"))
	}
	within(t, 10*time.Second, "closed descriptors", func() bool { return count() <= before+2 })
}

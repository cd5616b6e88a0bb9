package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

func TestMain(m *testing.M) {
	RunChild()
	os.Exit(m.Run())
}

// testSystem is a machine that gets ready when it is told to.
type testSystem struct {
	ready chan struct{}
	mu    sync.Mutex
	calls []string
}

func (s *testSystem) Ready(ctx context.Context) (wire.Ready, error) {
	select {
	case <-s.ready:
		return wire.Ready{System: "degraded"}, nil
	case <-ctx.Done():
		s.note("gave up")
		return wire.Ready{}, ctx.Err()
	}
}
func (s *testSystem) Shutdown(verb string) error { s.note(verb); return nil }
func (s *testSystem) SetClock(t time.Time) error { s.note(t.UTC().Format(time.RFC3339)); return nil }
func (s *testSystem) note(what string)           { s.mu.Lock(); s.calls = append(s.calls, what); s.mu.Unlock() }
func (s *testSystem) noted() (calls []string)    { s.mu.Lock(); defer s.mu.Unlock(); return s.calls }
func newTestSystem() *testSystem                 { return &testSystem{ready: make(chan struct{})} }
func testConfig() (c wire.Config)                { c.Identity.ID = "0123456789ab"; return c }
func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

// testAgent is an agent on this machine, with accounts of its own: root, whose home
// is a folder of the test, "user" with uid 1000, and "nobody".
type testAgent struct {
	*Agent
	t      *testing.T
	home   string
	system *testSystem
	// sendBuffer, unless 0, is the size of the agent's socket buffer in bytes.
	sendBuffer int
}

func newTestAgent(t *testing.T, change ...func(*Options)) *testAgent {
	t.Helper()
	root, home := t.TempDir(), t.TempDir()
	if err := os.Chmod(home, 0o755); err != nil {
		t.Fatal(err)
	}
	me := fmt.Sprintf("root:x:%d:%d::%s:/bin/sh\n", os.Geteuid(), os.Getegid(), home)
	files := map[string]string{
		"etc/passwd":      me + "user:x:1000:1000:User:/home/none:/bin/sh\nnobody:x:65534:65534::/:\nbroken line\n",
		"etc/group":       "user:x:1000:\nextra:x:2001:user,other\nmore:x:2002:other,user\n",
		"etc/environment": "# a comment\nexport LANG=C.UTF-8\nGREETING=\"hello there\"\nbad line\n",
	}
	for name, text := range files {
		write(t, filepath.Join(root, name), text, 0o644)
	}
	a := &testAgent{t: t, home: home, system: newTestSystem()}
	o := Options{Config: testConfig(), System: a.system, Root: root}
	for _, f := range change {
		f(&o)
	}
	a.Agent = New(o)
	return a
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// dial opens a stream; ended is closed when the agent is done with it.
func (a *testAgent) dial() (conn net.Conn, ended <-chan struct{}) {
	a.t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		a.t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if conns[i], err = net.FileConn(f); err != nil {
			a.t.Fatal(err)
		}
		f.Close()
	}
	if a.sendBuffer > 0 {
		conns[1].(*net.UnixConn).SetWriteBuffer(a.sendBuffer)
	}
	done := make(chan struct{})
	go func() { defer close(done); a.Handle(conns[1]) }()
	a.t.Cleanup(func() {
		conns[0].Close()
		within(a.t, 15*time.Second, "end of a request", func() bool { return closed(done) })
	})
	return conns[0], done
}

func (a *testAgent) call(req wire.Request, reply any) error {
	a.t.Helper()
	conn, _ := a.dial()
	ctx, cancel := context.WithTimeout(a.t.Context(), 20*time.Second)
	defer cancel()
	return wire.Call(ctx, conn, req, reply)
}

type result struct {
	wire.Exit
	out, err string
}

func (a *testAgent) run(req wire.Request, in io.Reader) (result, error) {
	a.t.Helper()
	conn, _ := a.dial()
	ctx, cancel := context.WithTimeout(a.t.Context(), 30*time.Second)
	defer cancel()
	var out, errOut bytes.Buffer
	exit, err := wire.Run(ctx, conn, req, wire.Stdio{In: in, Out: &out, Err: &errOut})
	return result{exit, out.String(), errOut.String()}, err
}

func (a *testAgent) exec(e wire.Exec, in io.Reader) (result, error) {
	a.t.Helper()
	e.Stdin = in != nil
	return a.run(wire.Request{Op: wire.OpExec, Exec: &e}, in)
}

// sh runs a script and wants it to succeed.
func (a *testAgent) sh(script string) string {
	a.t.Helper()
	r, err := a.exec(wire.Exec{Argv: []string{"sh", "-c", script}}, nil)
	if err != nil || r.Code != 0 {
		a.t.Fatalf("%s: %+v, %v", script, r, err)
	}
	return r.out
}

func within(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %s", what, d)
		}
	}
}

// alive says whether the process runs; a zombie does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	i := bytes.LastIndexByte(stat, ')')
	return i > 0 && !strings.HasPrefix(string(stat[i+1:]), " Z")
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if strings.Contains(os.Getenv("BANGER_TEST_REQUIRE"), "root") {
		t.Fatal("root is required and missing")
	}
	t.Skip("needs root")
}

func TestHello(t *testing.T) {
	a := newTestAgent(t)
	var h wire.Hello
	if err := a.call(wire.Request{Op: wire.OpHello, Nonce: "once"}, &h); err != nil {
		t.Fatal(err)
	}
	if h.ID != "0123456789ab" || h.Nonce != "once" || h.User != "root" || h.Home != a.home ||
		h.ProtocolMin != wire.ProtocolMin || h.ProtocolMax != wire.ProtocolMax || len(h.BootID) != 36 {
		t.Errorf("%+v", h)
	}
}

func TestDefaultUser(t *testing.T) {
	configured := func(o *Options) { o.Config.User = &wire.User{Name: "user", UID: 1000} }
	for _, test := range []struct {
		name   string
		change []func(*Options)
		want   string
	}{
		{"none configured", nil, "root"},
		{"configured", []func(*Options){configured}, "user"},
		{"configured, not made", []func(*Options){func(o *Options) { o.Config.User = &wire.User{Name: "gone"} }}, "root"},
	} {
		if u, err := newTestAgent(t, test.change...).account(""); err != nil || u.name != test.want {
			t.Errorf("%s: %q, %v", test.name, u.name, err)
		}
	}
}

func TestAccount(t *testing.T) {
	a := newTestAgent(t)
	for spec, want := range map[string]string{
		"user":       "user 1000:1000 /home/none /bin/sh [2001 2002]",
		"1000":       "user 1000:1000 /home/none /bin/sh [2001 2002]",
		"1000:1000":  "user 1000:1000 /home/none /bin/sh []",
		"user:extra": "user 1000:2001 /home/none /bin/sh []",
		"user:77":    "user 1000:77 /home/none /bin/sh []",
		"4711":       "4711 4711:0 / /bin/sh []",
		"4711:12":    "4711 4711:12 / /bin/sh []",
		"nobody":     "nobody 65534:65534 / /bin/sh []",
	} {
		u, err := a.account(spec)
		if got := fmt.Sprintf("%s %d:%d %s %s %v", u.name, u.uid, u.gid, u.home, u.shell, u.groups); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", spec, got, err, want)
		}
	}
	for _, spec := range []string{"missing", "user:missing", "-1", "4294967295", "user:", ":", "99999999999"} {
		var e *wire.Error
		if _, err := a.account(spec); !errors.As(err, &e) || e.Code != wire.ErrNoUser {
			t.Errorf("%q: %v", spec, err)
		}
	}
	bare := New(Options{Root: t.TempDir()})
	if u, err := bare.account(""); err != nil || u.uid != 0 || u.home != "/root" {
		t.Errorf("no passwd: %+v, %v", u, err)
	}
}

func TestReady(t *testing.T) {
	a := newTestAgent(t)
	conn, ended := a.dial()
	wire.NewStream(conn).SendJSON(wire.KindRequest, wire.Request{Op: wire.OpReady})
	conn.Close()
	within(t, 5*time.Second, "end of the wait", func() bool { return closed(ended) })
	if got := a.system.noted(); len(got) != 1 || got[0] != "gave up" {
		t.Fatalf("%q", got)
	}
	close(a.system.ready)
	var r wire.Ready
	if err := a.call(wire.Request{Op: wire.OpReady}, &r); err != nil || r.System != "degraded" {
		t.Fatalf("%+v, %v", r, err)
	}
}

func TestShutdownAndClock(t *testing.T) {
	a := newTestAgent(t)
	at := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	if err := a.call(wire.Request{Op: wire.OpClock, Clock: &wire.Clock{UnixNano: at.UnixNano()}}, nil); err != nil {
		t.Fatal(err)
	}
	if err := a.call(wire.Request{Op: wire.OpShutdown, Shutdown: &wire.Shutdown{Verb: "reboot"}}, nil); err != nil {
		t.Fatal(err)
	}
	within(t, 5*time.Second, "shutdown", func() bool { return len(a.system.noted()) == 2 })
	if got := strings.Join(a.system.noted(), " "); got != "2030-01-02T03:04:05Z reboot" {
		t.Error(got)
	}
}

func TestRefusals(t *testing.T) {
	a := newTestAgent(t)
	for name, test := range map[string]struct {
		req  wire.Request
		code string
	}{
		"unknown":        {wire.Request{Op: "dance"}, wire.ErrUnknownOp},
		"no command":     {wire.Request{Op: wire.OpExec}, wire.ErrInvalid},
		"zero byte":      {wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"a\x00b"}}}, wire.ErrInvalid},
		"bad env":        {wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"true"}, Env: []string{"=x"}}}, wire.ErrInvalid},
		"no user":        {wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"true"}, User: "missing"}}, wire.ErrNoUser},
		"no directory":   {wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"true"}, Dir: "/missing"}}, wire.ErrNoDir},
		"a file as dir":  {wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"true"}, Dir: "/etc/passwd"}}, wire.ErrNoDir},
		"no such verb":   {wire.Request{Op: wire.OpShutdown, Shutdown: &wire.Shutdown{Verb: "explode"}}, wire.ErrInvalid},
		"no time":        {wire.Request{Op: wire.OpClock}, wire.ErrInvalid},
		"no tree":        {wire.Request{Op: wire.OpTar}, wire.ErrInvalid},
		"relative tree":  {wire.Request{Op: wire.OpUntar, Tree: &wire.Tree{Dir: "x"}}, wire.ErrInvalid},
		"path leads out": {wire.Request{Op: wire.OpTar, Tree: &wire.Tree{Dir: "/", Paths: []string{"a/../../b"}}}, wire.ErrInvalid},
		"long refusal":   {wire.Request{Op: strings.Repeat("x", 60000)}, wire.ErrUnknownOp},
	} {
		var e *wire.Error
		if err := a.call(test.req, nil); !errors.As(err, &e) || e.Code != test.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	conn, _ := a.dial()
	wire.WriteFrame(conn, wire.KindStdin, nil)
	if kind, payload, err := wire.ReadFrame(conn, nil); kind != wire.KindError || !strings.Contains(string(payload), wire.ErrInvalid) {
		t.Errorf("no request: %v %s %v", kind, payload, err)
	}
}

func TestOverload(t *testing.T) {
	a := newTestAgent(t)
	held, ended := a.dial()
	wire.NewStream(held).SendJSON(wire.KindRequest, wire.Request{Op: wire.OpReady})
	for range maxStreams - 1 {
		other, _ := a.dial()
		wire.NewStream(other).SendJSON(wire.KindRequest, wire.Request{Op: wire.OpReady})
	}
	within(t, 5*time.Second, "full agent", func() bool { return len(a.slots) == maxStreams })
	var e *wire.Error
	if err := a.call(wire.Request{Op: wire.OpHello}, nil); !errors.As(err, &e) || e.Code != wire.ErrOverloaded {
		t.Fatalf("got %v", err)
	}
	held.Close()
	within(t, 5*time.Second, "free slot", func() bool { return closed(ended) })
	if err := a.call(wire.Request{Op: wire.OpHello}, nil); err != nil {
		t.Fatal(err)
	}
}

// The whole way: commands through one serial port, with a host that dies between
// two of them.
func TestServe(t *testing.T) {
	magic := make([]byte, wire.MagicLen)
	rand.Read(magic)
	a := newTestAgent(t, func(o *Options) { o.Config.Magic = magic })
	master, slave := openRawTerminal(t)
	port, err := newPort(slave)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- a.Serve(port) }()
	serial := wire.NewSerial(func(context.Context) (net.Conn, error) { return fileConn{master}, nil }, magic)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	data := make([]byte, 300000)
	rand.Read(data)
	for range 3 {
		conn, err := serial.Dial(ctx)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		exit, err := wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"sh", "-c", "cat; exit 42"}, Stdin: true}},
			wire.Stdio{In: bytes.NewReader(data), Out: &out})
		if err != nil || exit.Code != 42 || !bytes.Equal(out.Bytes(), data) {
			t.Fatalf("%+v, %v, %d bytes", exit, err, out.Len())
		}
	}
	serial.Close()
	port.Close()
	within(t, 5*time.Second, "end of the agent", func() bool { return len(done) == 1 })
}

// fileConn makes a connection of a file that has deadlines.
type fileConn struct{ *os.File }

func (fileConn) LocalAddr() net.Addr  { return nil }
func (fileConn) RemoteAddr() net.Addr { return nil }

func pidIn(t *testing.T, path string) int {
	t.Helper()
	pid := 0
	within(t, 10*time.Second, "pid in "+path, func() bool {
		data, _ := os.ReadFile(path)
		pid, _ = strconv.Atoi(strings.TrimSpace(string(data)))
		return pid > 0 && bytes.HasSuffix(data, []byte("\n"))
	})
	return pid
}

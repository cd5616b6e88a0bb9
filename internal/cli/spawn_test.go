package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/guest/wire"
	"banger/test/need"
)

// spawning is a state directory without a daemon, and a bangerd that can be started.
func spawning(t *testing.T, mode string) (*call, func(args ...string) result) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	layout := config.Layout{Root: filepath.Join(t.TempDir(), "state")}
	env := []string{"BANGERD=" + self, daemonMode + "=" + mode, "GOCOVERDIR=" + coverage(t)}
	run := func(args ...string) result {
		t.Helper()
		c := &call{t: t, layout: layout, stdin: strings.NewReader(""), env: env}
		code := c.start(args...).wait()
		return result{code, c.out.String(), c.err.String()}
	}
	t.Cleanup(func() {
		if r := run("daemon", "stop"); r.code != 0 {
			t.Errorf("the daemon does not stop: %v", r)
		}
	})
	return &call{t: t, layout: layout, env: env}, run
}

// coverage is where the daemons of a test write their coverage. It is no t.TempDir: one
// that has ended for its clients, or has lost a race, may write there after the test.
func coverage(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cover")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func starts(t *testing.T, l config.Layout) string {
	t.Helper()
	b, err := os.ReadFile(l.Root + ".starts")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestSpawn: the daemon is a session of its own, in /, and holds nothing of banger's.
func TestSpawn(t *testing.T) {
	c, run := spawning(t, "serve")
	want(t, "status before", run("daemon", "status"), result{3, "", "banger: no daemon is running\nhint: any command starts it, for example banger ps\n"})
	want(t, "stop before", run("daemon", "stop"), result{0, "", "no daemon is running\n"})
	if _, err := os.Stat(c.layout.Root); err == nil {
		t.Error("looking made the state directory")
	}

	// A descriptor that a parent left open for banger must not stay open in the daemon.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := unix.FcntlInt(w.Fd(), unix.F_SETFD, 0); err != nil {
		t.Fatal(err)
	}
	ps := run("ps")
	want(t, "ps", ps.code, 1)
	contains(t, "ps", ps.err, "the running daemon does not know this call\nhint: banger daemon stop")
	w.Close()
	r.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil || os.IsTimeout(err) {
		t.Errorf("the pipe is still open: %d %v", n, err)
	}
	status := run("daemon", "status")
	contains(t, "status", status.out, `sid=true cwd=/ fds=0=null 1=bangerd.log 2=bangerd.log`, `ready=""`)
	if strings.Contains(status.out, "pipe:") {
		t.Errorf("a pipe is open: %s", status.out)
	}
	want(t, "stop", run("daemon", "stop"), result{0, "", ""})
	want(t, "status after", run("daemon", "status").code, 3)
	want(t, "starts", starts(t, c.layout), "opened\n")
}

// TestSpawnRace: many at once start one daemon.
func TestSpawnRace(t *testing.T) {
	c, run := spawning(t, "serve")
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			if r := run("ps"); !strings.Contains(r.err, "does not know this call") {
				t.Errorf("%v", r)
			}
		})
	}
	wg.Wait()
	want(t, "daemons", strings.Count(starts(t, c.layout), "opened"), 1)
}

// TestSpawnAfterKill: a socket that nobody listens on any more is no obstacle.
func TestSpawnAfterKill(t *testing.T) {
	c, run := spawning(t, "serve")
	run("ps")
	pid := pidIn(t, run("daemon", "status").out)
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the daemon is dead", func() bool { return run("daemon", "status").code == 3 })
	if _, err := os.Stat(c.layout.Socket()); err != nil {
		t.Fatalf("the test needs a stale socket: %v", err)
	}
	contains(t, "ps", run("ps").err, "does not know this call")
	want(t, "daemons", strings.Count(starts(t, c.layout), "opened"), 2)
}

func pidIn(t *testing.T, status string) int {
	t.Helper()
	for _, line := range strings.Split(status, "\n") {
		var pid int
		if _, err := fmt.Sscanf(line, "pid: %d", &pid); err == nil {
			return pid
		}
	}
	t.Fatalf("no pid in %s", status)
	return 0
}

// TestSpawnFails: the daemon's own words, with its code, or the end of its log.
func TestSpawnFails(t *testing.T) {
	_, run := spawning(t, "misconfigured")
	want(t, "ps", run("ps"), result{2, "", "banger: config.toml:3: unknown key colour\nhint: banger doctor\n"})
	want(t, "run", run("run", "-d").code, 125)

	c, run := spawning(t, "crash")
	r := run("ps")
	want(t, "exit code", r.code, 1)
	want(t, "stderr", r.err, "banger: cannot start the daemon: it ended at once\n  panic: the last words\nhint: banger doctor\n")

	c.env = []string{"BANGERD=" + filepath.Join(t.TempDir(), "bangerd")}
	c.stdin = strings.NewReader("")
	want(t, "without bangerd", c.start("ps").wait(), 4)
	contains(t, "stderr", c.err.String(), "cannot find bangerd at ", "hint: make build")
}

// TestVersionRule: an idle older daemon is replaced; a busy one is spoken to.
func TestVersionRule(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	build, err := buildOf(self)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, build string
		busy        int32
		replaced    bool
		note        string
	}{
		{"the same", build, 0, false, ""},
		{"younger", "9000000000000000000-1", 0, false, ""},
		{"older and idle", "1-1", 0, true, ""},
		{"unknown and idle", "", 0, true, ""},
		{"older and busy", "1-1", 1, false, "the running daemon is of another version (9.9) and busy: it goes on, and is replaced when it is idle\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newFake(t)
			d.status.Build, d.status.BusyOperations = c.build, c.busy
			call := d.call()
			call.env = []string{"BANGERD=" + self, daemonMode + "=serve", "GOCOVERDIR=" + coverage(t)}
			code := call.start("ps", "-q").wait()
			if strings.Contains(call.err.String(), "does not know this call") != c.replaced {
				t.Errorf("replaced: not %v: exit %d %s", c.replaced, code, call.err.String())
			}
			noted := d.call()
			noted.env = call.env
			if !c.replaced {
				noted.start("ps").wait()
				want(t, "stderr", noted.err.String(), c.note)
			}
			want(t, "daemon stop", d.run("daemon", "stop").code, 0)
		})
	}
}

// TestForeignSocket: what another user listens on is not spoken to.
func TestForeignSocket(t *testing.T) {
	need.Need(t, "root")
	d := newFake(t)
	if err := os.Chown(d.layout.Socket(), 12345, 12345); err != nil {
		t.Fatal(err)
	}
	for args, code := range map[string]int{"ps": 5, "run -d": 125, "daemon status": 5, "daemon stop": 5} {
		r := d.run(strings.Fields(args)...)
		want(t, args, r.code, code)
		contains(t, args, r.err, "banger: the socket "+d.layout.Socket()+" belongs to uid 12345, not to uid 0\nhint: set BANGER_STATE_DIR")
	}
	want(t, "requests", d.called(), "")
}

// TestForeignStateDir: nor is a directory of another user used.
func TestForeignStateDir(t *testing.T) {
	need.Need(t, "root")
	d := newFake(t)
	if err := os.Chown(d.layout.Root, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	r := d.run("ps")
	want(t, "exit code", r.code, 5)
	contains(t, "stderr", r.err, "belongs to uid 12345")
}

// TestDaemonThatDies: it takes the connection and is gone.
func TestDaemonThatDies(t *testing.T) {
	d := newFake(t)
	d.close()
	ln, err := net.Listen("unix", d.layout.Socket())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	r := d.run("daemon", "status")
	want(t, "exit code", r.code, 1)
	contains(t, "stderr", r.err, "lost the connection to the daemon")
}

func TestNewer(t *testing.T) {
	for _, c := range []struct {
		a, b  string
		newer bool
	}{{"2-1", "1-9", true}, {"1-9", "2-1", false}, {"10-1", "9-1", true}, {"1-1", "1-2", false}, {"1-1", "", true}, {"", "1-1", false}, {"1-1", "devel", true}} {
		want(t, c.a+" "+c.b, newer(c.a, c.b), c.newer)
	}
}

// TestStopWaits: daemon stop returns when the daemon is gone.
func TestStopWaits(t *testing.T) {
	d := newFake(t)
	want(t, "stop", d.run("daemon", "stop"), result{0, "", ""})
	select {
	case <-d.stopped:
	default:
		t.Error("it did not wait")
	}
	want(t, "requests", d.called(), "shutdown if_idle=false")
}

func TestStatus(t *testing.T) {
	d := newFake(t)
	d.status = &bangerv1.StatusResponse{Version: "1.2", Pid: 77, Socket: "/s/bangerd.sock", StateDir: "/s", Instance: "abc123", StartedAt: stamp(now().Add(-time.Hour)),
		Vms: 3, RunningVms: 1, BusyOperations: 1, Vmm: "qemu", Accelerator: "tcg", AcceleratorReason: "no vmx or svm"}
	want(t, "status", d.run("daemon", "status").out, "version:      1.2\npid:          77\nsocket:       /s/bangerd.sock\nstate:        /s\nlog:          "+d.layout.Log()+
		"\ninstance:     abc123\nstarted:      1h ago\nVMs:          3, of which 1 run\nbusy with:    1 job\nVMM:          qemu\naccelerator:  tcg\nno KVM:       no vmx or svm\n")
	contains(t, "json", d.run("daemon", "status", "--format", "json").out, `"accelerator_reason": "no vmx or svm"`)
}

// endingOnce makes d a daemon that is about to end when method is first called, and
// that has been followed by the next one a few questions later.
func (d *fakeDaemon) endingOnce(method string) {
	const over = 4
	asked := 0
	d.ending = func(m string) error {
		if asked == 0 && m != method || asked == over {
			return nil
		}
		asked++
		return api.Errorf(api.Stopping, "the daemon is shutting down")
	}
}

// TestDaemonIsReplaced: a call that comes to a daemon which is about to end is made to
// the next one; commands that only look say what they see.
func TestDaemonIsReplaced(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for method, args := range map[string][]string{
		"create": {"create", "--name", "box"}, "stop": {"stop", "shop"}, "exec": {"exec", "shop", "true"}, "export": {"diff", "shop"}, "status": {"ps", "-q"},
	} {
		t.Run(method, func(t *testing.T) {
			d := newFake(t)
			d.add(&bangerv1.VM{Name: "shop", State: bangerv1.VM_RUNNING})
			d.exec = func(_ wire.Exec, g *guestEnd) { g.exit(0) }
			lock, err := os.OpenFile(d.layout.DaemonLock(), os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer lock.Close()
			if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
				t.Fatal(err)
			}
			d.status.Build = "9000000000000000000-1" // or it would be replaced
			d.endingOnce(method)
			call := d.call()
			call.env = []string{"BANGERD=" + self, daemonMode + "=serve", "GOCOVERDIR=" + coverage(t)}
			if code := call.start(args...).wait(); code != 0 {
				t.Errorf("exit code %d: %s", code, call.err.String())
			}
		})
	}
	d := newFake(t)
	d.endingOnce("status")
	want(t, "daemon status", d.run("daemon", "status"), result{5, "", "banger: the daemon is shutting down\nhint: banger ps\n"})
	var answers atomic.Int32
	d.ending = func(string) error {
		if answers.Add(1) == 4 {
			go d.close()
		}
		return api.Errorf(api.Stopping, "the daemon is shutting down")
	}
	want(t, "daemon stop", d.run("daemon", "stop"), result{0, "", ""})
	want(t, "it waited", answers.Load() >= 4, true)
}

// TestDaemonIsGone: nor has a call begun anything that finds nobody on the socket.
func TestDaemonIsGone(t *testing.T) {
	for name, call := range map[string]func(ctx context.Context, a *app, c *client) error{
		"unary": func(ctx context.Context, _ *app, c *client) error {
			_, err := c.vms.List(ctx, &bangerv1.ListVMsRequest{})
			return err
		},
		"exec": func(ctx context.Context, a *app, c *client) error {
			_, err := a.inGuest(ctx, c, command{vm: "shop", exec: wire.Exec{Argv: []string{"true"}}}, "")
			return err
		},
		"export": func(ctx context.Context, a *app, c *client) error {
			_, err := a.export(ctx, c, &bangerv1.ExportWorkspaceRequest{Ref: "shop"}, io.Discard)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := withShop(t)
			c, err := openClient(d.layout, true)
			if err != nil {
				t.Fatal(err)
			}
			defer c.close()
			a := newApp(strings.NewReader(""), io.Discard, io.Discard, nil)
			a.signals = watchSignals(func(chan<- os.Signal) func() { return func() {} })
			defer a.signals.stop()
			d.close()
			if err := call(t.Context(), a, c); !errors.Is(err, errNoDaemon) {
				t.Errorf("where none is to be started: %v", err)
			}
			c.next = func(context.Context) error { d.listen(); return nil }
			if err := call(t.Context(), a, c); err != nil {
				t.Errorf("with a next one: %v", err)
			}
		})
	}
}

// TestDaemonThatHangs: it takes the connection and does not answer in time.
func TestDaemonThatHangs(t *testing.T) {
	d := newFake(t)
	d.ending = func(string) error { return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded) }
	want(t, "ps", d.run("ps"), result{1, "", fmt.Sprintf("banger: the daemon (pid %d) did not answer within 30s\nhint: kill -9 %[1]d\n", os.Getpid())})
}

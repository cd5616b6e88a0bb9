package fake_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/fake"
	"banger/internal/daemon/initrd"
	"banger/internal/guest/wire"
	"banger/internal/shim"
)

var programs string // a directory with fakevmm and banger-shim

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if programs, err = os.MkdirTemp("", "programs"); err != nil {
			panic(err)
		}
		defer os.RemoveAll(programs)
		build := exec.Command("go", "build", "-o", programs, "banger/test/fakevmm", "banger/cmd/banger-shim")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "%s%v\n", out, err)
			return 1
		}
		return m.Run()
	}())
}

// testVM is a VM's directory as the manager makes it.
type testVM struct {
	t     *testing.T
	h     *fake.Host
	dir   string
	magic []byte
}

func newVM(t *testing.T, h *fake.Host) *testVM {
	t.Helper()
	v := &testVM{t: t, h: h, dir: t.TempDir(), magic: bytes.Repeat([]byte("m"), wire.MagicLen)}
	copy(v.magic, t.Name())
	for _, name := range []string{"run", "log"} {
		if err := os.Mkdir(filepath.Join(v.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(v.dir+"/disk", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(v.dir + "/run/initrd")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cfg := wire.Config{Version: 1, Magic: v.magic, Identity: wire.Identity{ID: "0123", Hostname: "dev"}, User: &wire.User{Name: "dev", UID: 1000}}
	if err := initrd.Write(f, programs+"/fakevmm", []string{programs + "/banger-shim"}, cfg); err != nil {
		t.Fatal(err)
	}
	return v
}

func newHost(t *testing.T) *fake.Host { return fake.New(t.TempDir(), programs+"/fakevmm") }

func (v *testVM) launch() error {
	v.t.Helper()
	spec := driver.Spec{
		ID: "0123", Name: "dev", CPUs: 1, Memory: 256 << 20, Kernel: "run/kernel", Initrd: "run/initrd",
		Disks: []driver.DiskSpec{{Serial: "root", Path: "disk", Format: "raw"}},
	}
	cmd, err := v.h.VMM().Command(spec)
	if err != nil {
		v.t.Fatal(err)
	}
	_, err = shim.Launch(v.t.Context(), v.dir, programs+"/banger-shim", shim.Config{Argv: cmd.Argv, Env: cmd.Env}, nil)
	v.t.Cleanup(func() {
		if held, _ := shim.Held(v.dir); held {
			v.kill()
		}
		v.gone()
		if text := v.h.Text(); text != "" {
			v.t.Errorf("left on the host: %s", text)
		}
	})
	return err
}

// start boots the VM and returns its channel.
func (v *testVM) start() driver.Channel {
	v.t.Helper()
	if err := v.launch(); err != nil {
		v.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(v.t.Context(), 20*time.Second)
	defer cancel()
	if err := v.h.VMM().Boot(ctx, v.dir, driver.Spec{}); err != nil {
		v.t.Fatal(err)
	}
	ch := v.h.VMM().Channel(v.dir, v.magic)
	v.t.Cleanup(func() { ch.Close() })
	return ch
}

func (v *testVM) kill() {
	v.t.Helper()
	ps, err := shim.Processes(v.dir)
	if err != nil {
		v.t.Fatal(err)
	}
	if err := syscall.Kill(ps.VMM.PID, syscall.SIGKILL); err != nil {
		v.t.Error(err)
	}
}

func (v *testVM) gone() shim.Exit {
	v.t.Helper()
	within(v.t, 20*time.Second, "end of the VM", func() bool {
		held, err := shim.Held(v.dir)
		return err == nil && !held
	})
	e, err := shim.ReadExit(v.dir)
	if err != nil {
		v.t.Error(err)
	}
	return e
}

func within(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %s", what, d)
		}
	}
}

func call(t *testing.T, ch driver.Channel, timeout time.Duration, req wire.Request, reply any) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	conn, err := ch.Dial(ctx)
	if err != nil {
		return err
	}
	return wire.Call(ctx, conn, req, reply)
}

func sh(t *testing.T, ch driver.Channel, script string) (string, wire.Exit) {
	t.Helper()
	out, exit, err := try(t, ch, script)
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	return out, exit
}

func try(t *testing.T, ch driver.Channel, script string) (string, wire.Exit, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	conn, err := ch.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	exit, err := wire.Run(ctx, conn, wire.Request{Op: wire.OpExec, Exec: &wire.Exec{Argv: []string{"sh", "-c", script}}}, wire.Stdio{Out: &out, Err: &out})
	return out.String(), exit, err
}

func TestVMM(t *testing.T) {
	v := newVM(t, newHost(t))
	ch := v.start()
	var hello wire.Hello
	if err := call(t, ch, 20*time.Second, wire.Request{Op: wire.OpHello, Nonce: "n"}, &hello); err != nil {
		t.Fatal(err)
	}
	home := v.dir + "/guest/home"
	if hello.ID != "0123" || hello.Nonce != "n" || hello.User != "dev" || hello.Home != home {
		t.Errorf("%+v", hello)
	}
	if got := v.h.Text(); got != "process of 0123\n" {
		t.Errorf("%q", got)
	}
	if out, exit := sh(t, ch, "pwd; id -u; echo $USER; exit 42"); out != fmt.Sprintf("%s\n%d\ndev\n", home, os.Geteuid()) || exit.Code != 42 {
		t.Errorf("%q %+v", out, exit)
	}
	// A command that lives on must not hold the VM's lock.
	if out, _ := sh(t, ch, "readlink /proc/self/fd/*"); strings.Contains(out, "/run/") {
		t.Errorf("descriptors of the VMM reach the guest:\n%s", out)
	}
	var ready wire.Ready
	if err := call(t, ch, 20*time.Second, wire.Request{Op: wire.OpReady}, &ready); err != nil || ready.System != "running" {
		t.Errorf("%+v, %v", ready, err)
	}
	// A second daemon takes over while the first is still connected.
	second := v.h.VMM().Channel(v.dir, v.magic)
	defer second.Close()
	if out, _ := sh(t, second, "echo second"); out != "second\n" {
		t.Errorf("%q", out)
	}
	if out, _ := sh(t, ch, "echo first again"); out != "first again\n" {
		t.Errorf("%q", out)
	}
	// The guest may be gone before its reply is here.
	err := call(t, ch, 20*time.Second, wire.Request{Op: wire.OpShutdown, Shutdown: &wire.Shutdown{Verb: "poweroff"}}, nil)
	if e := v.gone(); e.Intent != "poweroff" || e.How != "exited" || e.Code != 0 || !slicesContain(e.Console, "the agent is up") {
		t.Errorf("%+v, after the call returned %v", e, err)
	}
}

func slicesContain(lines []string, text string) bool {
	return strings.Contains(strings.Join(lines, "\n"), text)
}

// A killed VM takes the processes of its guest with it, and they do not hold its lock.
func TestKill(t *testing.T) {
	v := newVM(t, newHost(t))
	ch := v.start()
	sh(t, ch, `setsid sleep 1000 >/dev/null 2>&1 & echo $! >pid; touch ready`)
	data, err := os.ReadFile(v.dir + "/guest/home/pid")
	if err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + strings.TrimSpace(string(data)) + "/environ"
	if _, err := os.Stat(proc); err != nil {
		t.Fatal(err)
	}
	v.kill()
	if e := v.gone(); e.How != "signaled" || e.Signal != "KILL" && e.Signal != "SIGKILL" {
		t.Errorf("%+v", e)
	}
	within(t, 10*time.Second, "end of the guest's processes", func() bool {
		env, err := os.ReadFile(proc)
		return err != nil || len(env) == 0
	})
	if got := v.h.Text(); got != "" {
		t.Errorf("%q", got)
	}
}

func TestGuestEndsByItself(t *testing.T) {
	for _, verb := range []string{"poweroff", "reboot"} {
		v := newVM(t, newHost(t))
		_, _, _ = try(t, v.start(), "echo kept >file; setsid -f "+verb) // the guest may end before the exit is through
		if e := v.gone(); e.Intent != verb {
			t.Errorf("%+v", e)
		}
		// The home is part of the VM's disk.
		os.RemoveAll(v.dir + "/run/agent.sock")
		os.RemoveAll(v.dir + "/run/fake.sock")
		if out, _ := sh(t, v.start(), "cat file"); out != "kept\n" {
			t.Errorf("%q", out)
		}
	}
}

func TestScenarios(t *testing.T) {
	t.Run("die", func(t *testing.T) {
		v := newVM(t, newHost(t))
		v.h.SetScenario("", fake.Die)
		v.launch()
		if e := v.gone(); e.Code != 1 || !strings.Contains(e.Stderr, "cannot set up guest memory") {
			t.Errorf("%+v", e)
		}
	})
	t.Run("stall", func(t *testing.T) {
		v := newVM(t, newHost(t))
		v.h.SetScenario("dev", fake.Stall)
		ch := v.start()
		if err := call(t, ch, 50*time.Millisecond, wire.Request{Op: wire.OpHello}, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		v.h.VMM().PowerButton(t.Context(), v.dir)
		if held, err := shim.Held(v.dir); err != nil || !held {
			t.Errorf("%v, %v", held, err)
		}
		v.h.SetScenario("dev", "")
		if err := call(t, ch, 20*time.Second, wire.Request{Op: wire.OpHello}, nil); err != nil {
			t.Error(err)
		}
		if err := v.h.VMM().PowerButton(t.Context(), v.dir); err != nil {
			t.Error(err)
		}
		if e := v.gone(); e.Intent != "poweroff" {
			t.Errorf("%+v", e)
		}
	})
	t.Run("shutdown", func(t *testing.T) {
		v := newVM(t, newHost(t))
		ch := v.start()
		down := wire.Request{Op: wire.OpShutdown, Shutdown: &wire.Shutdown{Verb: "reboot"}}
		v.h.SetScenario("dev", fake.NoShutdown)
		if err := call(t, ch, 20*time.Second, down, nil); err != nil {
			t.Fatal(err)
		}
		within(t, 10*time.Second, "word on the console", func() bool {
			data, _ := os.ReadFile(v.dir + "/log/console")
			return strings.Contains(string(data), "does not go down")
		})
		v.h.SetScenario("dev", fake.SlowShutdown)
		begin := time.Now()
		if err := call(t, ch, 20*time.Second, down, nil); err != nil {
			t.Fatal(err)
		}
		if e := v.gone(); e.Intent != "reboot" || time.Since(begin) < fake.SlowShutdownTime {
			t.Errorf("%+v after %s", e, time.Since(begin))
		}
	})
}

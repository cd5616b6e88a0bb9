package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/shim"
	"banger/test/need"
)

// The test binary plays the shim, by its name, the VMM and the daemon.
const roleEnv = "BANGER_CGROUP_TEST_ROLE"

func TestMain(m *testing.M) {
	if os.Args[0] == "banger-shim" {
		os.Exit(shim.Main())
	}
	switch os.Getenv(roleEnv) {
	case "vmm":
		playVMM(os.Args[1], os.Args[2])
	case "daemon":
		playDaemon(os.Args[1], os.Args[2], os.Args[3])
	}
	os.Exit(m.Run())
}

const nobody = 65534

// playVMM touches memory, drops what a jailer drops, and stays.
func playVMM(mib, note string) {
	n, _ := strconv.Atoi(mib)
	memory := make([]byte, n<<20)
	for i := 0; i < len(memory); i += 4096 {
		memory[i] = 1
	}
	if os.WriteFile(note, nil, 0o600) != nil || syscall.Setgid(nobody) != nil || syscall.Setuid(nobody) != nil {
		os.Exit(9)
	}
	dropDescriptors()
	pause()
	os.Exit(int(memory[0]))
}

// dropDescriptors leaves those of the Go runtime.
func dropDescriptors() {
	for fd := range 100 {
		if target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err == nil && !strings.HasPrefix(target, "anon_inode:") {
			_ = syscall.Close(fd)
		}
	}
}

// pause waits for ever, unseen by the runtime, which would call it a deadlock.
func pause() {
	for {
		_, _ = syscall.Select(0, nil, nil, nil, nil)
	}
}

// playDaemon launches a VM and stays.
func playDaemon(instance, vm, dir string) {
	if _, err := launch(context.Background(), New(instance), vm, dir, 1, driver.Limits{}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	pause()
}

func launch(ctx context.Context, m *Manager, vm, dir string, mib int, l driver.Limits) (shim.Supervised, error) {
	self, err := os.Executable()
	if err != nil {
		return shim.Supervised{}, err
	}
	cfg := shim.Config{
		Argv: []string{self, strconv.Itoa(mib), "touched"}, Env: []string{roleEnv + "=vmm", "GOMAXPROCS=1", "GOGC=off"}, Group: m.Group(vm),
	}
	return shim.Launch(ctx, dir, self, cfg, func(ctx context.Context, pid int) error { return m.Place(ctx, vm, pid, l) })
}

// host is a test's instance.
type host struct {
	*testing.T
	m *Manager
}

func newHost(t *testing.T) host {
	t.Helper()
	need.Need(t, "testhost")
	h := host{T: t, m: New(fmt.Sprintf("%06x", time.Now().UnixNano()&0xffffff))}
	var _ driver.Groups = h.m
	t.Cleanup(func() {
		defer h.m.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		for _, o := range h.list(ctx) {
			if err := h.m.Inventory().Remove(ctx, o); err != nil {
				t.Error(err)
			}
		}
		if left := h.list(ctx); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	})
	return h
}

func (h host) list(ctx context.Context) []driver.Object {
	h.Helper()
	found, err := h.m.Inventory().List(ctx)
	if err != nil {
		h.Fatal(err)
	}
	return found
}

// machine is a VM.
type machine struct {
	host
	id, dir string
	who     shim.Supervised
}

func (h host) launch(id string, mib int, l driver.Limits) machine {
	h.Helper()
	v := machine{host: h, id: id, dir: h.TempDir()}
	var err error
	if v.who, err = launch(h.Context(), h.m, id, v.dir, mib, l); err != nil {
		h.Fatal(err)
	}
	return v
}

func (v machine) awaitTouched() {
	v.Helper()
	v.eventually("the VMM has its memory and has dropped its rights", func() bool {
		proc := fmt.Sprintf("/proc/%d", v.who.VMM.PID)
		status, err := os.ReadFile(proc + "/status")
		_, gone := os.Readlink(proc + "/fd/1")
		return err == nil && strings.Contains(string(status), "\nUid:\t65534\t65534") && gone != nil
	})
	if threads(v.who.VMM.PID) == 0 {
		v.Fatal("the VMM ended by itself")
	}
}

func (v machine) held() bool {
	v.Helper()
	held, err := shim.Held(v.dir)
	if err != nil {
		v.Fatal(err)
	}
	return held
}

// lockIsFree asks for the lock alone: of a directory that names no group.
func (v machine) lockIsFree() bool {
	v.Helper()
	aside := v.dir + "-lock"
	if err := os.MkdirAll(filepath.Join(aside, "run"), 0o700); err != nil {
		v.Fatal(err)
	}
	err := os.Link(filepath.Join(v.dir, "run/lock"), filepath.Join(aside, "run/lock"))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		v.Fatal(err)
	}
	held, err := shim.Held(aside)
	if err != nil {
		v.Fatal(err)
	}
	return !held
}

func (v machine) kill(pid int) {
	v.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		v.Fatal(err)
	}
}

func (h host) eventually(what string, cond func() bool) {
	h.Helper()
	deadline := time.Now().Add(time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			h.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// threads counts those of a process that have not ended.
func threads(pid int) (n int) {
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	for _, task := range tasks {
		data, err := os.ReadFile(task)
		_, rest, _ := strings.Cut(string(data), ") ")
		if err == nil && !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X") {
			n++
		}
	}
	return n
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

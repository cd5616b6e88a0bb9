package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/test/need"
)

const (
	nobody   = 65534
	pageSize = 4096
	strays   = 20
	runtimes = "anon_inode:" // descriptors that the Go runtime cannot do without
)

// playGroupVMM plays what must be the first process's to end: it and its descendants
// drop their credentials, descriptors and session.
func playGroupVMM(args []string) int {
	switch args[0] {
	case "daemonise": // "ready" has the host's pid of a daemon that it left behind
		if len(args) == 1 {
			if !leaveBehind("daemonise", "middle") {
				return 9
			}
			dropAll()
		}
		if args[1] == "middle" {
			if _, err := start("daemonise", "end"); err != nil {
				return 9
			}
			return 0
		}
		pid, _ := os.Readlink("/proc/self")
		if os.WriteFile("ready.new", []byte(pid), 0o600) != nil || os.Rename("ready.new", "ready") != nil {
			return 9
		}
		dropAll()
	case "orphans": // leaves some behind that end with 5, and ends with 3 when told to
		if len(args) > 1 && args[1] == "middle" {
			if _, err := start("orphans", "end"); err != nil {
				return 9
			}
			return 0
		}
		if len(args) > 1 {
			return 5
		}
		for range strays {
			if !leaveBehind("orphans", "middle") {
				return 9
			}
		}
		return playVMM([]string{"obey"})
	case "touch": // MIB of memory
		mib, _ := strconv.Atoi(args[1])
		memory, err := syscall.Mmap(-1, 0, mib<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
		if err != nil {
			return 9
		}
		for i := 0; i < len(memory); i += pageSize {
			memory[i] = 1
		}
		return playVMM([]string{"deaf"})
	}
	return 0
}

func start(args ...string) (*os.Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return os.StartProcess(self, append([]string{self}, args...), &os.ProcAttr{
		Env: os.Environ(), Files: []*os.File{nil, os.Stdout}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

func leaveBehind(args ...string) bool {
	middle, err := start(args...)
	if err != nil {
		return false
	}
	state, err := middle.Wait()
	return err == nil && state.Success()
}

func dropAll() {
	if syscall.Setgid(nobody) != nil || syscall.Setuid(nobody) != nil {
		os.Exit(9)
	}
	for fd := range 100 {
		target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		if err == nil && !strings.HasPrefix(target, runtimes) {
			_ = syscall.Close(fd)
		}
	}
	// Unseen by the Go runtime, which would call it a deadlock.
	for {
		_, _ = syscall.Select(0, nil, nil, nil, nil)
	}
}

// groupOf makes the scope of a VM, and returns the leaf of the VMM.
func groupOf(t *testing.T) string {
	t.Helper()
	need.Need(t, "cgroup2")
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	var root string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			root = f[1]
		}
	}
	scope, err := os.MkdirTemp(root, "banger-shim-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(scope, "cgroup.kill"), []byte("1"), 0)
		eventually(t, "the scope is empty", func() bool {
			n, err := count(filepath.Join(scope, "cgroup.events"), "populated")
			return n == 0 || errors.Is(err, fs.ErrNotExist)
		})
		removeScope(t, scope)
	})
	return filepath.Join(scope, "vmm")
}

func removeScope(t *testing.T, scope string) {
	t.Helper()
	for _, dir := range []string{"vmm", "shim", ""} {
		if err := os.Remove(filepath.Join(scope, dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
}

// placeIn is what the daemon does, without systemd.
func placeIn(group string) Place {
	return func(_ context.Context, pid int) error {
		leaf := filepath.Join(filepath.Dir(group), "shim")
		for _, dir := range []string{leaf, group} {
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return err
			}
		}
		return os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
	}
}

func inGroup(t *testing.T, cfg Config) Config {
	t.Helper()
	cfg.Group = groupOf(t)
	return cfg
}

func cgroup(t *testing.T, pid int) string {
	t.Helper()
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSpace(path)
		}
	}
	return ""
}

func status(t *testing.T, pid int, field string) []string {
	t.Helper()
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), field+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.Fields(line)
}

func TestGroup(t *testing.T) {
	dir := t.TempDir()
	cfg := inGroup(t, vmm(t, "obey"))
	s := launchVM(t, dir, cfg)
	scope := filepath.Base(filepath.Dir(cfg.Group))
	if got := cgroup(t, s.Shim.PID); !strings.HasSuffix(got, scope+"/shim") {
		t.Errorf("the shim is in %s", got)
	}
	if got := cgroup(t, s.VMM.PID); !strings.HasSuffix(got, scope+"/vmm") {
		t.Errorf("the VMM is in %s", got)
	}
	if got := status(t, s.Shim.PID, "NSpid"); !slices.Equal(got, []string{strconv.Itoa(s.Shim.PID), "1"}) {
		t.Errorf("the shim's pids are %v", got)
	}
	if got := status(t, s.VMM.PID, "PPid"); !slices.Equal(got, []string{strconv.Itoa(s.Shim.PID)}) {
		t.Errorf("the VMM's parent is %v, want %d", got, s.Shim.PID)
	}
	// The pids are the host's: the start times are right too.
	for _, p := range []Process{s.Shim, s.VMM} {
		if again, err := identify(p.PID); err != nil || again != p {
			t.Errorf("%+v is %+v, %v", p, again, err)
		}
	}
	if who, err := Processes(dir); err != nil || who != s {
		t.Errorf("processes.json has %+v, %v", who, err)
	}
	if got := descriptors(t, s.VMM.PID); got[0] != os.DevNull || strings.Contains(fmt.Sprint(got), dir) {
		t.Errorf("the VMM has %v", got)
	}
	for fd, file := range descriptors(t, s.Shim.PID) {
		if strings.Contains(file, scope) || strings.Contains(file, "pidfd") || fd == placedFD && strings.HasPrefix(file, "pipe:") {
			t.Errorf("the shim still has %s as %d", file, fd)
		}
	}
	eventually(t, "the VMM is ready", func() bool {
		_, err := os.Stat(filepath.Join(dir, "ready"))
		return err == nil
	})
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE, syscall.SIGTERM} {
		kill(t, s.Shim.PID, sig)
	}
	awaitDone(t, s)
	eventually(t, "the VM is gone", func() bool { return !held(t, dir) })
	if e := mustReadExit(t, dir); e.How != Exited || e.Code != 7 || e.OutOfMemory {
		t.Errorf("exit.json has %+v", e)
	}
}

// Neither Pdeathsig nor a lock nor a session ties these to the shim: the namespace does.
func TestKilledShimTakesAllOfItsNamespace(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, inGroup(t, vmm(t, "daemonise")))
	ready := filepath.Join(dir, "ready")
	var daemon int
	eventually(t, "the VMM has left a daemon behind, and both have nothing any more", func() bool {
		data, _ := os.ReadFile(ready)
		daemon, _ = strconv.Atoi(string(data))
		return daemon != 0 && hasNothing(t, daemon) && hasNothing(t, s.VMM.PID)
	})
	if got := status(t, daemon, "PPid"); !slices.Equal(got, []string{strconv.Itoa(s.Shim.PID)}) {
		t.Errorf("the daemon's parent is %v, want the shim %d", got, s.Shim.PID)
	}
	if !runs(s.VMM.PID) || !runs(daemon) {
		t.Fatal("they ended by themselves")
	}
	kill(t, s.Shim.PID, syscall.SIGKILL)
	eventually(t, "the VM is gone", func() bool { return !held(t, dir) })
	if runs(s.VMM.PID) || runs(daemon) {
		t.Error("gone, but its processes live")
	}
	if _, err := ReadExit(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("exit.json: %v", err)
	}
}

func hasNothing(t *testing.T, pid int) bool {
	t.Helper()
	uid := status(t, pid, "Uid")
	open := descriptors(t, pid)
	for fd, target := range open {
		if strings.HasPrefix(target, runtimes) {
			delete(open, fd)
		}
	}
	return len(uid) > 1 && uid[1] == strconv.Itoa(nobody) && len(open) == 0
}

// runs asks all threads: the first may have ended before the last gives back the memory.
func runs(pid int) bool {
	tasks, _ := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*")
	return slices.ContainsFunc(tasks, func(task string) bool {
		tid, err := strconv.Atoi(filepath.Base(task))
		return err == nil && lives(tid)
	})
}

// When the VMM ends, the shim does, and what the VMM left behind with it.
func TestEndOfTheVMMTakesWhatItLeft(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, inGroup(t, vmm(t, "daemonise")))
	eventually(t, "the daemon is there", func() bool {
		_, err := os.Stat(filepath.Join(dir, "ready"))
		return err == nil && hasNothing(t, s.VMM.PID)
	})
	if !runs(s.VMM.PID) || len(living(inDir(t, dir))) != 3 {
		t.Fatal("they ended by themselves")
	}
	kill(t, s.VMM.PID, syscall.SIGKILL)
	eventually(t, "the VM is gone", func() bool { return !held(t, dir) })
	if left := living(inDir(t, dir)); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	if e := mustReadExit(t, dir); e.How != Signaled || e.Signal != "KILL" || e.OutOfMemory {
		t.Errorf("exit.json has %+v", e)
	}
}

func TestOrphansAreReapedAndAreNotTheVMM(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, inGroup(t, vmm(t, "orphans")))
	eventually(t, "the VMM has left its orphans", func() bool {
		_, err := os.Stat(filepath.Join(dir, "ready"))
		return err == nil
	})
	shim := strconv.Itoa(s.Shim.PID)
	eventually(t, "the VMM is the shim's only child", func() bool {
		data, err := os.ReadFile("/proc/" + shim + "/task/" + shim + "/children")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data)) == strconv.Itoa(s.VMM.PID)
	})
	if !held(t, dir) || !lives(s.VMM.PID) {
		t.Fatal("the VM ended with an orphan")
	}
	kill(t, s.Shim.PID, syscall.SIGTERM)
	awaitDone(t, s)
	if e := mustReadExit(t, dir); e.How != Exited || e.Code != 7 {
		t.Errorf("exit.json has %+v", e)
	}
}

func TestNetworkInTheNamespace(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, inGroup(t, withNetwork(t, vmm(t, "obey"), "run")))
	net := s.Net
	for range 3 {
		kill(t, net.PID, syscall.SIGKILL)
		was := net
		eventually(t, "another network process runs", func() bool {
			who, err := Processes(dir)
			net = who.Net
			return err == nil && net.PID != was.PID && lives(net.PID)
		})
		if again, err := identify(net.PID); err != nil || again != net {
			t.Errorf("%+v is %+v, %v", net, again, err)
		}
	}
	kill(t, s.VMM.PID, syscall.SIGKILL)
	eventually(t, "the VM is gone", func() bool { return !held(t, dir) })
	if lives(net.PID) {
		t.Error("the network lives on")
	}
	mustReadExit(t, dir)
}

func TestPlaceThatFails(t *testing.T) {
	dir := t.TempDir()
	cfg := inGroup(t, sleeper())
	broken := errors.New("no systemd here")
	var pid int
	_, err := Launch(t.Context(), dir, program(), cfg, func(_ context.Context, p int) error {
		pid = p
		if state(pid) == "" || !held(t, dir) {
			t.Error("no process to be placed")
		}
		return broken
	})
	if !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	if state(pid) != "" || held(t, dir) {
		t.Error("the shim was not reaped")
	}
	if _, err := ReadExit(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("exit.json: %v", err)
	}
	if _, err := Processes(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("processes.json: %v", err)
	}
}

func TestGroupAndPlaceGoTogether(t *testing.T) {
	place := func(context.Context, int) error { return nil }
	for _, c := range []struct {
		group string
		place Place
	}{{"/sys/fs/cgroup/x", nil}, {"", place}, {"relative/vmm", place}} {
		if _, err := Launch(t.Context(), t.TempDir(), program(), Config{Argv: []string{"true"}, Group: c.group}, c.place); err == nil {
			t.Errorf("%q is taken", c.group)
		}
	}
}

func TestGroupThatIsNotThere(t *testing.T) {
	dir := t.TempDir()
	cfg := inGroup(t, sleeper())
	_, err := Launch(t.Context(), dir, program(), cfg, func(context.Context, int) error { return nil })
	if start := new(StartError); !errors.As(err, &start) || !errors.Is(err, syscall.ENOENT) || !strings.Contains(err.Error(), cfg.Group) {
		t.Errorf("error %v", err)
	}
	if left := inDir(t, dir); len(left) > 0 || held(t, dir) {
		t.Errorf("processes left: %v", left)
	}
}

// playPlacingDaemon never comes to an end of placing.
func playPlacingDaemon(dir, group string) {
	cfg := Config{Argv: []string{"touch", "started"}, Group: group}
	_, err := Launch(context.Background(), dir, os.Getenv(programs), cfg, func(ctx context.Context, pid int) error {
		if err := placeIn(group)(ctx, pid); err != nil {
			return err
		}
		fmt.Println("placing", pid)
		select {}
	})
	fmt.Println("failed", err)
}

// Without the word of the daemon, which is dead, nothing is started.
func TestDaemonDiesWhilePlacing(t *testing.T) {
	dir, group := t.TempDir(), groupOf(t)
	cmd := exec.Command(os.Args[0], dir, group)
	cmd.Env = append(os.Environ(), roleEnv+"=placing daemon")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d := &daemon{cmd: cmd, out: &lineReader{r: out}}
	t.Cleanup(d.kill)
	var pid int
	if line := d.out.next(t); !strings.HasPrefix(line, "placing ") {
		t.Fatalf("the daemon says %q", line)
	} else if pid, err = strconv.Atoi(strings.TrimPrefix(line, "placing ")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the shim waits", func() bool {
		data, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
		return strings.TrimSpace(string(data)) == "banger-shim"
	})
	if !held(t, dir) {
		t.Error("not held while it waits")
	}
	d.kill()
	eventually(t, "the VM is gone", func() bool { return !held(t, dir) })
	if e := mustReadExit(t, dir); e.How != StartFailed || !strings.Contains(e.Error, "bangerd ended") {
		t.Errorf("exit.json has %+v", e)
	}
	if _, err := os.Stat(filepath.Join(dir, "started")); err == nil {
		t.Error("the VMM was started")
	}
	if _, err := Processes(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("processes.json: %v", err)
	}
}

// The lock alone does not say that a VM is gone.
func TestHeldUntilTheScopeIsEmpty(t *testing.T) {
	dir := t.TempDir()
	cfg := inGroup(t, sleeper())
	s := launchVM(t, dir, cfg)
	last := exec.Command("sleep", "1000")
	if err := last.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = last.Wait() }()
	defer func() { _ = last.Process.Kill() }()
	if err := os.WriteFile(filepath.Join(cfg.Group, "cgroup.procs"), []byte(strconv.Itoa(last.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	kill(t, s.VMM.PID, syscall.SIGKILL)
	awaitDone(t, s)
	if free, err := locked(dir); err != nil || free || !held(t, dir) {
		t.Errorf("lock %v, %v", free, err)
	}
	if _, err := Launch(t.Context(), dir, program(), sleeper(), nil); !errors.Is(err, errLocked) {
		t.Errorf("a second launch: %v", err)
	}
	// Lost with the lock file, it is still there.
	if err := os.Remove(filepath.Join(dir, lockFile)); err != nil {
		t.Fatal(err)
	}
	if !held(t, dir) {
		t.Error("not held without the lock file")
	}
	if err := last.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the scope is empty", func() bool { return !held(t, dir) })
	removeScope(t, filepath.Dir(cfg.Group))
	if held(t, dir) {
		t.Error("held by a scope that is not there")
	}
	// What a power cut leaves of a file that was not synced.
	if err := os.WriteFile(filepath.Join(dir, configFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if held(t, dir) {
		t.Error("held by an empty file")
	}
}

// A large VMM gives its memory back after the shim's lock is free.
func TestLargeVMM(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, inGroup(t, vmm(t, "touch", "1024")))
	eventually(t, "it has touched its memory", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, consoleFile))
		return string(data) == "ready\n"
	})
	kill(t, s.Shim.PID, syscall.SIGKILL)
	eventually(t, "the lock is free", func() bool {
		held, err := locked(dir)
		return err == nil && !held
	})
	free := time.Now()
	eventually(t, "the VM is gone", func() bool { return !held(t, dir) })
	if runs(s.VMM.PID) {
		t.Error("gone, but the VMM lives")
	}
	t.Logf("gone %v after the lock was free", time.Since(free))
}

func TestResidentSetInTheNamespace(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, inGroup(t, vmm(t, "obey")))
	eventually(t, "the console is in use", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, consoleFile))
		return len(data) > 0
	})
	checkResidentSet(t, s)
}

package shim

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/guest/wire"
)

func TestIntentPrefixIsTheOneOfTheProtocol(t *testing.T) {
	if intentPrefix != wire.IntentPrefix {
		t.Fatalf("%q, the guest writes %q", intentPrefix, wire.IntentPrefix)
	}
}

func TestRunAndEnd(t *testing.T) {
	dir := t.TempDir()
	before := time.Now()
	s := launchVM(t, dir, vmm(t, "exit", "3", "booting\r\n\x1b[32mOK\x1b[0m\r\nbanger-intent: reboot\r\n", "qemu: oops\n"))
	if s.Shim.PID == 0 || s.Shim.StartTime == 0 || s.VMM.PID == 0 || s.VMM.StartTime < s.Shim.StartTime {
		t.Errorf("started %+v", s)
	}
	who, err := Processes(dir)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	if s.Version != 1 || s.BootID != boot || who != s {
		t.Errorf("processes.json has %+v, Launch said %+v", who, s)
	}
	awaitDone(t, s)
	if held(t, dir) {
		t.Error("the lock is held after the end")
	}
	e := mustReadExit(t, dir)
	if e.At.Before(before.Add(-time.Second)) || e.At.After(time.Now()) {
		t.Errorf("ended at %v", e.At)
	}
	e.At = time.Time{}
	want := Exit{Version: 1, How: Exited, Code: 3, Intent: "reboot", Stderr: "qemu: oops\n",
		Console: []string{"booting", "OK", "banger-intent: reboot"}}
	if !reflect.DeepEqual(e, want) {
		t.Errorf("exit.json has %+v, want %+v", e, want)
	}
	console, err := os.ReadFile(filepath.Join(dir, "log/console"))
	if err != nil || string(console) != "booting\r\n\x1b[32mOK\x1b[0m\r\nbanger-intent: reboot\r\n" {
		t.Errorf("console %q, %v", console, err)
	}
	// Nothing half written stays.
	for _, pattern := range []string{"run/*.new", "log/*.new"} {
		if left, _ := filepath.Glob(filepath.Join(dir, pattern)); len(left) > 0 {
			t.Errorf("left over: %v", left)
		}
	}
}

func TestStartFailures(t *testing.T) {
	plainFile := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plainFile, []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	noBinary := filepath.Join(t.TempDir(), "nobinary")
	if err := os.WriteFile(noBinary, []byte("data"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, argv0 string
		env         []string
		errno       syscall.Errno
	}{
		{"missing path", "/no/such/vmm", nil, syscall.ENOENT},
		{"missing in PATH", "no-such-vmm", nil, syscall.ENOENT},
		{"PATH of Env counts", "sleep", []string{"PATH=/no/such/dir"}, syscall.ENOENT},
		{"not executable", plainFile, nil, syscall.EACCES},
		{"no program", noBinary, nil, syscall.ENOEXEC},
		{"a directory", filepath.Dir(noBinary), nil, syscall.EACCES},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			_, err := Launch(t.Context(), dir, program(), Config{Argv: []string{c.argv0}, Env: c.env}, nil)
			var start *StartError
			if !errors.As(err, &start) || !errors.Is(err, c.errno) || !strings.Contains(err.Error(), c.argv0) {
				t.Fatalf("error %v, want a StartError of %v that names %s", err, c.errno, c.argv0)
			}
			// The shim was reaped before Launch returned: nothing is left at all.
			if held(t, dir) {
				t.Error("the lock is held")
			}
			if left := inDir(t, dir); len(left) > 0 {
				t.Errorf("processes left: %v", left)
			}
			if e := mustReadExit(t, dir); e.How != StartFailed || !strings.Contains(e.Error, c.argv0) {
				t.Errorf("exit.json has %+v", e)
			}
		})
	}
}

func TestShimThatCannotRun(t *testing.T) {
	t.Run("missing", func(t *testing.T) {
		dir := t.TempDir()
		_, err := Launch(t.Context(), dir, "/no/such/shim", sleeper(), nil)
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("error %v", err)
		}
		if held(t, dir) {
			t.Error("the lock is held")
		}
	})
	t.Run("ends at once", func(t *testing.T) {
		dir := t.TempDir()
		_, err := Launch(t.Context(), dir, "/bin/true", sleeper(), nil)
		if err == nil || !strings.Contains(err.Error(), "ended before it started") {
			t.Errorf("error %v", err)
		}
		if held(t, dir) {
			t.Error("the lock is held")
		}
	})
	t.Run("hangs", func(t *testing.T) {
		yes, err := exec.LookPath("yes")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		_, err = Launch(ctx, dir, yes, sleeper(), nil)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
		if left := inDir(t, dir); len(left) > 0 || held(t, dir) {
			t.Errorf("processes left: %v", left)
		}
	})
}

func TestByHandItDoesNothing(t *testing.T) {
	cmd := exec.Command(program())
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "only bangerd") {
		t.Errorf("%v, %s", err, out)
	}
}

func TestSecondLaunchIsRefusedAndTouchesNothing(t *testing.T) {
	dir := t.TempDir()
	s := launchVM(t, dir, sleeper())
	before := snapshot(t, dir)
	if _, err := Launch(t.Context(), dir, program(), Config{Argv: []string{"true"}}, nil); !errors.Is(err, errLocked) {
		t.Fatalf("error %v", err)
	}
	if after := snapshot(t, dir); !reflect.DeepEqual(before, after) {
		t.Errorf("was %v, is %v", before, after)
	}
	if !held(t, dir) || !lives(s.VMM.PID) {
		t.Error("the VM is gone")
	}
	// A shim started on the side, with a lock file of its own opening, gives up too.
	lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	cmd := exec.Command(program())
	cmd.Dir, cmd.ExtraFiles = dir, []*os.File{lock}
	if out, _ := cmd.CombinedOutput(); !strings.Contains(string(out), "another process supervises") {
		t.Errorf("it says %q", out)
	}
}

func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, name := range []string{configFile, processesFile, exitFile, consoleFile} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		files[name] = string(data)
	}
	return files
}

func TestLaunchForgetsTheRunBefore(t *testing.T) {
	dir := t.TempDir()
	awaitDone(t, launchVM(t, dir, vmm(t, "exit", "3", "first\n", "")))
	mustReadExit(t, dir)
	s := launchVM(t, dir, sleeper())
	if _, err := ReadExit(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("exit.json of the run before: %v", err)
	}
	if who, err := Processes(dir); err != nil || who.VMM != s.VMM {
		t.Errorf("processes.json has %+v, %v", who, err)
	}
	// Killed before it could say anything: no exit.json, rather than the old one.
	if err := syscall.Kill(s.Shim.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, s)
	eventually(t, "the lock is free", func() bool { return !held(t, dir) })
	if _, err := ReadExit(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("exit.json: %v", err)
	}
	// The console of earlier runs stays.
	awaitDone(t, launchVM(t, dir, vmm(t, "exit", "0", "second\n", "")))
	if data, err := os.ReadFile(filepath.Join(dir, consoleFile)); err != nil || string(data) != "first\nsecond\n" {
		t.Errorf("console %q, %v", data, err)
	}
	if e := mustReadExit(t, dir); !slices.Equal(e.Console, []string{"second"}) {
		t.Errorf("the last lines are another run's: %q", e.Console)
	}
}

// What a shim and a VMM get of the process that started them is the lock and
// nothing else, however carelessly that process was started itself.
func TestNothingIsInherited(t *testing.T) {
	t.Setenv("BANGER_SECRET", "x")
	var leak [2]int
	if err := syscall.Pipe(leak[:]); err != nil { // without close-on-exec
		t.Fatal(err)
	}
	defer syscall.Close(leak[0])
	defer syscall.Close(leak[1])
	dir := t.TempDir()
	cfg := sleeper()
	cfg.Env = []string{"A=1"}
	s := launchVM(t, dir, cfg)

	lock := filepath.Join(dir, lockFile)
	got := descriptors(t, s.VMM.PID)
	if len(got) != 4 || got[0] != os.DevNull || got[3] != lock ||
		!strings.HasPrefix(got[1], "pipe:") || !strings.HasPrefix(got[2], "pipe:") {
		t.Errorf("the VMM has %v", got)
	}
	leaked, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(leak[0]))
	if err != nil {
		t.Fatal(err)
	}
	locks := 0
	for fd, file := range descriptors(t, s.Shim.PID) {
		if file == leaked {
			t.Errorf("the shim has the leaked pipe as %d", fd)
		}
		if file == lock {
			locks++
		}
	}
	if locks != 1 {
		t.Errorf("the shim has the lock %d times", locks)
	}
	for _, file := range descriptors(t, os.Getpid()) {
		if file == lock {
			t.Error("the daemon still has the lock")
		}
	}
	if env, err := os.ReadFile("/proc/" + strconv.Itoa(s.VMM.PID) + "/environ"); err != nil || string(env) != "A=1\x00" {
		t.Errorf("the VMM's environment is %q, %v", env, err)
	}
	if env, err := os.ReadFile("/proc/" + strconv.Itoa(s.Shim.PID) + "/environ"); err != nil || strings.Contains(string(env), "SECRET") {
		t.Errorf("the shim's environment is %q, %v", env, err)
	}
	status, err := os.ReadFile("/proc/" + strconv.Itoa(s.VMM.PID) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"SigBlk:\t", "SigIgn:\t"} {
		_, rest, _ := strings.Cut(string(status), field)
		mask, err := strconv.ParseUint(rest[:16], 16, 64)
		// 32 and 33 are the C library's own, see nptl(7).
		if err != nil || mask&(1<<31-1) != 0 {
			t.Errorf("the VMM starts with %s%x, %v", field, mask, err)
		}
	}
	sid, _, errno := syscall.Syscall(syscall.SYS_GETSID, uintptr(s.VMM.PID), 0, 0)
	if errno != 0 || int(sid) != s.Shim.PID {
		t.Errorf("the VMM's session is %d, want the shim's %d (%v)", sid, s.Shim.PID, errno)
	}
	if cwd, _ := os.Readlink("/proc/" + strconv.Itoa(s.VMM.PID) + "/cwd"); cwd != dir {
		t.Errorf("the VMM runs in %s", cwd)
	}
}

func descriptors(t *testing.T, pid int) map[int]string {
	t.Helper()
	base := "/proc/" + strconv.Itoa(pid) + "/fd"
	entries, err := os.ReadDir(base)
	if err != nil {
		t.Fatal(err)
	}
	open := map[int]string{}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		if target, err := os.Readlink(filepath.Join(base, e.Name())); err == nil {
			open[fd] = target
		}
	}
	return open
}

func TestSignals(t *testing.T) {
	t.Run("only TERM passes", func(t *testing.T) {
		dir := t.TempDir()
		s := launchVM(t, dir, sleeper())
		for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE, syscall.SIGQUIT,
			syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGXFSZ, syscall.SIGTERM} {
			if err := syscall.Kill(s.Shim.PID, sig); err != nil {
				t.Fatal(err)
			}
		}
		awaitDone(t, s)
		if e := mustReadExit(t, dir); e.How != Signaled || e.Signal != "TERM" {
			t.Errorf("exit.json has %+v", e)
		}
	})
	t.Run("the VMM decides what TERM means", func(t *testing.T) {
		dir := t.TempDir()
		s := launchVM(t, dir, vmm(t, "obey"))
		eventually(t, "the VMM is ready", func() bool {
			data, _ := os.ReadFile(filepath.Join(dir, consoleFile))
			return string(data) == "ready\n"
		})
		if err := syscall.Kill(s.Shim.PID, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		awaitDone(t, s)
		if e := mustReadExit(t, dir); e.How != Exited || e.Code != 7 {
			t.Errorf("exit.json has %+v", e)
		}
	})
}

func TestLongPath(t *testing.T) {
	dir := t.TempDir()
	for len(dir) < 1500 {
		dir = filepath.Join(dir, strings.Repeat("d", 200))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := launchVM(t, dir, sleeper())
	if !held(t, dir) {
		t.Error("the lock is not held")
	}
	if err := syscall.Kill(s.VMM.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, s)
	if e := mustReadExit(t, dir); e.Signal != "KILL" {
		t.Errorf("exit.json has %+v", e)
	}
}

func TestDirectoryGoneMeanwhile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vm")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := launchVM(t, dir, sleeper())
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if held(t, dir) {
		t.Error("held without a lock file")
	}
	if err := syscall.Kill(s.VMM.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, s)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory is back: %v", err)
	}
}

// A daemon reads what another release wrote: more fields, a higher version.
func TestFilesOfOtherReleases(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"run", "log"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string, v any) {
		data, err := json.Marshal(v)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(exitFile, map[string]any{"version": 9, "how": "exited", "code": 4, "weather": "fine"})
	if e, err := ReadExit(dir); err != nil || e.Code != 4 {
		t.Errorf("%+v, %v", e, err)
	}
	write(processesFile, map[string]any{"version": 9, "shim": map[string]any{"pid": 5, "start_time": 6}, "weather": 1})
	if p, err := Processes(dir); err != nil || p.Shim != (Process{5, 6}) {
		t.Errorf("%+v, %v", p, err)
	}
	for _, bad := range []string{"", "{", "{}", "[]", `{"version":1}`} {
		if err := os.WriteFile(filepath.Join(dir, exitFile), []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if e, err := ReadExit(dir); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q is taken as %+v, %v", bad, e, err)
		}
	}
}

// The figure of the package comment, with a VMM running and a console in use.
func TestResidentSet(t *testing.T) {
	dir := t.TempDir()
	cfg := vmm(t, "obey")
	s := launchVM(t, dir, cfg)
	eventually(t, "the console is in use", func() bool {
		data, _ := os.ReadFile(filepath.Join(dir, consoleFile))
		return len(data) > 0
	})
	checkResidentSet(t, s)
}

func checkResidentSet(t *testing.T, s Supervised) {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(s.Shim.PID) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(status), "VmRSS:")
	if !ok {
		t.Fatalf("no VmRSS in %s", status)
	}
	kib, err := strconv.Atoi(strings.Fields(rest)[0])
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the shim's resident set is %d KiB", kib)
	if kib > 4<<10 {
		t.Errorf("the shim's resident set is %d KiB, more than 4 MiB", kib)
	}
}

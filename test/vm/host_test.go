// Package vm tests banger as a user has it: the built programs, a real kernel, a real
// image, real guests under QEMU, all through the command line. `make build` comes
// first. Kernel and image are made once and kept in BANGER_TEST_CACHE.
package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/test/need"
)

// bootTimeout bounds whatever waits for a guest: under software emulation on a
// loaded machine a boot takes a minute.
const bootTimeout = 4 * time.Minute

// host is one instance of banger: a state directory with a daemon of its own.
type host struct {
	t   testing.TB
	dir string // of the test, below the cache so that images can be hard links
	env []string
	via []string // what stands before each command, to run it elsewhere
}

func binDir(t testing.TB) string {
	t.Helper()
	dir, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "bangerd")); err != nil {
		t.Fatalf("run make build first: %v", err)
	}
	return dir
}

func cacheDir(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("BANGER_TEST_CACHE")
	if dir == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(cache, "banger-test")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// golden is a state directory that has kernel and image; pulling again does nothing
// when what makes them has not changed.
func golden(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(cacheDir(t), "golden")
	h := &host{t: t, dir: dir, env: environment(t, dir)}
	// Two test processes must not pull side by side.
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	h.within(15*time.Minute, "kernel", "pull", "debian-cloud")
	h.within(15*time.Minute, "image", "pull", "debian-bookworm")
	h.ok("daemon", "stop")
	waitFor(t, 10*time.Second, "the daemon to go", func() bool {
		_, err := os.Stat(filepath.Join(dir, "bangerd.sock"))
		return err != nil
	})
	return dir
}

// newHost makes an instance with kernel and image, and removes all of it at the end.
func newHost(t testing.TB) *host {
	t.Helper()
	return newHostIn(t, stateDir(t), "-l")
}

// stateDir makes an empty state directory, in a directory of its own that goes at the end.
func stateDir(t testing.TB) string {
	t.Helper()
	need.Need(t, "qemu")
	root, err := os.MkdirTemp(cacheDir(t), "run-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	dir := filepath.Join(root, "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// newHostIn fills dir; how says to cp whether kernel and image are linked or copied.
func newHostIn(t testing.TB, dir, how string) *host {
	t.Helper()
	from := golden(t)
	for name, how := range map[string]string{"kernels": how, "images": how, "banger.db": "--sparse=auto"} { // the database is written to
		if out, err := exec.Command("cp", "-a", how, filepath.Join(from, name), dir).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
	}
	h := &host{t: t, dir: dir, env: environment(t, dir)}
	t.Cleanup(func() {
		if t.Failed() {
			h.dump()
		}
		for _, name := range strings.Fields(h.try("ps", "-q").stdout) {
			h.try("rm", "-f", name)
		}
		h.try("daemon", "stop")
		if left := processesBelow(dir); len(left) > 0 {
			t.Errorf("left behind: %v", left)
			for _, pid := range left {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	return h
}

func environment(t testing.TB, dir string) []string {
	return append(os.Environ(), "BANGER_STATE_DIR="+dir, "PATH="+binDir(t)+":"+os.Getenv("PATH"), "NO_COLOR=1")
}

// result is how one command ended.
type result struct {
	stdout, stderr string
	code           int
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
}

// try runs banger.
func (h *host) try(args ...string) result { return h.run(bootTimeout, "", nil, args...) }

// ok runs banger and fails the test when it fails; it returns stdout.
func (h *host) ok(args ...string) string {
	h.t.Helper()
	return h.within(bootTimeout, args...)
}

func (h *host) within(limit time.Duration, args ...string) string {
	h.t.Helper()
	r := h.run(limit, "", nil, args...)
	if r.code != 0 {
		h.t.Fatalf("banger %s: %s", strings.Join(args, " "), r)
	}
	return r.stdout
}

// in runs banger in a directory and with an input.
func (h *host) in(dir string, stdin io.Reader, args ...string) result {
	return h.run(bootTimeout, dir, stdin, args...)
}

func (h *host) run(limit time.Duration, dir string, stdin io.Reader, args ...string) result {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	argv := append(append(slices.Clone(h.via), filepath.Join(binDir(h.t), "banger")), args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Dir, cmd.Stdin = h.env, dir, stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := result{stdout: stdout.String(), stderr: stderr.String()}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		h.t.Fatalf("banger %s: %v", strings.Join(args, " "), err)
	}
	if ctx.Err() != nil {
		h.t.Fatalf("banger %s did not end within %s: %s", strings.Join(args, " "), limit, r)
	}
	return r
}

// vmJSON is what show prints, as far as the tests look at it.
type vmJSON struct {
	ID, Name, State, Ended, Problem string
	LastError                       string `json:"last_error"`
	Handles                         map[string]string
}

func (h *host) show(name string) vmJSON {
	h.t.Helper()
	var v vmJSON
	if err := json.Unmarshal([]byte(h.ok("show", "--format", "json", name)), &v); err != nil {
		h.t.Fatal(err)
	}
	return v
}

// daemonPID reads who holds the instance.
func (h *host) daemonPID() int {
	h.t.Helper()
	var status struct{ Pid int }
	if err := json.Unmarshal([]byte(h.ok("daemon", "status", "--format", "json")), &status); err != nil {
		h.t.Fatal(err)
	}
	return status.Pid
}

// killDaemon ends bangerd at once and waits until it is gone.
func (h *host) killDaemon(pid int) {
	h.t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		h.t.Fatalf("cannot kill the daemon: %v", err)
	}
	waitFor(h.t, 10*time.Second, "the daemon to die", func() bool { return syscall.Kill(pid, 0) != nil || isZombie(pid) })
}

func isZombie(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(data), ") Z ")
}

// processesBelow finds processes whose working directory or executable lies in dir:
// daemons, shims and VMMs of an instance.
func processesBelow(dir string) []int {
	var pids []int
	entries, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range entries {
		for _, link := range []string{"/cwd", "/exe"} {
			if target, err := os.Readlink(p + link); err == nil && strings.HasPrefix(target, dir) {
				var pid int
				fmt.Sscanf(filepath.Base(p), "%d", &pid)
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// waitFor polls for a condition.
func waitFor(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("waited %s in vain for %s", limit, what)
}

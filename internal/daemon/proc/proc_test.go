package proc

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/test/need"
)

// child starts a process that is reaped only by reap.
func child(t *testing.T) (id Identity, reap func()) {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	reap = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	t.Cleanup(reap)
	id, err := Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return id, reap
}

// alive tells whether Signal and Wait would find the process.
func alive(id Identity) bool {
	fd, err := id.open(kernel{})
	if err != nil {
		return false
	}
	unix.Close(fd)
	return true
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestLiving(t *testing.T) {
	id, _ := child(t)
	boot, err := HostBootID()
	if err != nil || len(boot) != 36 {
		t.Fatalf("boot id %q, %v", boot, err)
	}
	if id.BootID != boot || id.StartTime == 0 {
		t.Errorf("%+v", id)
	}
	data, err := json.Marshal(id)
	if err != nil {
		t.Fatal(err)
	}
	var back Identity
	if err := json.Unmarshal(data, &back); err != nil || back != id {
		t.Errorf("%s comes back as %+v, %v", data, back, err)
	}
	if !alive(back) {
		t.Error("not alive")
	}
	again, err := Identify(id.PID)
	if err != nil || again != id {
		t.Errorf("another time it is %+v, %v", again, err)
	}
}

func TestGone(t *testing.T) {
	id, reap := child(t)
	reap()
	if alive(id) {
		t.Error("alive")
	}
	if err := id.Signal(unix.SIGTERM); err != nil {
		t.Errorf("signal: %v", err)
	}
	if err := id.Wait(t.Context()); err != nil {
		t.Errorf("wait: %v", err)
	}
	for _, pid := range []int{id.PID, 0, -1, 1 << 30} {
		if got, err := Identify(pid); !errors.Is(err, unix.ESRCH) {
			t.Errorf("process %d is %+v, %v", pid, got, err)
		}
	}
	var none Identity
	if alive(none) || none.Signal(unix.SIGKILL) != nil || none.Wait(t.Context()) != nil {
		t.Error("the zero identity is somebody")
	}
}

func TestZombieIsNotAlive(t *testing.T) {
	id, _ := child(t)
	if err := id.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// Wait needs nobody to reap.
	if err := id.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(id.PID) + "/stat")
	if err != nil || !strings.Contains(string(stat), ") Z ") {
		t.Fatalf("no zombie: %s, %v", stat, err)
	}
	if alive(id) {
		t.Error("alive")
	}
	if err := id.Signal(unix.SIGTERM); err != nil {
		t.Errorf("signal: %v", err)
	}
	if got, err := Identify(id.PID); !errors.Is(err, unix.ESRCH) {
		t.Errorf("identified as %+v, %v", got, err)
	}
}

func TestThreadIsNoProcess(t *testing.T) {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil || tid == os.Getpid() {
			continue
		}
		if id, err := Identify(tid); !errors.Is(err, unix.ESRCH) {
			t.Errorf("thread %d is %+v, %v", tid, id, err)
		}
	}
}

// Somebody else has the pid: he is neither trusted nor signalled nor waited for.
func TestStranger(t *testing.T) {
	real, _ := child(t)
	other := func(change func(*Identity)) Identity {
		id := real
		change(&id)
		return id
	}
	for name, id := range map[string]Identity{
		"another start":  other(func(id *Identity) { id.StartTime++ }),
		"another boot":   other(func(id *Identity) { id.BootID = "00000000-0000-0000-0000-000000000000" }),
		"an unknown one": other(func(id *Identity) { id.BootID = "" }),
	} {
		if alive(id) {
			t.Errorf("%s: alive", name)
		}
		if err := id.Signal(unix.SIGKILL); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := id.Wait(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// SIGKILL does its work at once or not at all, but let it be seen.
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := real.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || !alive(real) {
		t.Errorf("a stranger was killed: %v", err)
	}
}

// The same with a pid that the kernel really gave away again.
func TestRecycledPID(t *testing.T) {
	need.Need(t, "root")
	const lastPID = "/proc/sys/kernel/ns_last_pid"
	for range 200 {
		id, reap := child(t)
		reap()
		if err := os.WriteFile(lastPID, []byte(strconv.Itoa(id.PID-1)), 0); err != nil {
			t.Skipf("cannot choose pids: %v", err)
		}
		next, reapNext := child(t)
		if next.PID != id.PID || next.StartTime == id.StartTime {
			reapNext()
			continue // somebody else was quicker, or it was within one clock tick
		}
		if alive(id) {
			t.Error("alive")
		}
		if err := id.Signal(unix.SIGKILL); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := next.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) || !alive(next) {
			t.Errorf("the stranger was killed: %v", err)
		}
		return
	}
	t.Fatal("no pid was given away twice")
}

// recycling is a kernel in which the pid goes to a stranger at the worst moment:
// between the first and the second thing that is asked.
type recycling struct {
	asked int
	start [2]uint64
	fds   [2]int
}

func (r *recycling) now() int { return min(r.asked, 1) }

func (r *recycling) open(int) (int, error) {
	defer func() { r.asked++ }()
	return unix.Dup(r.fds[r.now()])
}

func (r *recycling) startTime(int) (uint64, error) {
	defer func() { r.asked++ }()
	return r.start[r.now()], nil
}

// The comparison must come after the opening: in the other order the descriptor of
// the stranger would pass for the process that was compared.
func TestRecycledBetweenOpeningAndComparing(t *testing.T) {
	old, _ := child(t)
	stranger, _ := child(t)
	var fds [2]int
	for i, id := range []Identity{old, stranger} {
		fd, err := unix.PidfdOpen(id.PID, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		fds[i] = fd
	}
	old.StartTime, stranger.StartTime = 1, 2
	fd, err := old.open(&recycling{fds: fds, start: [2]uint64{1, 2}})
	if !errors.Is(err, unix.ESRCH) {
		t.Errorf("opened %d, %v", fd, err)
	}
}

func TestWait(t *testing.T) {
	id, _ := child(t)
	before := pidfds(t)
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan error, 2)
	go func() { results <- id.Wait(ctx) }()
	cancel()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	go func() { results <- id.Wait(t.Context()) }()
	go func() { results <- id.Wait(t.Context()) }()
	if err := id.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("Wait does not end")
		}
	}
	// No descriptor is left behind.
	eventually(t, "pidfds are closed", func() bool { return pidfds(t) == before })
}

func pidfds(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, e := range entries {
		if link, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.Contains(link, "pidfd") {
			n++
		}
	}
	return n
}

func TestParseStartTime(t *testing.T) {
	rest := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"
	for _, name := range []string{"sleep", "a b", ")", "(x) S 1 2", ""} {
		if got, err := parseStartTime("12 (" + name + ")" + rest); err != nil || got != 4711 {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "12 (x)", "12 x S 1", "12 (x) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 -1"} {
		if got, err := parseStartTime(bad); err == nil {
			t.Errorf("%q is understood as %d", bad, got)
		}
	}
}

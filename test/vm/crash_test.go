package vm

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestDaemonKilled kills the daemon at random moments of real operations: afterwards
// every command works, a VM that ran is the same process and the same boot of its
// guest, what was half made is gone, and no finished disk is lost.
func TestDaemonKilled(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "steady")
	h.ok("exec", "steady", "sh", "-c", "echo kept > kept")
	steady := h.show("steady").Handles
	h.ok("create", "--name", "finished", "--no-start")

	rng := rand.New(rand.NewPCG(4, 4))
	for round := range 20 {
		pid := h.daemonPID()
		name := "half" + strconv.Itoa(round)
		verbs := [][]string{
			{"create", "--name", name, "--ready", "agent"},
			{"start", "finished"},
			{"stop", "--timeout", "20s", "finished"},
			{"run", "-d", "--name", name, "--ready", "agent"},
		}
		verb := verbs[round%len(verbs)]
		done := make(chan result, 1)
		go func() { done <- h.try(verb...) }()
		time.Sleep(time.Duration(rng.IntN(3500)) * time.Millisecond) // the moment is what is random
		h.killDaemon(pid)
		<-done

		got := h.show("steady").Handles
		for _, key := range []string{"shim pid", "vmm pid", "guest boot id"} {
			if got[key] != steady[key] {
				t.Fatalf("round %d, %v: %s was %q, is %q", round, verb, key, steady[key], got[key])
			}
		}
		if out := h.ok("exec", "steady", "cat", "kept"); out != "kept\n" {
			t.Fatalf("round %d: %q", round, out)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "vms", h.show("finished").ID, "disk")); err != nil {
			t.Fatalf("round %d: the finished disk: %v", round, err)
		}
		// A VM is either whole or not there.
		for _, n := range strings.Fields(h.ok("ps", "-q")) {
			if v := h.show(n); v.State != "RUNNING" && v.State != "STOPPED" {
				t.Fatalf("round %d: %s is %s: %s", round, v.Name, v.State, v.LastError)
			}
		}
		h.try("rm", "-f", name)
	}
	h.ok("start", "finished")
	h.ok("rm", "-f", "finished", "steady")
	if entries, _ := os.ReadDir(filepath.Join(h.dir, "vms")); len(entries) != 0 {
		t.Errorf("left in vms/: %v", entries)
	}
}

// TestStreamKilled kills the daemon in the middle of a large stream, again and
// again, and reconnects at once or a little later: the next exec gets clean bytes.
func TestStreamKilled(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "dev")
	delays := []time.Duration{0, time.Millisecond, 20 * time.Millisecond, 500 * time.Millisecond}
	for round := range 50 {
		pid := h.daemonPID()
		ctx, cancel := context.WithTimeout(context.Background(), bootTimeout)
		cmd := exec.CommandContext(ctx, filepath.Join(binDir(t), "banger"), "exec", "dev", "sh", "-c", "head -c 100000000 /dev/zero | tr '\\0' '\\377'")
		cmd.Env = h.env
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, make([]byte, 256<<10)); err != nil {
			t.Fatalf("round %d: the stream did not begin: %v", round, err)
		}
		h.killDaemon(pid)
		time.Sleep(delays[round%len(delays)])
		want := "round " + strconv.Itoa(round)
		if r := h.in("", strings.NewReader(want), "exec", "-i", "dev", "cat"); r.code != 0 || r.stdout != want {
			t.Fatalf("round %d: %s", round, r)
		}
		io.Copy(io.Discard, out)
		if err := cmd.Wait(); err == nil {
			t.Fatalf("round %d: the broken exec ended well", round)
		}
		cancel()
	}
}

// TestProcessKilled: the state is true within a second, and start works.
func TestProcessKilled(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "dev")
	for _, who := range []string{"vmm pid", "shim pid"} {
		pid, err := strconv.Atoi(h.show("dev").Handles[who])
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		waitFor(t, 30*time.Second, "the state to be true", func() bool { return h.show("dev").State == "STOPPED" })
		t.Logf("%s killed: seen after %s", who, time.Since(begun).Round(time.Millisecond))
		h.ok("start", "dev")
		if out := h.ok("exec", "dev", "echo", "again"); out != "again\n" {
			t.Fatalf("after the %s: %q", who, out)
		}
	}
}

// TestIdle measures what a settled guest costs, with the daemon and without.
func TestIdle(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "dev")
	v := h.show("dev")
	vmm, shim := atoi(t, v.Handles["vmm pid"]), atoi(t, v.Handles["shim pid"])
	daemon := h.daemonPID()
	// Settled: less than 5 % of a core over 3 s.
	waitFor(t, bootTimeout, "the guest to settle", func() bool {
		before := cpu(t, vmm)
		time.Sleep(3 * time.Second)
		return cpu(t, vmm)-before < 150*time.Millisecond
	})
	const span = 30 * time.Second
	measure := func() float64 {
		before, begun := cpu(t, vmm), time.Now()
		time.Sleep(span)
		return 100 * float64(cpu(t, vmm)-before) / float64(time.Since(begun))
	}
	with := measure()
	t.Logf("resident: bangerd %d KiB, shim %d KiB", rss(t, daemon), rss(t, shim))
	if kib := rss(t, shim); kib > 4<<10 {
		t.Errorf("the shim has %d KiB, more than 4 MiB", kib)
	}
	if kib := rss(t, daemon); kib > 60<<10 {
		t.Errorf("bangerd has %d KiB, more than 60 MiB", kib)
	}
	h.killDaemon(daemon)
	without := measure()
	t.Logf("idle: %.2f %% of a core with the daemon, %.2f %% without", with, without)
	// The target is 2 %; a guest that spins takes 100.
	for _, percent := range []float64{with, without} {
		if percent > 10 {
			t.Errorf("an idle guest takes %.1f %% of a core", percent)
		}
	}
}

func atoi(t testing.TB, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// cpu is user and system time of a process, from proc(5); a tick is 10 ms.
func cpu(t testing.TB, pid int) time.Duration {
	t.Helper()
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+2:]))
	return time.Duration(atoi(t, fields[11])+atoi(t, fields[12])) * 10 * time.Millisecond
}

func rss(t testing.TB, pid int) int {
	t.Helper()
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "VmRSS:")
	return atoi(t, strings.Fields(rest)[0])
}

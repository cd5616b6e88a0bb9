package vm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
)

// TestDaemonKilled kills the daemon at random moments of real operations: afterwards
// every command works, a VM that ran is the same process and the same boot of its
// guest, what was half made is gone, and no finished disk is lost.
func TestDaemonKilled(t *testing.T) {
	h := newHost(t)
	repo := newRepo(t, h)
	h.ok("create", "--name", "steady")
	h.ok("exec", "steady", "sh", "-c", "echo kept > kept")
	steady := h.show("steady").Handles
	h.ok("create", "--name", "finished", "--no-start")
	finished := h.show("finished").ID

	rng := rand.New(rand.NewPCG(4, 4))
	for round := range 24 {
		pid := h.daemonPID()
		name := "half" + strconv.Itoa(round)
		verbs := []struct {
			longest     int // ms, what it takes about
			prepare, do []string
			pull        func(ctx context.Context) error
		}{
			{longest: 3500, do: []string{"create", "--name", name, "--ready", "agent"}},
			{longest: 3500, do: []string{"start", "finished"}},
			{longest: 3500, prepare: []string{"start", "finished"}, do: []string{"stop", "--timeout", "20s", "finished"}},
			{longest: 3500, do: []string{"run", "-d", "--name", name, "--ready", "agent"}},
			{longest: 8000, do: []string{"up", "-d", "--name", name, "--ready", "agent"}},
			{longest: 80, prepare: []string{"create", "--name", name, "--ready", "agent"}, do: []string{"rm", "-f", name}},
			{longest: 3500, do: []string{"image pull by the API"}, pull: h.pullImage},
			{longest: 3500, do: []string{"kernel pull by the API"}, pull: h.pullKernel},
		}
		verb := verbs[round%len(verbs)]
		if verb.prepare != nil {
			h.ok(verb.prepare...)
		}
		done := make(chan result, 1)
		go func() {
			if verb.pull == nil {
				done <- h.in(repo, nil, verb.do...)
			} else if err := verb.pull(t.Context()); err != nil {
				done <- result{stderr: err.Error(), code: -1}
			} else {
				done <- result{}
			}
		}()
		time.Sleep(time.Duration(rng.IntN(verb.longest)) * time.Millisecond) // the moment is what is random
		h.killDaemon(pid)
		r := <-done
		t.Logf("round %d, %s: exit %d %q", round, strings.Join(verb.do, " "), r.code, r.stderr)
		if verb.pull != nil && r.code != 0 && !strings.HasPrefix(r.stderr, connect.CodeUnavailable.String()) { // the daemon was gone
			t.Errorf("round %d: the pull did not begin: %s", round, r.stderr)
		}

		h.wantSteady(round, steady)
		h.wantWhole(round)
		if _, err := os.Stat(filepath.Join(h.dir, "vms", finished, "disk")); err != nil {
			t.Fatalf("round %d: the finished disk: %v", round, err)
		}
		if verb.do[0] == "up" { // the next one goes on from wherever it was
			if r := h.in(repo, nil, "up", "-q", "--", "sh", "./greet.sh"); r.code != 0 || r.stdout != "hello from the working tree\n" {
				t.Fatalf("round %d: the next up: %s", round, r)
			}
			r := h.in(repo, nil, "up", "-d", "-q")
			h.ok("rm", "-f", strings.TrimSpace(r.stdout))
		}
		h.try("rm", "-f", name)
	}
	h.ok("start", "finished")
	h.ok("rm", "-f", "finished", "steady")
	h.wantNothing()
}

// pullImage begins to make the image anew, for which the command line has no word.
func (h *host) pullImage(ctx context.Context) error {
	_, err := bangerv1connect.NewImagesClient(h.http(), "http://banger").Pull(ctx, &bangerv1.PullImageRequest{Force: true})
	return err
}

func (h *host) pullKernel(ctx context.Context) error {
	_, err := bangerv1connect.NewKernelsClient(h.http(), "http://banger").Pull(ctx, &bangerv1.PullKernelRequest{Force: true})
	return err
}

func (h *host) http() *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(h.dir, "bangerd.sock"))
		},
	}}
}

// wantSteady holds that the VM "steady" is the same processes and the same boot.
func (h *host) wantSteady(round int, before map[string]string) {
	h.t.Helper()
	now := h.show("steady").Handles
	for _, key := range []string{"shim pid", "vmm pid", "guest boot id"} {
		if now[key] != before[key] {
			h.t.Fatalf("round %d: %s was %q, is %q", round, key, before[key], now[key])
		}
	}
	if out := h.ok("exec", "steady", "cat", "kept"); out != "kept\n" {
		h.t.Fatalf("round %d: %q", round, out)
	}
}

// wantWhole holds that a VM is either whole or not there, and that what does not run
// holds nothing: no run directory, no socket, no lock or other file that a process has.
func (h *host) wantWhole(round int) {
	h.t.Helper()
	known := make(map[string]vmJSON)
	for _, name := range strings.Fields(h.ok("ps", "-q")) {
		v := h.show(name)
		known[v.ID] = v
		if v.State != "RUNNING" && v.State != "STOPPED" {
			h.t.Fatalf("round %d: %s is %s: %s", round, v.Name, v.State, v.LastError)
		}
		if _, err := os.Stat(filepath.Join(h.dir, "vms", v.ID, "disk")); err != nil {
			h.t.Fatalf("round %d: the disk of %s, which is %s: %v", round, v.Name, v.State, err)
		}
	}
	entries, err := os.ReadDir(filepath.Join(h.dir, "vms"))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, e := range entries {
		dir := filepath.Join(h.dir, "vms", e.Name())
		if v, ok := known[e.Name()]; !ok {
			h.t.Fatalf("round %d: %s belongs to no VM", round, dir)
		} else if v.State == "RUNNING" {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, "run")); !os.IsNotExist(err) {
			h.t.Fatalf("round %d: a run directory in %s: %v", round, dir, err)
		}
		h.wantLetGo(dir)
	}
	// What a pull had begun is swept in the background.
	waitFor(h.t, time.Minute, "the cache to be empty", func() bool {
		left, err := filepath.Glob(filepath.Join(h.dir, "cache", "build-*"))
		return err == nil && len(left) == 0
	})
}

// wantNothing holds that nothing is left when all VMs are removed and the daemon has gone.
func (h *host) wantNothing() {
	h.t.Helper()
	pid := h.daemonPID()
	h.ok("daemon", "stop")
	waitFor(h.t, time.Minute, "the daemon to go", func() bool { return syscall.Kill(pid, 0) != nil || isZombie(pid) })
	h.wantLetGo(h.dir)
	for _, name := range []string{"vms", "lost"} {
		if entries, err := os.ReadDir(filepath.Join(h.dir, name)); err != nil || len(entries) > 0 {
			h.t.Errorf("left in %s/: %v, %v", name, entries, err)
		}
	}
	if mounts := read(h.t, "/proc/self/mountinfo"); strings.Contains(mounts, h.dir) {
		h.t.Errorf("mounts left:\n%s", mounts)
	}
}

// wantLetGo holds that there is no socket below dir, and no process that has to do with it.
// A killed one lets go of its lock first and of its working directory last.
func (h *host) wantLetGo(dir string) {
	h.t.Helper()
	var left []string
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if left = append(socketsBelow(h.t, dir), holdersBelow(dir)...); len(left) == 0 {
			return
		}
	}
	h.t.Errorf("left below %s: %q", dir, left)
}

// socketsBelow finds the sockets in the file system below dir.
func socketsBelow(t testing.TB, dir string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type() == fs.ModeSocket {
			found = append(found, path)
		}
		if errors.Is(err, fs.ErrNotExist) { // gone meanwhile
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// holdersBelow finds the processes that have a file below dir open, as whoever holds a lock
// has, and those that work there.
func holdersBelow(dir string) []string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, dir+"/") {
			found = append(found, link+" -> "+target)
		}
	}
	for _, pid := range processesBelow(dir) {
		found = append(found, "process "+strconv.Itoa(pid))
	}
	return found
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

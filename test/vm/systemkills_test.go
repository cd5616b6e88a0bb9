package vm

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/shim"
)

// soak says that a test may take an hour: make soak.
func soak() bool { return os.Getenv("BANGER_TEST_SOAK") != "" }

// TestSystemKills kills the daemon by SIGKILL at the steps of start and of stop and starts
// the next one at once: the VM is stopped and holds nothing, or runs, as its record says;
// start works, and the guest has what it had synced. make soak takes each step of each row.
func TestSystemKills(t *testing.T) {
	h := newSystem(t)
	neverTwo(t)
	h.replaceDaemon("log")
	h.makeBare("dev", "512M")

	var starts, stops []string
	for _, p := range h.points() {
		if row, ok := strings.CutPrefix(p, "create/"); ok && strings.Contains(row, "/acquire/") && !isDisk(row) {
			starts = append(starts, "start/"+row)
		} else if strings.HasPrefix(p, "stop/") {
			stops = append(stops, p)
		}
	}
	if len(starts) != 21 || len(stops) != 14 {
		t.Fatalf("start goes through %d steps and stop through %d:\n%s", len(starts), len(stops), strings.Join(h.points(), "\n"))
	}
	if !soak() {
		effect := func(p string) bool { return !strings.HasSuffix(p, "/effect") && !strings.Contains(p, "/process/") }
		starts, stops = slices.DeleteFunc(starts, effect), slices.DeleteFunc(stops, effect)
	}

	written := ""
	write := func(what string) {
		written += what + "\n"
		h.ok("exec", "dev", "sh", "-c", "echo '"+what+"' >> /root/file && sync")
	}
	h.replaceDaemon("log")
	h.start("dev")
	write("begun")
	for k := range max(len(starts), len(stops)) {
		begun := time.Now()
		stop, start := stops[k%len(stops)], starts[k%len(starts)]
		h.dieAt(stop, "stop", "dev")
		pid := h.startOrdered("kill " + start)
		if h.settled("dev", stop) == "RUNNING" {
			h.ok("stop", "dev")
		}
		h.wantDead(pid, start, "start", "dev")
		h.startOrdered("log")
		h.settled("dev", start)
		h.start("dev")
		if out := h.ok("exec", "dev", "cat", "/root/file"); out != written {
			t.Fatalf("after %s and %s the disk has %q, want %q", stop, start, out, written)
		}
		write(stop + " " + start)
		t.Logf("killed at %s, %s: %s", stop, start, time.Since(begun).Round(time.Second))
	}
}

// makeBare makes a VM whose guest has no init of its own, and so boots in the time that
// banger's takes. It is stopped.
func (h *host) makeBare(name, memory string) {
	h.t.Helper()
	h.ok("create", "--name", name, "--memory", memory, "--cpus", "1", "--disk", "2G", "--ready", "agent")
	h.ok("exec", "-u", "root", name, "sh", "-c", "ln -sf /bin/true /usr/sbin/init && sync")
	h.ok("stop", "--timeout", "0s", name) // its systemd has hardly begun
}

// isDisk tells the rows that a VM holds from create to delete.
func isDisk(row string) bool {
	row, _, _ = strings.Cut(row, "/")
	return row == "directory" || row == "disk" || row == "record"
}

// dieAt puts a daemon that dies at point in the place of the one that serves, and runs what
// gets it there.
func (h *host) dieAt(point string, args ...string) {
	h.t.Helper()
	h.wantDead(h.replaceDaemon("kill "+point), point, args...)
}

func (h *host) wantDead(pid int, point string, args ...string) {
	h.t.Helper()
	r := h.try(args...)
	waitFor(h.t, 10*time.Second, "the daemon to die at "+point, func() bool { return isZombie(pid) })
	if r.code == 0 {
		h.t.Fatalf("banger %s went well without a daemon", strings.Join(args, " "))
	}
}

// settled holds that the VM is as its record says, for a daemon that has just started, and
// returns its state.
func (h *host) settled(name, after string) string {
	h.t.Helper()
	v := h.show(name)
	switch v.State {
	case "STOPPED":
		h.wantFree("after " + after)
	case "RUNNING":
		if v.Problem != "" || len(vmms()) != 1 {
			h.t.Fatalf("after %s: %+v, VMMs %v", after, v, vmms())
		}
		h.ok("exec", name, "true")
	default:
		h.t.Fatalf("after %s: %+v", after, v)
	}
	return v.State
}

// TestSystemProcessKilled kills the shim and the VMM, of a guest that has touched 3 GiB:
// while it runs, while it starts and while it stops.
func TestSystemProcessKilled(t *testing.T) {
	h := newSystem(t)
	neverTwo(t)
	h.makeBare("dev", "3584M")
	h.start("dev")
	h.ok("exec", "dev", "sh", "-c", "echo kept > /root/file && sync")
	kept := func(when string) {
		t.Helper()
		if out := h.ok("exec", "dev", "cat", "/root/file"); out != "kept\n" {
			t.Fatalf("after %s: %q", when, out)
		}
	}
	for _, who := range []string{"vmm", "shim"} {
		h.ok("exec", "-u", "root", "dev", "sh", "-c", "mount -o remount,size=90% /dev/shm && dd if=/dev/zero of=/dev/shm/x bs=1M count=3072")
		pid := atoi(t, h.show("dev").Handles[who+" pid"])
		if kib := rss(t, atoi(t, h.show("dev").Handles["vmm pid"])); kib < 3<<20 {
			t.Fatalf("the VMM has touched %d KiB", kib)
		}
		begun := time.Now()
		kill(t, pid)
		h.start("dev") // at once
		t.Logf("%s killed: runs again after %s", who, time.Since(begun).Round(time.Millisecond))
		kept(who + " killed")
	}
	for _, who := range []string{"vmm", "shim"} {
		kill(t, atoi(t, h.show("dev").Handles[who+" pid"]))
		begun := time.Now()
		waitFor(t, 30*time.Second, "the state to be true", func() bool { return h.show("dev").State == "STOPPED" })
		t.Logf("%s killed: seen after %s, as %q", who, time.Since(begun).Round(time.Millisecond), h.show("dev").Ended)
		h.wantFree(who + " killed")
		h.start("dev")

		// While it stops: by force, so that there is one to kill.
		h.paused("stop/agent/release/before", func() { kill(t, h.processOf("dev", who)) }, "stop", "--timeout", "0s", "dev")
		if v := h.show("dev"); v.State != "STOPPED" {
			t.Fatalf("stopped, with the %s killed: %+v", who, v)
		}
		h.wantFree("stopped, with the " + who + " killed")

		for _, row := range []string{"process", "agent"} {
			when := map[string]string{"process": "record", "agent": "before"}[row]
			r := h.paused("start/"+row+"/acquire/"+when, func() { kill(t, h.processOf("dev", who)) }, "start", "dev")
			if r.code == 0 {
				t.Errorf("start went well, with the %s killed", who)
			}
			t.Logf("start, with the %s killed: %s", who, r.stderr)
			if v := h.show("dev"); v.State != "STOPPED" || v.LastError == "" {
				t.Errorf("start, with the %s killed: %+v", who, v)
			}
			h.wantFree("start, with the " + who + " killed")
		}
		h.start("dev")
		kept("the " + who + " killed while it stops and starts")
	}
}

func kill(t testing.TB, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// paused runs banger with a daemon that stands still at point while do is done.
func (h *host) paused(point string, do func(), args ...string) result {
	h.t.Helper()
	os.Remove(goFile(h.dir))
	os.Remove(pointsFile(h.dir))
	h.replaceDaemon("pause " + point)
	done := make(chan result, 1)
	go func() { done <- h.try(args...) }()
	waitFor(h.t, time.Minute, "the daemon to stand at "+point, func() bool {
		data, err := os.ReadFile(pointsFile(h.dir))
		return err == nil && slices.Contains(strings.Split(string(data), "\n"), point)
	})
	do()
	write(h.t, goFile(h.dir), "")
	return <-done
}

// processOf finds the shim or the VMM of a VM in its run directory.
func (h *host) processOf(name, who string) int {
	h.t.Helper()
	found, err := shim.Processes(filepath.Join(h.dir, "vms", h.show(name).ID))
	if err != nil {
		h.t.Fatal(err)
	}
	pid := map[string]int{"shim": found.Shim.PID, "vmm": found.VMM.PID}[who]
	if pid == 0 {
		h.t.Fatalf("there is no %s: %+v", who, found)
	}
	return pid
}

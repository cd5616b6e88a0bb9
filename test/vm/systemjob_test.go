package vm

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What banger is for, with a guest in Firecracker: all as with QEMU.
func TestSystemJob(t *testing.T) { testJob(t, newSystem(t)) }

// A guest that does not go down when it is asked is ended by force, in the time that the
// user gave it, and what it had synced is there. One whose agent hangs goes down by the
// power button.
func TestSystemStubborn(t *testing.T) {
	h := newSystem(t)
	h.ok("create", "--name", "dev", "--memory", "512M", "--cpus", "1", "--disk", "2G")
	sync := func(what string) {
		t.Helper()
		h.ok("exec", "-u", "root", "dev", "sh", "-c", what+" && echo "+strings.Fields(what)[0]+" > /root/file && sync")
	}
	kept := func(what string) {
		t.Helper()
		if out := h.ok("exec", "-u", "root", "dev", "cat", "/root/file"); out != what+"\n" {
			t.Errorf("the disk has %q, want %q", out, what)
		}
	}
	sync("systemctl mask --now --runtime poweroff.target")
	begun := time.Now()
	h.ok("stop", "--timeout", "5s", "dev")
	t.Logf("a guest that ignores the shutdown, stopped within 5 s: took %s", time.Since(begun).Round(time.Millisecond))
	if v := h.show("dev"); v.State != "STOPPED" || v.Ended != "ended by signal KILL" {
		t.Errorf("%+v", v)
	}
	h.wantFree("ended by force")

	h.start("dev")
	kept("systemctl")
	// A systemd that still starts takes the keys as one thing more to do.
	h.ok("exec", "-u", "root", "dev", "systemctl", "is-system-running", "--wait")
	sync("date")
	// The agent is what has started the command. It must still answer it.
	h.ok("exec", "-u", "root", "dev", "sh", "-c", "(sleep 1; kill -STOP $PPID) >/dev/null 2>&1 </dev/null &")
	waitFor(t, time.Minute, "the agent to be silent", func() bool {
		hello := exec.Command("timeout", "5", filepath.Join(binDir(t), "banger"), "exec", "dev", "true")
		hello.Env = h.env
		err := hello.Run()
		return err != nil
	})
	begun = time.Now()
	h.ok("stop", "dev")
	t.Logf("a guest whose agent hangs: stopped after %s", time.Since(begun).Round(time.Millisecond))
	if v := h.show("dev"); v.State != "STOPPED" || v.Ended != "the guest powered off" {
		t.Errorf("%+v", v)
	}
	h.start("dev")
	kept("date")
}

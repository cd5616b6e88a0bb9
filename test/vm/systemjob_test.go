package vm

import (
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

	h.ok("start", "dev")
	kept("systemctl")
	// A systemd that still starts takes the keys as one thing more to do.
	h.ok("exec", "-u", "root", "dev", "systemctl", "is-system-running", "--wait")
	sync("pkill -STOP -o -x banger-guest")
	h.ok("stop", "dev")
	if v := h.show("dev"); v.State != "STOPPED" || v.Ended != "the guest powered off" {
		t.Errorf("%+v", v)
	}
	h.ok("start", "dev")
	kept("pkill")
}

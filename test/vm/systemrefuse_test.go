package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What cannot be is refused in words, with one hint, and before anything is made.
func TestSystemRefuses(t *testing.T) {
	h := newSystem(t)
	const noNetwork = "VMs have no network here: those in firecracker have none"
	for _, c := range []struct {
		args       []string
		code       int
		says, hint string
	}{
		{[]string{"-p", "8080:80"}, 5, noNetwork, "banger doctor"},
		{[]string{"--network", "internet"}, 5, noNetwork, "banger doctor"},
		{[]string{"--allow", "example.org"}, 5, noNetwork, "banger doctor"},
		{[]string{"--deny", "lan"}, 5, noNetwork, "banger doctor"},
		{[]string{"--cpus", "33"}, 2, "33 cpus are more than the 32 that firecracker takes", "banger create --cpus 2"},
		{[]string{"--memory", "1T"}, 2, "of memory are more than the host's", ""},
	} {
		r := h.try(append([]string{"create", "--name", "dev", "--disk", "2G"}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.stderr, c.says) || strings.Count(r.stderr, "\nhint: ") != 1 || !strings.Contains(r.stderr, "\nhint: "+c.hint) {
			t.Errorf("create %v, which should end with %d, %q and the hint %q: %s", c.args, c.code, c.says, c.hint, r)
		}
	}
	if out := h.ok("ps", "-q"); out != "" {
		t.Errorf("refused, and there: %q", out)
	}
	if left := h.leaks(); left != "" {
		t.Errorf("refused, and left:\n%s", left)
	}

	h.ok("create", "--name", "dev", "--memory", "512M", "--cpus", "1", "--disk", "2G", "--no-start")
	for _, args := range [][]string{{"--allow", "example.org"}, {"-p", "8080:80"}} {
		r := h.try(append([]string{"set", "dev"}, args...)...)
		if r.code == 0 || !strings.Contains(r.stderr, noNetwork) || strings.Count(r.stderr, "\nhint: ") != 1 {
			t.Errorf("set %v: %s", args, r)
		}
	}
	for _, c := range []struct {
		name, state string
		spoil       func(t *testing.T) (mend func())
		says        string
	}{
		{"changed image", "STOPPED", h.changeImage, "has changed: it was modified at "},
		{"device in use", "FAILED", h.takeDevice, " is still in use: device or resource busy"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mend := c.spoil(t)
			begun := time.Now()
			r := h.try("start", "dev")
			t.Logf("after %s: %s", time.Since(begun).Round(time.Millisecond), r.stderr)
			if r.code == 0 || !strings.Contains(r.stderr, c.says) {
				t.Errorf("start: %s", r)
			}
			if v := h.show("dev"); v.State != c.state || !strings.Contains(v.LastError, c.says) {
				t.Errorf("%+v", v)
			}
			mend()
			if c.state == "FAILED" {
				if !strings.HasSuffix(r.stderr, "\nhint: banger stop dev\n") {
					t.Errorf("start gives no hint: %s", r.stderr)
				}
				h.ok("stop", "dev")
			}
			h.wantFree("mended, before a start")
			h.start("dev")
			h.ok("stop", "dev")
		})
	}
	// A device that a crash has left, with nothing that holds it, is in nobody's way.
	h.leaveDevice("dev")
	h.start("dev")
	h.ok("exec", "dev", "true")
	h.ok("stop", "dev")
	h.leaveDevice("dev")
	h.killDaemon(h.daemonPID())
	h.startSystem()
	h.wantFree("the next daemon has opened, and")
}

// changeImage writes to the file that the VM's disk is a snapshot of.
func (h *host) changeImage(t *testing.T) (mend func()) {
	found, err := filepath.Glob(filepath.Join(h.dir, "images", "*", "rootfs*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("the image: %v, %v", found, err)
	}
	info, err := os.Stat(found[0])
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	if err := os.Chtimes(found[0], now, now); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Chtimes(found[0], now, info.ModTime()); err != nil {
			t.Fatal(err)
		}
	}
}

// deviceOf is the name that the device of a VM's disk has on the host.
func (h *host) deviceOf(name string) string {
	return "banger-" + strings.TrimSpace(read(h.t, filepath.Join(h.dir, "instance"))) + "-" + h.show(name).ID
}

// leaveDevice makes a device of the name that a VM's has.
func (h *host) leaveDevice(name string) {
	h.t.Helper()
	c := exec.Command("dmsetup", "create", h.deviceOf(name))
	c.Stdin = strings.NewReader("0 8 zero\n")
	if out, err := c.CombinedOutput(); err != nil {
		h.t.Fatalf("dmsetup create: %v\n%s", err, out)
	}
}

// takeDevice is such a device that somebody has open.
func (h *host) takeDevice(t *testing.T) (mend func()) {
	h.leaveDevice("dev")
	out, err := exec.Command("dmsetup", "info", "-c", "--noheadings", "-o", "blkdevname", h.deviceOf("dev")).Output()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open("/dev/" + strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		f.Close()
		if out, err := exec.Command("dmsetup", "remove", "--retry", h.deviceOf("dev")).CombinedOutput(); err != nil {
			t.Fatal(fmt.Errorf("dmsetup remove: %w\n%s", err, out))
		}
	}
}

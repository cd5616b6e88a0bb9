package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"banger/test/need"
)

// TestSystemReboot takes the host away from under running VMs, by a reboot or by a power
// cut: afterwards they are stopped, start, and have what the guest had synced.
func TestSystemReboot(t *testing.T) {
	need.Need(t, "reboot")
	dir := filepath.Join(os.TempDir(), "banger-test-reboot", "state")
	names := []string{"dev", "shop"}
	switch os.Getenv("BANGER_TEST_BOOT") {
	case "1":
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		h := newSystemIn(t, dir, "-l")
		// Kernel and image are as if they were pulled long ago.
		if out, err := exec.Command("sync").CombinedOutput(); err != nil {
			t.Fatalf("sync: %v\n%s", err, out)
		}
		for _, name := range names {
			h.makeBare(name, "512M")
			h.start(name)
			h.ok("exec", name, "sh", "-c", "echo first > /root/file && sync")
		}
		h.ok("stop", "shop")
		h.ok("start", "shop")
		for _, name := range names {
			h.ok("exec", name, "sh", "-c", "echo second >> /root/file && sync /root/file && echo lost > /root/lost")
		}
	case "2":
		h := &host{t: t, dir: dir, env: environment(t, dir)}
		h.startSystem()
		t.Cleanup(h.endSystem)
		for _, name := range names {
			if v := h.show(name); v.State != "STOPPED" || v.Problem != "" {
				t.Errorf("after the reboot: %+v", v)
			} else {
				t.Logf("%s ended like this: %q, %q", name, v.Ended, v.LastError)
			}
		}
		h.wantFree("after the reboot")
		for _, name := range names {
			h.start(name)
			if out := h.ok("exec", name, "cat", "/root/file"); out != "first\nsecond\n" {
				t.Errorf("%s has %q", name, out)
			}
		}
	default:
		t.Fatalf("boot %q", os.Getenv("BANGER_TEST_BOOT"))
	}
}

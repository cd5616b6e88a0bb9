package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"banger/test/need"
)

// newSystem makes an instance of the system's daemon in the test host, with kernel and
// image, and starts it. At the end nothing of it may be left on the host.
func newSystem(t testing.TB) *host {
	t.Helper()
	need.Need(t, "testhost")
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	h := newSystemIn(t, dir, "-l")
	t.Cleanup(h.endSystem)
	return h
}

// newSystemIn makes an instance in dir; how says to cp whether kernel and image are linked
// or copied.
func newSystemIn(t testing.TB, dir, how string) *host {
	t.Helper()
	from := localGolden(t)
	for name, how := range map[string]string{"kernels": how, "images": how, "banger.db": "--sparse=auto"} { // the database is written to
		copyTree(t, filepath.Join(from, name), dir, how)
	}
	if err := os.WriteFile(filepath.Join(dir, "system"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, dir: dir, env: environment(t, dir)}
	h.startSystem()
	return h
}

// endSystem removes all VMs, ends the daemon and holds that nothing is left.
func (h *host) endSystem() {
	if h.t.Failed() {
		h.dump()
	}
	if h.try("daemon", "status").code != 0 { // a test that failed has killed it
		h.startSystem()
	}
	for _, name := range strings.Fields(h.try("ps", "-q").stdout) {
		h.try("rm", "-f", name)
	}
	h.endDaemon()
	h.wantFree("at the end")
	if left := h.leaks(); left != "" {
		h.t.Errorf("left on the host:\n%s", left)
	}
}

// localGolden is golden on the test host's own disk, where links to it can be made. Its
// cache is slow, and on another file system.
func localGolden(t testing.TB) string {
	t.Helper()
	dir := filepath.Join(os.TempDir(), "banger-test-golden")
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	tmp, err := os.MkdirTemp(os.TempDir(), "banger-test-golden-")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kernels", "images", "banger.db"} {
		copyTree(t, filepath.Join(cacheDir(t), "golden", name), tmp, "--sparse=auto")
	}
	if err := os.Rename(tmp, dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

func copyTree(t testing.TB, from, to, how string) {
	t.Helper()
	if out, err := exec.Command("cp", "-a", how, from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
}

// A VM of the system's daemon lives as one of a user's does, in Firecracker.
func TestSystemLife(t *testing.T) {
	h := newSystem(t)
	h.ok("create", "--name", "shop", "--memory", "512M", "--cpus", "1", "--disk", "2G", "--no-start")
	h.ok("start", "shop")
	if v := h.show("shop"); v.State != "RUNNING" {
		t.Fatalf("%+v", v)
	}
	if out := h.ok("exec", "shop", "sh", "-c", "echo kept > /root/file; sync; uname -s"); out != "Linux\n" {
		t.Errorf("exec says %q", out)
	}
	h.ok("stop", "shop")
	h.ok("start", "shop")
	if out := h.ok("exec", "shop", "cat", "/root/file"); out != "kept\n" {
		t.Errorf("the disk has %q", out)
	}
	h.ok("rm", "-f", "shop")
	if left := h.leaks(); left != "" {
		t.Errorf("left on the host:\n%s", left)
	}
}

package vm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/test/need"
)

// newSystem makes an instance of the system's daemon in the test host, with kernel and
// image, and starts it. At the end nothing of it may be left on the host.
func newSystem(t testing.TB) *host {
	t.Helper()
	need.Need(t, "testhost")
	dir := filepath.Join(t.TempDir(), "state")
	from := filepath.Join(cacheDir(t), "golden")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"kernels", "images", "banger.db"} {
		if out, err := exec.Command("cp", "-a", "--sparse=auto", filepath.Join(from, name), dir).CombinedOutput(); err != nil {
			t.Fatalf("cp: %v\n%s", err, out)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "system"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h := &host{t: t, dir: dir, env: environment(t, dir)}
	h.startSystem()
	t.Cleanup(func() {
		if t.Failed() {
			h.dump()
		}
		for _, name := range strings.Fields(h.try("ps", "-q").stdout) {
			h.try("rm", "-f", name)
		}
		pid := h.daemonPID()
		syscall.Kill(pid, syscall.SIGTERM)
		waitFor(t, 30*time.Second, "the daemon to end", func() bool { return isZombie(pid) })
		if left := h.leaks(); left != "" {
			t.Errorf("left on the host:\n%s", left)
		}
	})
	return h
}

// startSystem starts bangerd --system and waits until it serves.
func (h *host) startSystem() {
	h.t.Helper()
	log, err := os.OpenFile(filepath.Join(filepath.Dir(h.dir), "bangerd.out"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer log.Close()
	c := exec.Command(filepath.Join(binDir(h.t), "bangerd"), "--system")
	c.Env, c.Stdout, c.Stderr = h.env, log, log
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.Start(); err != nil {
		h.t.Fatal(err)
	}
	go c.Wait()
	waitFor(h.t, time.Minute, "the system's daemon to serve", func() bool {
		if isZombie(c.Process.Pid) {
			text, _ := os.ReadFile(log.Name())
			h.t.Fatalf("bangerd --system ended: %s", text)
		}
		return h.try("daemon", "status").code == 0
	})
}

// leaks lists what of the instance is on the host, one thing a line.
func (h *host) leaks() string {
	id, err := os.ReadFile(filepath.Join(h.dir, "instance"))
	if err != nil {
		return err.Error()
	}
	instance := strings.TrimSpace(string(id))
	var left []string
	for _, argv := range [][]string{{"dmsetup", "ls"}, {"losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"}} {
		out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
		if err != nil {
			left = append(left, fmt.Sprintf("%v: %v: %s", argv, err, out))
		}
		for line := range strings.Lines(string(out)) {
			if strings.Contains(line, instance) || strings.Contains(line, h.dir) {
				left = append(left, argv[0]+": "+strings.TrimSpace(line))
			}
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/*/*" + instance + "*", "/sys/fs/cgroup/*" + instance + "*", h.dir + "/vms/*", "/dev/mapper/*" + instance + "*"} {
		found, _ := filepath.Glob(pattern)
		left = append(left, found...)
	}
	for _, pid := range processesBelow(h.dir) {
		left = append(left, fmt.Sprint("process ", pid))
	}
	return strings.Join(left, "\n")
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

package daemon

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	bangerv1 "banger/api/banger/v1"
	"banger/test/need"
)

// TestDiskFull: on a file system without a free byte nothing can be created or
// started, and says why; a VM that runs goes on, stop and rm work, also after the
// daemon was killed, and what they free can be used again.
func TestDiskFull(t *testing.T) {
	need.Need(t, "root")
	w := newWorld(t)
	mount := filepath.Dir(w.state) + "/full"
	if err := os.Mkdir(mount, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("banger-test", mount, "tmpfs", 0, "size=48m,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(mount, syscall.MNT_DETACH); err != nil {
			t.Errorf("umount: %v", err)
		}
	})
	w.state = filepath.Join(mount, "state")

	d := w.start(t, "", 0)
	t.Cleanup(func() { // before the unmount
		for _, pid := range processesIn(mount) {
			if n, err := strconv.Atoi(pid); err == nil {
				syscall.Kill(n, syscall.SIGKILL)
			}
		}
	})
	ctx := d.ctx(t)
	c := d.client()
	for _, name := range []string{"running", "stopped"} {
		if _, err := c.createNamed(ctx, name, "", name == "running"); err != nil {
			t.Fatal(err)
		}
	}
	filler := fill(t, mount)

	_, err := c.createNamed(ctx, "more", "", true)
	wantFull(t, "create", err)
	err = c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "stopped"}))
	wantFull(t, "start", err)
	if res, err := c.vms.List(ctx, &bangerv1.ListVMsRequest{}); err != nil || len(res.Vms) != 2 {
		t.Fatalf("list: %v, %v", res, err)
	}
	// A daemon that starts on a full disk adopts what runs.
	d.cmd.Process.Kill()
	d.waitDead(t)
	d = w.start(t, "", 0)
	c, ctx = d.client(), d.ctx(t)
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "running"})); err != nil {
		t.Fatalf("stop on a full disk: %v", err)
	}
	fillMore(t, filler)
	for _, name := range []string{"running", "stopped"} {
		if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: name})); err != nil {
			t.Fatalf("rm %s on a full disk: %v", name, err)
		}
	}
	if text := w.host().Text(); text != "" {
		t.Fatalf("left on the host:\n%s", text)
	}
	if entries, err := os.ReadDir(filepath.Join(w.state, "vms")); err != nil || len(entries) > 0 {
		t.Fatalf("left in vms: %v, %v", entries, err)
	}
	filler.Close()
	if err := os.Remove(filler.Name()); err != nil {
		t.Fatal(err)
	}
	if _, err := c.createNamed(ctx, "again", "", true); err != nil {
		t.Fatal(err)
	}
	if err := c.do(ctx)(c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: "again", Force: true})); err != nil {
		t.Fatal(err)
	}
	d.stop(t)
}

func wantFull(t *testing.T, what string, err error) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("%s on a full disk: %v", what, err)
	}
}

// fill leaves no byte free.
func fill(t *testing.T, dir string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	fillMore(t, f)
	return f
}

func fillMore(t *testing.T, f *os.File) {
	t.Helper()
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{1 << 20, 4096} {
		block := make([]byte, size)
		for {
			if _, err := f.Write(block); errors.Is(err, syscall.ENOSPC) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
}

package vm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/test/need"
)

// The file system of the host gets full under the store of what differs from the image:
// the guest's disk fails, banger says so, and with room again the guest has what it had
// synced.
func TestSystemFull(t *testing.T) {
	need.Need(t, "testhost")
	top := t.TempDir()
	dir, file := filepath.Join(top, "state"), filepath.Join(top, "file-system")
	script := "truncate -s 1G $1 && mkfs.ext4 -q -m 0 $1 && mkdir $2 && mount -o loop $1 $2 && rmdir $2/lost+found && chmod 700 $2"
	if out, err := exec.Command("sh", "-ec", script, "sh", file, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("umount: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	h := newSystemIn(t, dir, "--sparse=auto")
	t.Cleanup(h.endSystem)
	h.makeBare("dev", "512M")
	h.start("dev")
	h.ok("exec", "dev", "sh", "-c", "echo kept > /root/file && sync")
	if v := h.show("dev"); v.Problem != "" {
		t.Errorf("with room: %+v", v)
	}

	filler := filepath.Join(dir, "filler")
	h.fill(filler, 24<<20)
	// What is in the image is written again, so it is the store that grows.
	r := h.run(2*time.Minute, "", nil, "exec", "-u", "root", "dev", "sh", "-c",
		"find /usr -xdev -type f -size +64k -exec dd if={} of={} bs=1M conv=notrunc,fsync status=none ';'; sync; cat /root/file > /dev/null")
	t.Logf("the guest: exit %d, %d bytes of errors", r.code, len(r.stderr))
	if !strings.Contains(r.stderr, "Input/output error") && !strings.Contains(r.stderr, "Read-only file system") {
		t.Errorf("the guest sees no error: %s", r)
	}
	waitFor(t, time.Minute, "the problem to be told", func() bool {
		return strings.Contains(h.show("dev").Problem, "its disk could not be written")
	})
	if r := h.try("ps"); r.code != 0 || !strings.Contains(r.stdout, "running!") || !strings.Contains(r.stderr, "its disk could not be written") {
		t.Errorf("ps: %s", r)
	}
	h.ok("stop", "--timeout", "10s", "dev")
	h.fill(filler, 24<<20)
	wantFull(t, "start", h.try("start", "dev"), 1, "no space left on device", "df -h "+dir)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	h.start("dev")
	if out := h.ok("exec", "dev", "cat", "/root/file"); out != "kept\n" {
		t.Errorf("with room again the disk has %q", out)
	}
	if v := h.show("dev"); v.Problem != "" {
		t.Errorf("with room again: %+v", v)
	}
	h.ok("exec", "dev", "sh", "-c", "echo more >> /root/file && sync")
}

// fill takes the room of the file system of path but for free bytes.
func (h *host) fill(path string, free int64) {
	h.t.Helper()
	var s unix.Statfs_t
	err := unix.Statfs(filepath.Dir(path), &s)
	if err != nil {
		h.t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		h.t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		h.t.Fatal(err)
	}
	if more := int64(s.Bavail)*s.Bsize - free; more > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, info.Size(), more); err != nil {
			h.t.Fatal(err)
		}
	}
}

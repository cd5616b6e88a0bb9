package dmsnap

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/test/need"
)

// smallHost is a file system of so many bytes with an image of ext4 on it. The image
// is sparse.
func smallHost(t *testing.T, size, image int64) (dir, base, path string) {
	t.Helper()
	temp := t.TempDir()
	file, dir := filepath.Join(temp, "host"), filepath.Join(temp, "mnt")
	must(t, os.WriteFile(file, nil, 0o600))
	must(t, os.Truncate(file, size))
	must(t, os.Mkdir(dir, 0o700))
	run(t, "mkfs.ext4", "-q", "-m", "0", file)
	mount(t, dir, "mount", "-o", "loop", file, dir)
	base, path = filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	must(t, os.WriteFile(base, nil, 0o600))
	must(t, os.Truncate(base, image))
	run(t, "mkfs.ext4", "-q", base)
	return dir, base, path
}

// mount mounts on dir until the test ends, or unmount is called.
func mount(t *testing.T, dir string, argv ...string) (unmount func()) {
	t.Helper()
	run(t, argv...)
	mounted := true
	unmount = func() {
		if mounted {
			mounted = false
			if err := unix.Unmount(dir, 0); err != nil {
				t.Errorf("cannot unmount %s: %v", dir, err)
				_ = unix.Unmount(dir, unix.MNT_DETACH)
			}
		}
	}
	t.Cleanup(unmount)
	return unmount
}

func checksum(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	sum := sha256.New()
	_, err = io.Copy(sum, f)
	must(t, err)
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// save writes a file and syncs it and its directory.
func save(t *testing.T, path string, data []byte) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	_, err = f.Write(data)
	must(t, errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(path))))
}

// fill appends to a file until it cannot, at most limit bytes.
func fill(path string, limit int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	block := bytes.Repeat([]byte("fill"), 64<<10)
	for n := 0; n < limit; n += len(block) {
		if _, err := f.Write(block); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// The host's file system gets full under the store: it is seen, and what was synced is
// there when there is room again.
func TestHostFull(t *testing.T) {
	d := testHost(t)
	dir, base, path := smallHost(t, 200*mib, 160*mib)
	before := checksum(t, base)
	must(t, d.Create(t.Context(), base, path, 300*mib))
	a := attached(t, d, "a", path)
	guest := t.TempDir()
	unmount := mount(t, guest, "mount", a.Path, guest)
	kept := bytes.Repeat([]byte("synced by the guest "), 100_000)
	save(t, filepath.Join(guest, "kept"), kept)

	if err := fill(filepath.Join(dir, "fill"), 200*mib); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the host is not full: %v", err)
	}
	// What Attach kept is there all the same.
	must(t, fill(filepath.Join(guest, "more"), 20*mib))
	if text, err := d.Problem(t.Context(), "a", path); err != nil || !strings.Contains(text, "the host's disk is full: its file system has ") {
		t.Errorf("Problem: %q, %v", text, err)
	}
	err := fill(filepath.Join(guest, "more"), 140*mib)
	if err == nil || errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the guest writes on: %v", err)
	}
	t.Logf("the guest's error: %v", err)
	if s, err := d.Status(t.Context(), "a"); err != nil || !s.Invalid {
		t.Errorf("Status %+v, %v", s, err)
	}
	if text, err := d.Problem(t.Context(), "a", path); err != nil || !strings.Contains(text, "its disk could not be written") {
		t.Errorf("Problem: %q, %v", text, err)
	}
	unmount()
	must(t, d.Detach(t.Context(), "a", path, a))
	if _, err := d.Attach(t.Context(), "a", path); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), " MiB left and it needs ") {
		t.Errorf("Attach on a full host: %v", err)
	}
	clean(t, instance)

	must(t, os.Remove(filepath.Join(dir, "fill")))
	a = attached(t, d, "a", path)
	unmount = mount(t, guest, "mount", a.Path, guest)
	if data, err := os.ReadFile(filepath.Join(guest, "kept")); err != nil || !bytes.Equal(data, kept) {
		t.Errorf("what was synced: %d bytes of %d, %v", len(data), len(kept), err)
	}
	save(t, filepath.Join(guest, "again"), []byte("it takes writes"))
	unmount()
	run(t, "sh", "-c", "e2fsck -fp "+a.Path+"; [ $? -le 1 ] && e2fsck -fn "+a.Path) // "marked with errors" is mended
	if s, err := d.Status(t.Context(), "a"); err != nil || s.Invalid || s.Used == 0 {
		t.Errorf("Status %+v, %v", s, err)
	}
	must(t, d.Detach(t.Context(), "a", path, a))
	if checksum(t, base) != before {
		t.Error("the image has changed")
	}
}

// In the tail only the write that finds no room fails.
func TestHostFullUnderTheTail(t *testing.T) {
	d := testHost(t)
	dir, base, path := smallHost(t, 64*mib, 8*mib)
	must(t, d.Create(t.Context(), base, path, 300*mib))
	a := attached(t, d, "a", path)
	must(t, put(a.Path, []byte("in the tail"), 100*mib))
	if err := fill(filepath.Join(dir, "fill"), 64*mib); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the host is not full: %v", err)
	}
	if err := put(a.Path, make([]byte, 4*mib), 200*mib); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("a write without room: %v", err)
	}
	must(t, put(a.Path, []byte("in the store"), 4096)) // which has all that it can need
	if s, err := d.Status(t.Context(), "a"); err != nil || s.Invalid || s.Overflow {
		t.Errorf("Status %+v, %v", s, err)
	}
	must(t, os.Remove(filepath.Join(dir, "fill")))
	must(t, put(a.Path, []byte("again"), 200*mib))
	must(t, d.Detach(t.Context(), "a", path, a))
	a = attached(t, d, "a", path)
	if got := get(t, a.Path, 100*mib, 11); string(got) != "in the tail" {
		t.Errorf("the tail has %q", got)
	}
	if got := get(t, a.Path, 4096, 12); string(got) != "in the store" {
		t.Errorf("the store has %q", got)
	}
}

// shrink makes the store of an attached disk end after so many bytes.
func shrink(t *testing.T, path string, size int64) {
	t.Helper()
	must(t, os.Truncate(path, storeOffset+size))
	all, err := listLoops(mark(instance))
	must(t, err)
	for _, l := range all {
		if l.backing != path {
			continue
		}
		f, err := os.Open("/dev/" + l.device)
		must(t, err)
		must(t, unix.IoctlSetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY, 0))
		must(t, f.Close())
	}
}

// A store that is full takes no writes and loses nothing; the next Attach extends it.
func TestStoreFull(t *testing.T) {
	d := testHost(t)
	base, path := stateDir(t, 8*mib)
	must(t, d.Create(t.Context(), base, path, 8*mib))
	a := attached(t, d, "a", path)
	must(t, put(a.Path, []byte("kept"), 0))
	shrink(t, path, mib)
	written := int64(0)
	var err error
	for at := int64(chunk); at < 8*mib && err == nil; at += chunk {
		if err = put(a.Path, bytes.Repeat([]byte{byte(at / chunk)}, chunk), at); err == nil {
			written = at
		}
	}
	if !errors.Is(err, unix.EIO) || written < mib/2 || written > mib {
		t.Errorf("%d bytes went into a store of 1 MiB: %v", written, err)
	}
	if s, err := d.Status(t.Context(), "a"); err != nil || !s.Overflow || s.Invalid {
		t.Errorf("Status %+v, %v", s, err)
	}
	if text, err := d.Problem(t.Context(), "a", path); err != nil || !strings.Contains(text, "is full on the host") {
		t.Errorf("Problem: %q, %v", text, err)
	}
	content := func() {
		t.Helper()
		if got := get(t, a.Path, 0, 4); string(got) != "kept" {
			t.Errorf("it begins with %q", got)
		}
		for at := int64(chunk); at <= written; at += chunk {
			if got := get(t, a.Path, at, chunk); !bytes.Equal(got, bytes.Repeat([]byte{byte(at / chunk)}, chunk)) {
				t.Fatalf("at %d it has other bytes", at)
			}
		}
	}
	content()
	must(t, d.Detach(t.Context(), "a", path, a))
	a = attached(t, d, "a", path)
	content()
	for at := int64(0); at < 8*mib; at += mib {
		must(t, put(a.Path, make([]byte, mib), at))
	}
	s, err := d.Status(t.Context(), "a")
	if err != nil || s.Overflow || s.Used < 8*mib || s.Used > s.Total || s.Total != storeSize(8*mib) {
		t.Errorf("with all of it written: %+v, %v", s, err)
	}
	must(t, d.Detach(t.Context(), "a", path, a))
}

// An image that somebody has mounted since is refused, and the disk is as it was when
// the image is back.
func TestImageMountedSince(t *testing.T) {
	d := testHost(t)
	_, base, path := smallHost(t, 100*mib, 32*mib)
	must(t, d.Create(t.Context(), base, path, 64*mib))
	a := attached(t, d, "a", path)
	must(t, put(a.Path, []byte("kept"), 1<<20))
	must(t, d.Detach(t.Context(), "a", path, a))

	backup := filepath.Join(t.TempDir(), "image")
	run(t, "cp", "-a", base, backup)
	dir := t.TempDir()
	mount(t, dir, "mount", "-o", "loop", base, dir)()
	if _, err := d.Attach(t.Context(), "a", path); err == nil || !strings.Contains(err.Error(), "has changed: it was modified at") {
		t.Errorf("Attach: %v", err)
	}
	clean(t, instance)
	must(t, os.Remove(base))
	run(t, "cp", "-a", backup, base) // another inode, the same file
	a = attached(t, d, "a", path)
	if got := get(t, a.Path, 1<<20, 4); string(got) != "kept" {
		t.Errorf("it has %q", got)
	}
}

// The second half runs after a reboot: testhost test -reboot cut. The first leaves all
// as it is, under an instance of its own.
func TestReboot(t *testing.T) {
	need.Need(t, "reboot")
	const dir = "/var/lib/dmsnap-reboot"
	base, path, guest := filepath.Join(dir, "image"), filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	d := New("ab0071")
	if os.Getenv("BANGER_TEST_BOOT") != "2" {
		must(t, os.MkdirAll(guest, 0o700))
		must(t, os.WriteFile(base, nil, 0o600))
		must(t, os.Truncate(base, 32*mib))
		run(t, "mkfs.ext4", "-q", base)
		must(t, d.Create(t.Context(), base, path, 64*mib))
		must(t, syncDir("/var/lib"))
		a, err := d.Attach(t.Context(), "a", path)
		must(t, err)
		run(t, "mount", a.Path, guest)
		save(t, filepath.Join(guest, "kept"), []byte("before the reboot"))
		must(t, put(a.Path, []byte("beyond the image"), 48*mib))
		return
	}
	clean(t, "ab0071")
	a := attached(t, d, "a", path)
	mount(t, guest, "mount", a.Path, guest)
	if data, err := os.ReadFile(filepath.Join(guest, "kept")); err != nil || string(data) != "before the reboot" {
		t.Errorf("%q, %v", data, err)
	}
	if got := get(t, a.Path, 48*mib, 16); string(got) != "beyond the image" {
		t.Errorf("%q", got)
	}
}

package store

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/test/need"
)

// inFullDisk runs the calling test once more in a process whose mount namespace is
// its own, with a small tmpfs, and tells whether this is that process.
func inFullDisk(t *testing.T) (dir string, ok bool) {
	t.Helper()
	const variable = "BANGER_TEST_SMALL_DISK"
	if dir := os.Getenv(variable); dir != "" {
		must(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=24m,mode=0700"))
		return dir, true
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), variable+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
			UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		}
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) || strings.Contains(string(out), "operation not permitted") {
		need.Need(t, "root")
	}
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return "", false
}

// fill takes the last free byte of dir.
func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	must(t, err)
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for {
			if n, err := f.Write(make([]byte, size)); err != nil || n < size {
				break
			}
		}
	}
	if free, err := freeBytes(dir); err != nil || free != 0 {
		t.Fatalf("%d bytes are free, %v", free, err)
	}
}

func hasReserve(t *testing.T, s *Store) bool {
	t.Helper()
	st, err := os.Stat(s.path + ".reserve")
	if errors.Is(err, os.ErrNotExist) {
		return false
	}
	must(t, err)
	blocks := st.Sys().(*syscall.Stat_t).Blocks
	if st.Size() != reserveSize || blocks*512 < reserveSize {
		t.Errorf("the reserve has %d bytes in %d blocks", st.Size(), blocks)
	}
	return true
}

// TestFullDisk: on a disk without a free byte nothing can be added, a VM can be
// stopped and deleted, the daemon can start; and all is well once there is space.
func TestFullDisk(t *testing.T) {
	dir, ok := inFullDisk(t)
	if !ok {
		return
	}
	ctx := t.Context()
	path := filepath.Join(dir, "banger.db")
	s := open(t, path)
	must(t, s.ReplaceKernel(ctx, testKernel("debian-cloud")))
	must(t, s.InsertImage(ctx, testImage("img", "debian-bookworm")))
	n := 0
	for ; n < 40; n++ {
		v := testVM(n + 1)
		v.State = Running
		must(t, s.InsertVM(ctx, v))
	}
	if !hasReserve(t, s) {
		t.Fatal("no reserve was made")
	}
	fill(t, dir)

	// What adds is refused sooner or later, and leaves the reserve to what frees.
	var err error
	for i := 0; err == nil && i < 5000; i++ {
		n++
		err = s.InsertVM(ctx, testVM(n))
	}
	if !errors.Is(err, ErrFull) || !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("after %d VMs on a full disk: %v", n, err)
	}
	if !hasReserve(t, s) {
		t.Error("an insert used the reserve up")
	}
	stopAndDelete(t, s, 1, 10)

	// The space that was given up is taken by others: the database still stands.
	fill(t, dir)
	for i := 11; i <= 20; i++ {
		if err := s.DeleteVM(ctx, testVM(i).ID); err != nil && !errors.Is(err, ErrFull) {
			t.Fatal(err)
		}
	}

	// Space again: the reserve comes back by itself.
	must(t, os.Remove(filepath.Join(dir, "filler")))
	stopAndDelete(t, s, 21, 25)
	if !hasReserve(t, s) {
		t.Error("the reserve was not made again")
	}
	must(t, s.InsertVM(ctx, testVM(9001)))

	// A daemon that starts on a full disk.
	must(t, s.Close())
	fill(t, dir)
	s = open(t, path)
	stopAndDelete(t, s, 26, 40)
	list, err := s.VMs(ctx)
	must(t, err)
	for _, v := range list {
		if v.State != Creating {
			t.Errorf("%s is left, %s", v.ID, v.State)
		}
	}
	var ok2 string
	must(t, s.reader.QueryRow("PRAGMA integrity_check").Scan(&ok2))
	if ok2 != "ok" {
		t.Error(ok2)
	}
}

func stopAndDelete(t *testing.T, s *Store, from, to int) {
	t.Helper()
	for i := from; i <= to; i++ {
		id := testVM(i).ID
		for _, step := range []State{Stopping, Stopped, Deleting} {
			if _, err := s.Transition(t.Context(), id, []State{Running, Stopping, Stopped}, step, nil); err != nil {
				t.Fatalf("%s to %s: %v", id, step, err)
			}
		}
		must(t, s.DeleteVM(t.Context(), id))
		if _, err := s.VM(t.Context(), id); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v", id, err)
		}
	}
}

// TestNoReserveNoHarm: where the reserve cannot be made or is gone, a delete fails
// with a clean ErrFull and works as soon as something else was freed.
func TestNoReserveNoHarm(t *testing.T) {
	dir, ok := inFullDisk(t)
	if !ok {
		return
	}
	ctx := t.Context()
	path := filepath.Join(dir, "banger.db")
	s := open(t, path)
	must(t, s.ReplaceKernel(ctx, testKernel("debian-cloud")))
	must(t, s.InsertImage(ctx, testImage("img", "debian-bookworm")))
	must(t, s.InsertVM(ctx, testVM(1)))
	must(t, s.Close())
	must(t, os.Remove(path+".reserve"))
	fill(t, dir)
	if _, err := Open(ctx, path); !errors.Is(err, ErrFull) {
		t.Fatalf("opening it: %v", err)
	}
	must(t, os.Truncate(filepath.Join(dir, "filler"), 20<<20)) // what rm of a disk does
	s = open(t, path)
	if hasReserve(t, s) {
		t.Fatal("a reserve was made of the last space")
	}
	fill(t, dir)
	var err error
	for i := 0; err == nil && i < 2000; i++ {
		_, err = s.Transition(ctx, testVM(1).ID, []State{Creating, Stopped}, Stopped, nil)
	}
	t.Logf("many writes on a full disk without a reserve: %v", err)
	if err != nil && !errors.Is(err, ErrFull) {
		t.Fatal(err)
	}
	must(t, os.Remove(filepath.Join(dir, "filler")))
	must(t, s.DeleteVM(ctx, testVM(1).ID))
}

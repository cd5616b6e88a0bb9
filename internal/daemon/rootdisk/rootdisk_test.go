package rootdisk

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/daemon/hostcmd"
	"banger/test/need"
)

func tempDir(t *testing.T) string { return t.TempDir() }

// mounted mounts on a directory until the test ends.
func mounted(t *testing.T, argv ...string) string {
	t.Helper()
	dir := t.TempDir()
	command(t, append(argv, dir)...)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("cannot unmount %s: %v", dir, err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

func command(t *testing.T, argv ...string) {
	t.Helper()
	if _, err := hostcmd.Run(t.Context(), hostcmd.Command{Argv: argv}); err != nil {
		t.Fatal(err)
	}
}

// xfs is a file system that shares blocks, in a loop device of the test's own.
func xfs(t *testing.T) string {
	t.Helper()
	need.Need(t, "root")
	if _, err := hostcmd.LookPath("mkfs.xfs"); err != nil {
		t.Skip("needs mkfs.xfs (package xfsprogs)")
	}
	file := filepath.Join(t.TempDir(), "xfs")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 400<<20); err != nil { // mkfs.xfs makes none below 300 MiB
		t.Fatal(err)
	}
	command(t, "mkfs.xfs", "-q", "-m", "reflink=1", file)
	return mounted(t, "mount", "-t", "xfs", "-o", "loop", file)
}

// tmpfs has room for so many bytes, and knows no reflinks.
func tmpfs(t *testing.T, size string) string {
	t.Helper()
	need.Need(t, "root")
	return mounted(t, "mount", "-t", "tmpfs", "-o", "size="+size, "none")
}

func needQemuImg(t *testing.T) {
	t.Helper()
	if _, err := findQemuImg(); err != nil {
		need.Need(t, "qemu")
		t.Skip("needs qemu-img (package qemu-utils)")
	}
}

func TestCopyConforms(t *testing.T) {
	conformance.Disk(t, func(*testing.T) driver.Disk { return NewCopy() }, tempDir)
}

func TestQCOW2Conforms(t *testing.T) {
	needQemuImg(t)
	conformance.Disk(t, func(*testing.T) driver.Disk { return NewQCOW2() }, tempDir)
}

func TestReflinkConforms(t *testing.T) {
	dir := xfs(t)
	conformance.Disk(t, func(*testing.T) driver.Disk { return NewReflink() }, func(t *testing.T) string {
		d, err := os.MkdirTemp(dir, "case")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(d) })
		return d
	})
}

// write makes a file: data at each of the offsets, size bytes in all.
func write(t *testing.T, path string, size int64, data []byte, offsets ...int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range offsets {
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// allocated is how much of a file is on the disk, in bytes.
func allocated(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestCopyKeepsHoles(t *testing.T) {
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "disk")
	write(t, base, 200<<20, bytes.Repeat([]byte("x"), 1<<20), 10<<20, 100<<20)
	if err := NewCopy().Create(t.Context(), base, path, 1<<30); err != nil {
		t.Fatal(err)
	}
	if got := allocated(t, path); got > 4<<20 {
		t.Errorf("a copy of 2 MiB of data takes %d bytes", got)
	}
}

// A file that shares its blocks takes nothing of the file system's room.
func TestReflinkShares(t *testing.T) {
	dir := xfs(t)
	base := filepath.Join(dir, "base")
	write(t, base, 64<<20, bytes.Repeat([]byte("x"), 64<<20), 0)
	before := free(t, dir)
	for _, name := range []string{"a", "b", "c", "d", "e", "f"} { // 384 MiB, if they were copies
		if err := NewReflink().Create(t.Context(), base, filepath.Join(dir, name), 128<<20); err != nil {
			t.Fatal(err)
		}
	}
	if used := before - free(t, dir); used > 2<<20 {
		t.Errorf("6 disks take %d bytes", used)
	}
}

func free(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}

func TestFullDiskLeavesNothing(t *testing.T) {
	dir := tmpfs(t, "8m")
	base := filepath.Join(t.TempDir(), "base")
	write(t, base, 32<<20, bytes.Repeat([]byte("x"), 32<<20), 0)
	before := free(t, dir)
	err := NewCopy().Create(t.Context(), base, filepath.Join(dir, "disk"), 64<<20)
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("error %v", err)
	}
	noFiles(t, dir)
	if after := free(t, dir); after != before {
		t.Errorf("%d bytes are still taken", before-after)
	}
}

func TestFullDiskQCOW2(t *testing.T) {
	needQemuImg(t)
	dir := tmpfs(t, "64k")
	base := filepath.Join(dir, "base")
	write(t, base, 1<<20, []byte("x"), 0)
	if err := NewQCOW2().Create(t.Context(), base, filepath.Join(dir, "disk"), 64<<20); err == nil {
		t.Error("an overlay of 200 KB fits into 64 KB")
	}
	noFiles(t, dir, "base")
}

func noFiles(t *testing.T, dir string, but ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.Contains(strings.Join(but, " "), e.Name()) {
			t.Errorf("%s is left", e.Name())
		}
	}
}

// countdown is a context that ends after it was asked n times.
type countdown struct {
	context.Context
	left atomic.Int64
}

func (c *countdown) Err() error {
	if c.left.Add(-1) < 0 {
		return context.Canceled
	}
	return nil
}

func TestCopyIsCancelledInTheMiddle(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	write(t, base, 5*chunk, bytes.Repeat([]byte("x"), 5*chunk), 0)
	src, err := os.Open(base)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	ctx := &countdown{Context: t.Context()}
	ctx.left.Store(2)
	tmp := filepath.Join(dir, "tmp")
	if err := fillCopy(ctx, src, tmp, 5*chunk); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	// The kernel may copy less than it is asked for: a signal is enough.
	if got := allocated(t, tmp); got == 0 || got > 3*chunk {
		t.Errorf("%d bytes were copied before it was noticed", got)
	}
}

// Where the kernel cannot copy between the files, they are read and written.
func TestCopyWithoutTheKernel(t *testing.T) {
	in, out := t.TempDir(), tmpfs(t, "64m") // another file system
	base, path := filepath.Join(in, "base"), filepath.Join(out, "disk")
	write(t, base, 24<<20, []byte("data"), 0, 5<<20, 24<<20-4)
	if err := NewCopy().Create(t.Context(), base, path, 32<<20); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, append(want, make([]byte, 8<<20)...)) {
		t.Error("the copy differs")
	}
	if got := allocated(t, path); got > 1<<20 {
		t.Errorf("the copy takes %d bytes", got)
	}
}

// What a crash left of an earlier Create is in nobody's way.
func TestCreateAfterACrash(t *testing.T) {
	dir := t.TempDir()
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "disk")
	write(t, base, 1<<20, []byte("new"), 0)
	if err := os.WriteFile(path+partial, bytes.Repeat([]byte("old"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := NewCopy().Create(t.Context(), base, path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || !bytes.HasPrefix(data, []byte("new\x00")) || len(data) != 1<<20 {
		t.Errorf("%d bytes, error %v", len(data), err)
	}
	noFiles(t, dir, "base", "disk")

	if err := os.WriteFile(path+partial, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := NewCopy().Remove(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	noFiles(t, dir, "base")
}

// A guest that makes its raw disk look like an overlay gets a raw disk.
func TestFormatIsNotGuessed(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "disk")
	write(t, path, 1<<20, []byte("QFI\xfb\x00\x00\x00\x03"), 0)
	for _, d := range []driver.Disk{NewCopy(), NewReflink()} {
		if a, err := d.Attach(t.Context(), "vm", path); err != nil || a != (driver.Attached{Path: "disk", Format: "raw"}) {
			t.Errorf("%s: %+v, %v", d.Name(), a, err)
		}
	}
}

func TestAttachRefuses(t *testing.T) {
	needQemuImg(t)
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	write(t, base, 1<<20, []byte("x"), 0)
	at := func(name string) string { return filepath.Join(dir, name) }
	write(t, at("empty"), 0, nil)
	write(t, at("raw"), 1<<20, []byte("x"), 0)
	if err := os.Symlink("raw", at("link")); err != nil {
		t.Fatal(err)
	}
	if err := NewQCOW2().Create(t.Context(), base, at("lost"), 1<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := NewQCOW2().Attach(t.Context(), "vm", at("lost")); err != nil {
		t.Errorf("an overlay on its image: %v", err)
	}
	command(t, Program, "create", "-q", "-f", "qcow2", at("alone"), "1M")
	if err := os.Remove(base); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		d          driver.Disk
		name, want string
	}{
		{NewCopy(), "empty", "empty"},
		{NewCopy(), "link", "no regular file"},
		{NewQCOW2(), "raw", "no qcow2"},
		{NewQCOW2(), "alone", "names no image"},
		{NewQCOW2(), "lost", "based on: stat"},
	} {
		if _, err := c.d.Attach(t.Context(), "vm", at(c.name)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s as %s: %v", c.name, c.d.Name(), err)
		}
	}
}

// The overlay finds its image after the whole state directory was moved, and through
// symbolic links that lead elsewhere than their names say.
func TestOverlayIsRelative(t *testing.T) {
	needQemuImg(t)
	root := filepath.Join(t.TempDir(), "state")
	for _, d := range []string{root + "/images/i", root + "/big/deep/vms/v"} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("big/deep/vms", root+"/vms"); err != nil {
		t.Fatal(err)
	}
	write(t, root+"/images/i/rootfs", 1<<20, []byte("hello"), 0)
	if err := NewQCOW2().Create(t.Context(), root+"/images/i/rootfs", root+"/vms/v/disk", 2<<20); err != nil {
		t.Fatal(err)
	}
	moved := root + ":moved"
	if err := os.Rename(root, moved); err != nil {
		t.Fatal(err)
	}
	if _, err := NewQCOW2().Attach(t.Context(), "v", moved+"/vms/v/disk"); err != nil {
		t.Fatal(err)
	}
	flat := filepath.Join(t.TempDir(), "flat")
	if _, err := hostcmd.Run(t.Context(), hostcmd.Command{Dir: moved + "/vms/v",
		Argv: []string{Program, "convert", "-f", "qcow2", "-O", "raw", "disk", flat}}); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(flat); err != nil || !bytes.HasPrefix(data, []byte("hello\x00")) || len(data) != 2<<20 {
		t.Errorf("%d bytes, error %v", len(data), err)
	}
}

func TestProbeChoosesTheCheapest(t *testing.T) {
	dir := tmpfs(t, "8m")
	needQemuImg(t)
	choice, err := Choose(t.Context(), dir, Auto, UserMode())
	if err != nil {
		t.Fatal(err)
	}
	if choice.Disk.Name() != QCOW2 || len(choice.Passed) != 1 || choice.Passed[0].Driver != Reflink ||
		!strings.Contains(choice.Passed[0].Why, "cannot share blocks") {
		t.Errorf("%s, passed %+v", choice.Disk.Name(), choice.Passed)
	}
	noFiles(t, dir)

	if choice, err = Choose(t.Context(), xfs(t), Auto, UserMode()); err != nil || choice.Disk.Name() != Reflink || choice.Passed != nil {
		t.Errorf("on XFS: %+v, %v", choice, err)
	}

	t.Setenv(ProgramEnv, "banger-no-such-program")
	if choice, err = Choose(t.Context(), dir, Auto, UserMode()); err != nil || choice.Disk.Name() != Copy || len(choice.Passed) != 2 {
		t.Errorf("without qemu-img: %+v, %v", choice, err)
	}
}

// A driver that is asked for is taken or refused, and never replaced.
func TestForcedChoice(t *testing.T) {
	dir := tmpfs(t, "8m")
	choice, err := Choose(t.Context(), dir, Copy, UserMode())
	if err != nil || choice.Disk.Name() != Copy || choice.Passed != nil {
		t.Errorf("copy: %+v, %v", choice, err)
	}
	for _, o := range check.Run(t.Context(), Checks(dir, Copy, UserMode())) {
		if o.Result != check.OK || o.Finding != "copy (disk_driver)" {
			t.Errorf("copy: %+v", o)
		}
	}
	for name, want := range map[string]string{
		Reflink:       "by reflink, which disk_driver asks for: the file system cannot share blocks",
		"dm-snapshot": "by dm-snapshot, which disk_driver asks for: here there are reflink, qcow2, copy",
	} {
		if _, err := Choose(t.Context(), dir, name, UserMode()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", name, err, want)
		}
		for _, o := range check.Run(t.Context(), Checks(dir, name, UserMode())) {
			if o.Result != check.Fail || !strings.Contains(o.Finding, want) {
				t.Errorf("%s: %+v", name, o)
			}
		}
	}
	noFiles(t, dir)
}

// dm-snapshot stands between reflink and copy where the VMM opens raw disks only.
func TestRawOnly(t *testing.T) {
	lacks := errors.New("this kernel has no device-mapper")
	snapshot := func(err error) []Candidate {
		return RawOnly(Candidate{named("dm-snapshot"), func(context.Context, string) error { return err }})
	}
	dir := tmpfs(t, "8m")
	if choice, err := Choose(t.Context(), dir, Auto, snapshot(nil)); err != nil || choice.Disk.Name() != "dm-snapshot" || len(choice.Passed) != 1 {
		t.Errorf("%+v, %v", choice, err)
	}
	choice, err := Choose(t.Context(), dir, "", snapshot(lacks))
	if err != nil || choice.Disk.Name() != Copy || len(choice.Passed) != 2 || choice.Passed[1] != (Reason{"dm-snapshot", lacks.Error()}) {
		t.Errorf("%+v, %v", choice, err)
	}
	if _, err := Choose(t.Context(), dir, "dm-snapshot", snapshot(lacks)); !errors.Is(err, lacks) {
		t.Errorf("forced: %v", err)
	}
	if _, err := Choose(t.Context(), dir, QCOW2, snapshot(nil)); err == nil {
		t.Error("a qcow2 for who cannot read it")
	}
	for _, o := range check.Run(t.Context(), Checks(dir, Auto, snapshot(lacks))) {
		if o.Result != check.Warn || strings.Contains(o.Fix, "qemu") {
			t.Errorf("%+v", o)
		}
	}
	if choice, err := Choose(t.Context(), xfs(t), Auto, snapshot(nil)); err != nil || choice.Disk.Name() != Reflink {
		t.Errorf("on XFS: %+v, %v", choice, err)
	}
}

// named is a driver that does nothing.
type named string

func (n named) Name() string                                                        { return string(n) }
func (named) Create(context.Context, string, string, int64) error                   { return nil }
func (named) Attach(context.Context, string, string) (a driver.Attached, err error) { return }
func (named) Detach(context.Context, string, string, driver.Attached) error         { return nil }
func (named) Remove(context.Context, string) error                                  { return nil }

func TestProbeWithoutADirectory(t *testing.T) {
	if _, err := Choose(t.Context(), filepath.Join(t.TempDir(), "absent"), Auto, UserMode()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestByName(t *testing.T) {
	for _, name := range []string{Reflink, QCOW2, Copy} {
		if d, err := ByName(name); err != nil || d.Name() != name {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	if _, err := ByName(""); err == nil {
		t.Error("a disk without a driver's name")
	}
}

func TestChecks(t *testing.T) {
	t.Setenv(ProgramEnv, "banger-no-such-program")
	// Doctor runs before there is a state directory.
	dir := filepath.Join(t.TempDir(), "not", "yet")
	choice, err := Choose(t.Context(), existing(dir), Auto, UserMode())
	if err != nil {
		t.Fatal(err)
	}
	want := check.OK
	if choice.Disk.Name() == Copy {
		want = check.Warn
	}
	for _, o := range check.Run(t.Context(), Checks(dir, Auto, UserMode())) {
		if o.Result != want || !strings.HasPrefix(o.Finding, choice.Disk.Name()) {
			t.Errorf("%+v", o)
		}
	}
	for _, o := range check.Run(t.Context(), Checks("/proc/absent", Auto, UserMode())) {
		if o.Result != check.Fail {
			t.Errorf("%+v", o)
		}
	}
	if _, err := os.Stat(filepath.Dir(dir)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("doctor made the directory: %v", err)
	}
}

func TestQCOW2WithoutTheProgram(t *testing.T) {
	t.Setenv(ProgramEnv, "banger-no-such-program")
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	write(t, base, 1<<20, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	err := NewQCOW2().Create(ctx, base, filepath.Join(dir, "disk"), 1<<20)
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), ProgramEnv+": banger-no-such-program is not installed") {
		t.Errorf("error %v", err)
	}
	noFiles(t, dir, "base")
}

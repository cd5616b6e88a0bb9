package conformance

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
)

const (
	baseSize = 3<<20 + 512 // bytes; no whole number of blocks or clusters
	diskSize = 8 << 20
)

// Disk tests a driver.Disk. dir is called for an empty directory of its own on a file
// system on which the driver works.
func Disk(t *testing.T, newDisk func(t *testing.T) driver.Disk, dir func(t *testing.T) string) {
	run := func(name string, test func(t *testing.T, h *diskHost)) {
		t.Run(name, func(t *testing.T) {
			h := &diskHost{Disk: newDisk(t), root: dir(t)}
			h.prepare(t)
			test(t, h)
		})
	}
	run("guest sees the image, then zeros", testDiskContent)
	run("writes stay in the disk", testDiskIsolation)
	run("sizes", testDiskSizes)
	run("refusals leave nothing", testDiskRefusals)
	run("existing disk is not touched", testDiskExists)
	run("cancelled", testDiskCancelled)
	run("attach", testDiskAttach)
	run("remove", testDiskRemove)
	run("many at once", testDiskParallel)
}

// diskHost has the layout of a state directory: an image, and two VMs.
type diskHost struct {
	driver.Disk
	root    string
	base    string
	content []byte
}

func (h *diskHost) prepare(t *testing.T) {
	t.Helper()
	h.base = filepath.Join(h.root, "images", "i1", "rootfs.ext4")
	for _, d := range []string{filepath.Dir(h.base), h.vm("a"), h.vm("b")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Data, a hole of 2 MiB, data to the end.
	h.content = make([]byte, baseSize)
	for i := range h.content {
		if i < 512<<10 || i >= 2560<<10 {
			h.content[i] = byte(i*7 + i>>9 + 1)
		}
	}
	f, err := os.OpenFile(h.base, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, part := range [][2]int{{0, 512 << 10}, {2560 << 10, baseSize}} {
		if _, err := f.WriteAt(h.content[part[0]:part[1]], int64(part[0])); err != nil {
			t.Fatal(err)
		}
	}
}

func (h *diskHost) vm(name string) string   { return filepath.Join(h.root, "vms", name) }
func (h *diskHost) path(name string) string { return filepath.Join(h.vm(name), "disk") }

func (h *diskHost) create(t *testing.T, name string) {
	t.Helper()
	if err := h.Create(within(t), h.base, h.path(name), diskSize); err != nil {
		t.Fatalf("Create: %v", err)
	}
	t.Cleanup(func() { _ = h.Remove(context.Background(), h.path(name)) })
}

func (h *diskHost) attach(t *testing.T, name string) driver.Attached {
	t.Helper()
	a, err := h.Attach(within(t), name, h.path(name))
	if err != nil {
		t.Fatalf("Attach: %v", err)
	}
	t.Cleanup(func() { _ = h.Detach(context.Background(), name, h.path(name), a) })
	return a
}

// qemu runs a tool of QEMU in the VM's directory: for what only it can read.
func (h *diskHost) qemu(t *testing.T, name string, argv ...string) {
	t.Helper()
	if _, err := hostcmd.Run(within(t), hostcmd.Command{Argv: argv, Dir: h.vm(name)}); err != nil {
		t.Fatal(err)
	}
}

// guestSees reads the disk as a VMM in the VM's directory would show it.
func (h *diskHost) guestSees(t *testing.T, name string) []byte {
	t.Helper()
	a := h.attach(t, name)
	defer h.Detach(context.Background(), name, h.path(name), a)
	path := a.Path
	if !filepath.IsAbs(path) {
		path = filepath.Join(h.vm(name), path)
	}
	if a.Format == "qcow2" {
		flat := filepath.Join(t.TempDir(), "flat")
		h.qemu(t, name, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", a.Path, flat)
		path = flat
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// guestWrites writes 4 KiB of b at an offset.
func (h *diskHost) guestWrites(t *testing.T, name string, b byte, at int64) {
	t.Helper()
	a := h.attach(t, name)
	defer h.Detach(context.Background(), name, h.path(name), a)
	if a.Format == "qcow2" {
		h.qemu(t, name, "qemu-io", "-f", "qcow2", "-c", "write -P "+strconv.Itoa(int(b))+" "+strconv.FormatInt(at, 10)+" 4k", a.Path)
		return
	}
	path := a.Path
	if !filepath.IsAbs(path) {
		path = filepath.Join(h.vm(name), path)
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(bytes.Repeat([]byte{b}, 4096), at); err != nil {
		t.Fatal(err)
	}
}

// expect compares without printing megabytes.
func expect(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s has %d bytes, want %d", what, len(got), len(want))
		return
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("%s differs from byte %d on: %#x, want %#x", what, i, got[i], want[i])
			return
		}
	}
}

// empty says what is left in the VM's directory.
func (h *diskHost) empty(t *testing.T, name string) {
	t.Helper()
	entries, err := os.ReadDir(h.vm(name))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("%s is left", filepath.Join(name, e.Name()))
	}
}

func (h *diskHost) whole(size int64) []byte {
	return append(bytes.Clone(h.content), make([]byte, size-int64(len(h.content)))...)
}

func testDiskContent(t *testing.T, h *diskHost) {
	h.create(t, "a")
	expect(t, "the disk", h.guestSees(t, "a"), h.whole(diskSize))
	info, err := os.Stat(h.path("a"))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		t.Errorf("others can open the disk: %v", info.Mode())
	}
}

func testDiskIsolation(t *testing.T, h *diskHost) {
	h.create(t, "a")
	h.create(t, "b")
	h.guestWrites(t, "a", 0xaa, 0)
	h.guestWrites(t, "a", 0xab, diskSize-4096)
	h.guestWrites(t, "b", 0xbb, 4096)

	want := h.whole(diskSize)
	copy(want, bytes.Repeat([]byte{0xaa}, 4096))
	copy(want[diskSize-4096:], bytes.Repeat([]byte{0xab}, 4096))
	expect(t, "disk a", h.guestSees(t, "a"), want)
	want = h.whole(diskSize)
	copy(want[4096:], bytes.Repeat([]byte{0xbb}, 4096))
	expect(t, "disk b", h.guestSees(t, "b"), want)
	base, err := os.ReadFile(h.base)
	if err != nil {
		t.Fatal(err)
	}
	expect(t, "the image", base, h.content)
}

func testDiskSizes(t *testing.T, h *diskHost) {
	if err := h.Create(within(t), h.base, h.path("a"), baseSize); err != nil {
		t.Fatalf("a disk of the image's size: %v", err)
	}
	expect(t, "the disk", h.guestSees(t, "a"), h.content)
	if err := h.Create(within(t), h.base, h.path("b"), baseSize-512); err == nil {
		t.Error("a disk smaller than the image is made")
	}
	h.empty(t, "b")
}

func testDiskRefusals(t *testing.T, h *diskHost) {
	for name, c := range map[string]struct {
		base, path string
		size       int64
		want       error
	}{
		"no image":     {h.base + "x", h.path("a"), diskSize, fs.ErrNotExist},
		"no directory": {h.base, filepath.Join(h.vm("c"), "disk"), diskSize, fs.ErrNotExist},
		"no size":      {h.base, h.path("a"), 0, nil},
		"a directory":  {filepath.Dir(h.base), h.path("a"), diskSize, nil},
	} {
		err := h.Create(within(t), c.base, c.path, c.size)
		if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
			t.Errorf("%s: error %v, want %v", name, err, c.want)
		}
	}
	h.empty(t, "a")
}

func testDiskExists(t *testing.T, h *diskHost) {
	h.create(t, "a")
	h.guestWrites(t, "a", 0xaa, 0)
	if err := h.Create(within(t), h.base, h.path("a"), diskSize); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create over a disk: %v", err)
	}
	if got := h.guestSees(t, "a"); got[0] != 0xaa {
		t.Error("the disk has lost what the guest wrote")
	}
}

func testDiskCancelled(t *testing.T, h *diskHost) {
	why := errors.New("somebody asked")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if err := h.Create(ctx, h.base, h.path("a"), diskSize); !errors.Is(err, why) && !errors.Is(err, context.Canceled) {
		t.Errorf("Create: %v", err)
	}
	// Undoing goes on after a cancel, under a context of its own.
	if err := h.Remove(within(t), h.path("a")); err != nil {
		t.Errorf("Remove: %v", err)
	}
	h.empty(t, "a")
	h.create(t, "a")
}

func testDiskAttach(t *testing.T, h *diskHost) {
	if _, err := h.Attach(within(t), "a", h.path("a")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Attach without a disk: %v", err)
	}
	h.create(t, "a")
	a := h.attach(t, "a")
	if a.Format != "raw" && a.Format != "qcow2" {
		t.Errorf("the format is %q", a.Format)
	}
	if filepath.IsAbs(a.Path) && a.Device == "" {
		t.Errorf("the path %s is absolute, but no device", a.Path)
	}
	// A daemon that comes back has lost what Attach said.
	for _, a := range []driver.Attached{a, a, {}} {
		if err := h.Detach(within(t), "a", h.path("a"), a); err != nil {
			t.Errorf("Detach %+v: %v", a, err)
		}
	}
	if again := h.attach(t, "a"); again.Format != a.Format {
		t.Errorf("attached again it is %q, was %q", again.Format, a.Format)
	}
	if err := h.Detach(within(t), "b", h.path("b"), driver.Attached{}); err != nil {
		t.Errorf("Detach of what was never attached: %v", err)
	}
}

func testDiskRemove(t *testing.T, h *diskHost) {
	if err := h.Remove(within(t), h.path("a")); err != nil {
		t.Errorf("Remove without a disk: %v", err)
	}
	h.create(t, "a")
	h.create(t, "b")
	for range 2 {
		if err := h.Remove(within(t), h.path("a")); err != nil {
			t.Errorf("Remove: %v", err)
		}
	}
	h.empty(t, "a")
	if err := h.Remove(within(t), filepath.Join(h.vm("gone"), "disk")); err != nil {
		t.Errorf("Remove without a directory: %v", err)
	}
	expect(t, "the disk beside it", h.guestSees(t, "b"), h.whole(diskSize))
	h.create(t, "a")
}

func testDiskParallel(t *testing.T, h *diskHost) {
	names := []string{"p0", "p1", "p2", "p3", "p4", "p5"}
	var all sync.WaitGroup
	for _, name := range names {
		if err := os.Mkdir(h.vm(name), 0o700); err != nil {
			t.Fatal(err)
		}
		all.Go(func() {
			if err := h.Create(within(t), h.base, h.path(name), diskSize); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	all.Wait()
	if !t.Failed() {
		expect(t, "one of them", h.guestSees(t, names[3]), h.whole(diskSize))
	}
}

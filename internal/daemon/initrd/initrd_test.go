package initrd

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger/internal/guest/wire"
)

func updating() bool { return os.Getenv("BANGER_UPDATE_GOLDEN") != "" }

func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func testConfig() wire.Config {
	return wire.Config{
		Version:  1,
		Magic:    []byte("0123456789abcdef"),
		Identity: wire.Identity{ID: "vm1", Hostname: "shop", MachineID: strings.Repeat("a1", 16)},
		Root:     wire.Root{Serial: "root", FSType: "ext4"},
		Modules:  []string{"left over from the caller"},
	}
}

func write(t *testing.T) []byte {
	t.Helper()
	guest := writeFile(t, "banger-guest", "#guest") // 6 bytes: needs padding
	modules := []string{writeFile(t, "virtio_ring.ko", "ring"), writeFile(t, "virtio.ko", "virtio!")}
	var out bytes.Buffer
	if err := Write(&out, guest, modules, testConfig()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestWriteGolden(t *testing.T) {
	got := write(t)
	const golden = "testdata/initramfs.golden"
	if updating() {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the archive differs from %s:\n%q", golden, got)
	}
}

func TestCpioReadsBothArchives(t *testing.T) {
	cpio, err := exec.LookPath("cpio")
	if err != nil {
		t.Skip("cpio is not installed")
	}
	archives := bytes.SplitAfterN(write(t), []byte("TRAILER!!!\x00\x00\x00\x00"), 2)
	if len(archives) != 2 {
		t.Fatalf("%d archives, want 2", len(archives))
	}
	var listing []string
	dir := t.TempDir()
	for _, a := range archives {
		list := exec.Command(cpio, "-t", "--quiet")
		list.Stdin = bytes.NewReader(a)
		out, err := list.Output()
		if err != nil {
			t.Fatalf("cpio -t: %v", err)
		}
		listing = append(listing, strings.Fields(string(out))...)
		extract := exec.Command(cpio, "-i", "--quiet")
		extract.Dir, extract.Stdin = dir, bytes.NewReader(a)
		if out, err := extract.CombinedOutput(); err != nil {
			t.Fatalf("cpio -i: %v: %s", err, out)
		}
	}
	want := []string{"dev", "proc", "sys", "newroot", "banger", "banger/modules", "init",
		"banger/modules/virtio_ring.ko", "banger/modules/virtio.ko", "banger/config.json"}
	if !slices.Equal(listing, want) {
		t.Errorf("cpio lists %q, want %q", listing, want)
	}
	for name, perm := range map[string]os.FileMode{"init": 0o755, "banger/config.json": 0o600, "banger/modules/virtio.ko": 0o644} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != perm {
			t.Errorf("%s has mode %o, want %o", name, info.Mode().Perm(), perm)
		}
	}
	if got, _ := os.ReadFile(filepath.Join(dir, "init")); string(got) != "#guest" {
		t.Errorf("init holds %q", got)
	}
	data, err := os.ReadFile(filepath.Join(dir, wire.ConfigPath))
	if err != nil {
		t.Fatal(err)
	}
	var cfg wire.Config
	if err := json.Unmarshal(data, &cfg); err != nil {
		t.Fatal(err)
	}
	if want := []string{"virtio_ring.ko", "virtio.ko"}; !slices.Equal(cfg.Modules, want) {
		t.Errorf("Config.Modules = %q, want %q", cfg.Modules, want)
	}
	if cfg.Identity.Hostname != "shop" {
		t.Errorf("Config.Identity = %+v", cfg.Identity)
	}
}

func TestWriteErrors(t *testing.T) {
	guest := writeFile(t, "banger-guest", "#guest")
	missing := filepath.Join(t.TempDir(), "missing.ko")
	if err := Write(io.Discard, guest, []string{missing}, wire.Config{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing module: %v", err)
	}
	if err := Write(io.Discard, t.TempDir(), nil, wire.Config{}); err == nil {
		t.Error("a directory was taken for banger-guest")
	}
	twice := []string{writeFile(t, "a.ko", "1"), writeFile(t, "a.ko", "2")}
	if err := Write(io.Discard, guest, twice, wire.Config{}); err == nil {
		t.Error("two modules of one name were accepted")
	}
	// Every write may be the one that fails.
	for room := 0; room < len(write(t)); room += 97 {
		w := &shortWriter{room: room}
		if err := Write(w, guest, nil, testConfig()); room < 1000 && !errors.Is(err, io.ErrShortWrite) {
			t.Fatalf("%d bytes of room: %v", room, err)
		}
	}
}

type shortWriter struct{ room int }

func (w *shortWriter) Write(p []byte) (int, error) {
	if w.room -= len(p); w.room < 0 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

func TestBootModules(t *testing.T) {
	const dep = `kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.zst: kernel/drivers/virtio/virtio.ko
kernel/bad/a.ko: kernel/bad/b.ko
kernel/bad/b.ko: kernel/bad/a.ko
kernel/bad/c.ko: kernel/bad/gone.ko
kernel/lib/uses.ko: kernel/lib/inside.ko
`
	const builtin = "kernel/fs/ext4/ext4.ko\nkernel/lib/inside.ko\n"
	const v = "kernel/drivers/virtio/"
	tests := []struct {
		want []string
		out  []string
		err  string
	}{
		{[]string{"virtio_mmio", "virtio_blk"}, []string{v + "virtio_ring.ko", v + "virtio.ko", v + "virtio_mmio.ko", "kernel/drivers/block/virtio_blk.ko"}, ""},
		{[]string{"ext4"}, nil, ""},
		{[]string{"ext4", "virtio", "virtio"}, []string{v + "virtio_ring.ko", v + "virtio.ko"}, ""},
		{[]string{"virtio_rng"}, []string{v + "virtio_ring.ko", v + "virtio.ko", "kernel/drivers/char/hw_random/virtio-rng.ko.zst"}, ""},
		{[]string{"uses"}, []string{"kernel/lib/uses.ko"}, ""},
		{[]string{"zfs"}, nil, "the kernel has no module zfs"},
		{[]string{"c"}, nil, "the kernel has no module gone"},
		{[]string{"a"}, nil, "module a depends on itself"},
		{nil, nil, ""},
	}
	for _, tt := range tests {
		got, err := BootModules(strings.NewReader(dep), tt.want, strings.NewReader(builtin))
		if (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
			t.Errorf("%q: error %v, want %q", tt.want, err, tt.err)
		}
		if !slices.Equal(got, tt.out) {
			t.Errorf("%q:\n got %q\nwant %q", tt.want, got, tt.out)
		}
	}
	if _, err := BootModules(strings.NewReader("no colon"), nil, strings.NewReader("")); err == nil {
		t.Error("a malformed modules.dep was accepted")
	}
}

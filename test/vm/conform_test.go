package vm

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
	"banger/internal/daemon/qemuproc"
	"banger/internal/daemon/rootdisk"
	"banger/internal/guest/wire"
)

// TestConforms runs the drivers' contracts on a real QEMU with the real kernel,
// initramfs and image: the channel with the agent of a VM whose daemon is gone, the
// VMM with what that VM was booted from. The next daemon finds the VM unharmed.
func TestConforms(t *testing.T) {
	h := newHost(t)
	h.ok("create", "--name", "dev", "--memory", "512M")
	before := h.show("dev")
	h.killDaemon(h.daemonPID())

	dir := filepath.Join(h.dir, "vms", before.ID)
	var handles struct{ Magic []byte }
	if err := json.Unmarshal([]byte(read(t, filepath.Join(dir, "run/handles.json"))), &handles); err != nil || len(handles.Magic) != wire.MagicLen {
		t.Fatalf("the magic of the guest: %v, %d bytes", err, len(handles.Magic))
	}
	v := qemuproc.New(config.KVMAuto)
	t.Run("channel", func(t *testing.T) {
		conformance.Channel(t, conformance.GuestHost{ID: before.ID, Exec: true, Open: func(magic []byte) driver.Channel {
			if magic == nil {
				magic = handles.Magic
			}
			return v.Channel(dir, magic)
		}})
	})
	t.Run("vmm", func(t *testing.T) {
		disk, err := rootdisk.ByName(rootdisk.QCOW2)
		if err != nil {
			t.Fatal(err)
		}
		images, err := filepath.Glob(filepath.Join(h.dir, "images/*/rootfs.ext4"))
		if err != nil || len(images) != 1 {
			t.Fatalf("images: %v, %v", images, err)
		}
		conformance.VMM(t, conformance.VMMHost{VMM: v, Prepare: func(t *testing.T, to string) driver.Spec {
			if err := os.Mkdir(filepath.Join(to, "run"), 0o700); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"run/kernel", "run/modules", "run/initrd"} {
				if err := os.Symlink(filepath.Join(dir, name), filepath.Join(to, name)); err != nil {
					t.Fatal(err)
				}
			}
			if err := disk.Create(t.Context(), images[0], filepath.Join(to, "disk"), 1<<30); err != nil {
				t.Fatal(err)
			}
			return driver.Spec{
				ID: before.ID, Name: "dev", CPUs: 1, Memory: 256 << 20, Kernel: "run/kernel", Initrd: "run/initrd",
				Disks: []driver.DiskSpec{
					{Serial: "banger-root", Path: "disk", Format: "qcow2"},
					{Serial: "banger-modules", Path: "run/modules", Format: "raw", ReadOnly: true},
				},
			}
		}})
	})

	if out := h.ok("exec", "dev", "echo", "again"); out != "again\n" {
		t.Errorf("exec by the next daemon: %q", out)
	}
	after := h.show("dev")
	for _, key := range []string{"vmm pid", "guest boot id"} {
		if after.Handles[key] != before.Handles[key] {
			t.Errorf("%s was %s, is %s", key, before.Handles[key], after.Handles[key])
		}
	}
}

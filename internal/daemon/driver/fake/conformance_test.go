package fake_test

import (
	"os"
	"path/filepath"
	"testing"

	"banger/internal/daemon/driver"
	"banger/internal/daemon/driver/conformance"
)

func TestConformDisk(t *testing.T) {
	conformance.Disk(t, func(t *testing.T) driver.Disk { return newHost(t).Disk() }, func(t *testing.T) string { return t.TempDir() })
}

func TestConformVMM(t *testing.T) {
	h := newHost(t)
	conformance.VMM(t, conformance.VMMHost{
		VMM: h.VMM(),
		Prepare: func(t *testing.T, dir string) driver.Spec {
			from := newVM(t, h).dir
			for _, name := range []string{"run", "log"} {
				if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			for _, name := range []string{"disk", "run/initrd"} {
				if err := os.Link(filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
			return driver.Spec{
				ID: "0123", Name: "dev", CPUs: 1, Memory: 256 << 20, Kernel: "run/kernel", Initrd: "run/initrd",
				Disks: []driver.DiskSpec{{Serial: "banger-root", Path: "disk", Format: "raw"}},
			}
		},
	})
}

func TestConformChannel(t *testing.T) {
	v := newVM(t, newHost(t))
	if err := v.launch(); err != nil {
		t.Fatal(err)
	}
	conformance.Channel(t, conformance.GuestHost{
		ID: "0123", Exec: true,
		Open: func(magic []byte) driver.Channel {
			if magic == nil {
				magic = v.magic
			}
			return v.h.VMM().Channel(v.dir, magic)
		},
	})
}

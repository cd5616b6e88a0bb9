package driver

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
)

// maxSerial is the length of a virtio disk's serial in bytes, see the virtio
// specification 1.2, section 5.2.6.
const maxSerial = 20

// Validate checks what holds for every VMM. A VMM refuses in Command what fails here,
// and what is beyond its own limits.
func (s Spec) Validate() error {
	switch {
	case s.ID == "" || s.Name == "":
		return errors.New("it has no name")
	case s.CPUs < 1:
		return fmt.Errorf("%d cpus: there must be one", s.CPUs)
	case s.Memory <= 0 || s.Memory%(1<<20) != 0:
		return fmt.Errorf("%d bytes of memory: it must be a multiple of 1 MiB", s.Memory)
	case len(s.Disks) == 0:
		return errors.New("it has no root disk")
	}
	for what, path := range map[string]string{"kernel": s.Kernel, "initramfs": s.Initrd} {
		if err := inside(path); err != nil {
			return fmt.Errorf("its %s: %w", what, err)
		}
	}
	serials := make(map[string]bool)
	for _, d := range s.Disks {
		if err := d.validate(); err != nil {
			return fmt.Errorf("disk %q: %w", d.Serial, err)
		}
		if serials[d.Serial] {
			return fmt.Errorf("disk %q: there are two of it", d.Serial)
		}
		serials[d.Serial] = true
	}
	if s.NIC != nil {
		if err := s.NIC.validate(); err != nil {
			return fmt.Errorf("its network card: %w", err)
		}
	}
	return nil
}

func (n NIC) validate() error {
	const group = 1 // the bit of the first byte that makes an address multicast, IEEE 802-2014, 8.2.2
	mac, err := net.ParseMAC(n.MAC)
	if err != nil || len(mac) != 6 || mac[0]&group != 0 || bytes.Equal(mac, make([]byte, 6)) {
		return fmt.Errorf("%q is no address of a network card", n.MAC)
	}
	return inside(n.Socket)
}

func (d DiskSpec) validate() error {
	if d.Serial == "" || len(d.Serial) > maxSerial {
		return fmt.Errorf("the serial must have 1 to %d bytes", maxSerial)
	}
	if d.Format != "raw" && d.Format != "qcow2" {
		return fmt.Errorf("unknown format %q", d.Format)
	}
	if d.Device != "" && (!filepath.IsAbs(d.Device) || d.Format != "raw") {
		return fmt.Errorf("%q is no raw block device", d.Device)
	}
	return inside(d.Path)
}

// inside refuses a path that leads out of the VM's directory.
func inside(path string) error {
	if !filepath.IsLocal(path) || strings.HasPrefix(path, "-") {
		return fmt.Errorf("%q is no path below the VM's directory", path)
	}
	return nil
}

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// deviceWait is how long a device may take to appear. A loaded host without
// hardware virtualisation needs seconds.
const deviceWait = 30 * time.Second

// uevents is the kernel's announcement of devices (netlink, NETLINK_KOBJECT_UEVENT).
// Only that something happened counts: what is there is read from /sys.
type uevents struct{ fd int }

func (g *guest) openUevents() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fmt.Errorf("cannot listen for devices: %w", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		return fmt.Errorf("cannot listen for devices: %w", err)
	}
	g.uevents = &uevents{fd: fd}
	return nil
}

// wait asks found after every event, until it says yes or the time is over.
func (u *uevents) wait(limit time.Duration, found func() (bool, error)) error {
	deadline := time.Now().Add(limit)
	buf := make([]byte, 8192)
	for {
		ok, err := found()
		if ok || err != nil {
			return err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return fmt.Errorf("it did not appear within %v", limit)
		}
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(u.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		for range 256 { // a burst is one reason to look, not many; ENOBUFS ends it like EAGAIN
			if _, err := unix.Read(u.fd, buf); err != nil {
				break
			}
		}
	}
}

// waitDisk returns the device of the virtio disk with the serial.
func (g *guest) waitDisk(serial string) (device string, err error) {
	err = g.uevents.wait(deviceWait, func() (bool, error) {
		name, err := diskName(g.cfg, "/sys/block", serial)
		if name == "" || err != nil {
			return false, err
		}
		device = "/dev/" + name
		return unix.Access(device, unix.F_OK) == nil, nil
	})
	if err != nil {
		return "", fmt.Errorf("serial %s: %w", serial, err)
	}
	return device, nil
}

// diskBySerial finds the virtio disk with the serial below sys, which is
// /sys/block. It returns "" when there is none.
func diskBySerial(sys, serial string) (string, error) {
	if serial == "" {
		return "", errors.New("the configuration names no serial")
	}
	files, err := filepath.Glob(filepath.Join(sys, "vd*", "serial"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && strings.TrimRight(string(data), "\x00\n ") == serial {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", nil
}

// diskName finds the disk with the serial below sys, which is /sys/block: by its place
// where the configuration names one.
func diskName(cfg wire.Config, sys, serial string) (string, error) {
	place := slices.Index(cfg.DiskOrder, serial)
	if place < 0 {
		return diskBySerial(sys, serial)
	}
	disks := disksInOrder(sys)
	if len(disks) < len(cfg.DiskOrder) {
		return "", nil // one that is yet to come may belong before
	}
	return disks[place], nil
}

// disksInOrder lists the virtio disks in the order in which the VMM announces them, which
// is that of their attachment: virtio numbers its devices as they are found. The letters
// go by when a disk was ready.
func disksInOrder(sys string) []string {
	links, _ := filepath.Glob(filepath.Join(sys, "vd*", "device"))
	number := map[string]int{}
	var names []string
	for _, link := range links {
		device, err := os.Readlink(link)
		if err != nil {
			continue
		}
		n, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(device), "virtio"))
		if err != nil {
			continue
		}
		name := filepath.Base(filepath.Dir(link))
		number[name] = n
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return number[a] - number[b] })
	return names
}

func (g *guest) findPort() error {
	if g.cfg.Vsock {
		return nil
	}
	err := g.uevents.wait(deviceWait, func() (bool, error) {
		name := portByName("/sys/class/virtio-ports", wire.PortName)
		g.port = "/dev/" + name
		return name != "" && unix.Access(g.port, unix.F_OK) == nil, nil
	})
	if err != nil {
		return fmt.Errorf("cannot find the agent's port %s: %w", wire.PortName, err)
	}
	return nil
}

// portByName finds the virtio-serial port with the name below class, which is
// /sys/class/virtio-ports. It returns "" when there is none.
func portByName(class, name string) string {
	files, _ := filepath.Glob(filepath.Join(class, "*", "name"))
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && strings.TrimRight(string(data), "\x00\n ") == name {
			return filepath.Base(filepath.Dir(f))
		}
	}
	return ""
}

// loadModules loads the modules that the configuration names, in its order.
func (g *guest) loadModules() error {
	for _, name := range g.cfg.Modules {
		if err := loadModule(filepath.Join(wire.ModulesDir, filepath.Base(name))); err != nil {
			return fmt.Errorf("cannot load module %s: %w", name, err)
		}
	}
	note("loaded %d modules", len(g.cfg.Modules))
	return nil
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(file, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

package boot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const newRoot = "/newroot"

type mount struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

func (m mount) do() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("cannot mount %s: %w", m.target, err)
	}
	err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
	if err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("cannot mount %s: %w", m.target, err)
	}
	return nil
}

func mountAll(mounts []mount) error {
	for _, m := range mounts {
		if err := m.do(); err != nil {
			return err
		}
	}
	return nil
}

func mountInitramfs() error {
	return mountAll([]mount{
		{"proc", "/proc", "proc", 0, ""},
		{"sys", "/sys", "sysfs", 0, ""},
		{"dev", "/dev", "devtmpfs", 0, "mode=0755"},
	})
}

// switchRoot makes the root disk "/". The mounts of the initramfs stay behind:
// mountSystem makes new ones, by paths that the image's links can no longer lead
// astray. What fills the memory of the initramfs is removed.
func switchRoot() error {
	for _, m := range []string{"/proc", "/sys", "/dev"} {
		if err := unix.Unmount(m, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("cannot leave the initramfs: %s: %w", m, err)
		}
	}
	for _, p := range []string{"/init", "/banger"} {
		if err := os.RemoveAll(p); err != nil {
			return fmt.Errorf("cannot leave the initramfs: %w", err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return fmt.Errorf("cannot leave the initramfs: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot leave the initramfs: move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("cannot leave the initramfs: %w", err)
	}
	return unix.Chdir("/")
}

// mountSystem mounts what programs expect, with systemd's own options: it takes
// over what is mounted already, and what the agent starts may come before it.
func mountSystem() error {
	err := mountAll([]mount{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_STRICTATIME, "mode=0755"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_STRICTATIME, "mode=1777"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_STRICTATIME, "mode=0755,size=20%,nr_inodes=800k"},
	})
	if err != nil {
		return err
	}
	for link, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, filepath.Join("/dev", link)); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("cannot make /dev/%s: %w", link, err)
		}
	}
	return nil
}

// mountWithoutInit mounts what systemd would have mounted later. A kernel that
// lacks one of these still runs the guest.
func mountWithoutInit() error {
	for _, m := range []mount{
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, "nsdelegate,memory_recursiveprot"},
		{"mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV, ""},
	} {
		if err := m.do(); err != nil {
			note("%v", err)
		}
	}
	return nil
}

func (g *guest) mountRoot() error {
	device, err := g.waitDisk(g.cfg.Root.Serial)
	if err != nil {
		return fmt.Errorf("cannot find the root disk: %w", err)
	}
	g.root = device
	if err := unix.Mount(device, newRoot, g.cfg.Root.FSType, 0, ""); err != nil {
		return fmt.Errorf("cannot mount the root disk %s (%s, serial %s): %w", device, g.cfg.Root.FSType, g.cfg.Root.Serial, err)
	}
	note("mounted the root disk %s", device)
	return nil
}

// mountKernelModules puts the disk with the kernel's modules where modprobe looks.
func (g *guest) mountKernelModules() error {
	if g.cfg.KernelModules == "" {
		return nil
	}
	device, err := g.waitDisk(g.cfg.KernelModules)
	if err != nil {
		return fmt.Errorf("cannot find the disk of kernel modules: %w", err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("cannot tell the kernel's release: %w", err)
	}
	target := filepath.Join("/lib/modules", unix.ByteSliceToString(name.Release[:]))
	return mount{device, target, "ext4", unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""}.do()
}

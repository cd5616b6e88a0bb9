package fcproc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
)

// jailBase is where the jailer makes its tree, below the VM's directory.
const jailBase = "run/jail"

// root is the jail's root below the VM's directory, for the program of that name.
func root(name, id string) string { return filepath.Join(jailBase, name, id, "root") }

// Confine makes the tree that the jailer fills up. A tree that lies there is of a process
// that has ended, and goes.
func (v *VMM) Confine(ctx context.Context, dir string, spec driver.Spec) error {
	s, err := v.setup()
	if err != nil {
		return err
	}
	if err := validate(spec); err != nil {
		return fmt.Errorf("cannot make the jail: %w", err)
	}
	if err := v.Free(ctx, dir); err != nil {
		return err
	}
	if err := confine(dir, filepath.Join(dir, root(s.jailName(), spec.ID)), spec); err != nil {
		return fmt.Errorf("cannot make the jail: %w", err)
	}
	return nil
}

func confine(dir, to string, spec driver.Spec) error {
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	if err := usable(to); err != nil {
		return err
	}
	// Firecracker makes its sockets in run/, as its own uid.
	run := filepath.Join(to, filepath.Dir(apiSocket))
	if err := os.Mkdir(run, 0o700); err != nil {
		return err
	}
	for _, d := range []string{to, run} {
		if err := os.Chown(d, spec.UID, spec.GID); err != nil {
			return err
		}
	}
	for _, path := range []string{spec.Kernel, spec.Initrd} {
		if err := lend(dir, to, path, spec, true); err != nil {
			return err
		}
	}
	for _, d := range spec.Disks {
		var err error
		if d.Device != "" {
			err = makeNode(filepath.Join(to, d.Path), d, spec)
		} else {
			err = lend(dir, to, d.Path, spec, d.ReadOnly)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lend gives a file of the VM's directory to the jail, by a hard link. What is read only
// belongs to others too, so all may read it, and only root write.
func lend(dir, to, path string, spec driver.Spec, readOnly bool) error {
	inside := filepath.Join(to, path)
	if err := os.MkdirAll(filepath.Dir(inside), 0o755); err != nil {
		return err
	}
	if err := os.Link(filepath.Join(dir, path), inside); err != nil {
		return err
	}
	if readOnly {
		return os.Chmod(inside, 0o444)
	}
	return os.Lchown(inside, spec.UID, spec.GID)
}

// makeNode makes a node of the disk's block device.
func makeNode(inside string, d driver.DiskSpec, spec driver.Spec) error {
	var st unix.Stat_t
	if err := unix.Stat(d.Device, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: d.Device, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("%s is no block device", d.Device)
	}
	mode := uint32(0o600)
	if d.ReadOnly {
		mode = 0o400
	}
	if err := unix.Mknod(inside, unix.S_IFBLK|mode, int(st.Rdev)); err != nil {
		return &fs.PathError{Op: "mknod", Path: inside, Err: err}
	}
	return os.Lchown(inside, spec.UID, spec.GID)
}

// usable tells where a jail does not work, before the VMM fails and says something else:
// the jailer makes nodes of /dev/kvm and of the disk in it, and a copy of the program.
func usable(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	for _, option := range []struct {
		flag int64
		name string
	}{{unix.ST_NODEV, "nodev"}, {unix.ST_NOEXEC, "noexec"}} {
		if st.Flags&option.flag != 0 {
			return fmt.Errorf("%s lies on a file system that is mounted with %s: the state directory must be on one that is not", dir, option.name)
		}
	}
	return nil
}

// Free removes the jail, with what the jailer and Firecracker made in it.
func (v *VMM) Free(ctx context.Context, dir string) error {
	if err := os.RemoveAll(filepath.Join(dir, jailBase)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the jail: %w", err)
	}
	return nil
}

// jailDir finds the jail's root: there is one below a VM's directory.
func jailDir(dir string) (string, error) {
	at := filepath.Join(dir, jailBase)
	for range 2 { // the program's name, the VM's id
		entries, err := os.ReadDir(at)
		if err != nil {
			return "", err
		}
		if len(entries) == 0 {
			return "", &fs.PathError{Op: "find the jail below", Path: at, Err: fs.ErrNotExist}
		}
		if len(entries) > 1 {
			return "", fmt.Errorf("%d jails below %s", len(entries), at)
		}
		at = filepath.Join(at, entries[0].Name())
	}
	return filepath.Join(at, "root"), nil
}

// dialJail connects to a socket in the jail of the VM in dir. The socket's directory is the
// VMM's, so no link is followed on the way: it would lead root to any socket of the host.
// The way through descriptors leaves no path that is too long (sun_path has 108 bytes).
func dialJail(ctx context.Context, dir, name string) (net.Conn, error) {
	jail, err := jailDir(dir)
	if err != nil {
		return nil, err
	}
	d, err := unix.Open(jail, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: jail, Err: err}
	}
	defer unix.Close(d)
	socket, err := unix.Openat2(d, name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(jail, name), Err: err}
	}
	defer unix.Close(socket)
	conn, err := new(net.Dialer).DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(socket))
	if err != nil {
		return nil, fmt.Errorf("cannot connect to %s: %w", filepath.Join(jail, name), err)
	}
	return conn, nil
}

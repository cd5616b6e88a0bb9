package fcproc

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
)

// jailBase is where the jailer makes its tree, below the VM's directory.
const jailBase = "run/jail"

// root is the jail's root below the VM's directory.
func root(id string) string { return filepath.Join(jailBase, firecracker, id, "root") }

// Confine makes the tree that the jailer fills up. A tree that lies there is of a process
// that has ended, and goes.
func (v *VMM) Confine(ctx context.Context, dir string, spec driver.Spec) error {
	if err := validate(spec); err != nil {
		return fmt.Errorf("cannot make the jail: %w", err)
	}
	if err := v.Free(ctx, dir); err != nil {
		return err
	}
	if err := confine(dir, spec); err != nil {
		return fmt.Errorf("cannot make the jail: %w", err)
	}
	return nil
}

func confine(dir string, spec driver.Spec) error {
	to := filepath.Join(dir, root(spec.ID))
	// Firecracker makes its sockets in run/, as its own uid.
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
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
	if err := usable(inside); err != nil {
		return err
	}
	return os.Lchown(inside, spec.UID, spec.GID)
}

// usable tells where nodes do not work, before the VMM fails with no word of why.
func usable(node string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(node, &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_NODEV != 0 {
		return fmt.Errorf("%s lies on a file system that is mounted with nodev", filepath.Dir(node))
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
	entries, err := os.ReadDir(filepath.Join(dir, jailBase, firecracker))
	if err != nil {
		return "", err
	}
	if len(entries) == 0 {
		return "", &fs.PathError{Op: "find the jail below", Path: dir, Err: fs.ErrNotExist}
	}
	if len(entries) > 1 {
		return "", fmt.Errorf("%d jails below %s", len(entries), dir)
	}
	return filepath.Join(dir, root(entries[0].Name())), nil
}

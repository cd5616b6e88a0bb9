// Package rootdisk makes root disks as plain files, which needs no rights: a
// reflink of the image, where the file system can share blocks, a qcow2 overlay on
// it, or a sparse copy. They differ only in Create and in the format; a disk stays
// what it was created as, so whoever keeps one keeps the driver's name with it and
// asks ByName. The format is never guessed from the file: the guest owns every byte
// of a raw disk and could make it look like a qcow2 with /etc/shadow behind it.
//
// Create never overwrites. It works on a file beside the disk, "disk.tmp", and gives
// it its name when it is complete and synced, so what bears the name is whole.
// Remove takes both away.
//
//	kind      create      on the host            the image must stay
//	reflink   ms          only what was written  no
//	qcow2     20 ms       only what was written  yes, at the same place relative to the disk
//	copy      its data    a full copy            no
package rootdisk

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

// The names of the drivers.
const (
	Reflink = "reflink"
	QCOW2   = "qcow2"
	Copy    = "copy"
)

const (
	// sector is what the size of a disk is counted in, see the virtio specification
	// 1.2, section 5.2.4.
	sector = 512
	// partial is appended to the name of a disk that is being made.
	partial = ".tmp"
)

// fileDisk is a driver.Disk of one file.
type fileDisk struct {
	name   string
	format string
	// fill makes the file at tmp from base; size is not less than base's.
	fill func(ctx context.Context, base *os.File, tmp string, size int64) error
	// verify looks at the file of a disk before a VMM gets it.
	verify func(path string) error
}

// NewReflink makes disks that share the image's blocks until they are written to.
// The image and the disk must be on one file system that can do it: XFS, btrfs,
// bcachefs.
func NewReflink() driver.Disk {
	return &fileDisk{name: Reflink, format: "raw", fill: fillReflink, verify: verifyRaw}
}

// NewQCOW2 makes qcow2 overlays, with the program qemu-img. The path of the image in
// them is relative to the disk.
func NewQCOW2() driver.Disk {
	return &fileDisk{name: QCOW2, format: "qcow2", fill: fillQCOW2, verify: verifyQCOW2}
}

// NewCopy makes copies, which keep the holes of the image.
func NewCopy() driver.Disk {
	return &fileDisk{name: Copy, format: "raw", fill: fillCopy, verify: verifyRaw}
}

// ByName makes the driver that a disk was created with.
func ByName(name string) (driver.Disk, error) {
	switch name {
	case Reflink:
		return NewReflink(), nil
	case QCOW2:
		return NewQCOW2(), nil
	case Copy:
		return NewCopy(), nil
	}
	return nil, fmt.Errorf("no disk driver is called %q; there are %s, %s and %s", name, Reflink, QCOW2, Copy)
}

func (d *fileDisk) Name() string { return d.name }

func (d *fileDisk) Create(ctx context.Context, base, path string, size int64) error {
	if err := d.create(ctx, base, path, size); err != nil {
		return fmt.Errorf("cannot make the disk %s (%s): %w", path, d.name, err)
	}
	return nil
}

func (d *fileDisk) create(ctx context.Context, base, path string, size int64) (err error) {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	image, err := openBase(base, size)
	if err != nil {
		return err
	}
	defer image.Close()
	if _, err := os.Lstat(path); err == nil {
		return fs.ErrExist
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// One left behind by a crash: two Creates of one disk never run at once.
	tmp := path + partial
	if err := removeFile(tmp); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(tmp)
		}
	}()
	if err := d.fill(ctx, image, tmp, size); err != nil {
		return err
	}
	if err := syncFile(tmp); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return publish(tmp, path)
}

// openBase opens the image and refuses a size that does not hold it.
func openBase(base string, size int64) (*os.File, error) {
	// Without O_NONBLOCK the open of a fifo would wait for ever.
	f, err := os.OpenFile(base, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		switch {
		case !info.Mode().IsRegular():
			err = fmt.Errorf("the image %s is no regular file", base)
		case size <= 0 || size%sector != 0:
			err = fmt.Errorf("a disk of %d bytes: the size must be a positive multiple of %d", size, sector)
		case size < info.Size():
			err = fmt.Errorf("a disk of %d bytes does not hold the image, which has %d", size, info.Size())
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// publish gives the complete file its name, for good, and never replaces another.
func publish(tmp, path string) error {
	err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// The file system has no such rename; a link refuses as well.
		if err = os.Link(tmp, path); err == nil {
			err = os.Remove(tmp)
		}
	}
	if err != nil {
		return err
	}
	if err := syncFile(filepath.Dir(path)); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// syncFile syncs a file or a directory.
func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

func (d *fileDisk) Attach(ctx context.Context, vm, path string) (driver.Attached, error) {
	if err := context.Cause(ctx); err != nil {
		return driver.Attached{}, err
	}
	if err := d.verify(path); err != nil {
		return driver.Attached{}, fmt.Errorf("cannot use the disk %s: %w", path, err)
	}
	return driver.Attached{Path: filepath.Base(path), Format: d.format}, nil
}

// Detach has nothing to undo.
func (d *fileDisk) Detach(ctx context.Context, vm, path string, a driver.Attached) error { return nil }

func (d *fileDisk) Remove(ctx context.Context, path string) error {
	return errors.Join(removeFile(path), removeFile(path+partial))
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// verifyRaw says whether a VMM can open the file. A symbolic link is refused: banger
// made none, so somebody else did.
func verifyRaw(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return errors.New("it is no regular file")
	}
	if info.Size() == 0 {
		return errors.New("it is empty")
	}
	return unix.Access(path, unix.R_OK|unix.W_OK)
}

// Package dmsnap makes root disks of an image and a store of what differs from it, by
// the kernel's device-mapper: it needs root, works on every file system, and is made in
// a moment. The disk is one file, sparse, and the file is all there is: it names its
// image and says what the image was, so a disk comes back after the host's boot, and
// one whose image was changed is refused and not mounted as garbage.
//
//	the file            0        header: the image, the sizes; written once
//	                    1 MiB    store: chunks of 4 KiB, and where each belongs
//	                    …        tail: what the disk has beyond the image, as it is
//
//	attached    banger-INSTANCE-VM   snapshot(image, store) ++ linear(tail)
//	               └─ loop, loop, loop      read only; and the two parts of the file
//
// The device is made by one command and removed by one. The loops free themselves with
// their last user (AUTOCLEAR), so a process that is killed while it attaches leaves at
// most a device, which bears the instance's and the VM's name.
//
// The store has room for the whole image, so a guest cannot fill it; the host's file
// system can get full under it. Attach keeps room for the next writes. Beyond it the
// kernel gives up the snapshot at the first write that fails, and marks the store
// invalid: the guest sees I/O errors, Problem says so, and what was written before is
// there, because the kernel writes down where a chunk belongs only when the chunk is
// complete. The next Attach keeps room again, takes the mark away, and the guest has
// what it had synced. In the tail a write that fails is that write alone.
package dmsnap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"golang.org/x/sys/unix"
)

// Name is the driver's.
const Name = "dm-snapshot"

// partial is appended to the name of a disk that is being made.
const partial = ".tmp"

// Disk is a driver.Disk. Its devices bear the mark of one instance.
type Disk struct{ instance string }

// New makes the driver of an instance, see config.Layout.Instance.
func New(instance string) *Disk { return &Disk{instance} }

// Name is "dm-snapshot".
func (d *Disk) Name() string { return Name }

// mark begins the name of each device of an instance.
func mark(instance string) string { return "banger-" + instance + "-" }

var (
	instanceID = regexp.MustCompile(`^[0-9a-f]{6}$`)
	// A name of 63 bytes must fit into a loop device's. device-mapper would write other
	// characters in a way of its own.
	vmID = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z._-]{0,48}$`)
)

// device is the name of a VM's device.
func (d *Disk) device(vm string) (string, error) {
	if !instanceID.MatchString(d.instance) || !vmID.MatchString(vm) {
		return "", fmt.Errorf("no device can be named after VM %q of instance %q", vm, d.instance)
	}
	return mark(d.instance) + vm, nil
}

// Create makes the disk's file. The image must stay where it is relative to the disk,
// and as it is.
func (d *Disk) Create(ctx context.Context, base, path string, size int64) error {
	if err := create(ctx, base, path, size); err != nil {
		return fmt.Errorf("cannot make the disk %s (%s): %w", path, Name, err)
	}
	return nil
}

func create(ctx context.Context, base, path string, size int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	h, err := describe(base, filepath.Dir(path), size)
	if err != nil {
		return err
	}
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
	if err := h.write(tmp); err != nil {
		return errors.Join(err, removeFile(tmp))
	}
	// A link never replaces what is there.
	err = os.Link(tmp, path)
	if err := errors.Join(err, removeFile(tmp)); err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return errors.Join(err, removeFile(path))
	}
	return nil
}

// describe looks at the image, for a disk in dir.
func describe(base, dir string, size int64) (header, error) {
	// ".." in the path that goes into the header is resolved by the kernel: a symbolic
	// link on the way would lead elsewhere than filepath.Rel thinks.
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return header{}, err
	}
	image, err := filepath.EvalSymlinks(base)
	if err != nil {
		return header{}, err
	}
	f, id, err := openImage(image)
	if err != nil {
		return header{}, err
	}
	defer f.Close()
	switch {
	case size <= 0 || size%sector != 0:
		return header{}, fmt.Errorf("a disk of %d bytes: the size must be a positive multiple of %d", size, sector)
	case size < id.Size:
		return header{}, fmt.Errorf("a disk of %d bytes does not hold the image, which has %d", size, id.Size)
	case id.Size == 0 || id.Size%sector != 0:
		return header{}, fmt.Errorf("the image %s has %d bytes: its size must be a positive multiple of %d", base, id.Size, sector)
	}
	// A time that a power cut takes back would be another image.
	if err := f.Sync(); err != nil {
		return header{}, err
	}
	if id.Sample, err = sample(f, id.Size); err != nil {
		return header{}, err
	}
	rel, err := filepath.Rel(dir, image)
	if err != nil {
		return header{}, err
	}
	return header{Version: version, Base: rel, Image: id, Size: size, Store: storeSize(id.Size)}, nil
}

// openImage opens an image for reading.
func openImage(path string) (*os.File, identity, error) {
	// Without O_NONBLOCK the open of a fifo would wait for ever.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, identity{}, err
	}
	id, err := identify(f)
	if err != nil {
		f.Close()
		return nil, identity{}, err
	}
	return f, id, nil
}

// Remove deletes the disk's file, and what an interrupted Create left.
func (d *Disk) Remove(ctx context.Context, path string) error {
	return errors.Join(removeFile(path), removeFile(path+partial))
}

func removeFile(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

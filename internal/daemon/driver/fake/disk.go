package fake

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"banger/internal/daemon/driver"
)

const errBusy = syscall.EBUSY

// disks are files with two devices on top while they are attached: one with a name
// that derives from the VM, and one with a number, which only its content tells.
type disks struct{ h *Host }

func (d disks) Name() string { return "fake" }

func dmName(vm string) string { return "bgfake-" + vm }

// Create copies base and makes the copy size bytes long, sparse beyond base.
func (d disks) Create(ctx context.Context, base, path string, size int64) error {
	return d.h.effect("disk.create", func() (err error) {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		from, err := os.Open(base)
		if err != nil {
			return err
		}
		defer from.Close()
		info, err := from.Stat()
		if err != nil {
			return err
		}
		if !info.Mode().IsRegular() {
			return fmt.Errorf("cannot create a disk from %s: it is no file", base)
		}
		if info.Size() > size {
			return fmt.Errorf("cannot create a disk of %d bytes from an image of %d", size, info.Size())
		}
		to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, to.Close()) }()
		if _, err := io.Copy(to, from); err != nil {
			return err
		}
		if err := to.Truncate(size); err != nil {
			return err
		}
		return to.Sync()
	})
}

func (d disks) Attach(ctx context.Context, vm, path string) (driver.Attached, error) {
	a := driver.Attached{Path: filepath.Base(path), Format: "raw", Device: dmName(vm)}
	if _, err := os.Stat(path); err != nil {
		return driver.Attached{}, err
	}
	if err := d.h.effect("disk.attach.loop", func() error { return d.attachLoop(vm) }); err != nil {
		return driver.Attached{}, err
	}
	if err := d.h.effect("disk.attach.dm", func() error { return d.h.make("dm", a.Device, vm) }); err != nil {
		return driver.Attached{}, err
	}
	return a, nil
}

// maxLoops bounds the search for a free number.
const maxLoops = 1 << 16

func (d disks) attachLoop(vm string) error {
	for n := range maxLoops {
		err := d.h.make("loop", loopName(n), vm)
		if !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return errors.New("no loop device is free")
}

func (d disks) Detach(ctx context.Context, vm, path string, a driver.Attached) error {
	if a.Device == "" {
		a.Device = dmName(vm)
	}
	err := d.h.effect("disk.detach.dm", func() error { return d.h.remove("dm", a.Device, vm) })
	if err != nil {
		return err
	}
	return d.h.effect("disk.detach.loop", func() error {
		loops, err := d.h.objects("loop")
		if err != nil {
			return err
		}
		for _, o := range loops {
			if o.VM == vm {
				err = errors.Join(err, d.h.remove("loop", o.Name, vm))
			}
		}
		return err
	})
}

func (d disks) Remove(ctx context.Context, path string) error {
	return d.h.effect("disk.remove", func() error { return removeIfThere(path) })
}

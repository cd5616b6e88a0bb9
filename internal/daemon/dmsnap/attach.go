package dmsnap

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"banger/internal/daemon/driver"
)

// undoTime is how long undoing may take after a failure, whatever became of the
// caller's context.
const undoTime = 15 * time.Second

// Attach makes the VM's device. A device of that name is one that a crash left: it is
// removed, unless it is in use.
func (d *Disk) Attach(ctx context.Context, vm, path string) (driver.Attached, error) {
	name, err := d.device(vm)
	if err != nil {
		return driver.Attached{}, err
	}
	node, err := attach(ctx, name, path)
	if err != nil {
		return driver.Attached{}, fmt.Errorf("cannot attach the disk %s (%s): %w", path, Name, err)
	}
	return driver.Attached{Path: node, Format: "raw", Device: name}, nil
}

func attach(ctx context.Context, name, path string) (string, error) {
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	file, h, err := openStore(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	base, err := h.openBase(path)
	if err != nil {
		return "", err
	}
	defer base.Close()
	if err := ready(); err != nil {
		return "", err
	}
	// Two devices on one store would destroy it.
	if err := release(ctx, name); err != nil {
		return "", fmt.Errorf("what an earlier start made: %w", err)
	}
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	if err := h.prepare(file); err != nil {
		return "", err
	}

	parts := []part{
		{file: base, length: h.Image.Size, readOnly: true},
		{file: file, offset: storeOffset, length: h.Store},
	}
	if h.tailSize() > 0 {
		parts = append(parts, part{file: file, offset: h.tailOffset(), length: h.tailSize()})
	}
	numbers := make([]string, 3)
	for i, p := range parts {
		if err := context.Cause(ctx); err != nil {
			return "", err
		}
		loop, err := bind(p, name)
		if err != nil {
			return "", err
		}
		defer loop.Close() // by then the device holds it, or it frees itself
		if numbers[i], err = number(loop); err != nil {
			return "", err
		}
	}
	return makeDevice(ctx, name, h.table(numbers[0], numbers[1], numbers[2]))
}

// makeDevice makes the device and returns its node, or leaves nothing.
func makeDevice(ctx context.Context, name, table string) (path string, err error) {
	defer func() {
		if err != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
			defer cancel()
			err = errors.Join(err, removeDevice(ctx, name))
		}
	}()
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	if _, err := dmsetup(ctx, createArgv(name), table); err != nil {
		return "", err
	}
	if err := context.Cause(ctx); err != nil {
		return "", err
	}
	device, err := find(name)
	if err != nil {
		return "", err
	}
	if device == "" {
		return "", fmt.Errorf("the device %s has gone again", name)
	}
	return node(device)
}

// Detach removes the VM's device and its loop devices.
func (d *Disk) Detach(ctx context.Context, vm, path string, a driver.Attached) error {
	name, err := d.device(vm)
	if err != nil {
		return err
	}
	if strings.HasPrefix(a.Device, mark(d.instance)) {
		name = a.Device
	}
	if err := release(ctx, name); err != nil {
		return fmt.Errorf("cannot detach the disk %s (%s): %w", path, Name, err)
	}
	return nil
}

func release(ctx context.Context, name string) error {
	if err := removeDevice(ctx, name); err != nil {
		return err
	}
	return freeLoops(ctx, name)
}

// Status asks the kernel for the snapshot of a VM that is attached; fs.ErrNotExist when
// it is not.
func (d *Disk) Status(ctx context.Context, vm string) (Status, error) {
	name, err := d.device(vm)
	if err != nil {
		return Status{}, err
	}
	if device, err := find(name); err != nil {
		return Status{}, err
	} else if device == "" {
		return Status{}, &fs.PathError{Op: "find", Path: name, Err: fs.ErrNotExist}
	}
	text, err := dmsetup(ctx, statusArgv(name), "")
	if err != nil {
		return Status{}, err
	}
	return parseStatus(text)
}

// Problem says in words what is wrong with the disk of a VM that runs, or nothing.
func (d *Disk) Problem(ctx context.Context, vm, path string) (string, error) {
	s, err := d.Status(ctx, vm)
	if err != nil {
		return "", err
	}
	where := filepath.Dir(path)
	switch {
	case s.Invalid:
		return "its disk could not be written, and fails until the VM is stopped and started; what was synced before is kept. Make room in " + where, nil
	case s.Overflow:
		return "its disk is full on the host, and takes no writes until the VM is stopped and started", nil
	}
	f, err := os.Open(where)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := room(f, minRoom); err != nil {
		return "the host's disk is full: " + err.Error(), nil
	}
	return "", nil
}

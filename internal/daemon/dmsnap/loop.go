package dmsnap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sysBlock has a directory for each block device of the host.
const sysBlock = "/sys/block"

// part is a range of a file that becomes a block device.
type part struct {
	file           *os.File
	offset, length int64
	readOnly       bool
}

// maxTries bounds the attempts at a free loop device: between asking for one and
// taking it, another process may.
const maxTries = 64

// bind makes a loop device of a part. It bears a name, by which listLoops finds it, and
// lives until the file returned is closed and nobody else uses it.
func bind(p part, name string) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("this host has no loop devices: %w", err)
	}
	defer control.Close()
	for range maxTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("no loop device is free: %w", err)
		}
		loop, err := configure(p, name, n)
		if err == nil {
			return loop, nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
	}
	return nil, fmt.Errorf("no loop device is free: others took the last %d: %w", maxTries, unix.EBUSY)
}

func configure(p part, name string, n int) (*os.File, error) {
	path := "/dev/loop" + strconv.Itoa(n)
	loop, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("no loop device is free: the kernel's next is not in /dev: %w", err)
	}
	if err != nil {
		return nil, err
	}
	config := unix.LoopConfig{Fd: uint32(p.file.Fd()), Info: unix.LoopInfo64{
		Offset: uint64(p.offset), Sizelimit: uint64(p.length), Flags: unix.LO_FLAGS_AUTOCLEAR,
	}}
	if p.readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], name)
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &config); err != nil {
		loop.Close()
		return nil, fmt.Errorf("cannot make %s of %s: %w", path, p.file.Name(), err)
	}
	return loop, nil
}

// number is MAJOR:MINOR of a device.
func number(f *os.File) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)), nil
}

// loop is a loop device that somebody made of a file.
type loop struct {
	device  string // "loop3"
	name    string // as given to bind
	backing string // path of the file
}

// listLoops lists the loop devices whose names begin with prefix.
func listLoops(prefix string) ([]loop, error) {
	// A loop that is not bound has no directory of that name.
	files, err := filepath.Glob(sysBlock + "/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var loops []loop
	for _, file := range files {
		if line(filepath.Join(filepath.Dir(file), "autoclear")) != "1" {
			continue // all of ours do
		}
		l := loop{device: filepath.Base(filepath.Dir(filepath.Dir(file))), backing: line(file)}
		f, err := os.Open("/dev/" + l.device)
		if err != nil {
			if absent(err) || (errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0) {
				continue
			}
			return nil, err
		}
		l.name, err = loopName(f)
		f.Close()
		if absent(err) || (err == nil && !strings.HasPrefix(l.name, prefix)) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot ask %s: %w", l.device, err)
		}
		loops = append(loops, l)
	}
	return loops, nil
}

func loopName(f *os.File) (string, error) {
	info, err := unix.IoctlLoopGetStatus64(int(f.Fd()))
	if err != nil {
		return "", err
	}
	name, _, _ := bytes.Cut(info.File_name[:], []byte{0})
	return string(name), nil
}

// line is the content of a file of sysfs, empty when it is gone.
func line(path string) string {
	data, _ := os.ReadFile(path)
	return strings.TrimSuffix(string(data), "\n")
}

// free frees the loop device if it bears the name still.
func (l loop) free() error {
	f, err := os.Open("/dev/" + l.device)
	if err != nil {
		if absent(err) {
			return nil
		}
		return err
	}
	defer f.Close()
	// It stays what it is while it is open.
	name, err := loopName(f)
	if absent(err) || (err == nil && name != l.name) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0); err != nil && !absent(err) && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("cannot free %s: %w", l.device, err)
	}
	return nil
}

// freeLoops frees the loop devices of that name, and waits until they are: one that is
// in use goes with its last user.
func freeLoops(ctx context.Context, name string) error {
	return poll(ctx, func() (bool, error) {
		loops, err := listLoops(name)
		if err != nil {
			return false, err
		}
		left := 0
		for _, l := range loops {
			if l.name == name {
				left++
				err = errors.Join(err, l.free())
			}
		}
		return left == 0, err
	}, "the loop devices of "+name+" are")
}

const (
	// busyTime is how long a device may be in use after its VMM has ended: something on
	// the host, udev say, looks at it.
	busyTime = 10 * time.Second
	busyPoll = 50 * time.Millisecond
)

// poll calls done until it says so, for busyTime.
func poll(ctx context.Context, done func() (bool, error), what string) error {
	limit := time.NewTimer(busyTime)
	defer limit.Stop()
	tick := time.NewTicker(busyPoll)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s still in use: %w: %w", what, unix.EBUSY, context.Cause(ctx))
		case <-limit.C:
			return fmt.Errorf("%s still in use: %w", what, unix.EBUSY)
		case <-tick.C:
		}
	}
}

package rootdisk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
)

// Auto, in the place of a driver's name, is the first one that works.
const Auto = "auto"

// Candidate is a driver among which Choose chooses.
type Candidate struct {
	Disk driver.Disk
	// Probe says what the driver lacks for disks below dir, which exists. It leaves
	// nothing there.
	Probe func(ctx context.Context, dir string) error
}

// UserMode are the candidates where QEMU runs as an ordinary user, the cheapest first.
func UserMode() []Candidate { return []Candidate{ours(Reflink), ours(QCOW2), ours(Copy)} }

// RawOnly are the candidates for a VMM that opens nothing but raw disks, the cheapest
// first. snapshot is that of device-mapper.
func RawOnly(snapshot Candidate) []Candidate {
	return []Candidate{ours(Reflink), snapshot, ours(Copy)}
}

func ours(name string) Candidate {
	disk, _ := ByName(name) // the names are this package's
	return Candidate{disk, func(ctx context.Context, dir string) error { return try(ctx, name, dir) }}
}

// Reason says why a driver that would be cheaper was not chosen.
type Reason struct {
	Driver string
	Why    string
}

// Choice is what Choose found.
type Choice struct {
	Disk driver.Disk
	// Passed are the cheaper drivers that cannot work here, the cheapest first.
	Passed []Reason
}

// Choose decides how disks are made below dir, which must exist: by the first candidate
// that works there, or by the one that is named, or not at all. It really tries. No name
// is Auto.
func Choose(ctx context.Context, dir, name string, from []Candidate) (Choice, error) {
	if name != Auto && name != "" {
		return forced(ctx, dir, name, from)
	}
	var choice Choice
	var errs []error
	for _, c := range from {
		if err := context.Cause(ctx); err != nil {
			return Choice{}, err
		}
		err := c.Probe(ctx, dir)
		if err == nil {
			choice.Disk = c.Disk
			return choice, nil
		}
		choice.Passed = append(choice.Passed, Reason{c.Disk.Name(), err.Error()})
		errs = append(errs, fmt.Errorf("%s: %w", c.Disk.Name(), err))
	}
	return Choice{}, fmt.Errorf("cannot make disks in %s: %w", dir, errors.Join(errs...))
}

// forced never takes another driver than the one that was asked for.
func forced(ctx context.Context, dir, name string, from []Candidate) (Choice, error) {
	var names []string
	for _, c := range from {
		if c.Disk.Name() != name {
			names = append(names, c.Disk.Name())
			continue
		}
		if err := c.Probe(ctx, dir); err != nil {
			return Choice{}, fmt.Errorf("cannot make disks in %s by %s, which disk_driver asks for: %w", dir, name, err)
		}
		return Choice{Disk: c.Disk}, nil
	}
	return Choice{}, fmt.Errorf("cannot make disks by %s, which disk_driver asks for: here there are %s", name, strings.Join(names, ", "))
}

// try says what the driver lacks for disks below dir.
func try(ctx context.Context, name, dir string) error {
	switch name {
	case Reflink:
		return tryReflink(dir)
	case QCOW2:
		if _, err := findQemuImg(); err != nil {
			return err
		}
	}
	f, err := nameless(dir)
	if err != nil {
		return err
	}
	return f.Close()
}

func tryReflink(dir string) error {
	src, err := nameless(dir)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := nameless(dir)
	if err != nil {
		return err
	}
	defer dst.Close()
	// That nothing can be shared would prove nothing.
	if _, err := src.Write(make([]byte, 64<<10)); err != nil {
		return err
	}
	return clone(dst, src)
}

// nameless makes a file in dir that goes away with its descriptor.
func nameless(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(probe)")), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return nil, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f, err := os.CreateTemp(dir, ".probe-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// Checks asks which driver works below dir, see Choose.
func Checks(dir, name string, from []Candidate) []check.Check {
	return []check.Check{{
		Name: "disks", Purpose: "a root disk for each VM, from its image",
		Probe: func(ctx context.Context) check.Finding {
			choice, err := Choose(ctx, existing(dir), name, from)
			if err != nil {
				return check.Found(check.Fail, "%v", err)
			}
			text := choice.Disk.Name()
			var passed []string
			for _, r := range choice.Passed {
				passed = append(passed, fmt.Sprintf("no %s: %s", r.Driver, r.Why))
			}
			switch {
			case name != Auto && name != "":
				text += " (disk_driver)"
			case len(passed) > 0:
				text += " (" + strings.Join(passed, "; ") + ")"
			}
			if choice.Disk.Name() == Copy && name != Copy {
				f := check.Found(check.Warn, "%s: each VM takes the full space of its image", text)
				if slices.ContainsFunc(choice.Passed, func(r Reason) bool { return r.Driver == QCOW2 }) {
					f = f.WithFix("%s", hostcmd.Install(hostcmd.PackageOf(Program)))
				}
				return f
			}
			return check.Found(check.OK, "%s", text)
		},
	}}
}

// existing is dir or the nearest directory above it that exists: doctor also runs
// before there is a state directory.
func existing(dir string) string {
	for dir != filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil {
			break
		}
		dir = filepath.Dir(dir)
	}
	return dir
}

package rootdisk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/check"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/hostcmd"
)

// Reason says why a driver that would be cheaper was not chosen.
type Reason struct {
	Driver string
	Why    string
}

// Choice is what Probe found.
type Choice struct {
	Disk driver.Disk
	// Passed are the cheaper drivers that cannot work here, the cheapest first.
	Passed []Reason
}

// Probe chooses how disks are made below dir, which must exist: the cheapest way that
// works there. It really tries, on files without a name.
func Probe(ctx context.Context, dir string) (Choice, error) {
	var choice Choice
	var errs []error
	for _, name := range []string{Reflink, QCOW2, Copy} {
		if err := context.Cause(ctx); err != nil {
			return Choice{}, err
		}
		err := try(ctx, name, dir)
		if err == nil {
			choice.Disk, err = ByName(name)
			return choice, err
		}
		choice.Passed = append(choice.Passed, Reason{name, err.Error()})
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	return Choice{}, fmt.Errorf("cannot make disks in %s: %w", dir, errors.Join(errs...))
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

// Checks asks which driver works below dir.
func Checks(dir string) []check.Check {
	return []check.Check{{
		Name: "disks", Purpose: "a root disk for each VM, from its image",
		Probe: func(ctx context.Context) check.Finding {
			choice, err := Probe(ctx, existing(dir))
			if err != nil {
				return check.Found(check.Fail, "%v", err)
			}
			text := choice.Disk.Name()
			var passed []string
			for _, r := range choice.Passed {
				passed = append(passed, fmt.Sprintf("no %s: %s", r.Driver, r.Why))
			}
			if len(passed) > 0 {
				text += " (" + strings.Join(passed, "; ") + ")"
			}
			if choice.Disk.Name() == Copy {
				return check.Found(check.Warn, "%s: each VM takes the full space of its image", text).
					WithFix("%s", hostcmd.Install(hostcmd.PackageOf(Program)))
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

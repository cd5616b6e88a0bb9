package rootdisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// newFile makes the file at tmp, for its owner alone.
func newFile(tmp string) (*os.File, error) {
	return os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

func fillReflink(ctx context.Context, base *os.File, tmp string, size int64) error {
	f, err := newFile(tmp)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := clone(f, base); err != nil {
		return err
	}
	return f.Truncate(size)
}

// clone makes dst share the blocks of src, see ioctl_ficlone(2).
func clone(dst, src *os.File) error {
	err := unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	switch {
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("the image is on another file system: %w", err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("the file system cannot share blocks: %w", err)
	}
	return err
}

// chunk is how much is copied between two looks at ctx, in bytes.
const chunk = 16 << 20

// fillCopy copies what base has of data and leaves holes where base has holes.
func fillCopy(ctx context.Context, base *os.File, tmp string, size int64) error {
	f, err := newFile(tmp)
	if err != nil {
		return err
	}
	defer f.Close()
	// The size comes first, so that a file system with a limit refuses at once.
	if err := f.Truncate(size); err != nil {
		return err
	}
	info, err := base.Stat()
	if err != nil {
		return err
	}
	for at, end := int64(0), info.Size(); at < end; {
		from, to, err := nextData(base, at, end)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, f, base, from, to); err != nil {
			return err
		}
		at = to
	}
	return nil
}

// nextData finds the first run of data in [at, end). from == to == end says that
// there is none.
func nextData(f *os.File, at, end int64) (from, to int64, err error) {
	fd := int(f.Fd())
	from, err = unix.Seek(fd, at, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return end, end, nil
	case errors.Is(err, unix.EINVAL): // the file system knows no holes
		return at, end, nil
	case err != nil:
		return 0, 0, err
	}
	if to, err = unix.Seek(fd, from, unix.SEEK_HOLE); err != nil {
		return 0, 0, err
	}
	return min(from, end), min(to, end), nil
}

// copyRange copies the bytes [from, to) to the same place.
func copyRange(ctx context.Context, dst, src *os.File, from, to int64) error {
	inKernel := true
	for from < to {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		n, err := int64(0), error(nil)
		if inKernel {
			if n, err = copyInKernel(dst, src, from, min(to-from, chunk)); unsupported(err) || (err == nil && n == 0) {
				// Some file systems say 0 where they mean that they cannot.
				inKernel = false
				continue
			}
		} else {
			n, err = io.Copy(io.NewOffsetWriter(dst, from), io.NewSectionReader(src, from, min(to-from, chunk)))
			if err == nil && n == 0 {
				err = io.ErrUnexpectedEOF // the image got shorter
			}
		}
		if err != nil {
			return err
		}
		from += n
	}
	return nil
}

func copyInKernel(dst, src *os.File, at, length int64) (int64, error) {
	in, out := at, at
	for {
		n, err := unix.CopyFileRange(int(src.Fd()), &in, int(dst.Fd()), &out, int(length), 0)
		if !errors.Is(err, unix.EINTR) {
			return int64(n), err
		}
	}
}

// unsupported tells what copy_file_range(2) says where only reading and writing is
// left.
func unsupported(err error) bool {
	return errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) ||
		errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS)
}

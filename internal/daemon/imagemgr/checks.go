package imagemgr

import (
	"context"
	"errors"
	"path/filepath"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/check"
)

// Checks asks whether images and kernels can be made here. dir is the state
// directory, which need not exist yet.
func Checks(dir string) []check.Check {
	b := NewBuilder(nil)
	checks := []check.Check{
		{
			Name: "image tools", Purpose: "pulling images and kernels",
			Probe: func(context.Context) check.Finding {
				var missing *MissingError
				switch err := b.require(true); {
				case errors.As(err, &missing):
					return check.Found(check.Fail, "%v", err).WithFix("%s", missing.Remedy())
				case err != nil:
					return check.Found(check.Unknown, "%v", err)
				}
				return check.Found(check.OK, "all installed")
			},
		},
		{
			Name: "image space", Purpose: "pulling images and kernels", Fix: "df -h " + dir,
			Probe: func(context.Context) check.Finding {
				free, err := freeSpace(dir)
				if err != nil {
					return check.Found(check.Unknown, "%v", err)
				}
				if free < imageRoom {
					return check.Found(check.Warn, "%d MiB left, pulling takes up to %d for a while", free>>20, imageRoom>>20)
				}
				return check.Found(check.OK, "%d GiB left", free>>30)
			},
		},
	}
	if b.root {
		return checks
	}
	return append(checks, check.Check{
		Name: "user namespaces", Purpose: "making images without root",
		Probe: func(ctx context.Context) check.Finding {
			var e *NamespaceError
			switch err := b.requireNamespace(ctx); {
			case errors.As(err, &e):
				return check.Found(check.Fail, "%v", err).WithFix("%s", e.Remedy)
			case err != nil:
				return check.Found(check.Unknown, "%v", err)
			}
			return check.Found(check.OK, "with subordinate ids")
		},
	})
}

// freeSpace asks for the bytes left at dir, or where dir will be.
func freeSpace(dir string) (int64, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return int64(st.Bavail) * st.Bsize, nil
		}
		parent := filepath.Dir(dir)
		if !errors.Is(err, unix.ENOENT) || parent == dir {
			return 0, err
		}
		dir = parent
	}
}

package imagemgr

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/opstate"
)

// buildTimeout bounds one build. Half a minute is usual; a slow mirror and a busy
// machine take longer, a hanging tool must not take for ever.
const buildTimeout = 45 * time.Minute

// Builder builds. Its methods may be called at the same time for different
// directories.
type Builder struct {
	// Keyring is the file of keys by which packages are trusted.
	Keyring string
	// BootModules orders the modules that an initramfs loads, see package initrd.
	BootModules func(dep io.Reader, want []string, builtin io.Reader) ([]string, error)

	root           bool
	subuid, subgid string
}

// NewBuilder makes a builder for this process's user.
func NewBuilder(bootModules func(dep io.Reader, want []string, builtin io.Reader) ([]string, error)) *Builder {
	return &Builder{
		Keyring: debianKeyring, BootModules: bootModules,
		root: os.Geteuid() == 0, subuid: "/etc/subuid", subgid: "/etc/subgid",
	}
}

// ImageInfo is what came out of BuildImage.
type ImageInfo struct {
	Size     int64    // of RootfsFile, bytes; it is sparse
	Packages []string // "git 1:2.39.5-0+deb12u3", sorted as dpkg has them
}

// KernelInfo is what came out of BuildKernel.
type KernelInfo struct {
	Version string   // the release, as uname -r prints it
	Package string   // "linux-image-6.1.0-56-cloud-amd64 6.1.192-2"
	Size    int64    // of all files, bytes
	Modules []string // names in ModulesDir, in the order of loading
}

// prepare is what both kinds of build begin with.
func (b *Builder) prepare(ctx context.Context, image bool) (archive, error) {
	if runtime.GOARCH != arch {
		return archive{}, fmt.Errorf("cannot build for %s: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	if err := b.require(image); err != nil {
		return archive{}, err
	}
	if image {
		if err := b.requireNamespace(ctx); err != nil {
			return archive{}, err
		}
	}
	a, err := findArchive(ctx, b.Keyring)
	return a, explain(err)
}

// roomFor fails early, with syscall.ENOSPC, when dir has not need bytes left.
func roomFor(dir string, need int64) error {
	free, err := freeSpace(dir)
	if err != nil {
		return fmt.Errorf("cannot ask for the space in %s: %w", dir, err)
	}
	if free < need {
		return fmt.Errorf("%s has %d MiB left, %d are needed: %w", dir, free>>20, need>>20, unix.ENOSPC)
	}
	return nil
}

// watchSize reports the size of whatever matches patterns while fn runs.
func watchSize(p opstate.Progress, total int64, fn func() error, patterns ...string) error {
	done := make(chan struct{})
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		last := int64(0)
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				if size := sizeOf(patterns); size != last {
					last = size
					p.Bytes(size, total)
				}
			}
		}
	}()
	err := fn()
	close(done)
	<-finished
	return err
}

func sizeOf(patterns []string) (size int64) {
	for _, pattern := range patterns {
		paths, _ := filepath.Glob(pattern) // the patterns are constants: they are well formed
		for _, path := range paths {
			if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
				size += st.Size()
			}
		}
	}
	return size
}

// syncTree puts dir and everything in it on the disk: what is published afterwards
// must survive a power loss.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.IsDir() && !d.Type().IsRegular() {
			return nil
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = f.Sync()
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return err
	})
}

package imagemgr

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/hostcmd"
)

const (
	// scratchPrefix marks a directory outside of the state directory as ours.
	scratchPrefix = "banger-build-"
	// scratchNote, in the directory of a build, holds the path of its scratch
	// directory. It is written before that is made.
	scratchNote = "scratch-path"
)

// scratch makes the directory where mmdebstrap keeps its tree. An ordinary user's
// mmdebstrap works as another uid, which cannot get into the private state
// directory: then it lies in one of the places for temporary files.
func (b *Builder) scratch(dir string) (string, error) {
	if b.root {
		path := filepath.Join(dir, "scratch")
		return path, os.Mkdir(path, 0o755)
	}
	var errs []error
	for _, parent := range []string{os.Getenv("TMPDIR"), "/var/tmp", "/tmp"} {
		if parent == "" {
			continue
		}
		if err := usableByOthers(parent); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := roomFor(parent, scratchRoom); err != nil {
			errs = append(errs, err)
			continue
		}
		path := filepath.Join(parent, scratchPrefix+strings.ToLower(rand.Text()))
		if err := writeSynced(filepath.Join(dir, scratchNote), []byte(path)); err != nil {
			return "", err
		}
		if err := os.Mkdir(path, 0o755); err != nil {
			errs = append(errs, err)
			continue
		}
		return path, os.Chmod(path, 0o755) // whatever the umask is
	}
	return "", fmt.Errorf("there is no place for temporary files: %w", errors.Join(errs...))
}

// usableByOthers tells whether another uid can get to dir and run programs in it.
func usableByOthers(dir string) error {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for p := real; ; p = filepath.Dir(p) {
		st, err := os.Stat(p)
		if err != nil {
			return err
		}
		if st.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("%s is closed to other users, and building an image needs one", p)
		}
		if p == "/" {
			break
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(real, &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		return fmt.Errorf("%s is mounted noexec", real)
	}
	return nil
}

func writeSynced(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Remove removes the directory of a build, finished or broken off at any moment,
// with everything that the build put elsewhere. Absent is success.
func (b *Builder) Remove(ctx context.Context, dir string) error {
	var errs []error
	if data, err := os.ReadFile(filepath.Join(dir, scratchNote)); err == nil {
		if path := string(data); ourScratch(path) {
			errs = append(errs, b.removeTree(ctx, path))
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err // the note stays until what it names is gone
	}
	return b.removeTree(ctx, dir)
}

// ourScratch guards against a note that was cut short or tampered with.
func ourScratch(path string) bool {
	if !filepath.IsAbs(path) || path != filepath.Clean(path) || !strings.HasPrefix(filepath.Base(path), scratchPrefix) {
		return false
	}
	st, err := os.Lstat(path)
	return err == nil && st.IsDir() && int(st.Sys().(*syscall.Stat_t).Uid) == os.Geteuid()
}

// removePatience is how long a tree is removed again and again while tools that
// were told to end still write to it.
const removePatience = 15 * time.Second

// removeTree removes path, and never goes beyond a mount: a tree that a tool had
// mounted parts of the host in must not take those along. Of an ordinary user's
// build much belongs to subordinate ids; the kernel lets the user remove it only as
// root of a user namespace.
func (b *Builder) removeTree(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, removePatience)
	defer cancel()
	plain := []string{"rm", "-rf", "--one-file-system", "--", path}
	for {
		_, err := hostcmd.Run(ctx, hostcmd.Command{Argv: plain})
		if err != nil && !b.root {
			_, err = hostcmd.Run(ctx, hostcmd.Command{Argv: b.asRoot(plain...)})
		}
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot remove %s: %w", path, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// Package config holds what a person or the host decides before the daemon runs:
// the state directory and its layout, config.toml, and how sizes, times and names
// are written. All of it is pure but for a few functions that say what they read.
//
// Paths below the state directory come from Layout. Made elsewhere are the paths
// relative to a VM's directory that its shim and its VMM use (packages shim, vm and the
// VMM's driver), and the names in a directory that one package fills, like the cache.
package config

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"banger/api"
)

// Layout is the state directory of one instance. Whoever has it owns it alone: mode
// 0700, the daemon's uid. "Stays" below means until the state directory goes.
type Layout struct {
	Root string // absolute
}

// Dir finds the state directory of this process's user: BANGER_STATE_DIR, else
// $XDG_STATE_HOME/banger, else ~/.local/state/banger. It looks at the environment
// only; Prepare looks at the directory.
func Dir() (Layout, error) {
	if dir := os.Getenv("BANGER_STATE_DIR"); dir != "" {
		if !filepath.IsAbs(dir) {
			return Layout{}, api.Errorf(api.Invalid, "BANGER_STATE_DIR must be an absolute path, not %q", dir).
				WithHint("set BANGER_STATE_DIR to a directory of your own")
		}
		return Layout{Root: filepath.Clean(dir)}, nil
	}
	base, err := xdg("XDG_STATE_HOME", ".local/state")
	if err != nil {
		return Layout{}, api.Errorf(api.Invalid, "cannot find the state directory: %w", err).
			WithHint("set BANGER_STATE_DIR to a directory of your own")
	}
	return Layout{Root: filepath.Join(base, "banger")}, nil
}

// SystemDir is the state directory of the system's daemon: BANGER_STATE_DIR, else
// /var/lib/banger.
func SystemDir() (Layout, error) {
	if os.Getenv("BANGER_STATE_DIR") != "" {
		return Dir()
	}
	return Layout{Root: "/var/lib/banger"}, nil
}

// IsSystem tells whether the instance is that of the system's daemon. It is one or the
// other for ever: the disks and the processes of its VMs are made for it.
func (l Layout) IsSystem() bool {
	_, err := os.Lstat(l.SystemFile())
	return err == nil
}

// MarkSystem makes a new instance the system's. One that has been a user's is refused.
func (l Layout) MarkSystem() error {
	if l.IsSystem() {
		return nil
	}
	if _, err := os.Lstat(l.DB()); err == nil {
		return api.Errorf(api.Refused, "%s is the state directory of a daemon without --system", l.Root).
			WithHint("set BANGER_STATE_DIR to a directory of its own")
	}
	f, err := os.OpenFile(l.SystemFile(), os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("cannot mark the state directory: %w", err)
	}
	return errors.Join(f.Sync(), f.Close())
}

// xdg returns the directory that variable names, else the one below the home
// directory. A relative path is ignored, as the XDG base directory specification asks.
func xdg(variable, fallback string) (string, error) {
	if dir := os.Getenv(variable); filepath.IsAbs(dir) {
		return dir, nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(home) {
		return "", fmt.Errorf("HOME is not an absolute path: %q", home)
	}
	return filepath.Join(home, fallback), nil
}

// Prepare makes the state directory and the directories in it, mode 0700. It
// refuses, with api.Refused, one that is a symbolic link, belongs to somebody else, or
// holds other things than banger's: what lies in it is trusted, and a mistyped
// BANGER_STATE_DIR must not close somebody's directory.
func (l Layout) Prepare() error {
	if !filepath.IsAbs(l.Root) {
		return api.Errorf(api.Invalid, "the state directory must be an absolute path, not %q", l.Root)
	}
	if err := os.MkdirAll(filepath.Dir(l.Root), 0o700); err != nil {
		return fmt.Errorf("cannot make the state directory: %w", err)
	}
	if err := l.checkOurs(); err != nil {
		return err
	}
	for _, dir := range []string{l.Root, l.Cache(), l.Kernels(), l.Images(), l.VMs(), l.Lost(), l.Programs()} {
		if err := ownDir(dir); err != nil {
			return err
		}
	}
	return nil
}

// checkOurs looks at a state directory that is there already: a daemon has been in it,
// or there is nothing in it that no daemon makes.
func (l Layout) checkOurs() error {
	if _, err := os.Lstat(l.InstanceFile()); err == nil {
		return nil
	}
	entries, err := os.ReadDir(l.Root)
	if err != nil {
		return nil // it is not there yet, or ownDir says what is wrong with it
	}
	var ours []string
	for _, path := range []string{l.Socket(), l.DaemonLock(), l.DB(), l.SystemFile(), l.Log(), l.Cache(), l.Kernels(), l.Images(), l.VMs(), l.Lost(), l.Programs(), l.Firecracker()} {
		ours = append(ours, filepath.Base(path))
	}
	for _, e := range entries {
		known := func(name string) bool {
			return e.Name() == name || strings.HasPrefix(e.Name(), name+"-") || strings.HasPrefix(e.Name(), name+".")
		}
		if !slices.ContainsFunc(ours, known) && !strings.HasPrefix(e.Name(), "."+filepath.Base(l.InstanceFile())+"-") {
			return api.Errorf(api.Refused, "cannot use the state directory %s: it is not empty and is not banger's", l.Root).
				WithHint("set BANGER_STATE_DIR to a directory of your own")
		}
	}
	return nil
}

// ownDir makes dir private to this process's user.
func ownDir(dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make the state directory: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("cannot use the state directory: %w", err)
	}
	refuse := func(format string, args ...any) error {
		return api.Errorf(api.Refused, "cannot use the state directory %s: %s", dir, fmt.Sprintf(format, args...)).
			WithHint("set BANGER_STATE_DIR to a directory of your own")
	}
	if !st.IsDir() {
		return refuse("it is a %s", kind(st.Mode()))
	}
	if owner := st.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() {
		return refuse("it belongs to uid %d, not to uid %d", owner, os.Geteuid())
	}
	if st.Mode().Perm() != 0o700 {
		if err := os.Chmod(dir, 0o700); err != nil {
			return fmt.Errorf("cannot use the state directory: %w", err)
		}
	}
	return nil
}

func kind(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "symbolic link"
	case m.IsRegular():
		return "file"
	}
	return "special file"
}

var instanceID = regexp.MustCompile(`^[0-9a-f]{6}$`)

// Instance returns the id of this instance, 6 lower-case hex digits that every
// host-wide name of it carries; the first call makes it. The file stays.
func (l Layout) Instance() (string, error) {
	for range 3 {
		data, err := os.ReadFile(l.InstanceFile())
		if errors.Is(err, fs.ErrNotExist) {
			if err := l.makeInstance(); err != nil {
				return "", fmt.Errorf("cannot make the instance id: %w", err)
			}
			continue
		}
		if err != nil {
			return "", fmt.Errorf("cannot read the instance id: %w", err)
		}
		id := strings.TrimSpace(string(data))
		if !instanceID.MatchString(id) {
			return "", fmt.Errorf("cannot read the instance id: %s holds %q, not 6 hex digits", l.InstanceFile(), id)
		}
		return id, nil
	}
	return "", fmt.Errorf("cannot make the instance id: %s does not stay", l.InstanceFile())
}

// makeInstance puts the file there whole and synced, or leaves the one that another
// process put there first.
func (l Layout) makeInstance() error {
	var id [3]byte
	rand.Read(id[:])
	f, err := os.CreateTemp(l.Root, ".instance-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(hex.EncodeToString(id[:]) + "\n")
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	if err := os.Link(f.Name(), l.InstanceFile()); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

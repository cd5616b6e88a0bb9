package boot

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// makeUser makes the account of the configuration, by the rule of resolveUser, and
// tells the agent whom it became. When that fails the agent's user is root, unless
// the account was there before.
func (g *guest) makeUser() error {
	if g.cfg.User == nil {
		return nil
	}
	a, err := makeUser("/", *g.cfg.User)
	g.cfg.User = nil
	if a.name != "" {
		g.cfg.User = &wire.User{Name: a.name, UID: a.uid, GID: a.gid}
	}
	if err != nil {
		return fmt.Errorf("cannot make the user: %w", err)
	}
	return nil
}

// makeUser is the rule applied to the image below root. It can be interrupted
// anywhere and done again: passwd is written last. An account comes with an error
// when it exists and only something around it could not be made.
func makeUser(root string, want wire.User) (account, error) {
	etc := func(name string) string { return filepath.Join(root, "etc", name) }
	in, err := readAccounts(etc)
	if err != nil {
		return account{}, err
	}
	a, out, err := resolveUser(want, in, func(path string) bool {
		info, err := os.Stat(filepath.Join(root, path))
		return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
	})
	if err != nil || a.uid == 0 {
		return a, err
	}
	if err := writeAccounts(etc, in, out); err != nil {
		if in.passwd != out.passwd {
			return account{}, err
		}
		return a, err
	}
	if _, sudo, err := readOptional(etc("sudoers")); err == nil && sudo {
		if err := os.MkdirAll(etc("sudoers.d"), 0o750); err != nil {
			return a, err
		}
		if err := replaceFile(etc("sudoers.d/banger"), sudoersFile(a.uid), 0o440); err != nil {
			return a, fmt.Errorf("cannot write /etc/sudoers.d/banger: %w", err)
		}
	}
	if err := makeHome(filepath.Join(root, a.home), etc("skel"), a); err != nil {
		return a, fmt.Errorf("cannot make the home directory %s: %w", a.home, err)
	}
	return a, nil
}

func writeAccounts(etc func(string) string, in, out accountFiles) error {
	for _, f := range []struct {
		name, old, content string
		perm               os.FileMode
	}{
		{"gshadow", in.gshadow, out.gshadow, 0o640},
		{"group", in.group, out.group, 0o644},
		{"shadow", in.shadow, out.shadow, 0o640},
		{"passwd", in.passwd, out.passwd, 0o644},
	} {
		if f.old == f.content {
			continue
		}
		if err := replaceFile(etc(f.name), f.content, f.perm); err != nil {
			return fmt.Errorf("cannot write /etc/%s: %w", f.name, err)
		}
	}
	return nil
}

func readAccounts(etc func(string) string) (in accountFiles, err error) {
	var errs [4]error
	in.passwd, _, errs[0] = readOptional(etc("passwd"))
	in.group, _, errs[1] = readOptional(etc("group"))
	in.shadow, in.hasShadow, errs[2] = readOptional(etc("shadow"))
	in.gshadow, in.hasGShadow, errs[3] = readOptional(etc("gshadow"))
	return in, errors.Join(errs[:]...)
}

// makeHome makes home as a copy of skel that belongs to a. A home that exists is
// left alone, and so is one that is none ("/nonexistent").
func makeHome(home, skel string, a account) error {
	if a.home == "" || a.home == "/" || a.home == "/nonexistent" {
		return nil
	}
	if _, err := os.Stat(home); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(home)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return err
	}
	temp := filepath.Join(parent, ".banger-home")
	if err := os.RemoveAll(temp); err != nil {
		return err
	}
	if err := copyTree(skel, temp, a); err != nil {
		os.RemoveAll(temp)
		return err
	}
	if err := os.Rename(temp, home); err != nil {
		os.RemoveAll(temp)
		return err
	}
	return syncDir(parent)
}

func copyTree(from, to string, a account) error {
	if err := os.Mkdir(to, 0o755); err != nil {
		return err
	}
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if path == from {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		return copyEntry(path, filepath.Join(to, rel), d, a)
	})
	if err != nil {
		return err
	}
	if err := os.Chown(to, a.uid, a.gid); err != nil {
		return err
	}
	return syncDir(to)
}

// copyEntry copies a file, a directory or a link; skel holds nothing else.
func copyEntry(from, to string, d fs.DirEntry, a account) error {
	info, err := d.Info()
	if err != nil {
		return err
	}
	switch {
	case d.IsDir():
		err = os.Mkdir(to, info.Mode().Perm())
	case d.Type()&fs.ModeSymlink != 0:
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	case d.Type().IsRegular():
		err = copyFile(from, to, info.Mode().Perm())
	default:
		return nil
	}
	if err != nil {
		return err
	}
	return unix.Lchown(to, a.uid, a.gid)
}

func copyFile(from, to string, perm os.FileMode) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, perm)
	if err != nil {
		return err
	}
	defer dst.Close()
	if _, err := io.Copy(dst, src); err != nil {
		return err
	}
	if err := dst.Sync(); err != nil {
		return err
	}
	return dst.Close()
}

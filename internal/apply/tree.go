package apply

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/api"
)

// file is a file as it is or is to be. The zero value is no file.
type file struct {
	kind       fs.FileMode // 0 regular, fs.ModeSymlink, fs.ModeDir, another
	present    bool
	executable bool
	target     string // of a symbolic link
	// id is the file itself and its state: a file with the same one was not written since.
	id identity
}

type identity struct {
	Dev, Ino     uint64
	Size         int64
	MTime, CTime int64 // nanoseconds
}

// change is one file that differs afterwards.
type change struct {
	path     string
	old, new file
}

func look(root *os.Root, name string) (file, error) {
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return file{}, nil
	case err != nil:
		return file{}, err
	}
	f := file{kind: info.Mode().Type(), present: true, executable: info.Mode()&0o100 != 0}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		f.id = identity{Dev: st.Dev, Ino: st.Ino, Size: st.Size, MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano()}
	}
	if f.kind == fs.ModeSymlink {
		f.target, err = root.Readlink(name)
	}
	return f, err
}

// plain tells that it is a file that apply handles: a regular one, or a symbolic link.
func (f file) plain() bool { return f.present && (f.kind == 0 || f.kind == fs.ModeSymlink) }

// outcome lets git apply the patch to copies and returns what differs from the host.
func (s *session) outcome(ctx context.Context, t touched) ([]change, error) {
	copies, err := os.OpenRoot(s.file("tree"))
	if err != nil {
		return nil, err
	}
	defer copies.Close()
	host := map[string]file{}
	for _, path := range t.paths {
		f := file{}
		if s.linkAbove(path) == "" {
			if f, err = look(s.root, path); err != nil {
				return nil, err
			}
		}
		if f.present && !f.plain() && f.kind != fs.ModeDir {
			return nil, api.Errorf(api.Refused, "%s is neither a file nor a folder on the host", shown(path)).WithHint("ls -l %s", shown(path))
		}
		host[path] = f
		if !t.created[path] {
			if err := copyFile(copies, s.root, path, f); err != nil {
				return nil, err
			}
		}
	}
	if _, err := s.gitApply(ctx, "--whitespace=nowarn"); err != nil {
		if s.isThere(ctx, copies, t, host) {
			return nil, nil
		}
		return nil, refusal(err)
	}
	if err := nothingElse(s.file("tree"), host); err != nil {
		return nil, err
	}
	var changes []change
	for _, path := range t.paths {
		now, err := look(copies, path)
		if err != nil {
			return nil, err
		}
		if now.kind == fs.ModeDir {
			now = file{}
		}
		old := host[path]
		same, err := same(s.root, copies, path, old, now)
		if err != nil {
			return nil, err
		}
		switch {
		case same:
		case t.created[path] && old.present && old.kind != fs.ModeDir:
			return nil, api.Errorf(api.Refused, "%s is on the host already, and differs", shown(path)).WithHint("banger apply --branch NAME")
		default:
			changes = append(changes, change{path: path, old: old, new: now})
		}
	}
	return changes, nil
}

// isThere tells whether the host has the changes already: they can be taken back.
func (s *session) isThere(ctx context.Context, copies *os.Root, t touched, host map[string]file) bool {
	for path := range t.created {
		if err := copyFile(copies, s.root, path, host[path]); err != nil {
			return false
		}
	}
	_, err := s.gitApply(ctx, "--whitespace=nowarn", "--check", "-R")
	return err == nil
}

// linkAbove finds a symbolic link on the way to a file: what lies behind it is not in
// the repository.
func (s *session) linkAbove(name string) string {
	for i, c := range name {
		if c != '/' {
			continue
		}
		info, err := s.root.Lstat(name[:i])
		if err != nil || info.Mode()&fs.ModeSymlink != 0 {
			if err == nil {
				return name[:i]
			}
			return ""
		}
	}
	return ""
}

// copyFile copies a file, not a folder, under the same name. It is refused when it
// changes meanwhile.
func copyFile(to, from *os.Root, name string, f file) error {
	if !f.present || f.kind == fs.ModeDir {
		return nil
	}
	if err := to.MkdirAll(path.Dir(name), 0o700); err != nil {
		return err
	}
	if f.kind == fs.ModeSymlink {
		return to.Symlink(f.target, name)
	}
	mode := fs.FileMode(0o600)
	if f.executable {
		mode = 0o700
	}
	out, err := to.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	in, err := from.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		out.Close()
		return err
	}
	defer in.Close()
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	return unchanged(from, name, f)
}

func unchanged(root *os.Root, name string, f file) error {
	now, err := look(root, name)
	if err != nil {
		return err
	}
	if now.present != f.present || now.kind != f.kind || now.id != f.id && f.kind != fs.ModeDir {
		return api.Errorf(api.Busy, "%s changes meanwhile", shown(name)).WithHint("banger apply")
	}
	return nil
}

// nothingElse makes sure that git wrote only files that the patch names.
func nothingElse(dir string, named map[string]file) error {
	return filepath.WalkDir(dir, func(full string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, full)
		if err != nil {
			return err
		}
		if _, ok := named[name]; !ok {
			return malformed("it writes " + shown(name))
		}
		return nil
	})
}

func same(a, b *os.Root, name string, x, y file) (bool, error) {
	if x.present != y.present || x.kind != y.kind || x.target != y.target {
		return false, nil
	}
	if !x.present || x.kind != 0 {
		return true, nil
	}
	if x.executable != y.executable || x.id.Size != y.id.Size {
		return false, nil
	}
	f, err := a.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	g, err := b.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer g.Close()
	return sameContent(f, g)
}

func sameContent(a, b io.Reader) (bool, error) {
	p, q := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, errA := io.ReadFull(a, p)
		m, errB := io.ReadFull(b, q)
		if !bytes.Equal(p[:n], q[:m]) {
			return false, nil
		}
		endA, endB := errA == io.EOF || errA == io.ErrUnexpectedEOF, errB == io.EOF || errB == io.ErrUnexpectedEOF
		switch {
		case endA && endB:
			return true, nil
		case errA != nil && !endA:
			return false, errA
		case errB != nil && !endB:
			return false, errB
		case endA != endB:
			return false, nil
		}
	}
}

// checkPlaces refuses changes that cannot be put where they belong: behind a symbolic
// link, below a file, or where there is a folder that does not get empty.
func (s *session) checkPlaces(changes []change) error {
	gone := map[string]bool{}
	for _, c := range changes {
		gone[c.path] = !c.new.present
	}
	for _, c := range changes {
		if !c.new.present {
			continue
		}
		for dir := path.Dir(c.path); dir != "."; dir = path.Dir(dir) {
			info, err := s.root.Lstat(dir)
			if err == nil && !info.IsDir() && !gone[dir] {
				return api.Errorf(api.Refused, "%s is not a folder on the host, so there can be no %s", shown(dir), shown(c.path)).
					WithHint("banger apply --branch NAME")
			}
		}
		if c.old.kind != fs.ModeDir {
			continue
		}
		err := fs.WalkDir(s.root.FS(), c.path, func(name string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !gone[name] {
				err = api.Errorf(api.Refused, "%s is a folder on the host, and %s is in it", shown(c.path), shown(name)).
					WithHint("banger apply --branch NAME")
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/api"
)

// applyFile is a file as it is or is to be. The zero value is no file.
type applyFile struct {
	kind       fs.FileMode // 0 regular, fs.ModeSymlink, fs.ModeDir
	present    bool
	executable bool
	target     string // of a symbolic link
	// id is the file itself and its state: a file with the same one was not written since.
	id applyIdentity
}

type applyIdentity struct {
	Dev, Ino     uint64
	Size         int64
	MTime, CTime int64 // nanoseconds
}

// applyChange is one file that differs afterwards.
type applyChange struct {
	path     string
	old, new applyFile
}

func applyLook(root *os.Root, name string) (applyFile, error) {
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return applyFile{}, nil
	case err != nil:
		return applyFile{}, err
	}
	f := applyFile{kind: info.Mode().Type(), present: true, executable: info.Mode()&0o100 != 0}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		f.id = applyIdentity{Dev: st.Dev, Ino: st.Ino, Size: st.Size, MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano()}
	}
	switch f.kind {
	case 0, fs.ModeDir:
	case fs.ModeSymlink:
		f.target, err = root.Readlink(name)
	default:
		err = api.Errorf(api.Refused, "%s is neither a file nor a folder on the host", cleanLine(name)).WithHint("ls -l %s", cleanLine(name))
	}
	return f, err
}

// outcome lets git apply the patch to copies and returns what differs from the host.
func (s *applySession) outcome(ctx context.Context, t applyTouched) ([]applyChange, error) {
	copies, err := os.OpenRoot(s.file("tree"))
	if err != nil {
		return nil, err
	}
	defer copies.Close()
	host := map[string]applyFile{}
	for _, path := range t.paths {
		f := applyFile{}
		if s.linkAbove(path) == "" {
			if f, err = applyLook(s.root, path); err != nil {
				return nil, err
			}
		}
		host[path] = f
		if !t.created[path] {
			if err := applyCopy(copies, s.root, path, f); err != nil {
				return nil, err
			}
		}
	}
	if _, err := s.inScratch(ctx, "apply", "--whitespace=nowarn", "--", s.patch); err != nil {
		if s.isThere(ctx, copies, t, host) {
			return nil, nil
		}
		return nil, applyRefusal(err)
	}
	if err := applyNothingElse(s.file("tree"), host); err != nil {
		return nil, err
	}
	var changes []applyChange
	for _, path := range t.paths {
		now, err := applyLook(copies, path)
		if err != nil {
			return nil, err
		}
		if now.kind == fs.ModeDir {
			now = applyFile{}
		}
		old := host[path]
		same, err := applySame(s.root, copies, path, old, now)
		if err != nil {
			return nil, err
		}
		switch {
		case same:
		case t.created[path] && old.present && old.kind != fs.ModeDir:
			return nil, api.Errorf(api.Refused, "%s is on the host already, and differs", cleanLine(path)).WithHint("banger apply --branch NAME")
		default:
			changes = append(changes, applyChange{path: path, old: old, new: now})
		}
	}
	return changes, nil
}

// isThere tells whether the host has the changes already: they can be taken back.
func (s *applySession) isThere(ctx context.Context, copies *os.Root, t applyTouched, host map[string]applyFile) bool {
	for path := range t.created {
		if err := applyCopy(copies, s.root, path, host[path]); err != nil {
			return false
		}
	}
	_, err := s.inScratch(ctx, "apply", "--whitespace=nowarn", "--check", "-R", "--", s.patch)
	return err == nil
}

// linkAbove finds a symbolic link on the way to a file: what lies behind it is not in
// the repository.
func (s *applySession) linkAbove(name string) string {
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

// applyCopy copies a file, not a folder, under the same name. It is refused when it
// changes meanwhile.
func applyCopy(to, from *os.Root, name string, f applyFile) error {
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
	return applyUnchanged(from, name, f)
}

func applyUnchanged(root *os.Root, name string, f applyFile) error {
	now, err := applyLook(root, name)
	if err != nil {
		return err
	}
	if now.present != f.present || now.id != f.id && f.kind != fs.ModeDir {
		return api.Errorf(api.Busy, "%s changes meanwhile", cleanLine(name)).WithHint("banger apply")
	}
	return nil
}

// applyNothingElse makes sure that git wrote only files that the patch names.
func applyNothingElse(dir string, named map[string]applyFile) error {
	return filepath.WalkDir(dir, func(full string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, full)
		if err != nil {
			return err
		}
		if _, ok := named[name]; !ok {
			return applyMalformed("it writes " + cleanLine(name))
		}
		return nil
	})
}

func applySame(a, b *os.Root, name string, x, y applyFile) (bool, error) {
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
	return applySameContent(f, g)
}

func applySameContent(a, b io.Reader) (bool, error) {
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
func (s *applySession) checkPlaces(changes []applyChange) error {
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
				return api.Errorf(api.Refused, "%s is not a folder on the host, so there can be no %s", cleanLine(dir), cleanLine(c.path)).
					WithHint("banger apply --branch NAME")
			}
		}
		if c.old.kind != fs.ModeDir {
			continue
		}
		err := fs.WalkDir(s.root.FS(), c.path, func(name string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && !gone[name] {
				err = api.Errorf(api.Refused, "%s is a folder on the host, and %s is in it", cleanLine(c.path), cleanLine(name)).
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

// applyBranch puts the changes on a new branch as one commit on head. The user's
// configuration says who commits; nothing that it names is run.
func (a *app) applyBranch(ctx context.Context, s *applySession, head string, o applyOptions) error {
	name, err := s.repository(ctx, nil, "check-ref-format", "--branch", o.branch)
	if err != nil {
		return api.Errorf(api.Invalid, "%q is no name for a branch", o.branch).WithHint("banger apply --help")
	}
	ref := "refs/heads/" + name
	if _, err := s.repository(ctx, nil, "show-ref", "--verify", "--quiet", ref); err == nil {
		return api.Errorf(api.Exists, "there is a branch %s already", cleanLine(name)).WithHint("git branch -D %s", cleanLine(name))
	}
	index := applyEnv("GIT_INDEX_FILE=" + s.file("index"))
	git := func(in io.Reader, args ...string) (string, error) { return applyGit(ctx, s.top, index, in, args...) }
	from := []string{"read-tree", "--empty"}
	if head != "" {
		if _, err := s.repository(ctx, nil, "cat-file", "-e", head+"^{commit}"); err != nil {
			return api.Errorf(api.Refused, "the commit %s is not in the repository any more", cleanLine(head)).WithHint("banger apply")
		}
		from = []string{"read-tree", head}
	}
	if _, err := git(nil, from...); err != nil {
		return err
	}
	t, err := s.touched(ctx)
	if err != nil {
		return err
	}
	attributes, err := git(strings.NewReader(strings.Join(t.paths, "\x00")+"\x00"), "check-attr", "-z", "--cached", "--stdin", "filter")
	if err != nil {
		return err
	}
	fields := strings.Split(attributes, "\x00")
	for i := 0; i+2 < len(fields); i += 3 {
		if v := fields[i+2]; !slices.Contains([]string{"unspecified", "unset", ""}, v) {
			return api.Errorf(api.Refused, "%s is kept by the filter %s, which banger does not run", cleanLine(fields[i]), cleanLine(v)).WithHint("banger apply")
		}
	}
	apply := []string{"apply", "--cached", "--whitespace=nowarn"}
	if o.check {
		apply = append(apply, "--check")
	}
	if _, err := git(nil, append(apply, "--", s.patch)...); err != nil {
		return applyRefusal(err)
	}
	if o.check {
		a.ui.note("it applies: %s", count(len(t.paths), "file"))
		return nil
	}
	return a.applyCommit(git, head, ref, o.vm)
}

func (a *app) applyCommit(git func(io.Reader, ...string) (string, error), head, ref, vm string) error {
	tree, err := git(nil, "write-tree")
	if err != nil {
		return err
	}
	message := "banger: changes from VM " + vm
	commit := []string{"commit-tree", tree, "-F", "-"}
	if head != "" {
		commit = append(commit, "-p", head)
	}
	id, err := git(strings.NewReader(strings.TrimSpace(message)+"\n"), commit...)
	if err != nil && (strings.Contains(applyStderr(err), "tell me who you are") || strings.Contains(applyStderr(err), "ident name")) {
		return api.Errorf(api.Refused, "git does not know who commits").WithHint("git config --global user.email YOU@EXAMPLE.ORG")
	}
	if err != nil {
		return err
	}
	zero := strings.Repeat("0", len(id)) // it must not be there yet
	if _, err := git(nil, "update-ref", "-m", message, ref, id, zero); err != nil {
		return err
	}
	short := strings.TrimPrefix(ref, "refs/heads/")
	a.ui.note("%s", fmt.Sprintf("branch %s is at %s", cleanLine(short), id[:min(7, len(id))]))
	return nil
}

package cli

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"banger/api"
)

// applyJournal is how an apply is all or nothing, also when it is killed. It goes
//
//	preparing   new content is written beside the files, under other names
//	moving      old files get a second name, new ones are renamed into place
//	done        the second names are removed
//
// and the journal, GITDIR/banger-apply/journal, is on the disk before each of these. An
// error before done takes everything back, and so does the next apply when this one was
// killed; after done the next one only clears up. A file that somebody changed since is
// left as it is, and its former content is kept under the second name.
type applyJournal struct {
	Version int         `json:"version"` // 1
	State   string      `json:"state"`
	Steps   []applyStep `json:"steps"`
	// Dirs are the folders that are made, from the top down.
	Dirs [][]byte `json:"dirs,omitempty"`
}

const (
	applyPreparing = "preparing"
	applyMoving    = "moving"
	applyDone      = "done"
)

// applyStep is one file. Paths are bytes: they need not be text.
type applyStep struct {
	Path []byte `json:"path"`
	// New is where the new content waits, empty for a deletion. Ino, Size and MTime tell
	// whether a file is that one: the number of an inode alone is given away again.
	New   []byte `json:"new,omitempty"`
	Ino   uint64 `json:"ino,omitempty"`
	Size  int64  `json:"size,omitempty"`
	MTime int64  `json:"mtime,omitempty"` // nanoseconds
	// Old is the second name of the old file, empty when there was none.
	Old []byte `json:"old,omitempty"`
}

// install puts the changes into the working tree.
func (s *applySession) install(ctx context.Context, changes []applyChange) error {
	j := s.plan(changes)
	if err := s.save(j, applyPreparing); err != nil {
		return err
	}
	err := s.prepareNew(ctx, j, changes)
	if err == nil {
		if err = s.save(j, applyMoving); err == nil {
			err = s.move(j, changes)
		}
	}
	if err == nil {
		err = s.save(j, applyDone)
	}
	if err != nil {
		if undoErr := s.undo(j, func(string, ...any) {}); undoErr != nil {
			return fmt.Errorf("%w; and cannot take it back: %w", err, undoErr)
		}
		return err
	}
	// From here on it has happened, whatever fails.
	return s.clear(j)
}

// at is a step that changes the working tree.
func (s *applySession) at(step, name string) error {
	if s.before == nil {
		return nil
	}
	return s.before(step + " " + name)
}

// plan chooses the other names. They lie in the folder of the file, or the nearest one
// above that is there and stays: a rename must not leave the file system.
func (s *applySession) plan(changes []applyChange) *applyJournal {
	j := &applyJournal{Version: 1}
	id := strings.ToLower(rand.Text()[:8])
	replaced := map[string]bool{}
	for _, c := range changes {
		if c.new.present {
			replaced[c.path] = true
		}
	}
	made := map[string]bool{}
	for i, c := range changes {
		dir := path.Dir(c.path)
		for d := dir; d != "."; d = path.Dir(d) {
			info, err := s.root.Lstat(d)
			stays := err == nil && info.IsDir()
			if c.new.present && !stays && !made[d] {
				made[d] = true
				j.Dirs = append(j.Dirs, []byte(d))
			}
			if !stays || replaced[d] {
				dir = path.Dir(d)
			}
		}
		step := applyStep{Path: []byte(c.path)}
		if c.new.present {
			step.New = []byte(path.Join(dir, fmt.Sprintf(".banger-apply-%s-%d.new", id, i)))
		}
		if c.old.present && c.old.kind != fs.ModeDir {
			step.Old = []byte(path.Join(dir, fmt.Sprintf(".banger-apply-%s-%d.old", id, i)))
		}
		j.Steps = append(j.Steps, step)
	}
	slices.SortFunc(j.Dirs, func(a, b []byte) int { return len(a) - len(b) })
	return j
}

// save writes the journal, whole or not at all, and waits for the disk.
func (s *applySession) save(j *applyJournal, state string) error {
	was := j.State
	j.State = state
	err := s.at("journal", state)
	if err == nil {
		err = s.writeJournal(j)
	}
	if err != nil {
		j.State = was
	}
	return err
}

func (s *applySession) writeJournal(j *applyJournal) error {
	data, err := json.Marshal(j)
	if err != nil {
		return err
	}
	tmp := s.file("journal.new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.file("journal")); err != nil {
		return err
	}
	return applySyncDir(s.dir)
}

func applySyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// prepareNew writes the new content beside the files.
func (s *applySession) prepareNew(ctx context.Context, j *applyJournal, changes []applyChange) error {
	copies, err := os.OpenRoot(s.file("tree"))
	if err != nil {
		return err
	}
	defer copies.Close()
	for i := range j.Steps {
		step, c := &j.Steps[i], changes[i]
		if step.New == nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := s.at("write", c.path); err != nil {
			return err
		}
		name := string(step.New)
		if c.new.kind == fs.ModeSymlink {
			err = s.root.Symlink(c.new.target, name)
		} else {
			err = s.writeNew(copies, c, name)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", cleanLine(c.path), err)
		}
		f, err := applyLook(s.root, name)
		if err != nil {
			return err
		}
		step.Ino, step.Size, step.MTime = f.id.Ino, f.id.Size, f.id.MTime
	}
	return nil
}

func (s *applySession) writeNew(copies *os.Root, c applyChange, name string) (err error) {
	in, err := copies.Open(c.path)
	if err != nil {
		return err
	}
	defer in.Close()
	mode := fs.FileMode(0o666)
	if c.new.executable {
		mode = 0o777
	}
	out, err := s.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if _, err := io.Copy(out, in); err != nil {
		return err
	}
	if c.old.present && c.old.kind == 0 {
		// The permissions stay, but for executing.
		info, err := s.root.Lstat(c.path)
		if err != nil {
			return err
		}
		perm := info.Mode().Perm() &^ 0o111
		if c.new.executable {
			perm |= perm & 0o444 >> 2
		}
		if err := out.Chmod(perm); err != nil {
			return err
		}
	}
	return out.Sync()
}

// move puts the old files away and the new ones into place.
func (s *applySession) move(j *applyJournal, changes []applyChange) error {
	for _, c := range changes {
		if err := applyUnchanged(s.root, c.path, c.old); err != nil {
			return err
		}
	}
	for i, step := range j.Steps {
		if step.Old == nil {
			continue
		}
		if err := s.at("put away", changes[i].path); err != nil {
			return err
		}
		if err := s.putAway(step, changes[i]); err != nil {
			return fmt.Errorf("%s: %w", cleanLine(changes[i].path), err)
		}
	}
	for _, c := range changes {
		if c.old.kind == fs.ModeDir && c.new.present {
			if err := s.removeFolders(c.path); err != nil {
				return fmt.Errorf("%s: %w", cleanLine(c.path), err)
			}
		}
	}
	for _, dir := range j.Dirs {
		if err := s.at("mkdir", string(dir)); err != nil {
			return err
		}
		if err := s.root.Mkdir(string(dir), 0o777); err != nil {
			return fmt.Errorf("%s: %w", cleanLine(string(dir)), err)
		}
	}
	for i, step := range j.Steps {
		if step.New == nil {
			continue
		}
		if err := s.at("rename", changes[i].path); err != nil {
			return err
		}
		if err := s.root.Rename(string(step.New), string(step.Path)); err != nil {
			return fmt.Errorf("%s: %w", cleanLine(changes[i].path), err)
		}
	}
	return nil
}

// putAway gives a file its second name. One that is replaced keeps the first one until
// then, where the file system can do that.
func (s *applySession) putAway(step applyStep, c applyChange) error {
	if c.new.present && s.root.Link(string(step.Path), string(step.Old)) == nil {
		return nil
	}
	return s.root.Rename(string(step.Path), string(step.Old))
}

// removeFolders removes a folder that holds nothing but folders.
func (s *applySession) removeFolders(name string) error {
	var dirs []string
	err := fs.WalkDir(s.root.FS(), name, func(n string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, n)
		}
		return err
	})
	for i := len(dirs) - 1; i >= 0 && err == nil; i-- {
		err = s.root.Remove(dirs[i])
	}
	return err
}

// removeFolder removes an empty folder, and nothing else: a file may have its name.
func (s *applySession) removeFolder(name string) error {
	info, err := s.root.Lstat(name)
	if err == nil && !info.IsDir() {
		err = unix.ENOTDIR
	}
	if err != nil {
		return err
	}
	return s.root.Remove(name)
}

// clear removes the second names, and folders that got empty by deletions, as git does.
func (s *applySession) clear(j *applyJournal) error {
	for _, step := range j.Steps {
		if step.Old != nil {
			if err := s.root.Remove(string(step.Old)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	for _, step := range j.Steps {
		for dir := path.Dir(string(step.Path)); step.New == nil && dir != "."; dir = path.Dir(dir) {
			if s.removeFolder(dir) != nil { // not empty
				break
			}
		}
	}
	return os.Remove(s.file("journal"))
}

// undo takes back what j did, as far as it came. It goes by what it finds.
func (s *applySession) undo(j *applyJournal, tell func(format string, args ...any)) error {
	for _, step := range j.Steps {
		if step.New == nil {
			continue
		}
		now, err := applyLook(s.root, string(step.Path))
		if err != nil {
			return err
		}
		// Still the file that was put there.
		if now.present && now.id.Ino == step.Ino && now.id.Size == step.Size && now.id.MTime == step.MTime {
			if err := s.at("take back", string(step.Path)); err != nil {
				return err
			}
			if step.Old != nil {
				err = s.root.Rename(string(step.Old), string(step.Path))
			} else {
				err = s.root.Remove(string(step.Path))
			}
			if err != nil {
				return err
			}
		}
		if err := s.root.Remove(string(step.New)); err != nil && !applyAbsent(err) {
			return err
		}
	}
	for i := len(j.Dirs) - 1; i >= 0; i-- {
		if j.State == applyMoving {
			_ = s.removeFolder(string(j.Dirs[i])) // unless something is in it
		}
	}
	for _, step := range j.Steps {
		if step.Old != nil {
			if err := s.restore(step, tell); err != nil {
				return err
			}
		}
	}
	if err := os.Remove(s.file("journal")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// restore gives an old file its first name again.
func (s *applySession) restore(step applyStep, tell func(format string, args ...any)) error {
	old, err := applyLook(s.root, string(step.Old))
	if err != nil || !old.present {
		return err
	}
	now, err := applyLook(s.root, string(step.Path))
	switch {
	case err != nil:
		return err
	case !now.present:
		if err := s.root.MkdirAll(path.Dir(string(step.Path)), 0o777); err != nil {
			return err
		}
		return s.root.Rename(string(step.Old), string(step.Path))
	case now.id.Ino == old.id.Ino && now.id.Dev == old.id.Dev:
		// Two names of one file: a rename would do nothing.
		return s.root.Remove(string(step.Old))
	}
	tell("%s was changed meanwhile and is left as it is; its former content is %s", cleanLine(string(step.Path)), cleanLine(string(step.Old)))
	return nil
}

func applyAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// recoverJournal ends an apply that was killed.
func (s *applySession) recoverJournal(tell func(format string, args ...any)) error {
	data, err := os.ReadFile(s.file("journal"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var j applyJournal
	if err := json.Unmarshal(data, &j); err != nil || j.Version != 1 {
		return api.Errorf(api.Refused, "an earlier apply left %s, which this banger does not understand", s.file("journal")).
			WithHint("git -C %s status", cleanLine(s.top))
	}
	if j.State == applyDone {
		if err := s.clear(&j); err != nil {
			return err
		}
		tell("an earlier apply was interrupted when all its changes were in place")
		return nil
	}
	if err := s.undo(&j, tell); err != nil {
		return fmt.Errorf("cannot take back an earlier apply that was interrupted: %w", err)
	}
	tell("an earlier apply was interrupted, and is taken back")
	return nil
}

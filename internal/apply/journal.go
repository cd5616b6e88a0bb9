package apply

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"banger/api"
)

// journal is GITDIR/banger-apply/journal, and says how far an apply has come: see the
// package. It is on the disk before what it says begins.
type journal struct {
	Version int     `json:"version"` // 1
	State   string  `json:"state"`
	Steps   []entry `json:"steps"`
	// Dirs are the folders that are made, from the top down.
	Dirs [][]byte `json:"dirs,omitempty"`
}

const (
	preparing = "preparing"
	moving    = "moving"
	done      = "done"
)

// entry is one file. Paths are bytes: they need not be text.
type entry struct {
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

// save writes the journal, whole or not at all, and waits for the disk.
func (s *session) save(j *journal, state string) error {
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

func (s *session) writeJournal(j *journal) error {
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
	return syncDir(s.dir)
}

// sync waits until the working tree is on the disk, all at once: its folders may be many.
func (s *session) sync() error {
	if err := s.at("sync", s.top); err != nil {
		return err
	}
	top, err := s.root.Open(".")
	if err != nil {
		return err
	}
	defer top.Close()
	if err := unix.Syncfs(int(top.Fd())); err != nil {
		return fmt.Errorf("cannot sync %s: %w", shown(s.top), err)
	}
	return nil
}

func syncDir(dir string) error {
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

// clear removes the second names, and folders that got empty by deletions, as git does. The
// journal goes last: it stays when something else does.
func (s *session) clear(j *journal) error {
	var left []string
	var failed error
	remove := func(name string, with func(string) error) {
		err := s.at("clear", name)
		if err == nil {
			err = with(name)
		}
		if err != nil && !absent(err) {
			left = append(left, name)
			failed = cmp.Or(failed, err)
		}
	}
	for _, step := range j.Steps {
		if step.Old != nil {
			remove(string(step.Old), s.root.Remove)
		}
	}
	for _, step := range j.Steps {
		for dir := path.Dir(string(step.Path)); step.New == nil && dir != "."; dir = path.Dir(dir) {
			if s.removeFolder(dir) != nil { // not empty
				break
			}
		}
	}
	if failed == nil {
		remove(s.file("journal"), os.Remove)
	}
	if failed == nil {
		return nil
	}
	var of *fs.PathError
	if errors.As(failed, &of) {
		failed = of.Err
	}
	return fmt.Errorf("cannot remove %s: %w", list(left), failed)
}

// undo takes back what j did, as far as it came. It goes by what it finds.
func (s *session) undo(j *journal) error {
	for _, step := range j.Steps {
		if step.New == nil {
			continue
		}
		now, err := look(s.root, string(step.Path))
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
		if err := s.root.Remove(string(step.New)); err != nil && !absent(err) {
			return err
		}
	}
	for i := len(j.Dirs) - 1; i >= 0; i-- {
		if j.State == moving {
			_ = s.removeFolder(string(j.Dirs[i])) // unless something is in it
		}
	}
	for _, step := range j.Steps {
		if step.Old != nil {
			if err := s.restore(step); err != nil {
				return err
			}
		}
	}
	if j.State == moving {
		if err := s.sync(); err != nil {
			return err
		}
	}
	if err := os.Remove(s.file("journal")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// restore gives an old file its first name again.
func (s *session) restore(step entry) error {
	old, err := look(s.root, string(step.Old))
	if err != nil || !old.present {
		return err
	}
	now, err := look(s.root, string(step.Path))
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
	s.note("%s was changed meanwhile and is left as it is; its former content is %s", shown(string(step.Path)), shown(string(step.Old)))
	return nil
}

func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR)
}

// removeFolder removes an empty folder, and nothing else: a file may have its name.
func (s *session) removeFolder(name string) error {
	info, err := s.root.Lstat(name)
	if err == nil && !info.IsDir() {
		err = unix.ENOTDIR
	}
	if err != nil {
		return err
	}
	return s.root.Remove(name)
}

// recover ends an apply that was killed, or that could not clear up.
func (s *session) recover() error {
	data, err := os.ReadFile(s.file("journal"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var j journal
	if err := json.Unmarshal(data, &j); err != nil || j.Version != 1 {
		return api.Errorf(api.Refused, "an earlier apply left %s, which this banger does not understand", shown(s.file("journal"))).
			WithHint("git -C %s status", shown(s.top))
	}
	if j.State == done {
		s.note("an earlier apply did not come to its end; all its changes are in place")
		if err := s.clear(&j); err != nil {
			s.note("%v", err)
		}
		return nil
	}
	if err := s.undo(&j); err != nil {
		return fmt.Errorf("cannot take back an earlier apply that was interrupted: %w", err)
	}
	s.note("an earlier apply was interrupted, and is taken back")
	return nil
}

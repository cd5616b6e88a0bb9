package apply

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"banger/api"
)

// journal is GITDIR/banger-apply/journal, and says how far an apply has come: see the
// package. It is on the disk before what it says begins. Done is no state but another name,
// done-ID: to say it, or to take that back, needs no room on the disk, and the next apply
// has its own journal while this one tells what is still to be removed.
type journal struct {
	Version int     `json:"version"`
	ID      string  `json:"id"` // is in all names that are given
	State   string  `json:"state"`
	Steps   []entry `json:"steps"`
	// Dirs are the folders that are made, from the top down.
	Dirs [][]byte `json:"dirs,omitempty"`
}

// version is that of the journal's form.
const version = 2

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

// placed tells that a file is still the one that was put there.
func (e *entry) placed(f file) bool {
	return e.New != nil && f.present && f.id.Ino == e.Ino && f.id.Size == e.Size && f.id.MTime == e.MTime
}

// save writes the journal, whole or not at all, and waits for the disk.
func (s *session) save(j *journal, state string) error {
	was := j.State
	j.State = state
	err := s.at("journal", state)
	if err == nil {
		err = s.writeJournal(j)
	}
	if err == nil {
		err = s.syncJournal(state)
	}
	if err != nil {
		j.State = was
	}
	return err
}

// finish makes it done. After an error the journal may have either name.
func (s *session) finish(j *journal) error {
	if err := s.at("journal", done); err != nil {
		return err
	}
	if err := os.Rename(s.file("journal"), s.finished(j)); err != nil {
		return err
	}
	return s.syncJournal(done)
}

// reopen makes sure that it is not done, also after a power loss.
func (s *session) reopen(j *journal) error {
	if err := os.Rename(s.finished(j), s.file("journal")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.syncJournal(moving)
}

func (s *session) finished(j *journal) string { return s.file(done + "-" + j.ID) }

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
	return os.Rename(tmp, s.file("journal"))
}

// syncJournal waits until the name of the journal is on the disk.
func (s *session) syncJournal(state string) error {
	if err := s.at("sync", state); err != nil {
		return err
	}
	f, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
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

// failures are the files of which something failed, and the first cause.
type failures struct {
	names []string
	cause error
}

func (f *failures) add(name string, err error) {
	if err == nil {
		return
	}
	var errno unix.Errno
	if errors.As(err, &errno) {
		err = errno // without the names around it
	}
	f.names = append(f.names, name)
	f.cause = cmp.Or(f.cause, err)
}

func (f *failures) err(verb string) error {
	if f.cause == nil {
		return nil
	}
	return fmt.Errorf("cannot %s %s: %w", verb, list(f.names), f.cause)
}

// clear removes the second names, and folders that got empty by deletions, as git does. The
// journal goes last: it stays when something else does.
func (s *session) clear(j *journal) error {
	var failed failures
	remove := func(name string, with func(string) error) {
		err := s.at("clear", name)
		if err == nil {
			err = with(name)
		}
		if !absent(err) {
			failed.add(name, err)
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
	if failed.cause == nil {
		remove(s.finished(j), os.Remove)
	}
	return failed.err("remove")
}

// undo takes back what j did, as far as it came. It goes by what it finds. The error says
// what came of it.
func (s *session) undo(j *journal) error {
	if j.State == moving {
		if err := s.reopen(j); err != nil {
			return fmt.Errorf("cannot take it back: %w", err)
		}
	}
	if err := s.takeBack(j); err != nil {
		return err
	}
	if j.State == moving {
		if err := s.sync(); err != nil {
			return fmt.Errorf("it is taken back, but that may not be on the disk: %w", err)
		}
	}
	if err := os.Remove(s.file("journal")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it is taken back, but its journal stays: %w", err)
	}
	return nil
}

// takeBack does what it can: it goes on after an error.
func (s *session) takeBack(j *journal) error {
	var failed failures
	for _, step := range j.Steps {
		if step.New != nil {
			failed.add(string(step.Path), s.withdraw(step))
		}
	}
	if j.State == moving {
		for _, dir := range slices.Backward(j.Dirs) {
			_ = s.removeFolder(string(dir)) // unless something is in it
		}
		for _, step := range j.Steps {
			if step.Old != nil {
				failed.add(string(step.Path), s.restore(step))
			}
		}
	}
	return failed.err("take back")
}

// withdraw takes a new file away.
func (s *session) withdraw(step entry) error {
	now, err := look(s.root, string(step.Path))
	if err != nil {
		return err
	}
	if step.placed(now) {
		if err := s.at("take back", string(step.Path)); err != nil {
			return err
		}
		if err := s.replace(step); err != nil {
			return err
		}
	}
	waits, err := look(s.root, string(step.New))
	if err == nil && waits.plain() {
		err = s.root.Remove(string(step.New))
	}
	return err
}

// replace gives the name of a new file to the old one, where there was one.
func (s *session) replace(step entry) error {
	if step.Old == nil {
		return s.root.Remove(string(step.Path))
	}
	old, err := look(s.root, string(step.Old))
	if err != nil || !old.plain() { // restore says so
		return err
	}
	return s.root.Rename(string(step.Old), string(step.Path))
}

// restore gives an old file its first name again.
func (s *session) restore(step entry) error {
	name, second := string(step.Path), string(step.Old)
	old, err := look(s.root, second)
	if err != nil {
		return err
	}
	now, err := look(s.root, name)
	if err != nil {
		return err
	}
	switch {
	case !old.plain():
		// When it is not there it was not put away yet or is back, or somebody removed it.
		if old.present || !now.present || step.placed(now) {
			s.note("%s is left as it is: somebody removed or replaced %s, its former content", shown(name), shown(second))
		}
		return nil
	case !now.present:
		err := s.root.MkdirAll(path.Dir(name), 0o777)
		if err == nil {
			return s.root.Rename(second, name)
		}
		if !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, fs.ErrExist) { // a file where the folder was
			return err
		}
	case now.id.Ino == old.id.Ino && now.id.Dev == old.id.Dev:
		// Two names of one file: a rename would do nothing.
		return s.root.Remove(second)
	case step.placed(now):
		return nil // withdraw has failed, and told why
	}
	s.note("%s was changed meanwhile and is left as it is; its former content is %s", shown(name), shown(second))
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

// recover ends an apply that was killed or not taken back, and those that could not clear up.
func (s *session) recover() error {
	if err := s.recoverUndone(); err != nil {
		return err
	}
	all, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	said := false
	for _, f := range all {
		if !strings.HasPrefix(f.Name(), done+"-") {
			continue
		}
		j, err := s.load(f.Name())
		if err != nil {
			s.note("%v", err)
			continue
		}
		if !said {
			said = true
			s.note("an earlier apply did not come to its end; all its changes are in place")
		}
		if err := s.clear(j); err != nil {
			s.note("%v", err)
		}
	}
	return nil
}

func (s *session) recoverUndone() error {
	j, err := s.load("journal")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	before := len(s.notes)
	if err := s.undo(j); err != nil {
		return api.Errorf(api.Internal, "an earlier apply did not come to its end; %w", err).WithHint("banger apply")
	}
	what := "it"
	if len(s.notes) > before { // on files that were left as they are
		what = "the rest of it"
	}
	s.note("an earlier apply did not come to its end; %s is taken back", what)
	return nil
}

func (s *session) load(name string) (*journal, error) {
	data, err := os.ReadFile(s.file(name))
	if err != nil {
		return nil, err
	}
	var j journal
	if err := json.Unmarshal(data, &j); err != nil || j.Version != version {
		return nil, api.Errorf(api.Refused, "an earlier apply left %s, which this banger does not understand; former contents lie under the names .banger-apply-*.old", shown(s.file(name))).
			WithHint("git -C %s status", shown(s.top))
	}
	return &j, nil
}

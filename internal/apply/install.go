package apply

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"

	"banger/api"
)

// install puts the changes into the working tree.
func (s *session) install(ctx context.Context, changes []change) error {
	j := s.plan(changes)
	err := s.save(j, preparing)
	if err == nil {
		err = s.prepareNew(ctx, j, changes)
	}
	if err == nil {
		err = s.save(j, moving)
	}
	if err == nil {
		err = s.move(j, changes)
	}
	if err == nil {
		// Or what a power loss leaves could be less than the journal says.
		err = s.sync()
	}
	if err == nil {
		err = s.finish(j)
	}
	if err != nil {
		if undoErr := s.undo(j); undoErr != nil {
			return api.Errorf(api.Internal, "%v; %w", err, undoErr).WithHint("banger apply")
		}
		return err
	}
	// From here on it has happened, whatever fails.
	if err := s.clear(j); err != nil {
		s.note("%v; the next apply tries again", err)
	}
	return nil
}

// plan chooses the other names. They lie in the folder of the file, or the nearest one
// above that is there and stays: a rename must not leave the file system.
func (s *session) plan(changes []change) *journal {
	j := &journal{Version: version, ID: strings.ToLower(rand.Text()[:8])}
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
		step := entry{Path: []byte(c.path)}
		if c.new.present {
			step.New = []byte(path.Join(dir, fmt.Sprintf(".banger-apply-%s-%d.new", j.ID, i)))
		}
		if c.old.present && c.old.kind != fs.ModeDir {
			step.Old = []byte(path.Join(dir, fmt.Sprintf(".banger-apply-%s-%d.old", j.ID, i)))
		}
		j.Steps = append(j.Steps, step)
	}
	slices.SortFunc(j.Dirs, func(a, b []byte) int { return len(a) - len(b) })
	return j
}

// prepareNew writes the new content beside the files.
func (s *session) prepareNew(ctx context.Context, j *journal, changes []change) error {
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
			return fmt.Errorf("%s: %w", shown(c.path), err)
		}
		f, err := look(s.root, name)
		if err != nil {
			return err
		}
		step.Ino, step.Size, step.MTime = f.id.Ino, f.id.Size, f.id.MTime
	}
	return nil
}

func (s *session) writeNew(copies *os.Root, c change, name string) (err error) {
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
func (s *session) move(j *journal, changes []change) error {
	for _, c := range changes {
		if err := unchanged(s.root, c.path, c.old); err != nil {
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
			return fmt.Errorf("%s: %w", shown(changes[i].path), err)
		}
	}
	for _, c := range changes {
		if c.old.kind == fs.ModeDir && c.new.present {
			if err := s.removeFolders(c.path); err != nil {
				return fmt.Errorf("%s: %w", shown(c.path), err)
			}
		}
	}
	for _, dir := range j.Dirs {
		if err := s.at("mkdir", string(dir)); err != nil {
			return err
		}
		if err := s.root.Mkdir(string(dir), 0o777); err != nil {
			return fmt.Errorf("%s: %w", shown(string(dir)), err)
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
			return fmt.Errorf("%s: %w", shown(changes[i].path), err)
		}
	}
	return nil
}

// putAway gives a file its second name. One that is replaced keeps the first one until
// then, where the file system can do that.
func (s *session) putAway(step entry, c change) error {
	if c.new.present && s.root.Link(string(step.Path), string(step.Old)) == nil {
		return nil
	}
	return s.root.Rename(string(step.Path), string(step.Old))
}

// removeFolders removes a folder that holds nothing but folders.
func (s *session) removeFolders(name string) error {
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

package apply

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"banger/api"
)

// session is one apply to one repository. Its folder in the git directory holds copies,
// and the journal.
type session struct {
	o      Options
	top    string // of the working tree
	root   *os.Root
	dir    string // GITDIR/banger-apply
	lock   *os.File
	format string // of objects
	from   io.ReaderAt
	size   int64 // of the patch
	notes  []string
}

func open(ctx context.Context, top string, patch *os.File, o Options) (_ *session, err error) {
	if info, err := os.Stat(top); err != nil || !info.IsDir() {
		return nil, api.Errorf(api.NotFound, "the repository %s is not there any more", shown(top))
	}
	info, err := patch.Stat()
	if err != nil {
		return nil, err
	}
	s := &session{o: o, top: top, from: patch, size: info.Size()}
	gitDir, err := s.repository(ctx, "rev-parse", "--absolute-git-dir")
	if answered(err) {
		return nil, api.Errorf(api.NotFound, "%s is no repository any more: %w", shown(top), err)
	}
	if err != nil {
		return nil, err
	}
	if s.format, err = s.repository(ctx, "rev-parse", "--show-object-format"); err != nil {
		return nil, err
	}
	s.dir = filepath.Join(gitDir, "banger-apply")
	s.lock, err = lockFolder(s.dir)
	if errors.Is(err, errLocked) {
		return nil, api.Errorf(api.Busy, "another apply to %s is under way", shown(top)).WithHint("banger diff")
	}
	if err != nil {
		return nil, err
	}
	if s.root, err = os.OpenRoot(top); err != nil {
		unlockFolder(s.dir, s.lock)
		return nil, err
	}
	return s, nil
}

// file is a path in the session's folder.
func (s *session) file(name string) string { return filepath.Join(s.dir, name) }

// close removes the folder, unless a journal in it is needed.
func (s *session) close() {
	for _, name := range []string{"git", "tree", "index", "index.lock", "journal.new"} {
		os.RemoveAll(s.file(name))
	}
	s.root.Close()
	unlockFolder(s.dir, s.lock)
}

func (s *session) note(format string, args ...any) {
	s.notes = append(s.notes, fmt.Sprintf(format, args...))
}

// at is a step that changes the working tree or the journal.
func (s *session) at(step, name string) error {
	if s.o.before == nil {
		return nil
	}
	return s.o.before(step + " " + name)
}

// patch reads the patch from its beginning.
func (s *session) patch() io.Reader { return io.NewSectionReader(s.from, 0, s.size) }

// repository asks git about the user's repository, with the user's configuration.
func (s *session) repository(ctx context.Context, args ...string) (string, error) {
	return git(ctx, s.top, quietEnv(), nil, args...)
}

// scratch makes an empty working tree and its git directory. Bytes stay as they are:
// info/attributes wins over every .gitattributes (see gitattributes(5)).
func (s *session) scratch() error {
	for _, name := range []string{"git", "tree"} {
		if err := os.RemoveAll(s.file(name)); err != nil {
			return err
		}
	}
	config := "[core]\n\trepositoryformatversion = 0\n\tbare = false\n\tsymlinks = true\n\tfilemode = true\n\tautocrlf = false\n"
	if s.format == "sha256" {
		config = strings.Replace(config, "= 0", "= 1", 1) + "[extensions]\n\tobjectformat = sha256\n"
	}
	for _, name := range []string{"git/objects", "git/refs", "git/info", "tree"} {
		if err := os.MkdirAll(s.file(name), 0o700); err != nil {
			return err
		}
	}
	for name, text := range map[string]string{
		"git/HEAD": "ref: refs/heads/apply\n", "git/config": config,
		"git/info/attributes": "* -text !eol !filter !ident !working-tree-encoding !whitespace\n",
	} {
		if err := os.WriteFile(s.file(name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// gitApply runs git apply with the patch on the copies.
func (s *session) gitApply(ctx context.Context, args ...string) (string, error) {
	env := quietEnv("GIT_DIR="+s.file("git"), "GIT_WORK_TREE="+s.file("tree"), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1")
	return git(ctx, s.file("tree"), env, s.patch(), append([]string{"apply"}, args...)...)
}

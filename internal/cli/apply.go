package cli

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/hostcmd"
)

// applyOptions are what apply was asked for.
type applyOptions struct {
	// branch puts the changes on a new branch of this name. The patch is from the commit
	// then (ExportWorkspaceRequest.from_head), else from the base.
	branch string
	check  bool
	vm     string // its name, for the message of the commit
}

// applyPatch puts a patch that comes from a guest onto the host's repository: onto its
// working tree, all or nothing, or onto a new branch. The index, and with a branch the
// working tree, stay as they are.
//
// The patch is hostile. git applies it to copies of the files that it names, in a git
// directory without the user's configuration, and the outcome is moved into place by
// this program (see applyJournal).
func (a *app) applyPatch(ctx context.Context, meta *bangerv1.ExportMeta, patch *os.File, o applyOptions) error {
	err := a.applyHere(ctx, meta, patch, o)
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	e := asError(err)
	if e.Code == api.Internal && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) {
		e = api.Errorf(api.NoSpace, "%w", err)
	}
	out := *e
	out.Message = "cannot apply: " + e.Message
	return &out
}

func (a *app) applyHere(ctx context.Context, meta *bangerv1.ExportMeta, patch *os.File, o applyOptions) error {
	s, err := openApply(ctx, meta.GetHostPath(), patch.Name())
	if err != nil {
		return err
	}
	defer s.close()
	if err := s.recoverJournal(a.ui.note); err != nil {
		return err
	}
	info, err := patch.Stat()
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		a.ui.note("nothing to apply")
		return nil
	}
	if err := applyForms(patch); err != nil {
		return err
	}
	if o.branch != "" {
		return a.applyBranch(ctx, s, meta.GetHead(), o)
	}
	return a.applyTree(ctx, s, o)
}

// applyTree applies to the working tree.
func (a *app) applyTree(ctx context.Context, s *applySession, o applyOptions) error {
	touched, err := s.touched(ctx)
	if err != nil {
		return err
	}
	changes, err := s.outcome(ctx, touched)
	if err != nil {
		return err
	}
	if err := s.checkPlaces(changes); err != nil {
		return err
	}
	switch {
	case len(changes) == 0:
		a.ui.note("nothing to apply: the host has these changes already")
		return nil
	case o.check:
		a.ui.note("it applies: %s", count(len(changes), "file"))
		return nil
	}
	if err := s.install(ctx, changes); err != nil {
		return err
	}
	a.ui.note("applied %s", count(len(changes), "file"))
	return nil
}

// applySession is one apply to one repository. Its folder in the git directory holds
// copies, and the journal.
type applySession struct {
	top    string // of the working tree
	root   *os.Root
	dir    string // GITDIR/banger-apply
	format string
	patch  string // absolute
	lock   *os.File
	// before is called ahead of each step that changes the working tree; nil outside of
	// tests.
	before func(step string) error
}

func openApply(ctx context.Context, top, patch string) (_ *applySession, err error) {
	if info, err := os.Stat(top); err != nil || !info.IsDir() {
		return nil, api.Errorf(api.NotFound, "the repository %s is not there any more", clean(top))
	}
	s := &applySession{top: top}
	if s.patch, err = filepath.Abs(patch); err != nil {
		return nil, err
	}
	gitDir, err := s.repository(ctx, nil, "rev-parse", "--absolute-git-dir")
	if err != nil {
		return nil, api.Errorf(api.NotFound, "%s is no repository any more: %w", clean(top), err)
	}
	if s.format, err = s.repository(ctx, nil, "rev-parse", "--show-object-format"); err != nil {
		return nil, err
	}
	s.dir = filepath.Join(gitDir, "banger-apply")
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, err
	}
	if s.lock, err = os.OpenFile(s.file("lock"), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.lock.Close()
		return nil, api.Errorf(api.Busy, "another apply to %s is under way", clean(top)).WithHint("banger diff")
	}
	if s.root, err = os.OpenRoot(top); err != nil {
		s.lock.Close()
		return nil, err
	}
	return s, nil
}

func (s *applySession) file(name string) string { return filepath.Join(s.dir, name) }

// close removes the folder, unless a journal in it is needed.
func (s *applySession) close() {
	for _, name := range []string{"git", "tree", "index", "index.lock"} {
		os.RemoveAll(s.file(name))
	}
	if _, err := os.Lstat(s.file("journal")); errors.Is(err, fs.ErrNotExist) {
		os.RemoveAll(s.dir)
	}
	s.root.Close()
	s.lock.Close()
}

// applyEnv keeps git from running what a repository names.
func applyEnv(extra ...string) []string {
	keys := []string{"core.hooksPath", "/dev/null", "core.fsmonitor", "false", "core.quotePath", "false",
		"core.protectHFS", "true", "core.protectNTFS", "true", "gc.auto", "0"}
	env := []string{"GIT_CONFIG_COUNT=" + strconv.Itoa(len(keys)/2), "GIT_OPTIONAL_LOCKS=0", "GIT_TERMINAL_PROMPT=0",
		"GIT_NO_LAZY_FETCH=1", "GIT_ALLOW_PROTOCOL=none", "GIT_NO_REPLACE_OBJECTS=1", "LC_ALL=C"}
	for i := 0; i < len(keys); i += 2 {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i/2, keys[i]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i/2, keys[i+1]))
	}
	return hostcmd.Env(append(env, extra...)...)
}

// repository runs git on the user's repository, with the user's configuration.
func (s *applySession) repository(ctx context.Context, in io.Reader, args ...string) (string, error) {
	return applyGit(ctx, s.top, applyEnv(), in, args...)
}

func applyGit(ctx context.Context, dir string, env []string, in io.Reader, args ...string) (string, error) {
	out, err := hostcmd.Run(ctx, hostcmd.Command{Argv: append([]string{"git"}, args...), Env: env, Dir: dir, Stdin: in})
	if errors.Is(err, exec.ErrNotFound) {
		return "", api.Errorf(api.NotReady, "git is not installed on this machine").WithHint("apt-get install git")
	}
	return strings.TrimSuffix(string(out), "\n"), err
}

// applyStderr is what git said.
func applyStderr(err error) string {
	var failed *hostcmd.Error
	if errors.As(err, &failed) {
		return failed.Stderr
	}
	return ""
}

// scratch makes an empty working tree and its git directory. Bytes stay as they are:
// info/attributes wins over every .gitattributes (see gitattributes(5)).
func (s *applySession) scratch() error {
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

// inScratch runs git on the copies.
func (s *applySession) inScratch(ctx context.Context, args ...string) (string, error) {
	env := applyEnv("GIT_DIR="+s.file("git"), "GIT_WORK_TREE="+s.file("tree"), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1")
	return applyGit(ctx, s.file("tree"), env, nil, args...)
}

// applyForms refuses a patch that banger does not make: it has no renames and copies,
// which name a second file, and no submodules. In a patch these lines cannot be the
// content of a file, which is indented by one character.
func applyForms(patch *os.File) error {
	if _, err := patch.Seek(0, io.SeekStart); err != nil {
		return err
	}
	in := bufio.NewReaderSize(patch, 64<<10)
	for whole := true; ; {
		line, isPrefix, err := in.ReadLine()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if whole {
			for _, form := range []string{"rename from ", "rename to ", "copy from ", "copy to ", "rename old ", "rename new "} {
				if bytes.HasPrefix(line, []byte(form)) {
					return applyMalformed("it renames or copies files")
				}
			}
			for _, form := range []string{"new file mode 16", "deleted file mode 16", "old mode 16", "new mode 16"} {
				if bytes.HasPrefix(line, []byte(form)) {
					return applyMalformed("it changes a submodule")
				}
			}
		}
		whole = !isPrefix
	}
}

func applyMalformed(why string) error {
	return api.Errorf(api.Refused, "the guest's patch is not one that banger makes: %s", why).WithHint("banger diff")
}

// applyTouched are the files that a patch names.
type applyTouched struct {
	paths   []string
	created map[string]bool
}

// touched reads the names of files out of the patch.
func (s *applySession) touched(ctx context.Context) (applyTouched, error) {
	t := applyTouched{created: map[string]bool{}}
	if err := s.scratch(); err != nil {
		return t, err
	}
	out, err := s.inScratch(ctx, "apply", "--numstat", "-z", "--", s.patch)
	if err != nil {
		return t, applyRefusal(err)
	}
	named := map[string]bool{}
	for item := range strings.SplitSeq(strings.TrimSuffix(out, "\x00"), "\x00") {
		// ADDED<tab>DELETED<tab>PATH
		f := strings.SplitN(item, "\t", 3)
		if len(f) != 3 || !applySafePath(f[2]) {
			return t, applyMalformed("it names the path " + strconv.Quote(f[len(f)-1]))
		}
		if !named[f[2]] {
			named[f[2]] = true
			t.paths = append(t.paths, f[2])
		}
	}
	summary, err := s.inScratch(ctx, "apply", "--summary", "--", s.patch)
	if err != nil {
		return t, applyRefusal(err)
	}
	for line := range strings.SplitSeq(summary, "\n") {
		if mode, ok := strings.CutPrefix(line, " create mode "); ok {
			if _, path, _ := strings.Cut(mode, " "); named[path] {
				t.created[path] = true
			}
		}
	}
	return t, nil
}

// applySafePath tells whether a path stays in the repository and out of its git
// directory, also on a file system that ignores case, as HFS+ and NTFS read names. git
// checks this too.
func applySafePath(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		name := strings.Map(func(r rune) rune {
			switch {
			case r >= 0x200c && r <= 0x200f, r >= 0x202a && r <= 0x202e, r >= 0x206a && r <= 0x206f, r == 0xfeff:
				return -1
			}
			return r
		}, part)
		name, _, _ = strings.Cut(name, ":")
		name = strings.TrimRight(name, ". ")
		if part == "" || part == "." || part == ".." || strings.EqualFold(name, ".git") || strings.EqualFold(name, "git~1") {
			return false
		}
	}
	return !strings.ContainsAny(path, "\x00")
}

// applyRefusal explains why git did not take the patch.
func applyRefusal(err error) error {
	says := applyStderr(err)
	if says == "" {
		return err
	}
	var names []string
	for line := range strings.SplitSeq(says, "\n") {
		line = strings.TrimPrefix(line, "error: ")
		for _, end := range []string{": patch does not apply", ": No such file or directory", ": already exists in working directory", ": already exists in index", ": does not exist in index", ": wrong type"} {
			if name, ok := strings.CutSuffix(line, end); ok {
				names = append(names, cleanLine(name))
			}
		}
	}
	if len(names) == 0 {
		return api.Errorf(api.Refused, "git does not take the patch: %w", err).WithHint("banger diff")
	}
	shown := strings.Join(names[:min(3, len(names))], ", ")
	if more := len(names) - 3; more > 0 {
		shown += fmt.Sprintf(" and %d more", more)
	}
	return api.Errorf(api.Refused, "the host's files have changed in the same places: %s", shown).WithHint("banger apply --branch NAME")
}

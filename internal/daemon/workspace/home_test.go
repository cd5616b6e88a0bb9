package workspace

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
)

func TestLinkedWorkTree(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	linked := filepath.Join(filepath.Dir(w.host), "linked")
	w.git(w.host, "worktree", "add", "-q", "-b", "side", linked)
	main := w.host
	w.host, w.inside = linked, filepath.Join(filepath.Dir(w.inside), "linked")
	write(t, linked, "a", "side\n")
	was, wasMain := state(t, linked, true), state(t, main, true)
	w.prepare()
	untouched(t, "linked", was, state(t, linked, true))
	untouched(t, "main", wasMain, state(t, main, true))
	want(t, "inside", tree(t, w.inside), tree(t, linked))
	want(t, "branch", w.git(w.inside, "branch", "--show-current"), "side")
	want(t, "status", w.git(w.inside, "status", "--porcelain"), " M a")
}

// stranger makes a folder beside the repository, as an archive from somewhere could.
func (w *world) stranger(fill func(dir string)) string {
	dir := filepath.Join(filepath.Dir(w.host), "stranger")
	check(w.t, os.MkdirAll(dir, 0o755))
	fill(dir)
	return dir
}

// disbelieved are git directories that are not the repository's own.
func disbelieved() map[string]refusal {
	return map[string]refusal{
		".git file of another repository": {api.Refused, []string{"its .git names", "which does not name"}, func(w *world) string {
			w.commit("private")
			return w.stranger(func(dir string) { write(w.t, dir, ".git", "gitdir: ../shop/.git\n") })
		}},
		".git file with a link back to a forged home": {api.Refused, []string{"its .git names"}, func(w *world) string {
			w.commit("private")
			return w.stranger(func(dir string) {
				write(w.t, dir, ".git", "gitdir: forged\n")
				write(w.t, dir, "forged/HEAD", "ref: refs/heads/main\n")
				write(w.t, dir, "forged/gitdir", filepath.Join(dir, ".git")+"\n")
				write(w.t, dir, "forged/commondir", "../../shop/.git\n")
			})
		}},
		".git is a link": {api.Refused, []string{"its .git names"}, func(w *world) string {
			w.commit("private")
			return w.stranger(func(dir string) { check(w.t, os.Symlink("../shop/.git", filepath.Join(dir, ".git"))) })
		}},
		"a branch is a link": {api.Refused, []string{"refs/heads/main is a symbolic link"}, func(w *world) string {
			w.commit("private")
			return w.stranger(func(dir string) {
				w.git(dir, "init", "-q", "-b", "main")
				write(w.t, dir, ".git/objects/info/alternates", "../../../shop/.git/objects\n")
				check(w.t, os.Symlink(w.host+"/.git/refs/heads/main", filepath.Join(dir, ".git/refs/heads/main")))
			})
		}},
		"HEAD names no branch": {api.Refused, []string{"its HEAD is refs/tags/main, which is no branch"}, func(w *world) string {
			w.commit("private")
			return w.stranger(func(dir string) {
				w.git(dir, "init", "-q", "-b", "main")
				write(w.t, dir, ".git/objects/info/alternates", "../../../shop/.git/objects\n")
				check(w.t, os.Remove(filepath.Join(dir, ".git/refs/tags")))
				check(w.t, os.Symlink(w.host+"/.git/refs/heads", filepath.Join(dir, ".git/refs/tags")))
				write(w.t, dir, ".git/HEAD", "ref: refs/tags/main\n")
			})
		}},
		"the index is a link": {api.Refused, []string{".git/index is no plain file"}, func(w *world) string {
			w.commit("private")
			return w.stranger(func(dir string) {
				w.git(dir, "init", "-q", "-b", "main")
				check(w.t, os.Symlink(w.host+"/.git/index", filepath.Join(dir, ".git/index")))
			})
		}},
		"core.worktree elsewhere": {api.Refused, []string{"is not the .git of"}, func(w *world) string {
			w.git(w.host, "config", "core.worktree", filepath.Dir(w.host))
			return w.host
		}},
	}
}

// apart makes a repository whose git directory is elsewhere.
func (w *world) apart() string {
	top := filepath.Dir(w.host)
	w.git(top, "init", "-q", "-b", "main", "--separate-git-dir", "apart.git", "apart")
	w.host, w.inside = filepath.Join(top, "apart"), filepath.Join(filepath.Dir(w.inside), "apart")
	return filepath.Join(top, "apart.git")
}

// A git directory elsewhere is the repository's own when it says so, and not because it
// knows the files: one git status in a forged folder sees to that.
func TestGitDirectoryApart(t *testing.T) {
	w := newWorld(t)
	gitDir := w.apart()
	write(t, w.host, "a", "a\n")
	write(t, w.host, "b", "b\n")
	w.commit("first")
	write(t, w.host, "a", "dirty\n")
	w.git(w.host, "status")
	_, err := w.m.Inspect(t.Context(), w.host)
	wantError(t, err, api.Refused, "which does not name")
	want(t, "hint", api.HintOf(err), "git config core.worktree "+w.host)
	link := filepath.Join(filepath.Dir(w.host), "link")
	check(t, os.Symlink("apart", link))
	for _, tree := range []string{w.host, "../apart", link} {
		w.git(w.host, "config", "core.worktree", tree)
		_, err = w.m.Inspect(t.Context(), w.host)
		check(t, err)
	}
	was, wasGit := state(t, w.host, true), state(t, gitDir, true)
	w.prepare()
	untouched(t, "host", was, state(t, w.host, true))
	untouched(t, "git directory", wasGit, state(t, gitDir, true))
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
	want(t, "status", w.git(w.inside, "status", "--porcelain"), " M a")
}

// The git directory of another repository is not believed, and the hint does not help to
// make it so.
func TestGitDirectoryOfAnother(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("private")
	dir := w.stranger(func(dir string) {
		write(t, dir, ".git", "gitdir: ../shop/.git\n")
		write(t, dir, "a", "a\n")
	})
	w.git(dir, "status")
	_, err := w.m.Inspect(t.Context(), dir)
	wantError(t, err, api.Refused, "which does not name")
	want(t, "hint", api.HintOf(err), "cat "+dir+"/.git")
}

// linked makes a linked working tree of the repository at main.
func (w *world) linked(main string) string {
	linked := filepath.Join(filepath.Dir(w.host), "linked")
	w.git(main, "worktree", "add", "-q", "-b", "side", linked)
	return linked
}

// The files by which a linked working tree and its git directory name each other may be
// relative, as "git worktree --relative-paths" writes them.
func TestLinkedWorkTreeRelative(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	linked := w.linked(w.host)
	write(t, linked, ".git", "gitdir: ../shop/.git/worktrees/linked\n")
	write(t, w.host, ".git/worktrees/linked/gitdir", "../../../../linked/.git\n")
	_, err := w.m.Inspect(t.Context(), linked)
	check(t, err)
	write(t, w.host, ".git/worktrees/linked/gitdir", "../../../linked/.git\n")
	_, err = w.m.Inspect(t.Context(), linked)
	wantError(t, err, api.Refused, "which does not name")
}

func TestLinkedWorkTreeMoved(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	linked := w.linked(w.host)
	moved := linked + "-moved"
	check(t, os.Rename(linked, moved))
	_, err := w.m.Inspect(t.Context(), moved)
	wantError(t, err, api.Refused, "its .git names", "which does not name "+moved)
	want(t, "hint", api.HintOf(err), "git worktree repair")
	w.git(moved, "worktree", "repair")
	_, err = w.m.Inspect(t.Context(), moved)
	check(t, err)

	// The main one moves.
	check(t, os.Rename(w.host, w.host+"-moved"))
	_, err = w.m.Inspect(t.Context(), moved)
	wantError(t, err, api.Refused, "its .git names "+w.host+"/.git/worktrees/linked, which is no git directory")
	w.git(w.host+"-moved", "worktree", "repair")
	_, err = w.m.Inspect(t.Context(), moved)
	check(t, err)
}

// A submodule by itself, and a linked working tree of it.
func TestSubmoduleAlone(t *testing.T) {
	w := newWorld(t)
	top := filepath.Dir(w.host)
	lib := filepath.Join(top, "lib")
	w.git(top, "init", "-q", "-b", "main", lib)
	write(t, lib, "a", "a\n")
	w.git(lib, "add", "a")
	w.git(lib, "commit", "-q", "-m", "lib")
	w.git(w.host, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", lib, "sub")
	sub := filepath.Join(w.host, "sub")
	_, err := w.m.Inspect(t.Context(), sub)
	check(t, err)
	w.host, w.inside = w.linked(sub), filepath.Join(filepath.Dir(w.inside), "linked")
	w.prepare()
	want(t, "inside", tree(t, w.inside), tree(t, lib))
	want(t, "branch", w.git(w.inside, "branch", "--show-current"), "side")
}

// soon is the error of fn, which waits for nothing that does not come.
func soon(t *testing.T, fn func(ctx context.Context) error) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- fn(ctx) }()
	select {
	case err := <-ended:
		if ctx.Err() != nil {
			t.Error("it waited for something")
		}
		return err
	case <-time.After(90 * time.Second):
		t.Fatal("it waits, also when nobody waits for it any more")
		return nil
	}
}

// Pipes where git has files are not waited for.
func TestPipesForGit(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	linked := w.linked(w.host)
	gitdir := filepath.Join(w.host, ".git/worktrees/linked/gitdir")
	check(t, os.Remove(gitdir))
	check(t, syscall.Mkfifo(gitdir, 0o600))
	alone := w.stranger(func(dir string) { check(t, syscall.Mkfifo(filepath.Join(dir, ".git"), 0o600)) })
	within := filepath.Join(w.host, "within")
	check(t, os.Mkdir(within, 0o755))
	check(t, syscall.Mkfifo(filepath.Join(within, ".git"), 0o600))
	var r Repo
	inspect := func(path string) error {
		return soon(t, func(ctx context.Context) (err error) {
			r, err = w.m.Inspect(ctx, path)
			return err
		})
	}
	wantError(t, inspect(linked), api.Refused, "worktrees/linked/gitdir is no plain file")
	if inspect(alone) == nil {
		t.Error("a pipe is a git directory")
	}
	// For git 2.39 it is nothing, and later ones may see an error in it.
	if inspect(within) == nil {
		want(t, "path", r.Path, w.host)
	}
	check(t, soon(t, func(ctx context.Context) error {
		_, err := w.tryPrepare(ctx)
		return err
	}))
}

// What keeps the git directory from being looked at is told as what it is.
func TestHomeThatCannotBeLookedAt(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	linked := w.linked(w.host)
	r, err := w.m.Locate(t.Context(), linked)
	check(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.checkHome(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	gitdir := filepath.Join(r.gitDir, "gitdir")
	check(t, os.Chmod(gitdir, 0))
	asAnother(t, w.host, func() { err = r.checkHome(t.Context()) })
	wantError(t, err, api.Refused, "cannot read "+gitdir+": permission denied")
	check(t, os.Chmod(gitdir, 0o644))

	loop := filepath.Join(filepath.Dir(w.host), "loop")
	check(t, os.Symlink("loop", loop))
	write(t, r.gitDir, "gitdir", loop+"\n")
	_, err = w.m.Locate(t.Context(), linked)
	wantError(t, err, api.Refused, "cannot read "+loop+": too many levels")
}

// asAnother calls fn without root's right to read everything. Processes that fn starts
// are as before.
func asAnother(t *testing.T, path string, fn func()) {
	t.Helper()
	if os.Getuid() == 0 {
		for dir := filepath.Dir(path); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
			check(t, os.Chmod(dir, 0o755))
		}
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		check(t, unix.Setfsuid(65534))
		defer func() { check(t, unix.Setfsuid(0)) }()
	}
	fn()
}

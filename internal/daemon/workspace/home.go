package workspace

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"banger/api"
)

// A repository may have been downloaded as it is, its .git included. What banger sends
// into a VM because .git says so must then be the repository's own: a link in it, or a
// path in its configuration, could name another repository or any file of the user.

// checkHome refuses a repository whose git directory is not its own.
func (r *Repo) checkHome(ctx context.Context) error {
	dotGit := filepath.Join(r.Path, ".git")
	git := repositoryGit(r.Path)
	there, err := git.line(ctx, "rev-parse", "--absolute-git-dir")
	if err != nil && !strings.Contains(gitSays(err), "not a git repository") {
		return noWorkTree(ctx, git, err)
	}
	info, statErr := os.Lstat(dotGit)
	switch {
	case err != nil, there != r.gitDir, errors.Is(statErr, fs.ErrNotExist):
		// core.worktree could name the home directory, and an index in it any file there.
		return api.Errorf(api.Refused, "its git directory %s is not the .git of %s", visible(r.gitDir), visible(r.Path)).
			WithHint("git config --unset core.worktree")
	case statErr != nil:
		return unreadable(dotGit, statErr)
	case info.Mode().IsRegular():
		if named, err := r.linkedBack(dotGit); err != nil {
			return err
		} else if !named {
			return r.notNamed()
		}
	case !info.IsDir() || r.gitDir != dotGit || r.commonDir != dotGit:
		return r.notNamed().WithHint("git clone %s", visible(r.Path))
	}
	return r.checkRefs()
}

// notNamed is the error for a .git file that is not believed.
func (r *Repo) notNamed() *api.Error {
	err := api.Errorf(api.Refused, "its .git names the git directory %s, which does not name %s", visible(r.gitDir), visible(r.Path))
	switch {
	case r.commonDir != r.gitDir:
		return err.WithHint("git worktree repair")
	case strings.Contains(r.gitDir+"/", "/.git/"):
		// It is that of another folder. To say more than what to look at would help whoever
		// made this one to get at it.
		return err.WithHint("cat %s", visible(filepath.Join(r.Path, ".git")))
	}
	err.Message += "; if this folder is yours, tell git"
	return err.WithHint("git config core.worktree %s", visible(r.Path))
}

// linkedBack tells whether the git directory that a .git file names says the same: that
// of a linked working tree does in its file gitdir, and lies where git puts these (see
// gitrepository-layout(5)); that of a submodule does in core.worktree. What "git init"
// and "git clone" make with --separate-git-dir says nothing, and nothing else in it can
// be believed: one "git status" in a folder that was made to deceive puts the inodes of
// that folder's files into the index.
func (r *Repo) linkedBack(dotGit string) (bool, error) {
	if r.commonDir == r.gitDir {
		tree := r.config["core.worktree"]
		if tree == "" {
			return false, nil
		}
		return samePath(r.gitDir, tree, r.Path)
	}
	if filepath.Dir(r.gitDir) != filepath.Join(r.commonDir, "worktrees") {
		return false, nil
	}
	name := filepath.Join(r.gitDir, "gitdir")
	f, err := openPlain(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	back, err := io.ReadAll(io.LimitReader(f, unix.PathMax+1))
	if err != nil {
		return false, unreadable(name, err)
	}
	return samePath(r.gitDir, strings.TrimSuffix(string(back), "\n"), dotGit)
}

// samePath tells whether name, relative to dir or absolute, is the file want.
func samePath(dir, name, want string) (bool, error) {
	if !filepath.IsAbs(name) {
		name = filepath.Join(dir, name)
	}
	a, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return false, nil
	}
	if err != nil {
		return false, unreadable(name, err)
	}
	b, err := os.Stat(want)
	if err != nil {
		return false, unreadable(want, err)
	}
	return os.SameFile(a, b), nil
}

// checkRefs refuses links where HEAD is looked up: they could name a commit of another
// repository, and alternates then bring its history in.
func (r *Repo) checkRefs() error {
	paths := []string{filepath.Join(r.gitDir, "HEAD"), filepath.Join(r.commonDir, "packed-refs"), filepath.Join(r.commonDir, "reftable")}
	for ref := "refs/heads/" + r.Branch; ref != "."; ref = filepath.Dir(ref) {
		paths = append(paths, filepath.Join(r.commonDir, ref))
	}
	for _, path := range paths {
		if info, err := os.Lstat(path); err == nil && info.Mode()&fs.ModeSymlink != 0 {
			return api.Errorf(api.Refused, "%s is a symbolic link; git directories with links cannot be brought in", visible(path)).
				WithHint("git clone %s", visible(r.Path))
		}
	}
	return nil
}

// openPlain opens a file of a git directory for reading: itself no link, and no pipe,
// which would wait for a writer.
func openPlain(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, notPlain(path)
	case errors.Is(err, fs.ErrNotExist):
		return nil, err
	case err != nil:
		return nil, unreadable(path, err)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, notPlain(path)
	}
	return f, nil
}

func notPlain(path string) error {
	return api.Errorf(api.Refused, "%s is no plain file", visible(path)).WithHint("ls -l %s", visible(path))
}

// unreadable is an error of a file that belongs to the repository.
func unreadable(path string, err error) error {
	var cause *fs.PathError
	if errors.As(err, &cause) {
		err = cause.Err
	}
	return api.Errorf(api.Refused, "cannot read %s: %w", visible(path), err).WithHint("ls -l %s", visible(path))
}

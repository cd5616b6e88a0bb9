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
	elsewhere := api.Errorf(api.Refused, "its git directory %s is not the .git of %s", visible(r.gitDir), visible(r.Path)).
		WithHint("git config --unset core.worktree")
	there, err := repositoryGit(r.Path).line(ctx, "rev-parse", "--absolute-git-dir")
	if err != nil || there != r.gitDir {
		// core.worktree could name the home directory, and an index in it any file there.
		return elsewhere
	}
	info, err := os.Lstat(dotGit)
	switch {
	case err != nil:
		return elsewhere
	case info.IsDir() && r.gitDir == dotGit && r.commonDir == dotGit:
	case info.Mode().IsRegular() && r.linkedBack(dotGit):
	default:
		err := api.Errorf(api.Refused, "its .git names the git directory %s, which does not name %s", visible(r.gitDir), visible(r.Path))
		switch {
		case !info.Mode().IsRegular():
			return err.WithHint("git clone %s", visible(r.Path))
		case r.commonDir != r.gitDir:
			return err.WithHint("git worktree repair")
		}
		return err.WithHint("git config core.worktree %s", visible(r.Path))
	}
	return r.checkRefs()
}

// linkedBack tells whether the git directory that a .git file names says the same: that
// of a linked working tree does in its file gitdir, and lies where git puts these (see
// gitrepository-layout(5)); that of a submodule, or one that the user keeps elsewhere,
// does in core.worktree.
func (r *Repo) linkedBack(dotGit string) bool {
	if r.commonDir != r.gitDir {
		if filepath.Dir(r.gitDir) != filepath.Join(r.commonDir, "worktrees") {
			return false
		}
		f, err := openPlain(filepath.Join(r.gitDir, "gitdir"))
		if err != nil {
			return false
		}
		defer f.Close()
		back, err := io.ReadAll(io.LimitReader(f, unix.PathMax+1))
		if err != nil {
			return false
		}
		return samePath(r.gitDir, strings.TrimSuffix(string(back), "\n"), dotGit)
	}
	tree := r.config["core.worktree"]
	return tree != "" && samePath(r.gitDir, tree, r.Path)
}

// samePath tells whether name, relative to dir or absolute, is the file want.
func samePath(dir, name, want string) bool {
	if !filepath.IsAbs(name) {
		name = filepath.Join(dir, name)
	}
	a, err := os.Lstat(name)
	if err != nil {
		return false
	}
	b, err := os.Lstat(want)
	return err == nil && os.SameFile(a, b)
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
	if err != nil && !errors.Is(err, unix.ELOOP) {
		return nil, err
	}
	if err == nil {
		info, serr := f.Stat()
		if serr == nil && info.Mode().IsRegular() {
			return f, nil
		}
		f.Close()
	}
	return nil, api.Errorf(api.Refused, "%s is no plain file", visible(path)).WithHint("ls -l %s", visible(path))
}

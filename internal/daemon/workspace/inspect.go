package workspace

import (
	"context"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unicode/utf8"

	"banger/api"
)

// Repo is a repository of the host, as it was looked at.
type Repo struct {
	Path   string // the real path of its top folder
	Prefix string // where the path that was asked for lies below Path, "" for the top
	Name   string // of the top folder, as it is: not yet a name for a VM
	// Head is the commit that is checked out, in full and short, empty without commits.
	Head, HeadShort string
	Branch          string // empty for a detached HEAD

	gitDir    string // of this working tree
	commonDir string // gitDir, or the main one of a linked working tree
	format    format
	shallow   bool
	config    map[string]string // keys in lower case but for subsections
	// ignores is the user's own list of ignored files; core.excludesfile in config may
	// be the repository's choice.
	ignores string
}

// Locate finds the repository that path, absolute, lies in. It refuses, in words,
// what has no working tree that can be brought in, and looks no further; Inspect does.
func (m *Manager) Locate(ctx context.Context, path string) (Repo, error) {
	r, err := locate(ctx, path)
	if err != nil {
		return Repo{}, explain(err, "cannot use %s", visible(path))
	}
	return r, nil
}

// Inspect is Locate, and refuses what Prepare would refuse, so that no VM is made in
// vain: a merge or its like under way, submodules that are checked out.
func (m *Manager) Inspect(ctx context.Context, path string) (Repo, error) {
	r, err := m.Locate(ctx, path)
	if err != nil {
		return Repo{}, err
	}
	s, err := m.openShadow(ctx, r)
	if err == nil {
		defer s.close()
		_, err = s.tracked(ctx)
	}
	if err != nil {
		return Repo{}, explain(err, "cannot use %s", visible(r.Path))
	}
	return r, nil
}

func locate(ctx context.Context, path string) (Repo, error) {
	real, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Repo{}, api.Errorf(api.NotFound, "there is no such folder")
	}
	if err != nil {
		return Repo{}, err
	}
	if info, err := os.Stat(real); err != nil {
		return Repo{}, err
	} else if !info.IsDir() {
		return Repo{}, api.Errorf(api.Invalid, "it is not a folder").WithHint("banger up %s", visible(filepath.Dir(real)))
	}
	git := repositoryGit(real)
	top, err := git.line(ctx, "rev-parse", "--show-toplevel")
	if err != nil {
		return Repo{}, noWorkTree(ctx, git, err)
	}
	r := Repo{Path: top, Name: filepath.Base(top)}
	if r.Path, err = filepath.EvalSymlinks(top); err != nil {
		return Repo{}, err
	}
	if r.Prefix, err = filepath.Rel(r.Path, real); err != nil {
		return Repo{}, err
	}
	if r.Prefix == "." {
		r.Prefix = ""
	}
	if !utf8.ValidString(r.Path) || strings.ContainsAny(r.Path, "\n\r\x1b") {
		return Repo{}, api.Errorf(api.Invalid, "its path is not valid text").WithHint("mv %s %s", visible(r.Path), "NEW-NAME")
	}
	if err := r.ask(ctx, git); err != nil {
		return Repo{}, err
	}
	return r, r.checkHome(ctx)
}

// ask fills in what git knows.
func (r *Repo) ask(ctx context.Context, git hostGit) (err error) {
	if r.gitDir, err = git.line(ctx, "rev-parse", "--absolute-git-dir"); err != nil {
		return err
	}
	if r.commonDir, err = git.line(ctx, "rev-parse", "--path-format=absolute", "--git-common-dir"); err != nil {
		return err
	}
	facts, err := git.line(ctx, "rev-parse", "--show-object-format", "--is-shallow-repository")
	if err != nil {
		return err
	}
	name, shallow, _ := strings.Cut(facts, "\n")
	r.format, r.shallow = format(name), shallow == "true"
	branch, _, err := git.ask(ctx, "symbolic-ref", "-q", "HEAD")
	if err != nil {
		return err
	}
	if branch != "" {
		var ok bool
		if r.Branch, ok = strings.CutPrefix(branch, "refs/heads/"); !ok {
			return api.Errorf(api.Refused, "its HEAD is %s, which is no branch", visible(branch)).WithHint("git switch --detach")
		}
	}
	head, born, err := git.ask(ctx, "rev-parse", "-q", "--verify", "HEAD^{commit}")
	if err != nil {
		return err
	}
	if born {
		r.Head = head
		if r.HeadShort, err = git.line(ctx, "rev-parse", "--short", head); err != nil {
			return err
		}
	}
	if r.config, err = readConfig(ctx, git); err != nil {
		return err
	}
	r.ignores, err = userIgnores(ctx, git)
	return err
}

func noWorkTree(ctx context.Context, git hostGit, cause error) error {
	if api.CodeOf(cause) == api.NotReady || ctx.Err() != nil {
		return cause
	}
	says := gitSays(cause)
	switch {
	case strings.Contains(says, "dubious ownership"):
		return api.Errorf(api.Refused, "the repository belongs to another user, so git does not trust it").
			WithHint("git config --global --add safe.directory %s", visible(git.dir))
	case strings.Contains(says, "not a git repository: "): // its path
		_, name, _ := strings.Cut(says, "not a git repository: ")
		name, _, _ = strings.Cut(name, "\n")
		return api.Errorf(api.Refused, "its .git names %s, which is no git directory", visible(name)).WithHint("ls -ld %s", visible(name))
	case strings.Contains(says, "not a git repository"):
		return api.Errorf(api.Invalid, "it is not in a git repository").WithHint("git init")
	case strings.Contains(says, "Permission denied"):
		return api.Errorf(api.Refused, "%w", cause).WithHint("ls -la %s", visible(git.dir))
	}
	bare, err := git.line(ctx, "rev-parse", "--is-bare-repository")
	switch {
	case err == nil && bare == "true":
		return api.Errorf(api.Invalid, "it is a bare repository, which has no files").WithHint("git clone %s", visible(git.dir))
	case err == nil:
		return api.Errorf(api.Invalid, "it lies inside the git directory of a repository").WithHint("cd %s", visible(aboveGit(git.dir)))
	}
	return cause
}

// aboveGit is the folder that a .git is in.
func aboveGit(dir string) string {
	top, _, _ := strings.Cut(dir+"/", "/.git/")
	return top
}

// readConfig reads the user's configuration and the repository's as one. Of keys with
// several values the last one wins.
func readConfig(ctx context.Context, git hostGit) (map[string]string, error) {
	out, err := git.run(ctx, nil, "config", "-z", "--list")
	if err != nil {
		return nil, err
	}
	config := map[string]string{}
	for _, item := range splitZ(out) {
		key, value, isSet := strings.Cut(item, "\n")
		if !isSet {
			value = "true"
		}
		config[key] = value
	}
	path, _, err := git.ask(ctx, "config", "--type=path", "--get", "core.excludesFile")
	config["core.excludesfile"] = path
	return config, err
}

// userIgnores is the path of the user's list of ignored files, as no configuration of
// the repository itself names it: its content goes into the VM.
func userIgnores(ctx context.Context, git hostGit) (string, error) {
	out, _, err := git.ask(ctx, "config", "-z", "--show-scope", "--type=path", "--get-all", "core.excludesFile")
	if err != nil {
		return "", err
	}
	path := ""
	for item := splitZ([]byte(out)); len(item) > 1; item = item[2:] { // SCOPE<nul>VALUE<nul>
		if scope := item[0]; scope != "local" && scope != "worktree" {
			path = item[1]
		}
	}
	if path != "" {
		return path, nil
	}
	dir := os.Getenv("XDG_CONFIG_HOME")
	if home, err := os.UserHomeDir(); dir == "" && err == nil {
		dir = filepath.Join(home, ".config")
	}
	return filepath.Join(dir, "git", "ignore"), nil // gitignore(5)
}

// promisor is the remote that a partial clone gets its missing objects from, or "".
func (r *Repo) promisor() string {
	if remote := r.config["extensions.partialclone"]; remote != "" {
		return remote
	}
	for key, value := range r.config {
		name, found := strings.CutPrefix(key, "remote.")
		if name, isPromisor := strings.CutSuffix(name, ".promisor"); found && isPromisor && value == "true" {
			return name
		}
	}
	return ""
}

// origin is the URL of the remote, without what authenticates somebody.
func (r *Repo) origin(remote string) string {
	return withoutCredentials(r.config["remote."+remote+".url"])
}

func withoutCredentials(raw string) string {
	if !strings.Contains(raw, "://") {
		return raw // a path, or user@host:path
	}
	u, err := url.Parse(raw)
	if err != nil {
		return ""
	}
	switch {
	case u.User == nil:
	case strings.HasSuffix(u.Scheme, "ssh"): // the user is part of the address
		u.User = url.User(u.User.Username())
	default:
		u.User = nil
	}
	return u.String()
}

// underWay refuses a repository in the middle of something: its index has more than
// one version of a file, and half of it would go in.
func (r *Repo) underWay() error {
	for _, op := range []struct{ file, name string }{
		{"MERGE_HEAD", "merge"},
		{"rebase-merge", "rebase"},
		{"rebase-apply/applying", "git am"},
		{"rebase-apply", "rebase"},
		{"CHERRY_PICK_HEAD", "cherry-pick"},
		{"REVERT_HEAD", "revert"},
	} {
		if _, err := os.Lstat(filepath.Join(r.gitDir, op.file)); err == nil {
			return api.Errorf(api.Refused, "a %s is under way; finish it first", op.name).WithHint("git status")
		}
	}
	return nil
}

// explain puts what was tried before err, and keeps its code and hint.
func explain(err error, format string, args ...any) error {
	if err == nil {
		return nil
	}
	code := api.CodeOf(err)
	if errors.Is(err, context.Canceled) && code == api.Internal {
		code = api.Cancelled
	}
	if errors.Is(err, syscall.ENOSPC) && code == api.Internal {
		code = api.NoSpace
	}
	out := api.Errorf(code, format+": %w", append(args, err)...)
	out.Hint = api.HintOf(err)
	return out
}

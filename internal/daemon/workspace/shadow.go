package workspace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"banger/api"
	"banger/internal/daemon/hostcmd"
)

// rawAttributes is info/attributes of our git directories. It wins over every
// .gitattributes (see gitattributes(5)), so bytes stay as they are: no end-of-line
// conversion, no filter as that of LFS, no keyword, no other encoding, no diff driver.
const rawAttributes = "* -text !eol !filter !ident !working-tree-encoding !diff\n"

// rawConfig is the whole configuration of our git directories.
func rawConfig(f format, extra ...string) []byte {
	var b bytes.Buffer
	version := 0
	if f == "sha256" {
		version = 1
	}
	fmt.Fprintf(&b, "[core]\n\trepositoryformatversion = %d\n\tbare = false\n\tfilemode = true\n\tsymlinks = true\n", version)
	fmt.Fprintf(&b, "\tautocrlf = false\n\tsafecrlf = false\n\thooksPath = /dev/null\n\tfsmonitor = false\n\tquotePath = false\n")
	for i := 0; i+1 < len(extra); i += 2 {
		fmt.Fprintf(&b, "\t%s = %s\n", extra[i], configQuote(extra[i+1]))
	}
	fmt.Fprintf(&b, "[gc]\n\tauto = 0\n[advice]\n\taddEmbeddedRepo = false\n")
	if f == "sha256" {
		fmt.Fprintf(&b, "[extensions]\n\tobjectformat = sha256\n")
	}
	return b.Bytes()
}

// configQuote writes a value of a git configuration file.
func configQuote(v string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "\t", `\t`, "\x00", "").Replace(v) + `"`
}

// shadow is a private git directory beside a repository of the host: its objects,
// borrowed, a copy of its index, our configuration. Commands that work in it leave
// the repository as it is to the byte, and run nothing that the repository names.
type shadow struct {
	repo    Repo
	dir     string
	git     hostGit
	objects objectDir
}

// openShadow makes the shadow below the manager's scratch directory.
func (m *Manager) openShadow(ctx context.Context, r Repo) (*shadow, error) {
	if err := r.underWay(); err != nil {
		return nil, err
	}
	if m.scratch != "" {
		if err := os.MkdirAll(m.scratch, 0o700); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(m.scratch, "banger-shadow-")
	if err != nil {
		return nil, err
	}
	s := &shadow{repo: r, dir: dir, objects: objectDir{dir: filepath.Join(dir, "objects"), format: r.format}}
	if err := s.build(); err != nil {
		s.close()
		return nil, err
	}
	s.git = hostGit{dir: r.Path, env: hostcmd.Env(append(quietEnv(), "GIT_DIR="+dir, "GIT_WORK_TREE="+r.Path,
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1")...)}
	return s, nil
}

func (s *shadow) close() { os.RemoveAll(s.dir) }

func (s *shadow) build() error {
	for _, d := range []string{"objects/info", "refs", "info"} {
		if err := os.MkdirAll(filepath.Join(s.dir, d), 0o700); err != nil {
			return err
		}
	}
	var extra []string
	if path := s.repo.config["core.excludesfile"]; path != "" {
		extra = []string{"excludesFile", path}
	}
	if s.repo.config["core.filemode"] == "false" {
		extra = append(extra, "filemode", "false")
	}
	config := rawConfig(s.repo.format, extra...)
	if s.sparseIndex() {
		config = append(config, "[core]\n\tsparseCheckout = true\n\tsparseCheckoutCone = true\n[index]\n\tsparse = true\n"...)
	}
	texts := map[string][]byte{
		"HEAD":                    []byte("ref: refs/heads/shadow\n"),
		"config":                  config,
		"objects/info/alternates": []byte(configQuote(filepath.Join(s.repo.commonDir, "objects")) + "\n"),
	}
	for name, text := range texts {
		if err := os.WriteFile(filepath.Join(s.dir, name), text, 0o600); err != nil {
			return err
		}
	}
	copies := map[string]string{
		"index":   filepath.Join(s.repo.gitDir, "index"),
		"shallow": filepath.Join(s.repo.commonDir, "shallow"),

		"info/sparse-checkout": filepath.Join(s.repo.gitDir, "info", "sparse-checkout"),
	}
	// A split index keeps most of itself in another file, and git sets the time of that
	// file whenever it reads the index.
	shared, err := filepath.Glob(filepath.Join(globQuote(s.repo.gitDir), "sharedindex.*"))
	if err != nil {
		return err
	}
	for _, path := range shared {
		copies[filepath.Base(path)] = path
	}
	for name, path := range copies {
		if err := copyFile(filepath.Join(s.dir, name), path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return s.takeExclude(filepath.Join(s.repo.commonDir, "info", "exclude"))
}

// takeExclude makes info/exclude. git follows links in its path, so the shadow does; it
// is a link there then, as nothing of what it names is sent.
func (s *shadow) takeExclude(path string) error {
	to := filepath.Join(s.dir, "info", "exclude")
	own, err := filepath.EvalSymlinks(s.repo.commonDir)
	if err != nil {
		return unreadable(s.repo.commonDir, err)
	}
	real, err := filepath.EvalSymlinks(path)
	var info fs.FileInfo
	if err == nil {
		info, err = os.Stat(real)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return unreadable(path, err)
	case !info.Mode().IsRegular():
		return notPlain(path)
	case real != filepath.Join(own, "info", "exclude"):
		return os.Symlink(path, to)
	}
	return copyFile(to, path)
}

// sparseIndex: the index has folders that are not checked out as one entry each. It is
// left so, since git would set the times of the trees that it puts files in the place of.
func (s *shadow) sparseIndex() bool { return s.repo.config["index.sparse"] == "true" }

func globQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(path)
}

func copyFile(to, from string) error {
	in, err := openPlain(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	// git suspects files that are as new as the index to have changed since.
	info, err := in.Stat()
	if err != nil {
		return err
	}
	return os.Chtimes(to, info.ModTime(), info.ModTime())
}

// indexed is a file as the index has it.
type indexed struct {
	entry
	skipped bool // sparse checkout: it is not on the disk on purpose
}

// tracked lists the index. It refuses what cannot be brought in.
func (s *shadow) tracked(ctx context.Context) (map[string]indexed, error) {
	args := []string{"ls-files", "-z", "-t", "-s", "--full-name"}
	if s.sparseIndex() {
		args = append(args, "--sparse")
	}
	out, err := s.git.run(ctx, nil, args...)
	if err != nil {
		return nil, err
	}
	index := map[string]indexed{}
	var submodules []string
	for _, item := range splitZ(out) {
		// "H 100644 OID 0<tab>PATH"
		meta, path, _ := strings.Cut(item, "\t")
		f := strings.Fields(meta)
		if len(f) != 4 || !isOID(f[2]) {
			return nil, fmt.Errorf("git ls-files said %q", visible(item))
		}
		if f[3] != "0" {
			return nil, api.Errorf(api.Refused, "%s is in conflict; resolve it first", visible(path)).WithHint("git status")
		}
		if !safePath(strings.TrimSuffix(path, "/")) {
			return nil, api.Errorf(api.Refused, "its index holds the path %s", visible(path)).WithHint("git fsck")
		}
		if f[1] == "040000" { // a folder of a sparse index
			list, _, err := s.tree(ctx, f[2])
			if err != nil {
				return nil, err
			}
			for name, e := range list {
				index[path+name] = indexed{entry: e, skipped: true}
			}
			continue
		}
		index[path] = indexed{entry: entry{f[1], f[2]}, skipped: f[0] == "S"}
		if f[1] == modeGitlink {
			if _, err := os.Lstat(filepath.Join(s.repo.Path, path, ".git")); err == nil {
				submodules = append(submodules, path)
			}
		}
	}
	if len(submodules) > 0 {
		slices.Sort(submodules)
		return nil, api.Errorf(api.Refused, "submodules cannot be brought in, and these are checked out: %s; a new working tree is without them", list(submodules)).
			WithHint("git worktree add ../%s-vm", visible(s.repo.Name))
	}
	return index, nil
}

// safePath tells whether git would take path into an index.
func safePath(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." || part == ".." || strings.EqualFold(part, ".git") {
			return false
		}
	}
	return !strings.Contains(path, "\x00")
}

// untracked lists the files that are neither in the index nor ignored.
func (s *shadow) untracked(ctx context.Context) ([]string, error) {
	out, err := s.git.run(ctx, nil, "ls-files", "-z", "-o", "--exclude-standard", "--full-name")
	if err != nil {
		return nil, err
	}
	// A repository inside the repository is listed as "name/", and stays out.
	return slices.DeleteFunc(splitZ(out), func(p string) bool { return strings.HasSuffix(p, "/") || !safePath(p) }), nil
}

// dirty lists the files that git thinks changed since they were put into the index.
func (s *shadow) dirty(ctx context.Context) (map[string]bool, error) {
	out, err := s.git.run(ctx, nil, "diff-files", "-z", "--name-only", "--no-renames", "--ignore-submodules=all")
	if err != nil {
		return nil, err
	}
	dirty := map[string]bool{}
	for _, path := range splitZ(out) {
		dirty[path] = true
	}
	return dirty, nil
}

// tree lists the files of a commit or tree, and all trees in it.
func (s *shadow) tree(ctx context.Context, oid string) (files, map[string]bool, error) {
	list, trees := files{}, map[string]bool{}
	if oid == "" {
		return list, trees, nil
	}
	out, err := s.git.run(ctx, nil, "ls-tree", "-z", "-r", "-t", "--full-tree", oid)
	if err != nil {
		return nil, nil, err
	}
	return list, trees, eachTreeItem(out, func(path, kind string, e entry) {
		if kind == "tree" {
			trees[e.oid] = true
		} else {
			list[path] = e
		}
	})
}

// eachTreeItem parses "MODE KIND OID<tab>PATH<nul>", the output of ls-tree -z.
func eachTreeItem(out []byte, fn func(path, kind string, e entry)) error {
	for _, item := range splitZ(out) {
		meta, path, ok := strings.Cut(item, "\t")
		f := strings.Fields(meta)
		if !ok || len(f) != 3 || !isOID(f[2]) {
			return fmt.Errorf("git ls-tree said %q", visible(item))
		}
		fn(path, f[1], entry{f[0], f[2]})
	}
	return nil
}

// has tells whether the repository has a commit.
func (s *shadow) has(ctx context.Context, oid string) bool {
	if !isOID(oid) {
		return false
	}
	_, err := s.git.run(ctx, nil, "cat-file", "-e", oid+"^{commit}")
	return err == nil
}

// isAncestor tells whether commit old is new or lies in its history.
func (s *shadow) isAncestor(ctx context.Context, old, new string) bool {
	if !s.has(ctx, old) || new == "" {
		return false
	}
	_, err := s.git.run(ctx, nil, "merge-base", "--is-ancestor", old, new)
	return err == nil
}

package apply

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/api"
)

// repo is a repository of the host, and a second one, "guest", in which patches
// are made.
type repo struct {
	t           *testing.T
	host, guest string
	head        string
	patch       string
	result      Result // of the last apply
}

func newRepo(t *testing.T, files map[string]string) *repo {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv("GIT_CONFIG_GLOBAL", filepath.Join(home, ".gitconfig"))
	t.Setenv("GIT_TEST_FSYNC", "0") // of the test's own git
	write(t, home, ".gitconfig", "[user]\n\tname = Ann\n\temail = ann@example.org\n")
	top := t.TempDir()
	r := &repo{t: t, host: filepath.Join(top, "host"), guest: filepath.Join(top, "guest"), patch: filepath.Join(top, "patch")}
	must(t, os.MkdirAll(r.host, 0o755))
	r.git(r.host, "init", "-q", "-b", "main")
	for name, text := range files {
		write(t, r.host, name, text)
	}
	r.git(r.host, "add", "-A")
	r.git(r.host, "commit", "-q", "--allow-empty", "-m", "first")
	r.head = r.git(r.host, "rev-parse", "HEAD")
	r.git(r.host, "clone", "-q", r.host, r.guest)
	return r
}

func (r *repo) git(dir string, args ...string) string {
	r.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		r.t.Fatalf("git %q: %v: %s", args, err, stderr.String())
	}
	return strings.TrimSuffix(string(out), "\n")
}

// diff makes the patch of what the guest has.
func (r *repo) diff() {
	r.t.Helper()
	r.git(r.guest, "add", "-A")
	must(r.t, os.WriteFile(r.patch, []byte(r.git(r.guest, "diff", "--cached", "--binary", "--full-index", "--no-renames", "HEAD")+"\n"), 0o644))
}

func (r *repo) apply(o Options) error {
	r.t.Helper()
	f, err := os.Open(r.patch)
	must(r.t, err)
	defer f.Close()
	if o.Branch != "" {
		o.Head, o.Message = r.head, "changes of the guest"
	}
	r.result, err = Patch(context.Background(), r.host, f, o)
	return err
}

// came compares what the last apply said, its commit apart.
func (r *repo) came(want Result) {
	r.t.Helper()
	got := r.result
	got.Commit = ""
	equal(r.t, "result", fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", want))
}

// noFolder makes sure that nothing is left in the git directory.
func (r *repo) noFolder(what string) {
	r.t.Helper()
	if _, err := os.Lstat(filepath.Join(r.host, ".git/banger-apply")); err == nil {
		r.t.Errorf("%s: the folder in .git is left", what)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

// state prints all below dir; with .git and its times when all is true.
func state(t *testing.T, dir string, all bool) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if name == ".git" && !all {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%q %v", name, info.Mode())
		if all && name != ".git" {
			fmt.Fprintf(&b, " %d", info.ModTime().UnixNano())
		}
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", data)
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			fmt.Fprintf(&b, " -> %q", target)
		}
		b.WriteString("\n")
		return nil
	}))
	return b.String()
}

func equal(t *testing.T, what, got, want string) {
	t.Helper()
	if got == want {
		return
	}
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for _, line := range g {
		if !slices.Contains(w, line) {
			t.Errorf("%s: is %.300s", what, line)
		}
	}
	for _, line := range w {
		if !slices.Contains(g, line) {
			t.Errorf("%s: is not %.300s", what, line)
		}
	}
}

func fails(t *testing.T, err error, code api.Code, parts ...string) {
	t.Helper()
	if err == nil || api.CodeOf(err) != code || api.HintOf(err) == "" && code != api.NotFound {
		t.Fatalf("error is %v, code %s, hint %q; want %s and a hint", err, api.CodeOf(err), api.HintOf(err), code)
	}
	for _, p := range append(parts, "cannot apply: ") {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error is %q, want %q in it", err, p)
		}
	}
}

// busy is a repository with a patch that does all that a patch can do.
func busy(t *testing.T) *repo {
	r := newRepo(t, map[string]string{
		"edited": "1\n2\n3\n", "mode": "x\n", "gone": "gone\n", "dir/only": "only\n", "todir": "file\n", "tofile/a": "a\n", "tofile/b/c": "c\n",
		"untouched": "u\n", "caf\xe9\n": "odd\n", "-rf": "dash\n", "bin": "\x00\x01\xff",
	})
	g := r.guest
	write(t, g, "edited", "1\n2 inside\n3\n")
	must(t, os.Chmod(filepath.Join(g, "mode"), 0o755))
	must(t, os.Remove(filepath.Join(g, "gone")))
	must(t, os.RemoveAll(filepath.Join(g, "dir")))
	must(t, os.Remove(filepath.Join(g, "todir")))
	write(t, g, "todir/deep/file", "in a folder\n")
	must(t, os.RemoveAll(filepath.Join(g, "tofile")))
	write(t, g, "tofile", "a file\n")
	write(t, g, "new/deep/file", "new\n")
	must(t, os.Symlink("edited", filepath.Join(g, "link")))
	write(t, g, "caf\xe9\n", "odd inside\n")
	write(t, g, "-rf", "dash inside\n")
	write(t, g, "bin", "\x00\x02\xff")
	r.diff()
	return r
}

func TestApply(t *testing.T) {
	r := busy(t)
	index := state(t, filepath.Join(r.host, ".git"), true)
	before := state(t, r.host, false)
	must(t, r.apply(Options{Check: true}))
	r.came(Result{Files: 14})
	equal(t, "after the check", state(t, r.host, false), before)
	must(t, r.apply(Options{}))
	equal(t, "working tree", state(t, r.host, false), state(t, r.guest, false))
	// The folder for the copies comes and goes.
	now := state(t, filepath.Join(r.host, ".git"), true)
	_, index, _ = strings.Cut(index, "\n")
	_, now, _ = strings.Cut(now, "\n")
	equal(t, ".git", now, index)
	r.came(Result{Files: 14})
	// Once more: it is there.
	must(t, r.apply(Options{}))
	r.came(Result{Present: true})
	equal(t, "working tree", state(t, r.host, false), state(t, r.guest, false))
}

func TestNothing(t *testing.T) {
	r := newRepo(t, map[string]string{"a": "a\n"})
	write(t, filepath.Dir(r.patch), "patch", "")
	for _, o := range []Options{{}, {Check: true}, {Branch: "x"}} {
		must(t, r.apply(o))
		r.came(Result{})
	}
}

// The host went on meanwhile: what does not touch is merged, by context.
func TestOntoOtherChanges(t *testing.T) {
	text := strings.Repeat("line\n", 20)
	r := newRepo(t, map[string]string{"a": text, "b": "b\n"})
	write(t, r.guest, "a", text+"inside\n")
	r.diff()
	write(t, r.host, "a", "host\n"+text)
	write(t, r.host, "b", "host\n")
	must(t, os.Chmod(filepath.Join(r.host, "a"), 0o640))
	must(t, r.apply(Options{}))
	data, err := os.ReadFile(filepath.Join(r.host, "a"))
	must(t, err)
	if string(data) != "host\n"+text+"inside\n" {
		t.Errorf("a is %q", data)
	}
	if info, _ := os.Stat(filepath.Join(r.host, "a")); info.Mode().Perm() != 0o640 {
		t.Errorf("mode is %v", info.Mode())
	}
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct {
		code  api.Code
		parts []string
		make  func(r *repo)
	}{
		"conflict":                   {api.Refused, []string{"changed in the same places: edited"}, func(r *repo) { write(r.t, r.host, "edited", "1\n2 host\n3\n") }},
		"deleted":                    {api.Refused, []string{"changed in the same places: edited"}, func(r *repo) { must(r.t, os.Remove(filepath.Join(r.host, "edited"))) }},
		"created":                    {api.Refused, []string{"new/deep/file is on the host already"}, func(r *repo) { write(r.t, r.host, "new/deep/file", "host\n") }},
		"binary":                     {api.Refused, []string{"bin"}, func(r *repo) { write(r.t, r.host, "bin", "\x00host") }},
		"a file where a folder goes": {api.Refused, []string{"new is not a folder"}, func(r *repo) { write(r.t, r.host, "new", "file\n") }},
		"a link where a folder goes": {api.Refused, []string{"new is not a folder"}, func(r *repo) {
			must(r.t, os.Symlink(r.t.TempDir(), filepath.Join(r.host, "new")))
		}},
		"a folder becomes a link": {api.Refused, nil, func(r *repo) {
			other := r.t.TempDir()
			write(r.t, other, "only", "only\n")
			must(r.t, os.RemoveAll(filepath.Join(r.host, "dir")))
			must(r.t, os.Symlink(other, filepath.Join(r.host, "dir")))
		}},
		"a folder with more in it": {api.Refused, []string{"tofile/mine is in it"}, func(r *repo) { write(r.t, r.host, "tofile/mine", "x") }},
		"a pipe": {api.Refused, []string{"neither a file"}, func(r *repo) {
			must(r.t, os.Remove(filepath.Join(r.host, "edited")))
			must(r.t, unix.Mkfifo(filepath.Join(r.host, "edited"), 0o600))
		}},
		"garbage": {api.Refused, []string{"does not take the patch"}, func(r *repo) { write(r.t, filepath.Dir(r.patch), "patch", "garbage\n") }},
		"cut":     {api.Refused, nil, func(r *repo) { must(r.t, os.Truncate(r.patch, 700)) }},
		"a name with escapes": {api.Refused, []string{`changed in the same places: evil`}, func(r *repo) {
			write(r.t, filepath.Dir(r.patch), "patch", "diff --git \"a/evil\\033[2J\" \"b/evil\\033[2J\"\n--- \"a/evil\\033[2J\"\n+++ \"b/evil\\033[2J\"\n@@ -1 +1 @@\n-a\n+b\n")
		}},
		"no repository":    {api.NotFound, []string{"not there any more"}, func(r *repo) { must(r.t, os.RemoveAll(r.host)) }},
		"no git directory": {api.NotFound, []string{"no repository any more"}, func(r *repo) { must(r.t, os.RemoveAll(filepath.Join(r.host, ".git"))) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := busy(t)
			c.make(r)
			before := ""
			if c.code != api.NotFound {
				before = state(t, r.host, false)
			}
			for _, check := range []bool{true, false} {
				err := r.apply(Options{Check: check})
				fails(t, err, c.code, c.parts...)
				if strings.ContainsAny(err.Error(), "\x1b") {
					t.Errorf("error has escapes: %q", err)
				}
			}
			if c.code != api.NotFound {
				equal(t, "working tree", state(t, r.host, false), before)
				r.noFolder("refused")
			}
		})
	}
}

// What a hostile guest may send. Nothing outside of the working tree is written.
func TestHostile(t *testing.T) {
	create := func(path string) string {
		return fmt.Sprintf("diff --git a/%[1]s b/%[1]s\nnew file mode 100644\nindex 0000000..e69de29\n--- /dev/null\n+++ b/%[1]s\n@@ -0,0 +1 @@\n+evil\n", path)
	}
	patches := map[string]string{
		"rename":    "diff --git a/a b/b\nsimilarity index 100%\nrename from a\nrename to b\n",
		"copy":      "diff --git a/a b/b\nsimilarity index 100%\ncopy from a\ncopy to b\n",
		"submodule": "diff --git a/sub b/sub\nnew file mode 160000\nindex 0000000..1234567\n--- /dev/null\n+++ b/sub\n@@ -0,0 +1 @@\n+Subproject commit 1234567890123456789012345678901234567890\n",
		"through a link": "diff --git a/l b/l\nnew file mode 120000\n--- /dev/null\n+++ b/l\n@@ -0,0 +1 @@\n+OUTSIDE\n\\ No newline at end of file\n" +
			create("l/evil"),
		"old style": "--- a/../evil\n+++ b/../evil\n@@ -0,0 +1 @@\n+evil\n",
	}
	for _, path := range []string{"../evil", "x/../../evil", ".git/hooks/post-checkout", ".GIT/config", ".git./config", ".git /config", "git~1/config", "x/.git/config",
		".gi\u200ct/config", "./evil", "x//evil", ".git:evil/x", ".git"} {
		patches["path "+path] = create(path)
	}
	for name, text := range patches {
		t.Run(name, func(t *testing.T) {
			r := newRepo(t, map[string]string{"a": "a\n"})
			outside := filepath.Join(filepath.Dir(r.host), "outside")
			must(t, os.Mkdir(outside, 0o755))
			write(t, filepath.Dir(r.patch), "patch", strings.ReplaceAll(text, "OUTSIDE", outside))
			before := state(t, filepath.Dir(r.host), false)
			gitDir := func() string {
				_, s, _ := strings.Cut(state(t, filepath.Join(r.host, ".git"), true), "\n")
				return s
			}
			wasGit := gitDir()
			fails(t, r.apply(Options{}), api.Refused)
			equal(t, ".git", gitDir(), wasGit)
			fails(t, r.apply(Options{Branch: "evil"}), api.Refused)
			equal(t, "files", state(t, filepath.Dir(r.host), false), before)
			if got := r.git(r.host, "branch", "--list", "evil"); got != "" {
				t.Errorf("a branch was made: %s", got)
			}
		})
	}
}

func TestSafePath(t *testing.T) {
	for _, path := range []string{"a", ".gitignore", ".gitattributes", "a/.github/x", "git", "..a", "a..", "caf\xe9", ".gitmodules", "-x"} {
		if !safePath(path) {
			t.Errorf("%q is refused", path)
		}
	}
	for _, path := range []string{"", "/a", "a/", "a//b", ".", "..", "a/../b", ".git", ".Git/x", ".git.../x", ".git::$INDEX_ALLOCATION/x", "GIT~1", ".g\u200dit", "a\x00b"} {
		if safePath(path) {
			t.Errorf("%q is let through", path)
		}
	}
}

// Attributes and configuration of the user do not change bytes, and run nothing.
func TestRaw(t *testing.T) {
	r := newRepo(t, map[string]string{"a.txt": "1\r\n2\r\n"})
	trap := filepath.Join(filepath.Dir(r.host), "trap")
	write(t, r.guest, "a.txt", "1\r\n2 inside\r\n")
	write(t, r.guest, ".gitattributes", "*.txt text eol=lf filter=evil\n")
	must(t, os.WriteFile(r.patch, nil, 0o644))
	r.git(r.guest, "-c", "core.autocrlf=false", "add", "-N", ".gitattributes")
	write(t, r.guest, ".git/info/attributes", "* -text !filter !eol\n")
	r.diff()
	for _, kv := range []string{"filter.evil.smudge=touch " + trap, "filter.evil.clean=touch " + trap, "core.autocrlf=true", "apply.whitespace=fix", "core.fsmonitor=touch " + trap} {
		key, value, _ := strings.Cut(kv, "=")
		r.git(r.host, "config", "--global", key, value)
	}
	must(t, r.apply(Options{}))
	data, err := os.ReadFile(filepath.Join(r.host, "a.txt"))
	must(t, err)
	if string(data) != "1\r\n2 inside\r\n" {
		t.Errorf("a.txt is %q", data)
	}
	if _, err := os.Stat(trap); err == nil {
		t.Error("a program of the configuration was run")
	}
}

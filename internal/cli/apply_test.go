package cli

import (
	"bytes"
	"context"
	"errors"
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
	bangerv1 "banger/api/banger/v1"
)

// applyRepo is a repository of the host, and a second one, "guest", in which patches
// are made.
type applyRepo struct {
	t           *testing.T
	host, guest string
	head        string
	patch       string
	stderr      bytes.Buffer
}

func newApplyRepo(t *testing.T, files map[string]string) *applyRepo {
	t.Helper()
	home := t.TempDir()
	t.Setenv("HOME", home)
	t.Setenv("XDG_CONFIG_HOME", home)
	t.Setenv("GIT_CONFIG_GLOBAL", filepath.Join(home, ".gitconfig"))
	t.Setenv("GIT_TEST_FSYNC", "0") // of the test's own git
	applyWrite(t, home, ".gitconfig", "[user]\n\tname = Ann\n\temail = ann@example.org\n")
	top := t.TempDir()
	r := &applyRepo{t: t, host: filepath.Join(top, "host"), guest: filepath.Join(top, "guest"), patch: filepath.Join(top, "patch")}
	applyMust(t, os.MkdirAll(r.host, 0o755))
	r.git(r.host, "init", "-q", "-b", "main")
	for name, text := range files {
		applyWrite(t, r.host, name, text)
	}
	r.git(r.host, "add", "-A")
	r.git(r.host, "commit", "-q", "--allow-empty", "-m", "first")
	r.head = r.git(r.host, "rev-parse", "HEAD")
	r.git(r.host, "clone", "-q", r.host, r.guest)
	return r
}

func (r *applyRepo) git(dir string, args ...string) string {
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
func (r *applyRepo) diff() {
	r.t.Helper()
	r.git(r.guest, "add", "-A")
	applyMust(r.t, os.WriteFile(r.patch, []byte(r.git(r.guest, "diff", "--cached", "--binary", "--full-index", "--no-renames", "HEAD")+"\n"), 0o644))
}

func (r *applyRepo) apply(o applyOptions) error {
	r.t.Helper()
	f, err := os.Open(r.patch)
	applyMust(r.t, err)
	defer f.Close()
	r.stderr.Reset()
	a := newApp(strings.NewReader(""), &bytes.Buffer{}, &r.stderr, nil)
	return a.applyPatch(context.Background(), &bangerv1.ExportMeta{HostPath: r.host, Head: r.head}, f, o)
}

func applyMust(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func applyWrite(t *testing.T, dir, name, text string) {
	t.Helper()
	path := filepath.Join(dir, name)
	applyMust(t, os.MkdirAll(filepath.Dir(path), 0o755))
	applyMust(t, os.WriteFile(path, []byte(text), 0o644))
}

// applyState prints all below dir; with .git and its times when all is true.
func applyState(t *testing.T, dir string, all bool) string {
	t.Helper()
	var b strings.Builder
	applyMust(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
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

func applyEqual(t *testing.T, what, got, want string) {
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

func applyFails(t *testing.T, err error, code api.Code, parts ...string) {
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

// applyBusy is a repository with a patch that does all that a patch can do.
func applyBusy(t *testing.T) *applyRepo {
	r := newApplyRepo(t, map[string]string{
		"edited": "1\n2\n3\n", "mode": "x\n", "gone": "gone\n", "dir/only": "only\n", "todir": "file\n", "tofile/a": "a\n", "tofile/b/c": "c\n",
		"untouched": "u\n", "caf\xe9\n": "odd\n", "-rf": "dash\n", "bin": "\x00\x01\xff",
	})
	g := r.guest
	applyWrite(t, g, "edited", "1\n2 inside\n3\n")
	applyMust(t, os.Chmod(filepath.Join(g, "mode"), 0o755))
	applyMust(t, os.Remove(filepath.Join(g, "gone")))
	applyMust(t, os.RemoveAll(filepath.Join(g, "dir")))
	applyMust(t, os.Remove(filepath.Join(g, "todir")))
	applyWrite(t, g, "todir/deep/file", "in a folder\n")
	applyMust(t, os.RemoveAll(filepath.Join(g, "tofile")))
	applyWrite(t, g, "tofile", "a file\n")
	applyWrite(t, g, "new/deep/file", "new\n")
	applyMust(t, os.Symlink("edited", filepath.Join(g, "link")))
	applyWrite(t, g, "caf\xe9\n", "odd inside\n")
	applyWrite(t, g, "-rf", "dash inside\n")
	applyWrite(t, g, "bin", "\x00\x02\xff")
	r.diff()
	return r
}

func TestApply(t *testing.T) {
	r := applyBusy(t)
	index := applyState(t, filepath.Join(r.host, ".git"), true)
	before := applyState(t, r.host, false)
	applyMust(t, r.apply(applyOptions{check: true}))
	if !strings.Contains(r.stderr.String(), "it applies: 14 files") {
		t.Errorf("said %q", r.stderr.String())
	}
	applyEqual(t, "after the check", applyState(t, r.host, false), before)
	applyMust(t, r.apply(applyOptions{}))
	applyEqual(t, "working tree", applyState(t, r.host, false), applyState(t, r.guest, false))
	// The folder for the copies comes and goes.
	now := applyState(t, filepath.Join(r.host, ".git"), true)
	_, index, _ = strings.Cut(index, "\n")
	_, now, _ = strings.Cut(now, "\n")
	applyEqual(t, ".git", now, index)
	if got := r.stderr.String(); got != "applied 14 files\n" {
		t.Errorf("said %q", got)
	}
	// Once more: it is there.
	applyMust(t, r.apply(applyOptions{}))
	if got := r.stderr.String(); !strings.Contains(got, "has these changes already") {
		t.Errorf("said %q", got)
	}
	applyEqual(t, "working tree", applyState(t, r.host, false), applyState(t, r.guest, false))
}

func TestApplyNothing(t *testing.T) {
	r := newApplyRepo(t, map[string]string{"a": "a\n"})
	applyWrite(t, filepath.Dir(r.patch), "patch", "")
	for _, o := range []applyOptions{{}, {check: true}, {branch: "x"}} {
		applyMust(t, r.apply(o))
		if r.stderr.String() != "nothing to apply\n" {
			t.Errorf("said %q", r.stderr.String())
		}
	}
}

// The host went on meanwhile: what does not touch is merged, by context.
func TestApplyOntoOtherChanges(t *testing.T) {
	text := strings.Repeat("line\n", 20)
	r := newApplyRepo(t, map[string]string{"a": text, "b": "b\n"})
	applyWrite(t, r.guest, "a", text+"inside\n")
	r.diff()
	applyWrite(t, r.host, "a", "host\n"+text)
	applyWrite(t, r.host, "b", "host\n")
	applyMust(t, os.Chmod(filepath.Join(r.host, "a"), 0o640))
	applyMust(t, r.apply(applyOptions{}))
	data, err := os.ReadFile(filepath.Join(r.host, "a"))
	applyMust(t, err)
	if string(data) != "host\n"+text+"inside\n" {
		t.Errorf("a is %q", data)
	}
	if info, _ := os.Stat(filepath.Join(r.host, "a")); info.Mode().Perm() != 0o640 {
		t.Errorf("mode is %v", info.Mode())
	}
}

func TestApplyRefused(t *testing.T) {
	for name, c := range map[string]struct {
		code  api.Code
		parts []string
		make  func(r *applyRepo)
	}{
		"conflict":                   {api.Refused, []string{"changed in the same places: edited"}, func(r *applyRepo) { applyWrite(r.t, r.host, "edited", "1\n2 host\n3\n") }},
		"deleted":                    {api.Refused, []string{"changed in the same places: edited"}, func(r *applyRepo) { applyMust(r.t, os.Remove(filepath.Join(r.host, "edited"))) }},
		"created":                    {api.Refused, []string{"new/deep/file is on the host already"}, func(r *applyRepo) { applyWrite(r.t, r.host, "new/deep/file", "host\n") }},
		"binary":                     {api.Refused, []string{"bin"}, func(r *applyRepo) { applyWrite(r.t, r.host, "bin", "\x00host") }},
		"a file where a folder goes": {api.Refused, []string{"new is not a folder"}, func(r *applyRepo) { applyWrite(r.t, r.host, "new", "file\n") }},
		"a link where a folder goes": {api.Refused, []string{"new is not a folder"}, func(r *applyRepo) {
			applyMust(r.t, os.Symlink(r.t.TempDir(), filepath.Join(r.host, "new")))
		}},
		"a folder becomes a link": {api.Refused, nil, func(r *applyRepo) {
			other := r.t.TempDir()
			applyWrite(r.t, other, "only", "only\n")
			applyMust(r.t, os.RemoveAll(filepath.Join(r.host, "dir")))
			applyMust(r.t, os.Symlink(other, filepath.Join(r.host, "dir")))
		}},
		"a folder with more in it": {api.Refused, []string{"tofile/mine is in it"}, func(r *applyRepo) { applyWrite(r.t, r.host, "tofile/mine", "x") }},
		"a pipe": {api.Refused, []string{"neither a file"}, func(r *applyRepo) {
			applyMust(r.t, os.Remove(filepath.Join(r.host, "edited")))
			applyMust(r.t, unix.Mkfifo(filepath.Join(r.host, "edited"), 0o600))
		}},
		"garbage": {api.Refused, []string{"does not take the patch"}, func(r *applyRepo) { applyWrite(r.t, filepath.Dir(r.patch), "patch", "garbage\n") }},
		"cut":     {api.Refused, nil, func(r *applyRepo) { applyMust(r.t, os.Truncate(r.patch, 700)) }},
		"a name with escapes": {api.Refused, []string{`changed in the same places: evil`}, func(r *applyRepo) {
			applyWrite(r.t, filepath.Dir(r.patch), "patch", "diff --git \"a/evil\\033[2J\" \"b/evil\\033[2J\"\n--- \"a/evil\\033[2J\"\n+++ \"b/evil\\033[2J\"\n@@ -1 +1 @@\n-a\n+b\n")
		}},
		"no repository":    {api.NotFound, []string{"not there any more"}, func(r *applyRepo) { applyMust(r.t, os.RemoveAll(r.host)) }},
		"no git directory": {api.NotFound, []string{"no repository any more"}, func(r *applyRepo) { applyMust(r.t, os.RemoveAll(filepath.Join(r.host, ".git"))) }},
	} {
		t.Run(name, func(t *testing.T) {
			r := applyBusy(t)
			c.make(r)
			before := ""
			if c.code != api.NotFound {
				before = applyState(t, r.host, false)
			}
			for _, check := range []bool{true, false} {
				err := r.apply(applyOptions{check: check})
				applyFails(t, err, c.code, c.parts...)
				if strings.ContainsAny(err.Error(), "\x1b") {
					t.Errorf("error has escapes: %q", err)
				}
			}
			if c.code != api.NotFound {
				applyEqual(t, "working tree", applyState(t, r.host, false), before)
				if _, err := os.Stat(filepath.Join(r.host, ".git/banger-apply")); err == nil {
					t.Error("the folder in .git is left")
				}
			}
		})
	}
}

// What a hostile guest may send. Nothing outside of the working tree is written.
func TestApplyHostile(t *testing.T) {
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
			r := newApplyRepo(t, map[string]string{"a": "a\n"})
			outside := filepath.Join(filepath.Dir(r.host), "outside")
			applyMust(t, os.Mkdir(outside, 0o755))
			applyWrite(t, filepath.Dir(r.patch), "patch", strings.ReplaceAll(text, "OUTSIDE", outside))
			before := applyState(t, filepath.Dir(r.host), false)
			gitDir := func() string {
				_, s, _ := strings.Cut(applyState(t, filepath.Join(r.host, ".git"), true), "\n")
				return s
			}
			wasGit := gitDir()
			applyFails(t, r.apply(applyOptions{}), api.Refused)
			applyEqual(t, ".git", gitDir(), wasGit)
			applyFails(t, r.apply(applyOptions{branch: "evil"}), api.Refused)
			applyEqual(t, "files", applyState(t, filepath.Dir(r.host), false), before)
			if got := r.git(r.host, "branch", "--list", "evil"); got != "" {
				t.Errorf("a branch was made: %s", got)
			}
		})
	}
}

func TestApplySafePath(t *testing.T) {
	for _, path := range []string{"a", ".gitignore", ".gitattributes", "a/.github/x", "git", "..a", "a..", "caf\xe9", ".gitmodules", "-x"} {
		if !applySafePath(path) {
			t.Errorf("%q is refused", path)
		}
	}
	for _, path := range []string{"", "/a", "a/", "a//b", ".", "..", "a/../b", ".git", ".Git/x", ".git.../x", ".git::$INDEX_ALLOCATION/x", "GIT~1", ".g\u200dit", "a\x00b"} {
		if applySafePath(path) {
			t.Errorf("%q is let through", path)
		}
	}
}

// Attributes and configuration of the user do not change bytes, and run nothing.
func TestApplyRaw(t *testing.T) {
	r := newApplyRepo(t, map[string]string{"a.txt": "1\r\n2\r\n"})
	trap := filepath.Join(filepath.Dir(r.host), "trap")
	applyWrite(t, r.guest, "a.txt", "1\r\n2 inside\r\n")
	applyWrite(t, r.guest, ".gitattributes", "*.txt text eol=lf filter=evil\n")
	applyMust(t, os.WriteFile(r.patch, nil, 0o644))
	r.git(r.guest, "-c", "core.autocrlf=false", "add", "-N", ".gitattributes")
	applyWrite(t, r.guest, ".git/info/attributes", "* -text !filter !eol\n")
	r.diff()
	for _, kv := range []string{"filter.evil.smudge=touch " + trap, "filter.evil.clean=touch " + trap, "core.autocrlf=true", "apply.whitespace=fix", "core.fsmonitor=touch " + trap} {
		key, value, _ := strings.Cut(kv, "=")
		r.git(r.host, "config", "--global", key, value)
	}
	applyMust(t, r.apply(applyOptions{}))
	data, err := os.ReadFile(filepath.Join(r.host, "a.txt"))
	applyMust(t, err)
	if string(data) != "1\r\n2 inside\r\n" {
		t.Errorf("a.txt is %q", data)
	}
	if _, err := os.Stat(trap); err == nil {
		t.Error("a program of the configuration was run")
	}
}

// An error at any step takes everything back; a kill at any step is taken back, or
// brought to its end, by the next apply.
func TestApplyAllOrNothing(t *testing.T) {
	count := 0
	made := applyBusy(t)
	for _, kill := range []bool{false, true} {
		for k := 0; ; k++ {
			reached := false
			t.Run(fmt.Sprintf("kill=%v step=%d", kill, k), func(t *testing.T) { reached = applyStopAt(t, made, kill, k) })
			if !reached {
				break
			}
			count++
		}
	}
	if count < 60 {
		t.Errorf("only %d steps were tried", count)
	}
}

func applyStopAt(t *testing.T, made *applyRepo, kill bool, k int) (reached bool) {
	r := &applyRepo{t: t, host: filepath.Join(t.TempDir(), "host"), guest: made.guest, head: made.head, patch: made.patch}
	applyMust(t, exec.Command("cp", "-a", "--", made.host, r.host).Run())
	before, after := applyState(t, r.host, false), applyState(t, r.guest, false)
	a := newApp(strings.NewReader(""), &bytes.Buffer{}, &r.stderr, nil)
	ctx := context.Background()
	s, err := openApply(ctx, r.host, r.patch)
	applyMust(t, err)
	n, at := 0, ""
	stop := errors.New("stopped")
	s.before = func(step string) error {
		if n++; n-1 != k {
			return nil
		}
		reached, at = true, step
		if kill {
			panic(stop)
		}
		return fmt.Errorf("%s: %w", step, unix.ENOSPC)
	}
	err = func() (err error) {
		defer func() {
			if v := recover(); v != nil {
				err = v.(error)
			}
		}()
		return a.applyTree(ctx, s, applyOptions{})
	}()
	if kill && reached {
		s.lock.Close() // as the kernel does
		s.root.Close()
	} else {
		s.close()
	}
	if !reached {
		applyMust(t, err)
		return false
	}
	if err == nil {
		t.Fatalf("%s: no error", at)
	}
	if !kill {
		applyEqual(t, at, applyState(t, r.host, false), before)
		return true
	}
	again, err := openApply(ctx, r.host, r.patch)
	applyMust(t, err)
	said := ""
	applyMust(t, again.recoverJournal(func(format string, args ...any) { said += fmt.Sprintf(format, args...) }))
	again.close()
	applyEqual(t, "after "+at, applyState(t, r.host, false), before)
	if k > 0 && !strings.Contains(said, "interrupted, and is taken back") {
		t.Errorf("%s: said %q", at, said)
	}
	if _, err := os.Stat(again.dir); err == nil {
		t.Errorf("%s: the folder in .git is left", at)
	}
	applyMust(t, r.apply(applyOptions{}))
	applyEqual(t, "applied after "+at, applyState(t, r.host, false), after)
	return true
}

// A file that was edited after the kill is not overwritten by taking back.
func TestApplyRecoveryKeepsEdits(t *testing.T) {
	r := applyBusy(t)
	ctx := context.Background()
	s, err := openApply(ctx, r.host, r.patch)
	applyMust(t, err)
	s.before = func(step string) error {
		if step == "journal "+applyDone {
			panic("killed")
		}
		return nil
	}
	func() {
		defer func() { _ = recover() }()
		_ = newApp(strings.NewReader(""), &bytes.Buffer{}, &r.stderr, nil).applyTree(ctx, s, applyOptions{})
	}()
	s.lock.Close()
	applyMust(t, os.Remove(filepath.Join(r.host, "edited")))
	applyWrite(t, r.host, "edited", "edited since\n")
	err = r.apply(applyOptions{})
	applyFails(t, err, api.Refused, "edited")
	if got := r.stderr.String(); !strings.Contains(got, "edited was changed meanwhile") || !strings.Contains(got, ".banger-apply-") {
		t.Errorf("said %q", got)
	}
	data, err := os.ReadFile(filepath.Join(r.host, "edited"))
	applyMust(t, err)
	if string(data) != "edited since\n" {
		t.Errorf("the edit is lost: %q", data)
	}
}

// A file that changes between the check and the move is not overwritten.
func TestApplyChangedMeanwhile(t *testing.T) {
	r := applyBusy(t)
	ctx := context.Background()
	s, err := openApply(ctx, r.host, r.patch)
	applyMust(t, err)
	s.before = func(step string) error {
		if step == "journal "+applyMoving {
			applyWrite(t, r.host, "edited", "edited meanwhile\n")
		}
		return nil
	}
	err = newApp(strings.NewReader(""), &bytes.Buffer{}, &r.stderr, nil).applyTree(ctx, s, applyOptions{})
	if api.CodeOf(err) != api.Busy || !strings.Contains(err.Error(), "edited changes meanwhile") {
		t.Errorf("error is %v", err)
	}
	s.close()
	if strings.Contains(applyState(t, r.host, false), ".banger-apply") {
		t.Error("files are left")
	}
}

func TestApplyTwoAtOnce(t *testing.T) {
	r := applyBusy(t)
	s, err := openApply(context.Background(), r.host, r.patch)
	applyMust(t, err)
	applyFails(t, r.apply(applyOptions{}), api.Busy, "another apply")
	s.close()
	applyMust(t, r.apply(applyOptions{}))
}

func TestApplyFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can mount a small file system")
	}
	r := newApplyRepo(t, map[string]string{"a": "a\n", "big": "big\n"})
	applyWrite(t, r.guest, "a", "b\n")
	applyWrite(t, r.guest, "big", strings.Repeat("0123456789abcdef", 1<<16))
	r.diff()
	small := filepath.Join(t.TempDir(), "small")
	applyMust(t, os.Mkdir(small, 0o755))
	applyMust(t, unix.Mount("tmpfs", small, "tmpfs", 0, "size=1500k"))
	t.Cleanup(func() {
		if err := unix.Unmount(small, unix.MNT_DETACH); err != nil {
			t.Errorf("the test's file system stays mounted: %v", err)
		}
	})
	applyMust(t, exec.Command("cp", "-a", "--", r.host, small).Run())
	r.host = filepath.Join(small, "host")
	before := applyState(t, r.host, false)
	err := r.apply(applyOptions{})
	if api.CodeOf(err) != api.NoSpace {
		t.Errorf("error is %v, code %s", err, api.CodeOf(err))
	}
	applyEqual(t, "working tree", applyState(t, r.host, false), before)
	applyMust(t, unix.Mount("tmpfs", small, "tmpfs", unix.MS_REMOUNT, "size=20m"))
	applyMust(t, r.apply(applyOptions{}))
	applyEqual(t, "working tree", applyState(t, r.host, false), applyState(t, r.guest, false))
}

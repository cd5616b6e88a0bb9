package workspace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/api"
)

func TestSubmoduleNotCheckedOut(t *testing.T) {
	w := newWorld(t)
	lib := filepath.Join(filepath.Dir(w.host), "lib")
	w.git(filepath.Dir(w.host), "init", "-q", "-b", "main", lib)
	w.git(lib, "commit", "-q", "--allow-empty", "-m", "lib")
	w.git(w.host, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", lib, "lib")
	w.commit("lib")
	w.git(w.host, "submodule", "--quiet", "deinit", "--all")
	w.prepare()
	want(t, "status", w.git(w.inside, "status", "--porcelain"), "")
	// The guest gets it by itself; that is no change.
	w.git(w.inside, "clone", "-q", lib, "lib")
	w.git(w.inside+"/lib", "commit", "-q", "--allow-empty", "-m", "inside")
	meta, patch := w.export()
	want(t, "patch", patch, "")
	want(t, "files", meta.Files, 0)
	want(t, "changes", w.prepare().Workspace.Changes, 0)
}

func TestRepositoriesInside(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	w.prepare()
	w.git(w.inside, "init", "-q", "empty")
	w.git(w.inside, "init", "-q", "nested")
	w.git(w.inside+"/nested", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "--allow-empty", "-m", "nested")
	write(t, w.inside, "nested/file", "file\n")
	write(t, w.inside, "a", "b\n")
	meta, patch := w.export()
	want(t, "files", meta.Files, 1)
	if strings.Contains(patch, "nested") || !strings.Contains(patch, "+b") {
		t.Errorf("patch is %s", patch)
	}
	write(t, w.host, "nested/x", "host\n")
	w.commit("second")
	p := w.prepare()
	want(t, "kept", p.Kept, "[nested/x]")
	want(t, "file", read(t, w.inside, "nested/file"), "file\n")
}

func TestShallowClone(t *testing.T) {
	w := newWorld(t)
	for i := range 5 {
		write(t, w.host, "a", fmt.Sprint(i))
		w.commit(fmt.Sprint("commit ", i))
	}
	full := w.host
	w.host, w.inside = filepath.Join(filepath.Dir(full), "shallow"), filepath.Join(filepath.Dir(w.inside), "shallow")
	w.git(filepath.Dir(full), "clone", "-q", "--depth=2", "file://"+full, w.host)
	was := state(t, w.host, true)
	w.prepare()
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "log", w.git(w.inside, "log", "--format=%s"), "commit 4\ncommit 3")
	want(t, "fsck", w.git(w.inside, "fsck", "--strict"), "")
	write(t, full, "a", "6")
	w.git(full, "commit", "-q", "-a", "-m", "commit 6")
	w.git(w.host, "fetch", "-q", "--depth=1")
	w.git(w.host, "reset", "-q", "--hard", "FETCH_HEAD")
	w.git(w.host, "config", "user.name", "x")
	w.prepare()
	want(t, "head", w.git(w.inside, "rev-parse", "HEAD"), w.git(full, "rev-parse", "HEAD"))
	want(t, "a", read(t, w.inside, "a"), "6")
	want(t, "fsck", w.git(w.inside, "fsck", "--strict"), "")
}

func TestPartialClone(t *testing.T) {
	w := newWorld(t)
	for i := range 4 {
		write(t, w.host, "a", fmt.Sprint(i))
		write(t, w.host, fmt.Sprintf("dir%d/b", i), fmt.Sprint("b", i))
		w.commit(fmt.Sprint("commit ", i))
	}
	full := w.host
	w.git(full, "config", "uploadpack.allowFilter", "true")
	w.git(full, "config", "uploadpack.allowAnySHA1InWant", "true")
	w.host, w.inside = filepath.Join(filepath.Dir(full), "partial"), filepath.Join(filepath.Dir(w.inside), "partial")
	w.git(filepath.Dir(full), "clone", "-q", "--filter=blob:none", "file://"+full, w.host)
	was := state(t, w.host, true)
	w.prepare()
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
	want(t, "log", w.git(w.inside, "log", "--format=%s"), "commit 3\ncommit 2\ncommit 1\ncommit 0")
	want(t, "fsck", w.git(w.inside, "fsck", "--no-dangling"), "")
	want(t, "status", w.git(w.inside, "status", "--porcelain"), "")
	// What is missing is fetched from where the host would fetch it.
	want(t, "old", w.git(w.inside, "show", "HEAD~2:a"), "1")

	// Without the files of the commit itself there is nothing to bring in.
	w.git(w.host, "sparse-checkout", "set", "dir1")
	write(t, full, "dir2/b", "new")
	w.git(full, "commit", "-q", "-a", "-m", "commit 4")
	w.git(w.host, "pull", "-q")
	_, err := w.tryPrepare(context.Background())
	wantError(t, err, api.Refused, "partial clone that lacks files")
}

func TestSparseCheckout(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "in/a", "a\n")
	write(t, w.host, "out/b", "b\n")
	w.commit("first")
	w.git(w.host, "sparse-checkout", "set", "--sparse-index", "in")
	if exists(w.host, "out") {
		t.Fatal("the checkout is not sparse")
	}
	was := state(t, w.host, true)
	w.prepare()
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "b", read(t, w.inside, "out/b"), "b\n")
	want(t, "status", w.git(w.inside, "status", "--porcelain"), "")
}

func TestSplitIndexAndFsmonitor(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.git(w.host, "config", "core.splitIndex", "true")
	w.git(w.host, "config", "core.untrackedCache", "true")
	w.commit("first")
	write(t, w.host, "b", "b\n")
	w.git(w.host, "add", "b")
	was := state(t, w.host, true)
	if !strings.Contains(was, "sharedindex") {
		t.Fatal("the index is not split")
	}
	w.prepare()
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

func TestSHA256(t *testing.T) {
	w := newWorld(t)
	check(t, os.RemoveAll(w.host))
	w.git(filepath.Dir(w.host), "init", "-q", "-b", "main", "--object-format=sha256", w.host)
	write(t, w.host, "a/b", "a\n")
	w.commit("first")
	write(t, w.host, "a/b", "dirty\n")
	w.prepare()
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
	want(t, "head", w.git(w.inside, "rev-parse", "HEAD"), w.git(w.host, "rev-parse", "HEAD"))
	check(t, os.Remove(filepath.Join(w.inside, "a/b")))
	meta, _ := w.export()
	want(t, "files", meta.Files, 1)
	write(t, w.host, "c", "c\n")
	w.git(w.host, "add", "c")
	w.prepare()
	want(t, "inside", tree(t, w.inside), "\"c\" -rw-r--r-- \"c\\n\"\n")
}

// A filter as that of LFS keeps something else in the repository than on the disk.
// What is on the disk comes in; it is no change, and no filter is run.
func TestFilters(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, ".gitattributes", "*.big filter=lfs -text\n*.txt text\n")
	trap := filepath.Join(filepath.Dir(w.host), "trap")
	w.git(w.host, "config", "filter.lfs.clean", "sh -c 'echo pointer; cat > /dev/null'")
	w.git(w.host, "config", "filter.lfs.smudge", "sh -c 'echo smudged; cat > /dev/null'")
	w.git(w.host, "config", "filter.lfs.required", "true")
	write(t, w.host, "x.big", "large content\n")
	write(t, w.host, "crlf.txt", "1\r\n2\r\n")
	// Older than the index, or git suspects them to have changed since and asks the filter.
	old := time.Now().Add(-time.Minute)
	for _, name := range []string{"x.big", "crlf.txt"} {
		check(t, os.Chtimes(filepath.Join(w.host, name), old, old))
	}
	w.git(w.host, "-c", "core.safecrlf=false", "add", "-A")
	w.git(w.host, "commit", "-q", "-m", "first")
	want(t, "in the repository", w.git(w.host, "show", "HEAD:x.big"), "pointer")
	write(t, w.host, "later", "later\n")
	w.git(w.host, "add", "later")
	w.git(w.host, "config", "filter.lfs.clean", "touch "+trap)
	was := state(t, w.host, true)
	p := w.prepare()
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "changed", p.Changed, 1)
	want(t, "content", read(t, w.inside, "x.big"), "large content\n")
	want(t, "line ends", read(t, w.inside, "crlf.txt"), "1\r\n2\r\n")
	for _, fromHead := range []bool{false, true} {
		write(t, w.inside, "x.big", "changed inside\n")
		_, patch, err := w.tryExport(t.Context(), ExportOptions{FromHead: fromHead})
		check(t, err)
		if !strings.Contains(patch, "-large content\n+changed inside") || strings.Contains(patch, "crlf") || strings.Contains(patch, "pointer") {
			t.Errorf("from head %v: patch is %s", fromHead, patch)
		}
	}
	if exists("", trap) {
		t.Error("a filter was run")
	}
}

func TestUntracked(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	write(t, w.host, ".gitignore", "*.o\nsecret\n")
	w.commit("first")
	write(t, w.host, "new", "1\n")
	write(t, w.host, "x.o", "x\n")
	w.git(w.host, "init", "-q", "nested")
	write(t, w.host, "nested/f", "f\n")
	p := w.prepare()
	want(t, "skipped", p.SkippedUntracked, 1)
	want(t, "new", exists(w.inside, "new"), false)
	p = w.prepare(true)
	want(t, "skipped", p.SkippedUntracked, 0)
	want(t, "changed", p.Changed, 1)
	want(t, "new", read(t, w.inside, "new"), "1\n")
	want(t, "ignored", exists(w.inside, "x.o"), false)
	want(t, "nested", exists(w.inside, "nested"), false)
	_, patch := w.export()
	want(t, "patch", patch, "")

	// It came in once: it is neither removed nor updated unless asked for.
	write(t, w.host, "new", "2\n")
	p = w.prepare()
	want(t, "new", read(t, w.inside, "new"), "1\n")
	want(t, "skipped", p.SkippedUntracked, 1)
	write(t, w.inside, "new", "inside\n")
	want(t, "skipped, also when changed inside", w.prepare().SkippedUntracked, 1)
	write(t, w.host, "new", "1\n")
	want(t, "not when the host's is what came in", w.prepare().SkippedUntracked, 0)
	write(t, w.inside, "new", "1\n")
	write(t, w.host, "new", "2\n")
	w.prepare(true)
	want(t, "new", read(t, w.inside, "new"), "2\n")
	check(t, os.Remove(filepath.Join(w.host, "new")))
	w.prepare()
	want(t, "new", exists(w.inside, "new"), false)

	// What was made inside and applied is equal on both sides, and joins the base.
	write(t, w.inside, "made", "made\n")
	write(t, w.host, "made", "made\n")
	write(t, w.inside, "other", "inside\n")
	write(t, w.host, "other", "host's own\n")
	p = w.prepare()
	want(t, "changes", p.Workspace.Changes, 1)
	want(t, "skipped", p.SkippedUntracked, 1)
	_, patch = w.export()
	if strings.Contains(patch, "made") || strings.Contains(patch, "host's own") {
		t.Errorf("patch is %s", patch)
	}

	// A guest that claims to have an ignored file learns nothing of it.
	write(t, w.host, "secret", "pin 1234\n")
	w.git(w.inside, "config", "core.excludesFile", "/dev/null")
	write(t, w.inside, ".gitignore", "")
	write(t, w.inside, "secret", "pin 1234\n")
	w.prepare()
	want(t, "secret in the base", w.git(w.inside, "ls-tree", "--name-only", refBase, "secret"), "")
	tree := w.git(w.inside, "write-tree")
	w.git(w.inside, "add", "-f", "secret")
	forged := w.git(w.inside, "write-tree")
	w.git(w.inside, "reset", "-q")
	_ = tree
	check(t, os.Remove(filepath.Join(w.inside, "secret")))
	w.git(w.inside, "update-ref", refBase, forged)
	w.prepare(true)
	want(t, "secret", exists(w.inside, "secret"), false)
}

// What git ignores inside is the guest's: it is not overwritten.
func TestIgnoredFilesInside(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, ".gitignore", "*.o\nbuild/\n")
	write(t, w.host, "lib/a", "a\n")
	w.commit("first")
	w.prepare()
	write(t, w.inside, "x.o", "inside\n")
	write(t, w.inside, "build/out", "inside\n")
	write(t, w.host, "x.o", "host\n")
	write(t, w.host, "build/out", "host\n")
	write(t, w.host, "lib/b.o", "host\n")
	w.git(w.host, "add", "-f", "x.o", "build/out", "lib/b.o")
	p := w.prepare()
	want(t, "kept", p.Kept, "[build/out x.o]")
	want(t, "x.o", read(t, w.inside, "x.o"), "inside\n")
	want(t, "build/out", read(t, w.inside, "build/out"), "inside\n")
	want(t, "lib/b.o", read(t, w.inside, "lib/b.o"), "host\n")
}

// A symbolic link of the host is never followed, nor is a device read.
func TestOddFilesOfTheHost(t *testing.T) {
	w := newWorld(t)
	outside := t.TempDir()
	write(t, outside, "secret", "secret\n")
	write(t, w.host, "dir/secret", "tracked\n")
	write(t, w.host, "file", "file\n")
	write(t, w.host, "pipe", "pipe\n")
	w.commit("first")
	check(t, os.RemoveAll(filepath.Join(w.host, "dir")))
	check(t, os.Symlink(outside, filepath.Join(w.host, "dir")))
	check(t, os.Remove(filepath.Join(w.host, "file")))
	check(t, os.Symlink("/etc/passwd", filepath.Join(w.host, "file")))
	check(t, os.Remove(filepath.Join(w.host, "pipe")))
	check(t, syscall.Mkfifo(filepath.Join(w.host, "pipe"), 0o600))
	w.prepare()
	want(t, "inside", tree(t, w.inside), "\"file\" Lrwxrwxrwx -> \"/etc/passwd\"\n")
	if os.Getuid() != 0 {
		write(t, w.host, "locked", "x")
		w.git(w.host, "add", "locked")
		check(t, os.Chmod(filepath.Join(w.host, "locked"), 0))
		_, err := w.tryPrepare(context.Background())
		wantError(t, err, api.Refused, "cannot read locked")
	}
}

// A file that is written to all the time is either had whole or refused.
func TestFileThatGrows(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "small", strings.Repeat("x", 100))
	write(t, dir, "large", strings.Repeat("y", wholeFile+1000))
	objects := objectDir{dir: t.TempDir(), format: "sha1"}
	w, err := openWorkTree(dir, objects, true)
	check(t, err)
	defer w.close()
	w.progress = &steps{}
	for _, name := range []string{"small", "large"} {
		e, err := w.read(context.Background(), name, entry{})
		check(t, err)
		want(t, name, e.oid, objects.format.oid("blob", []byte(read(t, dir, name))))
		if _, err := os.Stat(objects.path(e.oid)); err != nil {
			t.Errorf("%s: no object: %v", name, err)
		}
		check(t, os.Remove(objects.path(e.oid)))
		again, err := w.read(context.Background(), name, e)
		check(t, err)
		want(t, name, again, e)
		if _, err := os.Stat(objects.path(e.oid)); err == nil {
			t.Errorf("%s: an object that is known was written", name)
		}
	}
	if err := copyExactly(&strings.Builder{}, strings.NewReader("abc"), 2); err != errShort {
		t.Errorf("longer: %v", err)
	}
	if err := copyExactly(&strings.Builder{}, strings.NewReader("abc"), 4); err != errShort {
		t.Errorf("shorter: %v", err)
	}
}

// TestIgnoresOfTheRepository: its own configuration says what is ignored, but its choice
// of a file brings none of the user's into the VM; the user's own list goes in.
func TestIgnoresOfTheRepository(t *testing.T) {
	w := newWorld(t)
	secret := filepath.Join(t.TempDir(), "key")
	check(t, os.WriteFile(secret, []byte("SECRET\n"), 0o600))
	w.git(w.host, "config", "core.excludesFile", secret)
	write(t, w.host, "a", "a\n")
	w.commit("one")
	mine := filepath.Join(t.TempDir(), "mine")
	check(t, os.WriteFile(mine, []byte("*.mine\n"), 0o600))
	w.git(w.host, "config", "--global", "core.excludesFile", mine)
	w.prepare()
	inside := read(t, w.inside, ".git/info/exclude")
	if strings.Contains(inside, "SECRET") || !strings.Contains(inside, "*.mine") {
		t.Errorf("info/exclude inside is %q", inside)
	}
}

// TestPlainFiles: what is read from a git directory is neither a folder nor a pipe.
func TestPlainFiles(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"pipe": func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"link to a pipe": func(path string) error {
			return errors.Join(syscall.Mkfifo(path+".pipe", 0o600), os.Symlink("exclude.pipe", path))
		},
		"link to a folder": func(path string) error { return os.Symlink("/etc", path) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			write(t, w.host, "a", "a\n")
			w.commit("one")
			w.replaceExclude(put)
			err := soon(t, func(ctx context.Context) error {
				_, err := w.tryPrepare(ctx)
				return err
			})
			wantError(t, err, api.Refused, "info/exclude is no plain file")
		})
	}
}

// replaceExclude puts something else in the place of the repository's info/exclude.
func (w *world) replaceExclude(put func(path string) error) {
	w.t.Helper()
	exclude := filepath.Join(w.host, ".git/info/exclude")
	check(w.t, os.MkdirAll(filepath.Dir(exclude), 0o755))
	check(w.t, os.RemoveAll(exclude))
	check(w.t, put(exclude))
}

// TestExcludeIsALink: what it lists is ignored on the host, and none of its text goes in.
func TestExcludeIsALink(t *testing.T) {
	w := newWorld(t)
	mine := filepath.Join(t.TempDir(), "mine")
	check(t, os.WriteFile(mine, []byte("*.mine\n"), 0o600))
	write(t, w.host, "a", "a\n")
	w.commit("one")
	write(t, w.host, "x.mine", "x\n")
	w.replaceExclude(func(path string) error { return os.Symlink(mine, path) })
	was := state(t, w.host, true)
	p := w.prepare(true)
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "inside", tree(t, w.inside), "\"a\" -rw-r--r-- \"a\\n\"\n")
	want(t, "exclude inside", strings.TrimSpace(read(t, w.inside, ".git/info/exclude")), "")
	want(t, "note", p.Notes[len(p.Notes)-1], "info/exclude is a symbolic link: what it lists is ignored on the host only")
	// Nor where a folder above it is the link.
	theirs := t.TempDir()
	write(t, theirs, "exclude", "SECRET\n")
	check(t, os.RemoveAll(filepath.Join(w.host, ".git/info")))
	check(t, os.Symlink(theirs, filepath.Join(w.host, ".git/info")))
	check(t, os.RemoveAll(w.inside))
	w.prepare()
	want(t, "exclude inside", strings.TrimSpace(read(t, w.inside, ".git/info/exclude")), "")
	check(t, os.Remove(filepath.Join(w.host, ".git/info")))
	w.replaceExclude(func(path string) error { return os.Symlink(mine, path) })
	check(t, os.Remove(mine)) // a link to nothing is as no file
	w.prepare(true)
	want(t, "x.mine", read(t, w.inside, "x.mine"), "x\n")
}

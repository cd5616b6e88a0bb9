package workspace

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/guest/wire"
)

func unmarshal(data []byte, req *wire.Request) error { return json.Unmarshal(data, req) }

func TestFirstPrepare(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "README", "one\n")
	write(t, w.host, "src/main.c", "int main;\n")
	write(t, w.host, "gone", "x\n")
	write(t, w.host, "build.sh", "#!/bin/sh\n")
	check(t, os.Chmod(filepath.Join(w.host, "build.sh"), 0o755))
	check(t, os.Symlink("src/main.c", filepath.Join(w.host, "link")))
	odd := []string{"-rf", "a\nb", `q"uo'te`, "caf\xe9", "tab\there", " space "}
	for _, name := range odd {
		write(t, w.host, "odd/"+name, name)
	}
	write(t, w.host, ".gitignore", "*.o\n")
	w.git(w.host, "remote", "add", "origin", "https://ann:secret@example.org/shop.git")
	w.commit("first")
	w.git(w.host, "tag", "-a", "v1", "-m", "one")
	write(t, w.host, "README", "dirty\n")
	check(t, os.Remove(filepath.Join(w.host, "gone")))
	write(t, w.host, "staged", "staged\n")
	w.git(w.host, "add", "staged")
	write(t, w.host, "untracked", "untracked\n")
	write(t, w.host, "main.o", "ignored\n")

	was := state(t, w.host, true)
	var s steps
	p, err := w.m.Prepare(context.Background(), vmID, filepath.Join(w.host, "src"), false, &s)
	check(t, err)
	untouched(t, "host", was, state(t, w.host, true))
	want(t, "steps", s.names, "[1/3 read 2/3 send 3/3 check out]")
	if s.bytes == 0 {
		t.Error("no bytes were reported")
	}
	want(t, "guest path", p.Workspace.GuestPath, w.inside)
	want(t, "notes", len(p.Notes), 1)
	want(t, "changed", p.Changed, 3)
	want(t, "skipped", p.SkippedUntracked, 1)
	want(t, "kept", p.Kept, "[]")
	want(t, "changes", p.Workspace.Changes, 0)
	want(t, "head", p.Workspace.Head, w.git(w.host, "rev-parse", "HEAD"))

	// The same working tree, but for what stays on the host.
	check(t, os.Remove(filepath.Join(w.host, "untracked")))
	check(t, os.Remove(filepath.Join(w.host, "main.o")))
	want(t, "working tree", tree(t, w.inside), tree(t, w.host))
	want(t, "branch", w.git(w.inside, "symbolic-ref", "HEAD"), "refs/heads/main")
	want(t, "log", w.git(w.inside, "log", "--format=%H %s"), w.git(w.host, "log", "--format=%H %s"))
	want(t, "describe", w.git(w.inside, "describe"), "v1")
	want(t, "status", w.git(w.inside, "status", "--porcelain"), " M README\n D gone\n?? staged")
	want(t, "origin", w.git(w.inside, "config", "remote.origin.url"), "https://example.org/shop.git")
	want(t, "user", w.git(w.inside, "config", "--local", "user.email"), "ann@example.org")
	want(t, "fsck", w.git(w.inside, "fsck", "--strict"), "")
	if exists(w.inside, ".git/banger/work") {
		t.Error("the work folder is left")
	}
	if left, _ := os.ReadDir(w.m.scratch); len(left) > 0 {
		t.Errorf("scratch is not empty: %v", left)
	}
	_, patch := w.export()
	want(t, "patch", patch, "")
}

func TestDiff(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "1\n2\n3\n")
	write(t, w.host, "b", "b\n")
	write(t, w.host, "c", "c\n")
	write(t, w.host, "d/e", "e\n")
	write(t, w.host, ".gitignore", "*.o\n")
	w.commit("first")
	write(t, w.host, "a", "1\n2\n3\ndirty\n")
	w.prepare()

	write(t, w.inside, "a", "1\n2\n3\ndirty\nmore\n")
	write(t, w.inside, "committed", "committed\n")
	w.git(w.inside, "add", "committed")
	w.git(w.inside, "commit", "-q", "-m", "inside")
	check(t, os.Remove(filepath.Join(w.inside, "b")))
	check(t, os.Chmod(filepath.Join(w.inside, "c"), 0o755))
	check(t, os.Symlink("a", filepath.Join(w.inside, "link")))
	write(t, w.inside, "bin", "\x00\x01\x02\xff")
	write(t, w.inside, "caf\xe9\n\"", "odd\n")
	write(t, w.inside, "x.o", "ignored\n")
	write(t, w.inside, "forced.o", "forced\n")
	w.git(w.inside, "add", "-f", "forced.o")
	w.git(w.inside, "mv", "d/e", "d/f")

	// git sets the time of a pack that it finds an object in.
	was, objects := state(t, w.inside, true, ".git/banger", ".git/objects"), state(t, w.inside+"/.git/objects", false)
	meta, patch := w.export()
	untouched(t, "guest", was, state(t, w.inside, true, ".git/banger", ".git/objects"))
	untouched(t, "objects", objects, state(t, w.inside+"/.git/objects", false))
	want(t, "files", meta.Files, 10)
	want(t, "host path", meta.HostPath, w.host)
	row, err := w.store.Workspace(context.Background(), vmID)
	check(t, err)
	want(t, "changes in the store", row.Changes, 10)
	if strings.Contains(patch, "x.o") {
		t.Error("an ignored file is in the patch")
	}
	// It applies to the host, and makes it what the guest is.
	write(t, filepath.Dir(w.host), "patch", patch)
	w.git(w.host, "apply", "--binary", "../patch")
	check(t, os.Remove(filepath.Join(w.inside, "x.o")))
	want(t, "after apply", tree(t, w.host), tree(t, w.inside))

	w.git(w.host, "add", "-f", "forced.o")
	// Both sides are equal: the next prepare has nothing to do, and nothing differs.
	p := w.prepare()
	want(t, "updated", p.Updated, 0)
	want(t, "kept", p.Kept, "[]")
	want(t, "changes", p.Workspace.Changes, 0)
	_, patch = w.export()
	want(t, "patch", patch, "")
}

func TestDiffDependsOnNoConfiguration(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "1\n2\n3\n")
	write(t, w.host, "crlf.txt", "1\r\n2\r\n")
	write(t, w.host, ".gitattributes", "*.txt text eol=crlf diff=evil filter=evil\n")
	w.commit("first")
	w.prepare()
	want(t, "status", w.git(w.inside, "status", "--porcelain"), "")
	write(t, w.inside, "a", "1\nx\n3\n")
	write(t, w.inside, "crlf.txt", "1\r\nx\r\n")
	_, plain := w.export()
	trap := filepath.Join(filepath.Dir(w.host), "trap")
	evil := "touch " + trap
	for _, kv := range []string{"diff.noprefix=true", "diff.mnemonicPrefix=true", "color.ui=always", "core.quotePath=true", "diff.external=" + evil,
		"diff.evil.command=" + evil, "diff.evil.textconv=" + evil, "filter.evil.clean=" + evil, "filter.evil.smudge=" + evil, "filter.evil.required=true",
		"core.fsmonitor=" + evil, "core.autocrlf=input", "diff.context=0", "diff.algorithm=patience", "core.abbrev=4", "diff.renames=copies"} {
		key, value, _ := strings.Cut(kv, "=")
		w.git(w.inside, "config", key, value)
		w.git(w.inside, "config", "--global", key, value)
	}
	for _, hook := range []string{"post-index-change", "reference-transaction", "post-checkout", "pre-commit"} {
		write(t, w.inside, ".git/hooks/"+hook, "#!/bin/sh\n"+evil+"\n")
		check(t, os.Chmod(filepath.Join(w.inside, ".git/hooks", hook), 0o755))
	}
	_, configured := w.export()
	want(t, "patch", configured, plain)
	write(t, w.host, "new.txt", "x\r\n")
	for _, name := range []string{"post-index-change", "reference-transaction"} {
		write(t, w.host, ".git/hooks/"+name, "#!/bin/sh\n"+evil+"\n")
		check(t, os.Chmod(filepath.Join(w.host, ".git/hooks", name), 0o755))
	}
	w.prepare(true)
	want(t, "raw bytes", read(t, w.inside, "new.txt"), "x\r\n")
	if exists("", trap) {
		t.Error("a program that a repository names was run")
	}
}

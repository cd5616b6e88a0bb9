package workspace

import (
	"strings"
	"testing"
)

func (w *world) head() string {
	w.t.Helper()
	branch := w.git(w.inside, "rev-parse", "--symbolic-full-name", "HEAD")
	return branch + " " + w.git(w.inside, "rev-parse", "HEAD")
}

func TestHeadFollowsTheHost(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "1\n")
	write(t, w.host, "b", "1\n")
	first := w.commit("first")
	w.prepare()
	want(t, "head", w.head(), "refs/heads/main "+first)

	write(t, w.host, "a", "2\n")
	second := w.commit("second")
	write(t, w.inside, "b", "dirty inside\n")
	want(t, "notes", w.prepare().Notes, "[]")
	want(t, "a commit", w.head(), "refs/heads/main "+second)
	want(t, "status", w.git(w.inside, "status", "--porcelain"), " M b")

	w.git(w.host, "switch", "-q", "-c", "feature")
	write(t, w.host, "a", "3\n")
	third := w.commit("third")
	w.prepare()
	want(t, "a branch", w.head(), "refs/heads/feature "+third)
	want(t, "status", w.git(w.inside, "status", "--porcelain"), " M b")

	w.git(w.host, "commit", "-q", "--amend", "-m", "amended")
	amended := w.git(w.host, "rev-parse", "HEAD")
	w.prepare()
	want(t, "an amended commit", w.head(), "refs/heads/feature "+amended)

	w.git(w.host, "checkout", "-q", "--detach", "main")
	w.prepare()
	want(t, "detached", w.head(), "HEAD "+second)
	want(t, "a", read(t, w.inside, "a"), "2\n")

	w.git(w.host, "checkout", "-q", "feature")
	w.prepare()
	want(t, "attached", w.head(), "refs/heads/feature "+amended)
}

func TestHeadStays(t *testing.T) {
	for name, work := range map[string]func(w *world){
		"commits of its own": func(w *world) { w.git(w.inside, "commit", "-q", "-am", "inside") },
		"staged":             func(w *world) { w.git(w.inside, "add", "b") },
		"another branch":     func(w *world) { w.git(w.inside, "switch", "-q", "-c", "mine") },
		"both sides":         func(w *world) { write(w.t, w.inside, "a", "mine\n") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			write(t, w.host, "a", "1\n")
			write(t, w.host, "b", "1\n")
			w.commit("first")
			w.prepare()
			write(t, w.inside, "b", "inside\n")
			work(w)
			was := w.head()
			write(t, w.host, "a", "2\n")
			second := w.commit("second")
			p := w.prepare()
			want(t, "head", w.head(), was)
			want(t, "its own", w.git(w.inside, "rev-parse", refHost), second)
			if len(p.Notes) != 1 || !strings.Contains(p.Notes[0], name) {
				t.Errorf("notes are %q", p.Notes)
			}
			want(t, "notes the next time", w.prepare().Notes, "[]")
			if name != "both sides" {
				want(t, "a", read(t, w.inside, "a"), "2\n")
				_, patch := w.export()
				if !strings.Contains(patch, "+inside") || strings.Contains(patch, "b/a") {
					t.Errorf("patch is %s", patch)
				}
				return
			}
			// The conflict is solved: HEAD follows.
			write(t, w.inside, "a", "2\n")
			w.prepare()
			want(t, "head", w.head(), "refs/heads/main "+second)
		})
	}
}

func TestWithoutCommits(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "1\n")
	w.git(w.host, "add", "a")
	w.git(w.host, "symbolic-ref", "HEAD", "refs/heads/trunk")
	p := w.prepare()
	want(t, "head", p.Workspace.Head+p.HeadShort, "")
	want(t, "changed", p.Changed, 1)
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
	want(t, "branch", w.git(w.inside, "symbolic-ref", "HEAD"), "refs/heads/trunk")
	write(t, w.inside, "a", "2\n")
	_, patch := w.export()
	if !strings.Contains(patch, "-1\n+2") {
		t.Errorf("patch is %s", patch)
	}
	first := w.commit("first")
	w.prepare()
	want(t, "head", w.head(), "refs/heads/trunk "+first)
	want(t, "a", read(t, w.inside, "a"), "2\n")
	meta, fromHead, err := w.tryExport(t.Context(), ExportOptions{FromHead: true})
	check(t, err)
	want(t, "meta", meta.Head, first)
	want(t, "from head", fromHead, patch)
}

func TestEmptyRepository(t *testing.T) {
	w := newWorld(t)
	w.prepare()
	want(t, "inside", tree(t, w.inside), "")
	write(t, w.inside, "a", "1\n")
	meta, _ := w.export()
	want(t, "files", meta.Files, 1)
	w.prepare()
}

// Commits that hang on nothing but a detached HEAD would be lost.
func TestDetachedHeadStays(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "1\n")
	w.commit("first")
	w.git(w.host, "checkout", "-q", "--detach")
	w.prepare()
	w.git(w.inside, "commit", "-q", "--allow-empty", "-m", "inside")
	was := w.head()
	write(t, w.host, "a", "2\n")
	w.commit("second")
	p := w.prepare()
	want(t, "head", w.head(), was)
	if len(p.Notes) != 1 || !strings.Contains(p.Notes[0], "commits of its own") {
		t.Errorf("notes are %q", p.Notes)
	}
}

package workspace

import (
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"banger/api"
	"banger/internal/daemon/hostcmd"
)

func TestInspect(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "src/deep/a", "a\n")
	head := w.commit("first")
	link := filepath.Join(t.TempDir(), "link")
	check(t, os.Symlink(filepath.Join(w.host, "src"), link))
	was := state(t, w.host, true)
	for path, prefix := range map[string]string{w.host: "", w.host + "/src/deep": "src/deep", link + "/deep": "src/deep", w.host + "/": ""} {
		r, err := w.m.Inspect(context.Background(), path)
		check(t, err)
		want(t, "path", r.Path, w.host)
		want(t, "prefix", r.Prefix, prefix)
		want(t, "name", r.Name, "shop")
		want(t, "head", r.Head+" "+r.Branch, head+" main")
		if !strings.HasPrefix(head, r.HeadShort) || r.HeadShort == "" {
			t.Errorf("short head is %q", r.HeadShort)
		}
	}
	untouched(t, "host", was, state(t, w.host, true))
}

// refusal is something that cannot be brought in.
type refusal struct {
	code  api.Code
	parts []string
	make  func(w *world) (path string)
}

func refusals() map[string]refusal {
	other := func(w *world, name string) {
		w.commit("before")
		w.git(w.host, "switch", "-q", "-c", name)
		write(w.t, w.host, "a", name+"\n")
		w.commit(name)
		w.git(w.host, "switch", "-q", "main")
		write(w.t, w.host, "a", "main\n")
		w.commit("main")
	}
	fails := func(w *world, args ...string) {
		cmd := exec.Command("git", args...)
		cmd.Dir = w.host
		if cmd.Run() == nil {
			w.t.Fatalf("git %q was meant to stop at a conflict", args)
		}
	}
	return map[string]refusal{
		"no repository": {api.Invalid, []string{"it is not in a git repository"}, func(w *world) string { return filepath.Dir(w.host) }},
		"no folder":     {api.NotFound, []string{"there is no such folder"}, func(w *world) string { return w.host + "/none" }},
		"a file": {api.Invalid, []string{"not a folder"}, func(w *world) string {
			write(w.t, w.host, "a", "a")
			return w.host + "/a"
		}},
		"bare": {api.Invalid, []string{"bare"}, func(w *world) string {
			w.git(w.host, "init", "-q", "--bare", "../bare")
			return filepath.Join(filepath.Dir(w.host), "bare")
		}},
		"inside .git": {api.Invalid, []string{"inside the git directory"}, func(w *world) string { return w.host + "/.git/refs" }},
		"merge": {api.Refused, []string{"a merge is under way"}, func(w *world) string {
			other(w, "other")
			fails(w, "merge", "other")
			return w.host
		}},
		"rebase": {api.Refused, []string{"a rebase is under way"}, func(w *world) string {
			other(w, "other")
			fails(w, "rebase", "other")
			return w.host
		}},
		"cherry-pick": {api.Refused, []string{"a cherry-pick is under way"}, func(w *world) string {
			other(w, "other")
			fails(w, "cherry-pick", "other")
			return w.host
		}},
		"conflict of a stash": {api.Refused, []string{"a is in conflict"}, func(w *world) string {
			write(w.t, w.host, "a", "1\n")
			w.commit("1")
			write(w.t, w.host, "a", "2\n")
			w.git(w.host, "stash", "-q")
			write(w.t, w.host, "a", "3\n")
			w.commit("3")
			fails(w, "stash", "pop")
			return w.host
		}},
		"submodule": {api.Refused, []string{"submodules cannot be brought in", "lib"}, func(w *world) string {
			lib := filepath.Join(filepath.Dir(w.host), "lib")
			w.git(filepath.Dir(w.host), "init", "-q", "-b", "main", lib)
			w.git(lib, "commit", "-q", "--allow-empty", "-m", "lib")
			w.git(w.host, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", lib, "lib")
			w.commit("lib")
			return w.host
		}},
		"a path that is no text": {api.Invalid, []string{"not valid text"}, func(w *world) string {
			odd := filepath.Join(filepath.Dir(w.host), "caf\xe9")
			check(w.t, os.Rename(w.host, odd))
			return odd
		}},
	}
}

func TestRefusedInWords(t *testing.T) {
	cases := refusals()
	maps.Copy(cases, disbelieved())
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			path := c.make(w)
			_, err := w.m.Inspect(context.Background(), path)
			wantError(t, err, c.code, append(c.parts, "cannot use")...)
			_, err = w.m.Prepare(context.Background(), vmID, path, false, &steps{})
			wantError(t, err, c.code, c.parts...)
			if exists(w.inside, ".") {
				t.Error("something was made inside")
			}
			if left, _ := os.ReadDir(w.m.scratch); len(left) > 0 {
				t.Errorf("scratch is not empty: %v", left)
			}
		})
	}
}

// TestGitMayNotRead: a root that reads everything cannot make git say so.
func TestGitMayNotRead(t *testing.T) {
	cause := &hostcmd.Error{Argv: []string{"git", "rev-parse"}, ExitCode: 128, Err: errors.New("exit status 128"),
		Stderr: "fatal: error opening '/srv/x/.git': Permission denied\n"}
	err := noWorkTree(t.Context(), repositoryGit(t.TempDir()), cause)
	wantError(t, err, api.Refused, "error opening '/srv/x/.git': Permission denied")
	cause.Stderr = "warning: unable to access '/root/.config/git/config': Permission denied\nfatal: not a git repository (or any of the parent directories): .git\n"
	err = noWorkTree(t.Context(), repositoryGit(t.TempDir()), cause)
	wantError(t, err, api.Invalid, "it is not in a git repository")
}

func TestRefusedAtTheGuest(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	_, _, err := w.tryExport(t.Context(), ExportOptions{})
	wantError(t, err, api.Refused, "cannot read the changes in shop", "holds no repository")
	w.prepare()

	another := filepath.Join(filepath.Dir(w.host), "another")
	w.git(w.host, "clone", "-q", w.host, another)
	_, err = w.m.Prepare(t.Context(), vmID, another, false, &steps{})
	wantError(t, err, api.Refused, "shop holds "+w.host)

	check(t, os.RemoveAll(w.inside))
	_, _, err = w.tryExport(t.Context(), ExportOptions{})
	wantError(t, err, api.Refused, "inside is no repository any more")
	w.prepare()
	want(t, "inside", tree(t, w.inside), tree(t, w.host))

	w.git(w.inside, "update-ref", "-d", refBase)
	_, _, err = w.tryExport(t.Context(), ExportOptions{})
	wantError(t, err, api.Refused, "has no refs/banger/base")
	w.prepare()
	w.export()

	w.guests.down = api.Errorf(api.Refused, "shop is stopped").WithHint("banger start shop")
	_, err = w.tryPrepare(t.Context())
	wantError(t, err, api.Refused, "shop is stopped")
}

func TestOrigin(t *testing.T) {
	for raw, clean := range map[string]string{
		"https://ann:secret@example.org/x.git": "https://example.org/x.git",
		"https://token@example.org/x.git":      "https://example.org/x.git",
		"https://example.org/x.git":            "https://example.org/x.git",
		"ssh://git:secret@example.org:22/x":    "ssh://git@example.org:22/x",
		"git+ssh://git@example.org/x":          "git+ssh://git@example.org/x",
		"git@example.org:x/y.git":              "git@example.org:x/y.git",
		"/srv/x.git":                           "/srv/x.git",
		"https://a:%zz@example.org/":           "",
		"":                                     "",
	} {
		want(t, raw, withoutCredentials(raw), clean)
	}
}

func TestVisible(t *testing.T) {
	for name, shown := range map[string]string{
		"plain name": "plain name", "käse": "käse", "a\x1b[2Jb": `"a\x1b[2Jb"`, "a\nb": `"a\nb"`, "caf\xe9": `"caf\xe9"`, `q"`: `"q\""`, "rtl\u202e": `"rtl\u202e"`,
	} {
		want(t, "visible", visible(name), shown)
	}
	want(t, "list", list([]string{"a", "b\n", "c", "d", "e"}), `a, "b\n", c and 2 more`)
}

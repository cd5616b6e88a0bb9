package workspace

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// paths that are in each other's way.
var mergePaths = [...]string{"a", "a/b", "a/b/c", "a/d", "e", "e/f", "g", "h/i", "h/j"}

// drawFiles makes a tree in which no file is a folder too. Most files are as in like.
func drawFiles(t *rapid.T, name string, like files) files {
	list := files{}
	for _, path := range mergePaths {
		e := like[path]
		if rapid.IntRange(0, 2).Draw(t, name+" change "+path) == 0 {
			e = rapid.SampledFrom([]entry{{}, {modeFile, "1"}, {modeFile, "2"}, {modeExecutable, "1"}, {modeSymlink, "3"}}).Draw(t, name+" "+path)
		}
		if e == (entry{}) || clashes(list, path) {
			continue
		}
		list[path] = e
	}
	return list
}

func clashes(list files, path string) bool {
	for other := range list {
		if strings.HasPrefix(other, path+"/") || strings.HasPrefix(path, other+"/") {
			return true
		}
	}
	return false
}

func consistent(t *rapid.T, what string, list files) {
	for path, e := range list {
		if (e == entry{}) || clashes(list, path) {
			t.Fatalf("%s is no tree: %v", what, list)
		}
	}
}

// never: nothing inside is in the way.
func never(string) bool { return false }

func TestMergeProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		base := drawFiles(t, "base", nil)
		guest, host := drawFiles(t, "guest", base), drawFiles(t, "host", base)
		blockedPath := rapid.SampledFrom(append([]string{""}, mergePaths[:]...)).Draw(t, "blocked")
		blocked := func(p string) bool { return p == blockedPath }
		stuckPath := rapid.SampledFrom(append([]string{""}, mergePaths[:]...)).Draw(t, "stuck")
		stuck := func(p string) bool { return p == stuckPath }
		p := merge(base, guest, host, blocked, never, stuck)
		final, newBase := overlay(guest, p.write), overlay(base, p.base)
		consistent(t, "final", final)
		consistent(t, "new base", newBase)
		changes := 0
		for _, path := range mergePaths {
			b, g, h, f, n := base[path], guest[path], host[path], final[path], newBase[path]
			isStuck := slices.Contains(p.stuck, path)
			kept := slices.Contains(p.kept, path) || isStuck
			if g != b && f != g {
				t.Errorf("%s: a change inside was lost", path)
			}
			if h == b && (f != g || n != b || kept) {
				t.Errorf("%s: the host did not change it", path)
			}
			if kept && (n != b || f != g || g == h) || !kept && n != h {
				t.Errorf("%s: base %v guest %v host %v: final %v new base %v kept %v", path, b, g, h, f, n, kept)
			}
			if kept && g == b && (h == entry{} || !clashes(final, path) && path != blockedPath) && path != stuckPath {
				t.Errorf("%s was kept for nothing", path)
			}
			if isStuck && path != stuckPath && !clashes(files{stuckPath: {}}, path) || isStuck && slices.Contains(p.kept, path) {
				t.Errorf("%s is not stuck", path)
			}
			if _, behind := p.behind[path]; behind != (kept && g == b) || p.behind[path] != b && behind {
				t.Errorf("%s: behind %v", path, p.behind)
			}
			if f != n {
				changes++
			}
		}
		if changes != p.changes {
			t.Errorf("%d changes were counted, there are %d", p.changes, changes)
		}
		again := merge(newBase, final, host, blocked, never, stuck)
		if len(again.write) > 0 || fmt.Sprint(again.kept, again.stuck) != fmt.Sprint(p.kept, p.stuck) {
			t.Errorf("the same once more does something: %+v after %+v", again, p)
		}
		// Interrupted after any of the files was written, it ends in the same.
		partly := files{}
		for path, e := range p.write {
			if rapid.Bool().Draw(t, "written "+path) {
				partly[path] = e
			}
		}
		// What git writes is a tree at each moment.
		half := overlay(guest, partly)
		for path := range half {
			if clashes(half, path) {
				return
			}
		}
		settled := overlay(base, settle(base, half, newBase))
		resumed := merge(settled, half, host, blocked, never, stuck)
		if got := overlay(half, resumed.write); fmt.Sprint(got) != fmt.Sprint(final) {
			t.Errorf("resumed it gives %v, not %v", got, final)
		}
	})
}

func TestMergeKeeps(t *testing.T) {
	one, two := files{"a/b": {modeFile, "1"}}, files{"a/b": {modeFile, "2"}}
	always := func(string) bool { return true }
	for name, c := range map[string]struct {
		base, guest, host files
		blocked, unread   func(string) bool
		kept              string
	}{
		"something ignored is in the way": {nil, nil, one, always, never, "[a/b]"},
		"changed on both sides":           {one, two, nil, never, never, "[a/b]"},
		"not readable inside":             {one, one, two, never, always, "[a/b]"},
		"new, and not readable inside":    {nil, nil, one, never, always, "[a/b]"},
		"the host changed nothing":        {one, one, one, always, always, "[]"},
	} {
		p := merge(c.base, c.guest, c.host, c.blocked, c.unread, never)
		if fmt.Sprint(p.kept) != c.kept || len(p.write)+len(p.base) > 0 {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

// What merge decides is what happens on two real disks.
func TestMergeOnDisk(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "start", "start\n")
	w.commit("first")
	w.prepare()
	base := files{}
	rounds := 0
	rapid.Check(t, func(t *rapid.T) {
		if rounds++; rounds > 12 {
			return
		}
		host, guest := drawFiles(t, "host", base), drawFiles(t, "guest", base)
		w.lay(w.host, host)
		w.lay(w.inside, guest)
		w.git(w.host, "add", "-A")
		pl := merge(base, guest, host, never, never, never)
		p := w.prepare()
		final := overlay(guest, pl.write)
		base = overlay(base, pl.base)
		if got := w.find(w.inside); fmt.Sprint(got) != fmt.Sprint(final) {
			t.Fatalf("inside is %v, want %v", got, final)
		}
		if fmt.Sprint(p.Kept) != fmt.Sprint(pl.kept) || p.Updated != len(pl.write) || p.Workspace.Changes != pl.changes {
			t.Fatalf("prepared %+v, want %+v", p, pl)
		}
		meta, _ := w.export()
		if meta.Files != pl.changes {
			t.Fatalf("%d files in the patch, want %d", meta.Files, pl.changes)
		}
	})
	if rounds < 12 {
		t.Fatalf("only %d rounds", rounds)
	}
}

// lay makes the paths of the merge tests in dir what list says.
func (w *world) lay(dir string, list files) {
	for _, path := range mergePaths {
		top, _, _ := strings.Cut(path, "/")
		check(w.t, os.RemoveAll(filepath.Join(dir, top)))
	}
	for path, e := range list {
		full := filepath.Join(dir, path)
		check(w.t, os.MkdirAll(filepath.Dir(full), 0o755))
		switch e.mode {
		case modeSymlink:
			check(w.t, os.Symlink(e.oid, full))
		case modeExecutable:
			check(w.t, os.WriteFile(full, []byte(e.oid), 0o755))
		default:
			check(w.t, os.WriteFile(full, []byte(e.oid), 0o644))
		}
	}
}

// find is the reverse of lay.
func (w *world) find(dir string) files {
	list := files{}
	for _, path := range mergePaths {
		full := filepath.Join(dir, path)
		info, err := os.Lstat(full)
		if err != nil || info.IsDir() {
			continue
		}
		if info.Mode()&os.ModeSymlink != 0 {
			target, err := os.Readlink(full)
			check(w.t, err)
			list[path] = entry{modeSymlink, target}
			continue
		}
		mode := modeFile
		if info.Mode()&0o100 != 0 {
			mode = modeExecutable
		}
		list[path] = entry{mode, read(w.t, dir, path)}
	}
	return list
}

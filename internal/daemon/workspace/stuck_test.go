package workspace

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
	"banger/test/need"
)

// stuckWorld is one whose guest is another user, with files that have come in.
func stuckWorld(t *testing.T, names ...string) *world {
	need.Need(t, "root")
	w := newWorld(t)
	w.otherUser()
	// The test looks at the guest's repository as root.
	w.git(w.host, "config", "--global", "safe.directory", "*")
	for _, name := range names {
		write(t, w.host, name, name+"\n")
	}
	w.commit("first")
	w.prepare()
	return w
}

// free gives a path inside back to the guest's user.
func (w *world) free(path string) {
	w.t.Helper()
	owner := w.owner()
	w.chown(path, int(owner.Uid), int(owner.Gid))
}

// oddNames cannot travel as text.
var oddNames = [...]string{"caf\xe9", "two\nlines"}

func TestStuckInAFolderOfRoots(t *testing.T) {
	w := stuckWorld(t, "a", "d/mod", "d/gone", "d/same", "e/sub/x", "e/x", "z")
	first := w.head()
	w.chown("d", 0, 0)
	w.chown("e", 0, 0)
	w.free("e/sub")
	inside := tree(t, filepath.Join(w.inside, "d"))
	check(t, os.Remove(filepath.Join(w.host, "d/gone")))
	// git ends at a folder that it cannot make, and z comes after two of them.
	for _, name := range []string{"a", "d/mod", "d/new/x", "e/new/x", "e/sub/x", "e/sub/new/x", "z", "d/" + oddNames[0], "d/" + oddNames[1]} {
		write(t, w.host, name, "host\n")
	}
	second := w.commit("second")
	p := w.prepare()
	want(t, "kept", p.Kept, "[]")
	want(t, "notes", p.Notes, `[left as they are, not writable inside: "d/caf\xe9", d/gone, d/mod and 3 more `+
		"HEAD inside stays where it is, as files there cannot be written; the host's is at refs/banger/host]")
	want(t, "updated", p.Updated, 4)
	want(t, "changes", p.Workspace.Changes, 0)
	want(t, "d", tree(t, filepath.Join(w.inside, "d")), inside)
	for _, name := range []string{"a", "z", "e/sub/x", "e/sub/new/x"} {
		want(t, name, read(t, w.inside, name), "host\n")
	}
	want(t, "head", w.head(), first)
	want(t, "its own", w.git(w.inside, "rev-parse", refHost), second)
	want(t, "next", strings.Contains(w.git(w.inside, "for-each-ref"), refNext), false)

	// What is left is no change made inside, from no side.
	w.wantPatches("")
	p = w.prepare()
	want(t, "the next time", p.Notes, `[left as they are, not writable inside: "d/caf\xe9", d/gone, d/mod and 3 more]`)
	want(t, "updated", p.Updated, 0)
	write(t, w.inside, "a", "inside\n")
	w.wantPatches("a")

	w.free("")
	p = w.prepare()
	want(t, "notes", p.Notes, "[]")
	want(t, "updated", p.Updated, 6)
	want(t, "head", w.head(), "refs/heads/main "+second)
	want(t, "status", w.git(w.inside, "status", "--porcelain"), " M a")
	write(t, w.inside, "a", "host\n")
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
	want(t, "fsck", w.git(w.inside, "fsck", "--strict", "--no-dangling"), "")
	w.wantPatches("")
}

// wantPatches looks at both patches, each of which changes these files and applies.
func (w *world) wantPatches(names ...string) {
	w.t.Helper()
	for _, fromHead := range []bool{false, true} {
		_, patch, err := w.tryExport(w.t.Context(), ExportOptions{FromHead: fromHead})
		check(w.t, err)
		if patch == "" {
			want(w.t, fmt.Sprintf("files, from head %v", fromHead), "["+strings.Join(names, " ")+"]", "[]")
			continue
		}
		write(w.t, filepath.Dir(w.host), "patch", patch)
		out := w.git(w.host, "apply", "--check", "--numstat", "../patch")
		var got []string
		for line := range strings.SplitSeq(out, "\n") {
			got = append(got, strings.Split(line, "\t")[2])
		}
		want(w.t, fmt.Sprintf("files, from head %v", fromHead), got, names)
	}
}

// A folder takes new names, and yet a file in it does not go away.
func TestStuckFiles(t *testing.T) {
	w := stuckWorld(t, "a", "s/mod", "s/gone", "s/mine", "i", "m", "r/x", "z")
	// A repository inside the repository stays when the host's goes, and is not stuck.
	lib := filepath.Join(filepath.Dir(w.host), "lib")
	w.git(filepath.Dir(w.host), "init", "-q", lib)
	w.git(lib, "commit", "-q", "--allow-empty", "-m", "lib")
	w.git(w.host, "update-index", "--add", "--cacheinfo", "160000,"+w.git(lib, "rev-parse", "HEAD")+",lib")
	check(t, os.Mkdir(filepath.Join(w.host, "lib"), 0o755))
	w.prepare()
	w.git(w.inside, "clone", "-q", lib, "lib")
	w.free("lib")
	check(t, os.RemoveAll(filepath.Join(w.host, "lib")))
	check(t, os.Chmod(filepath.Join(w.inside, "s"), 0o777|os.ModeSticky))
	check(t, os.Lchown(filepath.Join(w.inside, "s"), 0, 0))
	for _, name := range []string{"s/mod", "s/gone"} {
		check(t, os.Lchown(filepath.Join(w.inside, name), 0, 0))
	}
	w.chown("r", 0, 0)
	check(t, unix.Mount(filepath.Join(w.inside, "m"), filepath.Join(w.inside, "m"), "", unix.MS_BIND, ""))
	unmount := func() { _ = unix.Unmount(filepath.Join(w.inside, "m"), unix.MNT_DETACH) }
	t.Cleanup(unmount)
	stuck := []string{"m", "r/new/x", "s/gone", "s/mod"}
	immutable := setImmutable(t, filepath.Join(w.inside, "i"), true)
	if immutable {
		t.Cleanup(func() { setImmutable(t, filepath.Join(w.inside, "i"), false) })
		stuck = append([]string{"i"}, stuck...)
	}
	check(t, os.Remove(filepath.Join(w.host, "s/gone")))
	for _, name := range []string{"a", "i", "m", "r/new/x", "s/mod", "s/mine", "s/new", "z"} {
		write(t, w.host, name, "host\n")
	}
	w.git(w.host, "add", "-A")
	p := w.prepare()
	want(t, "kept", p.Kept, "[]")
	want(t, "notes", p.Notes, fmt.Sprintf("[left as they are, not writable inside: %s]", list(stuck)))
	for _, name := range []string{"a", "s/mine", "s/new", "z"} {
		want(t, name, read(t, w.inside, name), "host\n")
	}
	w.wantPatches("")
	// They go away alone, without a folder that stops git first.
	w.free("r")
	p = w.prepare()
	want(t, "updated", p.Updated, 1)
	stuck = slices.DeleteFunc(stuck, func(name string) bool { return name == "r/new/x" })
	want(t, "notes", p.Notes, fmt.Sprintf("[left as they are, not writable inside: %s]", list(stuck)))
	unmount()
	setImmutable(t, filepath.Join(w.inside, "i"), false)
	w.free("s")
	want(t, "notes", w.prepare().Notes, "[]")
	check(t, os.RemoveAll(filepath.Join(w.inside, "lib")))
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

// setImmutable is chattr(1); false where the file system does not know it.
func setImmutable(t *testing.T, path string, is bool) bool {
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		return false
	}
	if flags &^= unix.STATX_ATTR_IMMUTABLE; is {
		flags |= unix.STATX_ATTR_IMMUTABLE // the same bit as FS_IMMUTABLE_FL
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags) == nil
}

// What git does not know of is in the way, or the way cannot be looked at.
func TestStuckWays(t *testing.T) {
	w := stuckWorld(t, "a", "x/x", "folder/x", "folder/sub/y")
	check(t, syscall.Mkfifo(filepath.Join(w.inside, "pipe"), 0o666))
	check(t, syscall.Mkfifo(filepath.Join(w.inside, "above"), 0o666))
	w.chown("x", 0, 0)
	check(t, os.Chmod(filepath.Join(w.inside, "x"), 0o746)) // it may be written, but not gone through
	w.chown("folder", 0, 0)
	check(t, os.RemoveAll(filepath.Join(w.host, "folder")))
	for _, name := range []string{"a", "pipe", "above/new/x", "x/new", "folder"} {
		write(t, w.host, name, "host\n")
	}
	w.commit("second")
	p := w.prepare()
	want(t, "a", read(t, w.inside, "a"), "host\n")
	want(t, "stuck", strings.Contains(strings.Join(p.Notes, "\n"),
		"left as they are, not writable inside: "+list([]string{"above/new/x", "folder", "folder/sub/y", "folder/x", "pipe", "x/new"})), true)
	want(t, "kept", p.Kept, "[]")
	w.wantPatches("")
	check(t, os.Remove(filepath.Join(w.inside, "pipe")))
	check(t, os.Remove(filepath.Join(w.inside, "above")))
	check(t, os.Chmod(filepath.Join(w.inside, "x"), 0o755))
	w.free("")
	want(t, "notes", w.prepare().Notes, "[]")
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

// Changed inside as well, by root: it is the conflict that is told of. The same on both
// sides: it has come in.
func TestStuckAndChanged(t *testing.T) {
	w := stuckWorld(t, "d/both", "d/equal", "d/stuck")
	w.chown("d", 0, 0)
	write(t, w.inside, "d/both", "inside\n")
	write(t, w.inside, "d/equal", "host\n")
	for _, name := range []string{"d/both", "d/equal", "d/stuck"} {
		write(t, w.host, name, "host\n")
	}
	w.commit("second")
	p := w.prepare()
	want(t, "kept", p.Kept, "[d/both]")
	want(t, "notes", p.Notes, "[left as they are, not writable inside: d/stuck "+
		"HEAD inside stays where it is, as files changed on both sides; the host's is at refs/banger/host]")
	_, patch := w.export()
	want(t, "files", strings.Count(patch, "diff --git"), 1)
}

// git only warns of what it cannot remove. The commit has a file where the folder is.
func TestStuckDeletion(t *testing.T) {
	w := stuckWorld(t, "a", "d/gone")
	w.chown("d", 0, 0)
	check(t, os.RemoveAll(filepath.Join(w.host, "d")))
	write(t, w.host, "d", "file\n")
	w.commit("second")
	check(t, os.Remove(filepath.Join(w.host, "d")))
	p := w.prepare()
	want(t, "notes", p.Notes[0], "left as they are, not writable inside: d/gone")
	write(t, w.inside, "a", "inside\n")
	w.wantPatches("a")
	w.free("d")
	w.prepare()
	want(t, "gone", exists(w.inside, "d/gone"), false)
}

// Where git ends before it has tried all, and no folder above says why, what was not
// tried is not stuck.
func TestStuckWhereGitEnds(t *testing.T) {
	w := stuckWorld(t, "s/a", "s/folder/x", "z")
	check(t, os.Chmod(filepath.Join(w.inside, "s"), 0o777|os.ModeSticky))
	check(t, os.Chmod(filepath.Join(w.inside, "s/folder"), 0o777))
	for _, name := range []string{"s", "s/a", "s/folder"} {
		check(t, os.Lchown(filepath.Join(w.inside, name), 0, 0))
	}
	check(t, os.RemoveAll(filepath.Join(w.host, "s/folder")))
	for _, name := range []string{"s/a", "s/folder", "z"} {
		write(t, w.host, name, "host\n")
	}
	w.commit("second")
	p := w.prepare()
	want(t, "notes", p.Notes[0], "left as they are, not writable inside: s/a, s/folder")
	want(t, "z", read(t, w.inside, "z"), "host\n")
	w.wantPatches("")
	w.free("s")
	want(t, "notes", w.prepare().Notes, "[]")
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

// git gives up at each of many mount points, and yet the rest comes in.
func TestStuckAtManyMountPoints(t *testing.T) {
	names := []string{"a"}
	var folders []string
	for i := range 2 * mergeTries {
		folders = append(folders, fmt.Sprintf("d%d", i))
		names = append(names, folders[i]+"/x")
	}
	w := stuckWorld(t, names...)
	unmount := func() {
		for _, name := range folders {
			_ = unix.Unmount(filepath.Join(w.inside, name), unix.MNT_DETACH)
		}
	}
	t.Cleanup(unmount)
	for _, name := range folders {
		check(t, unix.Mount(filepath.Join(w.inside, name), filepath.Join(w.inside, name), "", unix.MS_BIND, ""))
		check(t, os.RemoveAll(filepath.Join(w.host, name)))
		write(t, w.host, name, "host\n")
	}
	write(t, w.host, "a", "host\n")
	w.commit("second")
	p := w.prepare()
	if !strings.HasPrefix(p.Notes[0], "left as they are, not writable inside: d0, ") {
		t.Errorf("notes are %q", p.Notes)
	}
	want(t, "a", read(t, w.inside, "a"), "host\n")
	w.wantPatches("")
	unmount()
	want(t, "notes", w.prepare().Notes, "[]")
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

// A guest that lost its power while git wrote into a folder that is root's now.
func TestStuckAndTorn(t *testing.T) {
	w := stuckWorld(t, "a", "d/x")
	write(t, w.host, "a", "host\n")
	write(t, w.host, "d/x", "host, more\n")
	w.commit("second")
	w.guests.setHook(func(_ int, req *wire.Request) fault {
		if req.Exec != nil && slices.Contains(req.Exec.Argv, "-u") {
			write(t, w.inside, "d/x", "host")
			return before
		}
		return none
	})
	if _, err := w.tryPrepare(t.Context()); err == nil {
		t.Fatal("it was not cut")
	}
	w.chown("d", 0, 0)
	w.restart()
	want(t, "notes", w.prepare().Notes[0], "left as they are, not writable inside: d/x")
	want(t, "a", read(t, w.inside, "a"), "host\n")
	w.free("d")
	// It was whole in no tree, so it looks like a change made inside.
	want(t, "kept", w.prepare().Kept, "[d/x]")
}

// Nothing is asked for that costs a request while all can be written; what was written
// by a checkout that failed is on the disk before the base says so.
func TestStuckCostsNothingElse(t *testing.T) {
	w := stuckWorld(t, "a", "d/x")
	calls := func() (names []string) {
		w.guests.setHook(nil)
		w.prepare()
		for _, argv := range w.guests.calls {
			names = append(names, strings.Join(argv[:min(2, len(argv))], " "))
		}
		return names
	}
	write(t, w.host, "a", "2\n")
	write(t, w.host, "d/x", "2\n")
	plain := calls()
	want(t, "checkouts", count(plain, "xargs -0"), 0)
	w.chown("d", 0, 0)
	write(t, w.host, "a", "3\n")
	write(t, w.host, "d/x", "3\n")
	stuck := calls()
	want(t, "questions", count(stuck, "xargs -0"), 1)
	want(t, "syncs", count(stuck, "sync -f"), 1)
	t.Logf("%d requests, %d with a file that cannot be written", len(plain), len(stuck))
}

func count(list []string, item string) (n int) {
	for _, s := range list {
		if s == item {
			n++
		}
	}
	return n
}

// Cut at each request, it shows no change of the host's as the guest's, and the next one
// ends as if nothing had been cut.
func TestStuckCutAnywhere(t *testing.T) {
	w := stuckWorld(t, "a", "b", "d/mod", "d/gone")
	write(t, w.inside, "b", "inside\n")
	_, inside := w.export()
	lock := func() { w.chown("d", 0, 0) }
	for _, name := range []string{"a", "d/mod", "d/new/x", "z"} {
		write(t, w.host, name, "host\n")
	}
	check(t, os.Remove(filepath.Join(w.host, "d/gone")))
	w.commit("second")
	dir := filepath.Dir(w.inside)
	check(t, os.CopyFS(dir+".as it was", os.DirFS(dir)))
	owner := w.owner()
	asked := false
	// A sample: all that is written comes late.
	for k := 13; ; k += 3 {
		check(t, os.RemoveAll(w.inside))
		check(t, os.CopyFS(dir, os.DirFS(dir+".as it was")))
		w.chown("", int(owner.Uid), int(owner.Gid))
		lock()
		w.restart()
		cut := false
		w.guests.setHook(func(n int, req *wire.Request) fault {
			if req.Exec != nil && req.Exec.Argv[0] == "xargs" {
				asked = true
			}
			if cut {
				return before
			}
			if cut = n == k; cut {
				return after
			}
			return none
		})
		_, err := w.tryPrepare(context.Background())
		if !cut {
			check(t, err)
			if k < 30 || !asked {
				t.Errorf("%d requests are fewer than it needs", k-1)
			}
			return
		}
		w.restart()
		_, patch := w.export()
		want(t, fmt.Sprintf("patch after the cut at %d", k), patch, inside)
		p := w.prepare()
		want(t, "kept", p.Kept, "[]")
		want(t, "notes", strings.Contains(strings.Join(p.Notes, ""), "d/gone, d/mod, d/new/x"), true)
		want(t, "a, z", read(t, w.inside, "a")+read(t, w.inside, "z"), "host\nhost\n")
		_, patch = w.export()
		want(t, fmt.Sprintf("patch at the end after the cut at %d", k), patch, inside)
		w.free("")
		w.prepare()
		write(t, w.inside, "b", "b\n")
		want(t, "inside", tree(t, w.inside), tree(t, w.host))
		if t.Failed() {
			return
		}
	}
}

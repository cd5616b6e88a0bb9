package workspace

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/api"
	"banger/internal/guest/agent"
	"banger/internal/guest/wire"
)

// otherUser makes the guest's user one that cannot read all files.
func (w *world) otherUser() {
	w.t.Helper()
	if os.Getuid() != 0 {
		return
	}
	w.guests.agent = agent.New(agent.Options{Config: wire.Config{User: &wire.User{Name: "nobody"}}})
	for dir := filepath.Dir(w.host); strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		check(w.t, os.Chmod(dir, 0o755))
	}
}

// lock makes a path inside one that the guest's user can neither read nor change.
func (w *world) lock(path string) {
	w.t.Helper()
	path = filepath.Join(w.inside, path)
	check(w.t, os.Lchown(path, os.Getuid(), os.Getgid()))
	check(w.t, os.Chmod(path, 0))
}

// owner is whose the repository inside is.
func (w *world) owner() *syscall.Stat_t {
	w.t.Helper()
	info, err := os.Lstat(w.inside)
	check(w.t, err)
	return info.Sys().(*syscall.Stat_t)
}

func TestUnreadableInside(t *testing.T) {
	w := newWorld(t)
	w.otherUser()
	for _, name := range []string{"top", "same", "dir/a", "dir/b", "free"} {
		write(t, w.host, name, name+"\n")
	}
	write(t, w.host, "forced.o", "o\n")
	write(t, w.host, ".gitignore", "*.o\n")
	w.git(w.host, "add", "-f", "forced.o")
	w.commit("first")
	w.prepare()
	write(t, w.inside, "rootfile", "x")
	write(t, w.inside, "locked/x", "x")
	for _, path := range []string{"top", "same", "dir", "forced.o", "rootfile", "locked"} {
		w.lock(path)
	}
	for _, name := range []string{"top", "dir/a", "dir/new", "forced.o", "free"} {
		write(t, w.host, name, "host\n")
	}
	w.git(w.host, "add", "dir/new")
	p := w.prepare()
	want(t, "kept", p.Kept, "[dir/a dir/new forced.o top]")
	want(t, "free", read(t, w.inside, "free"), "host\n")
	note := "left out, not readable inside: dir/, forced.o, locked/ and 3 more"
	want(t, "notes", p.Notes[0], note)
	want(t, "the next time", w.prepare().Kept, p.Kept)

	write(t, w.inside, "free", "inside\n")
	meta, patch := w.export()
	want(t, "files", meta.Files, 1)
	want(t, "notes", meta.Notes, "["+note+"]")
	if strings.Contains(patch, "top") || !strings.Contains(patch, "+inside") {
		t.Errorf("patch is %s", patch)
	}
	owner := w.owner()
	for _, path := range []string{"top", "same", "dir", "forced.o", "rootfile", "locked"} {
		check(t, os.Chmod(filepath.Join(w.inside, path), 0o755))
		check(t, os.Lchown(filepath.Join(w.inside, path), int(owner.Uid), int(owner.Gid)))
	}
	check(t, os.Chmod(filepath.Join(w.inside, "same"), 0o644))
	// The mode is a change now.
	want(t, "readable again", w.prepare().Kept, "[forced.o top]")
	want(t, "dir", read(t, w.inside, "dir/a")+read(t, w.inside, "dir/new"), "host\nhost\n")
}

func TestUnreadNotes(t *testing.T) {
	u := unread{tracked: map[string]bool{"t": true, "d/t": true}, folders: map[string]bool{}, others: map[string]bool{}}
	u.parse("warning: could not open directory 'd/': Permission denied\nerror: open(\"a\x1bb\"): Permission denied\n" +
		"error: unable to index file 'x'\nd/t: Permission denied\nerror: 'e/' does not have a commit checked out\n")
	want(t, "notes", u.notes("ann"), `[left out, not readable inside by ann: "a\x1bb", d/, t left out: 'e/' does not have a commit checked out]`)
	for path, is := range map[string]bool{"t": true, "d/t": true, "d/new/x": true, "new": false, "dd": false} {
		want(t, path, u.has(path), is)
	}
}

// chown gives a path inside, and all below it, to somebody.
func (w *world) chown(path string, uid, gid int) {
	w.t.Helper()
	check(w.t, filepath.WalkDir(filepath.Join(w.inside, path), func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return os.Lchown(path, uid, gid)
	}))
}

// What the guest's user may not write below .git is the guest's state, and root can mend
// it.
func TestUnwritableGit(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can have another user in the guest")
	}
	w := newWorld(t)
	w.otherUser()
	write(t, w.host, "d/a", "a\n")
	w.commit("first")
	w.prepare()
	owner := w.owner()
	write(t, w.host, "d/a", "b\n")
	w.commit("second")
	for _, path := range []string{".git/objects", ".git"} {
		w.chown(path, 0, 0)
		_, err := w.tryPrepare(context.Background())
		wantError(t, err, api.Refused, "ermission denied")
		want(t, path, api.HintOf(err), "banger exec -u root shop chown -R USER "+w.inside+"/.git")
		w.chown(path, int(owner.Uid), int(owner.Gid))
	}
	want(t, "kept", w.prepare().Kept, "[]")
	want(t, "a", read(t, w.inside, "d/a"), "b\n")
}

func TestNoRepositoryAnyMore(t *testing.T) {
	for _, gone := range []string{".git", ".git/banger"} {
		w := newWorld(t)
		write(t, w.host, "a", "a\n")
		w.commit("first")
		w.prepare()
		write(t, w.inside, "mine", "mine\n")
		check(t, os.RemoveAll(filepath.Join(w.inside, gone)))
		for range 2 {
			_, _, err := w.tryExport(context.Background(), ExportOptions{})
			wantError(t, err, api.Refused, w.inside+" inside is no repository any more")
			want(t, "hint", api.HintOf(err), "banger up")
		}
		p := w.prepare()
		fresh := w.inside + "-2"
		want(t, "place", p.Workspace.GuestPath, fresh)
		want(t, "notes", p.Notes, "["+w.inside+" inside is no repository any more: its files stay there, a fresh copy is at "+fresh+"]")
		want(t, "mine", read(t, w.inside, "mine"), "mine\n")
		want(t, "fresh", read(t, fresh, "a"), "a\n")
		want(t, "the next time", w.prepare().Notes, "[]")
	}
}

// A branch stands on a commit: what was dirty on the host is told of, and by itself
// makes no patch.
func TestExportFromHead(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"a", "b", "c"} {
		write(t, w.host, name, "1\n")
	}
	w.commit("first")
	write(t, w.host, "a", "dirty\n")
	write(t, w.host, "b", "dirty\n")
	w.prepare()
	meta, patch, err := w.tryExport(t.Context(), ExportOptions{FromHead: true})
	check(t, err)
	want(t, "nothing changed inside", []any{meta.Files, meta.Notes, patch}, "[0 [] ]")
	write(t, w.inside, "b", "inside\n")
	write(t, w.inside, "c", "inside\n")
	meta, patch, err = w.tryExport(t.Context(), ExportOptions{FromHead: true})
	check(t, err)
	want(t, "files", meta.Files, 3)
	want(t, "notes", meta.Notes, "[the branch also holds what was changed on the host before it came in: 2 files]")
	if !strings.Contains(patch, "+dirty") {
		t.Errorf("patch is %s", patch)
	}
	// From the base there is nothing of it.
	meta, _ = w.export()
	want(t, "from the base", []any{meta.Files, meta.Notes}, "[2 []]")
}

// What a command in the guest fails of is never a defect of banger.
func TestGuestFailureIsRefused(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	w.prepare()
	w.guests.setHook(func(_ int, req *wire.Request) fault {
		if req.Exec != nil && len(req.Exec.Argv) > 1 && req.Exec.Argv[1] == "for-each-ref" {
			req.Exec.Argv = []string{"git", "no-such-command"}
		}
		return none
	})
	_, err := w.tryPrepare(context.Background())
	wantError(t, err, api.Refused, "no-such-command")
	_, _, err = w.tryExport(context.Background(), ExportOptions{})
	wantError(t, err, api.Refused, "no-such-command")
}

package workspace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/guest/wire"
)

// A prepare is cut at each request to the guest, before and after it took effect, the
// first prepare and a later one. A patch taken right after holds no change of the
// host's, and the next prepare ends as if nothing had been cut.
func TestPrepareCutAnywhere(t *testing.T) {
	for _, second := range []bool{false, true} {
		w, inside := cutWorld(t, second)
		for _, how := range []fault{before, after} {
			requests := 0
			for done := false; !done; requests++ {
				// Before a request is where the one before it had been answered: a sample will do.
				if how == before && requests%4 != 3 && requests < 20 {
					continue
				}
				t.Run(fmt.Sprintf("second=%v fault=%d at=%d", second, how, requests+1), func(t *testing.T) {
					done = true
					w.t = t
					done = !w.cutAt(second, inside, how, requests+1)
				})
			}
			t.Logf("second=%v fault=%d: cut at %d requests", second, how, requests-1)
			if requests < 12 && !t.Failed() {
				t.Error("the prepare has fewer requests than it needs")
			}
		}
	}
}

// cutWorld is what each prepare is cut in: a new VM, or one with work in it. It can be
// had again by w.reset.
func cutWorld(t *testing.T, second bool) (w *world, inside string) {
	w = newWorld(t)
	for _, name := range []string{"host", "guest", "same", "d/gone", "both"} {
		write(t, w.host, name, name+"\n")
	}
	w.commit("first")
	if second {
		w.prepare()
		write(t, w.inside, "guest", "changed inside\n")
		write(t, w.inside, "new inside", "new\n")
		write(t, w.inside, "both", "inside\n")
		_, inside = w.export()
		write(t, w.host, "host", "changed on the host\n")
		write(t, w.host, "both", "host\n")
		write(t, w.host, "d/new", "new\n")
		check(t, os.Remove(filepath.Join(w.host, "d/gone")))
		w.commit("second")
		write(t, w.host, "host", "and dirty\n")
	} else {
		check(t, os.MkdirAll(filepath.Dir(w.inside), 0o755))
	}
	check(t, os.CopyFS(filepath.Dir(w.inside)+".as it was", os.DirFS(filepath.Dir(w.inside))))
	return w, inside
}

func (w *world) reset(second bool) {
	ctx := context.Background()
	dir := filepath.Dir(w.inside)
	check(w.t, os.RemoveAll(dir))
	check(w.t, os.CopyFS(dir, os.DirFS(dir+".as it was")))
	if !second {
		check(w.t, w.store.DeleteVM(ctx, vmID)) // its workspace goes with it
		w.insertVM()
	}
	w.restart()
}

// cutAt returns false when the prepare ended before request k.
func (w *world) cutAt(second bool, inside string, how fault, k int) bool {
	t := w.t
	w.reset(second)
	was := state(t, w.host, true)
	cut := false
	w.guests.setHook(func(n int, req *wire.Request) fault {
		// What a dead daemon's guest still does is throwing the work folder away, or not.
		if cut || n == k {
			cut = true
			if n == k {
				return how
			}
			return before
		}
		return none
	})
	_, err := w.tryPrepare(context.Background())
	if !cut {
		check(t, err)
		return false
	}
	w.restart()
	untouched(t, "host", was, state(t, w.host, true))
	if _, patch, err := w.tryExport(context.Background(), ExportOptions{}); err == nil {
		want(t, "patch after the cut", patch, inside)
	} else if second || api.CodeOf(err) != api.Refused {
		t.Errorf("export after the cut: %v", err)
	}
	p := w.prepare()
	final := tree(t, w.inside)
	for _, name := range []string{"host", "same"} {
		want(t, name, read(t, w.inside, name), read(t, w.host, name))
	}
	want(t, "gone", exists(w.inside, "d/gone"), !second)
	if second {
		want(t, "kept", p.Kept, "[both]")
		want(t, "changes", p.Workspace.Changes, 3)
		want(t, "guest", read(t, w.inside, "guest"), "changed inside\n")
		want(t, "new", read(t, w.inside, "d/new"), "new\n")
		_, patch := w.export()
		want(t, "patch", patch, inside)
	} else {
		want(t, "inside", final, tree(t, w.host))
		want(t, "status", w.git(w.inside, "status", "--porcelain"), "")
		want(t, "head", w.git(w.inside, "rev-parse", "HEAD"), w.git(w.host, "rev-parse", "HEAD"))
	}
	if k%5 == 0 {
		want(t, "fsck", w.git(w.inside, "fsck", "--strict", "--no-dangling"), "")
		want(t, "updated once more", w.prepare().Updated, 0)
	}
	want(t, "next", strings.Contains(w.git(w.inside, "for-each-ref"), refNext), false)
	return true
}

// A guest that loses its power while files are written has some of them.
func TestPrepareCutWhileFilesAreWritten(t *testing.T) {
	w := newWorld(t)
	for _, name := range []string{"a", "b", "c", "torn", "empty", "gone"} {
		write(t, w.host, name, "1\n")
	}
	w.commit("first")
	w.prepare()
	for _, name := range []string{"a", "b", "new", "torn", "empty", "gone"} {
		write(t, w.host, name, "2\nmore\n")
	}
	w.commit("second")
	write(t, w.inside, "c", "inside\n")
	_, patch := w.export()
	w.guests.setHook(func(_ int, req *wire.Request) fault {
		if req.Exec != nil && strings.Contains(strings.Join(req.Exec.Argv, " "), "-m -u") {
			write(t, w.inside, "a", "2\nmore\n")
			write(t, w.inside, "new", "2\nmore\n")
			write(t, w.inside, "torn", "2\nmo")
			write(t, w.inside, "empty", "")
			check(t, os.Remove(filepath.Join(w.inside, "gone")))
			return before
		}
		return none
	})
	if _, err := w.tryPrepare(context.Background()); err == nil {
		t.Fatal("it was not cut")
	}
	w.restart()
	_, now := w.export()
	want(t, "patch", now, patch)
	// The host goes on meanwhile.
	write(t, w.host, "a", "3\n")
	p := w.prepare()
	want(t, "kept", p.Kept, "[]")
	want(t, "a", read(t, w.inside, "a"), "3\n")
	for _, name := range []string{"b", "new", "torn", "empty", "gone"} {
		want(t, name, read(t, w.inside, name), "2\nmore\n")
	}
	_, now = w.export()
	want(t, "patch", now, patch)
}

// What a prepare leaves that ended in the middle of a request, by SIGKILL or with its
// guest, is in nobody's way: a folder with nothing but an empty .git, locks of our refs.
func TestLeftInTheMiddleOfARequest(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	check(t, os.MkdirAll(filepath.Join(w.inside, ".git"), 0o755))
	want(t, "folder", w.prepare().Workspace.GuestPath, w.inside)
	for _, name := range []string{"refs/banger/next", "refs/banger/base", "refs/banger/head", "refs/banger/host", "banger/HEAD", "banger/index"} {
		write(t, w.inside, ".git/"+name+".lock", "")
	}
	write(t, w.host, "a", "b\n")
	w.commit("second")
	w.git(w.host, "checkout", "-q", "-b", "other")
	w.prepare()
	want(t, "a", read(t, w.inside, "a"), "b\n")
	want(t, "branch", w.git(w.inside, "symbolic-ref", "HEAD"), "refs/heads/other")
}

func TestFullDiskInside(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	write(t, w.host, "big", strings.Repeat("0123456789abcde\n", 1<<15))
	w.commit("first")
	if os.Getuid() != 0 {
		t.Skip("only root can mount a small file system")
	}
	check(t, os.MkdirAll(filepath.Dir(w.inside), 0o755))
	check(t, unix.Mount("tmpfs", filepath.Dir(w.inside), "tmpfs", 0, "size=300k"))
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Dir(w.inside), unix.MNT_DETACH); err != nil {
			t.Errorf("the test's file system stays mounted: %v", err)
		}
	})
	_, err := w.tryPrepare(context.Background())
	wantError(t, err, api.NoSpace, "cannot bring", "full")
	check(t, unix.Mount("tmpfs", filepath.Dir(w.inside), "tmpfs", unix.MS_REMOUNT, "size=20m"))
	w.prepare()
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

// The commands go on inside for a moment when the connection is gone: a prepare that is
// cancelled while git writes files leaves whole files.
func TestCancelAndInterrupt(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	for _, verb := range []string{"index-pack", "read-tree", "add"} {
		started, release := make(chan struct{}), make(chan struct{})
		hit := false
		w.guests.setHook(func(_ int, req *wire.Request) fault {
			if !hit && req.Exec != nil && len(req.Exec.Argv) > 1 && req.Exec.Argv[1] == verb {
				hit = true
				close(started)
				<-release
				return before
			}
			return none
		})
		failed := make(chan error, 1)
		go func() { _, err := w.tryPrepare(context.Background()); failed <- err }()
		<-started
		ended := make(chan error, 1)
		go func() { ended <- w.m.Interrupt(context.Background(), vmID) }()
		// The job is waited for, and it does not wait for the guest.
		select {
		case err := <-ended:
			check(t, err)
		case <-time.After(20 * time.Second):
			t.Fatal("Interrupt waits for a guest that is stuck")
		}
		wantError(t, <-failed, api.Cancelled, "the VM is going down")
		close(release)
	}
	w.guests.setHook(nil)
	check(t, w.m.Interrupt(context.Background(), vmID))
	ctx, cancel := context.WithTimeout(context.Background(), time.Nanosecond)
	defer cancel()
	check(t, w.m.Interrupt(ctx, "another"))
	w.prepare()
	want(t, "inside", tree(t, w.inside), tree(t, w.host))
}

// One job at a time: the second waits, and its wait ends with its context.
func TestOneJobAtATime(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	w.prepare()
	write(t, w.inside, "a", "b\n")
	inPatch, release := make(chan struct{}), make(chan struct{})
	first := make(chan error, 1)
	go func() {
		first <- w.m.Export(context.Background(), vmID, ExportOptions{}, func(Meta) (io.Writer, error) {
			close(inPatch)
			<-release
			return io.Discard, nil
		})
	}()
	<-inPatch
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := w.tryPrepare(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second job: %v", err)
	}
	close(release)
	check(t, <-first)
	w.prepare()
}

// errFull is a writer on a full disk.
type errFull struct{}

func (errFull) Write([]byte) (int, error) { return 0, errors.New("cannot write") }

func TestExportToABrokenWriter(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	w.commit("first")
	w.prepare()
	write(t, w.inside, "big", strings.Repeat("line\n", 1<<20))
	err := w.m.Export(context.Background(), vmID, ExportOptions{}, func(Meta) (io.Writer, error) { return errFull{}, nil })
	if err == nil || !strings.Contains(err.Error(), "cannot write") {
		t.Errorf("export: %v", err)
	}
	meta, patch := w.export()
	if meta.Files != 1 || len(patch) < 5<<20 {
		t.Errorf("%d files, %d bytes", meta.Files, len(patch))
	}
}

// Files that change inside while they are brought in are never overwritten.
func TestChangedInsideMeanwhile(t *testing.T) {
	w := newWorld(t)
	write(t, w.host, "a", "a\n")
	write(t, w.host, "b", "b\n")
	w.commit("first")
	w.prepare()
	write(t, w.host, "a", "from the host\n")
	n := 0
	w.guests.setHook(func(_ int, req *wire.Request) fault {
		if req.Exec != nil && strings.Contains(strings.Join(req.Exec.Argv, " "), "-m -u") {
			n++
			write(t, w.inside, "a", fmt.Sprintf("from the guest, as late as can be %d\n", n))
		}
		return none
	})
	p := w.prepare()
	want(t, "kept", p.Kept, "[a]")
	want(t, "tries", n, 1)
	want(t, "a", read(t, w.inside, "a"), "from the guest, as late as can be 1\n")
	want(t, "next", strings.Contains(w.git(w.inside, "for-each-ref"), refNext), false)

	write(t, w.host, "b", "from the host\n")
	w.guests.setHook(func(_ int, req *wire.Request) fault {
		if req.Exec != nil && len(req.Exec.Argv) > 1 && req.Exec.Argv[1] == "update-index" {
			write(t, w.inside, "b", "inside\n")
		}
		return none
	})
	p = w.prepare()
	want(t, "kept", p.Kept, "[a b]")
	want(t, "b", read(t, w.inside, "b"), "inside\n")
}

// A guest in which a file changes at each try is not waited for without an end.
func TestChangesInsideAllTheTime(t *testing.T) {
	w := newWorld(t)
	for i := range 2 * mergeTries {
		write(t, w.host, fmt.Sprint(i), "1\n")
	}
	w.commit("first")
	w.prepare()
	for i := range 2 * mergeTries {
		write(t, w.host, fmt.Sprint(i), "from the host\n")
	}
	n := 0
	w.guests.setHook(func(_ int, req *wire.Request) fault {
		if req.Exec != nil && strings.Contains(strings.Join(req.Exec.Argv, " "), "-m -u") {
			write(t, w.inside, fmt.Sprint(n), "from the guest, as late as can be\n")
			n++
		}
		return none
	})
	_, err := w.tryPrepare(t.Context())
	wantError(t, err, api.Busy, "files change inside all the time")
	want(t, "tries", n, mergeTries)
	w.guests.setHook(nil)
	want(t, "kept", w.prepare().Kept, "[0 1 2 3 4]")
	want(t, "the rest", read(t, w.inside, "5"), "from the host\n")
}

package vm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/test/need"
)

// leave sets the size of the tmpfs at dir so that free bytes are left in it.
func leave(t testing.TB, dir string, free int64) {
	t.Helper()
	var s syscall.Statfs_t
	err := syscall.Statfs(dir, &s)
	if err == nil {
		size := int64(s.Blocks-s.Bfree)*s.Bsize + free
		err = syscall.Mount("", dir, "", syscall.MS_REMOUNT, fmt.Sprintf("size=%d", size))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wantFull wants one line that says what is full, and one hint.
func wantFull(t testing.TB, what string, r result, code int, says, hint string) {
	t.Helper()
	_, last, _ := strings.Cut(r.stderr, "banger: ")
	if r.code != code || strings.Count(last, "\n") != 2 || !strings.Contains(last, says) || !strings.HasSuffix(last, "\nhint: "+hint+"\n") {
		t.Errorf("%s, which should end with %d, %q and the hint %q: %s", what, code, says, hint, r)
	}
}

// TestHostFull: the host's disk is full at every stage. What cannot be made says so
// and leaves nothing; a guest that fills it sees its own disk fail; ps, exec, stop and
// rm work; with room again the VM starts, and what it had written before is there.
func TestHostFull(t *testing.T) {
	need.Need(t, "root")
	dir := stateDir(t)
	if err := syscall.Mount("banger-test", dir, "tmpfs", 0, "size=1g,mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("umount: %v", err)
		}
	})
	h := newHostIn(t, dir, "--sparse=always")
	const noSpace = "no space left on device"
	df := "df -h " + dir

	for _, room := range []int64{0, 64 << 10, 4 << 20, 12 << 20} {
		leave(t, dir, room)
		r := h.try("create", "--name", "early")
		wantFull(t, fmt.Sprintf("create with %d KiB", room>>10), r, 1, noSpace, df)
		if entries, _ := os.ReadDir(filepath.Join(dir, "vms")); len(entries) != 0 {
			t.Errorf("with %d KiB it left %v", room>>10, entries)
		}
	}
	leave(t, dir, 64<<20)
	if out := h.ok("ps", "-q"); out != "" {
		t.Errorf("a create that failed left %q", out)
	}
	h.ok("create", "--name", "dev", "--memory", "512M")
	h.ok("exec", "dev", "sh", "-c", "echo precious > kept && sync kept")
	leave(t, dir, 16<<20)
	if r := h.try("exec", "dev", "dd", "if=/dev/zero", "of=big", "bs=1M", "count=32", "conv=fsync"); r.code != 1 {
		t.Errorf("a guest that fills the host's disk: %s", r)
	}
	leave(t, dir, 0)
	wantFull(t, "run", h.try("run", "--rm", "--", "true"), 125, noSpace, df)
	// The next daemon cannot write a line to its log, and, as one of another release, has
	// no programs yet and no room for them.
	h.killDaemon(h.daemonPID())
	if err := os.RemoveAll(filepath.Join(dir, "programs")); err != nil {
		t.Fatal(err)
	}
	leave(t, dir, 0)
	if v := h.show("dev"); v.State != "RUNNING" {
		t.Errorf("dev is %s", v.State)
	}
	if out := h.ok("exec", "dev", "cat", "kept"); out != "precious\n" {
		t.Errorf("exec on a full disk: %q", out)
	}
	h.ok("stop", "dev")
	leave(t, dir, 0)
	wantFull(t, "start", h.try("start", "dev"), 1, noSpace, df)
	if v := h.show("dev"); v.State != "STOPPED" {
		t.Errorf("after a start that failed dev is %s", v.State)
	}

	leave(t, dir, 64<<20)
	h.ok("start", "dev")
	if out := h.ok("exec", "dev", "sh", "-c", "cat kept; rm -f big; echo new > new; sync new; cat new"); out != "precious\nnew\n" {
		t.Errorf("after the disk had room again: %q", out)
	}
	leave(t, dir, 0)
	h.ok("rm", "-f", "dev")
	if entries, _ := os.ReadDir(filepath.Join(dir, "vms")); len(entries) != 0 {
		t.Errorf("rm left %v", entries)
	}
}

// TestGuestFull: what does not fit into the guest any more leaves what is the guest's as
// it was, and up goes in all the same; with room again all comes in.
func TestGuestFull(t *testing.T) {
	h := newHost(t)
	repo := newRepo(t, h)
	inside := func(script string) result {
		return h.in(repo, nil, "exec", "--", "sh", "-c", script)
	}
	if r := h.in(repo, nil, "up", "-q", "--disk", "384M", "--", "sh", "-c", "echo mine > mine; echo changed >> sub/a.txt"); r.code != 0 {
		t.Fatalf("up: %s", r)
	}
	// What is the guest's: its history, its changes, and what apply would bring back.
	guests := func() string {
		r := inside("git fsck --strict --no-dangling && git rev-parse HEAD && git for-each-ref refs/heads && git diff sub && cat mine")
		diff := h.in(repo, nil, "diff")
		if r.code != 0 || diff.code != 0 {
			t.Errorf("the repository inside: %s\ndiff: %s", r, diff)
		}
		return r.stdout + diff.stdout
	}
	before := guests()
	write(t, filepath.Join(repo, "host.txt"), "changed on the host\n")
	// No zeros: holes would come in as holes.
	if err := os.WriteFile(filepath.Join(repo, "big"), bytes.Repeat([]byte("shop"), 4<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	git(t, repo, "add", "big")
	for _, room := range []string{"0", "6M"} { // nothing can be begun; not all can be written
		// What was freed is free after a sync. Root has the blocks that are kept for it, too.
		if r := inside("sudo sh -c 'sync; fallocate -l 1G /fill; truncate -s -" + room + " /fill; sync'"); !strings.Contains(r.stderr, "No space left on device") {
			t.Fatalf("fill: %s", r)
		}
		r := h.in(repo, nil, "up", "-q", "--", "echo", "inside")
		if r.code != 0 || r.stdout != "inside\n" || strings.Count(r.stderr, "\n") != 2 ||
			!strings.Contains(r.stderr, "the disk of shop is full") || !strings.HasSuffix(r.stderr, "\nhint: banger exec shop df -h\n") {
			t.Errorf("up with %s of room: %s", room, r)
		}
		if r := inside("sudo rm /fill"); r.code != 0 {
			t.Fatal(r)
		}
		if after := guests(); after != before {
			t.Errorf("up with %s of room: the guest's was %s\nis %s", room, before, after)
		}
	}
	r := h.in(repo, nil, "up", "-q", "--", "sh", "-c", "cat host.txt mine sub/a.txt; stat -c %s big; git fsck --strict --no-dangling")
	if want := "changed on the host\nmine\none\nchanged\n16777216\n"; r.code != 0 || r.stdout != want {
		t.Errorf("up with room again: %s", r)
	}
}

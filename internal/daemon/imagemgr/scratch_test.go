package imagemgr

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/daemon/hostcmd"
	"banger/test/need"
)

func TestRemoveTakesTheScratchDirectoryAlong(t *testing.T) {
	b := NewBuilder(nil)
	b.root = false // as an ordinary user
	t.Setenv("TMPDIR", "")
	dir := t.TempDir()
	scratch, err := b.scratch(dir)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(scratch, "/var/tmp/banger-build-") && !strings.HasPrefix(scratch, "/tmp/banger-build-") {
		t.Errorf("scratch directory %s", scratch)
	}
	st, err := os.Stat(scratch)
	if err != nil || st.Mode().Perm() != 0o755 {
		t.Fatalf("%v, %v: the subordinate uids cannot get in", st, err)
	}
	if err := os.WriteFile(filepath.Join(scratch, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // absent is success
		if err := b.Remove(context.Background(), dir); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{dir, scratch} {
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there: %v", path, err)
			}
		}
	}
}

// A note that names anything but a scratch directory of ours must not be obeyed.
func TestRemoveObeysNoStrangeNote(t *testing.T) {
	b := NewBuilder(nil)
	victim := filepath.Join(t.TempDir(), "precious")
	if err := os.Mkdir(victim, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), scratchPrefix+"link")
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	for _, note := range []string{victim, link, "", "/", filepath.Dir(victim) + "/" + scratchPrefix + "x/../precious", "banger-build-x"} {
		dir := filepath.Join(t.TempDir(), "build")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, scratchNote), []byte(note), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := b.Remove(context.Background(), dir); err != nil {
			t.Errorf("%q: %v", note, err)
		}
		if _, err := os.Stat(victim); err != nil {
			t.Fatalf("%q removed what is not ours", note)
		}
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%q: the build is still there", note)
		}
	}
}

// A mount in a tree is somebody's data: a removal must end before it.
func TestRemoveDoesNotCrossMounts(t *testing.T) {
	need.Need(t, "root")
	dir := t.TempDir()
	mounted := filepath.Join(dir, "tree", "dev")
	if err := os.MkdirAll(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("none", mounted, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(mounted, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	precious := filepath.Join(mounted, "precious")
	if err := os.WriteFile(precious, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	if err := NewBuilder(nil).Remove(ctx, filepath.Join(dir, "tree")); err == nil {
		t.Error("a tree with a mount in it counted as removed")
	}
	if _, err := os.Stat(precious); err != nil {
		t.Fatalf("the removal went into a mount: %v", err)
	}
}

func TestUsableByOthers(t *testing.T) {
	private := filepath.Join(t.TempDir(), "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	inside := filepath.Join(private, "open")
	if err := os.Mkdir(inside, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := usableByOthers(inside); err == nil {
		t.Error("a directory below a private one passed")
	}
	if err := usableByOthers("/usr"); err != nil {
		t.Error(err)
	}
}

func TestSubRange(t *testing.T) {
	file := "# comment\nann:100000:65536\n1001:165536:65536\nbob:231072:1000\nbroken\nx:y:z\n"
	for _, tc := range []struct {
		name, uid string
		ok        bool
	}{{"ann", "1000", true}, {"carl", "1001", true}, {"bob", "1002", false}, {"eve", "1003", false}} {
		if ok, free := subRange(file, tc.name, tc.uid); ok != tc.ok || free != 232072 {
			t.Errorf("%s: %v, first free %d", tc.name, ok, free)
		}
	}
	if ok, free := subRange("", "ann", "1"); ok || free != 100000 {
		t.Errorf("empty file: %v, %d", ok, free)
	}
}

func TestRequireNamespaceNamesTheCommand(t *testing.T) {
	b := NewBuilder(nil)
	b.root = false
	b.subuid = filepath.Join(t.TempDir(), "subuid")
	if err := os.WriteFile(b.subuid, []byte("somebody:100000:65536\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var e *NamespaceError
	if err := b.requireNamespace(context.Background()); !errors.As(err, &e) {
		t.Fatalf("got %v", err)
	}
	if !strings.HasPrefix(e.Remedy, "sudo usermod --add-subuids 165536-231071 --add-subgids 165536-231071 ") {
		t.Errorf("the remedy is %q", e.Remedy)
	}
}

func TestNamespaceRemedy(t *testing.T) {
	proc := t.TempDir()
	if got := namespaceRemedy(proc); got == "" {
		t.Error("no remedy at all")
	}
	if err := os.Mkdir(filepath.Join(proc, "kernel"), 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(proc, "kernel", "apparmor_restrict_unprivileged_userns")
	if err := os.WriteFile(file, []byte("1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := namespaceRemedy(proc); got != "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0" {
		t.Errorf("got %q", got)
	}
}

func TestRequireNamesAllThatIsMissing(t *testing.T) {
	t.Setenv("PATH", "")
	b := NewBuilder(nil)
	b.Keyring = filepath.Join(t.TempDir(), "keyring.gpg")
	err := b.require(true)
	var missing *MissingError
	if !errors.As(err, &missing) {
		t.Fatalf("got %v", err)
	}
	if !strings.Contains(missing.Remedy(), "apt-get install") || !strings.Contains(missing.Remedy(), "debian-archive-keyring") {
		t.Errorf("the remedy is %q", missing.Remedy())
	}
}

func TestExplain(t *testing.T) {
	failed := func(stderr string, argv ...string) error {
		return fmt.Errorf("cannot: %w", &hostcmd.Error{Argv: argv, ExitCode: 1, Stderr: stderr, Err: errors.New("exit status 1")})
	}
	for _, tc := range []struct {
		name string
		err  error
		is   error
		says string
	}{
		{"a full disk", failed("dpkg: error: x\ntar: y: Cannot write: No space left on device\n", "unshare", "--user", "tar", "-x"), syscall.ENOSPC, "tar: no space left"},
		{"apt's full disk", failed("E: You don't have enough free space in /x\n", "apt-get", "update"), syscall.ENOSPC, ""},
		{"a quota", failed("write: Disk quota exceeded\n", "mkfs.ext4"), syscall.ENOSPC, ""},
		{"no network", failed("Err:1 http://x InRelease\nE: Failed to fetch http://x  Could not resolve 'x'\nE: more\n", "apt-get"), ErrNetwork, "Could not resolve 'x'"},
		{"no signature", failed("W: GPG error: http://x InRelease: NO_PUBKEY 0E98\nE: The repository 'http://x InRelease' is not signed.\n", "apt-get"), ErrSignature, "is not signed"},
		{"anything", failed("I: a\nE: setup failed: x\nE: more\nI: removing tempdir\n", "mmdebstrap"), nil, "mmdebstrap: exit status 1: setup failed: x"},
		{"nothing said", failed("", "depmod"), nil, "depmod: exit status 1"},
	} {
		err := explain(tc.err)
		if tc.is != nil && !errors.Is(err, tc.is) {
			t.Errorf("%s: %v is not %v", tc.name, err, tc.is)
		}
		if !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %q says nothing of %q", tc.name, err, tc.says)
		}
	}
	var missing *MissingError
	err := explain(&hostcmd.Error{Argv: []string{"mmdebstrap"}, ExitCode: -1, Err: exec.ErrNotFound})
	if !errors.As(err, &missing) || missing.Packages[0] != "mmdebstrap" {
		t.Errorf("got %v", err)
	}
}

func TestRoomFor(t *testing.T) {
	dir := t.TempDir()
	if err := roomFor(dir, 1); err != nil {
		t.Error(err)
	}
	if err := roomFor(dir, 1<<62); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v", err)
	}
}

package boot

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/internal/guest/wire"
)

// testImage makes a root with these files, whose parents are made too. A content
// that begins with "->" makes a link.
func testImage(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(content, "->"); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func read(t *testing.T, root, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// inodes tells for each file below root which inode it is, and so whether it was
// replaced.
func inodes(t *testing.T, root string) map[string]uint64 {
	t.Helper()
	m := map[string]uint64{}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil {
			m[path] = info.Sys().(*syscall.Stat_t).Ino
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// me is the caller as a user of an image: tests that do not run as root can give
// files to nobody else.
func me(t *testing.T) wire.User {
	t.Helper()
	if os.Geteuid() != 0 {
		if reservedID(os.Getuid()) || reservedID(os.Getgid()) {
			t.Skipf("uid %d cannot own the home directory of a user", os.Getuid())
		}
		return wire.User{Name: "alice", UID: os.Getuid(), GID: os.Getgid()}
	}
	return wire.User{Name: "alice", UID: 1234, GID: 1234}
}

func TestMakeUser(t *testing.T) {
	root := testImage(t, map[string]string{
		"etc/passwd": testPasswd, "etc/group": testGroup, "etc/shadow": testShadow, "etc/sudoers": "root ALL=(ALL) ALL\n",
		"etc/skel/.bashrc": "PS1=x\n", "etc/skel/.config/deep/file": "1", "etc/skel/link": "->.bashrc", "bin/sh": "",
	})
	for name, mode := range map[string]os.FileMode{"bin/sh": 0o755, "etc/shadow": 0o640, "etc/skel/.bashrc": 0o600} {
		if err := os.Chmod(filepath.Join(root, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	want := me(t)
	a, err := makeUser(root, want)
	if err != nil {
		t.Fatal(err)
	}
	if a.name != "alice" || a.uid != want.UID || a.shell != "/bin/sh" {
		t.Errorf("account %+v", a)
	}
	for name, mode := range map[string]os.FileMode{
		"etc/shadow": 0o640, "etc/passwd": 0o644, "etc/sudoers.d/banger": 0o440, "home/alice": 0o755, "home/alice/.bashrc": 0o600,
	} {
		info, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != mode {
			t.Errorf("%s has mode %o, want %o", name, info.Mode().Perm(), mode)
		}
	}
	if got := read(t, root, "home/alice/.config/deep/file"); got != "1" {
		t.Errorf("a file of skel holds %q", got)
	}
	for _, name := range []string{"home/alice", "home/alice/.bashrc", "home/alice/.config/deep", "home/alice/link"} {
		info, err := os.Lstat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		if int(st.Uid) != want.UID || int(st.Gid) != want.GID {
			t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
		}
	}

	before := inodes(t, root)
	if err := os.WriteFile(filepath.Join(root, "home/alice/mine"), []byte("kept"), 0o644); err != nil {
		t.Fatal(err)
	}
	b, err := makeUser(root, want)
	if err != nil || b != a {
		t.Fatalf("second boot: %+v, %v", b, err)
	}
	after := inodes(t, root)
	delete(after, filepath.Join(root, "home/alice/mine"))
	for name, ino := range after {
		if before[name] != ino {
			t.Errorf("the second boot replaced %s", name)
		}
	}
	if len(after) != len(before) {
		t.Errorf("the second boot left %d files, the first %d", len(after), len(before))
	}
	if got := read(t, root, "home/alice/mine"); got != "kept" {
		t.Errorf("the user's file holds %q", got)
	}
}

func TestMakeUserAfterCrash(t *testing.T) {
	root := testImage(t, map[string]string{
		"etc/passwd": testPasswd, "etc/group": testGroup, "etc/shadow": testShadow, "etc/skel/.bashrc": "PS1=x\n",
		"etc/.passwd.banger": "half a fi", "home/.banger-home/.bashrc": "PS",
	})
	if _, err := makeUser(root, me(t)); err != nil {
		t.Fatal(err)
	}
	if got := read(t, root, "home/alice/.bashrc"); got != "PS1=x\n" {
		t.Errorf(".bashrc holds %q", got)
	}
	for _, name := range []string{"etc/.passwd.banger", "home/.banger-home", "etc/sudoers.d"} {
		if _, err := os.Lstat(filepath.Join(root, name)); !os.IsNotExist(err) {
			t.Errorf("%s is there", name)
		}
	}
}

func TestWriteNames(t *testing.T) {
	root := testImage(t, map[string]string{"etc/hosts": "10.0.0.1 db # mine\n"})
	id := strings.Repeat("0f", 16)
	if err := writeNames(root, "shop", id, ""); err != nil {
		t.Fatal(err)
	}
	if got := read(t, root, "etc/hostname"); got != "shop\n" {
		t.Errorf("hostname %q", got)
	}
	if got := read(t, root, "etc/machine-id"); got != id+"\n" {
		t.Errorf("machine-id %q", got)
	}
	before := inodes(t, root)
	if err := writeNames(root, "shop", id, ""); err != nil {
		t.Fatal(err)
	}
	for name, ino := range inodes(t, root) {
		if before[name] != ino {
			t.Errorf("the second boot replaced %s", name)
		}
	}
	if err := writeNames(root, "shop-2", id, "10.0.2.2 gate"); err != nil {
		t.Fatal(err)
	}
	want := "10.0.0.1 db # mine\n127.0.0.1 localhost # banger\n::1 localhost ip6-localhost ip6-loopback # banger\n127.0.1.1 shop-2 # banger\n10.0.2.2 gate # banger\n"
	if got := read(t, root, "etc/hosts"); got != want {
		t.Errorf("hosts %q, want %q", got, want)
	}
}

func TestHostsFile(t *testing.T) {
	for _, tt := range []struct{ in, more, want string }{
		{"127.0.0.1 localhost\n", "", "127.0.0.1 localhost\n127.0.1.1 shop # banger\n"},
		{"127.0.0.1\tfoo localhost", "", "127.0.0.1\tfoo localhost\n127.0.1.1 shop # banger\n"},
		{"127.0.1.1 old # banger\n127.0.0.1 localhost\n\n# end\n", "", "127.0.0.1 localhost\n\n# end\n127.0.1.1 shop # banger\n"},
		{"#127.0.0.1 localhost\n", "", "#127.0.0.1 localhost\n127.0.0.1 localhost # banger\n::1 localhost ip6-localhost ip6-loopback # banger\n127.0.1.1 shop # banger\n"},
		{"127.0.0.1 localhost\n10.9.9.9 gate # banger\n", "10.0.2.2 gate", "127.0.0.1 localhost\n127.0.1.1 shop # banger\n10.0.2.2 gate # banger\n"},
	} {
		got := hostsFile(tt.in, "shop", tt.more)
		if got != tt.want {
			t.Errorf("hostsFile(%q) = %q, want %q", tt.in, got, tt.want)
		}
		if again := hostsFile(got, "shop", tt.more); again != got {
			t.Errorf("hostsFile(%q) is not stable: %q", got, again)
		}
	}
}

func TestReplaceFile(t *testing.T) {
	root := testImage(t, map[string]string{"real": "old", "link": "->real"})
	link := filepath.Join(root, "link")
	if err := os.Chmod(link, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(link, "new", 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Readlink(link); err != nil {
		t.Errorf("the link was replaced: %v", err)
	}
	if got := read(t, root, "real"); got != "new" {
		t.Errorf("the file holds %q", got)
	}
	info, err := os.Stat(link)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the mode changed: %v, %v", info, err)
	}
	// A directory in the way is an error, and leaves nothing behind.
	dir := filepath.Join(root, "dir")
	if err := os.MkdirAll(filepath.Join(dir, "full"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(dir, "x", 0o644); err == nil {
		t.Error("a directory was replaced")
	}
	if _, err := os.Lstat(filepath.Join(root, ".dir.banger")); !os.IsNotExist(err) {
		t.Error("a temporary file was left behind")
	}
}

package dmsnap

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/test/need"
)

// loopFile is a file to make loop devices of.
func loopFile(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "file"))
	must(t, err)
	t.Cleanup(func() { f.Close() })
	_, err = f.WriteAt([]byte("begins here"), mib)
	must(t, err)
	must(t, f.Truncate(4*mib))
	return f
}

// noLoops waits until no loop device has a name with that prefix.
func noLoops(t *testing.T, prefix string) {
	t.Helper()
	var left []loop
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
		var err error
		if left, err = listLoops(prefix); err != nil {
			t.Fatal(err)
		}
		if len(left) == 0 {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("loop devices are left: %+v", left)
}

func TestLoopOfAPart(t *testing.T) {
	need.Need(t, "root")
	f := loopFile(t)
	name := "banger-c0ffee-part"
	l, err := bind(part{file: f, offset: mib, length: 2 * mib}, name)
	must(t, err)
	defer l.Close()
	b := make([]byte, 11)
	if _, err := l.ReadAt(b, 0); err != nil || string(b) != "begins here" {
		t.Errorf("%q, %v", b, err)
	}
	if size, err := l.Seek(0, 2); err != nil || size != 2*mib {
		t.Errorf("it has %d bytes, %v", size, err)
	}
	_, err = l.WriteAt([]byte("written"), 4096)
	must(t, errors.Join(err, l.Sync()))
	if _, err := f.ReadAt(b[:7], mib+4096); err != nil || string(b[:7]) != "written" {
		t.Errorf("the file has %q, %v", b[:7], err)
	}

	loops, err := listLoops("banger-c0ffee-")
	if err != nil || len(loops) != 1 || loops[0].name != name || loops[0].backing != f.Name() || "/dev/"+loops[0].device != l.Name() {
		t.Errorf("%+v, %v", loops, err)
	}
	// It goes with its last user.
	l.Close()
	noLoops(t, name)
}

func TestReadOnlyLoop(t *testing.T) {
	need.Need(t, "root")
	f := loopFile(t)
	l, err := bind(part{file: f, length: 4 * mib, readOnly: true}, "banger-c0ffee-ro")
	must(t, err)
	defer l.Close()
	if _, err := l.WriteAt([]byte("x"), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("a write: %v", err)
	}
}

func TestFreeLoops(t *testing.T) {
	need.Need(t, "root")
	f := loopFile(t)
	mine, err := bind(part{file: f, length: mib}, "banger-c0ffee-a")
	must(t, err)
	defer mine.Close()
	for _, other := range []string{"banger-c0ffee-ab", "banger-beef00-a"} {
		l, err := bind(part{file: f, length: mib}, other)
		must(t, err)
		defer l.Close()
	}
	time.AfterFunc(100*time.Millisecond, func() { mine.Close() })
	must(t, freeLoops(t.Context(), "banger-c0ffee-a"))
	left, err := listLoops("banger-")
	if err != nil || len(left) != 2 {
		t.Errorf("left: %+v, %v", left, err)
	}
}

// The inventory of an instance shows and takes its own things only.
func TestLoopInventory(t *testing.T) {
	need.Need(t, "root")
	dir := t.TempDir()
	var want string
	for _, c := range []struct{ root, name string }{{"a", "banger-aaaaaa-vm"}, {"b", "banger-bbbbbb-vm"}, {"b", "banger-aaaaaa-elsewhere"}} {
		root := filepath.Join(dir, c.root)
		must(t, os.MkdirAll(root, 0o700))
		f, err := os.OpenFile(filepath.Join(root, "disk"), os.O_RDWR|os.O_CREATE, 0o600)
		must(t, err)
		defer f.Close()
		must(t, f.Truncate(mib))
		l, err := bind(part{file: f, length: mib}, c.name)
		must(t, err)
		defer l.Close()
		if want == "" {
			want = filepath.Base(l.Name())
		}
	}
	link := filepath.Join(dir, "link")
	must(t, os.Symlink(filepath.Join(dir, "a"), link))
	for _, root := range []string{filepath.Join(dir, "a"), link} {
		inventory := Inventories("aaaaaa", root)[1]
		objects, err := inventory.List(t.Context())
		if err != nil || len(objects) != 1 || fmt.Sprint(objects[0]) != "{loop "+want+" vm}" {
			t.Fatalf("%v, %v; want %s", objects, err, want)
		}
		if root == link {
			stranger := objects[0]
			stranger.VM = "other"
			must(t, inventory.Remove(t.Context(), stranger)) // it is not what the device bears
			if again, _ := inventory.List(t.Context()); len(again) != 1 {
				t.Error("the loop device of another VM is gone")
			}
		}
	}
}

// hostWithout runs f in a mount namespace of its own, furnished by mask. It is not that
// of the processes that f starts.
func hostWithout(t *testing.T, mask func() error, f func() error) error {
	t.Helper()
	need.Need(t, "root")
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = mask()
		}
		if err != nil {
			t.Errorf("cannot make the namespace: %v", err)
		}
		result <- f()
	}()
	return <-result
}

func cover(path string) error { return unix.Mount("none", path, "tmpfs", 0, "") }

// A container has the loop devices that were there when it was made.
func TestLoopsExhausted(t *testing.T) {
	f := loopFile(t)
	bindOne := func() error {
		l, err := bind(part{file: f, length: mib}, "banger-c0ffee-a")
		if err == nil {
			l.Close()
		}
		return err
	}
	const minor = 237 // see Documentation/admin-guide/devices.txt in the kernel's source
	control := func() error { return unix.Mknod("/dev/loop-control", unix.S_IFCHR|0o600, int(unix.Mkdev(10, minor))) }
	for want, mask := range map[string]func() error{
		"no loop device is free: the kernel's next is not in /dev": func() error { return errors.Join(cover("/dev"), control()) },
		"this host has no loop devices":                            func() error { return cover("/dev") },
	} {
		if err := hostWithout(t, mask, bindOne); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	must(t, bindOne())
}

package dmsnap

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/hostcmd"
	"banger/test/need"
)

// stateDir is a directory with an image of size bytes, and one of a VM.
func stateDir(t *testing.T, size int64) (base, path string) {
	t.Helper()
	dir := t.TempDir()
	base, path = filepath.Join(dir, "images", "i", "rootfs.ext4"), filepath.Join(dir, "vms", "a", "disk")
	for _, p := range []string{base, path} {
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(base, bytes.Repeat([]byte("image "), int(size)/6+1)[:size], 0o600); err != nil {
		t.Fatal(err)
	}
	return base, path
}

// madeDisk is a disk of size bytes on an image of 3 MiB, open.
func madeDisk(t *testing.T, size int64) (f *os.File, h header, base, path string) {
	t.Helper()
	base, path = stateDir(t, 3*mib)
	if err := New("c0ffee").Create(t.Context(), base, path, size); err != nil {
		t.Fatal(err)
	}
	f, h, err := openStore(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f, h, base, path
}

func TestCreateMakesASparseFile(t *testing.T) {
	f, h, _, path := madeDisk(t, 1<<30)
	if h.Base != "../../images/i/rootfs.ext4" || h.Size != 1<<30 || h.Image.Size != 3*mib {
		t.Errorf("header %+v", h)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() != h.fileSize() || info.Mode().Perm() != 0o600 {
		t.Errorf("%d bytes, %v; want %d", info.Size(), info.Mode(), h.fileSize())
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Blocks*512 > 64<<10 {
		t.Errorf("it takes %d bytes: %v", st.Blocks*512, err)
	}
	if end := h.tailOffset() + h.Size - h.Image.Size; end > info.Size() {
		t.Errorf("the tail ends at %d", end)
	}
}

// A store that is too small would take no writes in the end: this is the kernel's own
// count, chunk by chunk.
func TestStoreHoldsTheWholeImage(t *testing.T) {
	for _, base := range []int64{512, chunk, 255 * chunk, 256 * chunk, 257 * chunk, 3*mib + 512, 700 * mib, 512 * chunk * 256} {
		chunks, next, full := (base+chunk-1)/chunk, int64(2), int64(0)
		for range chunks {
			if storeSize(base) < (next+1)*chunk {
				t.Fatalf("an image of %d bytes: the store of %d is full", base, storeSize(base))
			}
			next++
			if next%257 == 1 { // the place of the next area
				next++
			}
			if full++; full%256 == 0 && storeSize(base) < (1+full/256*257+1)*chunk {
				t.Fatalf("an image of %d bytes: no room for the area after %d", base, full)
			}
		}
		if storeSize(base) > base+base/100+4*mib {
			t.Errorf("an image of %d bytes: a store of %d", base, storeSize(base))
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	_, h, _, _ := madeDisk(t, 8*mib)
	for what, change := range map[string]func(*header){
		"version 2":         func(h *header) { h.Version = 2 },
		"a size of 0":       func(h *header) { h.Size = 0 },
		"a negative store":  func(h *header) { h.Store = -4096 },
		"an odd store":      func(h *header) { h.Store += sector },
		"an enormous image": func(h *header) { h.Image.Size, h.Size = 1<<60, 1<<60 },
		"a small disk":      func(h *header) { h.Size = h.Image.Size - sector },
		"no image":          func(h *header) { h.Base = "" },
		"an absolute image": func(h *header) { h.Base = "/etc/shadow" },
	} {
		bad := h
		change(&bad)
		data, err := bad.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decode(data); err == nil {
			t.Errorf("%s is let through", what)
		}
	}
	data, _ := h.encode()
	if got, err := decode(data); err != nil || got != h {
		t.Errorf("%+v, %v", got, err)
	}
	for _, data := range [][]byte{nil, data[:40], bytes.Repeat([]byte("x"), headerSize), []byte(magic)} {
		if _, err := decode(data); err == nil {
			t.Errorf("%.30q is let through", data)
		}
	}
}

func FuzzDecode(f *testing.F) {
	h := header{Version: 1, Base: "../i", Image: identity{Size: 4096, Sample: "x"}, Size: 8192, Store: mib}
	data, _ := h.encode()
	f.Add(data)
	f.Add([]byte(magic + "{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := decode(data)
		if err != nil {
			return
		}
		if h.tailSize() < 0 || h.tailOffset() <= storeOffset || h.fileSize() < h.tailOffset() || h.fileSize()%chunk != 0 {
			t.Errorf("%+v", h)
		}
		again, err := h.encode()
		if err != nil {
			return // a path that JSON writes longer
		}
		if is, err := decode(again); err != nil || is != h {
			t.Errorf("%+v became %+v, %v", h, is, err)
		}
	})
}

func TestImageThatChangedIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, base string)
		want   string
	}{
		"grown": {func(t *testing.T, base string) { must(t, os.Truncate(base, 4*mib)) }, "it has 4194304 bytes and had 3145728"},
		"written": {func(t *testing.T, base string) {
			f, err := os.OpenFile(base, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("x"), 5000)
			must(t, errors.Join(err, f.Close()))
		}, "it was modified at "},
		"touched": {func(t *testing.T, base string) {
			must(t, os.Chtimes(base, time.Unix(1, 0), time.Unix(1, 0)))
		}, "it was modified at 1970-01-01T00:00:01.000000000Z, and before at "},
		"exchanged": {func(t *testing.T, base string) { exchange(t, base, bytes.Repeat([]byte("other "), mib/2)) }, "other content"},
		"removed":   {func(t *testing.T, base string) { must(t, os.Remove(base)) }, "no such file"},
		"a fifo":    {func(t *testing.T, base string) { must(t, os.Remove(base)); must(t, unix.Mkfifo(base, 0o600)) }, "no regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			_, h, base, path := madeDisk(t, 8*mib)
			if f, err := h.openBase(path); err != nil {
				t.Fatal(err)
			} else {
				f.Close()
			}
			c.change(t, base)
			if _, err := h.openBase(path); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			// The caller sees it without root, dm or loops.
			if _, err := New("c0ffee").Attach(t.Context(), "a", path); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Attach: %v, want %q", err, c.want)
			}
		})
	}
}

// A state directory that was restored from a copy has other inodes, and works.
func TestImageThatWasCopiedIsTaken(t *testing.T) {
	_, h, base, path := madeDisk(t, 8*mib)
	data, err := os.ReadFile(base)
	must(t, err)
	exchange(t, base, data)
	f, err := h.openBase(path)
	must(t, err)
	f.Close()
}

// exchange puts another file in the place of base, of the same time.
func exchange(t *testing.T, base string, data []byte) {
	t.Helper()
	info, err := os.Stat(base)
	must(t, err)
	must(t, os.WriteFile(base+".new", data, 0o600))
	must(t, os.Chtimes(base+".new", info.ModTime(), info.ModTime()))
	must(t, os.Rename(base+".new", base))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestPrepare(t *testing.T) {
	f, h, _, path := madeDisk(t, 200*mib)
	put := func(s storeHeader) {
		var b bytes.Buffer
		_ = binary.Write(&b, binary.LittleEndian, s)
		_, err := f.WriteAt(b.Bytes(), storeOffset)
		must(t, err)
	}
	get := func() (s storeHeader) {
		b := make([]byte, 16)
		_, err := f.ReadAt(b, storeOffset)
		must(t, err)
		must(t, binary.Read(bytes.NewReader(b), binary.LittleEndian, &s))
		return s
	}
	must(t, f.Truncate(h.tailOffset())) // as cp without holes to the end would
	must(t, h.prepare(f))
	if info, _ := f.Stat(); info.Size() != h.fileSize() {
		t.Errorf("it has %d bytes, want %d", info.Size(), h.fileSize())
	}
	if s := get(); s != (storeHeader{}) {
		t.Errorf("a store that was never used begins with %+v", s)
	}
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	if got := st.Blocks * 512; got < h.Store || got > h.Store+mib {
		t.Errorf("%d bytes are kept, want the whole store of %d", got, h.Store)
	}
	put(storeHeader{storeMagic, 0, 1, 8})
	must(t, h.prepare(f))
	if s := get(); s != (storeHeader{storeMagic, 1, 1, 8}) {
		t.Errorf("a store that was given up begins with %+v", s)
	}
	put(storeHeader{storeMagic, 1, 1, 16})
	if err := h.prepare(f); err == nil || !strings.Contains(err.Error(), "its store is damaged") {
		t.Errorf("a store of other chunks: %v", err)
	}
}

// What the store takes in next is there, whoever fills the file system after.
func TestRoomIsKept(t *testing.T) {
	need.Need(t, "root")
	dir := t.TempDir()
	_, err := hostcmd.Run(t.Context(), hostcmd.Command{Argv: []string{"mount", "-t", "tmpfs", "-o", "size=24m", "none", dir}})
	must(t, err)
	defer unix.Unmount(dir, unix.MNT_DETACH)
	base, path := filepath.Join(dir, "base"), filepath.Join(dir, "disk")
	must(t, os.WriteFile(base, make([]byte, 2*mib), 0o600))
	for _, p := range []string{path, filepath.Join(dir, "b")} {
		must(t, New("c0ffee").Create(t.Context(), base, p, 64*mib))
	}
	f, h, err := openStore(path)
	must(t, err)
	defer f.Close()
	must(t, h.prepare(f))
	fill, err := os.Create(filepath.Join(dir, "fill"))
	must(t, err)
	defer fill.Close()
	for err == nil {
		_, err = fill.Write(make([]byte, 64<<10))
	}
	if _, err := f.WriteAt(make([]byte, h.Store), storeOffset); err != nil {
		t.Errorf("no room in the store: %v", err)
	}
	if _, err := f.WriteAt(make([]byte, mib), h.tailOffset()); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the file system is not full: %v", err)
	}
	other, h, err := openStore(filepath.Join(dir, "b"))
	must(t, err)
	defer other.Close()
	if err := h.prepare(other); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "its file system has 0 MiB left and it needs 19") {
		t.Errorf("a full file system: %v", err)
	}
}

func TestSymlinkIsNoDisk(t *testing.T) {
	_, _, _, path := madeDisk(t, 8*mib)
	link := path + "2"
	must(t, os.Symlink(path, link))
	if _, _, err := openStore(link); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a link: %v", err)
	}
	if _, _, err := openStore(filepath.Dir(path)); err == nil {
		t.Error("a directory is opened")
	}
	if _, _, err := openStore(path + "3"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing: %v", err)
	}
}

package agent

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/guest/wire"
)

// makeTar makes an archive; a header without a type is a file with content.
func makeTar(t *testing.T, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		content := ""
		if h.Typeflag == 0 {
			h.Typeflag, content = tar.TypeReg, "content of "+h.Name
			h.Size = int64(len(content))
		}
		if h.Mode == 0 && h.Typeflag != tar.TypeXGlobalHeader {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, content)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

func (a *testAgent) untar(tree wire.Tree, in io.Reader) result {
	a.t.Helper()
	r, err := a.run(wire.Request{Op: wire.OpUntar, Tree: &tree}, in)
	if err != nil {
		a.t.Fatal(err)
	}
	return r
}

func TestUntar(t *testing.T) {
	a := newTestAgent(t)
	dir := a.home + "/new/tree"
	when := time.Date(2020, 5, 6, 7, 8, 9, 0, time.UTC)
	archive := makeTar(t,
		tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "x"}},
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o750, ModTime: when},
		tar.Header{Name: "sealed/", Typeflag: tar.TypeDir, Mode: 0o555, ModTime: when},
		tar.Header{Name: "sealed/file", ModTime: when, Mode: 0o4755},
		tar.Header{Name: "without/parent", Mode: 0o600},
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "sealed/file"},
		tar.Header{Name: "out", Typeflag: tar.TypeSymlink, Linkname: "/etc/passwd"},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "sealed/file"},
		tar.Header{Name: "twice"}, tar.Header{Name: "twice"},
	)
	if r := a.untar(wire.Tree{Dir: dir}, archive); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	for name, want := range map[string]fs.FileMode{
		".": fs.ModeDir | 0o750, "sealed": fs.ModeDir | 0o555, "sealed/file": fs.ModeSetuid | 0o755,
		"without": fs.ModeDir | 0o755, "without/parent": 0o600, "twice": 0o644,
	} {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, info, err, want)
			continue
		}
		if name == "sealed" || name == "sealed/file" || name == "." {
			if !info.ModTime().Equal(when) {
				t.Errorf("%s has time %s", name, info.ModTime())
			}
		}
	}
	if got, _ := os.ReadFile(dir + "/link"); string(got) != "content of sealed/file" {
		t.Errorf("link: %q", got)
	}
	if got, _ := os.Readlink(dir + "/out"); got != "/etc/passwd" {
		t.Errorf("out: %q", got)
	}
	one, _ := os.Stat(dir + "/hard")
	two, _ := os.Stat(dir + "/sealed/file")
	if !os.SameFile(one, two) {
		t.Error("hard is another file")
	}

	// What is there is replaced: a link by a file, a link by a directory.
	archive = makeTar(t, tar.Header{Name: "out"}, tar.Header{Name: "link/inside"}, tar.Header{Name: "twice/", Typeflag: tar.TypeDir, Mode: 0o700})
	r := a.untar(wire.Tree{Dir: dir}, makeTar(t, tar.Header{Name: "link/", Typeflag: tar.TypeDir, Mode: 0o755}))
	if r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	if r := a.untar(wire.Tree{Dir: dir}, archive); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	if info, err := os.Lstat(dir + "/out"); err != nil || !info.Mode().IsRegular() {
		t.Errorf("out: %v, %v", info, err)
	}
	os.Chmod(dir+"/sealed", 0o755)
}

// No entry gets out of the directory, whatever it is called and whatever links lie in
// it.
func TestUntarEscapes(t *testing.T) {
	a := newTestAgent(t)
	victim := a.home + "/victim"
	for name, headers := range map[string][]tar.Header{
		"absolute":              {{Name: victim}},
		"parent":                {{Name: "../victim"}},
		"hidden parent":         {{Name: "a/../../victim"}},
		"parent directory":      {{Name: "../victim/", Typeflag: tar.TypeDir}},
		"through a link":        {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "l/victim"}},
		"through an absolute":   {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: a.home}, {Name: "l/victim"}},
		"through two links":     {{Name: "m", Typeflag: tar.TypeSymlink, Linkname: "."}, {Name: "l", Typeflag: tar.TypeSymlink, Linkname: "m/.."}, {Name: "l/victim"}},
		"directory through":     {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "l/victim/", Typeflag: tar.TypeDir}},
		"link through":          {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "l/victim", Typeflag: tar.TypeSymlink, Linkname: "x"}},
		"hard link out":         {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../secret"}},
		"hard link absolute":    {{Name: "h", Typeflag: tar.TypeLink, Linkname: a.home + "/secret"}},
		"hard link through":     {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: ".."}, {Name: "h", Typeflag: tar.TypeLink, Linkname: "l/secret"}},
		"the directory itself":  {{Name: "."}},
		"a device":              {{Name: "d", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		"a fifo":                {{Name: "p", Typeflag: tar.TypeFifo}},
		"in place of directory": {{Name: "x/y"}, {Name: "x"}},
	} {
		write(t, a.home+"/secret", "secret", 0o600)
		dir := filepath.Join(a.home, "trees", strings.ReplaceAll(name, " ", "-"))
		if name != "in place of directory" && strings.Contains(name, "parent") || strings.Contains(name, "through") || strings.Contains(name, "out") {
			dir = a.home + "/tree" // so that ".." is home
			os.RemoveAll(dir)
		}
		r := a.untar(wire.Tree{Dir: dir}, makeTar(t, headers...))
		if r.Code != 1 || !strings.HasPrefix(r.Message, "cannot unpack") {
			t.Errorf("%s: %+v", name, r)
		}
		if _, err := os.Lstat(victim); err == nil {
			t.Fatalf("%s got out", name)
		}
		if info, err := os.Stat(a.home + "/secret"); err != nil || info.Sys().(*syscall.Stat_t).Nlink != 1 {
			t.Fatalf("%s reached a file outside: %v", name, err)
		}
	}
}

func TestUntarFailures(t *testing.T) {
	a := newTestAgent(t)
	whole := makeTar(t, tar.Header{Name: "a"}, tar.Header{Name: "b"}).Bytes()
	r := a.untar(wire.Tree{Dir: a.home + "/t"}, bytes.NewReader(whole[:700]))
	if r.Code != 1 || !strings.Contains(r.Message, "cut off") {
		t.Errorf("half an archive: %+v", r)
	}
	r = a.untar(wire.Tree{Dir: a.home + "/t"}, bytes.NewReader(whole[:2048]))
	if r.Code != 1 || !strings.Contains(r.Message, "cut off") {
		t.Errorf("an archive without its end: %+v", r)
	}
	r = a.untar(wire.Tree{Dir: a.home + "/t"}, bytes.NewReader(whole[:520]))
	if r.Code != 1 || !strings.Contains(r.Message, "unexpected EOF") {
		t.Errorf("half a file: %+v", r)
	}
	r = a.untar(wire.Tree{Dir: a.home + "/t"}, bytes.NewReader(bytes.Repeat([]byte("garbage "), 1<<20)))
	if r.Code != 1 || !strings.Contains(r.Message, "cannot read the archive") {
		t.Errorf("garbage: %+v", r)
	}
	write(t, a.home+"/file", "", 0o600)
	if r = a.untar(wire.Tree{Dir: a.home + "/file/t"}, bytes.NewReader(whole)); r.Code != 1 || !strings.Contains(r.Message, "not a directory") {
		t.Errorf("a file in the way: %+v", r)
	}
}

func TestUntarRights(t *testing.T) {
	needRoot(t)
	a := newTestAgent(t)
	open, err := os.MkdirTemp("/tmp", "agent-test")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(open)
	os.Chmod(open, 0o777)
	archive := makeTar(t, tar.Header{Name: "f", Uid: 4711, Gid: 4712}, tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "x", Uid: 4711, Gid: 4712}).Bytes()
	owner := func(path string) [2]uint32 {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		return [2]uint32{st.Uid, st.Gid}
	}
	if r := a.untar(wire.Tree{Dir: open + "/theirs", User: "user"}, bytes.NewReader(archive)); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	if got := owner(open + "/theirs/f"); got != [2]uint32{1000, 1000} || owner(open+"/theirs") != got {
		t.Errorf("owned by %v", got)
	}
	if r := a.untar(wire.Tree{Dir: open + "/kept", KeepOwners: true}, bytes.NewReader(archive)); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	if got := owner(open + "/kept/f"); got != [2]uint32{4711, 4712} || owner(open+"/kept/l") != got {
		t.Errorf("owned by %v", got)
	}
	if r := a.untar(wire.Tree{Dir: open + "/kept", User: "user"}, bytes.NewReader(archive)); r.Code != 1 || !strings.Contains(r.Message, "permission denied") {
		t.Errorf("%+v", r)
	}
	if r := a.untar(wire.Tree{Dir: a.home + "/x", User: "nobody"}, bytes.NewReader(archive)); r.Code != 1 {
		t.Errorf("%+v", r)
	}
}

func TestTar(t *testing.T) {
	a := newTestAgent(t)
	dir := a.home + "/tree"
	long := strings.Repeat("long-", 50)
	write(t, dir+"/a/one", "1", 0o640)
	write(t, dir+"/a/"+long, "2", 0o755)
	write(t, dir+"/b/three", strings.Repeat("3", 100000), 0o600)
	os.Symlink("../../outside", dir+"/a/link")
	os.Link(dir+"/a/one", dir+"/b/hard")
	if err := syscall.Mkfifo(dir+"/b/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	got := func(tree wire.Tree) map[string]tar.Header {
		t.Helper()
		tree.Dir = dir
		r, err := a.run(wire.Request{Op: wire.OpTar, Tree: &tree}, nil)
		if err != nil || r.Code != 0 {
			t.Fatalf("%+v, %v", r.Exit, err)
		}
		headers := map[string]tar.Header{}
		for in := tar.NewReader(strings.NewReader(r.out)); ; {
			h, err := in.Next()
			if err == io.EOF {
				return headers
			}
			if err != nil {
				t.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, in); err != nil || n != h.Size {
				t.Fatalf("%s: %d, %v", h.Name, n, err)
			}
			headers[h.Name] = *h
		}
	}
	all := got(wire.Tree{})
	want := []string{"./", "a/", "a/link", "a/" + long, "a/one", "b/", "b/hard", "b/three"}
	if names := slices.Sorted(maps.Keys(all)); !slices.Equal(names, want) {
		t.Fatalf("%q", names)
	}
	if h := all["a/link"]; h.Typeflag != tar.TypeSymlink || h.Linkname != "../../outside" {
		t.Errorf("%+v", h)
	}
	if h := all["b/hard"]; h.Typeflag != tar.TypeLink || h.Linkname != "a/one" {
		t.Errorf("%+v", h)
	}
	if h := all["b/three"]; h.Size != 100000 || h.Mode != 0o600 {
		t.Errorf("%+v", h)
	}
	some := got(wire.Tree{Paths: []string{"b/hard", "a/link"}})
	if names := slices.Sorted(maps.Keys(some)); !slices.Equal(names, []string{"a/link", "b/hard"}) {
		t.Errorf("%q", names)
	}
	r, err := a.run(wire.Request{Op: wire.OpTar, Tree: &wire.Tree{Dir: dir, Paths: []string{"missing"}}}, nil)
	if err != nil || r.Code != 1 || !strings.Contains(r.Message, `cannot pack "missing"`) {
		t.Errorf("%+v, %v", r.Exit, err)
	}
	// A link that leads out is not followed.
	r, err = a.run(wire.Request{Op: wire.OpTar, Tree: &wire.Tree{Dir: dir, Paths: []string{"a/link/x"}}}, nil)
	if err != nil || r.Code != 1 {
		t.Errorf("%+v, %v", r.Exit, err)
	}
}

// A tree comes back as it was.
func TestTarUntar(t *testing.T) {
	a := newTestAgent(t)
	write(t, a.home+"/from/x/y", "text", 0o751)
	write(t, a.home+"/from/empty", "", 0o400)
	os.Symlink("nowhere", a.home+"/from/x/link")
	r, err := a.run(wire.Request{Op: wire.OpTar, Tree: &wire.Tree{Dir: a.home + "/from"}}, nil)
	if err != nil || r.Code != 0 {
		t.Fatalf("%+v, %v", r.Exit, err)
	}
	if r := a.untar(wire.Tree{Dir: a.home + "/to"}, strings.NewReader(r.out)); r.Code != 0 {
		t.Fatalf("%+v", r)
	}
	if out := a.sh("diff -r --no-dereference from to && stat -c '%a %Y' from/x/y to/x/y | uniq | wc -l"); strings.TrimSpace(out) != "1" {
		t.Error(out)
	}
}

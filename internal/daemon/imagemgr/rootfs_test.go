package imagemgr

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestMmdebstrapArgs(t *testing.T) {
	r := ImageRecipe{Suite: "bookworm", Packages: []string{"git", "make"}, Dpkg: []string{"path-exclude=/usr/share/man/*"}}
	a := archive{main: "http://m/debian", security: "http://m/sec", keyring: "/k.gpg", options: []string{`Acquire::http::Proxy "http://p:1";`}}
	want := []string{
		"mmdebstrap", "--mode=unshare", "--variant=minbase", "--format=tar", "--architectures=amd64",
		"--include=git,make", `--aptopt=Acquire::http::Proxy "http://p:1";`, "--dpkgopt=force-unsafe-io", "--dpkgopt=path-exclude=/usr/share/man/*",
		"bookworm", "/x/packages.tar",
		"deb [arch=amd64 signed-by=/k.gpg] http://m/debian bookworm main",
		"deb [arch=amd64 signed-by=/k.gpg] http://m/debian bookworm-updates main",
		"deb [arch=amd64 signed-by=/k.gpg] http://m/sec bookworm-security main",
	}
	if diff := cmp.Diff(want, mmdebstrapArgs(r, a, false, "/x/packages.tar")); diff != "" {
		t.Error(diff)
	}
	want = append([]string{"unshare", "--mount", "--propagation=private", "mmdebstrap", "--mode=root"}, want[2:]...)
	if diff := cmp.Diff(want, mmdebstrapArgs(r, a, true, "/x/packages.tar")); diff != "" {
		t.Error(diff)
	}
}

func TestMkfsArgs(t *testing.T) {
	root := strings.Join(mkfsArgs(fsSpec{image: "/x/rootfs.ext4", tree: "/x/tree", label: "banger-root", size: 1 << 28, grows: true}), " ")
	want := "mkfs.ext4 -q -F -b 4096 -I 256 -L banger-root -i 16384 -m 1 -J size=64" +
		" -O none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum,has_journal,resize_inode" +
		" -E lazy_itable_init=0,lazy_journal_init=1,root_owner=0:0,resize=268435456 -d /x/tree /x/rootfs.ext4"
	if root != want {
		t.Errorf("got  %s\nwant %s", root, want)
	}
	modules := strings.Join(mkfsArgs(fsSpec{image: "/x/m", tree: "/x/tree", label: "banger-modules", inodes: 99}), " ")
	if strings.Contains(modules, "has_journal") || !strings.Contains(modules, "-N 99") || !strings.Contains(modules, "-m 0") {
		t.Errorf("a read-only file system is made by %s", modules)
	}
}

// steps records the steps that are reported.
type steps []string

func (s *steps) Step(k, n int, name string) { *s = append(*s, fmt.Sprintf("%d/%d %s", k, n, name)) }
func (s *steps) Bytes(done, total int64)    {}

func TestPhases(t *testing.T) {
	var got steps
	w := &phases{progress: &got}
	out := "I: automatically chosen mode: root\nI: running apt-get update...\nI: downloading packages with apt...\n" +
		strings.Repeat("x", 5000) + "\nI: extracting archives...\rI: installing essential packages...\nI: installing remaining packages inside the chroot...\n" +
		"I: creating tarball...\nI: done"
	for chunk := range slices.Chunk([]byte(out), 7) {
		if n, err := w.Write(chunk); n != len(chunk) || err != nil {
			t.Fatal(n, err)
		}
	}
	want := steps{"2/8 download packages", "3/8 unpack base system", "4/8 install base system", "5/8 install packages", "6/8 pack"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// readOverlay reads an archive back.
func readOverlay(t *testing.T, files []File) map[string]*tar.Header {
	t.Helper()
	var b bytes.Buffer
	if err := writeOverlay(&b, files, time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	found := make(map[string]*tar.Header)
	tr := tar.NewReader(&b)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		if found[h.Name] != nil {
			t.Errorf("%s is there twice", h.Name)
		}
		if !strings.HasPrefix(h.Name, "./") || strings.Contains(h.Name, "..") || h.Uid != 0 || h.Gid != 0 {
			t.Errorf("strange entry %+v", h)
		}
		found[h.Name] = h
	}
}

func TestOverlay(t *testing.T) {
	found := readOverlay(t, Images()[0].Files)
	for name, want := range map[string]struct {
		kind byte
		mode int64
		link string
	}{
		"./etc/machine-id":                                                 {tar.TypeReg, 0o444, ""},
		"./etc/hostname":                                                   {tar.TypeReg, 0o644, ""},
		"./etc/systemd/system/getty.target":                                {tar.TypeSymlink, 0o777, "/dev/null"},
		"./etc/systemd/system/default.target":                              {tar.TypeSymlink, 0o777, "/lib/systemd/system/multi-user.target"},
		"./etc/systemd/system-generators/systemd-getty-generator":          {tar.TypeSymlink, 0o777, "/dev/null"},
		"./usr/share/man/man1/":                                            {tar.TypeDir, 0o755, ""},
		"./etc/systemd/system/systemd-journal-flush.service.d/banger.conf": {tar.TypeReg, 0o644, ""},
	} {
		h := found[name]
		if h == nil {
			t.Errorf("lacks %s", name)
		} else if h.Typeflag != want.kind || h.Mode != want.mode || h.Linkname != want.link {
			t.Errorf("%s is %+v, want %+v", name, h, want)
		}
	}
	for _, empty := range []string{"./etc/machine-id", "./etc/hostname", "./etc/resolv.conf", "./etc/fstab"} {
		if h := found[empty]; h == nil || h.Size != 0 {
			t.Errorf("%s is not empty", empty)
		}
	}
}

// No file of a recipe may be undone by its own patterns or name a host.
func TestRecipes(t *testing.T) {
	for _, r := range Images() {
		for _, f := range r.Files {
			if f.Path == "" || strings.HasPrefix(f.Path, "/") || !fs.ValidPath(f.Path) {
				t.Errorf("%s: bad path %q", r.Name, f.Path)
			}
		}
		if len(r.Packages) == 0 || r.Kernel == "" {
			t.Errorf("%s is not complete", r.Name)
		}
		if _, ok := kernelNamed(r.Kernel); !ok {
			t.Errorf("%s wants kernel %s, which there is no recipe for", r.Name, r.Kernel)
		}
		other := r
		other.Packages = append(slices.Clone(r.Packages), "gcc")
		if r.Hash() == other.Hash() || r.Hash() != Images()[0].Hash() {
			t.Error("the hash does not follow the recipe")
		}
	}
}

func kernelNamed(name string) (KernelRecipe, bool) {
	for _, k := range Kernels() {
		if k.Name == name {
			return k, true
		}
	}
	return KernelRecipe{}, false
}

func TestInspectTree(t *testing.T) {
	type entry struct {
		name string
		kind byte
		mode int64
		uid  int
		body string
	}
	good := []entry{
		{"./", tar.TypeDir, 0o755, 0, ""},
		{"./etc/passwd", tar.TypeReg, 0o644, 0, strings.Repeat("x", 4097)},
		{"./usr/sbin/init", tar.TypeSymlink, 0o777, 0, ""},
		{"./usr/bin/sudo", tar.TypeReg, 0o4755, 0, "x"},
		{"./usr/bin/again", tar.TypeLink, 0o755, 0, ""},
		{"./var/lib/dpkg/status", tar.TypeReg, 0o644, 0, "Package: git\nStatus: install ok installed\nVersion: 1:2.39\n\nPackage: make\nVersion: 4.3\n"},
	}
	pack := func(entries []entry) io.Reader {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, e := range entries {
			h := &tar.Header{Name: e.name, Typeflag: e.kind, Mode: e.mode, Uid: e.uid, Size: int64(len(e.body)), Linkname: "x"}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(w, e.body); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return &b
	}
	res, err := inspectTree(pack(good))
	if err != nil {
		t.Fatal(err)
	}
	// Directory 1, passwd 2, link 0, sudo 1, status 1; the hard link is no inode.
	if res.blocks != 5 || res.inodes != 5 {
		t.Errorf("counted %d blocks and %d inodes", res.blocks, res.inodes)
	}
	if diff := cmp.Diff([]string{"git 1:2.39", "make 4.3"}, res.packages); diff != "" {
		t.Error(diff)
	}
	for name, spoil := range map[string]func([]entry) []entry{
		"no init":       func(e []entry) []entry { return slices.Delete(e, 2, 3) },
		"no packages":   func(e []entry) []entry { e[5].body = ""; return e },
		"sudo's owner":  func(e []entry) []entry { e[3].uid = 1000; return e },
		"sudo's setuid": func(e []entry) []entry { e[3].mode = 0o755; return e },
	} {
		if _, err := inspectTree(pack(spoil(slices.Clone(good)))); err == nil {
			t.Errorf("%s: it passed", name)
		}
	}
	whole, err := io.ReadAll(pack(good))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := inspectTree(bytes.NewReader(whole[:3000])); err == nil {
		t.Error("half an archive passed")
	}
}

func TestSizes(t *testing.T) {
	// As measured of debian-bookworm: 205 MiB in 8476 files.
	size := rootSize(content{blocks: 205 << 20 / blockSize, inodes: 8476})
	if size != 384<<20 {
		t.Errorf("an image of 205 MiB gets %d MiB", size>>20)
	}
	// Many small files need inodes more than blocks.
	if size := rootSize(content{blocks: 100000, inodes: 100000}); size/bytesPerInode < 125000 {
		t.Errorf("%d inodes for 100000 files", size/bytesPerInode)
	}
	if size, inodes := packedSize(content{blocks: 1000, inodes: 10}); size < 1000*blockSize || inodes < 10+11 || size%(1<<20) != 0 {
		t.Errorf("%d bytes, %d inodes", size, inodes)
	}
}

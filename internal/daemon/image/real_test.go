package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/initrd"
)

// needImage guards the tests that build real images: minutes of work, and they need
// a package mirror. They run as root and as an ordinary user alike.
func needImage(t *testing.T) {
	t.Helper()
	if !slices.Contains(strings.Split(os.Getenv("BANGER_TEST_REQUIRE"), ","), "image") {
		t.Skip("needs image: BANGER_TEST_REQUIRE=image builds real images")
	}
}

// run runs a tool that looks at a result.
func run(t *testing.T, argv ...string) string {
	t.Helper()
	cmd := exec.Command(lookPath(t, argv[0]), argv[1:]...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v\n%s", argv, err, out)
	}
	return string(out)
}

func lookPath(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	t.Fatalf("there is no %s", name)
	return ""
}

// inode is a file in an ext4 image, as debugfs sees it.
type inode struct {
	kind, mode string
	uid, gid   int
	size       int64
	link       string
}

var inodeForm = regexp.MustCompile(`(?s)Type: (\w+)\s+Mode:\s+(\d+).*User:\s+(\d+)\s+Group:\s+(\d+).*?Size: (\d+)`)
var linkForm = regexp.MustCompile(`Fast link dest: "(.*)"`)

// stat looks at path in image; ok is false when it is not there.
func stat(t *testing.T, image, path string) (i inode, ok bool) {
	t.Helper()
	out := run(t, "debugfs", "-R", "stat "+path, image)
	if strings.Contains(out, "File not found") {
		return i, false
	}
	f := inodeForm.FindStringSubmatch(out)
	if f == nil {
		t.Fatalf("cannot read of %s: %s", path, out)
	}
	number := func(s string) int64 { n, _ := strconv.ParseInt(s, 10, 64); return n }
	i = inode{kind: f[1], mode: f[2], uid: int(number(f[3])), gid: int(number(f[4])), size: number(f[5])}
	if l := linkForm.FindStringSubmatch(out); l != nil {
		i.link = l[1]
	}
	return i, true
}

func allocated(t *testing.T, path string) int64 {
	t.Helper()
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// scratchLeft are scratch directories of this user outside of the state directory.
func scratchLeft(t *testing.T) []string {
	t.Helper()
	var left []string
	for _, parent := range []string{os.Getenv("TMPDIR"), "/var/tmp", "/tmp"} {
		found, err := filepath.Glob(filepath.Join(parent, "banger-build-*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range found {
			if st, err := os.Lstat(path); err == nil && int(st.Sys().(*syscall.Stat_t).Uid) == os.Geteuid() {
				left = append(left, path)
			}
		}
	}
	return left
}

// buildersLeft are processes whose command line names dir.
func buildersLeft(dir string) []string {
	var left []string
	found, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range found {
		data, _ := os.ReadFile(path)
		if line := strings.ReplaceAll(string(data), "\x00", " "); strings.Contains(line, dir) {
			left = append(left, line)
		}
	}
	return left
}

func realBuilder() *imagemgr.Builder { return imagemgr.NewBuilder(initrd.BootModules) }

func TestRealPull(t *testing.T) {
	needImage(t)
	w := newWorld(t, realBuilder())
	ctx := context.Background()
	begin := time.Now()
	var rec recorder
	kernel, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, &rec)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s in %.1f s, %d MiB, steps %q", kernel.Version, time.Since(begin).Seconds(), kernel.Size>>20, rec.all())
	checkKernel(t, w, kernel.Name, kernel.Modules)

	begin = time.Now()
	rec = recorder{}
	img, err := w.Ensure(ctx, imagemgr.DebianBookworm, &rec)
	if err != nil {
		t.Fatal(err)
	}
	rootfs := w.layout.Image(img.ID).Rootfs()
	t.Logf("image in %.1f s, %d MiB, %d MiB allocated, steps %q", time.Since(begin).Seconds(), img.Size>>20, allocated(t, rootfs)>>20, rec.all())
	if steps := rec.all(); len(steps) != 8 {
		t.Errorf("%d steps", len(steps))
	}
	checkRootfs(t, rootfs)
	checkFileSystem(t, rootfs)

	rec = recorder{}
	if again, err := w.Ensure(ctx, imagemgr.DebianBookworm, &rec); err != nil || again != img || len(rec.all()) > 0 {
		t.Errorf("again: %+v, %v, by the steps %q", again, err, rec.all())
	}
	nothingLeft(t, w.layout)
}

func nothingLeft(t *testing.T, l config.Layout) {
	t.Helper()
	if left := entries(t, l.Cache()); len(left) > 0 {
		t.Errorf("left in the cache: %q", left)
	}
	if left := scratchLeft(t); len(left) > 0 {
		t.Errorf("scratch directories left: %q", left)
	}
	if left := buildersLeft(l.Root); len(left) > 0 {
		t.Errorf("processes left: %q", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), l.Root) {
		t.Errorf("mounts left below %s:\n%s", l.Root, mounts)
	}
}

func checkKernel(t *testing.T, w *world, name string, modules []string) {
	t.Helper()
	dir := w.layout.Kernel(name)
	before := func(a, b string) {
		if i, j := slices.Index(modules, a), slices.Index(modules, b); i < 0 || j < 0 || i > j {
			t.Errorf("%s does not come before %s in %q", a, b, modules)
		}
	}
	before("virtio_ring.ko", "virtio.ko")
	before("virtio.ko", "virtio_mmio.ko")
	before("virtio.ko", "virtio_blk.ko")
	before("virtio.ko", "virtio_console.ko")
	before("virtio.ko", "virtio-rng.ko")
	for _, path := range []string{"/modules.dep.bin", "/modules.alias.bin", "/kernel", "/kernel/fs/overlayfs/overlay.ko"} {
		i, ok := stat(t, dir.ModulesDisk(), path)
		if !ok || i.uid != 0 || i.gid != 0 {
			t.Errorf("%s on the modules disk: %+v, %v", path, i, ok)
		}
	}
	run(t, "e2fsck", "-f", "-n", dir.ModulesDisk())
	if size := allocated(t, dir.ModulesDisk()); size > 130<<20 {
		t.Errorf("the modules disk takes %d MiB", size>>20)
	}
}

func checkRootfs(t *testing.T, rootfs string) {
	t.Helper()
	for path, want := range map[string]inode{
		"/usr/bin/sudo":   {kind: "regular", mode: "04755"},
		"/usr/bin/passwd": {kind: "regular", mode: "04755"},
		"/etc/shadow":     {kind: "regular", mode: "0640", gid: 42},
		"/etc/sudoers":    {kind: "regular", mode: "0440"},
		"/root":           {kind: "directory", mode: "0700"},
		"/tmp":            {kind: "directory", mode: "01777"},
		"/dev":            {kind: "directory", mode: "0755"},
		"/etc/machine-id": {kind: "regular", mode: "0444"},
		"/etc/hostname":   {kind: "regular", mode: "0644"},
		"/etc/fstab":      {kind: "regular", mode: "0644"},
		// The host's, if mmdebstrap's copy had stayed.
		"/etc/resolv.conf":                   {kind: "regular", mode: "0644"},
		"/etc/systemd/system/getty.target":   {kind: "symlink", mode: "0777", link: "/dev/null"},
		"/usr/bin/git":                       {kind: "regular", mode: "0755"},
		"/etc/dpkg/dpkg.cfg.d/banger":        {kind: "regular", mode: "0644"},
		"/usr/share/man/man1":                {kind: "directory", mode: "0755"},
		"/usr/share/doc/git/copyright":       {kind: "regular", mode: "0644"},
		"/var/lib/apt/lists":                 {kind: "directory", mode: "0755"},
		"/usr/share/ca-certificates":         {kind: "directory", mode: "0755"},
		"/etc/ssl/certs/ca-certificates.crt": {kind: "regular", mode: "0644"},
	} {
		got, ok := stat(t, rootfs, path)
		if !ok {
			t.Errorf("%s is missing", path)
			continue
		}
		empty := slices.Contains([]string{"/etc/machine-id", "/etc/hostname", "/etc/fstab", "/etc/resolv.conf"}, path)
		if empty != (got.size == 0) {
			t.Errorf("%s has %d bytes", path, got.size)
		}
		got.size = 0
		if got != want {
			t.Errorf("%s is %+v, want %+v", path, got, want)
		}
	}
	for _, path := range []string{
		"/etc/apt/apt.conf.d/99mmdebstrap", "/etc/dpkg/dpkg.cfg.d/99mmdebstrap", "/usr/share/man/man1/ls.1.gz",
		"/usr/share/doc/git/README.md", "/var/log/journal", "/var/log/dpkg.log", "/etc/ssh/ssh_host_ed25519_key",
		"/etc/systemd/system/timers.target.wants/apt-daily.timer", "/etc/modules", "/dev/null",
	} {
		if i, ok := stat(t, rootfs, path); ok {
			t.Errorf("%s is there: %+v", path, i)
		}
	}
	sources := run(t, "debugfs", "-R", "cat /etc/apt/sources.list", rootfs)
	if n := strings.Count(sources, "deb "+imagemgr.PublicMain); n != 3 {
		t.Errorf("sources.list:\n%s", sources)
	}
}

func checkFileSystem(t *testing.T, rootfs string) {
	t.Helper()
	run(t, "e2fsck", "-f", "-n", rootfs)
	dump := run(t, "dumpe2fs", rootfs)
	field := func(name string) int64 {
		m := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+)`).FindStringSubmatch(dump)
		if m == nil {
			t.Fatalf("dumpe2fs does not say %s", name)
		}
		n, _ := strconv.ParseInt(m[1], 10, 64)
		return n
	}
	if groups, zeroed := len(regexp.MustCompile(`(?m)^Group \d+:`).FindAllString(dump, -1)), strings.Count(dump, "ITABLE_ZEROED"); groups == 0 || groups != zeroed {
		t.Errorf("%d groups, %d with nothing left for the guest's kernel to zero", groups, zeroed)
	}
	if n := field("Block size"); n != 4096 {
		t.Errorf("blocks of %d bytes", n)
	}
	// Each block of descriptors holds those of 64 groups of 128 MiB.
	if most := (field("Reserved GDT blocks") + 1) * (4096 / field("Group descriptor size")) * 128 << 20; most < 1<<40 {
		t.Errorf("it can grow to %d GiB while it is mounted", most>>30)
	}
	if free, all := field("Free blocks"), field("Block count"); free*5 < all {
		t.Errorf("%d of %d blocks are free: the first boot has no room", free, all)
	}
	if !strings.Contains(dump, "has_journal") {
		t.Error("it has no journal")
	}
	if size := allocated(t, rootfs); size > 400<<20 {
		t.Errorf("it takes %d MiB", size>>20)
	}
}

// stepFunc is a Progress that calls itself with each step.
type stepFunc func(k int, name string)

func (f stepFunc) Step(k, n int, name string) { f(k, name) }
func (f stepFunc) Bytes(done, total int64)    {}

// At any step of a build a cancel leaves nothing: no process, no tree of another
// uid, no file. TestCancelledAnywhere has the publication.
func TestRealCancel(t *testing.T) {
	needImage(t)
	for at, kind := range map[string]string{
		"unpack base system": "image", "install packages": "image", "make file system": "image",
		"unpack kernel": "kernel", "make modules disk": "kernel",
	} {
		t.Run(kind+"/"+at, func(t *testing.T) {
			w := newWorld(t, realBuilder())
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			seen := false
			progress := stepFunc(func(k int, name string) {
				if name == at {
					seen = true
					cancel()
				}
			})
			var err error
			if kind == "image" {
				_, err = w.Pull(ctx, imagemgr.DebianBookworm, false, progress)
			} else {
				_, err = w.PullKernel(ctx, imagemgr.DebianCloud, false, progress)
			}
			if !errors.Is(err, context.Canceled) || !seen {
				t.Errorf("got %v, seen %v", err, seen)
			}
			nothingLeft(t, w.layout)
			if left := append(entries(t, w.layout.Images()), entries(t, w.layout.Kernels())...); len(left) > 0 {
				t.Errorf("images and kernels %q", left)
			}
		})
	}
}

// A daemon that is killed in the middle of a real build leaves what the next one
// sweeps.
func TestRealKill(t *testing.T) {
	needImage(t)
	w := &world{t: t, layout: config.Layout{Root: filepath.Join(t.TempDir(), "state")}}
	if err := w.layout.Prepare(); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^$")
	cmd.Env = append(os.Environ(), crashState+"="+w.layout.Root, crashPoint+"="+realCrash)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the daemon was not killed: %v\n%s", err, out)
	}
	if len(entries(t, w.layout.Cache())) != 1 {
		t.Fatalf("the cache holds %q", entries(t, w.layout.Cache()))
	}
	w.open(realBuilder())
	eventually(t, "the cache is swept", func() bool { return len(entries(t, w.layout.Cache())) == 0 })
	eventually(t, "no process is left", func() bool { return len(buildersLeft(w.layout.Root)) == 0 })
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, w.layout)
}

// realCrash is the crash point of TestRealKill.
const realCrash = "real build"

func crashReal(layout config.Layout) {
	m := openManager(&testing.T{}, layout, realBuilder())
	_, err := m.Pull(context.Background(), imagemgr.DebianBookworm, true, stepFunc(func(k int, name string) {
		if name == "install packages" {
			die()
		}
	}))
	fmt.Println(err)
}

// What the mirror serves is refused unless a trusted key signed it.
func TestRealSignature(t *testing.T) {
	needImage(t)
	b := realBuilder()
	b.Keyring = "/usr/share/keyrings/debian-archive-removed-keys.gpg"
	w := newWorld(t, b)
	_, err := w.PullKernel(context.Background(), imagemgr.DebianCloud, false, quiet{})
	if !errors.Is(err, imagemgr.ErrSignature) || api.CodeOf(err) != api.NotReady {
		t.Errorf("kernel: %v", err)
	}
	_, err = w.Pull(context.Background(), imagemgr.DebianBookworm, false, quiet{})
	if !errors.Is(err, imagemgr.ErrSignature) {
		t.Errorf("image: %v", err)
	}
	nothingLeft(t, w.layout)
}

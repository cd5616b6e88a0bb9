package image

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/config"
	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/opstate"
)

// The environment by which this test binary becomes a daemon that is about to die.
const (
	crashState = "BANGER_TEST_CRASH_STATE"
	crashPoint = "BANGER_TEST_CRASH_POINT"
)

func TestMain(m *testing.M) {
	if point := os.Getenv(crashPoint); point != "" {
		layout := config.Layout{Root: os.Getenv(crashState)}
		if point == realCrash {
			crashReal(layout)
		} else {
			crash(layout, point)
		}
		os.Exit(1) // it was to be killed on the way
	}
	os.Exit(m.Run())
}

func die() {
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// crash pulls image and kernel by force and is killed at point.
func crash(layout config.Layout, point string) {
	b := &imagetest.Builder{Before: func(ctx context.Context, name, dir string, p opstate.Progress) error {
		if err := os.WriteFile(filepath.Join(dir, "half"), nil, 0o600); err != nil {
			return err
		}
		if point == "building "+name {
			die()
		}
		return os.Remove(filepath.Join(dir, "half"))
	}}
	t := &testing.T{}
	m := openManager(t, layout, b)
	m.hook = func(p string) {
		if p == point {
			die()
		}
	}
	m.Pull(context.Background(), imagemgr.DebianBookworm, true, quiet{})
	m.PullKernel(context.Background(), imagemgr.DebianCloud, true, quiet{})
}

// Killed at any point of a pull, over an empty registry and over a full one, the
// daemon comes back with rows and files that fit, and everything usable.
func TestKilledAnywhere(t *testing.T) {
	points := []string{
		"building " + imagemgr.DebianBookworm, "image built", "image moved", "image recorded",
		"building " + imagemgr.DebianCloud, "kernel built", "kernel moved", "kernel recorded",
	}
	for _, point := range points {
		for _, full := range []bool{false, true} {
			name := strings.ReplaceAll(point, " ", "-") + map[bool]string{false: "/empty", true: "/full"}[full]
			t.Run(name, func(t *testing.T) { killedAt(t, point, full) })
		}
	}
}

func killedAt(t *testing.T, point string, full bool) {
	ctx := context.Background()
	w := &world{t: t, layout: config.Layout{Root: filepath.Join(t.TempDir(), "state")}}
	if err := w.layout.Prepare(); err != nil {
		t.Fatal(err)
	}
	var used string // the image that a VM was made from
	if full {
		m := openManager(t, w.layout, &imagetest.Builder{})
		w.Manager = m
		img, err := m.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
		if err != nil {
			t.Fatal(err)
		}
		used = img.ID
		w.useImage(used, "dev")
		if err := errors.Join(m.Close(), m.store.Close()); err != nil {
			t.Fatal(err)
		}
	}

	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^$")
	cmd.Env = append(os.Environ(), crashState+"="+w.layout.Root, crashPoint+"="+point)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the daemon was not killed at %q: %v\n%s", point, err, out)
	}

	w.open(&imagetest.Builder{})
	eventually(t, "the cache is swept", func() bool { return len(entries(t, w.layout.Cache())) == 0 })
	w.consistent()
	if used != "" {
		if _, err := os.Stat(w.layout.Image(used).Rootfs()); err != nil {
			t.Errorf("the image of a VM is gone: %v", err)
		}
	}
	img, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	// What was there before the crash, or had been moved into place, is not lost.
	replaced := point == "image moved" || point == "image recorded" || strings.Contains(point, "kernel") || strings.Contains(point, imagemgr.DebianCloud)
	if full && (img.ID == used) == replaced {
		t.Errorf("killed at %q, the name belongs to %s; the old image is %s", point, img.ID, used)
	}
	if _, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{}); err != nil {
		t.Fatal(err)
	}
	w.consistent()
	// Nothing was adopted twice or lost on the way: another crash-free life changes nothing.
	before := entries(t, w.layout.Images())
	if err := w.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if after := entries(t, w.layout.Images()); !slices.Equal(before, after) {
		t.Errorf("the prune of %q left %q", before, after)
	}
}

// consistent fails unless each row has its files and all files have a row that says
// the same.
func (w *world) consistent() {
	w.t.Helper()
	ctx := context.Background()
	rows, err := w.store.Images(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	var ids []string
	for _, img := range rows {
		ids = append(ids, img.ID)
		if _, err := w.readImage(img.ID); err != nil {
			w.t.Errorf("a row without its files: %v", err)
		}
	}
	if dirs := entries(w.t, w.layout.Images()); !slices.Equal(dirs, sorted(ids...)) {
		w.t.Errorf("directories %q, rows %q", dirs, ids)
	}
	kernels, err := w.store.Kernels(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, k := range kernels {
		names = append(names, k.Name)
		var meta kernelMeta
		if err := readMeta(w.layout.Kernel(k.Name).Meta(), &meta); err != nil {
			w.t.Errorf("a row without its files: %v", err)
		}
		if !meta.CreatedAt.Equal(k.CreatedAt) || meta.Release != k.Version {
			w.t.Errorf("row %+v, file %+v", k, meta)
		}
	}
	if dirs := entries(w.t, w.layout.Kernels()); !slices.Equal(dirs, sorted(names...)) {
		w.t.Errorf("directories %q, rows %q", dirs, names)
	}
}

// Without the database, images and kernels come back from their files: the youngest
// image has the name, and none goes before the VMs are back.
func TestLostDatabase(t *testing.T) {
	w := newWorld(t, &imagetest.Builder{})
	ctx := context.Background()
	first, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	vm := w.useImage(first.ID, "dev")
	second, err := w.Pull(ctx, imagemgr.DebianBookworm, true, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	fresh := &world{t: t, layout: w.layout}
	lost, err := filepath.Glob(w.layout.DB() + "*")
	if err != nil || len(lost) == 0 {
		t.Fatal(lost, err)
	}
	for _, path := range lost {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	strange := filepath.Join(w.layout.Images(), "strange")
	if err := os.Mkdir(strange, 0o700); err != nil {
		t.Fatal(err)
	}
	fresh.open(&imagetest.Builder{})
	if _, err := os.Stat(strange); err != nil {
		t.Errorf("something that is not ours was removed: %v", err)
	}
	if img, err := fresh.store.ImageByName(ctx, imagemgr.DebianBookworm); err != nil || img != second {
		t.Errorf("the name belongs to %+v, %v; want %+v", img, err, second)
	}
	if k, err := fresh.store.Kernel(ctx, kernel.Name); err != nil || k.Version != kernel.Version || !slices.Equal(k.Modules, kernel.Modules) {
		t.Errorf("kernel %+v, %v", k, err)
	}
	if err := fresh.store.InsertVM(ctx, vm); err != nil {
		t.Fatalf("the VM cannot come back: %v", err)
	}
	if err := fresh.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fresh.layout.Image(first.ID).Rootfs()); err != nil {
		t.Error(err)
	}
}

// Two pulls of different things do not wait for each other.
func TestImageAndKernelAreIndependent(t *testing.T) {
	stalled := make(chan struct{})
	b := &imagetest.Builder{Before: func(ctx context.Context, name, dir string, p opstate.Progress) error {
		if name == imagemgr.DebianBookworm {
			close(stalled)
			<-ctx.Done()
			return context.Cause(ctx)
		}
		return nil
	}}
	w := newWorld(t, b)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { _, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{}); done <- err }()
	<-stalled
	if _, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{}); err != nil {
		t.Errorf("the kernel waited for the image: %v", err)
	}
	cancel()
	<-done
}

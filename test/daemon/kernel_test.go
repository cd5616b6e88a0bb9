package daemon

import (
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/opstate"
)

// stamped is a builder whose kernels differ from each other: what belongs to one carries
// its stamp, which is the last word of its version.
type stamped struct{ imagetest.Builder }

// stampMark begins a stamp, so that one can be found in a file.
const stampMark = "stamp-"

func (b *stamped) BuildKernel(ctx context.Context, r imagemgr.KernelRecipe, dir string, p opstate.Progress) (imagemgr.KernelInfo, error) {
	info, err := b.Builder.BuildKernel(ctx, r, dir, p)
	if err != nil {
		return info, err
	}
	stamp := stampMark + rand.Text()
	modules := filepath.Join(dir, imagemgr.ModulesDir)
	module := "virtio_blk-" + stamp + ".ko"
	if err := os.Rename(filepath.Join(modules, info.Modules[0]), filepath.Join(modules, module)); err != nil {
		return info, err
	}
	for _, path := range []string{filepath.Join(dir, imagemgr.VmlinuxFile), filepath.Join(dir, imagemgr.ModulesDiskFile), filepath.Join(modules, module)} {
		if err := os.WriteFile(path, []byte(stamp+"\n"), 0o600); err != nil {
			return info, err
		}
	}
	info.Version, info.Modules = "6.1.0-0-"+stamp, []string{module}
	return info, os.WriteFile(os.Getenv(envState)+".built", []byte(info.Version), 0o600)
}

// kernel is the version of the kernel that is here.
func (d *process) kernel(t *testing.T) string {
	t.Helper()
	res, err := d.client().kernels.List(d.ctx(t), &bangerv1.ListKernelsRequest{})
	if err != nil || len(res.Kernels) != 1 || res.Kernels[0].Version == "" {
		t.Fatalf("kernels: %v, %v", res, err)
	}
	return res.Kernels[0].Version
}

// wantBooted holds that all that the VM "v" was booted with is of one kernel.
func (w *world) wantBooted(t *testing.T, version string) {
	t.Helper()
	_, stamp, _ := strings.Cut(version, stampMark)
	want := stampMark + stamp
	for name, count := range map[string]int{
		"kernel": 1, "modules": 1,
		"initrd": 3, // the module's name and its content, and its name in the configuration
	} {
		found, err := filepath.Glob(filepath.Join(w.state, "vms/*/run", name))
		if err != nil || len(found) != 1 {
			t.Fatalf("run/%s: %v, %v", name, found, err)
		}
		data, err := os.ReadFile(found[0])
		if err != nil {
			t.Fatal(err)
		}
		if all, ours := bytes.Count(data, []byte(stampMark)), bytes.Count(data, []byte(want)); all != count || ours != count {
			t.Errorf("run/%s is of %s in %d of %d places, want %d", name, version, ours, all, count)
		}
	}
}

// TestKernelReplacedBeforeBootFiles: a pull that replaces the kernel after a start has
// looked at it, and before the start takes its files, is the kernel that is booted.
func TestKernelReplacedBeforeBootFiles(t *testing.T) {
	w := newWorld(t)
	for _, verb := range []string{"create", "start"} {
		point := verb + "/disk attachment/acquire/effect"
		d := w.start(t, "pause "+point, 0)
		c, ctx := d.client(), d.ctx(t)
		if verb == "start" {
			w.arrange(t, d, "stopped")
		} else if err := c.do(ctx)(c.kernels.Pull(ctx, &bangerv1.PullKernelRequest{})); err != nil {
			t.Fatal(err)
		}
		old := d.kernel(t)
		d.forget(t)
		ended := make(chan error, 1)
		go func() {
			if verb == "create" {
				ended <- c.create(ctx, false)
			} else {
				ended <- c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT}))
			}
		}()
		d.waitPoint(t, point)
		if err := c.do(ctx)(c.kernels.Pull(ctx, &bangerv1.PullKernelRequest{Force: true})); err != nil {
			t.Fatalf("pull: %v", err)
		}
		now := d.kernel(t)
		if now == old {
			t.Fatal("the pull has replaced nothing")
		}
		d.resume(t)
		if err := <-ended; err != nil {
			t.Fatalf("%s: %v", verb, err)
		}
		w.wantBooted(t, now)
		w.clear(t, d)
		d.stop(t)
		if err := os.Remove(w.state + ".go"); err != nil {
			t.Fatal(err)
		}
	}
}

// TestKernelReplacedDuringBootFiles: while a start takes the kernel's files, no pull
// replaces them.
func TestKernelReplacedDuringBootFiles(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	w.arrange(t, d, "stopped")
	c, ctx := d.client(), d.ctx(t)
	old := d.kernel(t)
	programs, err := filepath.Glob(filepath.Join(w.state, "programs/*/banger-guest"))
	if err != nil || len(programs) != 1 {
		t.Fatalf("the guest's program: %v, %v", programs, err)
	}
	// The initramfs begins with the guest's program; by then the kernel is linked.
	opened, release := holdOpen(t, programs[0])
	if err := os.Remove(w.state + ".built"); err != nil {
		t.Fatal(err)
	}
	start, err := c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-opened:
	case <-ctx.Done():
		t.Fatal("the start does not come to the initramfs")
	}
	pull, err := c.kernels.Pull(ctx, &bangerv1.PullKernelRequest{Force: true})
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(limit); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(w.state + ".built"); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the kernel does not get built")
		}
	}
	// All that is left of the pull are two renames and a row. Each look takes longer.
	for range 50 {
		if now := d.kernel(t); now != old {
			t.Fatalf("the start has half of %s, and %s takes its place", old, now)
		}
	}
	for _, op := range []*bangerv1.Operation{start, pull} {
		if now := d.operation(t, op.Id); now.State != bangerv1.Operation_RUNNING {
			t.Errorf("the %s is %s: %s", now.Kind, now.State, now.Error)
		}
	}
	release()
	for _, op := range []*bangerv1.Operation{start, pull} {
		if err := c.do(ctx)(op, nil); err != nil {
			t.Fatalf("%s: %v", op.Kind, err)
		}
	}
	w.wantBooted(t, old)
	now := d.kernel(t)
	if now == old {
		t.Error("the pull has replaced nothing")
	}
	// The next boot has the new one.
	if err := c.do(ctx)(c.vms.Stop(ctx, &bangerv1.StopVMRequest{Ref: "v"})); err != nil {
		t.Fatal(err)
	}
	if err := c.do(ctx)(c.vms.Start(ctx, &bangerv1.StartVMRequest{Ref: "v", Ready: bangerv1.Ready_READY_AGENT})); err != nil {
		t.Fatal(err)
	}
	w.wantBooted(t, now)
	w.clear(t, d)
	d.stop(t)
}

// holdOpen makes whoever opens the file from now on wait for release, and tells when
// somebody does: a lease, see fcntl(2). The kernel breaks it after 45 s.
func holdOpen(t *testing.T, path string) (opened <-chan os.Signal, release func()) {
	t.Helper()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGIO)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	release = func() { signal.Stop(signals); f.Close() }
	t.Cleanup(release)
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Fatalf("no lease on %s, which holds the start back here; set TMPDIR to a local file system: %v", path, err)
	}
	return signals, release
}

// TestCancelledPull: a pull that is cancelled while it builds leaves what was here before
// it and nothing else, and can be made again.
func TestCancelledPull(t *testing.T) {
	w := newWorld(t)
	d := w.start(t, "", 0)
	c, ctx := d.client(), d.ctx(t)
	hold := w.state + ".hold"
	pulls := map[string]func(force bool) (*bangerv1.Operation, error){
		"image": func(force bool) (*bangerv1.Operation, error) {
			return c.images.Pull(ctx, &bangerv1.PullImageRequest{Force: force})
		},
		"kernel": func(force bool) (*bangerv1.Operation, error) {
			return c.kernels.Pull(ctx, &bangerv1.PullKernelRequest{Force: force})
		},
	}
	// here is what the state directory has of images and kernels.
	here := func() string {
		return listing(t, filepath.Join(w.state, "images"), true) + listing(t, filepath.Join(w.state, "kernels"), true) +
			w.sqlite(t, "select id, name from images union select name, version from kernels")
	}
	for _, force := range []bool{false, true} { // over nothing, and over what is here
		for what, pull := range pulls {
			before := here()
			if err := os.WriteFile(hold, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			op, err := pull(force)
			if err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(limit); d.operation(t, op.Id).StepName != "download packages"; time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("the pull does not begin: %v", d.operation(t, op.Id))
				}
			}
			if err := cancelIt().act(ctx, c, op); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if now := d.operation(t, op.Id); now.Error.GetCode() != string(api.Cancelled) {
				t.Errorf("the cancelled pull of the %s: %s", what, now.Error)
			}
			if after := here(); after != before {
				t.Errorf("a cancelled pull of the %s made of\n%s\nthis:\n%s", what, before, after)
			}
			if entries, err := os.ReadDir(filepath.Join(w.state, "cache")); err != nil || len(entries) > 0 {
				t.Errorf("a cancelled pull of the %s left in the cache: %v, %v", what, entries, err)
			}
			if err := os.Remove(hold); err != nil {
				t.Fatal(err)
			}
			if err := c.do(ctx)(pull(force)); err != nil {
				t.Errorf("the %s afterwards: %v", what, err)
			}
			if here() == before {
				t.Errorf("the %s afterwards brought nothing", what)
			}
		}
	}
	d.stop(t)
}

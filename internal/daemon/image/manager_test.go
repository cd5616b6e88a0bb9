package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/image/imagetest"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
)

// world is one state directory, whose daemon can be dropped and opened again.
type world struct {
	t      *testing.T
	layout config.Layout
	*Manager
}

func newWorld(t *testing.T, b Builder) *world {
	t.Helper()
	w := &world{t: t, layout: config.Layout{Root: filepath.Join(t.TempDir(), "state")}}
	if err := w.layout.Prepare(); err != nil {
		t.Fatal(err)
	}
	w.open(b)
	return w
}

func (w *world) open(b Builder) {
	w.t.Helper()
	m := openManager(w.t, w.layout, b)
	w.Manager = m
	w.t.Cleanup(func() {
		if err := errors.Join(m.Close(), m.store.Close()); err != nil {
			w.t.Error(err)
		}
	})
}

func openManager(t testing.TB, layout config.Layout, b Builder) *Manager {
	t.Helper()
	s, err := store.Open(context.Background(), layout.DB())
	if err != nil {
		t.Fatal(err)
	}
	m := New(Options{Layout: layout, Store: s, Checker: locks.NewChecker(), Logger: slog.New(slog.DiscardHandler), Builder: b})
	if err := m.Recover(context.Background()); err != nil {
		t.Fatal(err)
	}
	return m
}

// quiet is a Progress for nobody.
type quiet struct{}

func (quiet) Step(k, n int, name string) {}
func (quiet) Bytes(done, total int64)    {}

// recorder is a Progress that remembers.
type recorder struct {
	mu    sync.Mutex
	steps []string
}

func (r *recorder) Step(k, n int, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.steps = append(r.steps, fmt.Sprintf("%d/%d %s", k, n, name))
}

func (r *recorder) Bytes(done, total int64) {}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.steps)
}

// entries are the names in a directory.
func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// eventually polls until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("it never came true: %s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (w *world) useImage(imageID, name string) store.VM {
	w.t.Helper()
	ctx := context.Background()
	if _, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{}); err != nil {
		w.t.Fatal(err)
	}
	slot, err := w.store.FreeSlot(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	v := store.VM{
		ID: newID(), Name: name, State: store.Creating, Slot: slot, ImageID: imageID, Kernel: imagemgr.DebianCloud,
		CPUs: 1, Memory: 1 << 28, Disk: 1 << 30, MachineID: strings.Repeat("0", 32), CreatedAt: time.Now(),
	}
	if err := w.store.InsertVM(ctx, v); err != nil {
		w.t.Fatal(err)
	}
	return v
}

// counting counts builds, and can be told to stall or fail.
type counting struct {
	imagetest.Builder
	builds  atomic.Int32
	removed atomic.Int32
}

func (b *counting) Remove(ctx context.Context, dir string) error {
	b.removed.Add(1)
	return b.Builder.Remove(ctx, dir)
}

func newCounting(before func(ctx context.Context, dir string) error) *counting {
	b := &counting{}
	b.Before = func(ctx context.Context, name, dir string, p opstate.Progress) error {
		b.builds.Add(1)
		if before != nil {
			return before(ctx, dir)
		}
		return nil
	}
	return b
}

func TestEnsurePullsOnce(t *testing.T) {
	b := newCounting(nil)
	w := newWorld(t, b)
	ctx := context.Background()
	var rec recorder
	img, err := w.Ensure(ctx, imagemgr.DebianBookworm, &rec)
	if err != nil {
		t.Fatal(err)
	}
	if !img.OwnUser || !img.Managed || img.Kernel != imagemgr.DebianCloud || img.Name != imagemgr.DebianBookworm {
		t.Errorf("image %+v", img)
	}
	// A step that is over at once may be skipped.
	if steps := rec.all(); len(steps) == 0 || !strings.HasPrefix(steps[len(steps)-1], "2/2") {
		t.Errorf("steps %q", steps)
	}
	st, err := os.Stat(w.layout.Image(img.ID).Rootfs())
	if err != nil || st.Size() != img.Size {
		t.Errorf("rootfs %v, %v", st, err)
	}
	kernel, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range kernel.Modules {
		if _, err := os.Stat(filepath.Join(w.layout.Kernel(kernel.Name).Modules(), name)); err != nil {
			t.Error(err)
		}
	}
	for _, path := range []string{w.layout.Kernel(kernel.Name).Vmlinux(), w.layout.Kernel(kernel.Name).ModulesDisk()} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	again, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
	if err != nil || again != img {
		t.Errorf("again: %+v, %v", again, err)
	}
	if again, err := w.Pull(ctx, imagemgr.DebianBookworm, false, quiet{}); err != nil || again != img {
		t.Errorf("pulled again: %+v, %v", again, err)
	}
	if n := b.builds.Load(); n != 2 {
		t.Errorf("%d builds for an image and a kernel", n)
	}
	if left := entries(t, w.layout.Cache()); len(left) > 0 {
		t.Errorf("left in the cache: %q", left)
	}
}

func TestUnknownNames(t *testing.T) {
	w := newWorld(t, &imagetest.Builder{})
	for what, fn := range map[string]func() error{
		"banger image ls":  func() error { _, err := w.Ensure(context.Background(), "windows", quiet{}); return err },
		"banger kernel ls": func() error { _, err := w.PullKernel(context.Background(), "windows", true, quiet{}); return err },
	} {
		if err := fn(); api.CodeOf(err) != api.NotFound || api.HintOf(err) != what {
			t.Errorf("got %v, hint %q", err, api.HintOf(err))
		}
	}
}

func TestConcurrentPullsShareOne(t *testing.T) {
	release := make(chan struct{})
	b := newCounting(func(ctx context.Context, dir string) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	w := newWorld(t, b)
	const callers = 8
	ids := make(chan string, callers)
	var recs [callers]recorder
	for i := range callers {
		go func() {
			img, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, &recs[i])
			if err != nil {
				t.Error(err)
			}
			ids <- img.ID
		}()
	}
	for i := range recs {
		eventually(t, "each caller sees the first step", func() bool { return len(recs[i].all()) > 0 })
	}
	close(release)
	first := <-ids
	for range callers - 1 {
		if id := <-ids; id != first || id == "" {
			t.Errorf("got images %q and %q", first, id)
		}
	}
	if n := b.builds.Load(); n != 1 {
		t.Errorf("%d builds", n)
	}
}

// A caller that gives up leaves the pull to the others.
func TestCancelledJoinerLeavesThePullAlone(t *testing.T) {
	release := make(chan struct{})
	started := make(chan struct{}, 1)
	b := newCounting(func(ctx context.Context, dir string) error {
		started <- struct{}{}
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	w := newWorld(t, b)
	giveUp := errors.New("ctrl-c")
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	var early recorder
	result := make(chan error, 2)
	go func() { _, err := w.Ensure(ctx, imagemgr.DebianBookworm, &early); result <- err }()
	<-started
	var late recorder
	stays := make(chan error, 1)
	go func() { _, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, &late); stays <- err }()
	eventually(t, "the second caller has joined", func() bool { return len(late.all()) > 0 })
	cancel(giveUp)
	if err := <-result; !errors.Is(err, giveUp) {
		t.Errorf("the one who gave up got %v", err)
	}
	close(release)
	if err := <-stays; err != nil {
		t.Errorf("the one who stayed got %v", err)
	}
	if n := b.builds.Load(); n != 1 {
		t.Errorf("%d builds", n)
	}
}

// The last caller to leave ends the pull, and returns when nothing of it is left; a
// caller who comes in the meantime gets a pull of its own.
func TestLastLeaverEndsThePull(t *testing.T) {
	started := make(chan struct{}, 2)
	ended := make(chan struct{})
	var builds atomic.Int32
	b := newCounting(func(ctx context.Context, dir string) error {
		first := builds.Add(1) == 1
		started <- struct{}{}
		if !first {
			return nil
		}
		if err := os.WriteFile(filepath.Join(dir, "half"), []byte("x"), 0o600); err != nil {
			return err
		}
		<-ctx.Done()
		<-ended // a tool that takes its time to die
		return context.Cause(ctx)
	})
	w := newWorld(t, b)
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error, 1)
	go func() { _, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{}); left <- err }()
	<-started
	cancel()
	// Until then a caller would join the pull, which is another test's.
	eventually(t, "the only caller has left", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		for _, f := range w.flights {
			if f.abandoned {
				return true
			}
		}
		return false
	})
	late := make(chan error, 1)
	go func() { _, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, quiet{}); late <- err }()
	select {
	case err := <-left:
		t.Fatalf("it did not wait for the clean-up: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(ended)
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if err := <-late; err != nil {
		t.Errorf("the late caller got %v", err)
	}
	eventually(t, "the cache is empty", func() bool { return len(entries(t, w.layout.Cache())) == 0 })
	if n := b.builds.Load(); n != 2 {
		t.Errorf("%d builds", n)
	}
}

func TestFailuresLeaveNothingAndHaveACode(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code api.Code
		hint string
		says string
	}{
		{fmt.Errorf("tar: %w", syscall.ENOSPC), api.NoSpace, "df -h ", "cannot pull debian-bookworm: tar: no space left on device"},
		{&imagemgr.MissingError{What: []string{"mmdebstrap", "newuidmap"}, Packages: []string{"mmdebstrap", "uidmap"}}, api.NotReady, "apt-get install mmdebstrap uidmap", "mmdebstrap and newuidmap are not installed"},
		{&imagemgr.NamespaceError{Reason: "no range", Remedy: "sudo usermod x"}, api.NotReady, "sudo usermod x", "no range"},
		{fmt.Errorf("%w: x", imagemgr.ErrNetwork), api.NotReady, "banger image pull debian-bookworm", "cannot reach"},
		{fmt.Errorf("%w: x", imagemgr.ErrSignature), api.NotReady, "debian-archive-keyring", "not signed"},
		{errors.New("odd"), api.Internal, "", "cannot pull debian-bookworm: odd"},
	} {
		b := newCounting(func(ctx context.Context, dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "half"), nil, 0o600), tc.err)
		})
		w := newWorld(t, b)
		_, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, quiet{})
		if api.CodeOf(err) != tc.code || !strings.Contains(api.HintOf(err), tc.hint) || err == nil || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%v: got code %s, hint %q, %v", tc.err, api.CodeOf(err), api.HintOf(err), err)
		}
		for _, dir := range []string{w.layout.Cache(), w.layout.Images()} {
			if left := entries(t, dir); len(left) > 0 {
				t.Errorf("%v: left in %s: %q", tc.err, dir, left)
			}
		}
		if rows, err := w.store.Images(context.Background()); err != nil || len(rows) > 0 {
			t.Errorf("%v: rows %v, %v", tc.err, rows, err)
		}
	}
}

func TestPanicOfABuilderIsAnError(t *testing.T) {
	w := newWorld(t, newCounting(func(context.Context, string) error { panic("oops") }))
	_, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, quiet{})
	var p *opstate.PanicError
	if !errors.As(err, &p) || p.Value != "oops" {
		t.Errorf("got %v", err)
	}
}

func TestForcedPullKeepsTheOldImageWhileItIsUsed(t *testing.T) {
	w := newWorld(t, &imagetest.Builder{})
	ctx := context.Background()
	pull := func() store.Image {
		t.Helper()
		img, err := w.Pull(ctx, imagemgr.DebianBookworm, true, quiet{})
		if err != nil {
			t.Fatal(err)
		}
		return img
	}
	first := pull()
	vm := w.useImage(first.ID, "dev")
	second := pull()
	third := pull()
	if err := w.Prune(ctx); err != nil { // second has no user: it goes
		t.Fatal(err)
	}
	if first.ID == second.ID || second.ID == third.ID {
		t.Fatal("an image was replaced in place")
	}
	if got := entries(t, w.layout.Images()); !slices.Equal(got, sorted(first.ID, third.ID)) {
		t.Errorf("images on disk: %q, first %s, third %s", got, first.ID, third.ID)
	}
	if old, err := w.store.Image(ctx, first.ID); err != nil || old.Name != "" {
		t.Errorf("the old image: %+v, %v", old, err)
	}
	list, err := w.List(ctx)
	if err != nil || len(list) != 2 || list[0].InUse != 1 || list[1].InUse != 0 {
		t.Errorf("list %+v, %v", list, err)
	}
	if err := w.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(w.layout.Image(first.ID).Rootfs()); err != nil {
		t.Errorf("an image in use was pruned: %v", err)
	}
	if err := w.store.DeleteVM(ctx, vm.ID); err != nil {
		t.Fatal(err)
	}
	if err := w.Prune(ctx); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, w.layout.Images()); !slices.Equal(got, []string{third.ID}) {
		t.Errorf("after the prune: %q", got)
	}
}

func sorted(names ...string) []string { slices.Sort(names); return names }

// A running VM holds links to the kernel's files: they must survive a replacement.
func TestForcedKernelPullReplacesInPlace(t *testing.T) {
	w := newWorld(t, &imagetest.Builder{})
	ctx := context.Background()
	first, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "kernel")
	if err := os.Link(w.layout.Kernel(first.Name).Vmlinux(), link); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(link)
	if err != nil {
		t.Fatal(err)
	}
	second, err := w.PullKernel(ctx, imagemgr.DebianCloud, true, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	if !second.CreatedAt.After(first.CreatedAt) {
		t.Errorf("the row is the old one: %v, %v", first.CreatedAt, second.CreatedAt)
	}
	after, err := os.Stat(w.layout.Kernel(first.Name).Vmlinux())
	if err != nil || os.SameFile(before, after) {
		t.Errorf("the file is the old one (%v)", err)
	}
	if data, err := os.ReadFile(link); err != nil || int64(len(data)) != before.Size() {
		t.Errorf("the linked kernel has %d bytes, %v", len(data), err)
	}
	if left := entries(t, w.layout.Cache()); len(left) > 0 {
		t.Errorf("left in the cache: %q", left)
	}
	if got := entries(t, w.layout.Kernels()); !slices.Equal(got, []string{imagemgr.DebianCloud}) {
		t.Errorf("kernels on disk: %q", got)
	}
}

// A row whose files are gone must not satisfy Ensure.
func TestEnsureRebuildsWhatWasDeleted(t *testing.T) {
	b := newCounting(nil)
	w := newWorld(t, b)
	ctx := context.Background()
	img, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(w.layout.Image(img.ID).Path()); err != nil {
		t.Fatal(err)
	}
	again, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
	if err != nil || again.ID == img.ID || b.builds.Load() != 2 {
		t.Errorf("got %+v, %v, %d builds", again, err, b.builds.Load())
	}
}

// A newer banger has other recipes: Ensure takes what is here, Pull makes it anew.
func TestOldRecipe(t *testing.T) {
	b := newCounting(nil)
	w := newWorld(t, b)
	ctx := context.Background()
	img, err := w.Ensure(ctx, imagemgr.DebianBookworm, quiet{})
	if err != nil {
		t.Fatal(err)
	}
	img.ID, img.Recipe, img.CreatedAt = newID(), "of old", time.Now()
	if err := os.Mkdir(w.layout.Image(img.ID).Path(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(w.layout.Image(img.ID).Rootfs(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := w.store.ReplaceImage(ctx, img); err != nil {
		t.Fatal(err)
	}
	if got, err := w.Ensure(ctx, img.Name, quiet{}); err != nil || got.ID != img.ID {
		t.Errorf("Ensure: %+v, %v", got, err)
	}
	if got, err := w.Pull(ctx, img.Name, false, quiet{}); err != nil || got.ID == img.ID || got.Recipe == "of old" {
		t.Errorf("Pull: %+v, %v", got, err)
	}
}

func TestListNamesWhatCanBePulled(t *testing.T) {
	w := newWorld(t, &imagetest.Builder{})
	ctx := context.Background()
	images, err := w.List(ctx)
	if err != nil || len(images) != 1 || !images[0].Available || images[0].Name != imagemgr.DebianBookworm || images[0].Source == "" {
		t.Errorf("images %+v, %v", images, err)
	}
	kernels, err := w.ListKernels(ctx)
	if err != nil || len(kernels) != 1 || !kernels[0].Available || kernels[0].Name != imagemgr.DebianCloud {
		t.Errorf("kernels %+v, %v", kernels, err)
	}
	if _, err := w.EnsureKernel(ctx, imagemgr.DebianCloud, quiet{}); err != nil {
		t.Fatal(err)
	}
	if kernels, err = w.ListKernels(ctx); err != nil || len(kernels) != 1 || kernels[0].Available || kernels[0].Version == "" {
		t.Errorf("kernels %+v, %v", kernels, err)
	}
}

func TestCloseEndsPulls(t *testing.T) {
	started := make(chan struct{})
	b := newCounting(func(ctx context.Context, dir string) error {
		close(started)
		<-ctx.Done()
		return context.Cause(ctx)
	})
	w := newWorld(t, b)
	result := make(chan error, 1)
	go func() { _, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, quiet{}); result <- err }()
	<-started
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if left := entries(t, w.layout.Cache()); len(left) > 0 {
		t.Errorf("left in the cache: %q", left)
	}
	if err := <-result; api.CodeOf(err) != api.Cancelled {
		t.Errorf("got %v", err)
	}
	if _, err := w.Ensure(context.Background(), imagemgr.DebianBookworm, quiet{}); api.CodeOf(err) != api.Cancelled {
		t.Errorf("after Close: %v", err)
	}
}

// The order of locks: nobody may hold one when a pull begins.
func TestPullUnderALockPanics(t *testing.T) {
	w := newWorld(t, &imagetest.Builder{})
	defer func() {
		if recover() == nil {
			t.Error("it went on")
		}
	}()
	mu := locks.NewMutex(w.checker, locks.RankVM, "vm")
	mu.Lock()
	defer mu.Unlock()
	w.Ensure(context.Background(), imagemgr.DebianBookworm, quiet{})
}

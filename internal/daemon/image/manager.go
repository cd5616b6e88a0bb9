// Package image is the registry of images and kernels: what is here, what can be
// pulled, and the one place where either appears or goes. How they are made is
// package imagemgr's business, behind Builder.
//
// A pull builds in a directory of the cache, holding no lock, and then publishes:
// first the files, by one rename, then the row. Callers who want the same thing
// share one pull; a caller who gives up leaves it to the others, and the last one
// ends it. imageOpsMu is held for the publication only.
//
// Files come before rows and go after them, so that a row always has its files. A
// directory without a row is what a crash in between leaves, or the loss of the
// database: Recover makes the row from the JSON file inside. What was half built
// lies in the cache and is swept.
//
// An image is never changed or replaced in place, because disks of VMs refer to
// its file: a new one gets a new id and takes over the name, and the old one stays,
// without a name, until no VM uses it. A kernel is replaced in place: a running VM
// holds links to the files that it booted with.
package image

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"sync"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/initrd"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
)

// Builder makes images and kernels. Each method works in dir, an empty directory,
// and leaves in it the files that the constants of package imagemgr name; after an
// error the manager calls Remove.
type Builder interface {
	BuildImage(ctx context.Context, r imagemgr.ImageRecipe, dir string, p opstate.Progress) (imagemgr.ImageInfo, error)
	BuildKernel(ctx context.Context, r imagemgr.KernelRecipe, dir string, p opstate.Progress) (imagemgr.KernelInfo, error)
	// Remove removes the directory of a build, whatever has become of it, and what
	// the build put elsewhere. Absent is success.
	Remove(ctx context.Context, dir string) error
}

// Options are what a Manager needs.
type Options struct {
	Layout  config.Layout
	Store   *store.Store
	Checker *locks.Checker // nil outside of tests
	Logger  *slog.Logger
	Builder Builder // nil: the real one
}

// Manager is the registry of one instance.
type Manager struct {
	layout  config.Layout
	store   *store.Store
	checker *locks.Checker
	log     *slog.Logger
	builder Builder
	hook    func(point string) // where tests stop a publication; nil outside of tests

	opsMu *locks.Mutex // imageOpsMu: the publication of a change of the registry

	ctx    context.Context // of all pulls; ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup

	mu      sync.Mutex // a leaf; guards what follows
	flights map[string]*flight
	closed  bool
}

// New makes a Manager. Recover must be called before any other method.
func New(o Options) *Manager {
	m := &Manager{
		layout: o.Layout, store: o.Store, checker: o.Checker, log: o.Logger, builder: o.Builder,
		opsMu:   locks.NewMutex(o.Checker, locks.RankImageOps, "imageOpsMu"),
		flights: make(map[string]*flight),
	}
	if m.builder == nil {
		m.builder = imagemgr.NewBuilder(initrd.BootModules)
	}
	m.ctx, m.cancel = context.WithCancelCause(context.Background())
	return m
}

// Close ends all pulls and waits until what they had begun is gone.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	m.cancel(errClosed)
	m.work.Wait()
	return nil
}

var errClosed = &api.Error{Code: api.Cancelled, Message: "the daemon is shutting down"}

// Ensure returns the image with a name, and pulls it when it is not here. An image
// that is here is good enough, even if this release would make it otherwise.
func (m *Manager) Ensure(ctx context.Context, name string, p opstate.Progress) (store.Image, error) {
	img, here, err := m.imageHere(ctx, name)
	if err != nil || here {
		return img, err
	}
	return m.Pull(ctx, name, false, p)
}

// WithKernel calls fn while no pull replaces the kernel: its row and its files belong
// together. fn must be short.
func (m *Manager) WithKernel(ctx context.Context, name string, fn func(store.Kernel) error) error {
	m.opsMu.Lock()
	defer m.opsMu.Unlock()
	kernel, err := m.store.Kernel(ctx, name)
	if err != nil {
		return err
	}
	return fn(kernel)
}

// EnsureKernel is Ensure for kernels.
func (m *Manager) EnsureKernel(ctx context.Context, name string, p opstate.Progress) (store.Kernel, error) {
	if name == "" {
		return store.Kernel{}, api.Errorf(api.Refused, "the image has no kernel").WithHint("banger kernel ls")
	}
	k, here, err := m.kernelHere(ctx, name)
	if err != nil || here {
		return k, err
	}
	return m.PullKernel(ctx, name, false, p)
}

// Pull makes an image of the catalogue, unless the one that is here was made by the
// same recipe and force is false. VMs made from an older one keep it.
func (m *Manager) Pull(ctx context.Context, name string, force bool, p opstate.Progress) (store.Image, error) {
	r, ok := imageRecipe(name)
	if !ok {
		return store.Image{}, api.Errorf(api.NotFound, "there is no image named %s", name).WithHint("banger image ls")
	}
	current := func(ctx context.Context) (bool, error) {
		img, here, err := m.imageHere(ctx, name)
		return here && img.Recipe == r.Hash() && !force, err
	}
	if ok, err := current(ctx); err == nil && !ok {
		err = m.share(ctx, "image "+name, p, func(ctx context.Context, p opstate.Progress) error {
			// A pull that ended since then may have made it.
			if ok, err := current(ctx); err != nil || ok {
				return err
			}
			return m.buildImage(ctx, r, p)
		})
		if err != nil {
			return store.Image{}, err
		}
	} else if err != nil {
		return store.Image{}, err
	}
	return m.store.ImageByName(ctx, name)
}

// PullKernel is Pull for kernels. VMs that use the kernel boot the new one at their
// next start.
func (m *Manager) PullKernel(ctx context.Context, name string, force bool, p opstate.Progress) (store.Kernel, error) {
	r, ok := kernelRecipe(name)
	if !ok {
		return store.Kernel{}, api.Errorf(api.NotFound, "there is no kernel named %s", name).WithHint("banger kernel ls")
	}
	current := func(ctx context.Context) (bool, error) {
		k, here, err := m.kernelHere(ctx, name)
		return here && k.Recipe == r.Hash() && !force, err
	}
	if ok, err := current(ctx); err == nil && !ok {
		err = m.share(ctx, "kernel "+name, p, func(ctx context.Context, p opstate.Progress) error {
			if ok, err := current(ctx); err != nil || ok {
				return err
			}
			return m.buildKernel(ctx, r, p)
		})
		if err != nil {
			return store.Kernel{}, err
		}
	} else if err != nil {
		return store.Kernel{}, err
	}
	return m.store.Kernel(ctx, name)
}

// imageHere tells whether the image with a name is here, files and row.
func (m *Manager) imageHere(ctx context.Context, name string) (store.Image, bool, error) {
	img, err := m.store.ImageByName(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return img, false, nil
	}
	if err != nil {
		return img, false, err
	}
	ok, err := exists(m.layout.Image(img.ID).Rootfs())
	return img, ok, err
}

func (m *Manager) kernelHere(ctx context.Context, name string) (store.Kernel, bool, error) {
	k, err := m.store.Kernel(ctx, name)
	if errors.Is(err, store.ErrNotFound) {
		return k, false, nil
	}
	if err != nil {
		return k, false, err
	}
	ok, err := exists(m.layout.Kernel(name).Vmlinux())
	return k, ok, err
}

// exists tells whether a file is there; that it cannot be told is an error, so that
// a permission problem is not taken for a reason to build anew.
func exists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Listed says what List knows of an image or kernel beyond its row.
type Listed struct {
	InUse     int  // VMs made from it
	Available bool // it can be pulled and is not here
}

// ListedImage is one line of List. Of one that is not here, only Name, Kernel,
// Source, Managed and OwnUser are set.
type ListedImage struct {
	store.Image
	Listed
}

// ListedKernel is one line of ListKernels. Of one that is not here, only Name and
// Source are set.
type ListedKernel struct {
	store.Kernel
	Listed
}

// List returns all images, and those of the catalogue that are not here last. An
// image without a name was replaced and is still in use.
func (m *Manager) List(ctx context.Context) ([]ListedImage, error) {
	rows, err := m.store.Images(ctx)
	if err != nil {
		return nil, err
	}
	uses, err := m.store.ImageUses(ctx)
	if err != nil {
		return nil, err
	}
	var list []ListedImage
	here := make(map[string]bool)
	for _, img := range rows {
		here[img.Name] = true
		list = append(list, ListedImage{img, Listed{InUse: uses[img.ID]}})
	}
	for _, r := range imagemgr.Images() {
		if !here[r.Name] {
			img := store.Image{Name: r.Name, Kernel: r.Kernel, Source: r.Title, Managed: true, OwnUser: true}
			list = append(list, ListedImage{img, Listed{Available: true}})
		}
	}
	return list, nil
}

// ListKernels is List for kernels.
func (m *Manager) ListKernels(ctx context.Context) ([]ListedKernel, error) {
	rows, err := m.store.Kernels(ctx)
	if err != nil {
		return nil, err
	}
	uses, err := m.store.KernelUses(ctx)
	if err != nil {
		return nil, err
	}
	var list []ListedKernel
	here := make(map[string]bool)
	for _, k := range rows {
		here[k.Name] = true
		list = append(list, ListedKernel{k, Listed{InUse: uses[k.Name]}})
	}
	for _, r := range imagemgr.Kernels() {
		if !here[r.Name] {
			list = append(list, ListedKernel{store.Kernel{Name: r.Name, Source: r.Title}, Listed{Available: true}})
		}
	}
	return list, nil
}

func imageRecipe(name string) (imagemgr.ImageRecipe, bool) {
	for _, r := range imagemgr.Images() {
		if r.Name == name {
			return r, true
		}
	}
	return imagemgr.ImageRecipe{}, false
}

func kernelRecipe(name string) (imagemgr.KernelRecipe, bool) {
	for _, r := range imagemgr.Kernels() {
		if r.Name == name {
			return r, true
		}
	}
	return imagemgr.KernelRecipe{}, false
}

// newID makes an id of 12 lower-case hex digits.
func newID() string {
	b := make([]byte, 6)
	rand.Read(b) // never fails, see crypto/rand
	return hex.EncodeToString(b)
}

package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/daemon/hostcmd"
	"banger/internal/daemon/imagemgr"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
)

// stagingPrefix begins the names of the directories in the cache that are ours.
const stagingPrefix = "build-"

// cleanTimeout bounds the removal of what a pull had begun.
const cleanTimeout = 45 * time.Second

// imageMeta is image.json. Later releases read it: fields are only ever added.
type imageMeta struct {
	Version   int       `json:"version"` // 1
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Kernel    string    `json:"kernel"`
	Size      int64     `json:"size"` // bytes
	Source    string    `json:"source"`
	Recipe    string    `json:"recipe"`
	OwnUser   bool      `json:"own_user"`
	CreatedAt time.Time `json:"created_at"`
	Packages  []string  `json:"packages,omitempty"`
}

func (j imageMeta) row() store.Image {
	return store.Image{
		ID: j.ID, Name: j.Name, Kernel: j.Kernel, Size: j.Size, Managed: true,
		Source: j.Source, Recipe: j.Recipe, OwnUser: j.OwnUser, CreatedAt: j.CreatedAt,
	}
}

// kernelMeta is kernel.json. Later releases read it: fields are only ever added.
type kernelMeta struct {
	Version   int       `json:"version"` // 1
	Name      string    `json:"name"`
	Release   string    `json:"release"`
	Source    string    `json:"source"`
	Recipe    string    `json:"recipe"`
	Size      int64     `json:"size"` // bytes
	Modules   []string  `json:"modules"`
	CreatedAt time.Time `json:"created_at"`
}

func (j kernelMeta) row() store.Kernel {
	return store.Kernel{
		Name: j.Name, Version: j.Release, Source: j.Source, Recipe: j.Recipe,
		Size: j.Size, Modules: j.Modules, CreatedAt: j.CreatedAt,
	}
}

// buildImage builds and publishes an image. After an error nothing of it is left.
func (m *Manager) buildImage(ctx context.Context, r imagemgr.ImageRecipe, p opstate.Progress) error {
	dir, err := os.MkdirTemp(m.layout.Cache(), stagingPrefix)
	if err == nil {
		var info imagemgr.ImageInfo
		if info, err = m.builder.BuildImage(ctx, r, dir, p); err == nil {
			err = m.publishImage(ctx, r, info, dir)
		}
		m.discard(dir)
	}
	return m.explain(ctx, "image", r.Name, err)
}

func (m *Manager) publishImage(ctx context.Context, r imagemgr.ImageRecipe, info imagemgr.ImageInfo, dir string) error {
	meta := imageMeta{
		Version: 1, ID: newID(), Name: r.Name, Kernel: r.Kernel, Size: info.Size, Source: r.Title,
		Recipe: r.Hash(), OwnUser: true, CreatedAt: time.Now().UTC(), Packages: info.Packages,
	}
	to := m.layout.Image(meta.ID)
	if err := writeMeta(filepath.Join(dir, filepath.Base(to.Meta())), meta); err != nil {
		return err
	}
	m.at("image built")
	return m.replaceImage(ctx, meta, dir)
}

// replaceImage is the publication: the files by a rename, then the row. One that had the
// name stays until Prune.
func (m *Manager) replaceImage(ctx context.Context, meta imageMeta, dir string) error {
	m.opsMu.Lock()
	defer m.opsMu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// From here on it is done whoever leaves: an end of ctx in the middle of a commit
	// would leave open whether there is a row.
	ctx = context.WithoutCancel(ctx)
	to := m.layout.Image(meta.ID).Path()
	if err := moveDir(dir, to); err != nil {
		return err
	}
	m.at("image moved")
	if err := m.store.ReplaceImage(ctx, meta.row()); err != nil {
		if _, e := m.store.Image(ctx, meta.ID); errors.Is(e, store.ErrNotFound) {
			err = errors.Join(err, os.Rename(to, dir)) // back to where it is discarded
		}
		return err
	}
	m.at("image recorded")
	return nil
}

// buildKernel builds and publishes a kernel. After an error nothing of it is left.
func (m *Manager) buildKernel(ctx context.Context, r imagemgr.KernelRecipe, p opstate.Progress) error {
	dir, err := os.MkdirTemp(m.layout.Cache(), stagingPrefix)
	if err == nil {
		var info imagemgr.KernelInfo
		if info, err = m.builder.BuildKernel(ctx, r, dir, p); err == nil {
			err = m.publishKernel(ctx, r, info, dir)
		}
		m.discard(dir)
	}
	return m.explain(ctx, "kernel", r.Name, err)
}

// publishKernel puts the kernel in the place of the one that has the name; dir then
// holds the old one.
func (m *Manager) publishKernel(ctx context.Context, r imagemgr.KernelRecipe, info imagemgr.KernelInfo, dir string) error {
	meta := kernelMeta{
		Version: 1, Name: r.Name, Release: info.Version, Source: info.Package, Recipe: r.Hash(),
		Size: info.Size, Modules: info.Modules, CreatedAt: time.Now().UTC(),
	}
	to := m.layout.Kernel(r.Name)
	if err := writeMeta(filepath.Join(dir, filepath.Base(to.Meta())), meta); err != nil {
		return err
	}
	m.at("kernel built")
	m.opsMu.Lock()
	defer m.opsMu.Unlock()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	ctx = context.WithoutCancel(ctx)
	if err := exchangeDir(dir, to.Path()); err != nil {
		return err
	}
	m.at("kernel moved")
	if err := m.store.ReplaceKernel(ctx, meta.row()); err != nil {
		// Back again: the row still describes the old one, or there is none.
		if _, e := os.Lstat(dir); e == nil {
			return errors.Join(err, exchangeDir(dir, to.Path()))
		}
		return errors.Join(err, os.Rename(to.Path(), dir))
	}
	m.at("kernel recorded")
	return nil
}

// moveDir moves a directory to a path where nothing is, for good.
func moveDir(from, to string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		if !noRenameFlags(err) {
			return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
		}
		if err := os.Rename(from, to); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(to))
}

// exchangeDir puts the directory from in the place of to, and what was there in the
// place of from. Whoever looks sees one of them; only on a file system that cannot
// exchange there is a moment without.
func exchangeDir(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return moveDir(from, to)
	case noRenameFlags(err):
		old := from + ".old"
		if err := os.Rename(to, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Rename(from, to); err != nil {
			return err
		}
		if err := os.Rename(old, from); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	case err != nil:
		return &os.LinkError{Op: "exchange", Old: from, New: to, Err: err}
	}
	return syncDir(filepath.Dir(to))
}

// noRenameFlags: the file system knows only plain renames, see rename(2).
func noRenameFlags(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func writeMeta(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	return err
}

// discard removes a directory of the cache. What cannot be removed now is swept by
// the next Recover.
func (m *Manager) discard(dir string) {
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	if err := m.builder.Remove(ctx, dir); err != nil {
		m.log.Error("cannot remove what a pull left behind", "dir", dir, "err", err)
	}
}

// removeFiles removes the directory of an image whose row is gone. It moves to the
// cache first, so that no image is ever there in part.
func (m *Manager) removeFiles(path string) {
	dir := filepath.Join(m.layout.Cache(), stagingPrefix+newID())
	if err := os.Rename(path, dir); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			m.log.Error("cannot remove an image's files", "dir", path, "err", err)
		}
		return
	}
	m.discard(dir)
}

// Prune deletes images that were replaced and that no VM uses any more. Call it
// when all VMs have their rows: after vm.Manager.Recover, a pull, and when a VM is deleted.
func (m *Manager) Prune(ctx context.Context) error {
	removed, err := m.pruneRows(ctx)
	for _, id := range removed {
		m.removeFiles(m.layout.Image(id).Path())
	}
	return err
}

func (m *Manager) pruneRows(ctx context.Context) (removed []string, err error) {
	rows, err := m.store.Images(ctx)
	if err != nil {
		return nil, err
	}
	m.opsMu.Lock()
	defer m.opsMu.Unlock()
	for _, img := range rows {
		if img.Name != "" || !img.Managed {
			continue
		}
		switch err := m.store.DeleteImage(ctx, img.ID); {
		case errors.Is(err, store.ErrInUse):
		case err != nil:
			return removed, fmt.Errorf("cannot remove an image: %w", err)
		default:
			removed = append(removed, img.ID)
		}
	}
	return removed, nil
}

func (m *Manager) at(point string) {
	if m.hook != nil {
		m.hook(point)
	}
}

// explain gives the failure of a pull its code and its hint.
func (m *Manager) explain(ctx context.Context, kind, name string, err error) error {
	if err == nil {
		return nil
	}
	fail := func(code api.Code, hint string) error {
		return &api.Error{Code: code, Message: fmt.Sprintf("cannot pull %s: %v", name, err), Hint: hint, Err: err}
	}
	var missing *imagemgr.MissingError
	var namespace *imagemgr.NamespaceError
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fail(api.NoSpace, "df -h "+m.layout.Root)
	case errors.As(err, &missing):
		return fail(api.NotReady, missing.Remedy())
	case errors.As(err, &namespace):
		return fail(api.NotReady, namespace.Remedy)
	case errors.Is(err, imagemgr.ErrNetwork):
		return fail(api.NotReady, fmt.Sprintf("banger %s pull %s", kind, name))
	case errors.Is(err, imagemgr.ErrSignature):
		return fail(api.NotReady, hostcmd.Install("debian-archive-keyring"))
	case errors.Is(err, errors.ErrUnsupported):
		return fail(api.NotReady, "banger doctor")
	}
	return fmt.Errorf("cannot pull %s: %w", name, err)
}

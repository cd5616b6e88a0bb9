package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"banger/internal/daemon/store"
)

// Recover makes the rows fit the files after the daemon, or the machine, went away
// at any instruction, and sweeps what was half built; the sweeping goes on after it
// has returned. It must run before vm.Manager.Recover: rows of VMs that are rebuilt
// refer to images and kernels.
func (m *Manager) Recover(ctx context.Context) error {
	leftovers, err := m.leftovers()
	if err != nil {
		return fmt.Errorf("cannot sweep the cache: %w", err)
	}
	if err := m.adoptImages(ctx); err != nil {
		return fmt.Errorf("cannot read the images: %w", err)
	}
	if err := m.adoptKernels(ctx); err != nil {
		return fmt.Errorf("cannot read the kernels: %w", err)
	}
	if len(leftovers) > 0 {
		m.work.Add(1)
		go func() {
			defer m.work.Done()
			for _, dir := range leftovers {
				m.log.Info("removing what an interrupted pull left", "dir", dir)
				m.discard(dir)
			}
		}()
	}
	return nil
}

// leftovers are the builds in the cache. Nothing builds yet, so all are dead.
func (m *Manager) leftovers() ([]string, error) {
	entries, err := os.ReadDir(m.layout.Cache())
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), stagingPrefix) {
			dirs = append(dirs, filepath.Join(m.layout.Cache(), e.Name()))
		}
	}
	return dirs, nil
}

// adoptImages makes a row for each image directory that has none. Of two with one
// name the younger has it, as it had before the crash.
func (m *Manager) adoptImages(ctx context.Context) error {
	entries, err := os.ReadDir(m.layout.Images())
	if err != nil {
		return err
	}
	var found []imageMeta
	for _, e := range entries {
		if _, err := m.store.Image(ctx, e.Name()); err == nil {
			continue
		} else if !errors.Is(err, store.ErrNotFound) {
			return err
		}
		meta, err := m.readImage(e.Name())
		if err != nil {
			// Perhaps of a later release, perhaps somebody's own: not ours to delete.
			m.log.Warn("there is something strange among the images", "name", e.Name(), "err", err)
			continue
		}
		found = append(found, meta)
	}
	slices.SortFunc(found, func(a, b imageMeta) int { return b.CreatedAt.Compare(a.CreatedAt) })
	for _, meta := range found {
		if err := m.adoptImage(ctx, meta.row()); err != nil {
			return err
		}
		m.log.Info("adopted an image", "id", meta.ID, "name", meta.Name)
	}
	return nil
}

func (m *Manager) readImage(id string) (imageMeta, error) {
	var meta imageMeta
	dir := m.layout.Image(id)
	if err := readMeta(dir.Meta(), &meta); err != nil {
		return meta, err
	}
	if meta.ID != id {
		return meta, fmt.Errorf("%s describes image %q", dir.Meta(), meta.ID)
	}
	st, err := os.Lstat(dir.Rootfs())
	if err != nil {
		return meta, err
	}
	if !st.Mode().IsRegular() || st.Size() != meta.Size {
		return meta, fmt.Errorf("%s has %d bytes, not %d", dir.Rootfs(), st.Size(), meta.Size)
	}
	return meta, nil
}

// adoptImage makes the row of an image that has none: a crash kept a pull from doing so,
// or the database was lost. The youngest has the name.
func (m *Manager) adoptImage(ctx context.Context, img store.Image) error {
	m.opsMu.Lock()
	defer m.opsMu.Unlock()
	named, err := m.store.ImageByName(ctx, img.Name)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return err
	case named.CreatedAt.Before(img.CreatedAt):
		return m.store.ReplaceImage(ctx, img)
	default:
		img.Name = ""
	}
	return m.store.InsertImage(ctx, img)
}

// adoptKernels makes the row of each kernel say what its directory says: a crash
// between the exchange of directories and the change of the row leaves an old row.
func (m *Manager) adoptKernels(ctx context.Context) error {
	entries, err := os.ReadDir(m.layout.Kernels())
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := m.layout.Kernel(e.Name())
		var meta kernelMeta
		err := readMeta(dir.Meta(), &meta)
		if err == nil && meta.Name != e.Name() {
			err = fmt.Errorf("%s describes kernel %q", dir.Meta(), meta.Name)
		}
		if err != nil {
			m.log.Warn("there is something strange among the kernels", "name", e.Name(), "err", err)
			continue
		}
		row, err := m.store.Kernel(ctx, e.Name())
		if err != nil && !errors.Is(err, store.ErrNotFound) {
			return err
		}
		if err == nil && row.CreatedAt.Equal(meta.CreatedAt) && row.Version == meta.Release {
			continue
		}
		m.opsMu.Lock()
		err = m.store.ReplaceKernel(ctx, meta.row())
		m.opsMu.Unlock()
		if err != nil {
			return err
		}
		m.log.Info("adopted a kernel", "name", meta.Name, "version", meta.Release)
	}
	return nil
}

// maxMeta bounds image.json and kernel.json, in bytes.
const maxMeta = 4 << 20

func readMeta(path string, v any) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() || st.Size() > maxMeta {
		return fmt.Errorf("%s is not what banger writes", path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("cannot read %s: %w", path, err)
	}
	return nil
}

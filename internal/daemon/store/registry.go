package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Image is the record of a root file system. Without a Name it was replaced while
// VMs were made from it.
type Image struct {
	ID      string
	Name    string
	Kernel  string // the name of the kernel to boot it with; it need not be here yet
	Size    int64  // bytes
	Managed bool   // the files are owned by banger
	Source  string // what it was made from, for people
	Recipe  string // hash of what made it
	// OwnUser: it is banger's own image, the caller's user is made in it.
	OwnUser   bool
	CreatedAt time.Time
}

// Kernel is the record of a kernel and its modules.
type Kernel struct {
	Name    string
	Version string // "6.12.48-cloud-amd64"
	Source  string
	Recipe  string
	Size    int64 // bytes
	// Modules are the file names of the modules that the initramfs loads, in order.
	Modules   []string
	CreatedAt time.Time
}

const imageColumns = `id, name, kernel, size, managed, source, recipe, own_user, created_at`

func scanImage(row scanner) (i Image, err error) {
	var created int64
	err = row.Scan(&i.ID, &i.Name, &i.Kernel, &i.Size, &i.Managed, &i.Source, &i.Recipe, &i.OwnUser, &created)
	i.CreatedAt = toTime(created)
	return i, err
}

func insertImage(ctx context.Context, tx *sql.Tx, i Image) error {
	_, err := tx.ExecContext(ctx, `INSERT INTO images (`+imageColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		i.ID, i.Name, i.Kernel, i.Size, i.Managed, i.Source, i.Recipe, i.OwnUser, fromTime(i.CreatedAt))
	return err
}

// InsertImage adds an image; an *ExistsError says whether id or name is taken.
func (s *Store) InsertImage(ctx context.Context, i Image) error {
	return s.write(ctx, grows, func(tx *sql.Tx) error { return insertImage(ctx, tx, i) })
}

// ReplaceImage adds an image, whose id must be new, under a name that may be taken:
// the image that had the name loses it.
func (s *Store) ReplaceImage(ctx context.Context, i Image) error {
	return s.write(ctx, grows, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `UPDATE images SET name = '' WHERE name = ?`, i.Name); err != nil {
			return err
		}
		return insertImage(ctx, tx, i)
	})
}

// Image returns the image with an id, or ErrNotFound.
func (s *Store) Image(ctx context.Context, id string) (Image, error) {
	i, err := one(ctx, s.reader, "image "+id, scanImage, `SELECT `+imageColumns+` FROM images WHERE id = ?`, id)
	return i, s.wrap(err)
}

// ImageByName returns the image with a name, or ErrNotFound.
func (s *Store) ImageByName(ctx context.Context, name string) (Image, error) {
	i, err := one(ctx, s.reader, "image "+name, scanImage, `SELECT `+imageColumns+` FROM images WHERE name = ? AND name <> ''`, name)
	return i, s.wrap(err)
}

// Images returns all images by name, those without a name first.
func (s *Store) Images(ctx context.Context) ([]Image, error) {
	list, err := all(ctx, s.reader, scanImage, `SELECT `+imageColumns+` FROM images ORDER BY name, created_at, id`)
	return list, s.wrap(err)
}

// DeleteImage removes an image, or returns ErrInUse; no such image is success.
func (s *Store) DeleteImage(ctx context.Context, id string) error {
	err := s.write(ctx, frees, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM images WHERE id = ?`, id)
		return err
	})
	if isForeignKey(err) {
		return fmt.Errorf("image %s: %w", id, ErrInUse)
	}
	return err
}

// ImageUses counts the VMs of each image that has any, by its id.
func (s *Store) ImageUses(ctx context.Context) (map[string]int, error) {
	return s.counts(ctx, `SELECT image, count(*) FROM vms GROUP BY image`)
}

const kernelColumns = `name, version, source, recipe, size, modules, created_at`

func scanKernel(row scanner) (k Kernel, err error) {
	var created int64
	var modules string
	if err := row.Scan(&k.Name, &k.Version, &k.Source, &k.Recipe, &k.Size, &modules, &created); err != nil {
		return k, err
	}
	k.CreatedAt = toTime(created)
	if err := json.Unmarshal([]byte(modules), &k.Modules); err != nil {
		return k, fmt.Errorf("kernel %s: modules: %w", k.Name, err)
	}
	if len(k.Modules) == 0 {
		k.Modules = nil
	}
	return k, nil
}

// ReplaceKernel adds a kernel, or overwrites the one with its name: the VMs that
// use it boot the new one at their next start.
func (s *Store) ReplaceKernel(ctx context.Context, k Kernel) error {
	if k.Modules == nil {
		k.Modules = []string{}
	}
	modules, err := json.Marshal(k.Modules)
	if err != nil {
		return err
	}
	return s.write(ctx, grows, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO kernels (`+kernelColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (name) DO UPDATE SET version = excluded.version, source = excluded.source,
			recipe = excluded.recipe, size = excluded.size, modules = excluded.modules, created_at = excluded.created_at`,
			k.Name, k.Version, k.Source, k.Recipe, k.Size, string(modules), fromTime(k.CreatedAt))
		return err
	})
}

// Kernel returns the kernel with a name, or ErrNotFound.
func (s *Store) Kernel(ctx context.Context, name string) (Kernel, error) {
	k, err := one(ctx, s.reader, "kernel "+name, scanKernel, `SELECT `+kernelColumns+` FROM kernels WHERE name = ?`, name)
	return k, s.wrap(err)
}

// Kernels returns all kernels by name.
func (s *Store) Kernels(ctx context.Context) ([]Kernel, error) {
	list, err := all(ctx, s.reader, scanKernel, `SELECT `+kernelColumns+` FROM kernels ORDER BY name`)
	return list, s.wrap(err)
}

// KernelUses counts the VMs of each kernel that has any, by its name.
func (s *Store) KernelUses(ctx context.Context) (map[string]int, error) {
	return s.counts(ctx, `SELECT kernel, count(*) FROM vms GROUP BY kernel`)
}

// Workspace is a repository of the host placed into a VM. A VM has at most one.
type Workspace struct {
	VMID       string
	HostPath   string // the real path of the repository's top folder
	GuestPath  string
	Head       string // the commit at which it was taken, empty without commits
	BaseTree   string // the tree as it came in, what changes are counted from
	PreparedAt time.Time
	Changes    int // files changed inside, as last seen at ChangesAt
	ChangesAt  time.Time
}

const workspaceColumns = `vm, host_path, guest_path, head, base_tree, prepared_at, changes, changes_at`

func scanWorkspace(row scanner) (w Workspace, err error) {
	var prepared, changes int64
	err = row.Scan(&w.VMID, &w.HostPath, &w.GuestPath, &w.Head, &w.BaseTree, &prepared, &w.Changes, &changes)
	w.PreparedAt, w.ChangesAt = toTime(prepared), toTime(changes)
	return w, err
}

// PutWorkspace sets the workspace of a VM, or returns ErrNotFound without the VM.
func (s *Store) PutWorkspace(ctx context.Context, w Workspace) error {
	err := s.write(ctx, grows, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO workspaces (`+workspaceColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
			w.VMID, w.HostPath, w.GuestPath, w.Head, w.BaseTree, fromTime(w.PreparedAt), w.Changes, fromTime(w.ChangesAt))
		return err
	})
	if isForeignKey(err) {
		return fmt.Errorf("VM %s: %w", w.VMID, ErrNotFound)
	}
	return err
}

// Workspace returns the workspace of a VM, or ErrNotFound.
func (s *Store) Workspace(ctx context.Context, vmID string) (Workspace, error) {
	w, err := one(ctx, s.reader, "workspace of VM "+vmID, scanWorkspace, `SELECT `+workspaceColumns+` FROM workspaces WHERE vm = ?`, vmID)
	return w, s.wrap(err)
}

// Workspaces returns all workspaces by the id of their VM.
func (s *Store) Workspaces(ctx context.Context) (map[string]Workspace, error) {
	list, err := all(ctx, s.reader, scanWorkspace, `SELECT `+workspaceColumns+` FROM workspaces`)
	if err != nil {
		return nil, s.wrap(err)
	}
	m := make(map[string]Workspace, len(list))
	for _, w := range list {
		m[w.VMID] = w
	}
	return m, nil
}

// SetChanges notes how many files differed from the base, and when that was seen.
// It returns ErrNotFound when the VM holds no workspace.
func (s *Store) SetChanges(ctx context.Context, vmID string, changes int, at time.Time) error {
	return s.write(ctx, grows, func(tx *sql.Tx) error {
		r, err := tx.ExecContext(ctx, `UPDATE workspaces SET changes = ?, changes_at = ? WHERE vm = ?`, changes, fromTime(at), vmID)
		if err != nil {
			return err
		}
		if n, err := r.RowsAffected(); err != nil || n == 0 {
			return errors.Join(err, fmt.Errorf("workspace of VM %s: %w", vmID, ErrNotFound))
		}
		return nil
	})
}

package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"banger/internal/netwire"
)

// State is where a VM is in its life; package vm has the diagram.
type State string

// The states of a VM.
const (
	Creating State = "creating"
	Stopped  State = "stopped"
	Starting State = "starting"
	Running  State = "running"
	Stopping State = "stopping"
	Deleting State = "deleting"
	Failed   State = "failed" // something that it held could not be released
)

// VM is the record of one VM. Its JSON form is record.json, which every later
// release reads: fields are only ever added.
type VM struct {
	ID         string `json:"id"`
	Name       string `json:"name"` // a DNS label
	State      State  `json:"state"`
	Slot       int    `json:"slot"` // from 1; host-wide names derive from it
	ImageID    string `json:"image_id"`
	Kernel     string `json:"kernel"` // the name of a Kernel
	CPUs       int    `json:"cpus"`
	Memory     int64  `json:"memory"` // bytes
	Disk       int64  `json:"disk"`   // bytes, as the guest sees it
	DiskDriver string `json:"disk_driver"`
	MachineID  string `json:"machine_id"` // 32 hex digits
	User       User   `json:"user"`
	Owner      int    `json:"owner"` // the uid that created it
	// RemoveOnRelease: the VM is deleted when its lease ends.
	RemoveOnRelease bool `json:"remove_on_release,omitempty"`
	// Repository is the real path of the repository that the VM is for, or empty.
	Repository string    `json:"repository,omitempty"`
	CreatedAt  time.Time `json:"created_at"`
	LastError  string    `json:"last_error,omitempty"` // of the last start that failed
	Ended      string    `json:"ended,omitempty"`      // how the last run ended, in words
	// Reboot: the guest asked for a reboot that is not carried out yet, and no operation
	// of a user has come between. It stands from the clean-up to running.
	Reboot bool `json:"reboot,omitempty"`
	// Network is changed by SetNetwork alone. NetworkProblem says why it could not be read;
	// then it is "none".
	Network        netwire.Network `json:"network"`
	NetworkProblem string          `json:"-"`
}

// User is the account made in the guest; no Name leaves the image's accounts alone.
type User struct {
	Name string `json:"name"`
	UID  int    `json:"uid"`
	GID  int    `json:"gid"`
}

// Transition writes the first; the network has a life of its own.
const (
	vmStateColumns = `id, name, state, slot, image, kernel, cpus, memory, disk, disk_driver, machine_id,
	user_name, user_uid, user_gid, owner, remove_on_release, repository, created_at, last_error, ended, reboot`
	vmColumns = vmStateColumns + `, network`
)

// vmStatePlaces takes vmStateValues, vmPlaces takes vmValues.
const (
	vmStatePlaces = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	vmPlaces      = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
)

func scanVM(row scanner) (v VM, err error) {
	var created int64
	var network string
	err = row.Scan(&v.ID, &v.Name, &v.State, &v.Slot, &v.ImageID, &v.Kernel, &v.CPUs, &v.Memory, &v.Disk, &v.DiskDriver, &v.MachineID,
		&v.User.Name, &v.User.UID, &v.User.GID, &v.Owner, &v.RemoveOnRelease, &v.Repository, &created, &v.LastError, &v.Ended, &v.Reboot, &network)
	v.CreatedAt = toTime(created)
	v.Network, v.NetworkProblem = decodeNetwork(network)
	return v, err
}

func vmValues(v VM) []any { return append(vmStateValues(v), encodeNetwork(v.Network)) }

func vmStateValues(v VM) []any {
	return []any{v.ID, v.Name, v.State, v.Slot, v.ImageID, v.Kernel, v.CPUs, v.Memory, v.Disk, v.DiskDriver, v.MachineID,
		v.User.Name, v.User.UID, v.User.GID, v.Owner, v.RemoveOnRelease, v.Repository, fromTime(v.CreatedAt), v.LastError, v.Ended, v.Reboot}
}

// InsertVM adds a record. It returns an *ExistsError when the id, name, slot or
// repository is taken, and ErrNotFound when there is no such image or kernel.
func (s *Store) InsertVM(ctx context.Context, v VM) error {
	return s.write(ctx, grows, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO vms (`+vmColumns+`) VALUES `+vmPlaces, vmValues(v)...)
		if isForeignKey(err) {
			return missingReference(ctx, tx, v)
		}
		return err
	})
}

// missingReference says which of the rows that v refers to is not there.
func missingReference(ctx context.Context, tx *sql.Tx, v VM) error {
	var there bool
	if err := tx.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM images WHERE id = ?)`, v.ImageID).Scan(&there); err != nil {
		return err
	}
	if !there {
		return fmt.Errorf("image %q: %w", v.ImageID, ErrNotFound)
	}
	return fmt.Errorf("kernel %q: %w", v.Kernel, ErrNotFound)
}

// VM returns the record of id, or ErrNotFound.
func (s *Store) VM(ctx context.Context, id string) (VM, error) {
	v, err := one(ctx, s.reader, "VM "+id, scanVM, `SELECT `+vmColumns+` FROM vms WHERE id = ?`, id)
	return v, s.wrap(err)
}

// VMs returns all records by name.
func (s *Store) VMs(ctx context.Context) ([]VM, error) {
	list, err := all(ctx, s.reader, scanVM, `SELECT `+vmColumns+` FROM vms ORDER BY name`)
	return list, s.wrap(err)
}

// CountVMs counts the records by state.
func (s *Store) CountVMs(ctx context.Context) (map[State]int, error) {
	counts, err := s.counts(ctx, `SELECT state, count(*) FROM vms GROUP BY state`)
	byState := make(map[State]int, len(counts))
	for state, n := range counts {
		byState[State(state)] = n
	}
	return byState, err
}

// DeleteVM removes the record of id and its workspace; no record is success.
func (s *Store) DeleteVM(ctx context.Context, id string) error {
	return s.write(ctx, frees, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `DELETE FROM vms WHERE id = ?`, id)
		return err
	})
}

// FreeSlot returns the lowest slot that no VM has, from 1. It reserves nothing:
// InsertVM does.
func (s *Store) FreeSlot(ctx context.Context) (int, error) {
	var slot int
	err := s.reader.QueryRowContext(ctx, `SELECT min(n) FROM (
			SELECT 1 AS n UNION ALL SELECT slot + 1 FROM vms
		) WHERE n NOT IN (SELECT slot FROM vms)`).Scan(&slot)
	return slot, s.wrap(err)
}

// Transition puts a VM that is in one of the states from into the state to, and
// returns the new record, which is on disk then. from must name to as well where
// that is no conflict. In the same transaction set, which may be nil, changes other
// fields: not ID, State, CreatedAt and Network. It must neither block nor call the store,
// and may be called twice, each time with the record as it was.
//
// It returns a *ConflictError, with the record as it is, when the state is another,
// ErrNotFound, or an *ExistsError for what set took.
func (s *Store) Transition(ctx context.Context, id string, from []State, to State, set func(*VM)) (VM, error) {
	var v VM
	u := grows
	switch to {
	case Stopping, Stopped, Deleting, Failed:
		u = frees
	}
	err := s.write(ctx, u, func(tx *sql.Tx) error {
		was, err := one(ctx, tx, "VM "+id, scanVM, `SELECT `+vmColumns+` FROM vms WHERE id = ?`, id)
		if err != nil {
			return err
		}
		v = was
		if !slices.Contains(from, was.State) {
			return &ConflictError{State: was.State}
		}
		if set != nil {
			set(&v)
		}
		v.ID, v.CreatedAt, v.State = was.ID, was.CreatedAt, to
		v.Network, v.NetworkProblem = was.Network, was.NetworkProblem
		_, err = tx.ExecContext(ctx, `UPDATE vms SET (`+vmStateColumns+`) = `+vmStatePlaces+` WHERE id = ?`, append(vmStateValues(v), id)...)
		if isForeignKey(err) {
			return missingReference(ctx, tx, v)
		}
		return err
	})
	if err != nil && !errors.Is(err, ErrConflict) {
		return VM{}, err
	}
	return v, err
}

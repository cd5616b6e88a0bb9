package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"banger/internal/netwire"
)

// ErrNetworkChanged is a SetNetwork of a network that is another by now.
var ErrNetworkChanged = errors.New("its network was changed meanwhile")

// SetNetwork changes the network of a VM from was to to, and returns the new record, which
// is on disk then. It returns ErrNetworkChanged when the network is not was, and
// ErrNotFound.
func (s *Store) SetNetwork(ctx context.Context, id string, was, to netwire.Network) (VM, error) {
	var v VM
	err := s.write(ctx, grows, func(tx *sql.Tx) (err error) {
		if v, err = one(ctx, tx, "VM "+id, scanVM, `SELECT `+vmColumns+` FROM vms WHERE id = ?`, id); err != nil {
			return err
		}
		if encodeNetwork(v.Network) != encodeNetwork(was) {
			return fmt.Errorf("VM %s: %w", v.Name, ErrNetworkChanged)
		}
		text := encodeNetwork(to)
		v.Network, v.NetworkProblem = decodeNetwork(text)
		_, err = tx.ExecContext(ctx, `UPDATE vms SET network = ? WHERE id = ?`, text, id)
		return err
	})
	if err != nil {
		return VM{}, err
	}
	return v, nil
}

// encodeNetwork cannot fail: a Network is strings.
func encodeNetwork(n netwire.Network) string {
	text, err := json.Marshal(n)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// decodeNetwork takes what cannot be read for the safest network, and says why.
func decodeNetwork(text string) (n netwire.Network, problem string) {
	err := json.Unmarshal([]byte(text), &n)
	if err == nil && n.Preset == "" {
		err = errors.New("it has no preset")
	}
	if err != nil {
		return netwire.Network{Preset: "none"}, fmt.Sprintf("it has no network: its record cannot be understood: %v", err)
	}
	return n, ""
}

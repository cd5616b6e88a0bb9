package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"

	"banger/internal/daemon/driver"
)

const kind = "cgroup"

// Inventory lists the scopes of the instance: those that systemd knows and those of
// which only the group is left.
func (m *Manager) Inventory() driver.Inventory { return inventory{m} }

type inventory struct{ m *Manager }

func (i inventory) Kind() string { return kind }

func (i inventory) List(ctx context.Context) ([]driver.Object, error) {
	entries, err := os.ReadDir(filepath.Join(root, slice))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot list control groups: %w", err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	err = i.m.talk(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		units, err := conn.ListUnitsByPatternsContext(ctx, nil, []string{i.m.unit("*")})
		for _, u := range units {
			names = append(names, u.Name)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list control groups: %w", err)
	}
	return i.m.objects(names), nil
}

// objects picks the names of this instance's scopes, each once.
func (m *Manager) objects(names []string) []driver.Object {
	slices.Sort(names)
	var found []driver.Object
	for _, name := range slices.Compact(names) {
		vm, ok := strings.CutPrefix(name, m.prefix())
		if ok {
			vm, ok = strings.CutSuffix(vm, ".scope")
		}
		if ok && vm != "" {
			found = append(found, driver.Object{Kind: kind, Name: name, VM: vm})
		}
	}
	return found
}

func (i inventory) Remove(ctx context.Context, o driver.Object) error {
	if o.Kind != kind || o.Name != i.m.unit(o.VM) {
		return fmt.Errorf("cannot remove %s %s: it is not this instance's", o.Kind, o.Name)
	}
	return i.m.Remove(ctx, o.VM)
}

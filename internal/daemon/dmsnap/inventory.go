package dmsnap

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"banger/internal/daemon/driver"
)

// Inventories lists what bears the mark of an instance, in the order in which it must
// be removed. root is the instance's state directory.
func Inventories(instance, root string) []driver.Inventory {
	if real, err := filepath.EvalSymlinks(root); err == nil {
		root = real
	}
	return []driver.Inventory{devices{mark(instance)}, loops{mark(instance), root}}
}

// devices is the inventory of device-mapper.
type devices struct{ mark string }

func (i devices) Kind() string { return "dm" }

func (i devices) List(ctx context.Context) ([]driver.Object, error) {
	found, err := listDevices(i.mark)
	if err != nil {
		return nil, err
	}
	// Nodes that a killed dmsetup left: there is no device any more.
	nodes, err := os.ReadDir(dmDir)
	if err != nil && !absent(err) {
		return nil, err
	}
	for _, n := range nodes {
		if strings.HasPrefix(n.Name(), i.mark) {
			found[n.Name()] = ""
		}
	}
	objects := make([]driver.Object, 0, len(found))
	for name := range found {
		objects = append(objects, driver.Object{Kind: i.Kind(), Name: name, VM: strings.TrimPrefix(name, i.mark)})
	}
	slices.SortFunc(objects, func(a, b driver.Object) int { return strings.Compare(a.Name, b.Name) })
	return objects, nil
}

func (i devices) Remove(ctx context.Context, o driver.Object) error {
	if !strings.HasPrefix(o.Name, i.mark) {
		return fmt.Errorf("%s is not of this instance", o.Name)
	}
	return removeDevice(ctx, o.Name)
}

// loops is the inventory of loop devices.
type loops struct{ mark, root string }

func (i loops) Kind() string { return "loop" }

// List lists loop devices of files in the state directory; an image may lie elsewhere,
// and its loop device goes with that of its disk.
func (i loops) List(ctx context.Context) ([]driver.Object, error) {
	found, err := listLoops(i.mark)
	if err != nil {
		return nil, err
	}
	var objects []driver.Object
	for _, l := range found {
		if strings.HasPrefix(l.backing, i.root+"/") {
			objects = append(objects, driver.Object{Kind: i.Kind(), Name: l.device, VM: strings.TrimPrefix(l.name, i.mark)})
		}
	}
	return objects, nil
}

func (i loops) Remove(ctx context.Context, o driver.Object) error {
	l := loop{device: filepath.Base(o.Name), name: i.mark + o.VM}
	return poll(ctx, func() (bool, error) {
		if err := l.free(); err != nil {
			return false, err
		}
		found, err := listLoops(l.name)
		return !slices.ContainsFunc(found, func(f loop) bool { return f.device == l.device && f.name == l.name }), err
	}, "the loop device "+o.Name+" is")
}

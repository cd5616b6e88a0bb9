// Package cgroup puts each VM of an instance into control groups of its own, which end
// neither with the daemon nor with its unit: a scope of systemd, delegated, which
// belongs to no unit but its slice.
//
//	/sys/fs/cgroup/system.slice/banger-INSTANCE-VM.scope    systemd's: made and removed by it
//	                            ├── shim                    no limits: who supervises must not starve
//	                            └── vmm                     the limits; shim.Config.Group
//
// A group with controllers for its children holds no process itself, hence the two
// leaves. When the last process has ended, systemd removes the scope and all below by
// itself, at once: what is to be known of the groups must be read before, by the shim.
// What systemd has lost of its scopes is found by its name, and removed like the rest.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
)

const (
	root  = "/sys/fs/cgroup"
	slice = "system.slice"
	// The leaves of a scope.
	shimLeaf = "shim"
	vmmLeaf  = "vmm"
)

// controllers are those that the limits need.
func controllers() []string { return []string{"cpu", "memory", "pids"} }

// Manager makes the groups of one instance. It is a driver.Groups, and has no state but
// a connection to systemd.
type Manager struct {
	instance string

	mu   sync.Mutex
	conn *dbus.Conn // nil before the first use
	end  context.CancelFunc
}

// New makes a Manager for the instance of that id.
func New(instance string) *Manager { return &Manager{instance: instance} }

func (m *Manager) prefix() string { return "banger-" + m.instance + "-" }

func (m *Manager) unit(vm string) string { return m.prefix() + vm + ".scope" }

func (m *Manager) scope(vm string) string { return filepath.Join(root, slice, m.unit(vm)) }

// Group is the path of the VMM's leaf.
func (m *Manager) Group(vm string) string { return filepath.Join(m.scope(vm), vmmLeaf) }

// Probe asks whether VMs can have groups here. The error says what is missing.
func (m *Manager) Probe(ctx context.Context) error {
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return fmt.Errorf("cannot use control groups: %w", err)
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return fmt.Errorf("cannot use control groups: %s is not a cgroup2 file system; boot with systemd.unified_cgroup_hierarchy=1", root)
	}
	data, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return fmt.Errorf("cannot use control groups: %w", err)
	}
	for _, want := range controllers() {
		if !strings.Contains(" "+strings.TrimSpace(string(data))+" ", " "+want+" ") {
			return fmt.Errorf("cannot use control groups: the kernel has no controller %q here, only %q", want, strings.TrimSpace(string(data)))
		}
	}
	if err := m.probeSystemd(ctx); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(root, slice, "cgroup.kill")); err != nil {
		return fmt.Errorf("cannot use control groups: the kernel is older than 5.14: %w", err)
	}
	return nil
}

// Place makes the groups of vm around pid, which must have started nothing yet and
// afterwards is in the leaf of the shim. After an error or a crash Remove undoes it.
func (m *Manager) Place(ctx context.Context, vm string, pid int, l driver.Limits) error {
	err := m.startScope(ctx, vm, pid)
	if err == nil {
		err = m.furnish(vm, pid, l)
	}
	if err != nil {
		return fmt.Errorf("cannot place the VM in a control group: %w", err)
	}
	return nil
}

// furnish makes the leaves. The order is the kernel's: a group gets controllers for its
// children when no process is in it, and the children get the files of the limits then.
func (m *Manager) furnish(vm string, pid int, l driver.Limits) error {
	scope := m.scope(vm)
	for _, leaf := range []string{shimLeaf, vmmLeaf} {
		if err := os.Mkdir(filepath.Join(scope, leaf), 0o755); err != nil {
			return err
		}
	}
	settings := []setting{
		{file: shimLeaf + "/cgroup.procs", value: strconv.Itoa(pid)},
		{file: "cgroup.subtree_control", value: "+" + strings.Join(controllers(), " +")},
	}
	for _, s := range append(settings, limits(l)...) {
		err := os.WriteFile(filepath.Join(scope, s.file), []byte(s.value), 0)
		if s.optional && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot set %s to %s: %w", s.file, s.value, err)
		}
	}
	return nil
}

// setting is a value for a file below the scope.
type setting struct {
	file, value string
	optional    bool // not every kernel has the file
}

const (
	// What a VMM may have beside its guest's memory: its own, the tables that map the
	// guest's, which the kernel counts too, and what the host caches of the disk.
	baseHeadroom    = 256 << 20
	headroomDivisor = 16
	processes       = 256 // threads of the VMM
	cpuPeriod       = 100_000
	ownCPUs         = 1 // of the VMM's own threads, beside those that run the guest
	unlimited       = "max"
)

func limits(l driver.Limits) []setting {
	memory, cpu := unlimited, unlimited
	if l.Memory > 0 {
		memory = strconv.FormatInt(l.Memory+l.Memory/headroomDivisor+baseHeadroom, 10)
	}
	if l.CPUs > 0 {
		cpu = strconv.Itoa((l.CPUs + ownCPUs) * cpuPeriod)
	}
	return []setting{
		{file: vmmLeaf + "/memory.max", value: memory},
		// A VMM that leaks shall end, not fill the swap. Absent in a kernel without swap.
		{file: vmmLeaf + "/memory.swap.max", value: "0", optional: true},
		{file: vmmLeaf + "/memory.oom.group", value: "1"},
		{file: vmmLeaf + "/cpu.max", value: cpu + " " + strconv.Itoa(cpuPeriod)},
		{file: vmmLeaf + "/pids.max", value: strconv.Itoa(processes)},
	}
}

// Remove ends what is in the groups of vm, waits until it has ended, and removes them.
// Absent is success.
func (m *Manager) Remove(ctx context.Context, vm string) error {
	scope := m.scope(vm)
	if err := empty(ctx, scope); err != nil {
		return fmt.Errorf("cannot end what is in %s: %w", m.unit(vm), err)
	}
	err := m.stopScope(ctx, vm)
	if err := errors.Join(err, removeTree(ctx, scope)); err != nil {
		return fmt.Errorf("cannot remove %s: %w", m.unit(vm), err)
	}
	return nil
}

const poll = 5 * time.Millisecond

// empty kills all in the scope until nothing is left.
func empty(ctx context.Context, scope string) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		full, err := populated(scope)
		if err != nil || !full {
			return err
		}
		if err := os.WriteFile(filepath.Join(scope, "cgroup.kill"), []byte("1"), 0); err != nil && !absent(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("its processes do not end: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// populated is false for a group that is not there.
func populated(group string) (bool, error) {
	data, err := os.ReadFile(filepath.Join(group, "cgroup.events"))
	if absent(err) {
		return false, nil
	}
	return strings.Contains(string(data), "populated 1\n"), err
}

// absent also knows what reading a file says whose group went meanwhile.
func absent(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// removeTree removes a group and those below it, which systemd may do at the same time.
func removeTree(ctx context.Context, group string) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		err := removeOnce(group)
		if !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func removeOnce(group string) error {
	entries, err := os.ReadDir(group)
	if err != nil && !absent(err) {
		return err
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := removeOnce(filepath.Join(group, e.Name())); err != nil {
			return err
		}
	}
	if err := unix.Rmdir(group); err != nil && !absent(err) {
		return &os.PathError{Op: "rmdir", Path: group, Err: err}
	}
	return nil
}

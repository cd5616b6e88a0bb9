// Package fake is a host for tests: drivers whose objects are files in a directory
// and whose VMM is a real process (test/fakevmm) under the real shim. It is stateful
// and outlives the daemon that uses it, as a host does; nothing in it is a mock.
//
//	DIR/loop/loopN   an attached disk: holds the id of its VM
//	DIR/dm/NAME      a device on top of it: the same
//	DIR/jail/ID      what the VMM's process finds around it: the same
//	DIR/busy/ID      the devices of this VM cannot be removed
//	DIR/scenario/VM  how a guest behaves, see Scenario
//
// Text prints all that is left on the host, the VMM processes included; it must be
// empty when everything was released. Fault lets a test fail, or stop, every effect
// before or after it has happened.
package fake

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"banger/internal/daemon/driver"
)

// Host is a fake host. Its methods may be called by several goroutines, and several
// Hosts may share a directory.
type Host struct {
	// Fault, unless nil, is called before and after each effect with one of Points and
	// "/before" or "/after". An error is returned as the effect's. It must be set
	// before the host is used.
	Fault func(point string) error
	// Ability is what Probe reports; Unable, unless nil, is its error.
	Ability driver.Ability
	Unable  error

	dir     string
	program string
}

// New opens the host kept in dir, which is made when it is not there. vmmProgram is
// the path of test/fakevmm, built.
func New(dir, vmmProgram string) *Host {
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return &Host{
		dir: dir, program: vmmProgram,
		Ability: driver.Ability{Accelerator: "tcg", Reason: "the fake VMM has no accelerator"},
	}
}

// Points names all effects on the host, in the order of a VM's life.
func Points() []string {
	return []string{
		"disk.create", "disk.attach.loop", "disk.attach.dm", "vmm.confine", "vmm.command", "vmm.boot", "channel.connect",
		"vmm.powerbutton", "vmm.free", "disk.detach.dm", "disk.detach.loop", "disk.remove", "inventory.dm.remove", "inventory.loop.remove",
	}
}

// Drivers returns what a daemon is wired to.
func (h *Host) Drivers() driver.Host {
	return driver.Host{VMM: h.VMM(), Disk: h.Disk(), Inventories: h.Inventories()}
}

// VMM returns the fake VMM.
func (h *Host) VMM() driver.VMM { return vmm{h} }

// Disk returns the fake disks.
func (h *Host) Disk() driver.Disk { return disks{h} }

// Inventories returns one inventory for each kind of object.
func (h *Host) Inventories() []driver.Inventory {
	return []driver.Inventory{inventory{h, "dm"}, inventory{h, "loop"}}
}

// effect does f between two calls of Fault.
func (h *Host) effect(point string, f func() error) error {
	if err := h.fault(point + "/before"); err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	return h.fault(point + "/after")
}

func (h *Host) fault(point string) error {
	if h.Fault == nil {
		return nil
	}
	if err := h.Fault(point); err != nil {
		return fmt.Errorf("%s: %w", point, err)
	}
	return nil
}

// Text is the state of the host, one object a line, sorted; empty when nothing is
// left. Disks are no objects of the host: they are files of the VMs.
func (h *Host) Text() string {
	var lines []string
	for _, kind := range []string{"dm", "jail", "loop"} {
		objects, err := h.objects(kind)
		if err != nil {
			lines = append(lines, fmt.Sprintf("%s: %v", kind, err))
		}
		for _, o := range objects {
			lines = append(lines, fmt.Sprintf("%s %s of %s", o.Kind, o.Name, o.VM))
		}
	}
	for _, id := range h.processes() {
		lines = append(lines, "process of "+id)
	}
	slices.Sort(lines)
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}

// SetBusy makes the removal of a VM's devices fail with EBUSY, or work again.
func (h *Host) SetBusy(vm string, busy bool) error {
	path := filepath.Join(h.dir, "busy", vm)
	if !busy {
		return removeIfThere(path)
	}
	return writeFile(path, "")
}

func (h *Host) busy(vm string) bool {
	_, err := os.Stat(filepath.Join(h.dir, "busy", vm))
	return err == nil
}

// A Scenario is how a fake guest behaves. It is read at each turn, so it may change
// while the guest runs.
type Scenario string

// The scenarios; any other word is a guest that works.
const (
	Die          Scenario = "die"           // the VMM ends at once, with an error on stderr
	Stall        Scenario = "stall"         // the agent never answers, the power button is ignored
	NeverReady   Scenario = "never-ready"   // the agent answers, the system does not get ready
	Degraded     Scenario = "degraded"      // ready, with a failed unit fake.service
	SlowShutdown Scenario = "slow-shutdown" // going down takes SlowShutdownTime
	NoShutdown   Scenario = "no-shutdown"   // going down is promised to who asks, and does not happen
)

// SlowShutdownTime is how long SlowShutdown takes.
const SlowShutdownTime = 2 * time.Second

// SetScenario sets the scenario of the VM with that name; "" is that of all VMs
// without one of their own. The empty scenario is none.
func (h *Host) SetScenario(name string, s Scenario) error {
	path := scenarioPath(h.dir, name)
	if s == "" {
		return removeIfThere(path)
	}
	return writeFile(path, string(s))
}

// ReadScenario is for the fake VMM.
func ReadScenario(dir, name string) Scenario {
	for _, name := range []string{name, ""} {
		if data, err := os.ReadFile(scenarioPath(dir, name)); err == nil {
			return Scenario(strings.TrimSpace(string(data)))
		}
	}
	return ""
}

// scenarioPath puts all VMs into a name that no VM can have.
func scenarioPath(dir, name string) string {
	if name == "" {
		name = "ALL"
	}
	return filepath.Join(dir, "scenario", name)
}

// objects lists the objects of one kind, by name.
func (h *Host) objects(kind string) ([]driver.Object, error) {
	entries, err := os.ReadDir(filepath.Join(h.dir, kind))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var objects []driver.Object
	for _, e := range entries {
		vm, err := os.ReadFile(filepath.Join(h.dir, kind, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		objects = append(objects, driver.Object{Kind: kind, Name: e.Name(), VM: string(vm)})
	}
	return objects, nil
}

// make makes an object. It appears whole, and not when it is there already.
func (h *Host) make(kind, name, vm string) error {
	dir := filepath.Join(h.dir, kind)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	temp, err := os.CreateTemp(h.dir, "new-")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name())
	_, err = temp.WriteString(vm)
	if cerr := temp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Link(temp.Name(), filepath.Join(dir, name))
}

// remove removes an object; one that is not there is no error.
func (h *Host) remove(kind, name, vm string) error {
	path := filepath.Join(h.dir, kind, name)
	if _, err := os.Stat(path); err == nil && h.busy(vm) {
		return fmt.Errorf("cannot remove %s %s: %w", kind, name, errBusy)
	}
	return removeIfThere(path)
}

// processes lists the ids of the VMs whose VMM runs, by the command line. A process
// that was killed and not reaped yet has none.
func (h *Host) processes() []string {
	var ids []string
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		args := strings.Split(string(data), "\x00")
		if len(args) > 4 && slices.Equal(args[:4], []string{h.program, "--host", h.dir, "--id"}) {
			ids = append(ids, args[4])
		}
	}
	return ids
}

type inventory struct {
	h    *Host
	kind string
}

func (i inventory) Kind() string { return i.kind }

func (i inventory) List(context.Context) ([]driver.Object, error) { return i.h.objects(i.kind) }

func (i inventory) Remove(_ context.Context, o driver.Object) error {
	return i.h.effect("inventory."+i.kind+".remove", func() error { return i.h.remove(i.kind, o.Name, o.VM) })
}

func writeFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o600)
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// loopName is the n-th loop device.
func loopName(n int) string { return "loop" + strconv.Itoa(n) }

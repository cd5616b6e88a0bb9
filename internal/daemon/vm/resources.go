package vm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/initrd"
	"banger/internal/daemon/proc"
	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/shim"
)

// The serials by which the guest finds its disks. At most 20 bytes, see the virtio
// specification 1.2, section 5.2.6.
const (
	rootSerial    = "banger-root"
	modulesSerial = "banger-modules"
)

// The names in run/ that the VMM is given, relative to the VM's directory.
const (
	kernelPath  = "run/kernel"
	modulesPath = "run/modules"
	initrdPath  = "run/initrd"
)

// directory: vms/ID, 0700.

func (m *Manager) acquireDirectory(ctx context.Context, v *machine) error {
	return os.Mkdir(v.dir.Path(), 0o700)
}

func (m *Manager) releaseDirectory(ctx context.Context, v *machine) error {
	return os.RemoveAll(v.dir.Path())
}

// disk: vms/ID/disk, the only file that holds a user's data. Only delete and the
// undoing of a create get here.

func (m *Manager) acquireDisk(ctx context.Context, v *machine) error {
	base := m.layout.Image(v.image.ID).Rootfs()
	if err := m.host.Disk.Create(ctx, base, v.dir.Disk(), v.rec.Disk); err != nil {
		return fmt.Errorf("cannot create disk: %w", err)
	}
	v.rec.DiskDriver = m.host.Disk.Name()
	return nil
}

func (m *Manager) releaseDisk(ctx context.Context, v *machine) error {
	disk, err := m.diskDriver(v)
	if err != nil {
		return err
	}
	return disk.Remove(ctx, v.dir.Disk())
}

// diskDriver is the driver that made the disk of v. A record that names none was
// never finished.
func (m *Manager) diskDriver(v *machine) (driver.Disk, error) { return m.diskNamed(v.rec.DiskDriver) }

func (m *Manager) diskNamed(name string) (driver.Disk, error) {
	if name == "" || name == m.host.Disk.Name() {
		return m.host.Disk, nil
	}
	for _, d := range m.host.OtherDisks {
		if d.Name() == name {
			return d, nil
		}
	}
	return nil, api.Errorf(api.NotReady, "the disk was made by %s, which this daemon does not have", name).WithHint("banger doctor")
}

// record: vms/ID/record.json, from which a lost row can be rebuilt.

func (m *Manager) acquireRecord(ctx context.Context, v *machine) error {
	return writeJSON(v.dir.Record(), v.rec)
}

func (m *Manager) releaseRecord(ctx context.Context, v *machine) error {
	return removeIfThere(v.dir.Record())
}

// run directory: vms/ID/run and vms/ID/log.

func (m *Manager) acquireRunDir(ctx context.Context, v *machine) error {
	if err := os.Mkdir(v.dir.Log(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return os.Mkdir(v.dir.Run(), 0o700)
}

func (m *Manager) releaseRunDir(ctx context.Context, v *machine) error {
	m.cache.drop(v.rec.ID)
	v.h = Handles{}
	return os.RemoveAll(v.dir.Run())
}

// disk attachment: what the disk driver makes on the host for a running VM.

func (m *Manager) acquireAttachment(ctx context.Context, v *machine) error {
	disk, err := m.diskDriver(v)
	if err != nil {
		return err
	}
	a, err := disk.Attach(ctx, v.rec.ID, v.dir.Disk())
	if err != nil {
		return fmt.Errorf("cannot attach disk: %w", err)
	}
	v.h.Attached = &a
	return nil
}

func (m *Manager) releaseAttachment(ctx context.Context, v *machine) error {
	disk, err := m.diskDriver(v)
	if err != nil {
		return err
	}
	var a driver.Attached
	if v.h.Attached != nil {
		a = *v.h.Attached
	}
	if err := disk.Detach(ctx, v.rec.ID, v.dir.Disk(), a); err != nil {
		return err
	}
	v.h.Attached = nil
	return nil
}

// boot files: kernel and modules as hard links, so that a kernel can be replaced
// while VMs run on the old one; the initramfs with this boot's configuration.

func (m *Manager) preflightBootFiles(ctx context.Context, v *machine) error {
	if _, err := os.Stat(m.layout.Kernel(v.kernel.Name).Vmlinux()); err != nil {
		return api.Errorf(api.Refused, "kernel %s is not complete: %w", v.kernel.Name, err).
			WithHint("banger kernel pull %s", v.kernel.Name)
	}
	if err := m.missingChannel(v.kernel); err != nil {
		return err
	}
	if err := m.preflightRoom(ctx, v); err != nil || m.programs.Unpack == nil {
		return err
	}
	return m.programs.Unpack()
}

// missingChannel says of a kernel that an earlier release pulled that its guests cannot be
// reached here.
func (m *Manager) missingChannel(k store.Kernel) error {
	if !m.ability.Vsock || hasModule(k, vsockModule) {
		return nil
	}
	return api.Errorf(api.Refused, "kernel %s is an earlier release's and has no vsock, over which %s reaches the guest", k.Name, m.host.VMM.Name()).
		WithHint("banger kernel pull %s", k.Name)
}

// minRoom is twice what a first boot writes to the state directory, in bytes: 4 MiB of
// initramfs, and as much to the disk. A guest that cannot write ends without a word.
const minRoom = 16 << 20

func (m *Manager) preflightRoom(ctx context.Context, v *machine) error {
	var stat unix.Statfs_t
	if err := unix.Statfs(m.layout.Root, &stat); err != nil {
		return fmt.Errorf("cannot ask for the space in %s: %w", m.layout.Root, err)
	}
	free := int64(stat.Bavail) * stat.Bsize
	if stat.Blocks > 0 && free < minRoom { // some file systems say nothing
		return fmt.Errorf("%s has %d MiB left, a VM needs %d: %w", m.layout.Root, free>>20, minRoom>>20, unix.ENOSPC)
	}
	return nil
}

func (m *Manager) acquireBootFiles(ctx context.Context, v *machine) error {
	magic := make([]byte, wire.MagicLen)
	rand.Read(magic) // never fails, see crypto/rand
	v.h.Magic = magic
	return m.images.WithKernel(ctx, v.rec.Kernel, func(kernel store.Kernel) error {
		v.kernel = kernel // which may have been replaced since the create began
		k := m.layout.Kernel(kernel.Name)
		if err := os.Link(k.Vmlinux(), v.dir.Kernel()); err != nil {
			return err
		}
		if err := os.Link(k.ModulesDisk(), v.dir.Modules()); err != nil {
			return err
		}
		return m.writeInitrd(v, k)
	})
}

func (m *Manager) writeInitrd(v *machine, k config.KernelDir) error {
	f, err := os.OpenFile(v.dir.Initrd(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	var modules []string
	for _, name := range m.bootModules(v.kernel) {
		modules = append(modules, filepath.Join(k.Modules(), name))
	}
	err = initrd.Write(f, m.programs.Guest, modules, m.guestConfig(v))
	return errors.Join(err, f.Close())
}

func (m *Manager) guestConfig(v *machine) wire.Config {
	cfg := wire.Config{
		Version:       1,
		Magic:         v.h.Magic,
		Identity:      wire.Identity{ID: v.rec.ID, Hostname: v.rec.Name, MachineID: v.rec.MachineID},
		Root:          wire.Root{Serial: rootSerial, FSType: "ext4"},
		KernelModules: modulesSerial,
		Network:       m.guestNetwork(v),
		Vsock:         m.ability.Vsock,
		WallClock:     time.Now().UnixNano(),
	}
	for _, name := range m.bootModules(v.kernel) {
		cfg.Modules = append(cfg.Modules, filepath.Base(name))
	}
	if m.ability.NoSerials {
		for _, d := range m.spec(v).Disks {
			cfg.DiskOrder = append(cfg.DiskOrder, d.Serial)
		}
	}
	if v.image.OwnUser && v.rec.User.Name != "" {
		cfg.User = &wire.User{Name: v.rec.User.Name, UID: v.rec.User.UID, GID: v.rec.User.GID}
	}
	return cfg
}

// vsockModule is the last of the modules that a guest with vsock needs.
const vsockModule = "vmw_vsock_virtio_transport"

// serialModule drives the virtio-serial port.
const serialModule = "virtio_console"

// bootModules are the modules that the initramfs brings: those of the one channel that is
// used, for each costs time.
func (m *Manager) bootModules(k store.Kernel) []string {
	return slices.DeleteFunc(slices.Clone(k.Modules), func(file string) bool {
		name := moduleName(file)
		return m.ability.Vsock && name == serialModule || !m.ability.Vsock && strings.Contains(name, "vsock")
	})
}

func (m *Manager) releaseBootFiles(ctx context.Context, v *machine) error {
	for _, path := range []string{v.dir.Kernel(), v.dir.Modules(), v.dir.Initrd()} {
		if err := removeIfThere(path); err != nil {
			return err
		}
	}
	v.h.Magic = nil
	return nil
}

// process: the shim and under it the VMM and the network's process, which ends with it.
// The lock in run/ says whether they live.

func (m *Manager) preflightProcess(ctx context.Context, v *machine) error {
	if held, err := shim.Held(v.dir.Path()); err != nil {
		return err
	} else if held {
		return api.Errorf(api.Busy, "a process of an earlier start still runs").
			WithHint("banger stop %s", v.rec.Name)
	}
	return nil
}

func (m *Manager) acquireProcess(ctx context.Context, v *machine) error {
	cmd, err := m.host.VMM.Command(m.spec(v))
	if err != nil {
		return err
	}
	cfg := shim.Config{Argv: cmd.Argv, Env: cmd.Env, Network: m.networkProcess()}
	var place shim.Place
	if groups := m.host.Groups; groups != nil {
		cfg.Group = groups.Group(v.rec.ID)
		place = func(ctx context.Context, pid int) error {
			return groups.Place(ctx, v.rec.ID, pid, driver.Limits{Memory: v.rec.Memory, CPUs: v.rec.CPUs})
		}
	}
	started, err := shim.Launch(ctx, v.dir.Path(), m.programs.Shim, cfg, place)
	if err != nil {
		err = fmt.Errorf("cannot start %s: %w", m.host.VMM.Name(), err)
		if refused := new(shim.StartError); errors.As(err, &refused) {
			return m.explainEnd(v, err)
		}
		return err
	}
	shimID, vmmID := identity(started.Shim, started.BootID), identity(started.VMM, started.BootID)
	v.h.Shim, v.h.VMM = &shimID, &vmmID
	return nil
}

func (m *Manager) spec(v *machine) driver.Spec {
	root := driver.DiskSpec{Serial: rootSerial, Path: v.h.Attached.Path, Format: v.h.Attached.Format}
	if filepath.IsAbs(root.Path) {
		root.Path, root.Device = filepath.Base(v.dir.Disk()), root.Path
	}
	uid := m.jailUser(v.rec)
	return driver.Spec{
		UID: uid, GID: uid,
		ID: v.rec.ID, Name: v.rec.Name, CPUs: v.rec.CPUs, Memory: v.rec.Memory,
		Kernel: kernelPath, Initrd: initrdPath,
		Disks: []driver.DiskSpec{
			root,
			{Serial: modulesSerial, Path: modulesPath, Format: "raw", ReadOnly: true},
		},
		NIC: m.card(v),
	}
}

// releaseProcess ends the VMM by force. It is done when the lock is free, whatever
// the pids say. It signals again until then: a shim that a daemon forked with its
// last breath has not said yet who it is.
func (m *Manager) releaseProcess(ctx context.Context, v *machine) error {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for begun := time.Now(); ; {
		held, err := shim.Held(v.dir.Path())
		if err != nil {
			return err
		}
		if !held {
			v.h.Shim, v.h.VMM = nil, nil
			return m.removeGroups(ctx, v)
		}
		late := time.Since(begun) > searchAfter
		if err := m.kill(v, late); err != nil {
			return err
		}
		if late {
			if err := m.removeGroups(ctx, v); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the process did not end: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func (m *Manager) removeGroups(ctx context.Context, v *machine) error {
	if m.host.Groups == nil {
		return nil
	}
	return m.host.Groups.Remove(ctx, v.rec.ID)
}

const (
	lockPoll = 5 * time.Millisecond
	// searchAfter is how long the files in run/ may be wrong about who holds the lock
	// before all processes are searched.
	searchAfter = time.Second
)

// kill sends SIGKILL to the VMM and the shim of v, each verified by its start time.
// The VMM goes first: then the shim still writes exit.json.
func (m *Manager) kill(v *machine, search bool) error {
	var ids []proc.Identity
	if s, err := shim.Processes(v.dir.Path()); err == nil {
		ids = append(ids, identity(s.VMM, s.BootID))
		if s.VMM.PID == 0 || search {
			ids = append(ids, identity(s.Shim, s.BootID))
		}
	} else if v.h.Shim != nil {
		ids = append(ids, *v.h.Shim)
	}
	if search {
		holders, err := proc.Holders(v.dir.Lock())
		if err != nil {
			return err
		}
		ids = append(ids, holders...)
	}
	var errs []error
	for _, id := range ids {
		if id.PID > 0 {
			errs = append(errs, id.Signal(unix.SIGKILL))
		}
	}
	return errors.Join(errs...)
}

func identity(p shim.Process, bootID string) proc.Identity {
	return proc.Identity{PID: p.PID, StartTime: p.StartTime, BootID: bootID}
}

// agent: the guest executes and its agent has proven who it is.

func (m *Manager) acquireAgent(ctx context.Context, v *machine) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.agentTimeout, errNoAnswer)
	defer cancel()
	// A VMM that dies must end the wait at once.
	ctx, ended := context.WithCancelCause(ctx)
	defer ended(nil)
	shimProcess := *v.h.Shim
	go func() {
		if shimProcess.Wait(ctx) == nil {
			ended(errEnded)
		}
	}()

	err := m.host.VMM.Boot(ctx, v.dir.Path(), m.spec(v))
	if err == nil {
		v.channel = m.host.VMM.Channel(v.dir.Path(), v.h.Magic)
		err = m.hello(ctx, v)
	}
	if err == nil {
		return nil
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errEnded):
		return m.explainEnd(v, errEnded)
	case errors.Is(cause, errNoAnswer):
		return &api.Error{Code: api.Unresponsive, Err: err,
			Message: fmt.Sprintf("the guest's agent did not answer within %s%s", m.agentTimeout, v.consoleText()),
			Hint:    "banger doctor"}
	case cause != nil:
		return cause
	}
	// What broke the connection may be the end of the VMM, not seen yet.
	wait, cancelWait := context.WithTimeout(ctx, time.Second)
	defer cancelWait()
	if m.waitGone(wait, v.dir.Path()) == nil {
		return m.explainEnd(v, errEnded)
	}
	return err
}

func (m *Manager) releaseAgent(ctx context.Context, v *machine) error {
	if v.channel == nil {
		return nil
	}
	err := v.channel.Close()
	v.channel = nil
	return err
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

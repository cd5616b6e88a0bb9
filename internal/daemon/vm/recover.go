package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"banger/internal/config"
	"banger/internal/daemon/store"
	"banger/internal/netpolicy"
	"banger/internal/netwire"
	"banger/internal/shim"
)

// recoverParallel is how many VMs are recovered at once: the time goes to waiting
// for processes to die.
const recoverParallel = 8

// Recover makes the world fit the records after the daemon, or the machine, went
// away at any instruction: it adopts VMs that run, undoes what was half made,
// releases what nobody holds any more, and finds VMs whose row was lost. It deletes
// nothing that holds a user's data, apart from what a create or delete had begun.
func (m *Manager) Recover(ctx context.Context) error {
	if err := m.recoverRows(ctx); err != nil {
		return err
	}
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	slots := make(chan struct{}, recoverParallel)
	for _, rec := range vms {
		if !m.needsRecovery(rec) {
			continue
		}
		slots <- struct{}{}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer func() { <-slots }()
			if err := m.recoverVM(ctx, rec); err != nil {
				m.log.Error("cannot recover a VM", "vm", rec.Name, "state", rec.State, "err", err)
			}
		}()
	}
	wg.Wait()
	if err := m.sweep(ctx); err != nil {
		m.log.Error("cannot remove what belongs to no VM", "err", err)
	}
	if vms, err = m.store.VMs(ctx); err != nil {
		return err
	}
	for _, rec := range vms {
		m.rebootIfAsked(rec)
	}
	return nil
}

// needsRecovery is cheap: most records of a large instance are stopped and hold
// nothing.
func (m *Manager) needsRecovery(rec store.VM) bool {
	if rec.State != store.Stopped || rec.RemoveOnRelease {
		return true
	}
	_, err := os.Lstat(m.layout.VM(rec.ID).Run())
	return !errors.Is(err, fs.ErrNotExist)
}

// recoverTimeout bounds the recovery of one VM: a process that does not die must not
// keep the daemon from serving the others.
const recoverTimeout = 15 * time.Second

func (m *Manager) recoverVM(ctx context.Context, rec store.VM) error {
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	v, err := m.machine(ctx, rec)
	if err != nil {
		return err
	}
	h, herr := m.readHandles(v.dir)
	v.h = h
	if rec.RemoveOnRelease {
		m.leases.expect(rec.ID)
	}
	switch rec.State {
	case store.Creating, store.Deleting:
		return m.destroy(ctx, v, "recover")
	case store.Running:
		held, err := shim.Held(v.dir.Path())
		if err != nil {
			return err
		}
		if held {
			m.adopt(v, herr)
			return nil
		}
		return m.haltEnded(ctx, v, "recover")
	case store.Stopping:
		return m.haltEnded(ctx, v, "recover")
	}
	as := outcome{lastError: rec.LastError, ended: rec.Ended, reboot: rec.Reboot}
	if rec.State == store.Starting {
		as.lastError = "the daemon ended while it was starting"
	}
	stuck := m.releaseAll(ctx, v, scopeRun, "recover")
	if rec.State == store.Failed {
		if err := m.transition(ctx, v, store.Stopping, nil); err != nil {
			return errors.Join(err, stuck)
		}
		as.lastError = ""
	}
	if rec.State == store.Stopped && stuck == nil {
		return nil
	}
	return errors.Join(stuck, m.settle(ctx, v, as, stuck))
}

// adopt takes over a VM that went on running without a daemon.
func (m *Manager) adopt(v *machine, herr error) {
	e := entry{handles: v.h}
	if herr != nil {
		// It runs and can be stopped: the lock finds its process. Without the magic of
		// its boot the guest cannot be reached.
		e.lost = fmt.Sprintf("its handles are lost: %v", herr)
		m.log.Warn("adopted a VM without its handles", "vm", v.rec.Name, "err", herr)
	} else {
		v.channel = m.host.VMM.Channel(v.dir.Path(), v.h.Magic)
		e.channel = v.channel
	}
	m.cache.put(v.rec.ID, e)
	m.watch(v)
	m.settleNetwork(v.rec.ID)
}

// recoverRows looks at directories without a row. With a record.json the row is
// made again; a disk without one is moved to lost/, never deleted.
func (m *Manager) recoverRows(ctx context.Context) error {
	unknown, err := m.unknownDirs(ctx)
	for _, id := range unknown {
		if err := m.recoverRow(ctx, id); err != nil {
			m.log.Error("cannot recover a directory without a row", "directory", id, "err", err)
		}
	}
	return err
}

// unknownDirs are the directories of VMs that have no row, by name.
func (m *Manager) unknownDirs(ctx context.Context) ([]string, error) {
	entries, err := os.ReadDir(m.layout.VMs())
	if err != nil {
		return nil, err
	}
	vms, err := m.store.VMs(ctx)
	if err != nil {
		return nil, err
	}
	known := make(map[string]bool, len(vms))
	for _, v := range vms {
		known[v.ID] = true
	}
	var unknown []string
	for _, e := range entries {
		if !known[e.Name()] && e.IsDir() {
			unknown = append(unknown, e.Name())
		}
	}
	return unknown, nil
}

// StrayDisks tells whether there are disks that no record knows: in lost/, or in a
// directory whose row could not be made again.
func (m *Manager) StrayDisks(ctx context.Context) (bool, error) {
	lost, err := os.ReadDir(m.layout.Lost())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	unknown, err := m.unknownDirs(ctx)
	return len(lost)+len(unknown) > 0, err
}

func (m *Manager) recoverRow(ctx context.Context, id string) error {
	dir := m.layout.VM(id)
	rec, err := readRecord(dir)
	if err == nil && rec.ID == id {
		rec.State, rec.Reboot = store.Stopped, false
		if held, err := shim.Held(dir.Path()); err != nil {
			return err
		} else if held {
			rec.State = store.Running
		}
		if err := m.store.InsertVM(ctx, rec); err != nil {
			return err // left as it is: the next Open may have more luck
		}
		m.log.Warn("made a lost row again from record.json", "vm", rec.Name)
		return nil
	}
	v := &machine{rec: store.VM{ID: id, Name: id}, dir: dir}
	v.h, _ = m.readHandles(dir)
	ctx, cancel := context.WithTimeout(ctx, recoverTimeout)
	defer cancel()
	if rerr := m.releaseAll(ctx, v, scopeRun, "recover"); rerr != nil {
		return rerr
	}
	if _, serr := os.Lstat(dir.Disk()); errors.Is(serr, fs.ErrNotExist) {
		return os.RemoveAll(dir.Path())
	}
	m.log.Warn("moved a directory that holds a disk but no record to lost", "directory", id, "err", err)
	if err := os.MkdirAll(m.layout.Lost(), 0o700); err != nil {
		return err
	}
	return os.Rename(dir.Path(), filepath.Join(m.layout.Lost(), id))
}

func readRecord(dir config.VMDir) (rec store.VM, err error) {
	data, err := os.ReadFile(dir.Record())
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if rec.Network.Preset == "" { // written by a release that knew of no network
		rec.Network = netwire.Network{Preset: string(netpolicy.Internet)}
	}
	return rec, err
}

// sweep removes host objects that bear this instance's mark and belong to no VM
// that runs.
func (m *Manager) sweep(ctx context.Context) error {
	var errs []error
	for _, inv := range m.host.Inventories {
		objects, err := inv.List(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("cannot list %s: %w", inv.Kind(), err))
			continue
		}
		for _, o := range objects {
			if _, living := m.cache.get(o.VM); living {
				continue
			}
			if err := inv.Remove(ctx, o); err != nil {
				errs = append(errs, fmt.Errorf("cannot remove %s %s: %w", o.Kind, o.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

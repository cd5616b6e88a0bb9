package vm

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"banger/api"
	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/proc"
	"banger/internal/daemon/store"
)

// Images is what a VM is made from. A missing one is pulled; callers that want the
// same one share one pull.
type Images interface {
	Ensure(ctx context.Context, name string, p opstate.Progress) (store.Image, error)
	EnsureKernel(ctx context.Context, name string, p opstate.Progress) (store.Kernel, error)
	// WithKernel calls fn while no pull replaces the kernel: its row and its files belong
	// together. fn must be short.
	WithKernel(ctx context.Context, name string, fn func(store.Kernel) error) error
}

// Progress is the operation on whose behalf the manager works.
type Progress interface {
	opstate.Progress
	ID() string // empty when nobody watches
}

// Workspaces are jobs on a VM that do not hold its slot; stop and delete end them.
type Workspaces interface {
	// Interrupt cancels the jobs on one VM and returns when they have ended.
	Interrupt(ctx context.Context, vmID string) error
}

// Programs are the paths of the programs that a VM is run with.
type Programs struct {
	Shim  string // banger-shim
	Guest string // banger-guest, which becomes /init
	Net   string // banger-net; empty: the VMM has no network card to offer
	// Unpack makes them if they are not there; nil if they are.
	Unpack func() error
}

// Options are what a Manager needs.
type Options struct {
	Layout   config.Layout
	Instance string      // its id, see config.Layout
	Limits   config.Host // no VM gets more than the host has
	Store    *store.Store
	Host     driver.Host
	Ability  driver.Ability // of Host.VMM
	Programs Programs
	Images   Images
	Checker  *locks.Checker
	Logger   *slog.Logger
	// AgentTimeout bounds the time from the start of the VMM to the agent's hello. Zero
	// means the default.
	AgentTimeout time.Duration
	// Hook is called at each step of an operation, see Manager.at. Nil outside of tests.
	Hook func(point string) error
}

// A guest under software emulation on a loaded machine has been seen to take a tenth of
// these. systemTimeout bounds the time from the agent's hello to the system being ready.
const (
	defaultAgentTimeout = 2 * time.Minute
	systemTimeout       = 5 * time.Minute
)

// Manager owns all VMs of one instance.
type Manager struct {
	layout       config.Layout
	instance     string
	limits       config.Host
	store        *store.Store
	host         driver.Host
	ability      driver.Ability
	programs     Programs
	images       Images
	workspaces   Workspaces
	checker      *locks.Checker
	log          *slog.Logger
	agentTimeout time.Duration
	hook         func(point string) error
	bootID       string // of the host

	slots        *opstate.Slots
	networkLocks *locks.Set
	vmLocks      *locks.Set
	createMu     *locks.Mutex // createVMMu: the reservation of name and slot
	cache        *handleCache
	leases       *leases

	reboots atomic.Int32 // under way, see Reboots

	// background work: watchers, reboots, expired leases
	ctx    context.Context
	cancel context.CancelFunc
	workMu sync.Mutex // a leaf
	closed bool       // nothing is begun any more
	work   sync.WaitGroup
}

// New makes a Manager. Recover must be called before any other method, and
// SetWorkspaces if there are any.
func New(o Options) (*Manager, error) {
	bootID, err := proc.HostBootID()
	if err != nil {
		return nil, err
	}
	m := &Manager{
		layout: o.Layout, instance: o.Instance, limits: o.Limits, store: o.Store, host: o.Host, ability: o.Ability, programs: o.Programs,
		images: o.Images, checker: o.Checker, log: o.Logger,
		agentTimeout: o.AgentTimeout, hook: o.Hook, bootID: bootID,
		slots:        opstate.NewSlots(),
		networkLocks: locks.NewSet(o.Checker, locks.RankNetwork, "networkLocks"),
		vmLocks:      locks.NewSet(o.Checker, locks.RankVM, "vmLocks"),
		createMu:     locks.NewMutex(o.Checker, locks.RankCreate, "createVMMu"),
		cache:        newHandleCache(),
	}
	if m.agentTimeout == 0 {
		m.agentTimeout = defaultAgentTimeout
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	m.leases = newLeases(m.expire)
	return m, nil
}

// SetWorkspaces connects the workspaces, which in turn need the manager.
func (m *Manager) SetWorkspaces(w Workspaces) { m.workspaces = w }

// Close ends the background work and the guest channels. Running VMs go on.
func (m *Manager) Close() error {
	m.leases.close()
	m.workMu.Lock()
	m.closed = true
	m.workMu.Unlock()
	m.cancel()
	m.work.Wait()
	var errs []error
	for _, id := range m.cache.all() {
		if e, ok := m.cache.get(id); ok && e.channel != nil {
			errs = append(errs, e.channel.Close())
		}
	}
	return errors.Join(errs...)
}

// Current tells which operation works on a VM, so that a second request for the
// same verb can be answered with the running one.
func (m *Manager) Current(id string) (opstate.Verb, string, bool) { return m.slots.Current(id) }

// transition changes the state of v by compare-and-set, under vmLocks, and mirrors
// the row into record.json. When it fails v stays as it is.
func (m *Manager) transition(ctx context.Context, v *machine, to store.State, set func(*store.VM)) error {
	unlock := m.vmLocks.Lock(v.rec.ID)
	defer unlock()
	rec, err := m.store.Transition(ctx, v.rec.ID, transitions(to), to, set)
	if err != nil {
		return err
	}
	v.rec = rec
	if to != store.Deleting {
		// The row is the truth and is on disk already; the mirror must not fail the
		// change, least of all on a full disk.
		if err := writeJSON(v.dir.Record(), rec); err != nil {
			m.log.Warn("cannot mirror the record", "vm", rec.Name, "err", err)
		}
	}
	return nil
}

// begin takes the slot of a VM for verb, until end is called. The returned context ends
// when another verb takes over.
func (m *Manager) begin(ctx context.Context, id string, verb opstate.Verb, p Progress) (_ context.Context, end func(), err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	takenOver := func() { cancel(errTakenOver) }
	release, err := m.slots.Acquire(ctx, id, verb, p.ID(), takenOver)
	if err != nil {
		cancel(nil)
		return nil, nil, err
	}
	return ctx, func() { release(); cancel(nil) }, nil
}

// record reads the record of a VM. One that is not there is an error in words.
func (m *Manager) record(ctx context.Context, id string) (store.VM, error) {
	rec, err := m.store.VM(ctx, id)
	if errors.Is(err, store.ErrNotFound) {
		return rec, notFound(id)
	}
	return rec, err
}

var errTakenOver = &api.Error{Code: api.Cancelled, Message: "another operation took over"}

// machine loads all that the operations on a VM work with.
func (m *Manager) machine(ctx context.Context, rec store.VM) (*machine, error) {
	v := &machine{rec: rec, dir: m.layout.VM(rec.ID)}
	var err error
	if v.image, err = m.store.Image(ctx, rec.ImageID); err != nil {
		return nil, err
	}
	if v.kernel, err = m.store.Kernel(ctx, rec.Kernel); err != nil {
		return nil, err
	}
	if e, ok := m.cache.get(rec.ID); ok {
		v.h, v.channel = e.handles, e.channel
	}
	return v, nil
}

// background runs fn until it ends or the manager is closed.
func (m *Manager) background(fn func(ctx context.Context)) {
	m.workMu.Lock()
	defer m.workMu.Unlock()
	if m.closed {
		return
	}
	m.work.Add(1)
	go func() {
		defer m.work.Done()
		fn(m.ctx)
	}()
}

package workspace

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"

	"banger/api"
	"banger/internal/daemon/locks"
	"banger/internal/daemon/store"
)

// Guests are the VMs, as workspaces need them.
type Guests interface {
	// Running returns the record of a VM that runs, else an error in words. It is a
	// short check that holds nothing when it returns.
	Running(ctx context.Context, vmID string) (store.VM, error)
	// Dial opens a stream to the agent of a running VM.
	Dial(ctx context.Context, vmID string) (net.Conn, error)
}

// Options are what a Manager needs.
type Options struct {
	Store   *store.Store
	Guests  Guests
	Checker *locks.Checker
	Logger  *slog.Logger
	// Scratch is a directory of the manager's own on a disk, absolute; New empties it.
	// Empty is a new one below the system's directory for temporary files, each time.
	Scratch string
}

// Manager places repositories into VMs and exports what changed there. One prepare or
// export runs at a time per VM.
type Manager struct {
	store   *store.Store
	guests  Guests
	locks   *locks.Set // workspaceLocks
	log     *slog.Logger
	scratch string
	places  places

	jobsMu *locks.Mutex
	jobs   map[*job]struct{} // guarded by jobsMu
}

// job is a prepare or export, also one that waits for the lock.
type job struct {
	vmID   string
	cancel context.CancelCauseFunc
	done   chan struct{}
}

// New makes a Manager, and throws away what an earlier daemon left in its scratch
// directory.
func New(o Options) *Manager {
	if o.Scratch != "" {
		if err := os.RemoveAll(o.Scratch); err != nil {
			o.Logger.Warn("cannot empty the scratch directory of workspaces", "err", err)
		}
	}
	return &Manager{
		store: o.Store, guests: o.Guests, log: o.Logger, scratch: o.Scratch, places: guestPlaces(),
		locks:  locks.NewSet(o.Checker, locks.RankWorkspace, "workspaceLocks"),
		jobsMu: locks.NewMutex(o.Checker, locks.RankLeaf, "workspaceJobs"),
		jobs:   map[*job]struct{}{},
	}
}

// begin registers a job on a VM. It comes before the check that the VM runs: whoever
// stops the VM interrupts once more after its state has changed, so no job slips through.
func (m *Manager) begin(ctx context.Context, vmID string) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	j := &job{vmID: vmID, cancel: cancel, done: make(chan struct{})}
	m.jobsMu.Lock()
	m.jobs[j] = struct{}{}
	m.jobsMu.Unlock()
	return ctx, func() {
		m.jobsMu.Lock()
		delete(m.jobs, j)
		m.jobsMu.Unlock()
		cancel(nil)
		close(j.done)
	}
}

// Interrupt cancels the jobs on one VM and returns when they have ended, or with the
// cause of ctx's end.
func (m *Manager) Interrupt(ctx context.Context, vmID string) error {
	var ending []*job
	m.jobsMu.Lock()
	for j := range m.jobs {
		if j.vmID == vmID {
			ending = append(ending, j)
		}
	}
	m.jobsMu.Unlock()
	for _, j := range ending {
		j.cancel(errInterrupted)
	}
	for _, j := range ending {
		select {
		case <-j.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

var errInterrupted = &api.Error{Code: api.Cancelled, Message: "the VM is going down"}

// enter does what each job begins with: register, check the VM, take the lock.
func (m *Manager) enter(ctx context.Context, vmID string) (context.Context, store.VM, func(), error) {
	ctx, end := m.begin(ctx, vmID)
	vm, err := m.guests.Running(ctx, vmID)
	if err != nil {
		end()
		return nil, vm, nil, err
	}
	unlock, err := m.locks.LockContext(ctx, vmID)
	if err != nil {
		end()
		return nil, vm, nil, err
	}
	return ctx, vm, func() { unlock(); end() }, nil
}

func (m *Manager) guest(vm store.VM) guest {
	return guest{name: vm.Name, user: vm.User.Name, dial: func(ctx context.Context) (net.Conn, error) { return m.guests.Dial(ctx, vm.ID) }}
}

// recorded is what the store knows of the workspace of a VM; ok is false for nothing.
func (m *Manager) recorded(ctx context.Context, vmID string) (w store.Workspace, ok bool, err error) {
	w, err = m.store.Workspace(ctx, vmID)
	if errors.Is(err, store.ErrNotFound) {
		return store.Workspace{}, false, nil
	}
	return w, err == nil, err
}

// placed is where the repository is inside, for messages; empty when it is not known.
func (m *Manager) placed(ctx context.Context, vmID string) string {
	w, _, _ := m.recorded(ctx, vmID)
	return w.GuestPath
}

// because is the error to show of a job: when somebody ended it, that is why it
// failed, whatever broke then.
func because(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

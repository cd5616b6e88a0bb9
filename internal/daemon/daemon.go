package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"banger/api"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/config"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/image"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
	"banger/internal/daemon/vm"
	"banger/internal/daemon/workspace"
)

// Daemon is bangerd: wiring only. State and locks live with their owners.
type Daemon struct {
	layout    config.Layout
	config    config.Config // as it was at the start: log level and KVM
	build     Build
	instance  string
	system    bool // see WithSystem
	startedAt time.Time
	log       *slog.Logger

	host       driver.Host
	ability    driver.Ability
	store      *store.Store
	ops        *opstate.Registry[proto.Message]
	images     *image.Manager
	vms        *vm.Manager
	workspaces *workspace.Manager

	listener net.Listener
	server   *http.Server
	stopOnce sync.Once
	stopping chan struct{} // closed by the Shutdown call
	closers  []func() error

	// entry makes one step of the question whether the daemon is idle and of its end:
	// whoever comes after it is told to ask the next daemon. ops has a lock below it.
	entry   sync.Mutex
	ending  bool
	streams int // attached: exec, dial, export, and leases
}

// methods is the one list of what the API can do. A test holds it against the
// protobuf descriptors.
func methods() []string {
	return []string{
		bangerv1connect.MachineStatusProcedure,
		bangerv1connect.MachineShutdownProcedure,
		bangerv1connect.MachineDoctorProcedure,
		bangerv1connect.VMsListProcedure,
		bangerv1connect.VMsShowProcedure,
		bangerv1connect.VMsCreateProcedure,
		bangerv1connect.VMsStartProcedure,
		bangerv1connect.VMsStopProcedure,
		bangerv1connect.VMsDeleteProcedure,
		bangerv1connect.VMsHoldProcedure,
		bangerv1connect.VMsSetProcedure,
		bangerv1connect.VMsNetworkLogProcedure,
		bangerv1connect.VMsPortsProcedure,
		bangerv1connect.WorkspacesFindProcedure,
		bangerv1connect.WorkspacesPrepareProcedure,
		bangerv1connect.WorkspacesExportProcedure,
		bangerv1connect.ImagesListProcedure,
		bangerv1connect.ImagesPullProcedure,
		bangerv1connect.KernelsListProcedure,
		bangerv1connect.KernelsPullProcedure,
		bangerv1connect.OperationsListProcedure,
		bangerv1connect.OperationsWatchProcedure,
		bangerv1connect.OperationsCancelProcedure,
	}
}

// Open takes the state directory, wires everything, and makes the world fit the
// records (see vm.Manager.Recover). It fails with code busy when another daemon has
// the directory. What it began is undone when it fails.
func Open(ctx context.Context, opts ...Option) (d *Daemon, err error) {
	var o options
	for _, opt := range opts {
		opt(&o)
	}
	d = &Daemon{build: o.build, startedAt: time.Now(), stopping: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
			if errors.Is(err, syscall.ENOSPC) && api.HintOf(err) == "" {
				err = api.Errorf(api.NoSpace, "%w", err).WithHint("df -h %s", d.layout.Root)
			}
			d = nil
		}
	}()
	if err := d.openState(ctx, o); err != nil {
		return d, err
	}
	programs, err := unpackPrograms(d.layout, o.programs)
	if err != nil {
		return d, err
	}
	if d.host, d.ability, err = d.wireHost(ctx, o); err != nil {
		return d, err
	}
	if !d.ability.Network {
		programs.Net = ""
	}
	limits, err := config.ThisHost()
	if err != nil {
		return d, err
	}
	d.ops = opstate.NewRegistry[proto.Message](context.Background(), keepOperations, keepOperationsFor)
	d.images = image.New(image.Options{Layout: d.layout, Store: d.store, Checker: o.checker, Logger: d.log, Builder: o.builder})
	d.onClose(d.images.Close)
	d.vms, err = vm.New(vm.Options{
		Layout: d.layout, Instance: d.instance, Limits: limits, Store: d.store, Host: d.host, Ability: d.ability, Programs: programs, Images: d.images,
		Checker: o.checker, Logger: d.log, AgentTimeout: o.agentTimeout, Hook: o.hook,
	})
	if err != nil {
		return d, err
	}
	d.onClose(d.vms.Close)
	d.workspaces = workspace.New(workspace.Options{
		Store: d.store, Guests: d.vms, Checker: o.checker, Logger: d.log, Scratch: filepath.Join(d.layout.Cache(), "workspace"),
	})
	d.vms.SetWorkspaces(d.workspaces)
	if err := d.images.Recover(ctx); err != nil {
		return d, err
	}
	if err := d.vms.Recover(ctx); err != nil {
		return d, err
	}
	d.prune(ctx)
	d.listener, err = listen(d.layout)
	return d, err
}

// prune deletes images that were replaced and that no VM uses any more. None goes while
// there are disks of which nobody knows what image they need.
func (d *Daemon) prune(ctx context.Context) {
	stray, err := d.vms.StrayDisks(ctx)
	if stray {
		d.log.Info("replaced images stay: there are disks without a record", "lost", d.layout.Lost())
		return
	}
	if err == nil {
		err = d.images.Prune(ctx)
	}
	if err != nil {
		d.log.Warn("cannot delete replaced images", "err", err)
	}
}

// openState opens what the rest is built on: directory, lock, log, configuration, store.
func (d *Daemon) openState(ctx context.Context, o options) (err error) {
	if d.layout, err = findState(o); err != nil {
		return err
	}
	if err := d.layout.Prepare(); err != nil {
		return err
	}
	lock, err := lockInstance(d.layout)
	if err != nil {
		return err
	}
	d.onClose(lock.Close)
	if d.system = o.system; d.system {
		err = d.layout.MarkSystem()
	} else if d.layout.IsSystem() {
		err = api.Errorf(api.Refused, "%s is the state directory of the system's daemon", d.layout.Root).WithHint("bangerd --system")
	}
	if err != nil {
		return err
	}
	if d.config, err = loadConfig(); err != nil {
		return err
	}
	if d.log = o.logger; d.log == nil {
		file, err := openLog(d.layout.Log())
		if err != nil {
			return err
		}
		d.onClose(file.Close)
		d.log = newLogger(file, d.config.LogLevel)
	}
	if d.instance, err = d.layout.Instance(); err != nil {
		return err
	}
	d.store, err = store.Open(ctx, d.layout.DB())
	if errors.Is(err, store.ErrNewer) {
		return api.Errorf(api.Refused, "%s was %w", d.layout.DB(), store.ErrNewer).WithHint("banger version")
	}
	if err != nil {
		return fmt.Errorf("cannot open the store: %w", err)
	}
	d.onClose(d.store.Close)
	return nil
}

// findState finds the state directory.
func findState(o options) (config.Layout, error) {
	if o.system && os.Geteuid() != 0 {
		return config.Layout{}, api.Errorf(api.Refused, "the system's daemon runs as root").WithHint("sudo bangerd --system")
	}
	switch {
	case o.layout != nil:
		return *o.layout, nil
	case o.system:
		return config.SystemDir()
	}
	return config.Dir()
}

func loadConfig() (config.Config, error) {
	host, err := config.ThisHost()
	if err != nil {
		return config.Config{}, err
	}
	return config.Load(host)
}

// Serve answers until ctx ends or a client asks for the end.
func (d *Daemon) Serve(ctx context.Context) error {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	d.server = &http.Server{
		Handler: d.handler(), ConnContext: withPeer, Protocols: protocols,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(d.log.Handler(), slog.LevelWarn),
	}
	d.vms.StartLeases()
	d.log.Info("serving", "version", d.build.Version, "pid", os.Getpid(), "state", d.layout.Root)
	failed := make(chan error, 1)
	go func() { failed <- d.server.Serve(d.listener) }()
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	case <-d.stopping:
	}
	d.log.Info("shutting down")
	return nil
}

// handler routes every method of the API, and the streams with guests.
func (d *Daemon) handler() http.Handler {
	mux := http.NewServeMux()
	handlerOptions := connect.WithHandlerOptions(
		connect.WithInterceptors(errorInterceptor{d}),
		connect.WithReadMaxBytes(4<<20),
	)
	mux.Handle(bangerv1connect.NewMachineHandler(machineService{d}, handlerOptions))
	mux.Handle(bangerv1connect.NewVMsHandler(vmService{d}, handlerOptions))
	mux.Handle(bangerv1connect.NewWorkspacesHandler(workspaceService{d}, handlerOptions))
	mux.Handle(bangerv1connect.NewImagesHandler(imageService{d}, handlerOptions))
	mux.Handle(bangerv1connect.NewKernelsHandler(kernelService{d}, handlerOptions))
	mux.Handle(bangerv1connect.NewOperationsHandler(operationService{d}, handlerOptions))
	known := make(map[string]bool)
	for _, g := range guestStreams() {
		known[g.path()] = true
		mux.HandleFunc(g.path(), func(w http.ResponseWriter, r *http.Request) { d.serveStream(w, r, g) })
	}
	for _, m := range methods() {
		known[m] = true
	}
	return onlyOwner(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, pattern := mux.Handler(r); pattern == "" || !known[r.URL.Path] {
			writeError(w, http.StatusNotFound, api.Errorf(api.UnknownMethod, "unknown method %s", r.URL.Path))
			return
		}
		mux.ServeHTTP(w, r)
	}))
}

// Close ends operations with their rollback and lets go of everything but the VMs:
// those go on running.
func (d *Daemon) Close() error { return d.close() }

// closeTimeout bounds the rollbacks of what was running; what is not through by then
// is finished by the next Open. The CLI waits for 30 s.
const closeTimeout = 25 * time.Second

func (d *Daemon) close() error {
	var errs []error
	if d.vms != nil {
		d.vms.SuspendLeases()
	}
	if d.ops != nil {
		d.end(false)
		ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		errs = append(errs, d.ops.Close(ctx))
	}
	// The socket goes while the lock is still held: what lies there afterwards is
	// another daemon's.
	if d.listener != nil {
		os.Remove(d.layout.Socket())
		d.listener.Close()
	}
	if d.server != nil {
		// Watchers see how their operation ended before they are cut off.
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if d.server.Shutdown(ctx) != nil {
			d.server.Close()
		}
		cancel()
	}
	for i := len(d.closers) - 1; i >= 0; i-- {
		errs = append(errs, d.closers[i]())
	}
	return errors.Join(errs...)
}

func (d *Daemon) onClose(fn func() error) { d.closers = append(d.closers, fn) }

package daemon

import (
	"context"
	"os"

	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/store"
)

type machineService struct{ d *Daemon }

func (s machineService) Status(ctx context.Context, _ *bangerv1.StatusRequest) (*bangerv1.StatusResponse, error) {
	d := s.d
	busy, err := d.busy()
	if err != nil {
		return nil, err
	}
	vms, err := d.store.CountVMs(ctx)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.StatusResponse{
		Version: d.build.Version, Build: d.build.ID, Pid: int32(os.Getpid()),
		Socket: d.layout.Socket(), StateDir: d.layout.Root, Instance: d.instance,
		StartedAt: timestamppb.New(d.startedAt), BusyOperations: busy,
		Vmm: d.host.VMM.Name(), Accelerator: d.ability.Accelerator, AcceleratorReason: d.ability.Reason,
	}
	for _, n := range vms {
		res.Vms += int32(n)
	}
	res.RunningVms = int32(vms[store.Running])
	return res, nil
}

// errStopping is the answer to whoever comes when the end is decided.
var errStopping = &api.Error{Code: api.Stopping, Message: "the daemon is shutting down", Hint: "banger daemon status"}

// busy counts what a shutdown would interrupt.
func (d *Daemon) busy() (int32, error) {
	d.entry.Lock()
	defer d.entry.Unlock()
	if d.ending {
		return 0, errStopping
	}
	return d.busyLocked(), nil
}

func (d *Daemon) busyLocked() int32 { return int32(d.ops.Running() + d.streams + d.vms.Reboots()) }

// attach counts a stream until it is detached.
func (d *Daemon) attach() (detach func(), err error) {
	d.entry.Lock()
	defer d.entry.Unlock()
	if d.ending {
		return nil, errStopping
	}
	d.streams++
	return func() {
		d.entry.Lock()
		defer d.entry.Unlock()
		d.streams--
	}, nil
}

// end lets nothing begin any more, with ifIdle only when nothing runs. It returns how
// much does.
func (d *Daemon) end(ifIdle bool) int32 {
	d.entry.Lock()
	defer d.entry.Unlock()
	n := d.busyLocked()
	if !ifIdle || n == 0 {
		d.ending = true
	}
	return n
}

func (s machineService) Shutdown(ctx context.Context, req *bangerv1.ShutdownRequest) (*bangerv1.ShutdownResponse, error) {
	if n := s.d.end(req.IfIdle); req.IfIdle && n > 0 {
		return nil, api.Errorf(api.Busy, "the daemon is not idle: operations, streams and reboots under way: %d", n).WithHint("banger daemon status")
	}
	s.d.stop()
	return &bangerv1.ShutdownResponse{}, nil
}

// stop makes Serve return. It may be called again.
func (d *Daemon) stop() { d.stopOnce.Do(func() { close(d.stopping) }) }

func (s machineService) Doctor(ctx context.Context, _ *bangerv1.DoctorRequest) (*bangerv1.DoctorResponse, error) {
	return &bangerv1.DoctorResponse{Checks: runChecks(ctx, hostChecks(options{layout: &s.d.layout}))}, nil
}

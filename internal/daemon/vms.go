package daemon

import (
	"cmp"
	"context"
	"os/user"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/opstate"
	"banger/internal/daemon/store"
	"banger/internal/daemon/vm"
)

type vmService struct{ d *Daemon }

func (s vmService) List(ctx context.Context, _ *bangerv1.ListVMsRequest) (*bangerv1.ListVMsResponse, error) {
	views, err := s.d.vms.List(ctx)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListVMsResponse{}
	for _, v := range views {
		res.Vms = append(res.Vms, vmMessage(v))
	}
	return res, nil
}

func (s vmService) Show(ctx context.Context, req *bangerv1.ShowVMRequest) (*bangerv1.VM, error) {
	v, err := s.d.vms.Show(ctx, req.Ref)
	if err != nil {
		return nil, err
	}
	return vmMessage(v), nil
}

func (s vmService) Create(ctx context.Context, req *bangerv1.CreateVMRequest) (*bangerv1.Operation, error) {
	owner, err := peerUser(ctx)
	if err != nil {
		return nil, err
	}
	r, err := s.createRequest(req, owner)
	if err != nil {
		return nil, err
	}
	if err := s.d.vms.Validate(ctx, r); err != nil {
		return nil, err
	}
	if r.Repository != "" {
		// What is wrong with the repository is said before a pull and a boot.
		if _, err := s.d.workspaces.Inspect(ctx, r.Repository); err != nil {
			return nil, err
		}
	}
	target := cmp.Or(r.Name, r.NameHint)
	return s.d.begin("create", target, func(ctx context.Context, op *operation) (proto.Message, error) {
		r.Reserved = func(rec store.VM) { op.Announce(rec.Name, vmMessage(vm.View{VM: rec, Image: r.Image})) }
		rec, err := s.d.vms.Create(ctx, r, op)
		if err != nil {
			return nil, err
		}
		return s.shown(ctx, rec.ID)
	})
}

// createRequest fills in what the caller left to the defaults, as config.toml has them now.
func (s vmService) createRequest(req *bangerv1.CreateVMRequest, owner store.User) (vm.CreateRequest, error) {
	c, err := loadConfig()
	if err != nil {
		return vm.CreateRequest{}, err
	}
	r := vm.CreateRequest{
		Name: req.Name, NameHint: req.NameHint, Image: req.Image, Kernel: req.Kernel,
		CPUs: int(req.Cpus), Memory: req.Memory, Disk: req.Disk,
		NoStart: req.NoStart, RemoveOnRelease: req.RemoveOnRelease,
		ReadyAgent: req.Ready == bangerv1.Ready_READY_AGENT, Repository: req.Repository,
		User: owner, Owner: owner.UID, Network: networkRequest(req.Network, c.Network), DefaultPreset: req.Network.GetPreset() == "",
	}
	if r.Image == "" {
		r.Image = c.Image
	}
	if r.CPUs == 0 {
		r.CPUs = c.CPUs
	}
	if r.Memory == 0 {
		r.Memory = c.Memory
	}
	if r.Disk == 0 {
		r.Disk = c.Disk
	}
	return r, nil
}

func (s vmService) Start(ctx context.Context, req *bangerv1.StartVMRequest) (*bangerv1.Operation, error) {
	readyAgent := req.Ready == bangerv1.Ready_READY_AGENT
	return s.begin(ctx, req.Ref, true, opstate.VerbStart, func(ctx context.Context, id string, op *operation) error {
		_, err := s.d.vms.Start(ctx, id, readyAgent, op)
		return err
	})
}

func (s vmService) Stop(ctx context.Context, req *bangerv1.StopVMRequest) (*bangerv1.Operation, error) {
	verb, timeout := opstate.VerbStop, time.Duration(-1)
	switch s := req.TimeoutSeconds; {
	case s < 0:
		verb = opstate.VerbKill
	case s <= maxStopTimeout.Seconds():
		timeout = time.Duration(s * float64(time.Second))
	default: // NaN too
		return nil, api.Errorf(api.Invalid, "a guest may take at most %s to shut down", maxStopTimeout).WithHint("banger stop --help")
	}
	return s.begin(ctx, req.Ref, true, verb, func(ctx context.Context, id string, op *operation) error {
		_, err := s.d.vms.Stop(ctx, id, timeout, op)
		return err
	})
}

// maxStopTimeout is longer than anybody waits.
const maxStopTimeout = 24 * time.Hour

func (s vmService) Delete(ctx context.Context, req *bangerv1.DeleteVMRequest) (*bangerv1.Operation, error) {
	return s.begin(ctx, req.Ref, false, opstate.VerbDelete, func(ctx context.Context, id string, op *operation) error {
		if err := s.d.vms.Delete(ctx, id, req.Force, op); err != nil {
			return err
		}
		s.d.prune(ctx)
		return nil
	})
}

// begin runs work on one VM as an operation, or answers with the one that runs the
// same verb already.
func (s vmService) begin(ctx context.Context, ref string, prefix bool, verb opstate.Verb,
	work func(ctx context.Context, id string, op *operation) error) (*bangerv1.Operation, error) {
	rec, err := s.d.vms.Resolve(ctx, ref, prefix)
	if err != nil {
		return nil, err
	}
	if running, opID, ok := s.d.vms.Current(rec.ID); ok && running == verb && opID != "" {
		if op, ok := s.d.ops.Get(opID); ok {
			return operationMessage(op), nil
		}
	}
	return s.d.begin(string(verb), rec.Name, func(ctx context.Context, op *operation) (proto.Message, error) {
		if err := work(ctx, rec.ID, op); err != nil || verb == opstate.VerbDelete {
			return nil, err
		}
		shown, err := s.shown(ctx, rec.ID)
		if api.CodeOf(err) == api.NotFound {
			return nil, nil // a stop that took over a create, which undid itself
		}
		return shown, err
	})
}

func (s vmService) shown(ctx context.Context, id string) (proto.Message, error) {
	v, err := s.d.vms.Show(ctx, id)
	if err != nil {
		return nil, err
	}
	return vmMessage(v), nil
}

func (s vmService) Hold(ctx context.Context, req *bangerv1.HoldVMRequest, stream *connect.ServerStream[bangerv1.HoldVMEvent]) error {
	rec, err := s.d.vms.Resolve(ctx, req.Ref, false)
	if err != nil {
		return err
	}
	detach, err := s.d.attach()
	if err != nil {
		return err
	}
	defer detach()
	return s.d.vms.Hold(ctx, rec.ID, func() error { return stream.Send(&bangerv1.HoldVMEvent{}) })
}

// peerUser is the account of who calls, which the guest gets too.
func peerUser(ctx context.Context) (store.User, error) {
	cred := peerFrom(ctx)
	u := store.User{Name: "root", UID: int(cred.Uid), GID: int(cred.Gid)}
	if cred.Uid == 0 {
		return u, nil
	}
	account, err := user.LookupId(strconv.Itoa(u.UID))
	if err != nil {
		// An account that no database names, as in a container: the guest maps it.
		u.Name = "user"
		return u, nil
	}
	u.Name = account.Username
	return u, nil
}

func vmMessage(v vm.View) *bangerv1.VM {
	m := &bangerv1.VM{
		Id: v.ID, Name: v.Name, State: stateMessage(v.State), Image: v.Image, Kernel: v.Kernel,
		Cpus: int32(v.CPUs), Memory: v.Memory, Disk: v.Disk, CreatedAt: timestamppb.New(v.CreatedAt),
		LastError: v.LastError, Problem: v.Problem, User: cmp.Or(v.ExecUser, v.User.Name), RemoveOnRelease: v.RemoveOnRelease,
		Handles: v.Handles, Ended: v.Ended, Network: networkMessage(v.Network), Traffic: trafficMessage(v.Traffic),
	}
	if v.Workspace != nil {
		m.Workspace = workspaceMessage(*v.Workspace)
	}
	return m
}

func stateMessage(s store.State) bangerv1.VM_State {
	switch s {
	case store.Creating:
		return bangerv1.VM_CREATING
	case store.Stopped:
		return bangerv1.VM_STOPPED
	case store.Starting:
		return bangerv1.VM_STARTING
	case store.Running:
		return bangerv1.VM_RUNNING
	case store.Stopping:
		return bangerv1.VM_STOPPING
	case store.Deleting:
		return bangerv1.VM_DELETING
	case store.Failed:
		return bangerv1.VM_FAILED
	}
	return bangerv1.VM_STATE_UNSPECIFIED
}

func workspaceMessage(w store.Workspace) *bangerv1.Workspace {
	m := &bangerv1.Workspace{
		HostPath: w.HostPath, GuestPath: w.GuestPath, Head: w.Head,
		PreparedAt: timestamppb.New(w.PreparedAt), Changes: int32(w.Changes),
	}
	if !w.ChangesAt.IsZero() {
		m.ChangesAt = timestamppb.New(w.ChangesAt)
	}
	return m
}

package cli

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/config"
	"banger/internal/guest/wire"
)

// now is what the tests' clock shows.
func now() time.Time { return time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC) }

// fakeDaemon answers the API over a real socket. It keeps VMs by name, and a test says
// how operations and commands go. It notes each request as text.
type fakeDaemon struct {
	t      testing.TB
	layout config.Layout
	server *http.Server

	mu       sync.Mutex
	conns    []net.Conn
	status   *bangerv1.StatusResponse
	vms      map[string]*bangerv1.VM
	found    func(path string) (*bangerv1.FindWorkspaceResponse, error)
	prepared *bangerv1.Prepared
	refuse   map[string]error          // by method, for example "create"
	ending   func(method string) error // asked by status, exec and what begins; may be nil
	script   map[string]func(op *fakeOp)
	ops      map[string]*fakeOp
	calls    []string
	holds    int // streams that hold a lease now
	patch    []*bangerv1.ExportChunk
	exported func(ctx context.Context) error // called when all of patch was sent; may be nil
	images   []*bangerv1.Image
	kernels  []*bangerv1.Kernel
	exec     func(x wire.Exec, s *guestEnd)
	net      fakeNet
	stopped  chan struct{} // closed when it ends after a Shutdown
	leaving  int           // after a Shutdown: so many Status calls until it ends
}

// fakeOp is an operation that the test drives.
type fakeOp struct {
	d         *fakeDaemon
	cancelled chan struct{}
	mu        sync.Mutex
	m         *bangerv1.Operation
	changed   chan struct{}
}

func (o *fakeOp) set(change func(m *bangerv1.Operation)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := proto.Clone(o.m).(*bangerv1.Operation)
	change(m)
	o.m = m
	close(o.changed)
	o.changed = make(chan struct{})
}

func (o *fakeOp) get() (*bangerv1.Operation, <-chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.m, o.changed
}

func (o *fakeOp) step(k, n int32, name string) {
	o.set(func(m *bangerv1.Operation) { m.Step, m.Steps, m.StepName, m.BytesDone, m.BytesTotal = k, n, name, 0, 0 })
}

func (o *fakeOp) fail(code api.Code, message, hint string) {
	o.set(func(m *bangerv1.Operation) {
		m.State, m.Error = bangerv1.Operation_FAILED, &bangerv1.ErrorDetail{Code: string(code), Message: message, Hint: hint}
		m.Result = nil
	})
}

// undo waits until somebody cancels, and ends as cancelled.
func (o *fakeOp) undo() {
	<-o.cancelled
	o.set(func(m *bangerv1.Operation) {
		m.State, m.Result = bangerv1.Operation_CANCELLED, nil
		m.Error = &bangerv1.ErrorDetail{Code: string(api.Cancelled), Message: "cancelled"}
	})
}

// newFake makes a daemon on a state directory of its own. It serves at once.
func newFake(t testing.TB) *fakeDaemon {
	t.Helper()
	root := filepath.Join(t.TempDir(), "state")
	d := &fakeDaemon{
		t: t, layout: config.Layout{Root: root},
		status: &bangerv1.StatusResponse{Version: "9.9", Pid: int32(os.Getpid()), StateDir: root, Vmm: "fake", Accelerator: "kvm"},
		vms:    map[string]*bangerv1.VM{}, refuse: map[string]error{}, script: map[string]func(*fakeOp){}, ops: map[string]*fakeOp{},
		stopped: make(chan struct{}),
	}
	if err := d.layout.Prepare(); err != nil {
		t.Fatal(err)
	}
	d.listen()
	t.Cleanup(d.close)
	return d
}

func (d *fakeDaemon) listen() {
	d.t.Helper()
	dir, err := os.Open(d.layout.Root)
	if err != nil {
		d.t.Fatal(err)
	}
	defer dir.Close()
	os.Remove(d.layout.Socket())
	ln, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(d.layout.Socket())))
	if err != nil {
		d.t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	mux := http.NewServeMux()
	opts := connect.WithInterceptors(toConnect{})
	mux.Handle(bangerv1connect.NewMachineHandler(fakeMachine{d}, opts))
	mux.Handle(bangerv1connect.NewVMsHandler(fakeVMs{d}, opts))
	mux.Handle(bangerv1connect.NewWorkspacesHandler(fakeWorkspaces{d}, opts))
	mux.Handle(bangerv1connect.NewImagesHandler(fakeImages{d}, opts))
	mux.Handle(bangerv1connect.NewKernelsHandler(fakeKernels{d}, opts))
	mux.Handle(bangerv1connect.NewOperationsHandler(fakeOperations{d}, opts))
	mux.HandleFunc("/v1/exec", d.serveExec)
	mux.HandleFunc("/v1/dial", d.serveDial)
	server := &http.Server{Handler: mux}
	d.mu.Lock()
	d.server = server
	d.mu.Unlock()
	go server.Serve(noting{ln, d})
}

// noting is a listener that keeps what it accepts.
type noting struct {
	net.Listener
	d *fakeDaemon
}

func (l noting) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.d.mu.Lock()
		defer l.d.mu.Unlock()
		l.d.conns = append(l.d.conns, conn)
	}
	return conn, err
}

// drop breaks every connection but exec streams, and goes on listening, as when a daemon was killed and
// the next one is there already.
func (d *fakeDaemon) drop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, conn := range d.conns {
		conn.Close()
	}
	d.conns = nil
}

// close ends the daemon.
func (d *fakeDaemon) close() {
	d.mu.Lock()
	server := d.server
	d.mu.Unlock()
	server.Close()
	d.drop()
	os.Remove(d.layout.Socket())
}

func (d *fakeDaemon) note(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, fmt.Sprintf(format, args...))
}

// called returns what was asked for, without Status and Find.
func (d *fakeDaemon) called() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return strings.Join(d.calls, "\n")
}

func (d *fakeDaemon) add(vm *bangerv1.VM) *bangerv1.VM {
	d.mu.Lock()
	defer d.mu.Unlock()
	if vm.Id == "" {
		vm.Id = "id-" + vm.Name
	}
	if vm.CreatedAt == nil {
		vm.CreatedAt = timestamppb.New(now().Add(-2 * time.Hour))
	}
	d.vms[vm.Name] = vm
	return vm
}

func (d *fakeDaemon) begin(method, target string, result func(m *bangerv1.Operation)) (*bangerv1.Operation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.refuse[method]; err != nil {
		return nil, err
	}
	if err := d.askEndingLocked(method); err != nil {
		return nil, err
	}
	id := fmt.Sprintf("op%d", len(d.ops)+1)
	op := &fakeOp{d: d, cancelled: make(chan struct{}), changed: make(chan struct{}), m: &bangerv1.Operation{
		Id: id, Kind: method, Target: target, State: bangerv1.Operation_RUNNING, CreatedAt: timestamppb.New(now())}}
	d.ops[id] = op
	script := d.script[method]
	first := proto.Clone(op.m).(*bangerv1.Operation)
	go func() {
		if script != nil {
			script(op)
		}
		if m, _ := op.get(); m.State != bangerv1.Operation_RUNNING {
			if m.State == bangerv1.Operation_DONE && result != nil {
				op.set(result)
			}
			return
		}
		op.set(func(m *bangerv1.Operation) {
			m.State = bangerv1.Operation_DONE
			if result != nil {
				result(m)
			}
		})
	}()
	return first, nil
}

func (d *fakeDaemon) askEndingLocked(method string) error {
	if d.ending == nil {
		return nil
	}
	return d.ending(method)
}

func (d *fakeDaemon) resolve(ref string) (*bangerv1.VM, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, vm := range d.vms {
		if vm.Name == ref || vm.Id == ref {
			return vm, nil
		}
	}
	return nil, api.Errorf(api.NotFound, "no VM named %s", ref).WithHint("banger ps")
}

// toConnect attaches the ErrorDetail, as the daemon does.
type toConnect struct{}

func wireError(err error) error {
	if err == nil {
		return nil
	}
	var e *api.Error
	if !errors.As(err, &e) {
		return err
	}
	ce := connect.NewError(connect.CodeInternal, errors.New(e.Message))
	d, _ := connect.NewErrorDetail(&bangerv1.ErrorDetail{Code: string(e.Code), Message: e.Message, Hint: e.Hint})
	ce.AddDetail(d)
	return ce
}

func (toConnect) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := next(ctx, req)
		return res, wireError(err)
	}
}
func (toConnect) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}
func (toConnect) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error { return wireError(next(ctx, conn)) }
}

type fakeMachine struct{ d *fakeDaemon }

func (s fakeMachine) Status(context.Context, *bangerv1.StatusRequest) (*bangerv1.StatusResponse, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if err := s.d.askEndingLocked("status"); err != nil {
		return nil, err
	}
	if s.d.leaving > 0 {
		if s.d.leaving--; s.d.leaving == 0 {
			close(s.d.stopped)
			go s.d.close()
		}
	}
	return proto.Clone(s.d.status).(*bangerv1.StatusResponse), nil
}

func (s fakeMachine) Shutdown(_ context.Context, req *bangerv1.ShutdownRequest) (*bangerv1.ShutdownResponse, error) {
	s.d.note("shutdown if_idle=%v", req.IfIdle)
	if req.IfIdle && s.d.status.BusyOperations > 0 {
		return nil, api.Errorf(api.Busy, "the daemon is busy")
	}
	if s.d.ending != nil {
		return &bangerv1.ShutdownResponse{}, nil // it is about to end already
	}
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.d.leaving = 3
	return &bangerv1.ShutdownResponse{}, nil
}

func (s fakeMachine) Doctor(context.Context, *bangerv1.DoctorRequest) (*bangerv1.DoctorResponse, error) {
	return nil, errors.New("not here")
}

type fakeVMs struct{ d *fakeDaemon }

func (s fakeVMs) List(context.Context, *bangerv1.ListVMsRequest) (*bangerv1.ListVMsResponse, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	res := &bangerv1.ListVMsResponse{}
	for _, name := range sortedKeys(s.d.vms) {
		res.Vms = append(res.Vms, s.d.vms[name])
	}
	return res, nil
}

func (s fakeVMs) Show(ctx context.Context, req *bangerv1.ShowVMRequest) (*bangerv1.VM, error) {
	s.d.note("show %s", req.Ref)
	vm, err := s.d.resolve(req.Ref)
	if err == nil && s.d.net.show != nil {
		return s.d.net.show(ctx, vm)
	}
	return vm, err
}

func (s fakeVMs) Create(_ context.Context, req *bangerv1.CreateVMRequest) (*bangerv1.Operation, error) {
	s.d.note("create %s", text(req))
	name := req.Name
	if name == "" {
		name = orElse(req.NameHint, "quiet-fox")
	}
	vm := &bangerv1.VM{Id: "id-" + name, Name: name, Image: orElse(req.Image, "debian-bookworm"), Cpus: 4, Memory: 4 << 30, Disk: 20 << 30,
		State: bangerv1.VM_RUNNING, RemoveOnRelease: req.RemoveOnRelease, Network: req.Network}
	return s.d.begin("create", name, func(m *bangerv1.Operation) {
		s.d.add(vm)
		m.Result = &bangerv1.Operation_Vm{Vm: vm}
	})
}

func (s fakeVMs) change(method, ref string, state bangerv1.VM_State) (*bangerv1.Operation, error) {
	vm, err := s.d.resolve(ref)
	if err != nil {
		return nil, err
	}
	return s.d.begin(method, vm.Name, func(m *bangerv1.Operation) {
		vm := proto.Clone(vm).(*bangerv1.VM)
		vm.State = state
		s.d.add(vm)
		m.Result = &bangerv1.Operation_Vm{Vm: vm}
	})
}

func (s fakeVMs) Start(_ context.Context, req *bangerv1.StartVMRequest) (*bangerv1.Operation, error) {
	s.d.note("start %s", text(req))
	return s.change("start", req.Ref, bangerv1.VM_RUNNING)
}

func (s fakeVMs) Stop(_ context.Context, req *bangerv1.StopVMRequest) (*bangerv1.Operation, error) {
	s.d.note("stop %s", text(req))
	return s.change("stop", req.Ref, bangerv1.VM_STOPPED)
}

func (s fakeVMs) Delete(_ context.Context, req *bangerv1.DeleteVMRequest) (*bangerv1.Operation, error) {
	s.d.note("delete %s holds:%d", text(req), s.d.holding())
	vm, err := s.d.resolve(req.Ref)
	if err != nil {
		return nil, err
	}
	return s.d.begin("delete", vm.Name, func(*bangerv1.Operation) {
		s.d.mu.Lock()
		defer s.d.mu.Unlock()
		delete(s.d.vms, vm.Name)
	})
}

func (d *fakeDaemon) holding() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.holds
}

func (s fakeVMs) Hold(ctx context.Context, req *bangerv1.HoldVMRequest, stream *connect.ServerStream[bangerv1.HoldVMEvent]) error {
	s.d.note("hold %s", req.Ref)
	if _, err := s.d.resolve(req.Ref); err != nil {
		return err
	}
	s.d.mu.Lock()
	s.d.holds++
	s.d.mu.Unlock()
	defer func() {
		s.d.mu.Lock()
		defer s.d.mu.Unlock()
		s.d.holds--
	}()
	if err := stream.Send(&bangerv1.HoldVMEvent{}); err != nil {
		return err
	}
	<-ctx.Done()
	return ctx.Err()
}

type fakeWorkspaces struct{ d *fakeDaemon }

func (s fakeWorkspaces) Find(_ context.Context, req *bangerv1.FindWorkspaceRequest) (*bangerv1.FindWorkspaceResponse, error) {
	if s.d.found == nil {
		return nil, api.Errorf(api.Refused, "%s lies in no git repository", req.Path).WithHint("git init")
	}
	return s.d.found(req.Path)
}

func (s fakeWorkspaces) Prepare(_ context.Context, req *bangerv1.PrepareWorkspaceRequest) (*bangerv1.Operation, error) {
	s.d.note("prepare %s", text(req))
	return s.d.begin("prepare", req.Ref, func(m *bangerv1.Operation) { m.Result = &bangerv1.Operation_Prepared{Prepared: s.d.prepared} })
}

func (s fakeWorkspaces) Export(ctx context.Context, req *bangerv1.ExportWorkspaceRequest, stream *connect.ServerStream[bangerv1.ExportChunk]) error {
	s.d.note("export %s", text(req))
	s.d.mu.Lock()
	err := s.d.askEndingLocked("export")
	s.d.mu.Unlock()
	if err != nil {
		return err
	}
	if len(s.d.patch) == 0 {
		return stream.Send(&bangerv1.ExportChunk{Meta: &bangerv1.ExportMeta{Notes: []string{"a note"}}})
	}
	for _, chunk := range s.d.patch {
		if err := stream.Send(chunk); err != nil {
			return err
		}
	}
	if s.d.exported != nil {
		return s.d.exported(ctx)
	}
	return s.d.refuse["export"]
}

type fakeImages struct{ d *fakeDaemon }

func (s fakeImages) List(context.Context, *bangerv1.ListImagesRequest) (*bangerv1.ListImagesResponse, error) {
	return &bangerv1.ListImagesResponse{Images: s.d.images}, nil
}

func (s fakeImages) Pull(_ context.Context, req *bangerv1.PullImageRequest) (*bangerv1.Operation, error) {
	s.d.note("image pull %s", text(req))
	return s.d.begin("pull", req.Name, func(m *bangerv1.Operation) {
		m.Result = &bangerv1.Operation_Image{Image: &bangerv1.Image{Name: orElse(req.Name, "debian-bookworm")}}
	})
}

type fakeKernels struct{ d *fakeDaemon }

func (s fakeKernels) List(context.Context, *bangerv1.ListKernelsRequest) (*bangerv1.ListKernelsResponse, error) {
	return &bangerv1.ListKernelsResponse{Kernels: s.d.kernels}, nil
}

func (s fakeKernels) Pull(_ context.Context, req *bangerv1.PullKernelRequest) (*bangerv1.Operation, error) {
	s.d.note("kernel pull %s", text(req))
	return s.d.begin("pull", req.Name, func(m *bangerv1.Operation) {
		m.Result = &bangerv1.Operation_Kernel{Kernel: &bangerv1.Kernel{Name: orElse(req.Name, "debian-cloud")}}
	})
}

type fakeOperations struct{ d *fakeDaemon }

func (s fakeOperations) find(id string) (*fakeOp, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	if op := s.d.ops[id]; op != nil {
		return op, nil
	}
	return nil, api.Errorf(api.NotFound, "no operation %s", id).WithHint("banger op ls")
}

func (s fakeOperations) List(context.Context, *bangerv1.ListOperationsRequest) (*bangerv1.ListOperationsResponse, error) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	res := &bangerv1.ListOperationsResponse{}
	for _, id := range sortedKeys(s.d.ops) {
		m, _ := s.d.ops[id].get()
		res.Operations = append(res.Operations, m)
	}
	return res, nil
}

func (s fakeOperations) Watch(ctx context.Context, req *bangerv1.WatchOperationRequest, stream *connect.ServerStream[bangerv1.Operation]) error {
	op, err := s.find(req.Id)
	if err != nil {
		return err
	}
	for {
		m, changed := op.get()
		if err := stream.Send(m); err != nil || m.State != bangerv1.Operation_RUNNING {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s fakeOperations) Cancel(_ context.Context, req *bangerv1.CancelOperationRequest) (*bangerv1.CancelOperationResponse, error) {
	s.d.note("cancel %s", req.Id)
	op, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	close(op.cancelled)
	return &bangerv1.CancelOperationResponse{}, nil
}

package daemon

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/opstate"
)

// operation is one asynchronous job; its result is a VM, Image, Kernel or Prepared,
// or nil.
type operation = opstate.Op[proto.Message]

// How many finished operations are remembered, and for how long.
const (
	keepOperations    = 100
	keepOperationsFor = time.Hour
)

// begin runs fn as an operation. What fails by a defect of banger goes to the log.
func (d *Daemon) begin(kind, target string, fn func(ctx context.Context, op *operation) (proto.Message, error)) (*bangerv1.Operation, error) {
	d.entry.Lock()
	if d.ending {
		d.entry.Unlock()
		return nil, errStopping
	}
	op := d.ops.Begin(kind, target, fn)
	d.entry.Unlock()
	go func() {
		<-op.Done()
		err := op.Snapshot().Err
		if err == nil || asAPIError(err).Code != api.Internal {
			return
		}
		var panicked *opstate.PanicError
		if errors.As(err, &panicked) {
			d.log.Error("an operation panicked", "kind", kind, "target", target, "err", err, "stack", string(panicked.Stack))
			return
		}
		d.log.Error("an operation failed", "kind", kind, "target", target, "err", err)
	}()
	return operationMessage(op), nil
}

type operationService struct{ d *Daemon }

func (s operationService) List(ctx context.Context, _ *bangerv1.ListOperationsRequest) (*bangerv1.ListOperationsResponse, error) {
	res := &bangerv1.ListOperationsResponse{}
	for _, op := range s.d.ops.List() {
		res.Operations = append(res.Operations, operationMessage(op))
	}
	return res, nil
}

func (s operationService) find(id string) (*operation, error) {
	op, ok := s.d.ops.Get(id)
	if !ok {
		return nil, api.Errorf(api.NotFound, "no operation %s", id).WithHint("banger op ls")
	}
	return op, nil
}

func (s operationService) Watch(ctx context.Context, req *bangerv1.WatchOperationRequest, stream *connect.ServerStream[bangerv1.Operation]) error {
	op, err := s.find(req.Id)
	if err != nil {
		return err
	}
	for {
		changed := op.Changed()
		m := operationMessage(op)
		if err := stream.Send(m); err != nil {
			return err
		}
		if m.State != bangerv1.Operation_RUNNING {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (s operationService) Cancel(ctx context.Context, req *bangerv1.CancelOperationRequest) (*bangerv1.CancelOperationResponse, error) {
	op, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	op.Cancel()
	return &bangerv1.CancelOperationResponse{}, nil
}

func operationMessage(op *operation) *bangerv1.Operation {
	s := op.Snapshot()
	m := &bangerv1.Operation{
		Id: s.ID, Kind: s.Kind, Target: s.Target, Step: int32(s.Step), Steps: int32(s.Steps),
		StepName: s.StepName, BytesDone: s.BytesDone, BytesTotal: s.BytesTotal,
		CreatedAt: timestamppb.New(s.CreatedAt), Cancelling: s.Cancelling,
	}
	switch s.State {
	case opstate.Running:
		m.State = bangerv1.Operation_RUNNING
	case opstate.Done:
		m.State = bangerv1.Operation_DONE
	case opstate.Cancelled:
		m.State = bangerv1.Operation_CANCELLED
	default:
		m.State = bangerv1.Operation_FAILED
	}
	if !s.FinishedAt.IsZero() {
		m.FinishedAt = timestamppb.New(s.FinishedAt)
	}
	if s.Err != nil {
		m.Error = errorDetail(s.Err)
		return m
	}
	switch r := s.Result.(type) {
	case *bangerv1.VM:
		m.Result = &bangerv1.Operation_Vm{Vm: r}
	case *bangerv1.Image:
		m.Result = &bangerv1.Operation_Image{Image: r}
	case *bangerv1.Kernel:
		m.Result = &bangerv1.Operation_Kernel{Kernel: r}
	case *bangerv1.Prepared:
		m.Result = &bangerv1.Operation_Prepared{Prepared: r}
	}
	return m
}

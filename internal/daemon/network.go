package daemon

import (
	"cmp"
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/daemon/vm"
	"banger/internal/netwire"
)

func (s vmService) Set(ctx context.Context, req *bangerv1.SetVMRequest) (*bangerv1.VM, error) {
	v, err := s.d.vms.Set(ctx, req.Ref, vm.SetRequest{
		Preset: req.Preset, Allow: req.Allow, Deny: req.Deny, Forget: req.Forget,
		Publish: req.Publish, Unpublish: req.Unpublish,
	})
	if err != nil {
		return nil, err
	}
	return vmMessage(v), nil
}

func (s vmService) NetworkLog(ctx context.Context, req *bangerv1.NetworkLogRequest, stream *connect.ServerStream[bangerv1.NetworkLogEntry]) error {
	return s.d.vms.NetworkLog(ctx, req.Ref, req.Follow, func(e netwire.Entry) error {
		return stream.Send(&bangerv1.NetworkLogEntry{
			At: timestamppb.New(e.At), Protocol: e.Protocol, Target: e.Target, Name: e.Name,
			Reason: e.Reason, Rule: e.Rule, Count: max(e.Count, 1), Hint: e.Hint, Event: e.Event,
		})
	})
}

func (s vmService) Ports(ctx context.Context, req *bangerv1.PortsRequest) (*bangerv1.PortsResponse, error) {
	ports, unasked, err := s.d.vms.Ports(ctx, req.Ref)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.PortsResponse{Error: unasked}
	for _, p := range ports {
		res.Ports = append(res.Ports, &bangerv1.Port{
			Protocol: p.Protocol, GuestAddress: p.GuestAddress, GuestPort: int32(p.GuestPort),
			Process: p.Process, Published: p.Published,
		})
	}
	return res, nil
}

// networkRequest is the network of a new VM. The preset that is left out is config.toml's.
func networkRequest(n *bangerv1.Network, preset string) netwire.Network {
	return netwire.Network{
		Preset: cmp.Or(n.GetPreset(), preset), Allow: n.GetAllow(), Deny: n.GetDeny(), Publish: n.GetPublish(),
	}
}

func networkMessage(n netwire.Network) *bangerv1.Network {
	return &bangerv1.Network{Preset: n.Preset, Allow: n.Allow, Deny: n.Deny, Publish: n.Publish}
}

// trafficMessage is nil for nil.
func trafficMessage(s *netwire.Stats) *bangerv1.Traffic {
	if s == nil {
		return nil
	}
	return &bangerv1.Traffic{
		Refused: s.Refused, Connections: int32(s.Connections), Sent: s.Sent, Received: s.Received, Problem: s.Problem,
	}
}

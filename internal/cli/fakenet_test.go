package cli

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"net/http"
	"strings"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// fakeNet is what the fake daemon knows of networks.
type fakeNet struct {
	entries []*bangerv1.NetworkLogEntry
	// more sends what a follower gets after entries; nil: nothing more comes.
	more  func(ctx context.Context, send func(*bangerv1.NetworkLogEntry) error) error
	ports *bangerv1.PortsResponse
	show  func(ctx context.Context, vm *bangerv1.VM) (*bangerv1.VM, error) // may be nil
	dial  func(d wire.Dial, g *guestEnd)
}

// Set adds only, which is enough to see what was asked for.
func (s fakeVMs) Set(_ context.Context, req *bangerv1.SetVMRequest) (*bangerv1.VM, error) {
	s.d.note("set %s", text(req))
	vm, err := s.d.resolve(req.Ref)
	if err != nil {
		return nil, err
	}
	if err := s.d.refuse["set"]; err != nil {
		return nil, err
	}
	vm = proto.Clone(vm).(*bangerv1.VM)
	if vm.Network == nil {
		vm.Network = &bangerv1.Network{Preset: "internet"}
	}
	vm.Network.Preset = orElse(req.Preset, vm.Network.Preset)
	vm.Network.Allow = append(vm.Network.Allow, req.Allow...)
	vm.Network.Deny = append(vm.Network.Deny, req.Deny...)
	vm.Network.Publish = append(vm.Network.Publish, req.Publish...)
	return s.d.add(vm), nil
}

func (s fakeVMs) NetworkLog(ctx context.Context, req *bangerv1.NetworkLogRequest, stream *connect.ServerStream[bangerv1.NetworkLogEntry]) error {
	s.d.note("networklog %s", text(req))
	s.d.mu.Lock()
	err, entries, more := s.d.askEndingLocked("networklog"), s.d.net.entries, s.d.net.more
	s.d.mu.Unlock()
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := stream.Send(e); err != nil {
			return err
		}
	}
	if req.Follow && more != nil {
		return more(ctx, stream.Send)
	}
	return nil
}

func (s fakeVMs) Ports(_ context.Context, req *bangerv1.PortsRequest) (*bangerv1.PortsResponse, error) {
	s.d.note("ports %s", text(req))
	return s.d.net.ports, nil
}

func (d *fakeDaemon) serveDial(w http.ResponseWriter, r *http.Request) {
	d.serveStream(w, r, func(vm *bangerv1.VM, req wire.Request, g *guestEnd) {
		if req.Op != wire.OpDial || req.Dial == nil || !req.Acks {
			d.t.Errorf("the first frame asks for %+v", req)
			return
		}
		d.note("dial %s %s %s", vm.Name, req.Dial.Network, req.Dial.Address)
		d.net.dial(*req.Dial, g)
	})
}

func (g *guestEnd) outEOF() { wire.WriteFrame(g.conn, wire.KindStdoutEOF, nil) }

// answer answers as a service that gets all and then gives answer(all), in pieces and
// within the window.
func (g *guestEnd) answer(answer func(string) string) {
	rest := answer(g.stdin())
	free := wire.StdinWindow
	for len(rest) > 0 {
		n := min(len(rest), 10_000, free)
		if n > 0 && g.out(rest[:n]) != nil {
			return
		}
		rest, free = rest[n:], free-n
		for free < 10_000 && len(rest) > 0 {
			kind, payload, err := g.next()
			if err != nil {
				return
			}
			if kind == wire.KindStdoutAck {
				free += int(binary.BigEndian.Uint32([]byte(payload)))
			}
		}
	}
	g.outEOF()
	g.exit(0)
}

// jsonLines cuts a text of several JSON objects, one a line.
func jsonLines[T any](text string) (out []T, err error) {
	for line := range strings.Lines(text) {
		var v T
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

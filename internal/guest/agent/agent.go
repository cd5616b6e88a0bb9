// Package agent answers the host inside the guest: it runs commands, moves trees
// and tells how far the system is, one wire.Request per stream.
//
// It is handed streams (Handle, or Serve over the guest's port) and keeps nothing
// between them. What needs the rights of a user runs in a child process with these
// rights, and only there; moving a tree is such a child too, the program run once
// more, so every main that has an agent begins with RunChild. Each command is the
// leader of a session and process group of its own, and is waited for by its pid
// alone: the agent reaps nothing else.
//
// A slow reader blocks the command, never fills memory: output is read only as fast
// as the stream takes it, input is bounded by wire.StdinWindow.
package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"banger/internal/guest/wire"
)

const (
	// requestTimeout bounds the time between the opening of a stream and its request.
	requestTimeout = 30 * time.Second
	// maxStreams bounds the requests served at a time. It is below yamux's backlog of
	// 256, so that the one too many gets an answer.
	maxStreams = 128
	// maxDials bounds the connections to services, which are counted apart: they may be
	// many and last, and must not keep the host from anything else. Each holds up to
	// wire.StdinWindow bytes.
	maxDials = 256
)

// System is the machine around the agent.
type System interface {
	// Ready waits until the system is up, or ctx ends.
	Ready(ctx context.Context) (wire.Ready, error)
	// Shutdown begins to take the machine down; verb is "poweroff" or "reboot".
	Shutdown(verb string) error
	// SetClock sets the wall clock.
	SetClock(t time.Time) error
}

// Options are what an agent needs to know.
type Options struct {
	Config wire.Config
	System System
	// Root is where etc/passwd, etc/group, etc/environment and, for what listens, proc
	// are read; empty means "/". Nothing else is looked for below it.
	Root string
}

// Agent serves requests. Make it with New.
type Agent struct {
	opts  Options
	slots chan struct{}
	dials chan struct{}
}

// New makes an agent.
func New(o Options) *Agent {
	if o.Root == "" {
		o.Root = "/"
	}
	return &Agent{opts: o, slots: make(chan struct{}, maxStreams), dials: make(chan struct{}, maxDials)}
}

// Serve serves the hosts that come to port until reading it fails.
func (a *Agent) Serve(port io.ReadWriteCloser) error {
	return wire.ServeGuest(port, a.opts.Config.Magic, a.Handle)
}

// Handle serves one stream and closes it.
func (a *Agent) Handle(conn net.Conn) {
	s := wire.NewStream(conn)
	defer s.Close()
	select {
	case a.slots <- struct{}{}:
	default:
		refuse(s, refusal(wire.ErrOverloaded, "the guest serves %d requests already", maxStreams))
		return
	}
	release := sync.OnceFunc(func() { <-a.slots })
	defer release()
	defer func() {
		// One bad request must not end the agent.
		if r := recover(); r != nil {
			refuse(s, refusal(wire.ErrInternal, "the agent failed: %v", r))
		}
	}()

	conn.SetReadDeadline(time.Now().Add(requestTimeout))
	kind, payload, err := s.Recv()
	if err != nil {
		return
	}
	conn.SetReadDeadline(time.Time{})
	var req wire.Request
	if kind != wire.KindRequest || json.Unmarshal(payload, &req) != nil {
		refuse(s, refusal(wire.ErrInvalid, "the stream does not begin with a request"))
		return
	}
	if err := a.serve(s, req, release); err != nil {
		refuse(s, err)
	}
}

// serve answers one request. An error is answered by the caller. release gives the
// request's slot back early.
func (a *Agent) serve(s *wire.Stream, req wire.Request, release func()) error {
	switch req.Op {
	case wire.OpHello:
		return s.SendJSON(wire.KindReply, a.hello(req.Nonce))
	case wire.OpReady:
		return a.ready(s)
	case wire.OpExec:
		return a.exec(s, req.Exec, req.Acks)
	case wire.OpUntar, wire.OpTar:
		return a.tree(s, req)
	case wire.OpShutdown:
		return a.shutdown(s, req.Shutdown)
	case wire.OpClock:
		if req.Clock == nil {
			return refusal(wire.ErrInvalid, "the clock's time is missing")
		}
		if err := a.opts.System.SetClock(time.Unix(0, req.Clock.UnixNano)); err != nil {
			return fmt.Errorf("cannot set the clock: %w", err)
		}
		return s.SendJSON(wire.KindReply, struct{}{})
	case wire.OpDial:
		return a.dial(s, req.Dial, release)
	case wire.OpPorts:
		return a.ports(s)
	}
	return refusal(wire.ErrUnknownOp, "the guest does not know the request %q", req.Op)
}

func (a *Agent) hello(nonce string) wire.Hello {
	h := wire.Hello{
		ProtocolMin: wire.ProtocolMin,
		ProtocolMax: wire.ProtocolMax,
		ID:          a.opts.Config.Identity.ID,
		Nonce:       nonce,
	}
	if id, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		h.BootID = strings.TrimSpace(string(id))
	}
	if u, err := a.account(""); err == nil {
		h.User, h.Home = u.name, u.home
	}
	return h
}

func (a *Agent) ready(s *wire.Stream) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		s.Recv() // nothing is due: it ends with the stream
		cancel()
	}()
	r, err := a.opts.System.Ready(ctx)
	if err != nil {
		return fmt.Errorf("cannot tell whether the system is ready: %w", err)
	}
	return s.SendJSON(wire.KindReply, r)
}

func (a *Agent) shutdown(s *wire.Stream, r *wire.Shutdown) error {
	if r == nil || r.Verb != "poweroff" && r.Verb != "reboot" {
		return refusal(wire.ErrInvalid, "the guest can be asked for poweroff or reboot")
	}
	// The host may hang up as soon as it has read the reply, and yamux tells that as an
	// error of the write: what was asked for is done all the same.
	_ = s.SendJSON(wire.KindReply, struct{}{})
	s.Close()
	return a.opts.System.Shutdown(r.Verb)
}

func refusal(code, format string, args ...any) *wire.Error {
	return &wire.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// refuse ends the stream with err.
func refuse(s *wire.Stream, err error) {
	var e *wire.Error
	if !errors.As(err, &e) {
		e = refusal(wire.ErrInternal, "%v", err)
	}
	const limit = 16 << 10
	if len(e.Message) > limit {
		e = refusal(e.Code, "%s", strings.ToValidUTF8(e.Message[:limit], ""))
	}
	s.SendJSON(wire.KindError, e)
}

// file is the path of one of the system's files.
func (a *Agent) file(name string) string { return filepath.Join(a.opts.Root, name) }

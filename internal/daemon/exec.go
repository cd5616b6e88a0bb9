package daemon

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"banger/api"
	"banger/internal/guest/wire"
)

// streamProtocol is the token of the Upgrade header, see docs/api.md.
const streamProtocol = "banger-stream/1"

// guestStream is an operation of the guest's agent that a client has as a stream of
// frames.
type guestStream struct {
	op string
	// take returns of a client's request what the operation needs; not ok when it lacks it.
	take func(wire.Request) (wire.Request, bool)
	// host and guest are the kinds of frames that pass after the request.
	host, guest []wire.Kind
}

// path is the place of the stream in the API.
func (g guestStream) path() string { return "/v1/" + g.op }

// guestStreams are all there are, see docs/api.md.
func guestStreams() []guestStream { return []guestStream{execStream(), dialStream()} }

// execStream runs one command.
func execStream() guestStream {
	return guestStream{
		op: wire.OpExec,
		take: func(r wire.Request) (wire.Request, bool) {
			return wire.Request{Op: wire.OpExec, Exec: r.Exec, Acks: r.Acks}, r.Exec != nil
		},
		host:  []wire.Kind{wire.KindStdin, wire.KindStdinEOF, wire.KindResize, wire.KindSignal},
		guest: []wire.Kind{wire.KindStarted, wire.KindStdout, wire.KindStderr, wire.KindStdinAck, wire.KindExit, wire.KindError},
	}
}

// serveStream has g with a VM's guest over an upgraded connection. The frames of the
// guest are decoded and bounded here: the guest is hostile, and so may be a client.
func (d *Daemon) serveStream(w http.ResponseWriter, r *http.Request, g guestStream) {
	if r.Method != http.MethodPost || r.Header.Get("Upgrade") != streamProtocol {
		writeError(w, http.StatusUpgradeRequired,
			api.Errorf(api.Invalid, "%s needs POST with Upgrade: %s", g.op, streamProtocol))
		return
	}
	rec, err := d.vms.Resolve(r.Context(), r.URL.Query().Get("vm"), true)
	if err == nil {
		_, err = d.vms.Running(r.Context(), rec.ID)
	}
	if err != nil {
		status := http.StatusConflict
		if api.CodeOf(err) == api.NotFound {
			status = http.StatusNotFound
		}
		writeError(w, status, err)
		return
	}
	detach, err := d.attach()
	if err != nil {
		writeError(w, http.StatusServiceUnavailable, err)
		return
	}
	defer detach()
	client, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		writeError(w, http.StatusInternalServerError, err)
		return
	}
	stream := wire.NewStream(bufferedConn{client, buffered.Reader})
	defer stream.Close()
	fmt.Fprintf(buffered, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", streamProtocol)
	if buffered.Flush() != nil {
		return
	}
	// The request's context ends with the handler only, once hijacked; a client that
	// goes away shows in the relay.
	if err := d.relay(r.Context(), rec.ID, stream, g); err != nil {
		e := asAPIError(err)
		stream.SendJSON(wire.KindError, wire.Error{Code: string(e.Code), Message: e.Message})
	}
}

// firstFrameTimeout bounds the wait for the request of a client that has connected.
const firstFrameTimeout = 10 * time.Second

// bufferedConn is a hijacked connection: what the server has read already comes first.
type bufferedConn struct {
	net.Conn
	in *bufio.Reader
}

func (c bufferedConn) Read(p []byte) (int, error) { return c.in.Read(p) }

// relay passes the frames of one stream on in both directions until the guest has
// sent its last frame or either side is gone. The error is for the client.
func (d *Daemon) relay(ctx context.Context, id string, client *wire.Stream, g guestStream) error {
	first, cancel := context.WithTimeout(ctx, firstFrameTimeout)
	defer cancel()
	stop := client.CloseOn(first)
	kind, payload, err := client.Recv()
	stop()
	if err != nil {
		return nil // the client is gone
	}
	var asked, req wire.Request
	ok := kind == wire.KindRequest && json.Unmarshal(payload, &asked) == nil && asked.Op == g.op
	if ok {
		req, ok = g.take(asked)
	}
	if !ok {
		return api.Errorf(api.Invalid, "the first frame must be a request to %s", g.op)
	}
	conn, err := d.vms.Dial(ctx, id)
	if err != nil {
		return err
	}
	guest := wire.NewStream(conn)
	defer guest.Close()
	if err := guest.SendJSON(wire.KindRequest, req); err != nil {
		return errGuestGone
	}
	go func() {
		// When the client is gone the guest's stream is closed, and the agent ends the
		// command, or resets the service's connection.
		defer guest.Close()
		wire.Relay(guest, client, func(k wire.Kind) bool { return slices.Contains(g.host, k) })
	}()
	sign := d.watchFor(ctx, id, guest)
	var lost *wire.SendError
	_, err = wire.Relay(client, guest, func(k wire.Kind) bool {
		sign.seen()
		return slices.Contains(g.guest, k)
	})
	if err == nil || errors.As(err, &lost) {
		return nil // the client has it all, or is gone
	}
	return cmp.Or(sign.seen(), error(errGuestGone))
}

// signPatience is how long a guest may be silent about a command that it was given before
// it is asked whether it lives: it may have hung just after its last word.
const signPatience = 5 * time.Second

// sign is the wait for the first frame of a guest.
type sign struct {
	timer *time.Timer
	mu    sync.Mutex // a leaf
	came  bool
	err   error // why the stream was closed
}

// watchFor closes stream when no frame comes on it and the guest does not answer a ping
// either.
func (d *Daemon) watchFor(ctx context.Context, id string, stream *wire.Stream) *sign {
	s := &sign{}
	s.timer = time.AfterFunc(signPatience, func() {
		err := d.vms.Ping(ctx, id)
		s.mu.Lock()
		defer s.mu.Unlock()
		if err != nil && !s.came {
			s.err = err
			stream.Close()
		}
	})
	return s
}

// seen ends the wait and returns why the stream was closed, if it was.
func (s *sign) seen() error {
	s.timer.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.came = true
	return s.err
}

var errGuestGone = &api.Error{Code: api.Unresponsive, Message: "the connection to the guest was lost", Hint: "banger ps"}

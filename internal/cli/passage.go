package cli

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// halfConn is a connection of which each half can end first.
type halfConn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
}

// pass leads one local connection to the service in the guest. What fails is one line.
func (f *forward) pass(ctx context.Context, conn net.Conn) {
	local := conn.(halfConn) // of TCP and Unix sockets
	defer local.Close()
	defer context.AfterFunc(ctx, func() { local.Close() })()
	stream, err := f.dial(ctx)
	if err == nil {
		p := &passage{local: local, guest: stream, window: wire.NewWindow()}
		p.held.more.L = &p.held.mu
		err = p.run(ctx)
	}
	if err != nil {
		abort(local)
	}
	if err != nil && ctx.Err() == nil && !errors.Is(err, errLocalGone) {
		f.ui.note("%s:%s: %s", f.vm.Name, f.spec.remote, cleanLine(asError(err).Message))
	}
}

// abort closes a connection so that the client sees that this is no end of the data, if
// the kind of connection can say so.
func abort(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // it fails when the connection is gone
	}
	conn.Close()
}

// dial returns a stream that the service has accepted.
func (f *forward) dial(ctx context.Context) (*wire.Stream, error) {
	conn, r, err := f.client.upgrade(ctx, wire.OpDial, f.vm.Id)
	if f.client.succeeded(ctx, err) {
		conn, r, err = f.client.upgrade(ctx, wire.OpDial, f.vm.Id)
	}
	if err != nil {
		return nil, err
	}
	s := wire.NewStream(bufferedConn{conn, r})
	defer s.CloseOn(ctx)()
	if err = s.SendJSON(wire.KindRequest, wire.Request{Op: wire.OpDial, Dial: &f.spec.dial, Acks: true}); err == nil {
		var kind wire.Kind
		var payload []byte
		if kind, payload, err = s.Recv(); err == nil && kind != wire.KindStarted {
			err = refusal(kind, payload)
		}
	}
	if err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// refusal is what a frame other than the awaited one says.
func refusal(kind wire.Kind, payload []byte) error {
	var e wire.Error
	if kind != wire.KindError || json.Unmarshal(payload, &e) != nil {
		return fmt.Errorf("the guest sent a frame of kind %d", kind)
	}
	return errors.New(e.Message)
}

// bufferedConn is a connection of which in has read some already.
type bufferedConn struct {
	net.Conn
	in *bufio.Reader
}

func (c bufferedConn) Read(p []byte) (int, error) { return c.in.Read(p) }

var (
	errLocalGone = errors.New("the client has gone")
	errBroken    = errors.New("the service broke the connection")
)

// passage is one connection through the agent. Three go side by side, so that neither
// direction waits for the other: run reads the guest's frames and never waits for the
// client; send passes on what the client sends; write gives the client what is held for
// it, which the guest's window bounds.
type passage struct {
	local  halfConn
	guest  *wire.Stream
	window *wire.Window // of what goes to the service
	held   held
}

// run returns when both halves have ended, nil, or one side is gone.
func (p *passage) run(ctx context.Context) error {
	defer p.guest.CloseOn(ctx)()
	sent := make(chan error, 1)
	written := make(chan error, 1)
	go func() { sent <- p.send() }()
	go func() { written <- p.write() }()
	err := p.receive()
	p.held.end(err == nil)
	if err != nil && !errors.Is(err, errBroken) {
		abort(p.local) // also when the client takes nothing, and write waits for it
	}
	if werr := <-written; err == nil || errors.Is(err, errBroken) {
		err = cmp.Or(werr, err)
	}
	p.window.Close()
	p.guest.Close()
	if err != nil {
		abort(p.local)
	}
	p.local.Close()
	if serr := <-sent; serr != nil {
		return serr // it closed the stream, which is all that receive knows
	}
	return err
}

// receive takes the frames of the guest until its last one.
func (p *passage) receive() error {
	for {
		kind, payload, err := p.guest.Recv()
		if err != nil {
			return fmt.Errorf("the connection to the guest was lost: %w", err)
		}
		switch kind {
		case wire.KindStdinAck:
			err = p.window.Ack(payload)
		case wire.KindStdout:
			err = p.held.put(payload)
		case wire.KindStdoutEOF:
			p.held.end(true)
		case wire.KindExit:
			var e wire.Exit
			if json.Unmarshal(payload, &e) != nil || e.Code != 0 {
				return errBroken
			}
			return nil
		default:
			err = refusal(kind, payload)
		}
		if err != nil {
			return err
		}
	}
}

// send passes on what the client sends. A client that is gone ends the stream.
func (p *passage) send() error {
	buf := make([]byte, maxStdin)
	for {
		n, err := p.local.Read(buf)
		if n > 0 {
			if terr := p.take(n); terr == errLocalGone {
				return terr
			} else if terr != nil || p.guest.Send(wire.KindStdin, buf[:n]) != nil {
				return nil // receive knows why
			}
		}
		if err == io.EOF {
			p.guest.Send(wire.KindStdinEOF, nil)
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return nil
			}
			p.guest.Close()
			return errLocalGone
		}
	}
}

// take waits until the window has room. A service that takes nothing would hold the
// connection of a client that is gone for ever, because nobody reads from that meanwhile.
func (p *passage) take(n int) error {
	watched := make(chan bool, 1)
	timer := time.AfterFunc(pollInterval, func() {
		gone := awaitReset(p.local)
		if gone {
			p.window.Close()
		}
		watched <- gone
	})
	err := p.window.Take(n)
	if timer.Stop() {
		return err
	}
	_ = p.local.SetReadDeadline(time.Unix(1, 0)) // it fails when the connection is closed, which ends the wait too
	if <-watched {
		p.guest.Close()
		return errLocalGone
	}
	_ = p.local.SetReadDeadline(time.Time{})
	return err
}

// awaitReset waits until the other side breaks the connection, true, or the deadline for
// reading comes. It reads nothing, and the end of the data is not what it waits for.
func awaitReset(conn syscall.Conn) (reset bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Read(func(fd uintptr) bool { // its error is that of the deadline
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		reset = err == nil && n > 0 && fds[0].Revents&unix.POLLERR != 0
		return reset
	})
	return reset
}

// write gives the client what is held for it until that has ended.
func (p *passage) write() error {
	buf := make([]byte, wire.MaxPayload)
	for {
		n, whole := p.held.take(buf)
		switch {
		case n == 0 && whole && p.local.CloseWrite() != nil:
			return errLocalGone
		case n == 0:
			return nil
		}
		if _, err := p.local.Write(buf[:n]); err != nil {
			p.guest.Close()
			return errLocalGone
		}
		// When it fails receive knows why.
		p.guest.Send(wire.KindStdoutAck, binary.BigEndian.AppendUint32(nil, uint32(n)))
	}
}

// held is what came from the service and the client has not got yet.
type held struct {
	mu    sync.Mutex
	more  sync.Cond
	bytes []byte
	ended bool // no more comes
	whole bool // because the service has sent all, and not because something broke
}

// put keeps p. A guest that sends more than its window is refused.
func (h *held) put(p []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended || len(h.bytes)+len(p) > wire.StdinWindow {
		return errors.New("the guest sent more than it may")
	}
	h.bytes = append(h.bytes, p...)
	h.more.Signal()
	return nil
}

// take waits for bytes and moves them to buf. There are none any more when n is 0; whole
// then says whether the service sent no others.
func (h *held) take(buf []byte) (n int, whole bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.bytes) == 0 && !h.ended {
		h.more.Wait()
	}
	n = copy(buf, h.bytes)
	h.bytes = h.bytes[:copy(h.bytes, h.bytes[n:])]
	return n, h.whole
}

// end says that no more comes; the first call counts.
func (h *held) end(whole bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.ended {
		h.ended, h.whole = true, whole
	}
	h.more.Signal()
}

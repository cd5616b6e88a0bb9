package cli

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

const (
	// guestTimeout bounds what the guest takes to connect to a service. Its agent gives up
	// earlier; a guest that stands still says nothing.
	guestTimeout = 30 * time.Second
	// stallTimeout is how long a service may take nothing of what is left for it after its
	// client has gone: a forward has places for so many connections only.
	stallTimeout = 10 * time.Second
	// watchClientEvery is how often is looked whether the client has gone, while nothing
	// is read that would tell.
	watchClientEvery = time.Second
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
	guest, err := f.dial(ctx)
	if err == nil {
		err = (&passage{local: local, guest: guest}).run(ctx)
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

// dial returns a connection that the service has accepted.
func (f *forward) dial(ctx context.Context) (*wire.GuestConn, error) {
	conn, r, err := f.client.upgrade(ctx, wire.OpDial, f.vm.Id)
	if f.client.succeeded(ctx, err) {
		conn, r, err = f.client.upgrade(ctx, wire.OpDial, f.vm.Id)
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, guestTimeout, errors.New("it does not answer"))
	defer cancel()
	return wire.DialGuest(ctx, bufferedConn{conn, r}, f.spec.dial)
}

// bufferedConn is a connection of which in has read some already.
type bufferedConn struct {
	net.Conn
	in *bufio.Reader
}

func (c bufferedConn) Read(p []byte) (int, error) { return c.in.Read(p) }

var errLocalGone = errors.New("the client has gone")

// passage is one connection through the agent. Its directions go side by side, so that
// neither waits for the other.
type passage struct {
	local halfConn
	guest *wire.GuestConn // which is closed as soon as the client has gone
}

// run returns when both halves have ended, nil, or one side is gone.
func (p *passage) run(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() { p.guest.Close() })()
	sent, written := make(chan struct{}), make(chan struct{})
	go func() { defer close(sent); p.send() }()
	go func() { defer close(written); p.write() }()
	<-p.guest.Ended()
	err := p.guest.Err()
	if errors.Is(err, net.ErrClosed) {
		err = errLocalGone
	}
	if err != nil && !errors.Is(err, wire.ErrBroken) {
		abort(p.local) // also when the client takes nothing, and write waits for it
	}
	<-written // what a service said before it broke the connection is for the client too
	p.guest.Close()
	if err != nil {
		abort(p.local)
	}
	p.local.Close()
	<-sent
	return err
}

// send passes on what the client sends.
func (p *passage) send() {
	buf := make([]byte, maxStdin)
	for {
		n, err := p.local.Read(buf)
		if n > 0 && p.guarded(func() error { _, err := p.guest.Write(buf[:n]); return err }) != nil {
			return // run knows why
		}
		if err == io.EOF {
			go p.watch(p.guest.Ended())
			_ = p.guest.CloseWrite() // run knows why not
			return
		}
		if err != nil {
			p.guest.Close()
			return
		}
	}
}

// guarded does what may wait for the service, and watches the client meanwhile.
func (p *passage) guarded(do func() error) error {
	done := make(chan struct{})
	defer close(done)
	go p.watch(done)
	return do()
}

// watch gives up the client when it is gone and the service stands still, until done. As
// long as the service takes something, it shall have all that the client left for it.
func (p *passage) watch(done <-chan struct{}) {
	tick := time.NewTicker(watchClientEvery)
	defer tick.Stop()
	var since time.Time // that the client is gone and the service has taken no more
	var taken int64
	for first := true; ; first = false {
		select {
		case <-tick.C:
		case <-done:
			return
		}
		if tcp, ok := p.local.(*net.TCPConn); ok && first {
			// A client that has closed in order looks like one that has ended its half,
			// until its kernel has forgotten the connection and answers so.
			_ = tcp.SetKeepAliveConfig(net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 15 * time.Second, Count: 9})
		}
		switch now := p.guest.Taken(); {
		case !bothEnded(p.local):
			since = time.Time{}
		case since.IsZero() || now != taken:
			since, taken = time.Now(), now
		case time.Since(since) > stallTimeout:
			p.guest.Close()
			return
		}
	}
}

// bothEnded tells whether a connection can bring nothing more in either direction. It
// reads nothing.
func bothEnded(conn syscall.Conn) (ended bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) { // its error is that the connection is closed
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		ended = err == nil && n > 0 && fds[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	})
	return ended
}

// write gives the client what the service sends, to its end.
func (p *passage) write() {
	buf := make([]byte, wire.MaxPayload)
	for {
		n, err := p.guest.Read(buf)
		if n > 0 {
			if _, err := p.local.Write(buf[:n]); err != nil {
				p.guest.Close()
				return
			}
		}
		if err == io.EOF && p.local.CloseWrite() != nil {
			p.guest.Close()
		}
		if err != nil {
			return // run knows why
		}
	}
}

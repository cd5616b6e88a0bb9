package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

const (
	// dialTimeout bounds the connecting to a service, all its addresses together.
	dialTimeout = 5 * time.Second
	// dialAckAt is how many bytes are taken before they are acknowledged.
	dialAckAt = wire.StdinWindow / 4
)

// dial connects the stream to a service of the guest, with the rights of root: who may
// forward ports of a VM may become root in it anyway. It ends when both halves have
// ended, or one of the two ends is gone.
func (a *Agent) dial(s *wire.Stream, d *wire.Dial, release func()) error {
	if d == nil {
		return refusal(wire.ErrInvalid, "the address to connect to is missing")
	}
	select {
	case a.dials <- struct{}{}:
		defer func() { <-a.dials }()
	default:
		return refusal(wire.ErrOverloaded, "the guest serves %d connections to its services already", maxDials)
	}
	release()
	conn, err := connect(*d)
	if err != nil {
		return err
	}
	c := &dialed{
		s: s, conn: conn, in: newStdinQueue(true), out: wire.NewWindow(),
		written: make(chan struct{}), broken: make(chan struct{}),
	}
	c.serve()
	return nil
}

// service is a TCP or Unix connection.
type service interface {
	net.Conn
	CloseWrite() error
}

func connect(d wire.Dial) (service, error) {
	ctx, cancel := context.WithTimeout(context.Background(), dialTimeout)
	defer cancel()
	switch d.Network {
	case "tcp":
		return connectTCP(ctx, d.Address)
	case "unix":
		return connectUnix(ctx, d.Address)
	}
	return nil, refusal(wire.ErrInvalid, "the guest connects to tcp and unix, not to %q", d.Network)
}

func connectTCP(ctx context.Context, address string) (service, error) {
	host, port, err := net.SplitHostPort(address)
	number, portErr := strconv.ParseUint(port, 10, 16)
	if err != nil || portErr != nil || number == 0 {
		return nil, refusal(wire.ErrInvalid, "%q is no HOST:PORT", address)
	}
	hosts, where := []string{host}, "at "+address
	if ip, err := netip.ParseAddr(host); host == "localhost" {
		hosts, where = []string{"127.0.0.1", "::1"}, "on port "+port
	} else if err != nil {
		return nil, refusal(wire.ErrInvalid, "%q is neither an address nor localhost", host)
	} else if ip.IsLoopback() {
		where = "on port " + port
	}
	var last error
	for _, host := range hosts {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		// Without IPv6 the second cannot be had at all: the first one's reason stands.
		if last == nil || errors.Is(err, unix.ECONNREFUSED) {
			last = err
		}
	}
	return nil, notConnected(ctx, where, last)
}

func connectUnix(ctx context.Context, path string) (service, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, refusal(wire.ErrInvalid, "%q is no absolute path", path)
	}
	conn, err := wire.DialUnix(ctx, filepath.Dir(path), filepath.Base(path))
	switch {
	case err == nil:
		return conn.(*net.UnixConn), nil
	case errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
		return nil, refusal(wire.ErrNotFound, "the guest has no socket %s", path)
	case errors.Is(err, unix.EPROTOTYPE):
		return nil, refusal(wire.ErrInvalid, "the guest's %s is no stream socket", path)
	}
	return nil, notConnected(ctx, "on "+path, err)
}

// notConnected is the refusal for err; where says at what, "on port 80".
func notConnected(ctx context.Context, where string, err error) error {
	switch {
	case errors.Is(err, unix.ECONNREFUSED):
		return refusal(wire.ErrRefused, "nothing listens %s in the guest", where)
	case ctx.Err() != nil || errors.Is(err, unix.ETIMEDOUT) || errors.Is(err, unix.EAGAIN): // a full backlog
		return refusal(wire.ErrRefused, "nothing answers %s in the guest", where)
	}
	return refusal(wire.ErrRefused, "nothing can be reached %s in the guest: %v", where, cause(err))
}

// dialed is a connection to a service and its stream.
type dialed struct {
	s       *wire.Stream
	conn    service
	in      *stdinQueue
	out     *wire.Window
	written chan struct{} // closed when the service gets no more
	broken  chan struct{} // closed when the host is gone

	mu       sync.Mutex
	writeErr error // why the service got no more
}

func (c *dialed) serve() {
	c.s.SendJSON(wire.KindStarted, wire.Started{})
	go c.control()
	go c.writeService()
	err := c.readService()
	if err == nil {
		select {
		case <-c.written:
		case <-c.broken:
		}
		err = c.writeError()
	}
	exit := wire.Exit{}
	if err != nil {
		exit = wire.Exit{Code: 1, Message: cause(err).Error()}
	}
	c.s.SendJSON(wire.KindExit, exit)
	c.conn.Close() // before the stream, whose end would make a reset of it
	c.s.Close()
	<-c.broken
}

// control takes the host's frames. It waits for nothing but the host.
func (c *dialed) control() {
	ended := false
	defer func() {
		if tcp, ok := c.conn.(*net.TCPConn); ok && !ended {
			tcp.SetLinger(0) // a reset: the host did not say that this was all
		}
		c.conn.Close()
		c.in.close()
		c.out.Close()
		c.s.Close()
		close(c.broken)
	}()
	for {
		kind, payload, err := c.s.Recv()
		if err != nil {
			return
		}
		switch kind {
		case wire.KindStdin:
			if !c.in.put(payload) {
				return
			}
		case wire.KindStdinEOF:
			ended = true
			c.in.end()
		case wire.KindStdoutAck:
			if c.out.Ack(payload) != nil {
				return
			}
		default:
			return
		}
	}
}

// writeService gives the service what the host sends. What it does not take any more is
// dropped: it may still have something to say.
func (c *dialed) writeService() {
	stop := sync.OnceFunc(func() { close(c.written) })
	defer stop()
	taken, failed := 0, false
	for {
		data, err := c.in.get()
		if err == io.EOF && !failed {
			c.conn.CloseWrite()
		}
		if err != nil {
			return
		}
		if !failed {
			if _, err := c.conn.Write(data); err != nil {
				failed = true
				c.mu.Lock()
				c.writeErr = err
				c.mu.Unlock()
				stop()
			}
		}
		if taken += len(data); taken >= dialAckAt {
			if ack(c.s, taken) != nil {
				return
			}
			taken = 0
		}
	}
}

func (c *dialed) writeError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writeErr
}

// readService sends the host what the service sends, to its end. An error is the
// service's or the stream's.
func (c *dialed) readService() error {
	buf := make([]byte, 32<<10)
	for {
		n, err := c.conn.Read(buf)
		if n > 0 {
			if err := c.out.Take(n); err != nil {
				return err
			}
			if err := c.s.Send(wire.KindStdout, buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return c.s.Send(wire.KindStdoutEOF, nil)
		}
		if err != nil {
			return err
		}
	}
}

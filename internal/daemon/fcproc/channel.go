package fcproc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/guest/wire"
)

// A connection to a port of the guest begins with "CONNECT port\n" on Firecracker's Unix
// socket, to which it answers "OK hostport\n"; when nobody listens in the guest it closes
// the connection without a word. See docs/vsock.md in Firecracker's source.

const (
	// redialFirst and redialMax are the waits between attempts to connect, doubling.
	redialFirst = 5 * time.Millisecond
	redialMax   = 250 * time.Millisecond
	// answerTimeout bounds the wait for one answer: one that was lost is asked for again.
	answerTimeout = 5 * time.Second
	// maxHello bounds the answer, in bytes.
	maxHello = 32
)

var errNobody = errors.New("nobody listens in the guest yet")

// channel is a driver.Channel: each Dial is a connection of its own.
type channel struct {
	dir   string
	ctx   context.Context // ends with Close
	close context.CancelFunc

	mu   sync.Mutex // a leaf
	open map[net.Conn]struct{}
}

// Channel reaches the agent over the guest's vsock. The agent's answer says who it is, so
// the magic has no part in it.
func (v *VMM) Channel(dir string, _ []byte) driver.Channel {
	c := &channel{dir: dir, open: make(map[net.Conn]struct{})}
	c.ctx, c.close = context.WithCancel(context.Background())
	return c
}

// Dial connects to the agent. While there is no guest it waits until ctx ends. After Close
// the error wraps net.ErrClosed.
func (c *channel) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(c.ctx, func() { cancel(net.ErrClosed) })()
	for wait := redialFirst; ; wait = min(2*wait, redialMax) {
		conn, err := c.connect(ctx)
		if err == nil {
			return c.keep(conn)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, fmt.Errorf("cannot reach the guest's agent: %w (%v)", context.Cause(ctx), err)
		}
	}
}

func (c *channel) connect(ctx context.Context) (net.Conn, error) {
	conn, err := dialJail(ctx, c.dir, vsockSocket)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	err = greet(conn)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// greet reads byte by byte: what follows the answer is the guest's.
func greet(conn net.Conn) error {
	conn.SetDeadline(time.Now().Add(answerTimeout))
	defer conn.SetDeadline(time.Time{})
	if _, err := conn.Write([]byte("CONNECT " + strconv.Itoa(wire.VsockPort) + "\n")); err != nil {
		return err
	}
	answer := make([]byte, 0, maxHello)
	for len(answer) < maxHello {
		b := answer[len(answer) : len(answer)+1]
		if _, err := conn.Read(b); err != nil {
			return fmt.Errorf("%w (%v)", errNobody, err)
		}
		answer = answer[:len(answer)+1]
		if b[0] != '\n' {
			continue
		}
		if len(answer) > 4 && string(answer[:3]) == "OK " {
			return nil
		}
		break
	}
	return fmt.Errorf("firecracker answers %q", answer)
}

// keep makes Close end the connection.
func (c *channel) keep(conn net.Conn) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		conn.Close()
		return nil, fmt.Errorf("cannot dial the guest: the channel is closed: %w", net.ErrClosed)
	}
	c.open[conn] = struct{}{}
	return &kept{conn, c}, nil
}

// Close ends all connections.
func (c *channel) Close() error {
	c.close()
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for conn := range c.open {
		errs = append(errs, conn.Close())
	}
	clear(c.open)
	return errors.Join(errs...)
}

// kept is a connection that its channel knows until it is closed.
type kept struct {
	net.Conn
	c *channel
}

func (k *kept) Close() error {
	k.c.mu.Lock()
	delete(k.c.open, k.Conn)
	k.c.mu.Unlock()
	return k.Conn.Close()
}

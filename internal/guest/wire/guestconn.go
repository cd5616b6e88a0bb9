package wire

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// ackAt is how many bytes a receiver of a Dial takes before it acknowledges them. A
// quarter leaves the sender the rest of the window at any time.
const ackAt = StdinWindow / 4

// chunkSize bounds the bytes of one data frame of a Dial.
const chunkSize = 32 << 10

// GuestConn is a connection to a service of the guest, see Dial. Each direction goes on
// when the other one has ended or stands still. Read may be called by one goroutine and
// Write by another; Close by any.
type GuestConn struct {
	s      *Stream
	window *Window // of what is written

	writeMu     sync.Mutex // held by Write and CloseWrite
	writeClosed bool

	mu       sync.Mutex
	more     sync.Cond
	chunks   [][]byte // what was received and not read
	size     int      // of chunks, in bytes
	taken    int64    // bytes that the service took, as far as it was acknowledged
	readErr  error    // after chunks; nil while more may come
	writeErr error    // why nothing can be written any more

	ended chan struct{} // closed when writeErr is set

	unacked int // of the reading goroutine
}

// DialGuest connects, over conn, a fresh stream to the agent, to the service that d
// names; ctx bounds only that. What the guest refuses is an *Error. The GuestConn owns
// conn, which is closed after an error.
func DialGuest(ctx context.Context, conn net.Conn, d Dial) (*GuestConn, error) {
	req := Request{Op: OpDial, Dial: &d, Acks: true}
	s := NewStream(conn)
	stop := s.CloseOn(ctx)
	err := dialGuest(s, req)
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		s.Close()
		return nil, opError(ctx, req, err)
	}
	c := &GuestConn{s: s, window: NewWindow(), ended: make(chan struct{})}
	c.more.L = &c.mu
	go c.receive()
	return c, nil
}

func dialGuest(s *Stream, req Request) error {
	sendErr := s.SendJSON(KindRequest, req)
	kind, payload, err := s.Recv()
	switch {
	case err == nil && kind == KindError: // it may come before the request
		return decodeError(payload)
	case sendErr != nil:
		return sendErr
	case err != nil:
		return err
	case kind != KindStarted:
		return fmt.Errorf("frame of kind %d is out of place", kind)
	}
	return nil
}

// receive takes the guest's frames until the connection has ended. It waits for the
// guest only, so that an acknowledgement is seen behind bytes that nobody reads.
func (c *GuestConn) receive() {
	for {
		kind, payload, err := c.s.Recv()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			err = fmt.Errorf("the connection to the guest was lost: %w", err)
		} else {
			err = c.take(kind, payload)
		}
		if err != nil {
			c.end(err)
			c.s.Close()
			return
		}
	}
}

var (
	// ErrBroken: the service broke the connection. What it sent before can be read.
	ErrBroken = errors.New("the service broke the connection")
	// errEnded ends a receiver: the guest has said its last.
	errEnded = errors.New("the connection has ended")
)

func (c *GuestConn) take(kind Kind, payload []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.more.Broadcast()
	switch kind {
	case KindStdout:
		if c.readErr != nil || c.size+len(payload) > StdinWindow {
			return errors.New("the guest sends more than it may")
		}
		if len(payload) > 0 {
			c.chunks = append(c.chunks, append([]byte(nil), payload...))
			c.size += len(payload)
		}
		return nil
	case KindStdoutEOF:
		c.readErr = io.EOF
		return nil
	case KindStdinAck:
		if err := c.window.Ack(payload); err != nil {
			return err
		}
		c.taken += int64(binary.BigEndian.Uint32(payload))
		return nil
	case KindExit:
		var exit Exit
		if err := json.Unmarshal(payload, &exit); err != nil {
			return fmt.Errorf("the exit cannot be decoded: %w", err)
		}
		exit.clean()
		if exit.Code != 0 {
			if exit.Message == "" {
				return ErrBroken
			}
			return fmt.Errorf("%w: %s", ErrBroken, exit.Message)
		}
		return errEnded
	case KindError:
		return decodeError(payload)
	}
	return fmt.Errorf("frame of kind %d is out of place", kind)
}

// end ends what has not ended yet.
func (c *GuestConn) end(err error) {
	c.mu.Lock()
	if c.readErr == nil {
		c.readErr = err
	}
	if c.writeErr == nil {
		c.writeErr = err
		close(c.ended)
	}
	c.mu.Unlock()
	c.more.Broadcast()
	c.window.Close()
}

// Ended is closed when the service, the guest or Close has ended the connection; what the
// service has sent can be read on.
func (c *GuestConn) Ended() <-chan struct{} { return c.ended }

// Err says, once Ended is closed, why: nil when both halves had ended.
func (c *GuestConn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeErr == errEnded {
		return nil
	}
	return c.writeErr
}

// Taken is how many bytes of what was written the service took, in steps of a part of the
// window.
func (c *GuestConn) Taken() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken
}

// Read reads what the service has sent; io.EOF when it sends no more.
func (c *GuestConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c.mu.Lock()
	for len(c.chunks) == 0 && c.readErr == nil {
		c.more.Wait()
	}
	if len(c.chunks) == 0 {
		defer c.mu.Unlock()
		return 0, c.readErr
	}
	n := copy(p, c.chunks[0])
	if c.chunks[0] = c.chunks[0][n:]; len(c.chunks[0]) == 0 {
		c.chunks = c.chunks[1:]
	}
	c.size -= n
	c.mu.Unlock()
	if c.unacked += n; c.unacked >= ackAt {
		// A stream that is broken is the receiver's to tell.
		_ = c.s.Send(KindStdoutAck, binary.BigEndian.AppendUint32(nil, uint32(c.unacked)))
		c.unacked = 0
	}
	return n, nil
}

// Write sends p to the service. It returns when p is on its way.
func (c *GuestConn) Write(p []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.writeClosed {
		return 0, io.ErrClosedPipe
	}
	n := 0
	for n < len(p) {
		chunk := p[n:min(n+chunkSize, len(p))]
		err := c.window.Take(len(chunk))
		if err == nil {
			err = c.s.Send(KindStdin, chunk)
		}
		if err != nil {
			return n, c.writeError(err)
		}
		n += len(chunk)
	}
	return n, nil
}

// writeError is the reason for err, if one is known.
func (c *GuestConn) writeError(err error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeErr != nil {
		return c.writeErr
	}
	return err
}

// CloseWrite tells the service that no more comes; reading goes on.
func (c *GuestConn) CloseWrite() error {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	if c.writeClosed {
		return nil
	}
	c.writeClosed = true
	if err := c.s.Send(KindStdinEOF, nil); err != nil {
		return c.writeError(err)
	}
	return nil
}

// Close ends the connection. Before CloseWrite that is a reset for the service.
func (c *GuestConn) Close() error {
	c.end(net.ErrClosed)
	return c.s.Close()
}

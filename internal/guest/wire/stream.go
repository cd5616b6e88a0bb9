package wire

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"
)

// Stream sends and receives whole frames over a connection. Send may be called by
// several goroutines, Recv by one.
type Stream struct {
	conn net.Conn
	in   *bufio.Reader
	buf  []byte

	sendMu sync.Mutex
	out    []byte
	ended  atomic.Bool // a frame that is Last was sent
}

// A Finisher is a connection that must not be closed on what the peer has not read.
// Finish unblocks Read and Write like Close, and leaves the closing to the peer.
type Finisher interface{ Finish() error }

// NewStream makes a stream of conn, which it owns from then on.
func NewStream(conn net.Conn) *Stream {
	return &Stream{conn: conn, in: bufio.NewReaderSize(conn, 16<<10)}
}

// Send sends one frame, with one Write.
func (s *Stream) Send(kind Kind, payload []byte) error {
	if len(payload) > MaxPayload {
		return fmt.Errorf("frame of %d bytes exceeds the limit of %d", len(payload), MaxPayload)
	}
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	s.out = append(s.out[:0], byte(kind))
	s.out = binary.BigEndian.AppendUint32(s.out, uint32(len(payload)))
	s.out = append(s.out, payload...)
	_, err := s.conn.Write(s.out)
	if err == nil && kind.Last() {
		s.ended.Store(true)
	}
	return err
}

// SendJSON sends v as the payload of one frame.
func (s *Stream) SendJSON(kind Kind, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.Send(kind, payload)
}

// Recv receives one frame; the payload is valid until the next call. The error is
// io.EOF when the peer has closed between two frames.
func (s *Stream) Recv() (Kind, []byte, error) {
	kind, payload, err := ReadFrame(s.in, s.buf)
	if cap(payload) > cap(s.buf) {
		s.buf = payload[:cap(payload)]
	}
	return kind, payload, err
}

// Close closes the connection, which unblocks Send and Recv. After a frame that is Last
// a Finisher is left to the peer to close.
func (s *Stream) Close() error {
	if f, ok := s.conn.(Finisher); ok && s.ended.Load() {
		return f.Finish()
	}
	return s.conn.Close()
}

// CloseOn closes the stream when ctx ends, until stop is called.
func (s *Stream) CloseOn(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { s.Close() })
}

// FromHost says whether a host may send frames of this kind.
func (k Kind) FromHost() bool { return k >= KindRequest && k <= KindStdoutAck }

// FromGuest says whether a guest may send frames of this kind.
func (k Kind) FromGuest() bool { return k >= KindStarted && k <= KindStdoutEOF }

// Last says whether a frame of this kind ends the stream.
func (k Kind) Last() bool { return k == KindReply || k == KindExit || k == KindError }

// Sanitize checks a frame that came from the other side of a border and returns the
// payload to pass on. Data are passed as they are; all else is decoded, bounded and
// encoded anew, and texts lose what a terminal would take for a command.
func Sanitize(kind Kind, payload []byte) ([]byte, error) {
	switch kind {
	case KindStdin, KindStdout, KindStderr:
		return payload, nil
	case KindStdinEOF, KindStdoutEOF:
		return nil, nil
	case KindStdinAck, KindStdoutAck:
		if len(payload) != 4 {
			return nil, fmt.Errorf("acknowledgement of %d bytes instead of 4", len(payload))
		}
		return payload, nil
	case KindReply:
		if !json.Valid(payload) {
			return nil, fmt.Errorf("reply is no JSON")
		}
		return payload, nil
	case KindRequest:
		return recode(payload, new(Request), nil)
	case KindResize:
		return recode(payload, new(Resize), nil)
	case KindSignal:
		return recode(payload, new(Signal), nil)
	case KindStarted:
		return recode(payload, new(Started), nil)
	case KindExit:
		return recode(payload, new(Exit), (*Exit).clean)
	case KindError:
		return recode(payload, new(Error), (*Error).clean)
	}
	return nil, fmt.Errorf("frame of unknown kind %d", kind)
}

func recode[T any](payload []byte, v *T, clean func(*T)) ([]byte, error) {
	if err := json.Unmarshal(payload, v); err != nil {
		return nil, fmt.Errorf("frame cannot be decoded: %w", err)
	}
	if clean != nil {
		clean(v)
	}
	out, err := json.Marshal(v)
	if err == nil && len(out) > MaxPayload {
		err = fmt.Errorf("frame of %d bytes exceeds the limit of %d", len(out), MaxPayload)
	}
	return out, err
}

// maxMessage bounds a text that a guest sends for people, in bytes.
const maxMessage = 4 << 10

func (e *Exit) clean() {
	e.Code &= 0xff
	e.Signal = CleanText(e.Signal, 16)
	e.Message = CleanText(e.Message, maxMessage)
}

func (e *Error) clean() {
	e.Code = CleanText(e.Code, 64)
	e.Message = CleanText(e.Message, maxMessage)
}

// CleanText makes a text of a guest fit to be shown: the first limit bytes of s without
// control characters, line ends and tabs apart. The characters that turn the direction
// of writing (UAX #9, sections 2.1 to 2.5) go too: a line may look like another.
func CleanText(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		turns := r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069
		if r != '\n' && r != '\t' && unicode.IsControl(r) || turns {
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "")
	}
	return s
}

// A SendError is an error of the side that Relay sends to.
type SendError struct{ Err error }

func (e *SendError) Error() string { return e.Err.Error() }
func (e *SendError) Unwrap() error { return e.Err }

// Relay passes frames from src to dst, each of a kind that allowed accepts and
// through Sanitize, until one that is Last has passed or an error. An error of dst
// is a *SendError, any other is one of src; io.EOF means that src ended between two
// frames.
func Relay(dst, src *Stream, allowed func(Kind) bool) (last Kind, err error) {
	for {
		kind, payload, err := src.Recv()
		if err != nil {
			return 0, err
		}
		if !allowed(kind) {
			return 0, fmt.Errorf("frame of kind %d is out of place", kind)
		}
		if payload, err = Sanitize(kind, payload); err != nil {
			return 0, err
		}
		if err := dst.Send(kind, payload); err != nil {
			return 0, &SendError{err}
		}
		if kind.Last() {
			return kind, nil
		}
	}
}

// Window counts the bytes of stdin that a host may send, see Request.Acks.
type Window struct {
	mu     sync.Mutex
	more   sync.Cond
	free   int
	closed bool
}

// NewWindow makes the window of a new stream.
func NewWindow() *Window {
	w := &Window{free: StdinWindow}
	w.more.L = &w.mu
	return w
}

// Take waits until n more bytes, at most StdinWindow, may be sent; the error after
// Close is io.ErrClosedPipe.
func (w *Window) Take(n int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.free < n && !w.closed {
		w.more.Wait()
	}
	if w.closed {
		return io.ErrClosedPipe
	}
	w.free -= n
	return nil
}

// Ack takes the payload of a KindStdinAck frame. A guest that acknowledges more than
// it got gains nothing.
func (w *Window) Ack(payload []byte) error {
	if len(payload) != 4 {
		return fmt.Errorf("acknowledgement of %d bytes instead of 4", len(payload))
	}
	n := int64(binary.BigEndian.Uint32(payload))
	w.mu.Lock()
	w.free = int(min(int64(w.free)+n, StdinWindow))
	w.mu.Unlock()
	w.more.Broadcast()
	return nil
}

// Close ends all waits.
func (w *Window) Close() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.more.Broadcast()
}

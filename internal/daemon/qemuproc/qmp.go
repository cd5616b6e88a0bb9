package qemuproc

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"banger/api"
	"banger/internal/guest/wire"
)

// QMP is JSON, one value a line: a greeting from QEMU, then commands with an id and
// replies that carry it, and events in between, which nobody here waits for. See
// docs/interop/qmp-spec in QEMU's source. QEMU talks to one client at a time, so a
// conversation is short: connect, ask, close.

const (
	// qmpTimeout bounds one conversation when its context does not.
	qmpTimeout = 30 * time.Second
	// maxReply bounds one line of QEMU's, in bytes. QEMU is confined but not trusted:
	// a guest may have taken it over.
	maxReply = 1 << 20
	// maxLines bounds the events between a command and its reply.
	maxLines = 10_000
)

// qmpError is a command that QEMU refused.
type qmpError struct {
	Command string `json:"-"`
	Class   string `json:"class"` // "CommandNotFound", "GenericError", …
	Desc    string `json:"desc"`
}

func (e *qmpError) Error() string {
	return fmt.Sprintf("QEMU refused %s: %.200q (%.40q)", e.Command, e.Desc, e.Class)
}

// qmp is one conversation.
type qmp struct {
	conn net.Conn
	in   *bufio.Reader
	id   int64
	stop func() bool
}

type qmpReply struct {
	Greeting json.RawMessage `json:"QMP"`
	Event    string          `json:"event"`
	ID       *int64          `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
}

// startQMP greets on conn, which it closes when that fails. ctx bounds the whole
// conversation.
func startQMP(ctx context.Context, conn net.Conn) (*qmp, error) {
	q := &qmp{conn: conn, in: bufio.NewReaderSize(conn, 4<<10)}
	// The end of ctx breaks the read or write that is under way.
	q.stop = context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	err := q.greet()
	if err != nil {
		q.Close()
		return nil, q.explain(ctx, err)
	}
	return q, nil
}

// greet waits for the greeting. An event of the very moment of connecting, of the
// network's process say, may come before it.
func (q *qmp) greet() error {
	for range maxLines {
		r, err := q.read()
		switch {
		case err != nil:
			return err
		case r.Greeting != nil:
			return q.exchange("qmp_capabilities", nil)
		case r.Event == "":
			return errors.New("QEMU did not greet")
		}
	}
	return fmt.Errorf("QEMU did not greet in %d lines", maxLines)
}

// explain puts ctx's error in the place of the broken connection that it led to.
func (q *qmp) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("cannot talk to QEMU: %w", context.Cause(ctx))
	}
	return fmt.Errorf("cannot talk to QEMU: %w", err)
}

// call runs a command without arguments and decodes what it returns into result,
// which may be nil.
func (q *qmp) call(ctx context.Context, command string, result any) error {
	err := q.exchange(command, result)
	var refused *qmpError
	if err == nil || errors.As(err, &refused) {
		return err
	}
	return q.explain(ctx, err)
}

func (q *qmp) exchange(command string, result any) error {
	q.id++
	line, err := json.Marshal(map[string]any{"execute": command, "id": q.id})
	if err != nil {
		return err
	}
	if _, err := q.conn.Write(append(line, '\n')); err != nil {
		return err
	}
	for range maxLines {
		r, err := q.read()
		if err != nil {
			return err
		}
		switch {
		case r.Event != "":
			continue
		case r.Error != nil && (r.ID == nil || *r.ID == q.id): // without an id: not even read
			r.Error.Command = command
			return r.Error
		case r.ID == nil || *r.ID != q.id:
			continue
		case result == nil:
			return nil
		}
		return json.Unmarshal(r.Return, result)
	}
	return fmt.Errorf("QEMU did not answer %s in %d lines", command, maxLines)
}

func (q *qmp) read() (qmpReply, error) {
	var line []byte
	for {
		part, err := q.in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxReply {
			return qmpReply{}, fmt.Errorf("a line of more than %d bytes", maxReply)
		}
		if err == nil {
			break
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return qmpReply{}, err
	}
	var r qmpReply
	if err := json.Unmarshal(line, &r); err != nil {
		return qmpReply{}, err
	}
	return r, nil
}

func (q *qmp) Close() error {
	q.stop()
	return q.conn.Close()
}

// silent is a QEMU that says nothing for qmpTimeout.
func silent() error {
	return &api.Error{Code: api.Unresponsive, Message: fmt.Sprintf("no answer within %v", qmpTimeout),
		Hint: "banger doctor", Err: context.DeadlineExceeded}
}

// dialer connects to QEMU's socket.
type dialer func(ctx context.Context) (net.Conn, error)

func qmpOf(dir string) dialer {
	return func(ctx context.Context) (net.Conn, error) { return wire.DialUnix(ctx, dir, QMPSocket) }
}

// converse connects, greets and lets talk ask.
func converse(ctx context.Context, dial dialer, talk func(ctx context.Context, q *qmp) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, qmpTimeout, silent())
	defer cancel()
	conn, err := dial(ctx)
	if err != nil {
		return err
	}
	q, err := startQMP(ctx, conn)
	if err != nil {
		return err
	}
	defer q.Close()
	return talk(ctx, q)
}

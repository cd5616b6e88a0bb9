package wire

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
)

// Call makes a unary request over conn, a fresh stream to the agent, and closes it.
// reply may be nil. What the guest refuses is returned as *Error; when ctx ends, the
// error wraps its cause.
func Call(ctx context.Context, conn net.Conn, req Request, reply any) error {
	s := NewStream(conn)
	defer s.Close()
	defer s.CloseOn(ctx)()
	if err := call(s, req, reply); err != nil {
		return opError(ctx, req, err)
	}
	return nil
}

// opError is what becomes of an error: a refusal is passed on as it is, and the end
// of ctx explains all others.
func opError(ctx context.Context, req Request, err error) error {
	var refused *Error
	if errors.As(err, &refused) {
		return refused
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("cannot %s in the guest: %w", req.Op, err)
}

func call(s *Stream, req Request, reply any) error {
	sendErr := s.SendJSON(KindRequest, req)
	kind, payload, err := s.Recv()
	if sendErr != nil && kind != KindError { // a refusal may come before the request
		return sendErr
	}
	switch {
	case err != nil:
		return err
	case kind == KindReply && reply == nil:
		return nil
	case kind == KindReply:
		if err := json.Unmarshal(payload, reply); err != nil {
			return fmt.Errorf("the reply cannot be decoded: %w", err)
		}
		return nil
	case kind == KindError:
		return decodeError(payload)
	}
	return fmt.Errorf("frame of kind %d is out of place", kind)
}

func decodeError(payload []byte) error {
	e := new(Error)
	if err := json.Unmarshal(payload, e); err != nil {
		return fmt.Errorf("the refusal cannot be decoded: %w", err)
	}
	e.clean()
	return e
}

// Stdio is what Run connects a command to.
type Stdio struct {
	// In is read until its end, which closes the command's stdin. nil is an empty
	// one. A Read that blocks when the command ends is left behind.
	In io.Reader
	// Out and Err get the output; nil drops it. With a tty all of it goes to Out.
	Out, Err io.Writer
}

// Run runs a command, or a tar, over conn, a fresh stream to the agent, and closes
// it. It returns when the command has ended and its output was written; the Exit is
// valid when the error is nil. What the guest refuses to begin is an *Error; when
// ctx ends, the stream breaks (see Exec) and the error wraps the cause; an error of
// stdio's ends does the same.
func Run(ctx context.Context, conn net.Conn, req Request, stdio Stdio) (Exit, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s := NewStream(conn)
	defer s.Close()
	defer s.CloseOn(ctx)()
	window := NewWindow()
	defer window.Close()

	req.Acks = true
	if err := s.SendJSON(KindRequest, req); err != nil {
		return Exit{}, opError(ctx, req, err)
	}
	go func() {
		if err := sendStdin(s, stdio.In, window); err != nil {
			cancel(err)
		}
	}()
	exit, err := receive(s, stdio, window)
	if err != nil {
		return Exit{}, opError(ctx, req, err)
	}
	return exit, nil
}

// sendStdin sends in to its end. An error is one of in; that the stream broke is
// left to the receiver, which may have the command's exit.
func sendStdin(s *Stream, in io.Reader, window *Window) error {
	if in == nil {
		s.Send(KindStdinEOF, nil)
		return nil
	}
	buf := make([]byte, 32<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 && (window.Take(n) != nil || s.Send(KindStdin, buf[:n]) != nil) {
			return nil
		}
		if err == io.EOF {
			s.Send(KindStdinEOF, nil)
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot read the input: %w", err)
		}
	}
}

// receive takes the guest's frames up to the exit.
func receive(s *Stream, stdio Stdio, window *Window) (Exit, error) {
	for {
		kind, payload, err := s.Recv()
		if err != nil {
			return Exit{}, err
		}
		switch kind {
		case KindStarted:
		case KindStdout:
			err = writeTo(stdio.Out, payload)
		case KindStderr:
			err = writeTo(stdio.Err, payload)
		case KindStdinAck:
			err = window.Ack(payload)
		case KindExit:
			var exit Exit
			if err := json.Unmarshal(payload, &exit); err != nil {
				return Exit{}, fmt.Errorf("the exit cannot be decoded: %w", err)
			}
			exit.clean()
			return exit, nil
		case KindError:
			return Exit{}, decodeError(payload)
		default:
			err = fmt.Errorf("frame of kind %d is out of place", kind)
		}
		if err != nil {
			return Exit{}, err
		}
	}
}

func writeTo(w io.Writer, p []byte) error {
	if w == nil {
		return nil
	}
	if _, err := w.Write(p); err != nil {
		return fmt.Errorf("cannot write the output: %w", err)
	}
	return nil
}

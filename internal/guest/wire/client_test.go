package wire

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// scripted is a guest that does what a test says with one stream.
func scripted(t *testing.T, script func(s *Stream, req Request)) net.Conn {
	host, guest := socketPair(t)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s := NewStream(guest)
		defer s.Close()
		kind, payload, err := s.Recv()
		var req Request
		if err != nil || kind != KindRequest || json.Unmarshal(payload, &req) != nil {
			t.Errorf("no request: %v", err)
			return
		}
		script(s, req)
	}()
	t.Cleanup(func() {
		host.Close()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Error("the guest's script goes on")
		}
	})
	return host
}

func drain(s *Stream) {
	for {
		if _, _, err := s.Recv(); err != nil {
			return
		}
	}
}

func TestCall(t *testing.T) {
	conn := scripted(t, func(s *Stream, req Request) {
		s.SendJSON(KindReply, Hello{Nonce: req.Nonce})
		drain(s)
	})
	var h Hello
	if err := Call(t.Context(), conn, Request{Op: OpHello, Nonce: "n"}, &h); err != nil || h.Nonce != "n" {
		t.Fatalf("%+v, %v", h, err)
	}
	if _, err := conn.Write([]byte("x")); err == nil {
		t.Error("the connection is open")
	}
}

func TestCallErrors(t *testing.T) {
	conn := scripted(t, func(s *Stream, _ Request) {
		s.SendJSON(KindError, Error{Code: ErrUnknownOp, Message: "what?\x1b[2J"})
	})
	err := Call(t.Context(), conn, Request{Op: "new"}, nil)
	e, ok := err.(*Error)
	if !ok || e.Code != ErrUnknownOp || e.Message != "what?[2J" {
		t.Errorf("a refusal: %#v", err)
	}

	conn = scripted(t, func(s *Stream, _ Request) {})
	if err := Call(t.Context(), conn, Request{Op: OpHello}, nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a broken stream: %v", err)
	}

	conn = scripted(t, func(s *Stream, _ Request) { drain(s) })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := Call(ctx, conn, Request{Op: OpReady}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
}

// The host stops at the window, and goes on with each acknowledgement.
func TestRunStdinWindow(t *testing.T) {
	data := randomBytes(3*StdinWindow + 12345)
	taken := make(chan []byte, 1)
	conn := scripted(t, func(s *Stream, req Request) {
		var got []byte
		unacked := 0
		for {
			if unacked == StdinWindow {
				s.conn.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
				if kind, _, err := s.Recv(); !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("frame of kind %d beyond the window, %v", kind, err)
				}
				s.conn.SetReadDeadline(time.Time{})
				s.Send(KindStdinAck, binary.BigEndian.AppendUint32(nil, uint32(unacked)))
				unacked = 0
			}
			kind, payload, err := s.Recv()
			if err != nil || kind != KindStdin {
				break
			}
			got = append(got, payload...)
			unacked += len(payload)
		}
		taken <- got
		if !req.Acks {
			t.Error("no acknowledgements were asked for")
		}
		s.SendJSON(KindExit, Exit{Code: 3})
	})
	exit, err := Run(t.Context(), conn, Request{Op: OpUntar}, Stdio{In: bytes.NewReader(data)})
	if err != nil || exit.Code != 3 {
		t.Fatalf("%+v, %v", exit, err)
	}
	if !bytes.Equal(<-taken, data) {
		t.Error("other bytes arrived")
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestRunErrors(t *testing.T) {
	boom := errors.New("boom")
	output := func(s *Stream, _ Request) {
		s.SendJSON(KindStarted, Started{PID: 1})
		s.Send(KindStdout, []byte("out"))
		s.Send(KindStderr, []byte("err"))
		drain(s)
	}
	bad := readerFunc(func([]byte) (int, error) { return 0, boom })
	if _, err := Run(t.Context(), scripted(t, output), Request{Op: OpUntar}, Stdio{In: bad}); !errors.Is(err, boom) {
		t.Errorf("input that fails: %v", err)
	}
	if _, err := Run(t.Context(), scripted(t, output), Request{Op: OpExec}, Stdio{Out: failingWriter{boom}}); !errors.Is(err, boom) {
		t.Errorf("output that fails: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Run(ctx, scripted(t, output), Request{Op: OpExec}, Stdio{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the end of the context: %v", err)
	}
	conn := scripted(t, func(s *Stream, _ Request) {
		s.Send(KindStdout, []byte("half"))
		s.Recv() // the end of stdin: a socket that is closed with unread bytes says so
	})
	if _, err := Run(t.Context(), conn, Request{Op: OpExec}, Stdio{}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a broken stream: %v", err)
	}
	conn = scripted(t, func(s *Stream, _ Request) { s.SendJSON(KindError, Error{Code: ErrNotFound, Message: "no"}) })
	var refused *Error
	if _, err := Run(t.Context(), conn, Request{Op: OpExec}, Stdio{}); !errors.As(err, &refused) || refused.Code != ErrNotFound {
		t.Errorf("a refusal: %v", err)
	}
}

func TestRelay(t *testing.T) {
	a1, a2 := socketPair(t)
	b1, b2 := socketPair(t)
	guest, src, dst, client := NewStream(a1), NewStream(a2), NewStream(b1), NewStream(b2)
	for _, s := range []*Stream{guest, src, dst, client} {
		defer s.Close()
	}
	payload := strings.Repeat("x", MaxPayload)
	guest.Send(KindStdout, []byte(payload))
	guest.SendJSON(KindExit, Exit{Code: 256 + 7, Signal: "\x1b]0;", Message: strings.Repeat("m", 2*maxMessage)})
	if last, err := Relay(dst, src, Kind.FromGuest); err != nil || last != KindExit {
		t.Fatalf("%v, %v", last, err)
	}
	if kind, got, err := client.Recv(); err != nil || kind != KindStdout || string(got) != payload {
		t.Fatalf("%v, %v", kind, err)
	}
	kind, got, err := client.Recv()
	var exit Exit
	if err != nil || kind != KindExit || json.Unmarshal(got, &exit) != nil {
		t.Fatalf("%v, %v", kind, err)
	}
	if exit.Code != 7 || exit.Signal != "]0;" || len(exit.Message) != maxMessage {
		t.Errorf("passed on unchecked: %+v", exit)
	}

	guest.Send(KindStdin, nil)
	if _, err := Relay(dst, src, Kind.FromGuest); err == nil || errors.As(err, new(*SendError)) {
		t.Errorf("a kind out of place: %v", err)
	}
	client.Close()
	dst.Close()
	guest.Send(KindStdout, nil)
	if _, err := Relay(dst, src, Kind.FromGuest); !errors.As(err, new(*SendError)) {
		t.Errorf("a receiver that is gone: %v", err)
	}
	guest.Close()
	if _, err := Relay(dst, src, Kind.FromGuest); err != io.EOF {
		t.Errorf("a sender that is gone: %v", err)
	}
}

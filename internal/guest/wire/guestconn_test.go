package wire

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

var webPort = Dial{Network: "tcp", Address: "127.0.0.1:80"}

func TestDialGuest(t *testing.T) {
	conn := scripted(t, func(s *Stream, req Request) {
		if req.Op != OpDial || req.Dial == nil || *req.Dial != webPort {
			t.Errorf("asked for %+v", req)
		}
		s.SendJSON(KindError, Error{Code: ErrRefused, Message: "nothing\x07 listens"})
	})
	var refused *Error
	if _, err := DialGuest(t.Context(), conn, webPort); !errors.As(err, &refused) || refused.Code != ErrRefused || refused.Message != "nothing listens" {
		t.Errorf("a refusal: %v", err)
	}
	conn = scripted(t, func(s *Stream, _ Request) {})
	if _, err := DialGuest(t.Context(), conn, webPort); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a broken stream: %v", err)
	}
	conn = scripted(t, func(s *Stream, _ Request) { drain(s) })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := DialGuest(ctx, conn, webPort); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v", err)
	}
}

// The context bounds the connecting only.
func TestDialGuestOutlivesContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	conn := scripted(t, func(s *Stream, _ Request) {
		s.SendJSON(KindStarted, Started{})
		s.Recv() // the host's byte
		s.Send(KindStdout, []byte("here"))
		s.Send(KindStdoutEOF, nil)
		drain(s)
	})
	c, err := DialGuest(ctx, conn, webPort)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	cancel()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if got, err := io.ReadAll(c); string(got) != "here" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// The host acknowledges what was read, not what came, and stops at its own window.
func TestGuestConnWindows(t *testing.T) {
	read := make(chan struct{})
	conn := scripted(t, func(s *Stream, _ Request) {
		s.SendJSON(KindStarted, Started{})
		for range StdinWindow / MaxPayload {
			s.Send(KindStdout, make([]byte, MaxPayload))
		}
		got := 0
		for got < StdinWindow {
			kind, payload, err := s.Recv()
			if err != nil || kind != KindStdin {
				t.Errorf("kind %d, %v", kind, err)
				return
			}
			got += len(payload)
		}
		s.conn.SetReadDeadline(time.Now().Add(30 * time.Millisecond))
		if kind, _, err := s.Recv(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("frame of kind %d beyond the window, %v", kind, err)
		}
		s.conn.SetReadDeadline(time.Time{})
		close(read)
		if kind, payload, err := s.Recv(); err != nil || kind != KindStdoutAck || binary.BigEndian.Uint32(payload) < ackAt {
			t.Errorf("kind %d, %v", kind, err)
		}
		s.Send(KindStdinAck, binary.BigEndian.AppendUint32(nil, StdinWindow))
		drain(s)
	})
	c, err := DialGuest(t.Context(), conn, webPort)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	written := make(chan error, 1)
	go func() {
		_, err := c.Write(make([]byte, StdinWindow+1))
		written <- err
	}()
	<-read
	if _, err := io.CopyN(io.Discard, c, ackAt); err != nil {
		t.Error(err)
	}
	if err := <-written; err != nil {
		t.Errorf("after the acknowledgement: %v", err)
	}
}

// A guest that keeps to no rule ends its connection, and holds up nobody.
func TestGuestConnBadGuests(t *testing.T) {
	for name, c := range map[string]struct {
		script func(s *Stream)
		want   string
	}{
		"too much": {func(s *Stream) {
			for range StdinWindow/MaxPayload + 1 {
				s.Send(KindStdout, make([]byte, MaxPayload))
			}
		}, "more than it may"},
		"more after the end":  {func(s *Stream) { s.Send(KindStdoutEOF, nil); s.Send(KindStdout, []byte("x")) }, "more than it may"},
		"a kind out of place": {func(s *Stream) { s.Send(KindStderr, nil) }, "out of place"},
		"a short ack":         {func(s *Stream) { s.Send(KindStdinAck, []byte{1}) }, "1 bytes instead of 4"},
		"a broken service":    {func(s *Stream) { s.SendJSON(KindExit, Exit{Code: 1, Message: "connection\x1b reset"}) }, "broke the connection: connection reset"},
		"a late refusal":      {func(s *Stream) { s.SendJSON(KindError, Error{Message: "late"}) }, "late"},
		"the end":             {func(s *Stream) {}, ""},
	} {
		conn := scripted(t, func(s *Stream, _ Request) {
			s.SendJSON(KindStarted, Started{})
			c.script(s)
			if name != "the end" {
				drain(s)
			}
		})
		g, err := DialGuest(t.Context(), conn, webPort)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for deadline := time.Now().Add(10 * time.Second); ; {
			if _, err = g.Write(make([]byte, 1024)); err != nil || time.Now().After(deadline) {
				break
			}
		}
		if err == nil {
			t.Errorf("%s: writing goes on", name)
		}
		if _, err = io.Copy(io.Discard, g); name != "more after the end" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		g.Close()
		if _, err := g.Write([]byte("x")); err == nil {
			t.Errorf("%s: written after Close", name)
		}
	}
}

// Close wakes a reader and a writer that waits for the window.
func TestGuestConnClose(t *testing.T) {
	full := make(chan struct{})
	conn := scripted(t, func(s *Stream, _ Request) {
		s.SendJSON(KindStarted, Started{})
		for got := 0; got < StdinWindow; {
			_, payload, err := s.Recv()
			if err != nil {
				t.Error(err)
				break
			}
			got += len(payload)
		}
		close(full)
		drain(s)
	})
	c, err := DialGuest(t.Context(), conn, webPort)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { _, err := c.Read(make([]byte, 1)); ended <- err }()
	go func() { _, err := c.Write(make([]byte, 2*StdinWindow)); ended <- err }()
	<-full
	c.Close()
	for range 2 {
		select {
		case err := <-ended:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%v", err)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("one of them waits on")
		}
	}
}

// The frames of a Dial pass the border in their own direction only.
func TestDialFramesPass(t *testing.T) {
	for _, c := range []struct {
		kind              Kind
		payload           string
		host, guest, fits bool
	}{
		{KindStdoutAck, "1234", true, false, true}, {KindStdoutAck, "123", true, false, false},
		{KindStdoutEOF, "", false, true, true}, {KindStdoutEOF + 1, "", false, false, false}, {KindStdoutAck + 1, "", false, false, false},
	} {
		if c.kind.FromHost() != c.host || c.kind.FromGuest() != c.guest || c.kind.Last() {
			t.Errorf("kind %d passes from host %v, from guest %v", c.kind, c.kind.FromHost(), c.kind.FromGuest())
		}
		if _, err := Sanitize(c.kind, []byte(c.payload)); (err == nil) != c.fits {
			t.Errorf("kind %d with %q: %v", c.kind, c.payload, err)
		}
	}
	if out, err := Sanitize(KindStdoutEOF, []byte("x")); err != nil || len(out) != 0 {
		t.Errorf("an end with %q, %v", out, err)
	}
}

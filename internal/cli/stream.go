package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/guest/wire"
)

const (
	// streamProtocol is the token of the Upgrade header, see docs/api.md.
	streamProtocol = "banger-stream/1"
	// acceptTimeout bounds how long the daemon may take to accept or refuse a command:
	// it may wait for the guest's system first.
	acceptTimeout = 10 * time.Minute
	// maxStdin is how much of stdin goes into one frame, in bytes.
	maxStdin = 32 << 10
)

// command is one command to run in a guest.
type command struct {
	vm   string // its id, or another reference
	name string // for messages
	exec wire.Exec
	// begun is called when the guest has begun the command; it may be nil.
	begun func()
}

// runInGuest runs cmd with banger's own streams and returns the guest's exit code.
// Meanwhile signals go to the command. A *guestError means that it was not begun.
//
// Output that nobody reads any more (a closed pipe) ends the command with an error that
// isBrokenPipe knows; a second Ctrl-C, or a terminal that went away, with errInterrupted.
func (a *app) runInGuest(ctx context.Context, c *client, cmd command) (int, error) {
	if ctx.Err() != nil {
		return 0, errInterrupted
	}
	cols, rows := a.terminalSize()
	if cmd.exec.TTY {
		cmd.exec.Rows, cmd.exec.Cols = rows, cols
	}
	conn, r, err := c.upgrade(ctx, wire.OpExec, cmd.vm)
	if err != nil {
		return 0, err
	}
	s := &stream{
		app: a, conn: conn, in: r, control: make(chan frame, 16), data: make(chan frame),
		gone: make(chan struct{}), window: wire.NewWindow(),
	}
	defer s.close()
	return s.run(cmd)
}

// upgrade asks the daemon for a stream with a guest, see docs/api.md.
func (c *client) upgrade(ctx context.Context, op, vm string) (net.Conn, *bufio.Reader, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	defer stop()
	fail := func(err error) (net.Conn, *bufio.Reader, error) {
		conn.Close()
		if ctx.Err() != nil {
			err = errInterrupted
		}
		return nil, nil, err
	}
	conn.SetDeadline(time.Now().Add(acceptTimeout))
	target := "http://banger/v1/" + op + "?" + url.Values{"vm": {vm}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, target, nil)
	if err != nil {
		return fail(err)
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", streamProtocol)
	r := bufio.NewReader(conn)
	if err := req.Write(conn); err != nil {
		return fail(lostDaemon(err))
	}
	res, err := http.ReadResponse(r, req)
	if err != nil {
		return fail(lostDaemon(err))
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		var e struct{ Code, Message, Hint string }
		body, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		if json.Unmarshal(body, &e) != nil || e.Message == "" {
			e.Code, e.Message = string(api.Internal), "the daemon answers "+op+" with "+res.Status
		}
		return fail(&api.Error{Code: api.Code(e.Code), Message: e.Message, Hint: e.Hint})
	}
	if !stop() {
		return fail(errInterrupted)
	}
	conn.SetDeadline(time.Time{})
	return conn, r, nil
}

func lostDaemon(err error) error {
	return api.Errorf(api.Internal, "lost the connection to the daemon: %w", err).WithHint("banger daemon status")
}

type frame struct {
	kind    wire.Kind
	payload []byte
}

// stream is one command's connection. Frames are written by one goroutine, control
// frames before data; all reading is done by run.
type stream struct {
	app     *app
	conn    net.Conn
	in      *bufio.Reader
	control chan frame
	data    chan frame
	window  *wire.Window  // of stdin
	gone    chan struct{} // closed when run has returned
	helpers sync.WaitGroup

	terminal *terminal // nil unless stdin is raw

	mu      sync.Mutex
	leaving error // why banger itself ended the stream
	sigints int
}

// close ends all that run began, but for a read of stdin that waits for a key, and
// gives the terminal back.
func (s *stream) close() {
	close(s.gone)
	s.window.Close()
	s.conn.Close()
	s.helpers.Wait()
	if s.terminal != nil {
		s.terminal.restore()
	}
}

func (s *stream) run(cmd command) (int, error) {
	back := s.app.signals.divert(func(sig os.Signal) { s.signal(sig, cmd.exec.TTY) })
	defer back()
	if s.app.signals.interrupted() {
		return 0, errInterrupted // it came just before
	}
	request, err := json.Marshal(wire.Request{Op: wire.OpExec, Exec: &cmd.exec, Acks: true})
	if err != nil {
		return 0, err
	}
	if len(request) > wire.MaxPayload {
		return 0, api.Errorf(api.Invalid, "the command and its environment are too long: %d bytes, at most %d", len(request), wire.MaxPayload)
	}
	if err := wire.WriteFrame(s.conn, wire.KindRequest, request); err != nil {
		return 0, lostDaemon(err)
	}
	s.helpers.Go(s.write)
	code, err := s.read(cmd)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving != nil {
		return 0, s.leaving
	}
	return code, err
}

// leave ends the stream from this side; the agent ends the command then.
func (s *stream) leave(why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.leaving == nil {
		s.leaving = why
	}
	s.conn.Close()
}

// read handles what comes from the guest until the command has ended.
func (s *stream) read(cmd command) (int, error) {
	buf := make([]byte, wire.MaxPayload)
	for {
		kind, payload, err := wire.ReadFrame(s.in, buf)
		if err != nil {
			return 0, api.Errorf(api.Internal, "lost the connection to %s while the command ran", cmd.name).WithHint("banger show %s", cmd.name)
		}
		switch kind {
		case wire.KindStarted:
			if cmd.begun != nil {
				cmd.begun()
			}
			s.started(cmd.exec)
		case wire.KindStdinAck:
			if err := s.window.Ack(payload); err != nil {
				return 0, err
			}
		case wire.KindStdout:
			if _, err := s.app.stdout.Write(payload); err != nil {
				return 0, fmt.Errorf("cannot write the output: %w", err)
			}
		case wire.KindStderr:
			s.app.ui.raw(payload)
		case wire.KindExit:
			var e wire.Exit
			if err := json.Unmarshal(payload, &e); err != nil {
				return 0, fmt.Errorf("cannot read how the command ended: %w", err)
			}
			return e.Code, nil
		case wire.KindError:
			var e wire.Error
			if err := json.Unmarshal(payload, &e); err != nil {
				return 0, fmt.Errorf("cannot read why the command was not begun: %w", err)
			}
			return 0, &guestError{e.Code, cmd.name + ": " + e.Message}
		}
	}
}

// started begins what must not begin before the command runs: stdin is not taken from
// the terminal, and the terminal not made raw, for a command that does not exist.
func (s *stream) started(e wire.Exec) {
	if e.TTY {
		s.terminal = openTerminal(s.app.stdin)
		if s.terminal != nil {
			s.helpers.Go(s.resizes)
		}
	}
	if e.Stdin {
		go s.readStdin()
	}
}

func (s *stream) readStdin() {
	for {
		buf := make([]byte, maxStdin)
		n, err := s.app.stdin.Read(buf)
		// Input that the command does not read must not lie before a signal.
		if n > 0 && (s.window.Take(n) != nil || !s.send(frame{wire.KindStdin, buf[:n]})) {
			return
		}
		if err != nil {
			s.send(frame{wire.KindStdinEOF, nil})
			return
		}
	}
}

func (s *stream) send(f frame) bool {
	select {
	case s.data <- f:
		return true
	case <-s.gone:
		return false
	}
}

// push queues a control frame. When the guest takes nothing any more the queue is full
// and the frame is dropped.
func (s *stream) push(kind wire.Kind, v any) {
	payload, err := json.Marshal(v)
	if err != nil {
		return
	}
	select {
	case s.control <- frame{kind, payload}:
	default:
	}
}

func (s *stream) write() {
	for {
		var f frame
		select {
		case f = <-s.control:
		default:
			select {
			case f = <-s.control:
			case f = <-s.data:
			case <-s.gone:
				return
			}
		}
		if wire.WriteFrame(s.conn, f.kind, f.payload) != nil {
			return // the reader sees it too
		}
	}
}

// signal is what a signal to banger does while a command runs: the command gets it,
// and a second Ctrl-C leaves. With a tty Ctrl-C never comes here, so what comes is
// meant for banger; the same holds for SIGHUP: there is no terminal any more.
func (s *stream) signal(sig os.Signal, tty bool) {
	if sig == syscall.SIGHUP || tty {
		s.leave(errInterrupted)
		return
	}
	s.mu.Lock()
	if sig == syscall.SIGINT {
		s.sigints++
	}
	again := s.sigints > 1
	s.mu.Unlock()
	if again {
		s.leave(errInterrupted)
		return
	}
	if number, ok := sig.(syscall.Signal); ok {
		if name := unix.SignalName(number); len(name) > 3 {
			s.push(wire.KindSignal, wire.Signal{Name: name[3:]})
		}
	}
}

// resizes tells the guest the size of the terminal whenever it changes.
func (s *stream) resizes() {
	changed, stop := s.terminal.changes()
	defer stop()
	for {
		// Also at once: it may have changed while the command was being started.
		cols, rows := s.app.terminalSize()
		s.push(wire.KindResize, wire.Resize{Rows: rows, Cols: cols})
		select {
		case <-changed:
		case <-s.gone:
			return
		}
	}
}

// isNoDir tells that the directory to run in does not exist in the guest.
func isNoDir(err error) bool {
	var e *guestError
	return errors.As(err, &e) && e.code == wire.ErrNoDir
}

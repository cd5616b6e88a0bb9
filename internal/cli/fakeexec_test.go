package cli

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// guestEnd is the guest's side of an exec stream.
type guestEnd struct {
	t    testing.TB
	conn net.Conn
	r    *bufio.Reader
}

func (d *fakeDaemon) serveExec(w http.ResponseWriter, r *http.Request) {
	d.serveStream(w, r, func(vm *bangerv1.VM, req wire.Request, g *guestEnd) {
		if req.Op != wire.OpExec || req.Exec == nil {
			d.t.Errorf("the first frame asks for %+v", req)
			return
		}
		d.note("exec %s %s", vm.Name, describeExec(*req.Exec))
		d.exec(*req.Exec, g)
	})
}

// serveStream accepts a stream, or refuses it, and reads its first frame.
func (d *fakeDaemon) serveStream(w http.ResponseWriter, r *http.Request, serve func(*bangerv1.VM, wire.Request, *guestEnd)) {
	op := path.Base(r.URL.Path)
	ref := r.URL.Query().Get("vm")
	vm, err := d.resolve(ref)
	if err == nil && d.refuse[op] != nil {
		err = d.refuse[op]
	}
	if err == nil {
		d.mu.Lock()
		err = d.askEndingLocked(op)
		d.mu.Unlock()
	}
	if err != nil {
		e := asError(err)
		w.WriteHeader(http.StatusConflict)
		json.NewEncoder(w).Encode(map[string]string{"code": string(e.Code), "message": e.Message, "hint": e.Hint})
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		d.t.Error(err)
		return
	}
	defer conn.Close()
	d.mu.Lock()
	d.conns = slices.DeleteFunc(d.conns, func(c net.Conn) bool { return c == conn })
	d.mu.Unlock()
	fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", streamProtocol)
	kind, payload, err := wire.ReadFrame(buffered.Reader, nil)
	if err != nil {
		return // the client had second thoughts
	}
	var req wire.Request
	if err := json.Unmarshal(payload, &req); err != nil || kind != wire.KindRequest {
		d.t.Errorf("the first frame is %d %q", kind, payload)
		return
	}
	serve(vm, req, &guestEnd{t: d.t, conn: conn, r: buffered.Reader})
}

func describeExec(x wire.Exec) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q", x.Argv)
	for _, part := range []struct{ key, value string }{{"dir", x.Dir}, {"user", x.User}, {"env", strings.Join(x.Env, " ")}} {
		if part.value != "" {
			fmt.Fprintf(&b, " %s=%s", part.key, part.value)
		}
	}
	if x.TTY {
		fmt.Fprintf(&b, " tty %dx%d", x.Cols, x.Rows)
	}
	if x.Stdin {
		b.WriteString(" stdin")
	}
	return b.String()
}

func (g *guestEnd) started()           { wire.NewStream(g.conn).SendJSON(wire.KindStarted, wire.Started{PID: 7}) }
func (g *guestEnd) out(p string) error { return wire.WriteFrame(g.conn, wire.KindStdout, []byte(p)) }
func (g *guestEnd) err(p string) error { return wire.WriteFrame(g.conn, wire.KindStderr, []byte(p)) }
func (g *guestEnd) exit(code int) {
	wire.NewStream(g.conn).SendJSON(wire.KindExit, wire.Exit{Code: code})
}
func (g *guestEnd) fail(code, m string) {
	wire.NewStream(g.conn).SendJSON(wire.KindError, wire.Error{Code: code, Message: m})
}

// next reads a frame; io.EOF when the client has gone.
func (g *guestEnd) next() (wire.Kind, string, error) {
	g.conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	kind, payload, err := wire.ReadFrame(g.r, nil)
	if kind == wire.KindStdin {
		wire.WriteFrame(g.conn, wire.KindStdinAck, binary.BigEndian.AppendUint32(nil, uint32(len(payload))))
	}
	return kind, string(payload), err
}

// stdin reads frames until stdin has ended.
func (g *guestEnd) stdin() string {
	var b strings.Builder
	for {
		kind, payload, err := g.next()
		if err != nil || kind == wire.KindStdinEOF {
			return b.String()
		}
		if kind == wire.KindStdin {
			b.WriteString(payload)
		}
	}
}

// gone waits until the client has closed the stream.
func (g *guestEnd) gone() bool {
	for {
		if _, _, err := g.next(); err != nil {
			return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || strings.Contains(err.Error(), "reset")
		}
	}
}

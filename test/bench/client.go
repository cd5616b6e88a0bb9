package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/guest/wire"
	"banger/internal/shim"
)

// client speaks the API of docs/api.md directly: no start of a CLI is in its times.
type client struct {
	i    *instance
	http *http.Transport
	vms  bangerv1connect.VMsClient
	ops  bangerv1connect.OperationsClient
}

func (i *instance) client() *client {
	c := &client{i: i}
	c.http = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) }}
	hc := &http.Client{Transport: c.http}
	const at = "http://banger"
	c.vms = bangerv1connect.NewVMsClient(hc, at, connect.WithAcceptCompression("gzip", nil, nil))
	c.ops = bangerv1connect.NewOperationsClient(hc, at, connect.WithAcceptCompression("gzip", nil, nil))
	return c
}

func (c *client) close() { c.http.CloseIdleConnections() }

func (c *client) dial(ctx context.Context) (net.Conn, error) {
	return wire.DialUnix(ctx, c.i.layout.Root, filepath.Base(c.i.layout.Socket()))
}

// wait watches an operation to its end.
func (c *client) wait(ctx context.Context, op *bangerv1.Operation, err error) (*bangerv1.Operation, error) {
	if err != nil {
		return nil, err
	}
	stream, err := c.ops.Watch(ctx, &bangerv1.WatchOperationRequest{Id: op.Id})
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	for stream.Receive() {
		op = stream.Msg()
	}
	switch {
	case stream.Err() != nil:
		return nil, stream.Err()
	case op.State != bangerv1.Operation_DONE:
		return nil, fmt.Errorf("%s of %s: %s", op.Kind, op.Target, op.GetError().GetMessage())
	}
	return op, nil
}

// create makes a VM and returns it when it is as ready as req says.
func (c *client) create(ctx context.Context, req *bangerv1.CreateVMRequest) (*bangerv1.VM, error) {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	op, err := c.vms.Create(ctx, req)
	op, err = c.wait(ctx, op, err)
	return op.GetVm(), err
}

func (c *client) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, clearTimeout)
	defer cancel()
	op, err := c.vms.Delete(ctx, &bangerv1.DeleteVMRequest{Ref: id, Force: true})
	_, err = c.wait(ctx, op, err)
	return err
}

// removeAll removes every VM that runs: of the others only files are left, and they go
// with the state directory.
func (c *client) removeAll(ctx context.Context) error {
	defer c.close()
	res, err := c.vms.List(ctx, &bangerv1.ListVMsRequest{})
	if err != nil {
		return err
	}
	for _, v := range res.Vms {
		if v.State != bangerv1.VM_STOPPED {
			if rerr := c.remove(ctx, v.Id); rerr != nil {
				err = rerr
			}
		}
	}
	return err
}

// attach begins an exec over the upgraded connection.
func (c *client) attach(ctx context.Context, vm string, x wire.Exec) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(bootTimeout))
	s := &session{conn: conn, in: bufio.NewReader(conn)}
	if err := s.upgrade(vm, x); err != nil {
		conn.Close()
		return nil, fmt.Errorf("exec of %s: %w", strings.Join(x.Argv, " "), err)
	}
	return s, nil
}

// session is one attached command.
type session struct {
	conn net.Conn
	in   *bufio.Reader
	buf  [wire.MaxPayload]byte
}

func (s *session) upgrade(vm string, x wire.Exec) error {
	req, err := http.NewRequest(http.MethodPost, "http://banger/v1/exec?"+url.Values{"vm": {vm}}.Encode(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "banger-stream/1")
	if err := req.Write(s.conn); err != nil {
		return err
	}
	res, err := http.ReadResponse(s.in, req)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		return fmt.Errorf("%s: %s", res.Status, body)
	}
	return wire.NewStream(s.conn).SendJSON(wire.KindRequest, wire.Request{Op: wire.OpExec, Exec: &x})
}

// next returns the next output of the command; io.EOF when it has ended with code 0.
func (s *session) next() ([]byte, error) {
	for {
		kind, payload, err := wire.ReadFrame(s.in, s.buf[:])
		if err != nil {
			return nil, err
		}
		switch kind {
		case wire.KindStdout, wire.KindStderr:
			if len(payload) == 0 {
				continue // the end of it
			}
			if kind == wire.KindStdout {
				return payload, nil
			}
			return nil, fmt.Errorf("the command says %q", payload)
		case wire.KindExit:
			var e wire.Exit
			if err := json.Unmarshal(payload, &e); err != nil {
				return nil, err
			}
			if e.Code != 0 {
				return nil, fmt.Errorf("the command ended with %d", e.Code)
			}
			return nil, io.EOF
		case wire.KindError:
			return nil, fmt.Errorf("the command was not begun: %s", payload)
		}
	}
}

// ask sends a line of input, or a byte of it, and returns the output that it leads to,
// which must come in one piece.
func (s *session) ask(input string) (string, error) {
	s.conn.SetDeadline(time.Now().Add(callTimeout))
	if err := wire.WriteFrame(s.conn, wire.KindStdin, []byte(input)); err != nil {
		return "", err
	}
	out, err := s.next()
	return strings.TrimSpace(string(out)), err
}

// drain reads to the end of the command.
func (s *session) drain() error {
	defer s.conn.Close()
	for {
		if _, err := s.next(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// processes tells who runs a VM.
func (i *instance) processes(vm string) (shim.Supervised, error) {
	return shim.Processes(i.layout.VM(vm).Path())
}

// together runs f for 0 to n-1 at once and returns the first error.
func together(n int, f func(k int) error) error {
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for k := range n {
		wg.Go(func() { errs <- f(k) })
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

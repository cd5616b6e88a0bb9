package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/config"
)

// callTimeout bounds a unary call. What takes longer is an operation.
const callTimeout = 30 * time.Second

// errNoDaemon means that nobody listens on the socket.
var errNoDaemon = errors.New("no daemon is running")

// client speaks to the daemon of one state directory. It holds no connection that a
// restart of the daemon would break for good: each call dials when it must.
type client struct {
	layout config.Layout
	dir    *os.File // the state directory
	http   *http.Transport

	machine    bangerv1connect.MachineClient
	vms        bangerv1connect.VMsClient
	workspaces bangerv1connect.WorkspacesClient
	images     bangerv1connect.ImagesClient
	kernels    bangerv1connect.KernelsClient
	operations bangerv1connect.OperationsClient

	status *bangerv1.StatusResponse // as of the connect

	// next returns when the daemon that is about to end has been followed by another;
	// nil where none is to be started.
	next    func(ctx context.Context) error
	waiting sync.Mutex // of several calls one waits in next at a time

	peer atomic.Int32 // the process that listened on the socket when it was dialled last
}

// openClient opens the state directory, and with create makes it. It does not connect.
// Without create the error is errNoDaemon when there is no such directory.
func openClient(l config.Layout, create bool) (*client, error) {
	if create {
		if err := l.Prepare(); err != nil {
			return nil, err
		}
	}
	dir, err := os.OpenFile(l.Root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoDaemon
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the state directory: %w", err)
	}
	c := &client{layout: l, dir: dir}
	c.http = &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableCompression: true,
	}
	const url = "http://banger"
	hc := &http.Client{Transport: c.http}
	opts := connect.WithClientOptions(
		connect.WithAcceptCompression("gzip", nil, nil), // it costs more than a local socket gains
		connect.WithInterceptors(connect.UnaryInterceptorFunc(c.unary)),
	)
	c.machine = bangerv1connect.NewMachineClient(hc, url, opts)
	c.vms = bangerv1connect.NewVMsClient(hc, url, opts)
	c.workspaces = bangerv1connect.NewWorkspacesClient(hc, url, opts)
	c.images = bangerv1connect.NewImagesClient(hc, url, opts)
	c.kernels = bangerv1connect.NewKernelsClient(hc, url, opts)
	c.operations = bangerv1connect.NewOperationsClient(hc, url, opts)
	return c, nil
}

// unary gives every call a deadline. One that came to a daemon which is about to end, or
// has ended, because a banger replaces it, has begun nothing there and is made to the next.
func (c *client) unary(call connect.UnaryFunc) connect.UnaryFunc {
	bounded := func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		return call(ctx, req)
	}
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		res, err := bounded(ctx, req)
		if req.Spec().Procedure == bangerv1connect.MachineStatusProcedure || !c.succeeded(ctx, err) {
			return res, err
		}
		return bounded(ctx, req)
	}
}

// succeeded tells whether a call that ended with err has begun nothing, because its daemon
// is about to end or is gone, and another daemon is there now. It waits for that one.
func (c *client) succeeded(ctx context.Context, err error) bool {
	if c.next == nil || codeOf(err) != api.Stopping && !errors.Is(err, errNoDaemon) {
		return false
	}
	c.waiting.Lock()
	defer c.waiting.Unlock()
	return c.next(ctx) == nil
}

func (c *client) close() {
	c.http.CloseIdleConnections()
	c.dir.Close()
}

// dial connects to the socket through a descriptor of its directory, because a
// socket's path has 107 bytes at most (unix(7)). A socket of another user is refused:
// what it answers would be believed, and what it is sent are the user's files.
func (c *client) dial(ctx context.Context) (net.Conn, error) {
	dir, err := c.dir.SyscallConn()
	if err != nil {
		return nil, err
	}
	// net/http may dial for a call that is over: Control keeps the descriptor from being
	// closed, and its number from being another file's, meanwhile.
	var conn net.Conn
	cerr := dir.Control(func(fd uintptr) { conn, err = c.dialAt(ctx, int(fd)) })
	if cerr != nil {
		return nil, fmt.Errorf("cannot use the state directory: %w", cerr)
	}
	return conn, err
}

func (c *client) dialAt(ctx context.Context, dir int) (net.Conn, error) {
	name := filepath.Base(c.layout.Socket())
	var st unix.Stat_t
	err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil, errNoDaemon
	}
	if err != nil {
		return nil, fmt.Errorf("cannot look at %s: %w", c.layout.Socket(), err)
	}
	if err := c.ours(st.Uid); err != nil {
		return nil, err
	}
	d := net.Dialer{Timeout: callTimeout}
	conn, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir, name))
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil, errNoDaemon
	}
	if err != nil {
		return nil, fmt.Errorf("cannot connect to %s: %w", c.layout.Socket(), err)
	}
	peer, err := peerOf(conn.(*net.UnixConn))
	if err == nil {
		err = c.ours(peer.Uid)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	c.peer.Store(peer.Pid)
	return conn, nil
}

func (c *client) ours(uid uint32) error {
	if int(uid) == os.Geteuid() {
		return nil
	}
	return api.Errorf(api.Refused, "the socket %s belongs to uid %d, not to uid %d", c.layout.Socket(), uid, os.Geteuid()).
		WithHint("set BANGER_STATE_DIR to a directory of your own")
}

// peerOf tells who listens, see SO_PEERCRED in unix(7).
func peerOf(conn *net.UnixConn) (*unix.Ucred, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return cred, errors.Join(cerr, err)
}

// ask fills in c.status. The error is errNoDaemon when nobody listens.
func (c *client) ask(ctx context.Context) error {
	status, err := c.machine.Status(ctx, &bangerv1.StatusRequest{})
	if errors.Is(err, errNoDaemon) {
		return errNoDaemon
	}
	if err != nil {
		return err
	}
	c.status = status
	return nil
}

// running connects to the daemon that runs, and starts none. Of one that is about to end
// there is no status.
func (a *app) running(ctx context.Context) (*client, error) {
	l, err := a.layout()
	if err != nil {
		return nil, err
	}
	c, err := openClient(l, false)
	if err != nil {
		return nil, err
	}
	if err := c.ask(ctx); err != nil && codeOf(err) != api.Stopping {
		c.close()
		return nil, err
	}
	return c, nil
}

// connect connects to the daemon; it starts one when none runs, and replaces an idle
// one that is older than the bangerd that this banger would start.
func (a *app) connect(ctx context.Context) (*client, error) {
	l, err := a.layout()
	if err != nil {
		return nil, err
	}
	c, err := openClient(l, true)
	if err != nil {
		return nil, err
	}
	c.next = func(ctx context.Context) error { return a.ensure(ctx, c) }
	if err = a.ensure(ctx, c); err == nil {
		err = a.renew(ctx, c)
	}
	if err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

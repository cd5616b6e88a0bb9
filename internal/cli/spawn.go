package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"banger/api"
	bangerv1 "banger/api/banger/v1"
)

const (
	// startTimeout bounds how long a daemon may take until it serves: it adopts or
	// clears away what the last one left.
	startTimeout = 60 * time.Second
	// exitTimeout bounds how long a daemon that was asked to end may take.
	exitTimeout  = 30 * time.Second
	pollInterval = 25 * time.Millisecond
	// respawnInterval is how long a daemon that another one kept from starting, or that
	// is starting, is waited for before the next is tried.
	respawnInterval = 250 * time.Millisecond
	maxStarts       = 3
	// readyFD names, to what detach started, the descriptor on which it says how its
	// start went: one JSON object, readiness.
	readyFD = "BANGER_READY_FD"
)

// readiness is what a daemon, or a forward, tells the banger that started it.
type readiness struct {
	Ready   bool     `json:"ready"`
	Address string   `json:"address,omitempty"` // of a forward
	Code    api.Code `json:"code,omitempty"`
	Message string   `json:"message,omitempty"`
	Hint    string   `json:"hint,omitempty"`
}

// ensure returns when a daemon answers on the socket; it starts one if there is none.
// Of several that are started at once the daemons' lock lets one live, and a daemon
// that is about to end is waited for.
func (a *app) ensure(ctx context.Context, c *client) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	started, notBefore := 0, time.Time{}
	return a.startFailed(ctx, c, 0, poll(ctx, func() (bool, error) {
		err := c.ask(ctx)
		if err == nil || !isLost(err) {
			return err == nil, err
		}
		if time.Now().Before(notBefore) {
			return false, nil
		}
		if started == maxStarts {
			return false, errors.New("it starts and ends again")
		}
		err = a.spawn(ctx, c)
		notBefore = time.Now().Add(respawnInterval)
		switch {
		case err == nil:
			started++
			err = c.ask(ctx)
			return err == nil, nil
		case codeOf(err) == api.Busy:
			return false, nil
		}
		return false, err
	}))
}

// poll calls done until it is, it fails, or ctx ends.
func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// program finds bangerd: what BANGERD names, the one beside banger, the one in PATH.
func (a *app) program() (string, error) {
	var places []string
	if named := a.env.get("BANGERD"); named != "" {
		places = []string{named}
	} else {
		if self, err := os.Executable(); err == nil {
			places = append(places, filepath.Join(filepath.Dir(self), "bangerd"))
		}
		for _, dir := range filepath.SplitList(a.env.get("PATH")) {
			if filepath.IsAbs(dir) {
				places = append(places, filepath.Join(dir, "bangerd"))
			}
		}
	}
	for _, place := range places {
		if info, err := os.Stat(place); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return filepath.Abs(place)
		}
	}
	if len(places) == 1 {
		return "", api.Errorf(api.NotReady, "cannot find bangerd at %s", places[0]).WithHint("make build")
	}
	return "", api.Errorf(api.NotReady, "cannot find bangerd beside banger or in PATH").WithHint("make build")
}

// spawn starts bangerd as a process of its own (session, no terminal, no inherited
// descriptor but the log and a pipe) and returns when it says that it is ready or why
// not.
func (a *app) spawn(ctx context.Context, c *client) error {
	if c.layout.IsSystem() {
		return api.Errorf(api.NotReady, "the system's daemon of %s does not run", c.layout.Root).WithHint("bangerd --system")
	}
	program, err := a.program()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(c.layout.Log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the daemon's log: %w", err)
	}
	defer log.Close()
	from, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return err
	}
	defer null.Close()
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	_, err = a.detach(c, program, []string{program}, []*os.File{null, log, log, pw})
	pw.Close()
	if err != nil {
		return api.Errorf(api.NotReady, "cannot start %s: %w", program, err).WithHint("make build")
	}
	r, err := readReadiness(ctx, pr)
	if err != nil {
		return a.startFailed(ctx, c, from, err)
	}
	return r.err()
}

// readReadiness waits for what a process that was started says, until ctx ends.
func readReadiness(ctx context.Context, from *os.File) (r readiness, err error) {
	stop := context.AfterFunc(ctx, func() { from.SetReadDeadline(time.Now()) })
	defer stop()
	err = json.NewDecoder(io.LimitReader(from, 64<<10)).Decode(&r)
	if errors.Is(err, io.EOF) {
		err = errors.New("it ended at once")
	}
	return r, err
}

func (r readiness) err() error {
	if r.Ready {
		return nil
	}
	return &api.Error{Code: r.Code, Message: r.Message, Hint: r.Hint}
}

// detach starts a process that outlives banger, with these descriptors and no others; the
// fourth is where it says how its start went. It returns its id.
func (a *app) detach(c *client, program string, argv []string, files []*os.File) (pid int, err error) {
	// What banger itself inherited, for example from make or a test runner, would stay
	// open in the process and keep its owner waiting.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return 0, fmt.Errorf("cannot close inherited descriptors: %w", err)
	}
	env := a.env.with("BANGER_STATE_DIR", c.layout.Root).with(readyFD, "3")
	process, err := os.StartProcess(program, argv, &os.ProcAttr{
		Dir: "/", Env: env, Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, err
	}
	go process.Wait() // reaped when it ends before banger does
	return process.Pid, nil
}

// startFailed says why a daemon did not come up, with the last lines of its log from
// offset on. An error that says all, such as one the daemon itself gave, is left alone.
func (a *app) startFailed(ctx context.Context, c *client, offset int64, err error) error {
	var said *api.Error
	switch {
	case err == nil, errors.As(err, &said):
		return err
	case a.signals.interrupted():
		return errInterrupted
	}
	var ce *connect.Error
	if ctx.Err() == nil && errors.As(err, &ce) {
		if said = asError(err); said.Code == api.Unresponsive {
			return api.Errorf(said.Code, "the daemon (pid %d) did not answer within %v", c.peer.Load(), callTimeout).
				WithHint("kill -9 %d", c.peer.Load()) // a daemon may be killed at any moment; VMs run on
		}
		return said
	}
	code := api.Internal
	if ctx.Err() != nil {
		code, err = api.Unresponsive, fmt.Errorf("it did not answer within %v", startTimeout)
	}
	message := "cannot start the daemon: " + err.Error()
	for _, line := range tail(c.layout.Log(), offset, 10) {
		message += "\n" + line
	}
	return api.Errorf(code, "%s", message).WithHint("banger doctor")
}

// tail reads the last n lines of a file after offset; no more than 64 KiB are looked at.
func tail(path string, offset int64, n int) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil {
		offset = max(offset, info.Size()-64<<10)
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return nil
	}
	var lines []string
	for s := bufio.NewScanner(io.LimitReader(f, 64<<10)); s.Scan(); {
		lines = append(lines, s.Text())
	}
	return lines[max(0, len(lines)-n):]
}

// renew replaces a daemon that is older than the bangerd here, when it is idle. A busy
// one is spoken to as it is: fields are only ever added to the API.
func (a *app) renew(ctx context.Context, c *client) error {
	if c.layout.IsSystem() {
		return nil // who started it renews it
	}
	program, err := a.program()
	if err != nil {
		return nil // nothing to replace it with
	}
	build, err := buildOf(program)
	if err != nil || !newer(build, c.status.Build) {
		return nil
	}
	if err := c.shutdown(ctx, true); err != nil {
		if codeOf(err) != api.Busy {
			return err
		}
		a.ui.note("the running daemon is of another version (%s) and busy: it goes on, and is replaced when it is idle", c.status.Version)
		return nil
	}
	return a.ensure(ctx, c)
}

// shutdown asks the daemon to end and returns when it has.
func (c *client) shutdown(ctx context.Context, ifIdle bool) error {
	if _, err := c.machine.Shutdown(ctx, &bangerv1.ShutdownRequest{IfIdle: ifIdle}); err != nil && !isLost(err) {
		return err
	}
	pid := c.status.GetPid()
	ctx, cancel := context.WithTimeout(ctx, exitTimeout)
	defer cancel()
	err := poll(ctx, func() (bool, error) {
		c.http.CloseIdleConnections()
		err := c.ask(ctx)
		// Another banger may have started the next one meanwhile.
		gone := isLost(err) && codeOf(err) != api.Stopping || err == nil && c.status.Pid != pid
		return gone, nil
	})
	if err != nil {
		return api.Errorf(api.Unresponsive, "the daemon (pid %d) did not end within %v", pid, exitTimeout).
			WithHint("kill %d", pid)
	}
	return nil
}

// buildOf identifies a program as "TIME-SIZE": when it was installed, in nanoseconds
// since 1970, and its bytes. bangerd answers its own in Status.
func buildOf(program string) (string, error) {
	info, err := os.Stat(program)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d-%d", info.ModTime().UnixNano(), info.Size()), nil
}

// newer tells whether build a is younger than b. One that cannot be read is older than
// any other.
func newer(a, b string) bool { return buildTime(a) > buildTime(b) }

func buildTime(build string) int64 {
	head, _, _ := strings.Cut(build, "-")
	n, err := strconv.ParseInt(head, 10, 64)
	if err != nil {
		return -1
	}
	return n
}

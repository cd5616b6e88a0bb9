package hostcmd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a command that runs. It is reaped whether or not anybody waits.
type Process struct {
	// Stdin feeds the command when Command.Stdin was nil; nil else. Close it to let
	// the command see the end of its input.
	Stdin io.WriteCloser
	// Stdout is the command's output when Command.Stdout was nil; nil else. Read it
	// to its end before Wait.
	Stdout io.ReadCloser

	argv    []string
	process *os.Process
	leash   *os.File
	stderr  *tail
	feed    *feeder
	drains  []*drain
	piped   *output // Stdout

	parent context.Context
	ctx    context.Context // ends with parent, or when a stream failed
	cancel context.CancelCauseFunc

	done  chan struct{}    // closed when the command has ended and its group was killed
	state *os.ProcessState // this and reap are set before done is closed
	reap  error
}

// Start starts the command with pipes where c names no stream. An error is an
// *Error.
func Start(ctx context.Context, c Command) (*Process, error) {
	return start(ctx, c, true)
}

// Wait waits for the end of the command and of its streams, and closes Stdin and
// Stdout. An error is an *Error. It may be called once. A Stdout of Command that
// blocks holds it until 5 s after ctx has ended.
func (p *Process) Wait() error {
	<-p.done
	failures := []error{p.reap}
	for _, d := range p.drains {
		failures = append(failures, d.wait(p.parent))
	}
	if p.feed != nil {
		failures = append(failures, p.feed.wait())
	}
	if p.Stdin != nil {
		p.Stdin.Close()
	}
	if p.Stdout != nil {
		p.Stdout.Close()
	}
	p.cancel(nil)
	cause := errors.Join(failures...)
	if cause == nil && !p.state.Success() {
		if cause = p.parent.Err(); cause == nil {
			cause = &exec.ExitError{ProcessState: p.state}
		}
	}
	if cause == nil {
		return nil
	}
	return &Error{Argv: p.argv, ExitCode: p.state.ExitCode(), Stderr: p.stderr.String(), Err: cause}
}

func start(parent context.Context, c Command, piped bool) (*Process, error) {
	fail := func(err error) (*Process, error) {
		return nil, &Error{Argv: c.Argv, ExitCode: -1, Err: err}
	}
	if len(c.Argv) == 0 {
		return fail(errNoCommand)
	}
	if err := parent.Err(); err != nil {
		return fail(err)
	}
	program, err := LookPath(c.Argv[0])
	if err == nil {
		// Or a relative path would mean another file in Command.Dir.
		program, err = filepath.Abs(program)
	}
	if err != nil {
		return fail(err)
	}
	ctx, cancel := context.WithCancelCause(parent)
	p := &Process{
		argv: c.Argv, stderr: &tail{limit: MaxStderr}, done: make(chan struct{}),
		parent: parent, ctx: ctx, cancel: cancel,
	}
	childs, err := p.streams(c, piped)
	if err == nil {
		started := make(chan error, 1)
		go p.live(program, c, childs.files, started)
		err = <-started
	}
	childs.close()
	if err != nil {
		p.abandon()
		return fail(err)
	}
	p.begin()
	return p, nil
}

// ends are the descriptors that the command gets, and those among them that are
// ours to close.
type ends struct {
	files []*os.File
	ours  []*os.File
}

func (e *ends) add(file *os.File, ours bool) {
	e.files = append(e.files, file)
	if ours {
		e.ours = append(e.ours, file)
	}
}

func (e *ends) close() {
	for _, file := range e.ours {
		file.Close()
	}
}

// streams makes the pipes: 0, 1, 2, and last the leash.
func (p *Process) streams(c Command, piped bool) (childs ends, err error) {
	if err := p.stdin(c, piped, &childs); err != nil {
		return childs, err
	}
	if err := p.stdout(c, piped, &childs); err != nil {
		return childs, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return childs, err
	}
	childs.add(w, true)
	into := io.Writer(p.stderr)
	if c.Stderr != nil {
		into = &tee{first: p.stderr, second: c.Stderr}
	}
	p.drains = append(p.drains, newDrain(r, into))
	var leash [2]int
	if err := unix.Pipe2(leash[:], unix.O_CLOEXEC); err != nil {
		return childs, err
	}
	childs.add(os.NewFile(uintptr(leash[0]), "leash"), true)
	p.leash = os.NewFile(uintptr(leash[1]), "leash")
	return childs, nil
}

func (p *Process) stdin(c Command, piped bool, childs *ends) error {
	if file, ok := c.Stdin.(*os.File); ok && file != nil {
		childs.add(file, false)
		return nil
	}
	if c.Stdin == nil && !piped {
		null, err := os.Open(os.DevNull)
		if err == nil {
			childs.add(null, true)
		}
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	childs.add(r, true)
	if c.Stdin == nil {
		p.Stdin = w
	} else {
		p.feed = &feeder{from: c.Stdin, to: w, done: make(chan struct{})}
	}
	return nil
}

func (p *Process) stdout(c Command, piped bool, childs *ends) error {
	if file, ok := c.Stdout.(*os.File); ok && file != nil {
		childs.add(file, false)
		return nil
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	childs.add(w, true)
	if c.Stdout == nil && piped {
		p.piped = &output{file: r}
		p.Stdout = p.piped
	} else {
		p.drains = append(p.drains, newDrain(r, c.Stdout))
	}
	return nil
}

// begin sets the streams going once the command runs.
func (p *Process) begin() {
	for _, d := range p.drains {
		go d.run(p.cancel)
	}
	if p.feed != nil {
		go p.feed.run(p.cancel)
	}
}

// abandon closes what a command that did not start leaves.
func (p *Process) abandon() {
	p.cancel(nil)
	for _, d := range p.drains {
		d.from.Close()
	}
	if p.feed != nil {
		p.feed.to.Close()
	}
	if p.Stdin != nil {
		p.Stdin.Close()
	}
	if p.Stdout != nil {
		p.Stdout.Close()
	}
	if p.leash != nil {
		p.leash.Close()
	}
}

// live is the command's life on one thread: see the package comment.
func (p *Process) live(program string, c Command, files []*os.File, started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	env := c.Env
	if env == nil {
		env = Env()
	}
	process, err := os.StartProcess(program, c.Argv, &os.ProcAttr{
		Dir: c.Dir, Env: env, Files: files,
		Sys: &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM},
	})
	if err == nil {
		p.process = process
		if err = tie(files[len(files)-1], process.Pid); err != nil {
			_ = unix.Kill(-process.Pid, unix.SIGKILL)
			_, _ = process.Wait()
		}
	}
	started <- err
	if err != nil {
		return
	}
	ended := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		p.killAtEnd(ended)
	}()
	awaitZombie(process.Pid)
	close(ended)
	<-watched
	// The zombie keeps the group's id from being given away until here.
	_ = unix.Kill(-process.Pid, unix.SIGKILL)
	p.state, p.reap = process.Wait()
	p.leash.Close()
	for _, d := range p.drains {
		d.from.end()
	}
	if p.piped != nil {
		p.piped.end()
	}
	close(p.done)
}

// tie makes the kernel send SIGTERM to the group of pid when the other end of the
// pipe is closed.
func tie(leash *os.File, pid int) error {
	fd := leash.Fd()
	if _, err := unix.FcntlInt(fd, unix.F_SETSIG, int(unix.SIGTERM)); err != nil {
		return fmt.Errorf("cannot tie the command to this process: %w", err)
	}
	if _, err := unix.FcntlInt(fd, unix.F_SETOWN, -pid); err != nil {
		return fmt.Errorf("cannot tie the command to this process: %w", err)
	}
	if _, err := unix.FcntlInt(fd, unix.F_SETFL, unix.O_ASYNC); err != nil {
		return fmt.Errorf("cannot tie the command to this process: %w", err)
	}
	return nil
}

// killAtEnd ends the group when ctx ends before the command.
func (p *Process) killAtEnd(ended <-chan struct{}) {
	select {
	case <-ended:
		return
	case <-p.ctx.Done():
	}
	_ = unix.Kill(-p.process.Pid, unix.SIGTERM)
	timer := time.NewTimer(KillAfter)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
		_ = unix.Kill(-p.process.Pid, unix.SIGKILL)
	}
}

// awaitZombie waits for the end of a child without reaping it.
func awaitZombie(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// tail keeps the end of what is written to it.
type tail struct {
	mu    sync.Mutex
	limit int
	data  []byte
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	if n > t.limit {
		p = p[n-t.limit:]
	}
	t.data = append(t.data, p...)
	// Twice the limit, so that most writes move nothing.
	if len(t.data) > 2*t.limit {
		t.data = append(t.data[:0], t.data[len(t.data)-t.limit:]...)
	}
	return n, nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.data[max(0, len(t.data)-t.limit):])
}

// tee copies to second until that fails.
type tee struct {
	first, second io.Writer
	broken        bool
}

func (t *tee) Write(p []byte) (int, error) {
	if !t.broken {
		_, err := t.second.Write(p)
		t.broken = err != nil
	}
	return t.first.Write(p)
}

package agent

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

// command is what to run, as whom and how.
type command struct {
	path   string // empty: argv[0], looked up in PATH
	argv   []string
	login  bool // argv[0] is passed on with a "-" before it
	env    []string
	dir    string
	cred   *syscall.Credential
	stdin  bool
	acks   bool // see wire.Request
	tty    bool
	size   wire.Resize
	silent bool // stderr becomes the message of the exit
	finish bool // see wire.Exec
}

// exec runs the command that the host asks for.
func (a *Agent) exec(s *wire.Stream, r *wire.Exec, acks bool) error {
	if r == nil {
		return refusal(wire.ErrInvalid, "the command is missing")
	}
	for _, text := range append(append([]string{r.Dir}, r.Argv...), r.Env...) {
		if strings.ContainsRune(text, 0) {
			return refusal(wire.ErrInvalid, "the command contains a zero byte")
		}
	}
	for _, kv := range r.Env {
		if strings.Index(kv, "=") < 1 {
			return refusal(wire.ErrInvalid, "%q is no KEY=VALUE", kv)
		}
	}
	u, err := a.account(r.User)
	if err != nil {
		return err
	}
	c := command{
		argv: r.Argv, env: a.environ(u, r.TTY, r.Env), cred: u.credential(),
		stdin: r.Stdin, acks: acks, tty: r.TTY, size: wire.Resize{Rows: r.Rows, Cols: r.Cols},
		finish: r.Finish,
	}
	if len(c.argv) == 0 {
		c.argv, c.login = []string{u.shell}, true
		if _, err := os.Stat(u.shell); err != nil {
			c.argv[0] = "/bin/sh"
		}
	}
	if c.dir, err = directory(u.home, r.Dir); err != nil {
		return err
	}
	return run(s, c)
}

// directory is where a command runs: what was asked for must be there, a home that
// does not exist becomes "/".
func directory(home, dir string) (string, error) {
	if dir == "" {
		if info, err := os.Stat(home); err != nil || !info.IsDir() {
			return "/", nil
		}
		return home, nil
	}
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(home, dir)
	}
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR):
		return "", refusal(wire.ErrNoDir, "the guest has no directory %s", dir)
	case err != nil:
		return "", refusal(wire.ErrNoDir, "cannot enter %s: %v", dir, cause(err))
	case !info.IsDir():
		return "", refusal(wire.ErrNoDir, "%s is no directory", dir)
	}
	return dir, nil
}

// stdio are the ends of a command's input and output. The child's are closed here
// once it has started; of ours those that the command does not have are nil.
type stdio struct {
	child        [3]*os.File
	in, out, err *os.File
	terminal     bool
}

func openStdio(c command) (*stdio, error) {
	x := &stdio{terminal: c.tty}
	err := x.open(c)
	if err == nil && c.cred != nil {
		// So that the command may open /dev/stdout, which is the same file.
		for _, f := range x.child {
			if f != x.child[0] || c.stdin { // else it is /dev/null
				err = errors.Join(err, f.Chown(int(c.cred.Uid), -1))
			}
		}
	}
	if err != nil {
		x.closeChild()
		x.close()
		return nil, fmt.Errorf("cannot make the command's input and output: %w", err)
	}
	return x, nil
}

func (x *stdio) open(c command) error {
	var err error
	if c.tty {
		if err := x.openTerminal(c.size); err != nil {
			return err
		}
	}
	switch {
	case !c.stdin:
		if x.child[0], err = os.Open(os.DevNull); err != nil {
			return err
		}
	case c.tty:
		x.child[0], x.in = x.child[1], x.out
	default:
		if x.child[0], x.in, err = os.Pipe(); err != nil {
			return err
		}
	}
	if c.tty {
		return nil
	}
	if x.out, x.child[1], err = os.Pipe(); err != nil {
		return err
	}
	x.err, x.child[2], err = os.Pipe()
	return err
}

func (x *stdio) openTerminal(size wire.Resize) error {
	master, slave, err := pty.Open()
	if err != nil {
		return err
	}
	defer master.Close()
	x.child[1], x.child[2] = slave, slave
	// pty.Open leaves its descriptor in blocking mode; a read that cannot be
	// interrupted is of no use here.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return err
	}
	x.out = os.NewFile(uintptr(fd), "ptmx")
	return x.resize(size)
}

// resize sets the size of the terminal; zeros leave it as it is.
func (x *stdio) resize(size wire.Resize) error {
	if !x.terminal || size.Rows == 0 && size.Cols == 0 {
		return nil
	}
	raw, err := x.out.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Rows, Col: size.Cols})
	})
	return errors.Join(err, ierr)
}

func (x *stdio) closeChild() {
	for _, f := range x.child {
		if f != nil {
			f.Close() // closing a file twice is harmless
		}
	}
}

func (x *stdio) close() {
	for _, f := range []*os.File{x.in, x.out, x.err} {
		if f != nil {
			f.Close()
		}
	}
}

// start starts c. The search in PATH is that of execvp(3): the kernel decides, with
// the user's rights, by an attempt at each file that is there.
func start(c command, x *stdio) (*exec.Cmd, error) {
	name := c.argv[0]
	if c.path != "" {
		cmd, err := attempt(c, x, c.path, c.argv)
		if err != nil {
			return nil, fmt.Errorf("cannot start %s: %w", name, err)
		}
		return cmd, nil
	}
	if name == "" {
		return nil, refusal(wire.ErrNotFound, "the command is empty")
	}
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = candidates[:0]
		for _, dir := range filepath.SplitList(getenv(c.env, "PATH")) {
			if dir == "" {
				dir = "."
			}
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	var denied error
	for _, path := range candidates {
		seen := path
		if !filepath.IsAbs(path) {
			seen = filepath.Join(c.dir, path)
		}
		info, err := os.Stat(seen)
		if err != nil {
			continue
		}
		if info.IsDir() {
			denied = refusal(wire.ErrNotExecutable, "cannot execute %s: is a directory", path)
			continue
		}
		cmd, err := attempt(c, x, seen, c.argv)
		if errors.Is(err, unix.ENOEXEC) {
			// A script without "#!", as execvp(3) has it.
			cmd, err = attempt(c, x, "/bin/sh", append([]string{"sh", seen}, c.argv[1:]...))
		}
		switch {
		case err == nil:
			return cmd, nil
		case errors.Is(err, unix.EACCES) && !canEnter(c):
			return nil, refusal(wire.ErrNoDir, "cannot enter %s: permission denied", c.dir)
		case errors.Is(err, unix.EPERM) && c.cred != nil && os.Geteuid() != 0:
			return nil, refusal(wire.ErrNoUser, "cannot become user %d: operation not permitted", c.cred.Uid)
		case errors.Is(err, unix.ENOENT):
			// The file is there, so it is what must run it that is not.
			denied = refusal(wire.ErrNotExecutable, "cannot execute %s: its interpreter does not exist", path)
		case errors.Is(err, unix.EACCES):
			denied = refusal(wire.ErrNotExecutable, "cannot execute %s: permission denied", path)
		default:
			return nil, refusal(wire.ErrNotExecutable, "cannot execute %s: %v", path, cause(err))
		}
	}
	if denied != nil {
		return nil, denied
	}
	if strings.Contains(name, "/") {
		return nil, refusal(wire.ErrNotFound, "cannot execute %s: no such file", name)
	}
	return nil, refusal(wire.ErrNotFound, "cannot find %s in PATH", name)
}

func attempt(c command, x *stdio, path string, argv []string) (*exec.Cmd, error) {
	if c.login {
		argv = append([]string{"-" + filepath.Base(argv[0])}, argv[1:]...)
	}
	cmd := &exec.Cmd{
		Path: path, Args: argv, Env: c.env, Dir: c.dir,
		Stdin: x.child[0], Stdout: x.child[1], Stderr: x.child[2],
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Setctty: c.tty, Credential: c.cred},
	}
	if c.tty {
		cmd.SysProcAttr.Ctty = 1
	}
	return cmd, cmd.Start()
}

// canEnter asks the kernel whether c's user may enter its directory, by a child that
// does nothing else.
func canEnter(c command) bool {
	probe := childCommand(childNothing)
	probe.Dir, probe.SysProcAttr = c.dir, &syscall.SysProcAttr{Credential: c.cred}
	return !errors.Is(probe.Run(), unix.EACCES)
}

// cause is the errno below err, without the path that the message names anyway.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// exitOf says how a process ended.
func exitOf(state *os.ProcessState) wire.Exit {
	if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return wire.Exit{Code: 128 + int(ws.Signal()), Signal: strings.TrimPrefix(unix.SignalName(ws.Signal()), "SIG")}
	}
	return wire.Exit{Code: state.ExitCode()}
}

// ack tells the host that n bytes of stdin were taken.
func ack(s *wire.Stream, n int) error {
	return s.Send(wire.KindStdinAck, binary.BigEndian.AppendUint32(nil, uint32(n)))
}

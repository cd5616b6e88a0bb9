package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

var errLocked = errors.New("the VM runs already")

// StartError is a VMM, or its network process, that could not be started, in the shim's
// words.
type StartError struct {
	Text string
	// Errno is the cause, 0 when there is no such number. Unwrap returns it.
	Errno syscall.Errno
}

func (e *StartError) Error() string { return e.Text }

func (e *StartError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// Place moves the shim, a process of the host's pid that has started nothing yet, to
// where it shall live, and makes Config.Group.
type Place func(ctx context.Context, pid int) error

// Launch starts the supervisor program, and it the VMM, in the VM's directory dir,
// and returns when the VMM has been exec'd. It makes dir/run and dir/log when they
// are missing. When it fails, nothing is left running: a VMM that cannot be
// started is a *StartError, and when ctx ends first the shim is killed and ctx's error
// returned; a VM that runs already is not touched. The shim is reaped inside. place is
// called once if cfg has a Group, and is nil if not; its error is returned, wrapped, and
// what it made is the caller's to remove.
func Launch(ctx context.Context, dir, program string, cfg Config, place Place) (Supervised, error) {
	who, err := launch(ctx, dir, program, cfg, place)
	if err != nil {
		return Supervised{}, fmt.Errorf("cannot start the VM's supervisor: %w", err)
	}
	return who, nil
}

func launch(ctx context.Context, dir, program string, cfg Config, place Place) (who Supervised, err error) {
	if err := ctx.Err(); err != nil {
		return who, err
	}
	if len(cfg.Argv) == 0 {
		return who, errors.New("no command given")
	}
	if cfg.Group != "" && !filepath.IsAbs(cfg.Group) || (cfg.Group == "") != (place == nil) {
		return who, errors.New("a group and who places the VM in it go together")
	}
	if cfg.Network != nil && !filepath.IsAbs(cfg.Network.Program) {
		return who, errors.New("no path of the network's program given")
	}
	if program, err = filepath.Abs(program); err != nil {
		return who, err
	}
	lock, err := takeLock(dir)
	if err != nil {
		return who, err
	}
	defer lock.Close()
	if err := prepare(dir, cfg); err != nil {
		return who, err
	}
	report, reportWriter, err := os.Pipe()
	if err != nil {
		return who, err
	}
	defer report.Close()
	process, err := forkAndPlace(ctx, dir, program, lock, reportWriter, place)
	reportWriter.Close()
	lock.Close()
	if process == nil {
		return who, err
	}
	done := make(chan struct{})
	go func() {
		_, _ = process.Wait()
		close(done)
	}()
	if err == nil {
		err = readReport(ctx, report)
	}
	if err == nil {
		who, err = Processes(dir) // complete before the report
	}
	if err != nil {
		_ = process.Kill()
		<-done
	}
	return who, err
}

// takeLock opens and locks dir/run/lock.
func takeLock(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockFile)
	for _, sub := range []string{filepath.Dir(lockFile), filepath.Dir(exitFile)} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	lock := wholeFile(syscall.F_WRLCK)
	err = fcntlLock(file.Fd(), ofdSetLock, &lock)
	if errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.EACCES) {
		err = errLocked
	}
	if err == nil {
		err = samePath(file, path)
	}
	if err == nil {
		var dying bool
		if dying, err = populated(dir); dying {
			err = errLocked
		}
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// samePath refuses a lock on a file that was removed between its opening and its
// locking: nobody who asks later would see it.
func samePath(file *os.File, path string) error {
	locked, err := file.Stat()
	if err != nil {
		return err
	}
	there, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if !os.SameFile(locked, there) {
		return fmt.Errorf("%s was replaced meanwhile", path)
	}
	return nil
}

func prepare(dir string, cfg Config) error {
	for _, old := range []string{processesFile, exitFile} {
		if err := os.Remove(filepath.Join(dir, old)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	cfg.Version = fileVersion
	return writeJSON(filepath.Join(dir, configFile), cfg, false)
}

// forkAndPlace returns the process also with the error of place: it waits then, or has
// ended.
func forkAndPlace(ctx context.Context, dir, program string, lock, report *os.File, place Place) (*os.Process, error) {
	if place == nil {
		return fork(dir, program, lock, report, nil)
	}
	placed, placedWriter, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer placedWriter.Close()
	process, err := fork(dir, program, lock, report, placed)
	placed.Close()
	if err != nil {
		return nil, err
	}
	// Nobody waits for the process yet, so the pid is its own also if it has ended.
	if err := place(ctx, process.Pid); err != nil {
		// Before the pipe is closed: the shim shall not take it for the daemon's end.
		_ = process.Kill()
		return process, err
	}
	_, _ = placedWriter.Write([]byte{1}) // to a shim that is gone: its report is missing
	return process, nil
}

// fork starts the shim with the lock as descriptor 3, the report's pipe as 4, and, for
// a VM with a group, the pipe that it waits on as 5, in a PID namespace of its own. Its
// environment keeps the Go runtime small: one processor's worth of caches however
// many the host has, and an early collection.
func fork(dir, program string, lock, report, placed *os.File) (*os.Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	attr := &os.ProcAttr{
		Dir:   dir,
		Env:   []string{"GOMAXPROCS=1", "GOGC=10"},
		Files: []*os.File{null, null, null, lock, report},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	if placed != nil {
		attr.Files = append(attr.Files, placed)
		attr.Sys.Cloneflags = syscall.CLONE_NEWPID
	}
	return os.StartProcess(program, []string{"banger-shim"}, attr)
}

// readReport waits for the shim's report: one line, "ok" or "error ERRNO TEXT", then
// the end of the stream.
func readReport(ctx context.Context, report *os.File) error {
	stop := context.AfterFunc(ctx, func() { _ = report.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	data, err := io.ReadAll(io.LimitReader(report, 64<<10))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	line, whole := strings.CutSuffix(string(data), "\n")
	if whole && line == "ok" {
		return nil
	}
	if rest, ok := strings.CutPrefix(line, "error "); ok {
		number, text, _ := strings.Cut(rest, " ")
		if errno, err := strconv.Atoi(number); err == nil {
			return &StartError{Text: text, Errno: syscall.Errno(errno)}
		}
	}
	return errors.New("it ended before it started anything")
}

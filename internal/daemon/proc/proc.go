// Package proc names a process of this host so that no other is ever taken for
// it. A pid alone is a name that the kernel gives away again; a pid, the time it
// started and the boot it started in are not. Keep an Identity where you would
// keep a pid, and do with it only what this package offers: each call opens a
// pidfd first and compares the start time after that. The order is the point.
// Once the descriptor is open it means one process for good, so a comparison
// that holds afterwards holds for what the descriptor means; a comparison made
// before would leave a moment in which the pid may go to a stranger.
//
// A zombie is not alive: it holds nothing any more, and its parent may never
// look.
package proc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Identity is one process, for ever.
type Identity struct {
	PID int `json:"pid"`
	// StartTime is field 22 of /proc/PID/stat: clock ticks since the host's boot,
	// see proc_pid_stat(5).
	StartTime uint64 `json:"start_time"`
	// BootID is what HostBootID said then.
	BootID string `json:"boot_id"`
}

// Identify names the process that has pid now. The error wraps unix.ESRCH when
// there is none, or only a zombie.
func Identify(pid int) (Identity, error) {
	fd, err := (kernel{}).open(pid)
	if err != nil {
		return Identity{}, fmt.Errorf("cannot identify process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	start, err := (kernel{}).startTime(pid)
	if err != nil {
		return Identity{}, fmt.Errorf("cannot identify process %d: %w", pid, err)
	}
	boot, err := HostBootID()
	if err != nil {
		return Identity{}, err
	}
	// Ended meanwhile, the pid may be another's already and start with it.
	if ended(fd) {
		return Identity{}, fmt.Errorf("cannot identify process %d: %w", pid, unix.ESRCH)
	}
	return Identity{PID: pid, StartTime: start, BootID: boot}, nil
}

// Signal sends sig to the process. A process that is gone is a success: there is
// nobody left to tell.
func (id Identity) Signal(sig unix.Signal) error {
	fd, err := id.open(kernel{})
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot signal process %d: %w", id.PID, err)
	}
	defer unix.Close(fd)
	err = unix.PidfdSendSignal(fd, sig, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("cannot signal process %d: %w", id.PID, err)
	}
	return nil
}

// Wait returns nil when the process is gone, a zombie included, and ctx's error
// when ctx ends first. It needs no relation to the process and holds no thread.
func (id Identity) Wait(ctx context.Context) error {
	fd, err := id.open(kernel{})
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot wait for process %d: %w", id.PID, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return fmt.Errorf("cannot wait for process %d: %w", id.PID, err)
	}
	// A non-blocking descriptor is served by the runtime's poller.
	file := os.NewFile(uintptr(fd), "pidfd")
	defer file.Close()
	conn, err := file.SyscallConn()
	if err != nil {
		return fmt.Errorf("cannot wait for process %d: %w", id.PID, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = conn.Read(func(fd uintptr) bool { return ended(int(fd)) })
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("cannot wait for process %d: %w", id.PID, err)
	}
	return nil
}

// HostBootID is the id that the kernel made up at this boot.
func HostBootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("cannot read the host's boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// system is what open asks of the kernel. It is kernel outside of tests, which give
// the pid away between the two questions.
type system interface {
	open(pid int) (fd int, err error)
	startTime(pid int) (uint64, error)
}

// open returns a pidfd of the process, or ESRCH when it is gone.
func (id Identity) open(sys system) (int, error) {
	boot, err := HostBootID()
	if err != nil {
		return -1, err
	}
	if id.PID <= 0 || id.BootID != boot {
		return -1, unix.ESRCH
	}
	fd, err := sys.open(id.PID)
	if err != nil {
		return -1, err
	}
	start, err := sys.startTime(id.PID)
	if err == nil && (start != id.StartTime || ended(fd)) {
		err = unix.ESRCH
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// ended tells whether the process of a pidfd has no living thread left:
// pidfd_open(2) makes it readable then, reaped or not.
func ended(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err != nil || n > 0
	}
}

type kernel struct{}

func (kernel) open(pid int) (int, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	// What kernels say of a thread that is no process.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = unix.ESRCH
	}
	return fd, err
}

func (kernel) startTime(pid int) (uint64, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, unix.ESRCH
	}
	if err != nil {
		return 0, err
	}
	return parseStartTime(string(data))
}

// parseStartTime takes field 22. Field 2, the program's name in parentheses, may
// hold anything, so counting begins after the last ")".
func parseStartTime(stat string) (uint64, error) {
	_, rest, ok := cutLast(stat, ")")
	fields := strings.Fields(rest)
	const first, wanted = 3, 22
	if !ok || len(fields) <= wanted-first {
		return 0, fmt.Errorf("cannot understand the process state %q", stat)
	}
	start, err := strconv.ParseUint(fields[wanted-first], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("cannot understand the process state %q: %w", stat, err)
	}
	return start, nil
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

package shim

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// children are the processes that the shim forked. Who is registered has not been
// reaped yet, so its pid is nobody else's: forking, reaping and signalling exclude each
// other. As the first process of a PID namespace the shim is also given the orphans of
// its children; they are reaped and forgotten.
type children struct {
	namespaced bool // pids here are not those of the host

	mu      sync.Mutex
	reaping bool
	ends    map[int]chan<- syscall.WaitStatus // by pid in this namespace
}

// child is one of them.
type child struct {
	pid     int // in this namespace
	process Process
	// ended has the status once the child was reaped.
	ended <-chan syscall.WaitStatus
}

// start forks and execs. It must be called by the first thread, see Main.
func (c *children) start(program string, argv []string, attr *syscall.ProcAttr) (child, error) {
	pidfd := -1
	if c.namespaced {
		attr.Sys.PidFD = &pidfd
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err := syscall.ForkExec(program, argv, attr)
	if err != nil {
		return child{}, err
	}
	hostPID := pid
	if c.namespaced {
		hostPID, err = pidOfFD(pidfd)
		_ = syscall.Close(pidfd)
	}
	var process Process
	if err == nil {
		process, err = identify(hostPID)
	}
	if err != nil {
		_ = syscall.Kill(pid, syscall.SIGKILL)
		for {
			if _, werr := syscall.Wait4(pid, nil, 0, nil); werr != syscall.EINTR {
				return child{}, err
			}
		}
	}
	ended := make(chan syscall.WaitStatus, 1)
	if c.ends == nil {
		c.ends = make(map[int]chan<- syscall.WaitStatus)
	}
	c.ends[pid] = ended
	if !c.reaping {
		c.reaping = true
		go c.reap()
	}
	return child{pid: pid, process: process, ended: ended}, nil
}

// signal does nothing when the child was reaped.
func (c *children) signal(of child, sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ends[of.pid] != nil {
		_ = syscall.Kill(of.pid, sig)
	}
}

// reap runs until there are no children.
func (c *children) reap() {
	for c.reapOne() {
	}
}

func (c *children) reapOne() (more bool) {
	// Seen first and reaped under the mutex: who is found there is registered, or it
	// is an orphan.
	if err := waitZombie(); err == syscall.EINTR {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	var status syscall.WaitStatus
	pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
	if err == nil {
		if ended := c.ends[pid]; ended != nil {
			ended <- status
			delete(c.ends, pid)
		}
		return true
	}
	if err == syscall.EINTR {
		return true
	}
	// ECHILD: whoever is registered still was reaped by nobody knows whom.
	for pid, ended := range c.ends {
		ended <- 0
		delete(c.ends, pid)
	}
	c.reaping = false
	return false
}

// waitZombie waits for the end of any child without reaping it.
func waitZombie() error {
	const pAll = 0 // P_ALL of waitid(2)
	_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, pAll, 0, 0, syscall.WEXITED|syscall.WNOWAIT, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// pidOfFD is the pid of a pidfd's process as the mounted /proc, which is the host's,
// counts.
func pidOfFD(pidfd int) (int, error) {
	path := "/proc/self/fdinfo/" + strconv.Itoa(pidfd)
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "Pid:"); ok {
			if pid, err := strconv.Atoi(strings.TrimSpace(rest)); err == nil && pid > 0 {
				return pid, nil
			}
		}
	}
	return 0, errors.New("cannot understand " + path)
}

// ownPID is the shim's pid as the mounted /proc counts.
func ownPID() (int, error) {
	name, err := os.Readlink("/proc/self")
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(name)
}

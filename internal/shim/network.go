package shim

import (
	"syscall"
	"time"
)

// Network is the process that carries the VM's network, banger-net. It runs as long
// as the VM: the shim starts it before the VMM and again whenever it ends.
type Network struct {
	// Program is an absolute path. The shim holds the file open from its start on, so
	// that a restart is the same program although the file was removed.
	Program string `json:"program"`
	// Argv is complete; empty is its name alone.
	Argv []string `json:"argv,omitempty"`
	// Env is complete: nothing is inherited.
	Env []string `json:"env,omitempty"`
}

const networkName = "banger-net"

// The pauses before a restart.
const (
	firstPause = 10 * time.Millisecond
	lastPause  = time.Second
	// briefly is a life that is not worth a restart at once.
	briefly = time.Second
	// settled is a life after which all before it is forgotten.
	settled = 10 * time.Second
)

// goodbye is how long banger-net may take to write what its log still holds: some
// milliseconds, unless the disk is busy. The VM's end waits for it.
const goodbye = 200 * time.Millisecond

// pauses is the next pause; zero after a life that was long enough.
type pauses time.Duration

// after is how long to wait before the restart of a process that lived for so long.
// There is no last restart: a VM without its network is worth a try a second.
func (p *pauses) after(lived time.Duration) time.Duration {
	if lived >= settled {
		*p = 0
	}
	pause := time.Duration(*p)
	if pause == 0 && lived < briefly {
		pause = firstPause
	}
	*p = pauses(min(max(2*pause, firstPause), lastPause))
	return pause
}

// network is banger-net's process. All of it is the first thread's, which forks.
type network struct {
	cfg      Network
	children *children
	program  int // the file, open
	stderr   *stderrLog
	errs     int   // where standard error is written to, by one process after the other
	child    child // ended is nil while none runs
	since    time.Time
	pauses   pauses
	stopped  bool
}

// openNetwork starts nothing yet.
func (s *supervisor) openNetwork(cfg Network) error {
	if len(cfg.Argv) == 0 {
		cfg.Argv = []string{networkName}
	}
	program, err := syscall.Open(cfg.Program, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return cannotStart(networkName, err)
	}
	var errs [2]int
	if err := syscall.Pipe2(errs[:], syscall.O_CLOEXEC); err != nil {
		return err
	}
	s.net = &network{cfg: cfg, children: &s.children, program: program, stderr: newStderrLog(networkStderrFile), errs: errs[1]}
	s.drain(errs[0], s.net.stderr, 4<<10)
	return nil
}

// start forks banger-net, with /dev/null as standard input and output. Its descriptor
// 3 is its own program, to be exec'd by that number: what the child inherits under a
// number that it is not told may be another file by then. It has not the lock, which
// says that the VMM lives, not the network.
func (n *network) start() (err error) {
	n.child, err = n.children.start("/proc/self/fd/3", n.cfg.Argv, &syscall.ProcAttr{
		Env:   n.cfg.Env,
		Files: []uintptr{0, 1, uintptr(n.errs), uintptr(n.program)},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return cannotStart(networkName, err)
	}
	n.since = time.Now()
	return nil
}

// keep waits for the end of the VMM and restarts banger-net until then. It stays on the
// first thread, as must whoever forks.
func (s *supervisor) keep() syscall.WaitStatus {
	if s.net == nil {
		return <-s.vmm.ended
	}
	var restart <-chan time.Time
	for {
		select {
		case status := <-s.vmm.ended:
			return status
		case <-s.net.child.ended:
			s.net.child.ended = nil
			restart = time.After(s.net.pauses.after(time.Since(s.net.since)))
		case <-restart:
			restart = nil
			if err := s.net.start(); err != nil {
				restart = time.After(s.net.pauses.after(0))
				continue
			}
			s.who.Net = s.net.child.process
			_ = writeJSON(processesFile, s.who, false) // on a full disk the old one stays
		}
	}
}

// stop ends banger-net for good. Without one, and the second time, it does nothing.
func (n *network) stop() {
	if n == nil || n.stopped {
		return
	}
	n.stopped = true
	if n.child.ended != nil {
		n.children.signal(n.child, syscall.SIGTERM)
		late := time.NewTimer(goodbye)
		defer late.Stop()
		select {
		case <-n.child.ended:
		case <-late.C:
			n.children.signal(n.child, syscall.SIGKILL)
			<-n.child.ended
		}
	}
	_ = syscall.Close(n.errs)
}

package boot

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxAgents bounds how often an agent that ended is started again.
const maxAgents = 5

// stay is PID 1 of an image without an init: it reaps, keeps the agent alive, and
// takes the guest down when told to. It returns only with an error.
func (g *guest) stay() error {
	note("the image has no init that is known: staying")
	agents := 1
	for {
		if g.reap() {
			if agents++; agents > maxAgents {
				return errors.New("cannot keep the agent alive")
			}
			if err := g.startAgent(); err != nil {
				return err
			}
		}
		select {
		case <-g.signals.child:
		case sig := <-g.signals.other:
			if verb := verbOf(sig); verb != "" {
				g.down(verb)
			}
		}
	}
}

// verbOf is what a signal to PID 1 asks for: systemd's signals, those of busybox's
// poweroff, reboot and halt, and the kernel's for Ctrl-Alt-Del, see catchKeys.
func verbOf(sig os.Signal) string {
	switch sig {
	case signalPoweroff, syscall.SIGUSR2, syscall.SIGINT:
		return "poweroff"
	case signalReboot, syscall.SIGTERM:
		return "reboot"
	case signalHalt, syscall.SIGUSR1:
		return "halt"
	}
	return ""
}

// reap collects the processes that have ended and says whether the agent is one.
func (g *guest) reap() (agent bool) {
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if pid <= 0 {
			return agent
		}
		agent = agent || pid == g.agent
	}
}

// down ends all processes, first in a way they can answer to, and then the guest.
func (g *guest) down(verb string) {
	note("going down: %s", verb)
	killAll(g.agent, unix.SIGTERM, unix.SIGHUP, unix.SIGCONT)
	deadline := time.Now().Add(killWait)
	for time.Now().Before(deadline) && len(userProcesses(g.agent)) > 0 {
		g.reap()
		time.Sleep(20 * time.Millisecond)
	}
	finish(verb, "/")
}

// killWait is how long processes have to end by themselves.
const killWait = 5 * time.Second

func killAll(except int, signals ...unix.Signal) {
	for _, pid := range userProcesses(except) {
		for _, sig := range signals {
			_ = unix.Kill(pid, sig)
		}
	}
}

// userProcesses lists the processes that are neither PID 1, nor except, nor the
// kernel's own threads, nor dead.
func userProcesses(except int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 || pid == except {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err == nil && isUserProcess(string(stat)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// isUserProcess reads a line of /proc/PID/stat, see proc(5): a kernel thread is
// kthreadd (2) or its child.
func isUserProcess(stat string) bool {
	_, rest, ok := strings.Cut(stat, " (")
	end := strings.LastIndex(rest, ") ")
	if !ok || end < 0 {
		return false
	}
	pid, _, _ := strings.Cut(stat, " ")
	fields := strings.Fields(rest[end+2:])
	if len(fields) < 2 {
		return false
	}
	state, parent := fields[0], fields[1]
	return state != "Z" && state != "X" && pid != "2" && parent != "2"
}

package boot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"banger/internal/guest/wire"
)

// The signals that tell PID 1 to go down, see systemd(1). banger-guest as PID 1
// knows the same. 34 is SIGRTMIN of glibc.
const (
	signalPoweroff = syscall.Signal(34 + 4)
	signalReboot   = syscall.Signal(34 + 5)
	signalHalt     = syscall.Signal(34 + 3)
)

// System is the guest as a whole, for the agent.
type System struct {
	init bool // the image's init is PID 1
}

// Ready waits until systemd has reached its default target. Without systemd the
// guest is ready as soon as it is there. It returns an error when ctx ends, or when
// the system goes down or into an emergency.
func (s *System) Ready(ctx context.Context) (wire.Ready, error) {
	if !s.init {
		return wire.Ready{System: "none"}, nil
	}
	if err := waitListening(ctx, "/run/systemd/private"); err != nil {
		return wire.Ready{}, fmt.Errorf("cannot reach systemd: %w", err)
	}
	for {
		state, err := systemctl(ctx, "is-system-running", "--wait")
		switch {
		case ctx.Err() != nil:
			return wire.Ready{}, fmt.Errorf("the system did not finish starting: %w", ctx.Err())
		case state == "running" || state == "degraded":
			return wire.Ready{System: state}, nil
		case state == "initializing" || state == "starting" || state == "":
			// systemd before 240 does not wait, and one that is busy may not answer.
			if err := pause(ctx, 250*time.Millisecond); err != nil {
				return wire.Ready{}, fmt.Errorf("the system did not finish starting: %w", err)
			}
		default:
			return wire.Ready{}, fmt.Errorf("the system is in state %q: %w", state, err)
		}
	}
}

// systemctl returns the trimmed output, also when the exit code is not 0: that is
// how it says that a state is not "running".
func systemctl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "systemctl", args...)
	cmd.Env = []string{"PATH=" + path, "LANG=C.UTF-8", "SYSTEMD_COLORS=0"}
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("systemctl %s: %w", args[0], err)
	}
	return strings.TrimSpace(string(out)), err
}

// waitListening waits until somebody accepts connections on the Unix socket.
func waitListening(ctx context.Context, socket string) error {
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return conn.Close()
		}
		if pauseErr := pause(ctx, 50*time.Millisecond); pauseErr != nil {
			return errors.Join(err, pauseErr)
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// Shutdown tells PID 1 to take the guest down and returns at once. verb is
// "poweroff", "reboot" or "halt". An init that has only just been started drops
// signals, so the word is repeated until it is heard, for a minute; systemd takes
// a repetition for the same request.
func (s *System) Shutdown(verb string) error {
	sig, err := signalOf(verb)
	if err != nil {
		return err
	}
	if err := syscall.Kill(1, sig); err != nil {
		return fmt.Errorf("cannot signal init: %w", err)
	}
	go func() {
		for range 60 {
			time.Sleep(time.Second)
			_ = syscall.Kill(1, sig)
		}
	}()
	return nil
}

func signalOf(verb string) (syscall.Signal, error) {
	switch verb {
	case "poweroff":
		return signalPoweroff, nil
	case "reboot":
		return signalReboot, nil
	case "halt":
		return signalHalt, nil
	}
	return 0, fmt.Errorf("cannot shut down: the verb %q is unknown", verb)
}

// SetClock sets the wall clock.
func (s *System) SetClock(t time.Time) error { return setClock(t) }

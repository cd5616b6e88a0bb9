package qemuproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/daemon/driver"
)

const (
	// bootTimeout is for a context without a deadline. QEMU is up in 0.1 s; on a host
	// that swaps it is not.
	bootTimeout = 2 * time.Minute
	// bootPoll is how often the socket is tried: a failed connect costs about 10 µs.
	bootPoll = 5 * time.Millisecond
)

// Boot waits for QEMU's socket and asks it whether the guest runs. When QEMU ends
// first Boot does not see it: the caller must end ctx.
func (v *VMM) Boot(ctx context.Context, dir string, _ driver.Spec) error {
	return boot(ctx, qmpOf(dir))
}

func boot(ctx context.Context, dial dialer) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, bootTimeout)
		defer cancel()
	}
	tick := time.NewTicker(bootPoll)
	defer tick.Stop()
	for {
		running, err := bootStatus(ctx, dial)
		if running {
			return nil
		}
		if err != nil && ctx.Err() == nil && !notYet(err) {
			return fmt.Errorf("cannot boot: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("QEMU does not run the guest yet: %w", context.Cause(ctx))
		}
	}
}

// notYet tells the errors of a QEMU that is only coming up. One that has just ended
// looks the same.
func notYet(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) ||
		errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) ||
		errors.Is(err, unix.EAGAIN) || // the socket's backlog is full
		errors.Is(err, io.ErrUnexpectedEOF)
}

// bootStatus asks once. The states are those of RunState in qapi/run-state.json.
func bootStatus(ctx context.Context, dial dialer) (running bool, err error) {
	var status struct {
		Status string `json:"status"`
	}
	err = converse(ctx, dial, func(ctx context.Context, q *qmp) error {
		return q.call(ctx, "query-status", &status)
	})
	if err != nil {
		return false, err
	}
	switch status.Status {
	case "running":
		return true, nil
	case "prelaunch", "inmigrate":
		return false, nil
	}
	return false, fmt.Errorf("QEMU does not run the guest, its state is %.40q", status.Status)
}

// PowerButton presses the ACPI power button: microvm has one, on its generic event
// device. The guest needs the module button and something that listens, like
// systemd-logind; that it does cannot be seen from here.
func (v *VMM) PowerButton(ctx context.Context, dir string) error {
	err := converse(ctx, qmpOf(dir), func(ctx context.Context, q *qmp) error {
		return q.call(ctx, "system_powerdown", nil)
	})
	if err != nil {
		return fmt.Errorf("cannot press the power button: %w", err)
	}
	return nil
}

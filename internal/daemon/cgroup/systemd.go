package cgroup

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
)

const (
	// patience bounds one conversation with systemd; it is the time that D-Bus gives a
	// call by default.
	patience = 25 * time.Second
	// stopGrace is how long processes of a scope may take to end when the host goes
	// down.
	stopGrace = 10 * time.Second
)

// talk connects to systemd itself, for which no bus daemon is needed, calls do, and
// hangs up. A connection that is kept would not outlive a re-execution of systemd.
func talk(ctx context.Context, do func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("systemd did not answer in time"))
	defer cancel()
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("cannot reach systemd: %w", err)
	}
	defer conn.Close()
	if err := do(ctx, conn); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause // the end of ctx closes the connection, which is all that err says
		}
		return err
	}
	return nil
}

func (m *Manager) probeSystemd(ctx context.Context) error {
	if _, err := os.Stat("/run/systemd/system"); err != nil { // see sd_booted(3)
		return fmt.Errorf("cannot use control groups: systemd is not the init of this host: %w", err)
	}
	return talk(ctx, func(_ context.Context, conn *dbus.Conn) error {
		_, err := conn.GetManagerProperty("Version")
		return err
	})
}

// startScope makes the scope of vm with pid in it.
func (m *Manager) startScope(ctx context.Context, vm string, pid int) error {
	if pid <= 0 || pid > math.MaxInt32 {
		return fmt.Errorf("%d is not a pid", pid)
	}
	properties := []dbus.Property{
		dbus.PropDescription("banger VM " + vm + " of instance " + m.instance),
		dbus.PropSlice(slice),
		dbus.PropPids(uint32(pid)),
		{Name: "Delegate", Value: godbus.MakeVariant(true)},
		{Name: "CollectMode", Value: godbus.MakeVariant("inactive-or-failed")},
		{Name: "TimeoutStopUSec", Value: godbus.MakeVariant(uint64(stopGrace.Microseconds()))},
	}
	start := func(ctx context.Context, conn *dbus.Conn) error {
		return job(ctx, func(done chan<- string) (int, error) {
			return conn.StartTransientUnitContext(ctx, m.unit(vm), "fail", properties, done)
		})
	}
	err := talk(ctx, start)
	if !isError(err, "org.freedesktop.systemd1.UnitExists") {
		return err
	}
	// Of the run before: systemd may not have seen its end yet.
	full, perr := populated(m.scope(vm))
	if perr != nil || full {
		return errors.Join(err, perr)
	}
	if err := m.Remove(ctx, vm); err != nil {
		return err
	}
	return talk(ctx, start)
}

// stopScope makes systemd forget the scope of vm, which is empty.
func (m *Manager) stopScope(ctx context.Context, vm string) error {
	return talk(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		err := job(ctx, func(done chan<- string) (int, error) {
			return conn.StopUnitContext(ctx, m.unit(vm), "replace", done)
		})
		if err == nil {
			err = conn.ResetFailedUnitContext(ctx, m.unit(vm))
		}
		if isError(err, "org.freedesktop.systemd1.NoSuchUnit") {
			return nil
		}
		return err
	})
}

// job waits for the end of a job of systemd.
func job(ctx context.Context, start func(done chan<- string) (int, error)) error {
	done := make(chan string, 1)
	if _, err := start(done); err != nil {
		return err
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("systemd says: %s", result)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func isError(err error, name string) bool {
	var e godbus.Error
	return errors.As(err, &e) && e.Name == name
}

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
	// lifeSign is how often a connection is looked after while a job runs.
	lifeSign = 250 * time.Millisecond
	// stopGrace is how long processes of a scope may take to end when the host goes
	// down.
	stopGrace = 10 * time.Second
)

// talk calls do with a connection to systemd itself, for which no bus daemon is needed.
// The connection is kept, because to make one takes systemd as long as to make a scope.
func (m *Manager) talk(ctx context.Context, do func(context.Context, *dbus.Conn) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, errors.New("systemd did not answer in time"))
	defer cancel()
	conn, err := m.connection(ctx)
	if err == nil {
		err = do(ctx, conn)
	}
	if err != nil && context.Cause(ctx) != nil {
		return errors.Join(err, context.Cause(ctx))
	}
	return err
}

// connection is the one that is kept, or a new one after systemd was re-executed.
func (m *Manager) connection(ctx context.Context) (*dbus.Conn, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.conn != nil && m.conn.Connected() {
		return m.conn, nil
	}
	m.closeLocked()
	// The context of a connection is that of its whole life.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, end)
	conn, err := dbus.NewSystemdConnectionContext(life)
	if !stop() && err == nil {
		conn.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		end()
		return nil, fmt.Errorf("cannot reach systemd: %w", err)
	}
	m.conn, m.end = conn, end
	return conn, nil
}

// Close hangs up on systemd; whatever is called later connects again.
func (m *Manager) Close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closeLocked()
}

func (m *Manager) closeLocked() {
	if m.conn != nil {
		m.conn.Close()
		m.end()
	}
	m.conn = nil
}

func (m *Manager) probeSystemd(ctx context.Context) error {
	if _, err := os.Stat("/run/systemd/system"); err != nil { // see sd_booted(3)
		return fmt.Errorf("cannot use control groups: systemd is not the init of this host: %w", err)
	}
	return m.talk(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		_, err := conn.SystemStateContext(ctx)
		return err
	})
}

// startScope makes the scope of vm with pid in it. One of the run before is in no way when
// it is empty: systemd hears of that before it reads what it is asked.
func (m *Manager) startScope(ctx context.Context, vm string, pid int) error {
	if pid <= 0 || pid > math.MaxInt32 {
		return fmt.Errorf("%d is not a pid", pid)
	}
	properties := []dbus.Property{
		dbus.PropDescription("banger VM " + vm + " of instance " + m.instance),
		dbus.PropSlice(slice),
		dbus.PropPids(uint32(pid)),
		// No more than the limits need: what the rest of the slice does not have, systemd
		// enables for all of it with the first scope and disables after the last.
		{Name: "DelegateControllers", Value: godbus.MakeVariant(controllers())},
		{Name: "CollectMode", Value: godbus.MakeVariant("inactive-or-failed")},
		{Name: "TimeoutStopUSec", Value: godbus.MakeVariant(uint64(stopGrace.Microseconds()))},
	}
	return m.talk(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		return job(ctx, conn, func(done chan<- string) (int, error) {
			return conn.StartTransientUnitContext(ctx, m.unit(vm), "fail", properties, done)
		})
	})
}

// stopScope makes systemd forget the scope of vm, which is empty.
func (m *Manager) stopScope(ctx context.Context, vm string) error {
	return m.talk(ctx, func(ctx context.Context, conn *dbus.Conn) error {
		err := job(ctx, conn, func(done chan<- string) (int, error) {
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
func job(ctx context.Context, conn *dbus.Conn, start func(done chan<- string) (int, error)) error {
	done := make(chan string, 1)
	if _, err := start(done); err != nil {
		return err
	}
	tick := time.NewTicker(lifeSign)
	defer tick.Stop()
	for {
		select {
		case result := <-done:
			if result != "done" {
				return fmt.Errorf("systemd says: %s", result)
			}
			return nil
		case <-tick.C:
			if !conn.Connected() {
				return errors.New("systemd hung up before it was done")
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func isError(err error, name string) bool {
	var e godbus.Error
	return errors.As(err, &e) && e.Name == name
}

package fake

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"time"

	"banger/internal/daemon/driver"
	"banger/internal/guest/wire"
)

// The sockets of the fake VMM, below the VM's directory.
const (
	AgentSocket   = "run/agent.sock"
	ControlSocket = "run/fake.sock"
)

const (
	bootPoll       = 5 * time.Millisecond
	controlTimeout = 10 * time.Second
)

type vmm struct{ h *Host }

func (v vmm) Name() string { return "fake" }

func (v vmm) Probe(ctx context.Context) (driver.Ability, error) {
	if v.h.Unable != nil {
		return driver.Ability{}, v.h.Unable
	}
	if _, err := os.Stat(v.h.program); err != nil {
		return driver.Ability{}, fmt.Errorf("the fake VMM is not there: %w", err)
	}
	return v.h.Ability, nil
}

// Confine makes a jail, which is a file.
func (v vmm) Confine(_ context.Context, dir string, spec driver.Spec) error {
	return v.h.effect("vmm.confine", func() error { return v.h.make("jail", filepath.Base(dir), spec.ID) })
}

func (v vmm) Ending(int) string { return "" }

func (v vmm) Free(_ context.Context, dir string) error {
	id := filepath.Base(dir)
	return v.h.effect("vmm.free", func() error { return v.h.remove("jail", id, id) })
}

func (v vmm) Command(spec driver.Spec) (driver.Command, error) {
	var c driver.Command
	err := v.h.effect("vmm.command", func() error {
		if err := spec.Validate(); err != nil {
			return fmt.Errorf("cannot make a command: %w", err)
		}
		c.Argv = []string{
			v.h.program, "--host", v.h.dir, "--id", spec.ID, "--name", spec.Name,
			"--disk", spec.Disks[0].Path, "--initrd", spec.Initrd,
		}
		c.Env = []string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"}
		return nil
	})
	return c, err
}

// Boot waits until the VMM says that it is up.
func (v vmm) Boot(ctx context.Context, dir string, _ driver.Spec) error {
	return v.h.effect("vmm.boot", func() error {
		tick := time.NewTicker(bootPoll)
		defer tick.Stop()
		for {
			err := control(ctx, dir, "")
			if err == nil {
				return nil
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("cannot boot: %w (%v)", context.Cause(ctx), err)
			}
		}
	})
}

func (v vmm) PowerButton(ctx context.Context, dir string) error {
	return v.h.effect("vmm.powerbutton", func() error { return control(ctx, dir, "poweroff\n") })
}

// control speaks with the VMM's own socket.
func control(ctx context.Context, dir, line string) error {
	conn, err := wire.DialUnix(ctx, dir, ControlSocket)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	conn.SetDeadline(time.Now().Add(controlTimeout))
	greeting, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return err
	}
	if greeting != "up\n" {
		return fmt.Errorf("the fake VMM answers %q", greeting)
	}
	_, err = io.WriteString(conn, line)
	return err
}

func (v vmm) Channel(dir string, magic []byte) driver.Channel {
	return wire.NewSerial(func(ctx context.Context) (net.Conn, error) {
		var conn net.Conn
		err := v.h.effect("channel.connect", func() (err error) {
			conn, err = wire.DialUnix(ctx, dir, AgentSocket)
			return err
		})
		if err != nil && conn != nil {
			conn.Close()
			conn = nil
		}
		return conn, err
	}, magic)
}

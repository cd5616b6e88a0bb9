package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"banger/api"
	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/shim"
)

var (
	errNoAnswer = errors.New("the guest's agent did not answer")
	errEnded    = errors.New("the virtual machine ended while it was starting")
)

// Dial opens a stream to the agent of a running VM, in the time that an agent has to
// answer at boot. No ranked lock but workspaceLocks may be held.
func (m *Manager) Dial(ctx context.Context, id string) (net.Conn, error) {
	m.checker.AssertGuestIO("guest I/O")
	e, ok := m.cache.get(id)
	if !ok || e.channel == nil {
		v, err := m.record(ctx, id)
		if err != nil {
			return nil, err
		}
		if e.lost != "" {
			return nil, api.Errorf(api.Refused, "cannot reach the guest of %s: %s", v.Name, e.lost).
				WithHint("banger stop %s", v.Name)
		}
		return nil, api.Errorf(api.Refused, "%s is not running", v.Name).WithHint("banger start %s", v.Name)
	}
	dial, cancel := context.WithTimeout(ctx, m.agentTimeout)
	defer cancel()
	conn, err := e.channel.Dial(dial)
	return conn, m.silence(ctx, dial, id, err)
}

// Ping asks the agent of a running VM for a sign of life, in the time that an agent has
// to answer at boot.
func (m *Manager) Ping(ctx context.Context, id string) error {
	conn, err := m.Dial(ctx, id)
	if err != nil {
		return err
	}
	ping, cancel := context.WithTimeout(ctx, m.agentTimeout)
	defer cancel()
	return m.silence(ctx, ping, id, wire.Call(ping, conn, wire.Request{Op: wire.OpHello}, nil))
}

// silence is err, in words when it is the end of wait, which the agent's timeout bounds.
func (m *Manager) silence(ctx, wait context.Context, id string, err error) error {
	if err != nil && ctx.Err() == nil && wait.Err() != nil {
		return api.Errorf(api.Unresponsive, "the guest did not answer within %s: %w", m.agentTimeout, err).
			WithHint("banger show %s", id)
	}
	return err
}

// Running returns the record of a VM that runs, or an error in words.
func (m *Manager) Running(ctx context.Context, id string) (store.VM, error) {
	unlock := m.vmLocks.Lock(id)
	defer unlock()
	v, err := m.record(ctx, id)
	if err != nil {
		return v, err
	}
	if v.State != store.Running {
		return v, api.Errorf(api.Refused, "%s is %s", v.Name, v.State).WithHint("banger start %s", v.Name)
	}
	return v, nil
}

// hello asks the agent who it is and notes the answer in v's handles. A port that
// answers is no proof: the id and a fresh nonce must come back.
func (m *Manager) hello(ctx context.Context, v *machine) error {
	nonce := make([]byte, 16)
	rand.Read(nonce)
	var hello wire.Hello
	err := m.call(ctx, v.channel, wire.Request{Op: wire.OpHello, Nonce: hex.EncodeToString(nonce)}, &hello)
	if err != nil {
		return err
	}
	if hello.ID != v.rec.ID || hello.Nonce != hex.EncodeToString(nonce) {
		return fmt.Errorf("another guest answers: %q", hello.ID)
	}
	if hello.ProtocolMin > wire.ProtocolMax || hello.ProtocolMax < wire.ProtocolMin {
		return fmt.Errorf("the guest speaks protocol %d to %d, this daemon %d to %d",
			hello.ProtocolMin, hello.ProtocolMax, wire.ProtocolMin, wire.ProtocolMax)
	}
	if len(hello.BootID) > maxIdentity || len(hello.User) > maxIdentity {
		return errors.New("the guest's name for its boot or its user is too long")
	}
	v.h.GuestBootID, v.h.User = hello.BootID, hello.User
	return nil
}

// maxIdentity bounds what a guest says of itself and the daemon keeps, in bytes: a
// boot id has 36, a user's name at most 32 (useradd(8)).
const maxIdentity = 256

type dialer interface {
	Dial(ctx context.Context) (net.Conn, error)
}

// call asks the agent of a VM that an operation works on, which may not be adopted yet.
func (m *Manager) call(ctx context.Context, d dialer, req wire.Request, reply any) error {
	m.checker.AssertGuestIO("guest I/O")
	conn, err := d.Dial(ctx)
	if err != nil {
		return err
	}
	return wire.Call(ctx, conn, req, reply)
}

// waitSystem waits until the guest's init has reached its target. The VM ending
// meanwhile breaks the stream, which ends the wait.
func (m *Manager) waitSystem(ctx context.Context, v *machine, verb string) error {
	ctx, cancel := context.WithTimeout(ctx, systemTimeout)
	defer cancel()
	var ready wire.Ready
	err := m.call(ctx, v.channel, wire.Request{Op: wire.OpReady}, &ready)
	if err == nil {
		return nil
	}
	if held, herr := shim.Held(v.dir.Path()); herr == nil && !held {
		return m.explainEnd(v, errEnded)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		hint := "banger exec " + v.rec.Name + " systemctl list-jobs" // it runs on
		if verb == "create" {
			hint = "banger create --ready agent"
		}
		return &api.Error{Code: api.Unresponsive, Err: err,
			Message: fmt.Sprintf("the guest's system did not get ready within %s%s", systemTimeout, v.consoleText()),
			Hint:    hint}
	}
	return err
}

// askShutdown asks the guest to go down, then the VMM's power button. It returns
// when the VM has ended; the error says that it did not within ctx.
func (m *Manager) askShutdown(ctx context.Context, v *machine) error {
	asked := false
	if v.channel != nil {
		ask, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := m.call(ask, v.channel, wire.Request{Op: wire.OpShutdown, Shutdown: &wire.Shutdown{Verb: "poweroff"}}, nil)
		cancel()
		asked = err == nil
	}
	if !asked {
		if err := m.host.VMM.PowerButton(ctx, v.dir.Path()); err != nil {
			return fmt.Errorf("the guest could not be asked: %w", err)
		}
	}
	return m.waitGone(ctx, v.dir.Path())
}

// waitGone waits until nobody holds the VM's lock.
func (m *Manager) waitGone(ctx context.Context, dir string) error {
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		if held, err := shim.Held(dir); err != nil || !held {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// explainEnd makes an error of how the VMM of v ended: its stderr, or the guest's
// last words.
func (m *Manager) explainEnd(v *machine, err error) error {
	wait, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	m.waitGone(wait, v.dir.Path()) // exit.json is written before the lock is free
	e, rerr := shim.ReadExit(v.dir.Path())
	if rerr != nil {
		return &api.Error{Code: api.Ended, Message: err.Error(), Hint: "banger doctor", Err: err}
	}
	text := strings.TrimSpace(e.Stderr)
	if text == "" {
		text = lastLines(strings.Join(e.Console, "\n"), 10)
	}
	msg := fmt.Sprintf("%v (%s)", err, m.describeExit(e))
	if text != "" {
		msg += ":\n" + indent(wire.CleanText(text, 4<<10))
	}
	return &api.Error{Code: api.Ended, Message: msg, Hint: "banger doctor", Err: err}
}

// describeExit says in words how a VMM ended.
func (m *Manager) describeExit(e shim.Exit) string {
	switch {
	case e.Intent == "failed":
		return "the guest could not boot"
	case e.Intent == "poweroff":
		return "the guest powered off"
	case e.Intent == "reboot":
		return "the guest rebooted"
	case e.Intent != "":
		return "the guest: " + e.Intent
	case e.OutOfMemory:
		return "killed: the VMM needed more memory than its group has"
	case e.How == shim.Signaled:
		return "ended by signal " + e.Signal
	case e.How == shim.Exited:
		words := fmt.Sprintf("exit status %d", e.Code)
		if why := m.host.VMM.Ending(e.Code); why != "" {
			words += ", " + why
		}
		return words
	}
	return e.Error
}

// consoleText is the end of the guest's console, for an error message.
func (v *machine) consoleText() string {
	data, err := os.ReadFile(v.dir.Console())
	if err != nil || len(data) == 0 {
		return "; the console is empty"
	}
	return "; the console ends with:\n" + indent(wire.CleanText(lastLines(string(data), 10), 8<<10))
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\r\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

func indent(s string) string {
	return "  " + strings.ReplaceAll(s, "\n", "\n  ")
}

func notFound(ref string) error {
	return api.Errorf(api.NotFound, "no VM named %s", ref).WithHint("banger ps")
}

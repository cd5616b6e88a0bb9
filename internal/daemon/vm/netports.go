package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/netwire"
)

// portHints name the command that helps when the host does not give a port. The second is
// for one below 1024.
type portHints struct {
	other, privileged func(p netwire.Publication) string
}

func startHints(name string) portHints {
	unpublish := func(p netwire.Publication) string {
		return fmt.Sprintf("banger set %s --unpublish %s", name, p.ShortHostSide())
	}
	return portHints{
		other: unpublish,
		privileged: func(p netwire.Publication) string {
			return unpublish(p) + " -p " + atPort(p, 8000+p.Host.Port()).Short()
		},
	}
}

func createHints() portHints {
	return portHints{
		other: func(p netwire.Publication) string { return "banger create -p " + atPort(p, freePort(p)).Short() },
		privileged: func(p netwire.Publication) string {
			return "banger create -p " + atPort(p, 8000+p.Host.Port()).Short()
		},
	}
}

func setHints(name string) portHints {
	return portHints{
		other: func(p netwire.Publication) string {
			return fmt.Sprintf("banger set %s -p %s", name, atPort(p, freePort(p)).Short())
		},
		privileged: func(p netwire.Publication) string {
			return fmt.Sprintf("banger set %s -p %s", name, atPort(p, 8000+p.Host.Port()).Short())
		},
	}
}

// freePort is a port near that of p that the host would give, or that of p.
func freePort(p netwire.Publication) uint16 {
	for n := range 32 {
		port := int(p.Host.Port()) + 1 + n
		if port > 65535 {
			break
		}
		if l, err := bindPort(atPort(p, uint16(port))); err == nil {
			l.Close()
			return uint16(port)
		}
	}
	return p.Host.Port()
}

func atPort(p netwire.Publication, port uint16) netwire.Publication {
	p.Host = netip.AddrPortFrom(p.Host.Addr(), port)
	return p
}

const (
	// portPatience is how long a port may be busy: the network of a run whose shim was
	// killed ends a moment after the run.
	portPatience = 500 * time.Millisecond
	portPoll     = 20 * time.Millisecond
)

// portError is a port that the host does not give.
type portError struct {
	p   netwire.Publication
	err error
}

func (e *portError) Error() string { return e.p.Refused(e.err) }
func (e *portError) Unwrap() error { return e.err }

// tryPorts opens all ports that the VM with the id wants, and closes them again: that the
// host does not give one is to be known before a VM starts. That banger-net gets them a
// moment later is likely, not certain: see checkPublished.
func (m *Manager) tryPorts(ctx context.Context, id string, publish []string, hints portHints) error {
	err := tryPorts(ctx, publish)
	if refused := new(portError); errors.As(err, &refused) {
		return m.refusedPort(ctx, id, refused, hints)
	}
	return err
}

func tryPorts(ctx context.Context, publish []string) error {
	deadline := time.Now().Add(portPatience)
	for {
		err := tryPortsOnce(publish)
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(portPoll):
		}
	}
}

func tryPortsOnce(publish []string) error {
	for _, text := range publish {
		p, err := netwire.ParsePublication(text)
		if err != nil {
			return invalidNetwork(err)
		}
		l, err := bindPort(p)
		if err != nil {
			return &portError{p, err}
		}
		defer l.Close() // at the end: two of them may be in each other's way
	}
	return nil
}

func bindPort(p netwire.Publication) (io.Closer, error) {
	family := "4"
	if p.Host.Addr().Is6() {
		family = "6"
	}
	if p.Protocol == "udp" {
		return net.ListenPacket("udp"+family, p.Host.String())
	}
	return net.Listen("tcp"+family, p.Host.String())
}

// publishPatience bounds the wait for the network's process to say what it could open.
const publishPatience = 5 * time.Second

// checkPublished makes sure that the VM that has started has its ports: between the trial
// and banger-net another program, or VM, may have taken one.
func (m *Manager) checkPublished(ctx context.Context, v *machine) error {
	n, _ := networkOf(v.rec)
	if m.programs.Net == "" || len(n.Publish) == 0 {
		return nil
	}
	asking, cancel := context.WithTimeout(ctx, publishPatience)
	defer cancel()
	for {
		reply, err := netwire.Ask(asking, v.dir.Path(), netwire.Request{Op: netwire.OpStats})
		switch {
		case err == nil:
			return m.unpublished(ctx, v.rec, reply.Stats)
		case !errors.Is(err, netwire.ErrAway) || asking.Err() != nil:
			m.log.Warn("cannot ask whether the ports are published", "vm", v.rec.Name, "err", err)
			return nil // show says so
		}
		select {
		case <-asking.Done():
		case <-time.After(portPoll):
		}
	}
}

// unpublished is an error when a port is not open that should be.
func (m *Manager) unpublished(ctx context.Context, rec store.VM, s *netwire.Stats) error {
	if s == nil || s.Problem == "" {
		return nil
	}
	for _, text := range s.Busy {
		if p, err := netwire.ParsePublication(text); err == nil {
			return m.refusedPort(ctx, rec.ID, &portError{p, unix.EADDRINUSE}, startHints(rec.Name))
		}
	}
	return api.Errorf(api.Refused, "%s", wire.CleanText(s.Problem, 1<<10)).WithHint("banger show %s", rec.Name)
}

// refusedPort says in words why the host does not give the VM with the id a port, and which
// other VM has it.
func (m *Manager) refusedPort(ctx context.Context, id string, e *portError, hints portHints) error {
	holder := ""
	if errors.Is(e.err, unix.EADDRINUSE) {
		holder = m.publisherOf(ctx, id, e.p)
	}
	return e.inWords(hints, holder)
}

func (e *portError) inWords(hints portHints, holder string) error {
	switch {
	case holder != "":
		return api.Errorf(api.Busy, "%w by the VM %s", e, holder).WithHint("%s", hints.other(e.p))
	case errors.Is(e.err, unix.EADDRINUSE):
		return api.Errorf(api.Busy, "%w", e).WithHint("%s", hints.other(e.p))
	case errors.Is(e.err, unix.EACCES) && e.p.Host.Port() < 1024:
		return api.Errorf(api.Refused, "%w", e).WithHint("%s", hints.privileged(e.p))
	case errors.Is(e.err, unix.EADDRNOTAVAIL):
		return api.Errorf(api.Invalid, "%w", e).WithHint("ip address")
	}
	return api.Errorf(api.Refused, "%w", e).WithHint("%s", hints.other(e.p))
}

// publisherOf names the VM, other than the one with the id, that has p's port of the host;
// "" when it is none.
func (m *Manager) publisherOf(ctx context.Context, id string, p netwire.Publication) string {
	all, err := m.store.VMs(ctx)
	if err != nil {
		return ""
	}
	for _, rec := range all {
		n, _ := networkOf(rec)
		if rec.ID != id && slices.ContainsFunc(n.Publish, func(text string) bool { return m.hasPort(ctx, rec, text, p) }) {
			return rec.Name
		}
	}
	return ""
}

// hasPort tells whether a VM has p's port by its publication text. Its network says so: it
// may itself have come too late.
func (m *Manager) hasPort(ctx context.Context, rec store.VM, text string, p netwire.Publication) bool {
	if o, err := netwire.ParsePublication(text); err != nil || !o.Overlaps(p) {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	reply, err := netwire.Ask(ctx, m.layout.VM(rec.ID).Path(), netwire.Request{Op: netwire.OpStats})
	return err == nil && reply.Stats != nil &&
		(reply.Stats.Problem == "" || len(reply.Stats.Busy) > 0 && !slices.Contains(reply.Stats.Busy, text))
}

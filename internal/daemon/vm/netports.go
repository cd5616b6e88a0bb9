package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"banger/api"
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
		return fmt.Sprintf("banger set %s --unpublish %s", name, hostSide(p))
	}
	return portHints{
		other: unpublish,
		privileged: func(p netwire.Publication) string {
			return unpublish(p) + " -p " + shortPublication(p, 8000+p.Host.Port())
		},
	}
}

func createHints() portHints {
	return portHints{
		other: func(p netwire.Publication) string { return "banger create -p " + shortPublication(p, freePort(p)) },
		privileged: func(p netwire.Publication) string {
			return "banger create -p " + shortPublication(p, 8000+p.Host.Port())
		},
	}
}

func setHints(name string) portHints {
	return portHints{
		other: func(p netwire.Publication) string {
			return fmt.Sprintf("banger set %s -p %s", name, shortPublication(p, freePort(p)))
		},
		privileged: func(p netwire.Publication) string {
			return fmt.Sprintf("banger set %s -p %s", name, shortPublication(p, 8000+p.Host.Port()))
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
		q := p
		q.Host = netip.AddrPortFrom(p.Host.Addr(), uint16(port))
		if l, err := bindPort(q); err == nil {
			l.Close()
			return uint16(port)
		}
	}
	return p.Host.Port()
}

// shortPublication is p at another port, without what ParsePublication adds by itself.
func shortPublication(p netwire.Publication, port uint16) string {
	text := fmt.Sprintf("%d:%d", port, p.Guest)
	if p.Host.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		text = fmt.Sprintf("%s:%d", netip.AddrPortFrom(p.Host.Addr(), port), p.Guest)
	}
	if p.Protocol != "tcp" {
		text += "/" + p.Protocol
	}
	return text
}

// hostSide is p's side of the host as unpublish takes it.
func hostSide(p netwire.Publication) string {
	text := fmt.Sprint(p.Host.Port())
	if p.Host.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) {
		text = p.Host.String()
	}
	if p.Protocol != "tcp" {
		text += "/" + p.Protocol
	}
	return text
}

const (
	// portPatience is how long a port may be busy: the network of a run whose shim was
	// killed ends a moment after the run.
	portPatience = 500 * time.Millisecond
	portPoll     = 20 * time.Millisecond
)

// tryPorts opens all ports that are published, and closes them again: that the host does
// not give one is to be known before a VM starts. That banger-net gets them a moment later
// is likely, not certain: see checkPublished.
func tryPorts(ctx context.Context, publish []string, hints portHints) error {
	deadline := time.Now().Add(portPatience)
	for {
		err := tryPortsOnce(publish, hints)
		if api.CodeOf(err) != api.Busy || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(portPoll):
		}
	}
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
	ctx, cancel := context.WithTimeout(ctx, publishPatience)
	defer cancel()
	for {
		reply, err := netwire.Ask(ctx, v.dir.Path(), netwire.Request{Op: netwire.OpStats})
		switch {
		case err == nil && reply.Stats != nil && reply.Stats.Problem != "":
			return api.Errorf(api.Busy, "%s", wire.CleanText(reply.Stats.Problem, 1<<10)).WithHint("banger set %s --unpublish PORT", v.rec.Name)
		case err == nil:
			return nil
		case !errors.Is(err, netwire.ErrAway) || ctx.Err() != nil:
			m.log.Warn("cannot ask whether the ports are published", "vm", v.rec.Name, "err", err)
			return nil // show says so
		}
		select {
		case <-ctx.Done():
		case <-time.After(portPoll):
		}
	}
}

func tryPortsOnce(publish []string, hints portHints) error {
	for _, text := range publish {
		p, err := netwire.ParsePublication(text)
		if err != nil {
			return invalidNetwork(err)
		}
		l, err := bindPort(p)
		if err != nil {
			return refusedPort(p, err, hints)
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

// refusedPort says in words why the host does not give a port.
func refusedPort(p netwire.Publication, err error, hints portHints) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return api.Errorf(api.Busy, "port %s is in use", p.Host).WithHint("%s", hints.other(p))
	case errors.Is(err, unix.EACCES) && p.Host.Port() < 1024:
		return api.Errorf(api.Refused, "port %d: permission denied: ports below 1024 need rights", p.Host.Port()).WithHint("%s", hints.privileged(p))
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return api.Errorf(api.Invalid, "%s is no address of this host", p.Host.Addr()).WithHint("ip address")
	}
	if errno := unix.Errno(0); errors.As(err, &errno) {
		err = errno
	}
	return api.Errorf(api.Refused, "port %s: %w", p.Host, err).WithHint("%s", hints.other(p))
}

package vm

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"time"

	"banger/internal/guest/wire"
	"banger/internal/netwire"
)

// Port is something that listens in the guest, a publication, or both.
type Port struct {
	Protocol     string // "tcp" or "udp"
	GuestAddress string // empty: nothing listens that the publication could reach
	GuestPort    int
	Process      string // as the guest says
	Published    string // the host's ADDRESS:PORT, empty for none
}

const (
	portsTimeout = 10 * time.Second
	maxListening = 4096
)

// Ports lists what a VM publishes and what listens in its guest. unasked says why the guest
// could not be asked.
func (m *Manager) Ports(ctx context.Context, ref string) (ports []Port, unasked string, err error) {
	rec, err := m.Resolve(ctx, ref, true)
	if err != nil {
		return nil, "", err
	}
	n, _ := networkOf(rec)
	ask, cancel := context.WithTimeout(ctx, portsTimeout)
	defer cancel()
	var reply wire.Ports
	conn, err := m.Dial(ask, rec.ID)
	if err == nil {
		err = wire.Call(ask, conn, wire.Request{Op: wire.OpPorts}, &reply)
	}
	if ctx.Err() != nil {
		return nil, "", context.Cause(ctx)
	}
	if err != nil {
		unasked = wire.CleanText(err.Error(), 1<<10)
	}
	return mergePorts(n.Publish, reply.Ports), unasked, nil
}

// mergePorts puts publications beside what they lead to. A listener on the guest's loopback
// is not it: what comes from outside does not get there.
func mergePorts(publish []string, listening []wire.Listening) (ports []Port) {
	open := checkListening(listening)
	led := make([]bool, len(open))
	for _, text := range publish {
		p, err := netwire.ParsePublication(text)
		if err != nil {
			continue
		}
		port := Port{Protocol: p.Protocol, GuestPort: int(p.Guest), Published: p.Host.String()}
		for k, l := range open {
			if l.Protocol == p.Protocol && l.Port == int(p.Guest) && fromOutside(l.Address) {
				port.GuestAddress, port.Process, led[k] = l.Address, l.Process, true
				break
			}
		}
		ports = append(ports, port)
	}
	for k, l := range open {
		if !led[k] {
			ports = append(ports, Port{Protocol: l.Protocol, GuestAddress: l.Address, GuestPort: l.Port, Process: l.Process})
		}
	}
	slices.SortStableFunc(ports, func(a, b Port) int {
		return cmp.Or(cmp.Compare(a.GuestPort, b.GuestPort), cmp.Compare(a.Protocol, b.Protocol),
			cmp.Compare(a.GuestAddress, b.GuestAddress), cmp.Compare(a.Published, b.Published))
	})
	return ports
}

// checkListening leaves out what makes no sense: it comes from the guest.
func checkListening(all []wire.Listening) (open []wire.Listening) {
	for _, l := range all[:min(len(all), maxListening)] {
		addr, err := netip.ParseAddr(l.Address)
		if err != nil || addr.Zone() != "" || l.Port < 1 || l.Port > 65535 || l.Protocol != "tcp" && l.Protocol != "udp" {
			continue
		}
		l.Address, l.Process = addr.String(), wire.ProcessName(l.Process)
		open = append(open, l)
	}
	return open
}

// fromOutside tells whether a listener takes what the network brings for the guest's
// address.
func fromOutside(address string) bool {
	addr, err := netip.ParseAddr(address)
	return err == nil && (addr.IsUnspecified() || addr.Unmap() == netwire.Guest().Addr())
}

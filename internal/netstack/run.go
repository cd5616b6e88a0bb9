package netstack

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
)

// Run carries the network of the VM whose directory is the working directory, as
// run/net.json says, until ctx ends or QEMU sends what is no frame. An error says why the
// network does not work; the VM's shim starts the process again.
func Run(ctx context.Context) error { return run(ctx, ".", heapLimit) }

// run is Run in the directory dir, which must not be long: it holds sockets.
func run(ctx context.Context, dir string, heap uint64) error {
	cfg, err := netwire.ReadConfig(dir)
	if err != nil {
		return fmt.Errorf("cannot read what the network may reach: %w", err)
	}
	mac, err := net.ParseMAC(cfg.MAC)
	if err != nil {
		return fmt.Errorf("cannot read the guest's address: %w", err)
	}
	log := newLog(dir)
	defer log.close()
	// Who ends this process does not wait for long, and closing connections may take it.
	stop := context.AfterFunc(ctx, log.close)
	defer stop()
	g := newGate(log)
	own := newOwnAddresses(g.judgeAgain)
	defer own.close()
	g.hosts.Store(own)
	n, err := newNetwork(mac, g, newResolver(resolverOptions{
		policy: func() netpolicy.Policy { return *g.policy.Load() }, own: own.has, refuse: log.add, names: g.names,
		resolvConf: "/etc/resolv.conf", hostAddr: netwire.Gateway(),
	}))
	if err != nil {
		return err
	}
	defer n.close()
	s := &service{dir: dir, gate: g, publisher: newPublisher(n.dialGuest, n.splicePublished)}
	defer s.publisher.close()
	n.published = s.publisher.connections
	guard := guardHeap(heap, func() {
		g.relieve()
		s.publisher.relieve()
	})
	defer guard.stop()
	n.link.took, g.took = guard.took, guard.took
	if err := s.start(cfg); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	control := make(chan error, 1)
	go func() {
		control <- serveControl(ctx, filepath.Join(dir, netwire.ControlSocket), s.answer)
		cancel()
	}()
	err = n.run(ctx, filepath.Join(dir, netwire.LinkSocket))
	cancel()
	return errors.Join(err, <-control)
}

// splicePublished copies between a port of the host and the guest.
func (n *network) splicePublished(host, guest net.Conn) {
	count := n.connections()
	narrow(host, count)
	newSplice(n.gate).run(guest, host, copySize(count))
}

// service answers the daemon, see answerLine.
type service struct {
	dir       string
	gate      *gate
	publisher *publisher

	mu sync.Mutex // one reload at a time; above the gate's and the publisher's
}

// parse reads what a Config says. Rules that cannot be understood are an error: to leave
// one out could open what it closes.
func parse(c netwire.Config) (netpolicy.Policy, []netwire.Publication, error) {
	policy, err := netpolicy.New(netpolicy.Preset(c.Preset), c.Allow, c.Deny)
	if err != nil {
		return policy, nil, err
	}
	var publish []netwire.Publication
	for _, text := range c.Publish {
		p, err := netwire.ParsePublication(text)
		if err != nil {
			return policy, nil, err
		}
		publish = append(publish, p)
	}
	return policy, publish, nil
}

func (s *service) start(c netwire.Config) error {
	policy, publish, err := parse(c)
	if err != nil {
		return err
	}
	s.gate.setPolicy(policy)
	s.publisher.start(publish)
	return nil
}

func (s *service) answer(r netwire.Request) netwire.Reply {
	if r.Op == netwire.OpReload {
		return s.reload()
	}
	return netwire.Reply{Stats: s.stats()}
}

// reload opens the ports first: they are what can fail.
func (s *service) reload() netwire.Reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	cfg, err := netwire.ReadConfig(s.dir)
	if err != nil {
		return netwire.Reply{Error: err.Error()}
	}
	policy, publish, err := parse(cfg)
	if err != nil {
		return netwire.Reply{Error: err.Error()}
	}
	if err := s.publisher.set(publish); err != nil {
		reply := netwire.Reply{Error: err.Error()}
		if refused := new(busyError); errors.As(err, &refused) && refused.busy() {
			reply.Busy = refused.Publication.String()
		}
		return reply
	}
	s.gate.setPolicy(policy)
	return netwire.Reply{}
}

func (s *service) stats() *netwire.Stats {
	return &netwire.Stats{
		Refused:     s.gate.log.refused(),
		Connections: s.gate.count("tcp") + s.gate.count("udp") + s.publisher.connections(),
		Sent:        s.gate.sent.Load(), Received: s.gate.received.Load(),
		Problem: s.publisher.problem(), Busy: s.publisher.busy(),
	}
}

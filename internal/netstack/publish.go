package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger/internal/netwire"
)

const (
	publishRetry = 2 * time.Second  // between attempts at a port that another program has
	publishIdle  = time.Minute      // without a datagram, after which a UDP flow ends
	publishDial  = 30 * time.Second // for the guest to accept
	publishConns = 1024             // TCP connections of all ports
	publishFlows = 256              // UDP flows of all ports
)

// publisher keeps the published ports: it listens on the host and leads what comes to the
// guest. The host's side of a publication is its identity: one whose guest port changes
// stays open.
//
//	set, start ─▶ listen ─▶ open ──▶ set without it: closed, its connections cut
//	      start only: ▼       ▲
//	               failing ───┘ tried again while there are any
type publisher struct {
	// dial connects to a port of the guest, by "tcp" or "udp". For udp it does not wait.
	dial func(ctx context.Context, protocol string, guestPort uint16) (net.Conn, error)
	// splice copies both ways, half-closing as they end, until both have.
	splice      func(host, guest net.Conn)
	retry, idle time.Duration

	ctx       context.Context
	cancel    context.CancelFunc
	running   sync.WaitGroup // loops, connections, flows
	connected atomic.Int64   // TCP
	flows     publishedFlows

	mu      sync.Mutex
	open    map[hostSide]*publishedPort
	failing map[hostSide]*busyError
	timer   *time.Timer // nil while nothing fails
	closed  bool
}

// hostSide is where the host listens; the address is unmapped.
type hostSide struct {
	protocol string
	addr     netip.AddrPort
}

// sideOf is the host's side of a publication.
func sideOf(pub netwire.Publication) hostSide {
	return hostSide{pub.Protocol, netip.AddrPortFrom(pub.Host.Addr().Unmap(), pub.Host.Port())}
}

// overlaps says whether the kernel refuses one side while the other is open, although
// they differ: one of them is all addresses.
func (s hostSide) overlaps(other hostSide) bool {
	a, b := s.addr.Addr(), other.addr.Addr()
	return s.protocol == other.protocol && s.addr.Port() == other.addr.Port() && a.Is4() == b.Is4() &&
		(a.IsUnspecified() || b.IsUnspecified())
}

// busyError says in words for a user why a publication cannot be opened.
type busyError struct {
	Publication netwire.Publication
	err         error
}

// errTwice: two publications have the same host's side.
var errTwice = errors.New("it is published twice")

func (e *busyError) Unwrap() error { return e.err }

// busy says whether another has the port, rather than that nobody could have it.
func (e *busyError) busy() bool { return errors.Is(e.err, syscall.EADDRINUSE) }

func (e *busyError) Error() string { return e.Publication.Refused(e.err) }

// newPublisher publishes nothing yet.
func newPublisher(dial func(context.Context, string, uint16) (net.Conn, error), splice func(host, guest net.Conn)) *publisher {
	p := &publisher{
		dial: dial, splice: splice, retry: publishRetry, idle: publishIdle,
		open: make(map[hostSide]*publishedPort), failing: make(map[hostSide]*busyError),
	}
	p.flows.init()
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p
}

// start opens what can be opened of pubs, and tries the others again in the background:
// between a process and the next one, another program can take a port.
func (p *publisher) start(pubs []netwire.Publication) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, pub := range pubs {
		if side := sideOf(pub); p.open[side] == nil && p.failing[side] == nil && !p.closed {
			p.tryLocked(pub)
		}
	}
	p.armLocked()
}

// tryLocked opens pub, or notes that it fails.
func (p *publisher) tryLocked(pub netwire.Publication) {
	side := sideOf(pub)
	port := p.newPort(pub)
	if err := port.listen(); err != nil {
		port.cut()
		p.failing[side] = &busyError{pub, err}
		return
	}
	delete(p.failing, side)
	p.open[side] = port
	port.begin()
}

// armLocked has the failing ones tried again.
func (p *publisher) armLocked() {
	if len(p.failing) == 0 || p.closed || p.timer != nil {
		return
	}
	p.timer = time.AfterFunc(p.retry, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.timer = nil; p.closed {
			return
		}
		for _, e := range p.failing {
			p.tryLocked(e.Publication)
		}
		p.armLocked()
	})
}

// problem says which ports are not open although they should be, "" if all are.
func (p *publisher) problem() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var problems []string
	for _, e := range p.failing {
		text := e.Error()
		if e.busy() {
			text += " by another program"
		}
		problems = append(problems, text)
	}
	slices.Sort(problems)
	return strings.Join(problems, "; ")
}

// busy are the publications among them whose ports another process has.
func (p *publisher) busy() (busy []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, e := range p.failing {
		if e.busy() {
			busy = append(busy, e.Publication.String())
		}
	}
	slices.Sort(busy)
	return busy
}

// connections is how many are open: TCP connections and UDP flows.
func (p *publisher) connections() int { return int(p.connected.Load()) + p.flows.count() }

// set makes pubs what is published, all of it or nothing: the error is a *busyError, and
// then nothing has changed. Ports that failed before may go on failing.
func (p *publisher) set(pubs []netwire.Publication) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return errors.New("cannot publish: the network ends")
	}
	wanted := make(map[hostSide]netwire.Publication)
	for _, pub := range pubs {
		if _, twice := wanted[sideOf(pub)]; twice {
			return &busyError{pub, errTwice}
		}
		wanted[sideOf(pub)] = pub
	}
	opened, failing, err := p.openLocked(pubs, wanted)
	if err != nil {
		return err
	}
	for side, port := range p.open {
		if pub, kept := wanted[side]; kept {
			port.retarget(pub.Guest)
			continue
		}
		port.shut()
		port.cut()
		delete(p.open, side)
	}
	for _, port := range opened {
		p.open[port.side] = port
		port.begin()
	}
	p.failing = failing
	p.armLocked()
	return nil
}

// openLocked opens those of pubs that are not, or none. A port of ours that is to go and
// is in the way (127.0.0.1:80 becomes 0.0.0.0:80) makes room first.
func (p *publisher) openLocked(pubs []netwire.Publication, wanted map[hostSide]netwire.Publication) (opened []*publishedPort, failing map[hostSide]*busyError, err error) {
	failing = make(map[hostSide]*busyError)
	var shut []*publishedPort
	for _, pub := range pubs {
		side := sideOf(pub)
		if p.open[side] != nil {
			continue
		}
		port := p.newPort(pub)
		err := port.listen()
		if errors.Is(err, syscall.EADDRINUSE) {
			for other, old := range p.open {
				if _, kept := wanted[other]; !kept && side.overlaps(other) && !slices.Contains(shut, old) {
					old.shut()
					shut = append(shut, old)
				}
			}
			err = port.listen()
		}
		if err == nil {
			opened = append(opened, port)
			continue
		}
		port.cut()
		if p.failing[side] != nil {
			failing[side] = &busyError{pub, err}
			continue
		}
		for _, port := range opened {
			port.shut()
			port.cut()
		}
		for _, old := range shut {
			p.reopenLocked(old)
		}
		return nil, nil, &busyError{pub, err}
	}
	return opened, failing, nil
}

// reopenLocked undoes shut. Another program may have been faster: then the port fails,
// like one of an earlier process.
func (p *publisher) reopenLocked(port *publishedPort) {
	if err := port.listen(); err != nil {
		port.cut()
		delete(p.open, port.side)
		p.failing[port.side] = &busyError{port.publication(), err}
		p.armLocked()
		return
	}
	port.begin()
}

// relieve ends all connections and flows. The ports stay open.
func (p *publisher) relieve() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, port := range p.open {
		port.interrupt()
		p.flows.end(port, nil)
	}
}

// close ends all ports and connections, and waits for them.
func (p *publisher) close() {
	p.mu.Lock()
	p.closed = true
	if p.timer != nil {
		p.timer.Stop()
	}
	for _, port := range p.open {
		port.shut()
		port.cut()
	}
	p.mu.Unlock()
	p.cancel()
	p.running.Wait()
}

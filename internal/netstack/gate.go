package netstack

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
)

// gate judges what the guest asks for and keeps what it was given, so that a new policy
// can take it back.
type gate struct {
	hosts atomic.Pointer[ownAddresses] // the addresses of the host's interfaces
	names *names
	log   *refusalLog
	// took is told of what connections take in, and may take its time.
	took func(size int)

	policy         atomic.Pointer[netpolicy.Policy]
	sent, received atomic.Int64 // bytes of payload, of the guest

	mu    sync.Mutex // a leaf
	flows map[*flow]struct{}
	open  map[string]int // of flows, by protocol
	stuck time.Time      // when none of all flows could give way
}

// flow is something that the gate let through.
type flow struct {
	netpolicy.Flow
	// end breaks it off. It may be called twice, and must not wait.
	end func()
	// idle is nil for what never gives way, see datagramFlow.
	idle func() (rest time.Duration, done bool)
}

func newGate(log *refusalLog) *gate {
	g := &gate{names: newNames(), log: log, took: func(int) {}, flows: make(map[*flow]struct{}), open: make(map[string]int)}
	g.policy.Store(new(netpolicy.Policy)) // which forbids all
	return g
}

// own tells the addresses of the host's interfaces, and what else ends at the host; until
// they are known all are.
func (g *gate) own(addr netip.Addr) bool {
	hosts := g.hosts.Load()
	return hosts == nil || hosts.ends(addr)
}

// judge says whether the guest may have to, and logs when not. The flow's address is where
// it really goes: the gateway is the host's loopback.
func (g *gate) judge(protocol string, to netip.AddrPort) (netpolicy.Flow, bool) {
	f := netpolicy.Flow{Protocol: protocol, Address: to.Addr(), Port: to.Port()}
	if to.Addr() == netwire.Gateway() {
		f.Gateway, f.Address = true, netip.AddrFrom4([4]byte{127, 0, 0, 1})
		f.Names = []string{netpolicy.HostName}
	} else {
		f.Names, f.Own = g.names.lookup(to.Addr()), g.own(to.Addr())
	}
	verdict := g.policy.Load().Judge(f)
	if !verdict.Allowed {
		g.log.add(netwire.Entry{Protocol: protocol, Target: target(protocol, to), Name: verdict.Name,
			Reason: verdict.Reason, Rule: verdict.Rule})
	}
	return f, verdict.Allowed
}

// refuse logs what was refused for another reason than the policy's.
func (g *gate) refuse(protocol string, to netip.AddrPort, reason string) {
	g.refuseHint(protocol, to, reason, "")
}

// refuseHint is refuse with a command about what the host lacks.
func (g *gate) refuseHint(protocol string, to netip.AddrPort, reason, hint string) {
	g.log.add(netwire.Entry{Protocol: protocol, Target: target(protocol, to), Reason: reason, Hint: hint})
}

func target(protocol string, to netip.AddrPort) string {
	switch {
	case !to.Addr().IsValid():
		return ""
	case protocol == "tcp" || protocol == "udp":
		return to.String()
	}
	return to.Addr().String()
}

// enter makes f known until leave; end breaks it off. It is nil, and why, when the policy
// has changed its mind since f was judged, or room is used up.
func (g *gate) enter(f netpolicy.Flow, most int, end func()) (*flow, string) {
	return g.enterIdle(f, most, end, nil)
}

// enterIdle is enter for a flow that gives way to others of its protocol once it is idle.
func (g *gate) enterIdle(f netpolicy.Flow, most int, end func(), idle func() (time.Duration, bool)) (*flow, string) {
	kept, old, reason := g.enterFor(&flow{Flow: f, end: end, idle: idle}, most)
	if old != nil {
		old.end()
	}
	return kept, reason
}

// enterFor is enter; old is what gave way, and is to be ended.
func (g *gate) enterFor(f *flow, most int) (kept, old *flow, reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if verdict := g.policy.Load().Judge(f.Flow); !verdict.Allowed {
		return nil, nil, verdict.Reason
	}
	if g.open[f.Protocol] >= most {
		if f.idle != nil {
			old = g.idleLocked(f.Protocol)
		}
		if old == nil {
			return nil, nil, fmt.Sprintf("the VM has %d %s connections already", most, f.Protocol)
		}
		g.dropLocked(old)
	}
	g.flows[f] = struct{}{}
	g.open[f.Protocol]++
	return f, old, ""
}

// The least rest of what gives way: of a flow that is probably done with, and of others.
// After stuckTime without such a one the flows are looked through again: a guest that
// floods must not have it done for each packet.
const (
	doneRest  = 250 * time.Millisecond
	idleRest  = 2 * time.Second
	stuckTime = 20 * time.Millisecond
)

// idleLocked finds the flow that must give way to another one of its protocol: the one
// that has rested longest, those that are done with first.
func (g *gate) idleLocked(protocol string) (old *flow) {
	if time.Since(g.stuck) < stuckTime {
		return nil
	}
	var longest time.Duration
	var spent bool
	for f := range g.flows {
		if f.Protocol != protocol || f.idle == nil {
			continue
		}
		rest, done := f.idle()
		if done = done && rest >= doneRest; !done && rest < idleRest {
			continue
		}
		if old == nil || done && !spent || done == spent && rest > longest {
			old, longest, spent = f, rest, done
		}
	}
	if old == nil {
		g.stuck = time.Now()
	}
	return old
}

func (g *gate) leave(f *flow) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dropLocked(f)
}

func (g *gate) dropLocked(f *flow) {
	if _, ok := g.flows[f]; ok {
		delete(g.flows, f)
		g.open[f.Protocol]--
	}
}

// count counts the open flows of a protocol.
func (g *gate) count(protocol string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.open[protocol]
}

// setPolicy puts p in force and breaks off what it forbids.
func (g *gate) setPolicy(p netpolicy.Policy) {
	g.policy.Store(&p)
	g.judgeAgain()
}

// judgeAgain breaks off what is forbidden now: by another policy, or as the host has got
// another address.
func (g *gate) judgeAgain() {
	p := g.policy.Load()
	g.cut(func(f *flow) bool {
		asked := f.Flow
		if !asked.Gateway {
			asked.Own = asked.Own || g.own(asked.Address)
			// What the guest has looked up since is a name of the connection too.
			asked.Names = append(g.names.lookup(asked.Address), asked.Names...)
		}
		return !p.Judge(asked).Allowed
	})
}

// relieve breaks off all.
func (g *gate) relieve() {
	g.log.add(netwire.Entry{Event: "cut", Target: "all connections", Reason: "together they held too much memory"})
	g.cut(func(*flow) bool { return true })
}

// cut breaks off some. which is called without a lock.
func (g *gate) cut(which func(*flow) bool) {
	g.mu.Lock()
	all := slices.Collect(maps.Keys(g.flows))
	g.mu.Unlock()
	for _, f := range all {
		if which(f) {
			g.leave(f)
			f.end()
		}
	}
}

package netstack

import (
	"container/list"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// What names keeps, so that no guest and no answer can fill the memory.
const (
	namesAddresses  = 4096
	namesPerAddress = 16
	namesTotal      = 16384
	nameLength      = 253 // longer ones are escapes, which no rule can say
)

// How long a name stays for an address. The guest's programs keep an answer for a little
// longer than its time to live (they asked before it arrived, they connect after it was
// due), so there is a least time and a grace; answerTTL is also the most that the guest is
// told, so that its caches do not outlive the entry.
const (
	answerTTL  = time.Hour
	nameLeast  = 30 * time.Second
	namesGrace = time.Minute
)

// names knows by which names the guest was given an address. What is too much pushes out
// what was learned longest ago: then rules by name stop to match until the guest asks
// again.
type names struct {
	now func() time.Time

	mu     sync.Mutex
	byAddr map[netip.Addr]*list.Element
	order  list.List // of *addressNames, the one that was learned longest ago first
	total  int
}

type addressNames struct {
	addr  netip.Addr
	until map[string]time.Time
}

func newNames() *names {
	return &names{now: time.Now, byAddr: make(map[netip.Addr]*list.Element)}
}

// learn notes that the guest was told for ttl that each of the names has addr.
func (n *names) learn(called []string, addr netip.Addr, ttl time.Duration) {
	called = slices.DeleteFunc(slices.Clone(called), func(name string) bool {
		return name == "" || len(name) > nameLength || dotInLabel(name)
	})
	if len(called) == 0 {
		return
	}
	addr = addr.Unmap()
	n.mu.Lock()
	defer n.mu.Unlock()
	until := n.now().Add(min(max(ttl, nameLeast), answerTTL) + namesGrace)
	element := n.byAddr[addr]
	if element == nil {
		element = n.order.PushBack(&addressNames{addr: addr, until: make(map[string]time.Time)})
		n.byAddr[addr] = element
	}
	n.order.MoveToBack(element)
	entry := element.Value.(*addressNames)
	for _, name := range called {
		n.addLocked(entry, name, until)
	}
	for n.order.Len() > namesAddresses || n.total > namesTotal {
		n.dropLocked(n.order.Front())
	}
}

func (n *names) addLocked(entry *addressNames, name string, until time.Time) {
	if old, known := entry.until[name]; known {
		if until.After(old) {
			entry.until[name] = until
		}
		return
	}
	if len(entry.until) >= namesPerAddress {
		first := ""
		for other, at := range entry.until {
			if first == "" || at.Before(entry.until[first]) {
				first = other
			}
		}
		delete(entry.until, first)
		n.total--
	}
	entry.until[strings.Clone(name)] = until
	n.total++
}

func (n *names) dropLocked(element *list.Element) {
	entry := n.order.Remove(element).(*addressNames)
	delete(n.byAddr, entry.addr)
	n.total -= len(entry.until)
}

// lookup returns the names of addr, sorted.
func (n *names) lookup(addr netip.Addr) (called []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	element := n.byAddr[addr.Unmap()]
	if element == nil {
		return nil
	}
	entry, now := element.Value.(*addressNames), n.now()
	for name, until := range entry.until {
		if now.Before(until) {
			called = append(called, name)
			continue
		}
		delete(entry.until, name)
		n.total--
	}
	if len(entry.until) == 0 {
		n.dropLocked(element)
	}
	slices.Sort(called)
	return called
}

// dotInLabel tells a name whose label has a dot in it: as text, `a\.example.org` looks
// like a name below example.org, and it is one below org. No rule may match it.
func dotInLabel(name string) bool {
	for i := 0; i+1 < len(name); i++ {
		if name[i] != '\\' {
			continue
		}
		i++
		if name[i] == '.' || strings.HasPrefix(name[i:], "046") {
			return true
		}
	}
	return false
}

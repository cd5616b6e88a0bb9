package netstack

import (
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ownPeriod is how often has asks the kernel when the kernel does not tell.
const ownPeriod = time.Second

// ownAddresses are those of the host's own interfaces, which no guest may reach unless
// the policy says so. The kernel tells of changes, and until it does nothing wakes. Where
// it cannot tell, has reads them again, at most once per ownPeriod.
type ownAddresses struct {
	set   atomic.Pointer[map[netip.Addr]struct{}] // nil until the first that could be read
	asked atomic.Pointer[answers]                 // what endsHere said since the set was read
	poll  atomic.Bool                             // the set may be old, and nobody will say so

	mu      sync.Mutex // one reads at a time: an older set never replaces a newer one
	attempt time.Time
	told    bool   // follow runs
	changed func() // is called after each change, by follow

	events *os.File // a netlink socket, or nil
	done   chan struct{}
}

// newOwnAddresses reads the addresses and follows them; changed is called when they may be
// others, if the kernel tells.
func newOwnAddresses(changed func()) *ownAddresses {
	o := &ownAddresses{done: make(chan struct{}), changed: changed}
	events, err := subscribe()
	if err != nil {
		o.poll.Store(true)
		o.read()
		close(o.done)
		return o
	}
	// Who reads after subscribing misses nothing.
	o.events, o.told = events, true
	o.read()
	go o.follow()
	return o
}

// has says whether addr is the host's. As long as the addresses could never be read it
// says yes to all: what nobody knows to be foreign stays closed.
func (o *ownAddresses) has(addr netip.Addr) bool {
	if o.poll.Load() {
		o.refresh()
	}
	set := o.set.Load()
	if set == nil {
		return true
	}
	_, found := (*set)[addr.Unmap().WithZone("")]
	return found
}

// ends tells whether the host keeps what is sent to addr. The kernel is asked once for an
// address until addresses or routes change.
func (o *ownAddresses) ends(addr netip.Addr) bool {
	if o.has(addr) {
		return true
	}
	asked := o.asked.Load()
	if o.poll.Load() || asked == nil {
		return endsHere(addr)
	}
	return asked.get(addr, endsHere)
}

// answers are the kernel's about addresses, at most maxAnswers.
type answers struct {
	mu    sync.Mutex // a leaf
	known map[netip.Addr]bool
}

const maxAnswers = 1024

// get asks when it does not know, without the lock: what changes meanwhile makes other
// answers than these.
func (a *answers) get(addr netip.Addr, ask func(netip.Addr) bool) bool {
	a.mu.Lock()
	yes, found := a.known[addr]
	a.mu.Unlock()
	if found {
		return yes
	}
	yes = ask(addr)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.known == nil || len(a.known) >= maxAnswers {
		a.known = make(map[netip.Addr]bool)
	}
	a.known[addr] = yes
	return yes
}

// close ends the following; has keeps the last answer.
func (o *ownAddresses) close() {
	if o.events != nil {
		o.events.Close()
	}
	<-o.done
	o.poll.Store(false)
}

// refresh reads if that has not been tried for a while. Who comes while another reads
// waits for the result.
func (o *ownAddresses) refresh() {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.Sub(o.attempt) >= ownPeriod {
		o.readLocked()
	}
}

func (o *ownAddresses) read() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.readLocked()
}

func (o *ownAddresses) readLocked() {
	o.attempt = time.Now()
	o.asked.Store(new(answers))
	list, err := net.InterfaceAddrs()
	if err != nil {
		o.poll.Store(true)
		return
	}
	set := make(map[netip.Addr]struct{}, len(list))
	for _, a := range list {
		if n, ok := a.(*net.IPNet); ok {
			if addr, ok := netip.AddrFromSlice(n.IP); ok {
				set[addr.Unmap()] = struct{}{}
			}
		}
	}
	o.set.Store(&set)
	o.poll.Store(!o.told)
}

// subscribe opens a socket on which the kernel tells of changed addresses and routes
// (rtnetlink(7)).
func subscribe() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	groups := &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR |
		unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE | unix.RTMGRP_IPV4_RULE}
	if err := unix.Bind(fd, groups); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "netlink"), nil
}

// follow reads the addresses after each burst of events. What an event says does not
// matter, and so neither does one that was lost.
func (o *ownAddresses) follow() {
	defer close(o.done)
	defer func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.told = false
		o.poll.Store(true)
	}()
	conn, err := o.events.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 8<<10)
	for o.await(conn, buf) {
		o.read()
		o.changed()
	}
}

// await blocks until there was an event, and empties the socket. It is false when the
// socket has been closed.
func (o *ownAddresses) await(conn syscall.RawConn, buf []byte) bool {
	const most = 1000 // events taken as one, so that a stream of them is no loop
	err := conn.Read(func(fd uintptr) bool {
		for n := range most {
			// Any error but these two is ENOBUFS, which says that events were lost.
			_, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
			if err == unix.EAGAIN {
				return n > 0
			}
		}
		return true
	})
	return err == nil
}

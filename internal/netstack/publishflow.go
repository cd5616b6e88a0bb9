package netstack

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

// datagramSize is more than the longest payload of UDP.
const datagramSize = 64 << 10

// publishedFlows are the UDP flows of all published ports: one for each address of a
// client, so that the guest's answers find back. The one that was used least recently
// makes room for a new one.
type publishedFlows struct {
	began   time.Time
	buffers sync.Pool // of *[datagramSize]byte

	mu    sync.Mutex
	flows map[flowKey]*publishedFlow
}

type flowKey struct {
	port   *publishedPort
	client netip.AddrPort
}

type publishedFlow struct {
	guest net.Conn
	used  atomic.Int64 // nanoseconds since began
	ended atomic.Bool
}

func (f *publishedFlow) end() {
	f.ended.Store(true)
	reset(f.guest)
}

func (t *publishedFlows) init() {
	t.began = time.Now()
	t.flows = make(map[flowKey]*publishedFlow)
	t.buffers.New = func() any { return new([datagramSize]byte) }
}

func (t *publishedFlows) count() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.flows)
}

func (t *publishedFlows) use(f *publishedFlow) { f.used.Store(int64(time.Since(t.began))) }

// end ends the flows of port, after change, which no new flow can miss.
func (t *publishedFlows) end(port *publishedPort, change func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if change != nil {
		change()
	}
	for key, f := range t.flows {
		if key.port == port {
			delete(t.flows, key)
			f.end()
		}
	}
}

func (t *publishedFlows) find(key flowKey) *publishedFlow {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.flows[key]
}

// add makes f a flow, unless its port leads elsewhere by now or answers by another
// socket than host.
func (t *publishedFlows) add(key flowKey, f *publishedFlow, guest uint32, host *net.UDPConn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	key.port.mu.Lock()
	current := key.port.udp == host && key.port.guest.Load() == guest
	key.port.mu.Unlock()
	if !current {
		return false
	}
	if len(t.flows) >= publishFlows {
		var oldest flowKey
		var old *publishedFlow
		for k, other := range t.flows {
			if old == nil || other.used.Load() < old.used.Load() {
				oldest, old = k, other
			}
		}
		delete(t.flows, oldest)
		old.end()
	}
	t.flows[key] = f
	return true
}

// remove forgets f, if it has not been replaced.
func (t *publishedFlows) remove(key flowKey, f *publishedFlow) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.flows[key] == f {
		delete(t.flows, key)
	}
}

// receive leads datagrams to the guest until host is closed.
func (o *publishedPort) receive(host *net.UDPConn) {
	buf := make([]byte, datagramSize)
	for pause := (acceptPause{}); ; {
		n, client, err := host.ReadFromUDPAddrPort(buf)
		if err != nil {
			if !pause.after(o.ctx, err) {
				return
			}
			continue
		}
		pause = acceptPause{}
		if f := o.flow(host, client); f != nil {
			f.guest.Write(buf[:n])
		}
	}
}

// flow is that of client, a new one if there is none, nil if the guest has no such.
func (o *publishedPort) flow(host *net.UDPConn, client netip.AddrPort) *publishedFlow {
	flows := &o.p.flows
	key := flowKey{o, client}
	if f := flows.find(key); f != nil {
		flows.use(f)
		return f
	}
	port := o.guest.Load()
	guest, err := o.p.dial(o.ctx, "udp", uint16(port))
	if err != nil {
		return nil
	}
	f := &publishedFlow{guest: guest}
	flows.use(f)
	if !flows.add(key, f, port, host) {
		f.end()
		return nil
	}
	o.p.running.Go(func() {
		o.answer(host, client, f)
		flows.remove(key, f)
		f.end()
	})
	return f
}

// answer returns what the guest sends to the client until the flow was idle for long.
// The deadline follows the use of the flow only when it passes: a datagram costs no timer.
func (o *publishedPort) answer(host *net.UDPConn, client netip.AddrPort, f *publishedFlow) {
	flows := &o.p.flows
	buf := flows.buffers.Get().(*[datagramSize]byte)
	defer flows.buffers.Put(buf)
	for !f.ended.Load() {
		until := flows.began.Add(time.Duration(f.used.Load()) + o.p.idle)
		if !time.Now().Before(until) {
			return
		}
		f.guest.SetReadDeadline(until)
		for {
			n, err := f.guest.Read(buf[:])
			var late net.Error
			if errors.As(err, &late) && late.Timeout() {
				break
			}
			if err != nil {
				return
			}
			flows.use(f)
			host.WriteToUDPAddrPort(buf[:n], client)
		}
	}
}

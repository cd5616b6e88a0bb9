package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// maxDatagram is the largest payload, in bytes.
const maxDatagram = 64 << 10

// serveUDP answers the guest's first datagram of a flow. False is a refusal: the stack
// sends "port unreachable".
func (n *network) serveUDP(r *udp.ForwarderRequest) bool {
	to := addrPort(r.ID().LocalAddress, r.ID().LocalPort)
	f, ok := n.gate.judge("udp", to)
	if !ok {
		return false
	}
	ctx, cancel := context.WithCancel(n.ctx)
	d := &datagramFlow{network: n, ctx: ctx, cancel: cancel, to: to}
	d.used.Store(time.Now().UnixNano())
	kept, reason := n.gate.enterIdle(f, maxFlows, cancel, d.idle)
	if kept == nil {
		cancel()
		n.gate.refuse("udp", to, reason)
		return false
	}
	fail := func() bool {
		n.gate.leave(kept)
		cancel()
		return false
	}
	outside, err := dialOutside(ctx, f)
	if err != nil {
		n.explain("udp", to, err)
		return fail()
	}
	d.outside = outside.(*net.UDPConn)
	port := r.ID().RemotePort
	d.closed = func() { n.sendICMP(tcpip.AddrFrom4(to.Addr().As4()), portUnreachable(port, to)) }
	endpoint, problem := r.CreateEndpoint(&d.queue)
	if problem != nil {
		outside.Close()
		return fail()
	}
	endpoint.SocketOptions().SetReceiveBufferSize(datagrams, false)
	d.guest = endpoint
	n.guests.Go(func() {
		defer n.gate.leave(kept)
		d.run()
	})
	return true
}

// datagramFlow passes datagrams between one port of the guest and one outside. It holds a
// buffer only while it has a datagram: there may be hundreds of flows.
type datagramFlow struct {
	network *network
	guest   tcpip.Endpoint
	queue   waiter.Queue
	outside *net.UDPConn
	ctx     context.Context
	cancel  context.CancelFunc
	to      netip.AddrPort
	closed  func()       // tells the guest that nobody listens there
	used    atomic.Int64 // time of the last datagram, in nanoseconds since 1970
	// asked and answered count datagrams.
	asked, answered atomic.Int64
}

// oneShot is the most that a guest asks by a flow that it will not use again. A resolver's
// client has one socket for the questions for A and for AAAA.
const oneShot = 2

// idle tells for how long no datagram has come, and whether the guest has probably got all
// that it wanted.
func (d *datagramFlow) idle() (rest time.Duration, done bool) {
	asked := d.asked.Load()
	done = asked > 0 && asked <= oneShot && d.answered.Load() >= asked
	return time.Since(time.Unix(0, d.used.Load())), done
}

// run returns when no datagram has come for flowIdle, or ctx has ended.
func (d *datagramFlow) run() {
	defer d.cancel()
	var ways sync.WaitGroup
	ways.Go(d.up)
	ways.Go(d.down)
	for rest := flowIdle; rest > 0 && d.ctx.Err() == nil; {
		timer := time.NewTimer(rest)
		select {
		case <-d.ctx.Done():
		case <-timer.C:
		}
		timer.Stop()
		rest = flowIdle - time.Since(time.Unix(0, d.used.Load()))
	}
	d.cancel()
	d.outside.Close()
	ways.Wait()
	d.guest.Close()
}

func (d *datagramFlow) touch(count *atomic.Int64, size int) {
	d.used.Store(time.Now().UnixNano())
	count.Add(int64(size))
}

// fail tells the guest that its datagrams go nowhere, and the user why if it is known.
func (d *datagramFlow) fail(err error) {
	if d.ctx.Err() == nil {
		d.closed()
		d.network.explain("udp", d.to, err)
	}
}

// up passes on what the guest sends.
func (d *datagramFlow) up() {
	defer d.cancel()
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	d.queue.EventRegister(&entry)
	defer d.queue.EventUnregister(&entry)
	for {
		buf := d.network.datagrams.Get().(*[]byte)
		w := tcpip.SliceWriter(*buf)
		result, problem := d.guest.Read(&w, tcpip.ReadOptions{})
		var err error
		if problem == nil {
			d.asked.Add(1)
			d.touch(&d.network.gate.sent, result.Count)
			_, err = d.outside.Write((*buf)[:result.Count])
		}
		d.network.datagrams.Put(buf)
		switch problem.(type) {
		case nil:
			switch {
			case errors.Is(err, syscall.ECONNREFUSED): // it is about a datagram before
				d.closed()
			case err != nil && !errors.Is(err, syscall.EMSGSIZE): // what is too large is lost
				d.fail(err)
				return
			}
		case *tcpip.ErrWouldBlock:
			select {
			case <-d.ctx.Done():
				return
			case <-ready:
			}
		default:
			return
		}
	}
}

// down passes on what comes from outside. The socket is connected: it comes from whom the
// guest has asked.
func (d *datagramFlow) down() {
	defer d.cancel()
	raw, err := d.outside.SyscallConn()
	for err == nil {
		var size int
		var buf *[]byte
		waited := raw.Read(func(fd uintptr) bool {
			buf = d.network.datagrams.Get().(*[]byte)
			size, err = unix.Read(int(fd), *buf)
			if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
				d.network.datagrams.Put(buf)
				return false
			}
			return true
		})
		if waited != nil {
			return // closed
		}
		if err == nil {
			d.answered.Add(1)
			d.touch(&d.network.gate.received, size)
			// A guest that takes nothing loses datagrams, as on every network.
			d.guest.Write(newPayload((*buf)[:size]), tcpip.WriteOptions{})
		} else if errors.Is(err, syscall.ECONNREFUSED) {
			d.closed()
			err = nil
		} else {
			d.fail(err)
		}
		d.network.datagrams.Put(buf)
	}
}

package flood

import (
	"net/netip"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// hand opens TCP connections by hand, and keeps to the protocol only as far as it is told.
type hand struct {
	g      *guest
	mss    uint16
	window uint16 // 16,384 times as much; of the first packet: it alone
	// greets: the connections are completed.
	greets bool
	// acks: what comes is acknowledged, and an end is answered.
	acks bool
	// opened, if there is one, is called for each completed connection, as it is.
	opened func(c *handConn)

	count  atomic.Int64 // completed ones
	resets atomic.Int64

	mu    sync.Mutex
	conns map[handKey]*handConn
}

type handKey struct {
	from uint16
	to   netip.AddrPort
}

type handConn struct {
	handKey
	next   uint32 // to send
	theirs uint32 // to receive
	room   int    // what the network may still be sent
	ended  bool   // both sides have said so
}

// newHand takes g's frames.
func newHand(g *guest) *hand {
	h := &hand{g: g, mss: 1460, window: 0xffff, greets: true, conns: make(map[handKey]*handConn)}
	g.onFrame(h.take)
	return h
}

// open sends the first packet of a connection.
func (h *hand) open(from uint16, to netip.AddrPort) {
	h.g.push(tcpFrame(to, header.TCPFields{SrcPort: from, SeqNum: 0, Flags: header.TCPFlagSyn, WindowSize: h.window}, synOptions(h.mss), nil))
}

// openAll opens count connections to the same, and waits until as many are completed, or
// refused.
func (h *hand) openAll(from uint16, count int, to netip.AddrPort) {
	h.g.t.Helper()
	done := h.count.Load() + h.resets.Load() + int64(count)
	for i := range count {
		h.open(from+uint16(i), to)
	}
	h.g.flush()
	// What was lost is sent again, as a kernel does.
	tries := 0
	h.g.until("the connections are open", func() bool {
		if tries++; tries%50 == 0 {
			h.mu.Lock()
			for i := range count {
				if _, ok := h.conns[handKey{from + uint16(i), to}]; !ok {
					h.open(from+uint16(i), to)
				}
			}
			h.mu.Unlock()
			h.g.flush()
		}
		return h.count.Load()+h.resets.Load() >= done
	})
}

// segment sends a segment of c, with data from its next place on.
func (h *hand) segment(c *handConn, flags header.TCPFlags, data []byte) {
	h.segmentAt(c, c.next, flags, data)
	c.next += uint32(len(data))
	if flags&header.TCPFlagFin != 0 {
		c.next++
	}
}

func (h *hand) segmentAt(c *handConn, seq uint32, flags header.TCPFlags, data []byte) {
	h.g.push(tcpFrame(c.to, header.TCPFields{
		SrcPort: c.from, SeqNum: seq, AckNum: c.theirs, Flags: flags | header.TCPFlagAck, WindowSize: h.window,
	}, nil, data))
}

// each calls f for each connection that is open.
func (h *hand) each(f func(c *handConn)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.conns {
		f(c)
	}
}

// resetAll resets what is open: the guest's programs have died.
func (h *hand) resetAll() {
	h.each(func(c *handConn) { h.segment(c, header.TCPFlagRst, nil) })
	h.g.flush()
}

// take answers a frame of the network.
func (h *hand) take(frame []byte) {
	if len(frame) < tcpAt+header.TCPMinimumSize || header.Ethernet(frame).Type() != header.IPv4ProtocolNumber {
		return
	}
	ip := header.IPv4(frame[ipAt:])
	if ip.Protocol() != uint8(header.TCPProtocolNumber) {
		return
	}
	tcp := header.TCP(frame[tcpAt:])
	key := handKey{tcp.DestinationPort(), netip.AddrPortFrom(netip.AddrFrom4(ip.SourceAddress().As4()), tcp.SourcePort())}
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.conns[key]
	switch flags := tcp.Flags(); {
	case flags&header.TCPFlagRst != 0:
		if c == nil || !c.ended {
			h.resets.Add(1)
		}
		delete(h.conns, key)
	case flags&header.TCPFlagSyn != 0:
		if !h.greets || flags&header.TCPFlagAck == 0 {
			return
		}
		if c == nil {
			c = &handConn{handKey: key, next: 1, theirs: tcp.SequenceNumber() + 1, room: int(tcp.WindowSize())}
			h.conns[key] = c
			defer h.count.Add(1)
		}
		h.segment(c, 0, nil)
		if h.opened != nil {
			h.opened(c)
		}
	case c != nil && h.acks:
		size := uint32(len(frame) - tcpAt - int(tcp.DataOffset()))
		if tcp.SequenceNumber() != c.theirs {
			return
		}
		c.theirs += size
		if flags&header.TCPFlagFin != 0 {
			c.theirs++
			c.ended = true
			h.segment(c, header.TCPFlagFin, nil)
			delete(h.conns, key)
		} else if size > 0 {
			h.segment(c, 0, nil)
		}
	}
}

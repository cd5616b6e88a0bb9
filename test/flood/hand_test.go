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
	// accepts: connections of the network's are completed too.
	accepts bool
	// opened, if there is one, is called with each connection as it is completed, and pull
	// when the network has taken data, or may take more.
	opened, pull func(c *handConn)
	// leaves: everything is answered with a reset.
	leaves bool

	count  atomic.Int64 // completed ones
	resets atomic.Int64
	ends   atomic.Int64 // those that both sides have ended

	mu         sync.Mutex
	conns      map[handKey]*handConn
	lastWindow int // that the network began a connection with
}

type handKey struct {
	from uint16
	to   netip.AddrPort
}

type handConn struct {
	handKey
	next   uint32 // to send
	taken  uint32 // what the network has acknowledged
	theirs uint32 // to receive
	scale  uint8  // of the network's windows
	room   int    // what the network may still be sent
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
	c, flags := h.conns[key], tcp.Flags()
	switch syn := flags & (header.TCPFlagSyn | header.TCPFlagAck); {
	case flags&header.TCPFlagRst != 0:
		h.resets.Add(1)
		delete(h.conns, key)
	case syn == header.TCPFlagSyn:
		if h.accepts {
			h.accept(key, tcp)
		}
	case syn == header.TCPFlagSyn|header.TCPFlagAck:
		if h.greets {
			h.complete(key, c, tcp)
		}
	case c != nil:
		h.receive(c, tcp, len(frame)-tcpAt-int(tcp.DataOffset()))
	}
}

// accept answers the network's first packet.
func (h *hand) accept(key handKey, tcp header.TCP) {
	c := &handConn{handKey: key, next: 1, taken: 1, theirs: tcp.SequenceNumber() + 1, room: int(tcp.WindowSize())}
	c.scale = uint8(max(header.ParseSynOptions(tcp.Options(), false).WS, 0))
	h.conns[key] = c
	h.g.push(tcpFrame(key.to, header.TCPFields{
		SrcPort: key.from, AckNum: c.theirs, Flags: header.TCPFlagSyn | header.TCPFlagAck, WindowSize: h.window,
	}, synOptions(h.mss), nil))
	h.count.Add(1)
	if h.opened != nil {
		h.opened(c)
	}
}

// complete acknowledges the network's answer to the first packet.
func (h *hand) complete(key handKey, c *handConn, tcp header.TCP) {
	if c == nil {
		c = &handConn{handKey: key, next: 1, taken: 1, theirs: tcp.SequenceNumber() + 1, room: int(tcp.WindowSize())}
		c.scale = uint8(max(header.ParseSynOptions(tcp.Options(), true).WS, 0))
		h.conns[key], h.lastWindow = c, c.room
		h.segment(c, 0, nil)
		h.count.Add(1)
		if h.opened != nil {
			h.opened(c)
		}
		return
	}
	h.segment(c, 0, nil)
}

// receive gets a segment with size bytes of data.
func (h *hand) receive(c *handConn, tcp header.TCP, size int) {
	c.taken = tcp.AckNumber()
	c.room = int(tcp.WindowSize())<<c.scale - int(c.next-c.taken)
	if h.leaves { // by then it is known what the network has taken
		h.segmentAt(c, c.taken, header.TCPFlagRst, nil)
		return
	}
	if h.pull != nil && c.room > 0 {
		h.pull(c)
	}
	if !h.acks || tcp.SequenceNumber() != c.theirs {
		return
	}
	c.theirs += uint32(size)
	switch fin := tcp.Flags()&header.TCPFlagFin != 0; {
	case fin:
		c.theirs++
		h.segment(c, header.TCPFlagFin, nil)
		delete(h.conns, c.handKey)
		h.ends.Add(1)
	case size > 0:
		h.segment(c, 0, nil)
	}
}

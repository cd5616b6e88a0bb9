package flood

import (
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

func frameAttacks() []attack {
	return []attack{
		{name: "100,000 fragments, none completed", network: host(), run: tinyFragments},
		{name: "1,000 packets of 65,535 bytes in fragments", network: host(), run: wholeFragments},
		{name: "20,000 overlapping fragments", network: host(), run: overlaps},
		{name: "2,000 half packets of 60,000 bytes", network: host(), run: bigHalves},
		{name: "lengths from 0 to 1 MiB", network: host(), run: lengths},
		{name: "100,000 random frames", network: host(), run: randomFrames},
		{name: "100,000 forged sources", network: host(), run: forged},
		{name: "100,000 questions by ARP", network: host(), run: arpStorm},
		{name: "200,000 pings, answers unread", network: host(), run: pings},
	}
}

func tinyFragments(t *testing.T, g *guest) {
	for i := range 100_000 {
		g.push(ipFrame(ipFields{protocol: header.UDPProtocolNumber, to: netwire.Gateway(), id: uint16(i), offset: uint16(i>>16) * 8, more: true}, make([]byte, 8)))
	}
	g.settle()
}

func wholeFragments(t *testing.T, g *guest) {
	server, port := datagramService(t, "127.0.0.1")
	datagram := udpDatagram(1024, port, make([]byte, 0xffff-header.IPv4MinimumSize-header.UDPMinimumSize))
	const size = 1480
	for i := range 1000 {
		for at := 0; at < len(datagram); at += size {
			g.push(ipFrame(ipFields{protocol: header.UDPProtocolNumber, to: netwire.Gateway(), id: uint16(i), offset: uint16(at), more: at+size < len(datagram)},
				datagram[at:min(at+size, len(datagram))]))
		}
	}
	g.settle()
	g.remark("%d arrived", server.received.Load())
	g.cut()
}

func overlaps(t *testing.T, g *guest) {
	for i := range 20_000 {
		g.push(ipFrame(ipFields{protocol: header.TCPProtocolNumber, to: netwire.Gateway(), id: uint16(i / 8), offset: uint16(i%8) * 8, more: i%8 != 7}, make([]byte, 1480)))
		g.push(ipFrame(ipFields{protocol: header.ICMPv4ProtocolNumber, to: netwire.Gateway(), id: uint16(i), offset: 65_528, more: i%2 == 0}, make([]byte, 1480)))
	}
	g.settle()
}

func bigHalves(t *testing.T, g *guest) {
	for i := range 2000 {
		g.push(ipFrame(ipFields{protocol: header.UDPProtocolNumber, to: netwire.Gateway(), id: uint16(i), more: true}, make([]byte, 60_000)))
	}
	g.settle()
}

func lengths(t *testing.T, g *guest) {
	for range 20 {
		for _, n := range []int{0, 1, 13, 14, 15, 33, 34, 65_533, 65_534, 65_535, 65_536, 1<<20 - 1, 1 << 20} {
			g.push(make([]byte, n))
			frame := ethernetFrame(header.IPv4ProtocolNumber, make([]byte, max(n-header.EthernetMinimumSize, 0)))
			g.push(frame[:n])
		}
	}
	g.settle()
}

// randomFrames: a part of each is as it should be, the rest is chance.
func randomFrames(t *testing.T, g *guest) {
	chance := rand.New(rand.NewPCG(5, 1)) // always the same
	bytes := rand.NewChaCha8([32]byte{5})
	protocols := []uint8{1, 6, 17, 2, 41, 47, 132}
	for i := range 100_000 {
		frame := make([]byte, chance.IntN(200))
		if i%50 == 0 {
			frame = make([]byte, chance.IntN(70_000))
		}
		bytes.Read(frame)
		if i%8 > 0 && len(frame) > header.EthernetMinimumSize {
			copy(frame, ethernetFrame(header.IPv4ProtocolNumber, nil))
		}
		if ip := frame[min(len(frame), ipAt):]; i%8 > 1 && len(ip) > header.IPv4MinimumSize {
			h := header.IPv4(ip)
			if ip[0] = 0x40 | byte(5+chance.IntN(2)); i%8 > 2 {
				h.SetTotalLength(uint16(len(ip)))
				h.SetFlagsFragmentOffset(0, 0)
			}
			h.SetSourceAddress(fakeguest.Address())
			h.SetDestinationAddress(fakeguest.Gateway())
			ip[9] = protocols[chance.IntN(len(protocols))]
			h.SetChecksum(0)
			if hl := int(h.HeaderLength()); hl <= len(ip) {
				h.SetChecksum(^h.CalculateChecksum())
			}
		}
		g.push(frame)
	}
	g.settle()
	g.cut()
}

func forged(t *testing.T, g *guest) {
	frame := pingFrame(netwire.Gateway(), 1, 1)
	for i := range uint32(50_000) {
		mac := append([]byte(nil), frame...)
		binary.BigEndian.PutUint32(mac[8:], i)
		ip := append([]byte(nil), frame...)
		binary.BigEndian.PutUint32(ip[ipAt+12:], 0xc0000000+i)
		g.push(mac, ip)
	}
	g.settle()
}

func arpStorm(t *testing.T, g *guest) {
	var own, others atomic.Int64
	g.onFrame(func(frame []byte) {
		if header.Ethernet(frame).Type() != header.ARPProtocolNumber {
			return
		}
		if header.ARP(frame[ipAt:]).ProtocolAddressSender()[3] == netwire.Gateway().As4()[3] {
			own.Add(1)
		} else {
			others.Add(1)
		}
	})
	for i := range 50_000 {
		g.push(arpFrame(netwire.Gateway()), arpFrame(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(3 + i%200)})))
	}
	g.settle()
	if own.Load() == 0 || own.Load() > 50_000 || others.Load() > 0 {
		t.Errorf("%d answers for the gateway, %d for others", own.Load(), others.Load())
	}
	g.remark("%d answers", own.Load())
}

func pings(t *testing.T, g *guest) {
	g.deaf.Lock()
	for i := range 100_000 {
		g.push(pingFrame(netwire.Gateway(), 1, uint16(i)), pingFrame(somewhereAt(byte(i)), 1, uint16(i)))
	}
	g.flush()
	g.deaf.Unlock()
	g.settle()
}

// noFrame: a length that no frame has ends the program with an error, before it has made
// room for as much.
func noFrame(t *testing.T, program string) {
	for _, length := range []uint32{1<<20 + 1, 1 << 31, 0xffffffff} {
		g := newGuest(t, program, host())
		g.echo()
		g.mu.Lock()
		g.conn.Write(binary.BigEndian.AppendUint32(nil, length))
		g.conn.Write(make([]byte, 100_000))
		g.mu.Unlock()
		select {
		case <-g.ended:
		case <-time.After(patience):
			t.Fatalf("it lives on after a length of %d", length)
		}
		if code := g.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(g.said(), "QEMU sent no frame") {
			t.Errorf("a length of %d: exit %d, %q", length, code, g.said())
		}
		if peak := g.cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss; peak > 32<<10 {
			t.Errorf("a length of %d: it held %d KiB", length, peak)
		}
	}
}

// datagrams is a UDP service.
type datagrams struct {
	net.PacketConn
	received atomic.Int64
}

// datagramService reads what comes and counts.
func datagramService(t *testing.T, address string) (*datagrams, uint16) {
	t.Helper()
	conn, err := net.ListenPacket("udp4", address+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	d := &datagrams{PacketConn: conn}
	go func() {
		buf := make([]byte, 64<<10)
		for {
			if _, _, err := conn.ReadFrom(buf); err != nil {
				return
			}
			d.received.Add(1)
		}
	}()
	return d, uint16(conn.LocalAddr().(*net.UDPAddr).Port)
}

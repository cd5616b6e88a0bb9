// Package fakeguest is what tests of banger-net need of a VM without one: its directory,
// the framing of QEMU's stream, and a guest's own TCP/IP stack. Who uses it listens as
// QEMU does, hands the frames that come to the Guest, and sends those that it gives.
package fakeguest

import (
	"bufio"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/link/ethernet"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"

	"banger/internal/netwire"
)

const (
	// Patience bounds each wait of a test.
	Patience = time.Minute
	// nic is the number of the guest's card in its stack.
	nic = 1
	// waiting is how many packets of the guest wait to be sent.
	waiting = 1024
)

// MAC is the guest's.
func MAC() net.HardwareAddr { return net.HardwareAddr{0x02, 0x15, 0xd6, 0x43, 0x80, 0x01} }

// Address is the guest's, as its stack has it.
func Address() tcpip.Address { return tcpip.AddrFrom4(netwire.Guest().Addr().As4()) }

// Gateway is the gateway's, as the guest's stack has it.
func Gateway() tcpip.Address { return tcpip.AddrFrom4(netwire.Gateway().As4()) }

// Dir makes the directory of a VM whose network is n.
func Dir(t testing.TB, n netwire.Network) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "net") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, sub := range []string{"run", "log"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	Write(t, dir, n)
	return dir
}

// Write says what the network of the VM in dir is.
func Write(t testing.TB, dir string, n netwire.Network) {
	t.Helper()
	if err := netwire.WriteConfig(dir, netwire.Config{MAC: MAC().String(), Network: n}); err != nil {
		t.Fatal(err)
	}
}

// WriteFrame sends a frame of any length as QEMU does.
func WriteFrame(w io.Writer, frame []byte) error {
	_, err := w.Write(binary.BigEndian.AppendUint32(nil, uint32(len(frame))))
	if err == nil {
		_, err = w.Write(frame)
	}
	return err
}

// ReadFrames hands on each frame that comes, which is valid until take returns, to the end
// of the stream. Before each it waits as long as wait does, which may be nil.
func ReadFrames(conn io.Reader, wait func(), take func(frame []byte)) {
	r := bufio.NewReaderSize(conn, 256<<10)
	buf := make([]byte, 1<<20)
	for {
		if wait != nil {
			wait()
		}
		var length [4]byte
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return
		}
		n := binary.BigEndian.Uint32(length[:])
		if n > uint32(len(buf)) {
			return
		}
		if _, err := io.ReadFull(r, buf[:n]); err != nil {
			return
		}
		take(buf[:n])
	}
}

// Guest is a guest's TCP/IP stack, with one card and the gateway as its only way.
type Guest struct {
	Stack *stack.Stack
	t     testing.TB
	card  *channel.Endpoint
}

// New makes a guest whose frames go to send, one at a time, until the test ends.
func New(t testing.TB, send func(frame []byte)) *Guest {
	t.Helper()
	g := &Guest{
		t: t, card: channel.New(waiting, netwire.MTU, tcpip.LinkAddress(MAC())),
		Stack: stack.New(stack.Options{
			NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
			TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
		}),
	}
	g.Check(g.Stack.CreateNIC(nic, ethernet.New(g.card)))
	g.Check(g.Stack.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: Address(), PrefixLen: netwire.Guest().Bits()},
	}, stack.AddressProperties{}))
	g.Stack.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, Gateway: Gateway(), NIC: nic}})
	ctx, cancel := context.WithCancel(context.Background())
	var work sync.WaitGroup
	work.Go(func() {
		for {
			p := g.card.ReadContext(ctx)
			if p == nil {
				return
			}
			send(p.ToView().AsSlice())
			p.DecRef()
		}
	})
	t.Cleanup(func() {
		cancel()
		g.card.Close()
		work.Wait()
		g.Stack.Close()
		g.Stack.Wait()
	})
	return g
}

// Check fails the test for an error of the stack.
func (g *Guest) Check(err tcpip.Error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

// KnowGateway spares the guest asking for the gateway's MAC address by ARP.
func (g *Guest) KnowGateway() {
	g.t.Helper()
	g.Check(g.Stack.AddStaticNeighbor(nic, ipv4.ProtocolNumber, Gateway(), tcpip.LinkAddress(netwire.GatewayMAC())))
}

// Take gives the guest a frame, of which it makes a copy.
func (g *Guest) Take(frame []byte) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
	g.card.InjectInbound(header.Ethernet(frame).Type(), p)
	p.DecRef()
}

// Dial opens a connection of the guest, from a port that is given or, with 0, any.
func (g *Guest) Dial(from uint16, to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	var bind tcpip.FullAddress
	if from != 0 {
		bind = tcpip.FullAddress{NIC: nic, Addr: Address(), Port: from}
	}
	return gonet.DialTCPWithBind(ctx, g.Stack, bind, full(to), ipv4.ProtocolNumber)
}

// DialUDP opens a UDP socket of the guest until the test ends.
func (g *Guest) DialUDP(to netip.AddrPort) *gonet.UDPConn {
	g.t.Helper()
	at := full(to)
	conn, err := gonet.DialUDP(g.Stack, nil, &at, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { conn.Close() })
	return conn
}

// Listen listens in the guest until the test ends.
func (g *Guest) Listen(port uint16) net.Listener {
	g.t.Helper()
	l, err := gonet.ListenTCP(g.Stack, tcpip.FullAddress{NIC: nic, Addr: Address(), Port: port}, ipv4.ProtocolNumber)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { l.Close() })
	return l
}

func full(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFrom4(a.Addr().As4()), Port: a.Port()}
}

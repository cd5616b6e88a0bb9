package netstack

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
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

// patience bounds each wait of a test.
const patience = time.Minute

// noHeapLimit: the guest's memory is this process's too.
const noHeapLimit = 1 << 40

func guestMAC() net.HardwareAddr { return net.HardwareAddr{0x02, 0x15, 0xd6, 0x43, 0x80, 0x01} }

// world is a fake QEMU with a guest's own TCP/IP stack in it, and the network that it is
// connected to. What the guest may reach of the host is 127.0.0.1, as the gateway.
type world struct {
	t     *testing.T
	dir   string
	guest *stack.Stack
	card  *channel.Endpoint

	mu   sync.Mutex // frames go out whole
	conn net.Conn   // to the network

	stop func() // ends the network, and checks how
}

// newWorld starts the network with what n says.
func newWorld(t *testing.T, n netwire.Network) *world {
	w := newGuest(t, n)
	w.start(noHeapLimit)
	return w
}

// newGuest makes all but the network.
func newGuest(t *testing.T, n netwire.Network) *world {
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
	w := &world{t: t, dir: dir}
	w.write(n)
	w.listenQEMU()
	w.makeStack()
	return w
}

func (w *world) write(n netwire.Network) {
	w.t.Helper()
	if err := netwire.WriteConfig(w.dir, netwire.Config{MAC: guestMAC().String(), Network: n}); err != nil {
		w.t.Fatal(err)
	}
}

// start starts the network; what ended before is started again.
func (w *world) start(heap uint64) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx, w.dir, heap) }()
	var once sync.Once
	w.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					w.t.Errorf("the network ended with: %v", err)
				}
			case <-time.After(patience):
				w.t.Error("the network does not end")
			}
		})
	}
	w.t.Cleanup(func() { w.stop() })
}

// listenQEMU is what -netdev stream,server=on does: one connection after the other.
func (w *world) listenQEMU() {
	l, err := net.Listen("unix", filepath.Join(w.dir, netwire.LinkSocket))
	if err != nil {
		w.t.Fatal(err)
	}
	w.card = channel.New(1024, netwire.MTU, tcpip.LinkAddress(guestMAC()))
	var work sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.mu.Lock()
			w.conn = conn
			w.mu.Unlock()
			w.readFrames(conn)
			conn.Close()
		}
	})
	work.Go(func() {
		for {
			p := w.card.ReadContext(ctx)
			if p == nil {
				return
			}
			w.send(p.ToView().AsSlice())
			p.DecRef()
		}
	})
	w.t.Cleanup(func() {
		l.Close()
		cancel()
		w.mu.Lock()
		if w.conn != nil {
			w.conn.Close()
		}
		w.mu.Unlock()
		w.card.Close()
		work.Wait()
	})
}

// send sends one frame as it is; while nobody is connected it is lost.
func (w *world) send(frame []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn == nil {
		return
	}
	if _, err := w.conn.Write(binary.BigEndian.AppendUint32(nil, uint32(len(frame)))); err == nil {
		w.conn.Write(frame)
	}
}

func (w *world) readFrames(conn io.Reader) {
	r := bufio.NewReaderSize(conn, 256<<10)
	for {
		var length [4]byte
		if _, err := io.ReadFull(r, length[:]); err != nil {
			return
		}
		frame := make([]byte, binary.BigEndian.Uint32(length[:]))
		if _, err := io.ReadFull(r, frame); err != nil {
			return
		}
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(frame)})
		w.card.InjectInbound(header.Ethernet(frame).Type(), p)
		p.DecRef()
	}
}

func (w *world) makeStack() {
	w.guest = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4},
	})
	check := func(err tcpip.Error) {
		if err != nil {
			w.t.Fatal(err)
		}
	}
	check(w.guest.CreateNIC(1, ethernet.New(w.card)))
	check(w.guest.AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol:          ipv4.ProtocolNumber,
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: guestAddress(), PrefixLen: netwire.Guest().Bits()},
	}, stack.AddressProperties{}))
	w.guest.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, Gateway: gatewayAddress(), NIC: 1}})
	w.t.Cleanup(func() {
		w.guest.Close()
		w.guest.Wait()
	})
}

// dial opens a connection of the guest.
func (w *world) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	at := tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(to.Addr().As4()), Port: to.Port()}
	return gonet.DialContextTCP(ctx, w.guest, at, ipv4.ProtocolNumber)
}

// mustDial is dial to a port of the host's loopback.
func (w *world) mustDial(port uint16) *gonet.TCPConn {
	w.t.Helper()
	conn, err := w.dial(netip.AddrPortFrom(netwire.Gateway(), port))
	if err != nil {
		w.t.Fatalf("the guest cannot reach port %d of the host: %v", port, err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// dialUDP opens a UDP socket of the guest.
func (w *world) dialUDP(to netip.AddrPort) *gonet.UDPConn {
	w.t.Helper()
	at := tcpip.FullAddress{NIC: 1, Addr: tcpip.AddrFrom4(to.Addr().As4()), Port: to.Port()}
	conn, err := gonet.DialUDP(w.guest, nil, &at, ipv4.ProtocolNumber)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// listen listens in the guest.
func (w *world) listen(port uint16) net.Listener {
	w.t.Helper()
	l, err := gonet.ListenTCP(w.guest, tcpip.FullAddress{NIC: 1, Addr: guestAddress(), Port: port}, ipv4.ProtocolNumber)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	return l
}

// ask asks the control socket, once the network is there.
func (w *world) ask(op string) netwire.Reply {
	w.t.Helper()
	var reply netwire.Reply
	w.until("the network answers", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		var err error
		reply, err = netwire.Ask(ctx, w.dir, netwire.Request{Op: op})
		return err == nil
	})
	return reply
}

// set changes what the guest may reach.
func (w *world) set(n netwire.Network) {
	w.t.Helper()
	w.write(n)
	if reply := w.ask(netwire.OpReload); reply.Error != "" {
		w.t.Fatal(reply.Error)
	}
}

// log is what was refused so far.
func (w *world) log() (entries []netwire.Entry) {
	w.t.Helper()
	data, err := os.ReadFile(filepath.Join(w.dir, netwire.LogFile))
	if err != nil && !os.IsNotExist(err) {
		w.t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var e netwire.Entry
		if json.Unmarshal([]byte(line), &e) == nil {
			entries = append(entries, e)
		}
	}
	return entries
}

// logged waits for a refusal.
func (w *world) logged(protocol, target, reason string) {
	w.t.Helper()
	w.until("the log has "+protocol+" "+target+" "+reason, func() bool {
		for _, e := range w.log() {
			if e.Protocol == protocol && e.Target == target && strings.Contains(e.Reason, reason) {
				return true
			}
		}
		return false
	})
}

// until polls for a condition.
func (w *world) until(what string, is func() bool) {
	w.t.Helper()
	for end := time.Now().Add(patience); !is(); {
		if time.Now().After(end) {
			w.t.Fatalf("never seen: %s; the log: %+v", what, w.log())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// hostService is a service on the host's loopback that treats each connection.
func hostService(t *testing.T, treat func(net.Conn)) (port uint16) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	var mu sync.Mutex
	var open []net.Conn
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open = append(open, conn)
			mu.Unlock()
			work.Go(func() {
				defer conn.Close()
				treat(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		mu.Lock()
		for _, conn := range open {
			conn.Close()
		}
		mu.Unlock()
		work.Wait()
	})
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// echo sends back what comes, and the end too.
func echo(conn net.Conn) {
	io.Copy(conn, conn)
	conn.(*net.TCPConn).CloseWrite()
}

// host is the widest of what a VM may reach.
func host() netwire.Network { return netwire.Network{Preset: "host"} }

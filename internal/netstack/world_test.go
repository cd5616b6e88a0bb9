package netstack

import (
	"context"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// patience bounds each wait of a test.
const patience = fakeguest.Patience

// noHeapLimit: the guest's memory is this process's too.
const noHeapLimit = 1 << 40

// world is a fake QEMU with a guest's own TCP/IP stack in it, and the network that it is
// connected to. What the guest may reach of the host is 127.0.0.1, as the gateway.
type world struct {
	t     *testing.T
	dir   string
	guest *fakeguest.Guest

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
	w := &world{t: t, dir: fakeguest.Dir(t, n)}
	w.guest = fakeguest.New(t, w.send)
	w.listenQEMU()
	return w
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
	var work sync.WaitGroup
	work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w.mu.Lock()
			w.conn = conn
			w.mu.Unlock()
			fakeguest.ReadFrames(conn, nil, w.guest.Take)
			conn.Close()
		}
	})
	w.t.Cleanup(func() {
		l.Close()
		w.mu.Lock()
		if w.conn != nil {
			w.conn.Close()
		}
		w.mu.Unlock()
		work.Wait()
	})
}

// send sends one frame as it is; while nobody is connected it is lost.
func (w *world) send(frame []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn != nil {
		_ = fakeguest.WriteFrame(w.conn, frame) // who went away gets none
	}
}

// dial opens a connection of the guest.
func (w *world) dial(to netip.AddrPort) (*gonet.TCPConn, error) { return w.guest.Dial(0, to) }

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
	fakeguest.Write(w.t, w.dir, n)
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
	return fakeguest.Service(t, "127.0.0.1", treat)
}

// host is the widest of what a VM may reach.
func host() netwire.Network { return netwire.Network{Preset: "host"} }

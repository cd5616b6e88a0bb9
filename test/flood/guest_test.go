package flood

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// The ports that the guest's ordinary connections come from; what is for others, the
// attack gets.
const (
	ordinaryFrom = 52000
	ordinaryTo   = 65000
)

// guest is a banger-net, the fake QEMU that it is connected to, and a guest of two minds:
// a TCP/IP stack for ordinary connections, and frames made by hand.
type guest struct {
	t       *testing.T
	dir     string
	network netwire.Network
	cmd     *exec.Cmd
	ended   chan struct{} // closed when the process has ended
	echos   uint16        // the port of an echo service
	inside  *fakeguest.Guest
	ports   atomic.Uint32 // of ordinary connections

	// take gets the frames that are not the stack's, in the goroutine that reads.
	take atomic.Pointer[func(frame []byte)]
	// deaf: nothing more is read while it is locked.
	deaf sync.Mutex
	// pongs gets the sequence numbers of the answers to settle.
	pongs chan uint16
	pings uint16

	mu    sync.Mutex // frames go out whole
	conn  net.Conn
	out   *bufio.Writer
	notes []string
}

// newGuest starts program with a network and an echo service, and connects to it.
func newGuest(t *testing.T, program string, n netwire.Network) *guest {
	t.Helper()
	g := &guest{t: t, dir: fakeguest.Dir(t, n), network: n, ended: make(chan struct{}), pongs: make(chan uint16, 1)}
	g.echos = fakeguest.Service(t, "127.0.0.1", fakeguest.Echo)
	l, err := net.Listen("unix", filepath.Join(g.dir, netwire.LinkSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g.start(program)
	l.(*net.UnixListener).SetDeadline(time.Now().Add(patience))
	if g.conn, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	g.out = bufio.NewWriterSize(g.conn, 64<<10)
	g.carry()
	return g
}

func (g *guest) start(program string) {
	g.cmd = exec.Command(program)
	g.cmd.Dir = g.dir
	stderr, err := os.Create(filepath.Join(g.dir, "stderr"))
	if err != nil {
		g.t.Fatal(err)
	}
	g.cmd.Stdout, g.cmd.Stderr = stderr, stderr
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	stderr.Close()
	go func() {
		g.cmd.Wait()
		close(g.ended)
	}()
	g.t.Cleanup(func() {
		if g.t.Failed() {
			g.t.Logf("it said: %.4000s", g.said())
		}
		g.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-g.ended:
		case <-time.After(patience):
			g.t.Error("the process does not end")
			g.cmd.Process.Kill()
			<-g.ended
		}
	})
}

// said is what the process wrote to its standard error.
func (g *guest) said() string {
	data, _ := os.ReadFile(filepath.Join(g.dir, "stderr"))
	return string(data)
}

// carry makes the stack and reads what the network sends.
func (g *guest) carry() {
	g.inside = fakeguest.New(g.t, func(frame []byte) { g.send(frame) })
	g.inside.KnowGateway()                                   // it is not given what ARP answers
	soon := tcpip.TCPTimeWaitTimeoutOption(time.Millisecond) // so that ports are free again
	g.inside.Check(g.inside.Stack.SetTransportProtocolOption(header.TCPProtocolNumber, &soon))
	var work sync.WaitGroup
	work.Go(func() { fakeguest.ReadFrames(g.conn, g.hear, g.receive) })
	g.t.Cleanup(func() {
		g.conn.Close()
		work.Wait()
	})
}

// hear waits while the guest is deaf.
func (g *guest) hear() {
	g.deaf.Lock()
	defer g.deaf.Unlock()
}

// receive treats a frame of the network.
func (g *guest) receive(frame []byte) {
	if ordinary(frame) {
		g.inside.Take(frame)
	} else if number, ok := pong(frame); ok {
		select {
		case g.pongs <- number:
		default:
		}
	} else if take := g.take.Load(); take != nil {
		(*take)(frame)
		g.flush()
	}
}

func ordinary(frame []byte) bool {
	if len(frame) < tcpAt+header.TCPMinimumSize || header.Ethernet(frame).Type() != header.IPv4ProtocolNumber ||
		header.IPv4(frame[ipAt:]).Protocol() != uint8(header.TCPProtocolNumber) {
		return false
	}
	to := header.TCP(frame[tcpAt:]).DestinationPort()
	return to >= ordinaryFrom && to < ordinaryTo
}

// settleIdent marks the pings of settle.
const settleIdent = 0xba9e

func pong(frame []byte) (number uint16, ok bool) {
	if len(frame) < tcpAt+header.ICMPv4MinimumSize || header.Ethernet(frame).Type() != header.IPv4ProtocolNumber ||
		header.IPv4(frame[ipAt:]).Protocol() != uint8(header.ICMPv4ProtocolNumber) {
		return 0, false
	}
	h := header.ICMPv4(frame[tcpAt:])
	return h.Sequence(), h.Type() == header.ICMPv4EchoReply && h.Ident() == settleIdent
}

// settle waits until the network has taken in all that was sent: it answers a ping that
// comes after it. Where a queue is full the answer is lost, so there is more than one.
func (g *guest) settle() {
	g.t.Helper()
	g.pings++
	number := g.pings
	for end := time.Now().Add(patience); time.Now().Before(end); {
		g.send(pingFrame(netwire.Gateway(), settleIdent, number))
		again := time.After(200 * time.Millisecond)
		for waits := true; waits; {
			select {
			case got := <-g.pongs:
				if got == number {
					return
				}
			case <-g.ended:
				g.t.Fatalf("the process has ended: %s", g.said())
			case <-again:
				waits = false
			}
		}
	}
	g.t.Fatal("the gateway answers no ping")
}

// onFrame has f take the frames from now on.
func (g *guest) onFrame(f func(frame []byte)) { g.take.Store(&f) }

// send sends frames at once.
func (g *guest) send(frames ...[]byte) {
	g.push(frames...)
	g.flush()
}

// push sends frames by and by.
func (g *guest) push(frames ...[]byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, frame := range frames {
		g.out.Write(binary.BigEndian.AppendUint32(g.out.AvailableBuffer(), uint32(len(frame))))
		g.out.Write(frame)
	}
}

func (g *guest) flush() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.out.Flush()
}

// dial opens an ordinary connection.
func (g *guest) dial(to netip.AddrPort) (*gonet.TCPConn, error) {
	return g.inside.Dial(uint16(ordinaryFrom+g.ports.Add(1)%(ordinaryTo-ordinaryFrom)), to)
}

// echo checks that an ordinary connection works, and returns how long it took. A program
// in the guest would try again when it is refused, so this does too.
func (g *guest) echo() time.Duration {
	g.t.Helper()
	began := time.Now()
	var err error
	for end := began.Add(patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if err = g.tryEcho(); err == nil {
			return time.Since(began)
		}
		select {
		case <-g.ended:
			g.t.Fatalf("the process has ended: %s", g.said())
		default:
		}
	}
	g.t.Fatalf("no echo: %v", err)
	return 0
}

func (g *guest) tryEcho() error {
	conn, err := g.dial(netip.AddrPortFrom(netwire.Gateway(), g.echos))
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	if _, err := conn.Write([]byte("still there?")); err != nil {
		return err
	}
	conn.CloseWrite()
	if got, err := io.ReadAll(conn); err != nil || string(got) != "still there?" {
		return fmt.Errorf("%q comes back, %w", got, err)
	}
	return nil
}

// watch echoes until the returned function is called, which tells the slowest and their
// number.
func (g *guest) watch() func() (time.Duration, int) {
	stop, done := make(chan struct{}), make(chan struct{})
	var worst time.Duration
	count := 0
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			began := time.Now()
			if err := g.tryEcho(); err != nil {
				g.t.Errorf("an echo beside the attacks: %v", err)
				return
			}
			worst, count = max(worst, time.Since(began)), count+1
		}
	}()
	return func() (time.Duration, int) {
		close(stop)
		<-done
		return worst, count
	}
}

// until polls for a condition.
func (g *guest) until(what string, is func() bool) {
	g.t.Helper()
	for end := time.Now().Add(patience); !is(); {
		select {
		case <-g.ended:
			g.t.Fatalf("the process has ended: %s", g.said())
		default:
		}
		if time.Now().After(end) {
			g.t.Fatalf("never seen: %s; %d descriptors, %+v", what, g.descriptors(), g.stats())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// cut has all flows cut by a change of the policy, and takes the change back: UDP flows
// would else live for a minute.
func (g *guest) cut() {
	g.t.Helper()
	nothing := g.network
	nothing.Preset, nothing.Publish = "none", nil
	for _, n := range []netwire.Network{nothing, g.network} {
		fakeguest.Write(g.t, g.dir, n)
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		reply, err := netwire.Ask(ctx, g.dir, netwire.Request{Op: netwire.OpReload})
		cancel()
		if err != nil || reply.Error != "" {
			g.t.Fatalf("a change of the policy: %v %s", err, reply.Error)
		}
	}
}

// steady waits until the network has received no more for a while, and at most some
// seconds.
func (g *guest) steady() {
	g.settle()
	last, quiet := int64(-1), 0
	for range 100 {
		s := g.stats()
		now := s.Received + s.Sent
		if quiet++; now != last {
			quiet = 0
		}
		if last = now; quiet >= 6 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (g *guest) pid() int { return g.cmd.Process.Pid }

func (g *guest) proc(name string) string { return "/proc/" + strconv.Itoa(g.pid()) + "/" + name }

func (g *guest) descriptors() int {
	entries, err := os.ReadDir(g.proc("fd"))
	if err != nil {
		g.t.Fatalf("%v; it said: %s", err, g.said())
	}
	return len(entries)
}

// peak is the most memory that the process ever held, in bytes.
func (g *guest) peak() int {
	data, _ := os.ReadFile(g.proc("status"))
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); fields[0] == "VmHWM:" {
			kib, _ := strconv.Atoi(fields[1])
			return kib << 10
		}
	}
	g.t.Fatalf("no VmHWM in %q", data)
	return 0
}

// processor is the time that the process has computed for.
func (g *guest) processor() time.Duration {
	data, _ := os.ReadFile(g.proc("stat"))
	_, rest, _ := strings.Cut(string(data), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		g.t.Fatalf("cannot understand %q", data)
	}
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond // see proc(5): 100 per second
}

func (g *guest) logSize() (size int64) {
	for _, name := range []string{netwire.LogFile, netwire.LogOld} {
		if info, err := os.Stat(filepath.Join(g.dir, name)); err == nil {
			size += info.Size()
		}
	}
	return size
}

func (g *guest) stats() netwire.Stats {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	reply, err := netwire.Ask(ctx, g.dir, netwire.Request{Op: netwire.OpStats})
	if err != nil || reply.Stats == nil {
		return netwire.Stats{}
	}
	return *reply.Stats
}

// remark adds to the row of the table.
func (g *guest) remark(format string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.notes = append(g.notes, fmt.Sprintf(format, args...))
}

// remarks also says whether memory ran short.
func (g *guest) remarks() string {
	if g.wasCut() {
		g.remark("cut for memory")
	}
	return strings.Join(g.notes, ", ")
}

func (g *guest) wasCut() bool { return g.logged("cut") }

// logged tells whether the log has an event of that word.
func (g *guest) logged(event string) bool {
	data, _ := os.ReadFile(filepath.Join(g.dir, netwire.LogFile))
	return strings.Contains(string(data), `"event":"`+event+`"`)
}

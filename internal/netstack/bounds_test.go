package netstack

import (
	"io"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
	"banger/test/fakeguest"
)

// The buffers of all connections together, for each direction.
func TestBufferSums(t *testing.T) {
	buffers, copies := 0, 0
	for count := 1; count <= maxConnections; count++ {
		buffers, copies = buffers+bufferSize(count), copies+copySize(count)
		if bufferSize(count) > bufferSize(max(count-1, 1)) || copySize(count) > copySize(max(count-1, 1)) {
			t.Errorf("connection %d has more than the one before", count)
		}
	}
	if buffers > 10<<20 || copies > 6<<20 {
		t.Errorf("%d connections have %d KiB in the stack and copy %d KiB, each way", maxConnections, buffers>>10, copies>>10)
	}
	if bufferSize(1) != bufferMost || bufferSize(maxConnections) != bufferLeast {
		t.Errorf("the first has %d, the last %d", bufferSize(1), bufferSize(maxConnections))
	}
}

// What there is no room for, or no leave any more, does not enter.
func TestEnter(t *testing.T) {
	g := newGate(newLog(t.TempDir()))
	defer g.log.close()
	policy, err := netpolicy.New(netpolicy.Internet, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.setPolicy(policy)
	f := netpolicy.Flow{Protocol: "tcp", Address: netip.MustParseAddr("203.0.113.1"), Port: 80}
	ended := 0
	first, reason := g.enter(f, 1, func() { ended++ })
	if first == nil {
		t.Fatal(reason)
	}
	if second, reason := g.enter(f, 1, func() {}); second != nil || reason == "" {
		t.Errorf("a second one entered, %q", reason)
	}
	g.leave(first)
	g.leave(first) // which must not make room for two
	if again, reason := g.enter(f, 1, func() { ended++ }); again == nil || g.count("tcp") != 1 {
		t.Errorf("after the first has left: %q, %d are open", reason, g.count("tcp"))
	}
	none, _ := netpolicy.New(netpolicy.None, nil, nil)
	g.setPolicy(none)
	if ended != 1 || g.count("tcp") != 0 {
		t.Errorf("the policy ended %d, %d are open", ended, g.count("tcp"))
	}
	if kept, _ := g.enter(f, 9, func() {}); kept != nil {
		t.Error("what the policy forbids entered")
	}
}

// A name that was looked up after a connection began is one of its names when the policy
// changes, and so are those that it began with.
func TestLaterNames(t *testing.T) {
	g := newGate(newLog(t.TempDir()))
	defer g.log.close()
	set := func(deny ...string) {
		policy, err := netpolicy.New(netpolicy.Host, nil, deny)
		if err != nil {
			t.Fatal(err)
		}
		g.setPolicy(policy)
	}
	set()
	addr := netip.MustParseAddr("203.0.113.1")
	open := func(names ...string) {
		f := netpolicy.Flow{Protocol: "tcp", Address: addr, Port: 443, Names: names}
		if kept, reason := g.enter(f, 9, func() {}); kept == nil {
			t.Fatal(reason)
		}
	}
	open()
	g.names.learn([]string{"later.example"}, addr, time.Minute)
	set("other.example")
	if g.count("tcp") != 1 {
		t.Error("the name of another address cut it")
	}
	set("later.example")
	if g.count("tcp") != 0 {
		t.Error("a name that was looked up later does not cut it")
	}
	set()
	open("early.example")
	set("early.example:443")
	if g.count("tcp") != 0 {
		t.Error("the name that it began with does not cut it")
	}
}

// What is idle gives way to a new flow: what is done with first, of equals the one that has
// rested longest, and nothing that is in use.
func TestIdleFlowGivesWay(t *testing.T) {
	type state struct {
		rest time.Duration
		done bool
	}
	g := newGate(newLog(t.TempDir()))
	defer g.log.close()
	policy, err := netpolicy.New(netpolicy.Internet, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	g.setPolicy(policy)
	f := netpolicy.Flow{Protocol: "udp", Address: netip.MustParseAddr("203.0.113.1"), Port: 53}
	for _, tt := range []struct {
		flows []state
		gone  int // -1 is none
	}{
		{[]state{{time.Second, false}, {0, true}, {doneRest - 1, true}, {idleRest - 1, false}}, -1},
		{[]state{{time.Second, false}, {idleRest, false}, {idleRest + 1, false}, {idleRest, false}}, 2},
		{[]state{{time.Minute, false}, {doneRest, true}, {doneRest + 1, true}, {0, true}}, 2},
	} {
		g.stuck = time.Time{}
		gone := -1
		var all []*flow
		add := func(i int, s state) bool {
			kept, _ := g.enterIdle(f, len(tt.flows), func() { gone = i }, func() (time.Duration, bool) { return s.rest, s.done })
			all = append(all, kept)
			return kept != nil
		}
		for i, s := range tt.flows {
			add(i, s)
		}
		if entered := add(len(all), state{}); gone != tt.gone || entered != (tt.gone >= 0) || g.count("udp") != len(tt.flows) {
			t.Errorf("%v: %d gave way, entered: %v, %d are open", tt.flows, gone, entered, g.count("udp"))
		}
		for _, kept := range all {
			if kept != nil {
				g.leave(kept)
			}
		}
	}
}

// A resolver in the guest has a new port for each question: it must not have to wait until
// those of old ones are free. A flow without an answer is kept: it is no question.
func TestManyQuestions(t *testing.T) {
	w := newWorld(t, host())
	w.ask(netwire.OpStats)
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	quiet := make(chan string, 2)
	go func() {
		buf := make([]byte, 100)
		for {
			n, from, err := server.ReadFrom(buf)
			if err != nil {
				return
			}
			if n == 2 {
				quiet <- from.String()
				continue
			}
			server.WriteTo(buf[:n], from)
		}
	}()
	received := func() string {
		select {
		case from := <-quiet:
			return from
		case <-time.After(patience):
			t.Fatal("the server gets nothing")
			return ""
		}
	}
	to := netip.AddrPortFrom(netwire.Gateway(), uint16(server.LocalAddr().(*net.UDPAddr).Port))
	in := make([]byte, 100)
	first := w.guest.DialUDP(to)
	first.Write(make([]byte, 2))
	from := received()
	for i := range maxFlows + 10 {
		conn := w.guest.DialUDP(to)
		w.until("the question is answered", func() bool {
			conn.Write([]byte{byte(i)}) // one that was refused is asked again
			conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			n, err := conn.Read(in)
			return err == nil && n == 1 && in[0] == byte(i)
		})
	}
	if open := w.ask(netwire.OpStats).Stats.Connections; open > maxFlows {
		t.Errorf("%d flows are open", open)
	}
	first.Write(make([]byte, 2))
	if now := received(); now != from {
		t.Errorf("the flow without an answer gave way: from %s, then %s", from, now)
	}
}

// The guard sees what is alive, is quiet below its limit, and when it was stopped.
func TestHeapGuard(t *testing.T) {
	runtime.GC()
	var mu sync.Mutex
	over := 0
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return over
	}
	now := read("/gc/heap/live:bytes") + stacks()
	g := guardHeap(now+32<<20, func() {
		mu.Lock()
		over++
		mu.Unlock()
	})
	for range 5 {
		runtime.GC()
		g.check()
	}
	if count() != 0 {
		t.Fatalf("it cried %d times below its limit", over)
	}
	held := make([]byte, 64<<20)
	for end := time.Now().Add(patience); count() == 0; runtime.GC() {
		if time.Now().After(end) {
			t.Fatal("it never saw what is alive")
		}
		time.Sleep(time.Millisecond)
	}
	g.stop()
	for range 3 {
		runtime.GC()
		time.Sleep(time.Millisecond)
	}
	before := count()
	for range 5 {
		runtime.GC()
	}
	if count() != before {
		t.Error("it goes on after its end")
	}
	runtime.KeepAlive(held)
}

// FuzzFrames: whatever QEMU sends, nothing panics, and nothing goes out.
func FuzzFrames(f *testing.F) {
	ip := []byte{0, 0, 0, 42, 2, 0xba, 0x6e, 0, 0, 1, 2, 0x15, 0xd6, 0x43, 0x80, 1, 8, 0,
		0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 2, 15, 10, 0, 2, 2, 0, 9, 0, 53, 0, 8, 0, 0}
	f.Add(ip)
	for _, change := range []struct {
		at int
		to byte
	}{{17, 6}, {18, 0x4f}, {18, 0x55}, {24, 0x20}, {27, 6}, {27, 1}, {34, 127}, {34, 224}, {21, 255}, {3, 13}, {1, 9}} {
		b := append([]byte(nil), ip...)
		b[change.at] = change.to
		f.Add(append(b, ip...))
	}
	log := newLog(f.TempDir())
	f.Cleanup(log.close)
	f.Fuzz(func(t *testing.T, stream []byte) {
		g := newGate(log)
		n, err := newNetwork(fakeguest.MAC(), g, newResolver(resolverOptions{
			policy: func() netpolicy.Policy { return *g.policy.Load() }, own: g.own, refuse: log.add,
			names: g.names, resolvConf: "/dev/null", hostAddr: netwire.Gateway(),
		}))
		if err != nil {
			t.Fatal(err)
		}
		defer n.close()
		near, far := net.Pipe()
		done := make(chan struct{})
		go func() {
			defer close(done)
			n.link.read(near)
		}()
		far.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := far.Write(stream); err != nil && err != io.ErrClosedPipe {
			t.Logf("%d bytes were not all taken: %v", len(stream), err)
		}
		far.Close()
		near.Close()
		<-done
		if open := g.count("tcp") + g.count("udp"); open != 0 {
			t.Errorf("%d flows are open under a policy that forbids all", open)
		}
	})
}

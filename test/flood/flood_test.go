// Package flood attacks banger-net as a guest can that has been taken over: the built
// program, a fake QEMU, and services in a network namespace of the test's own, from which
// no way leads out. Whatever the guest sends, the program lives on, stays below 64 MiB,
// works afterwards, and does not disturb the one of another VM.
package flood

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/internal/netpolicy"
	"banger/internal/netwire"
	"banger/test/need"
)

// mostMemory is what a process may hold, in bytes.
const mostMemory = 64 << 20

// patience bounds each wait.
const patience = 90 * time.Second

// inside is set in the namespace: the directory of the built program.
const inside = "BANGER_FLOOD_INSIDE"

// The addresses of the world. All of somewhere are those of another namespace at the end of
// a cable; who asks for one of nowhere gets no answer.
const (
	somewhere = "203.0.113.0/24"
	nowhere   = "198.51.100.0/24"
	resolver  = "203.0.113.53"
)

func nowhereAt(n byte) netip.Addr   { return netip.AddrFrom4([4]byte{198, 51, 100, n}) }
func somewhereAt(n byte) netip.Addr { return netip.AddrFrom4([4]byte{203, 0, 113, n}) }

// attack is a row of the table.
type attack struct {
	name    string
	network netwire.Network
	// mayCut: so much is held that the network may end all connections. Whoever keeps to
	// the protocol is bounded without that.
	mayCut bool
	// run attacks. It returns once the network has taken all of it in.
	run func(t *testing.T, g *guest)
}

func TestFlood(t *testing.T) {
	need.Need(t, "root")
	need.Need(t, "netns")
	program := os.Getenv(inside)
	if program == "" {
		runInside(t)
		return
	}
	there := furnish(t)
	if t.Failed() {
		return
	}
	serveDNS(t, there)
	t.Run("a length that no frame has", func(t *testing.T) { noFrame(t, program) })
	beside := newGuest(t, program, host())
	watch := beside.watch()

	var mu sync.Mutex
	rows := make(map[string]string)
	attacks := slices.Concat(tcpAttacks(there), frameAttacks(), udpAttacks(there), dnsAttacks(), portAttacks())
	t.Run("attacks", func(t *testing.T) {
		for _, a := range attacks {
			t.Run(strings.ReplaceAll(a.name, " ", "_"), func(t *testing.T) {
				t.Parallel()
				row := attackOne(t, program, a)
				mu.Lock()
				defer mu.Unlock()
				rows[a.name] = row
			})
		}
	})
	table := fmt.Sprintf("%-44s %9s %9s  %s\n", "attack", "peak MiB", "CPU ms", "connections cut for memory; remarks")
	for _, a := range attacks {
		table += rows[a.name] + "\n"
	}
	worst, count := watch()
	t.Logf("\n%sbeside it: %d echoes, the slowest took %s", table, count, worst.Round(time.Millisecond))
}

// attackOne runs a against a process of its own and returns its row.
func attackOne(t *testing.T, program string, a attack) string {
	g := newGuest(t, program, a.network)
	g.echo()
	before := g.descriptors()
	pid := g.pid()
	a.run(t, g)
	g.echo()
	g.until("the descriptors are given back", func() bool { return g.descriptors() <= before })
	g.echo()
	if g.pid() != pid {
		t.Errorf("the process is another one")
	}
	peak := g.peak()
	if peak >= mostMemory {
		t.Errorf("it held %.1f MiB, which is too much", float64(peak)/(1<<20))
	}
	if g.wasCut() && !a.mayCut {
		t.Error("it ended all connections for want of memory")
	}
	if size := g.logSize(); size > 1100<<10 {
		t.Errorf("the log has %d bytes", size)
	}
	g.remark("%d refused", g.stats().Refused)
	return fmt.Sprintf("%-44s %9.1f %9d  %s", a.name, float64(peak)/(1<<20), g.processor().Milliseconds(), g.remarks())
}

// runInside builds the program and runs this test again in namespaces of its own.
func runInside(t *testing.T) {
	dir := t.TempDir()
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(dir, "banger-net"), "banger/cmd/banger-net")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build banger-net: %v\n%s", err, out)
	}
	args := []string{"-test.count=1", "-test.parallel=4"}
	for _, arg := range os.Args[1:] {
		if strings.HasPrefix(arg, "-test.v") || strings.HasPrefix(arg, "-test.run") || strings.HasPrefix(arg, "-test.timeout") {
			args = append(args, arg)
		}
	}
	again := exec.Command(os.Args[0], args...)
	again.Env = append(os.Environ(), inside+"="+filepath.Join(dir, "banger-net"))
	again.Stdout, again.Stderr = os.Stdout, os.Stderr
	again.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := again.Run(); err != nil {
		t.Fatalf("in its namespace: %v", err)
	}
}

// furnish makes the network of the namespace, and its resolv.conf. What it returns runs a
// function in the other namespace, where somewhere is.
func furnish(t *testing.T) (there func(func())) {
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver "+resolver+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	work, thread := make(chan func()), make(chan int)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := syscall.Unshare(syscall.CLONE_NEWNET); err != nil {
			close(thread)
			return
		}
		thread <- syscall.Gettid()
		for f := range work {
			f()
		}
	}()
	tid, ok := <-thread
	if !ok {
		t.Fatal("cannot make a namespace")
	}
	t.Cleanup(func() { close(work) })
	there = func(f func()) {
		done := make(chan struct{})
		work <- func() { defer close(done); f() }
		<-done
	}
	steps(t, "mount --bind "+conf+" /etc/resolv.conf",
		"ip link set lo up",
		"ip link add cable type veth peer name cable netns "+strconv.Itoa(tid),
		"ip addr add 192.0.2.1/24 dev cable",
		"ip link set cable up",
		"ip route add "+somewhere+" via 192.0.2.2",
		"ip link add hole type veth peer name pit",
		"ip link set hole arp off up",
		"ip link set pit up",
		"ip addr add 198.51.100.1/24 dev hole")
	there(func() {
		steps(t, "ip link set lo up", "ip addr add 192.0.2.2/24 dev cable", "ip link set cable up", "ip route add local "+somewhere+" dev lo")
	})
	return there
}

func steps(t *testing.T, lines ...string) {
	for _, line := range lines {
		args := strings.Fields(line)
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", line, err, out)
		}
	}
}

func host() netwire.Network { return netwire.Network{Preset: "host"} }

func internet() netwire.Network {
	return netwire.Network{Preset: "internet", Allow: []string{netpolicy.HostName}}
}

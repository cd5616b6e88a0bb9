package vm

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// networked is two VMs in the world: "open" has the network that is the default, and "shut"
// none.
type networked struct {
	*testing.T
	h *host
	w *world
}

// step runs f as a test of its own.
func (n networked) step(name string, f func(n networked)) {
	n.T.Run(name, func(t *testing.T) {
		h := *n.h
		h.t = t
		f(networked{t, &h, n.w})
	})
}

// guest runs a script in a VM as root, and wants it to succeed.
func (n networked) guest(vm, script string) string {
	n.Helper()
	return n.h.ok("exec", "-u", "root", vm, "bash", "-c", script)
}

// probe asks netprobe's questions in a VM, all at once.
func (n networked) probe(vm string, questions ...string) map[string]string {
	n.Helper()
	r := n.h.try(append([]string{"exec", vm, "netprobe"}, questions...)...)
	if r.code != 0 {
		n.Fatalf("netprobe in %s: %s", vm, r)
	}
	came := make(map[string]string)
	for line := range strings.Lines(r.stdout) {
		question, answer, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " = ")
		came[question] = answer
	}
	return came
}

// want asks questions in a VM and compares what comes. "there" stands for the answer of the
// very address and port that was asked.
func (n networked) want(vm string, want map[string]string) {
	n.Helper()
	var questions []string
	for question := range want {
		questions = append(questions, question)
	}
	came := n.probe(vm, questions...)
	for question, wanted := range want {
		if wanted == "there" {
			wanted = strings.TrimPrefix(question, "tcp ")
			if at, udp := strings.CutPrefix(question, "udp "); udp {
				wanted = "datagrams at " + at
			}
		}
		if came[question] != wanted {
			n.Errorf("%s in %s: %q, want %q", question, vm, came[question], wanted)
		}
	}
}

// wantLog waits for lines of a VM's network log that hold all of a list of words.
func (n networked) wantLog(vm string, lines ...[]string) {
	n.Helper()
	log := ""
	missing := func() (words []string) {
		log = n.h.ok("logs", vm, "--network")
	next:
		for _, words := range lines {
			for line := range strings.Lines(log) {
				if holdsAll(line, words) {
					continue next
				}
			}
			return words
		}
		return nil
	}
	// A line that is like one before is written when its window is over, seconds later.
	for deadline := time.Now().Add(worldPatience); missing() != nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			n.Errorf("the log of %s lacks a line with %q:\n%s", vm, missing(), log)
			return
		}
	}
}

func holdsAll(line string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(line, word) {
			return false
		}
	}
	return true
}

// TestNetwork is the whole of the network: real guests, in a world without a way out.
func TestNetwork(t *testing.T) {
	w := newWorld(t)
	h := newHost(t)
	h.via = w.host.enter()
	n := networked{t, h, w}
	n.step("a busy port", testBusyPort)
	n.bootBoth()
	for _, s := range []struct {
		name string
		f    func(n networked)
	}{
		{"the guest", testGuestsSide},
		{"internet", testInternet},
		{"names", testNames},
		{"what was refused is told", testTold},
		{"ping", testPing},
		{"presets", testPresets},
		{"an allow-list", testAllowList},
		{"a new deny cuts", testCut},
		{"published ports", testPublished},
		{"the network killed", testNetworkKilled},
		{"the daemon killed", testDaemonKilled},
		{"a reboot", testRebootKeeps},
		{"forward", testForward},
	} {
		n.step(s.name, s.f)
	}
}

// bootBoth makes both VMs side by side, and brings netprobe in.
func (n networked) bootBoth() {
	n.Helper()
	program := filepath.Join(n.TempDir(), "netprobe")
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", program, "banger/test/netprobe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		n.Fatalf("go build: %v\n%s", err, out)
	}
	data, err := os.ReadFile(program)
	if err != nil {
		n.Fatal(err)
	}
	var both sync.WaitGroup
	results := make([]result, 2)
	for i, args := range [][]string{
		{"open", "-p", "127.0.0.1:8080:" + servicePort},
		{"shut", "--network", "none", "-p", "0.0.0.0:9090:" + servicePort},
	} {
		both.Go(func() {
			results[i] = n.h.try(append([]string{"create", "--memory", "512M", "--cpus", "1", "--name"}, args...)...)
			if results[i].code == 0 {
				results[i] = n.h.in("", bytes.NewReader(data), "exec", "-i", "-u", "root", args[0],
					"sh", "-c", "cat > /usr/local/bin/netprobe && chmod 755 /usr/local/bin/netprobe")
			}
		})
	}
	both.Wait()
	for _, r := range results {
		if r.code != 0 {
			n.Fatal(r)
		}
	}
	for _, vm := range []string{"open", "shut"} {
		n.serveInside(vm)
	}
}

// serveInside has a VM answer at servicePort, on its own loopback at 5432, and at a socket.
func (n networked) serveInside(vm string) {
	n.Helper()
	n.guest(vm, "setsid netprobe serve 0.0.0.0:"+servicePort+" 127.0.0.1:5432 /run/probe.sock </dev/null >/var/log/netprobe 2>&1 &")
	waitFor(n, worldPatience, "netprobe to serve", func() bool {
		return n.probe(vm, "tcp 127.0.0.1:5432")["tcp 127.0.0.1:5432"] == "the guest at 127.0.0.1:5432"
	})
}

// testBusyPort: a port that is taken is an error before anything is made.
func testBusyPort(n networked) {
	r := n.h.try("create", "--name", "third", "-p", servicePort+":80")
	if r.code != 5 || !strings.Contains(r.stderr, "port 127.0.0.1:"+servicePort+" is in use") {
		n.Errorf("create with a busy port: %s", r)
	}
	if out := n.h.ok("ps", "-q"); out != "" {
		n.Errorf("it left %q", out)
	}
	if left, _ := filepath.Glob(filepath.Join(n.h.dir, "vms", "*")); len(left) != 0 {
		n.Errorf("it left %v", left)
	}
}

// testGuestsSide: what init has set up.
func testGuestsSide(n networked) {
	out := n.guest("open", `ip -br addr; ip route; cat /etc/resolv.conf; cat /sys/class/net/e*/mtu; getent hosts host.banger.internal`)
	for _, want := range []string{"127.0.0.1/8", "10.0.2.15/32", "default via 10.0.2.2", "nameserver 10.0.2.2", "\n65520\n", "10.0.2.2 "} {
		if !strings.Contains(out, want) {
			n.Errorf("inside lacks %q:\n%s", want, out)
		}
	}
	n.want("open", map[string]string{"tcp 127.0.0.1:" + servicePort: "the guest at 127.0.0.1:" + servicePort})
}

// refusals are the special addresses, with what the log says of each: the reason, and what
// would allow it for tcp.
func refusals() map[string][2]string {
	return map[string][2]string{
		"10.0.2.2":        {"the host's loopback", "host.banger.internal:" + servicePort},
		ownAddress:        {"an address of this host", ownAddress + ":" + servicePort},
		metadata:          {"metadata address", metadata + ":" + servicePort},
		lanAddress:        {"private network", lanAddress + ":" + servicePort},
		otherPrivate:      {"private network", otherPrivate + ":" + servicePort},
		"10.0.2.16":       {"private network", "10.0.2.16:" + servicePort}, // beside the guest's own
		"10.0.2.255":      {"private network", "10.0.2.255:" + servicePort},
		"100.64.0.1":      {"private network", "100.64.0.1:" + servicePort},
		"100.100.100.200": {"metadata address", "100.100.100.200:" + servicePort},
		"240.0.0.1":       {"reserved address", "240.0.0.1:" + servicePort},
	}
}

// testInternet: the default network reaches public addresses, and nothing else.
func testInternet(n networked) {
	n.want("open", map[string]string{
		"tcp " + peerAddress + ":" + servicePort: "there",
		"udp " + peerAddress + ":" + servicePort: "there",
		"tcp peer.test:" + servicePort:           peerAddress + ":" + servicePort,
		"udp peer.test:" + servicePort:           "datagrams at " + peerAddress + ":" + servicePort,
		"tcp " + peerAddress + ":9":              "refused", // nobody serves there
		"udp " + peerAddress + ":9":              "refused",
	})
	if out := n.guest("open", "curl -s http://peer.test:"+servicePort+"/whole | sha256sum"); !strings.HasPrefix(out, n.w.sum()+" ") {
		n.Errorf("a download: %s", out)
	}
	want := map[string]string{
		"tcp 10.0.2.2:9090":                   "refused", // the port of the other VM
		"tcp " + ownAddress + ":9090":         "refused",
		"tcp lan.test:" + servicePort:         "no address",
		"dns A www.golang.test " + dnsAddress: "NOERROR " + belowGolang, // any resolver of the internet
	}
	var lines [][]string
	for address, said := range refusals() {
		at := address + ":" + servicePort
		want["tcp "+at], want["udp "+at] = "refused", "refused"
		lines = append(lines, []string{"refused tcp " + at, said[0], "hint: banger set open --allow " + said[1] + "\n"},
			[]string{"refused udp " + at, said[0], "hint: banger set open --allow 'udp " + said[1] + "'\n"})
	}
	n.want("open", want)
	n.wantLog("open", lines...)
	// None of the addresses is out of the world's reach: it is the policy that refuses.
	for _, address := range []string{"127.0.0.1", ownAddress, metadata, lanAddress, otherPrivate} {
		if at := address + ":" + servicePort; n.w.host.ask("tcp", at) != at {
			n.Errorf("the host itself does not reach %s", at)
		}
	}
	// The other VM's guest is reached by its published port, and has nothing itself.
	if got, want := n.w.peer.ask("tcp", ownAddress+":9090"), "the guest at 10.0.2.15:"+servicePort; got != want {
		n.Errorf("the published port of shut: %q, want %q", got, want)
	}
	n.want("shut", map[string]string{
		"tcp " + peerAddress + ":" + servicePort: "refused",
		"udp " + peerAddress + ":" + servicePort: "refused",
		"tcp 10.0.2.2:8080":                      "refused",
		"dns A peer.test":                        "NXDOMAIN",
	})
}

// testNames: the guest's resolver.
func testNames(n networked) {
	n.want("open", map[string]string{
		"dns A peer.test":                "NOERROR " + peerAddress,
		"dns AAAA peer.test":             "NOERROR",
		"dns A nobody.test":              "NXDOMAIN",
		"dns A rebind.test":              "NOERROR " + peerAddress,
		"dns A host.banger.internal":     "NOERROR 10.0.2.2",
		"dns A big.test":                 "NOERROR 256 records by tcp",
		"tcp rebind.test:" + servicePort: peerAddress + ":" + servicePort,
	})
	n.wantLog("open",
		[]string{"refused dns rebind.test → 127.0.0.1 answer left out: loopback address\n"},
		[]string{"refused dns rebind.test → " + metadata + " answer left out: metadata address", "--allow " + metadata},
		[]string{"refused dns lan.test → " + lanAddress + " answer left out: private network", "--allow " + lanAddress})
}

// testTold: show and ps --wide name the network and count refusals.
func testTold(n networked) {
	var shown struct {
		Network struct {
			Preset  string
			Publish []string
		}
		Traffic struct{ Refused, Sent, Received json.Number }
	}
	if err := json.Unmarshal([]byte(n.h.ok("show", "--format", "json", "open")), &shown); err != nil {
		n.Fatal(err)
	}
	refused, _ := shown.Traffic.Refused.Int64()
	received, _ := shown.Traffic.Received.Int64()
	if shown.Network.Preset != "internet" || len(shown.Network.Publish) != 1 || refused < int64(2*len(refusals())) || received < downloadSize {
		n.Errorf("show: %+v", shown)
	}
	table := n.h.ok("ps", "--wide")
	var open, shut []string
	for line := range strings.Lines(table) {
		switch fields := strings.Fields(line); fields[0] {
		case "open":
			open = fields
		case "shut":
			shut = fields
		}
	}
	last := func(fields []string) string { return strings.Join(fields[max(0, len(fields)-2):], " ") }
	if last(open) != "internet "+shown.Traffic.Refused.String() || !strings.HasPrefix(last(shut), "none ") || last(shut) == "none 0" {
		n.Errorf("ps --wide, with %s refused in open:\n%s", shown.Traffic.Refused, table)
	}
	if text := n.h.ok("show", "open"); !strings.Contains(text, "banger logs open --network") {
		n.Errorf("show:\n%s", text)
	}
}

// testPing: through the host's own sockets for it, where the host allows them.
func testPing(n networked) {
	groups := func(value string) {
		n.w.host.run("sh", "-c", "echo '"+value+"' > /proc/sys/net/ipv4/ping_group_range")
	}
	groups("1 0")
	n.want("open", map[string]string{"ping " + peerAddress: "unreachable", "ping " + metadata: "unreachable"})
	n.wantLog("open", []string{"refused icmp " + peerAddress, "the host lets this user send no echo requests: sysctl net.ipv4.ping_group_range"},
		[]string{"refused icmp " + metadata, "metadata address", "--allow 'icmp " + metadata + "'"})
	groups("0 2147483647")
	const answer = `answer of type 0 with "hi"`
	n.want("open", map[string]string{"ping " + peerAddress: answer, "ping 10.0.2.2": answer, "ping " + lanAddress: "unreachable"})
}

// testPresets: they change while the VM runs, and each opens what it says.
func testPresets(n networked) {
	lan := map[string]string{
		"tcp " + lanAddress + ":" + servicePort:   "there",
		"udp " + lanAddress + ":" + servicePort:   "there",
		"tcp lan.test:" + servicePort:             lanAddress + ":" + servicePort,
		"tcp " + otherPrivate + ":" + servicePort: "there",
		"tcp " + peerAddress + ":" + servicePort:  "there",
		"tcp " + metadata + ":" + servicePort:     "refused",
		"tcp " + ownAddress + ":" + servicePort:   "refused",
		"tcp 10.0.2.2:" + servicePort:             "refused",
	}
	n.h.ok("set", "open", "--network", "lan")
	n.want("open", lan)
	n.h.ok("set", "open", "--network", "host")
	lan["tcp "+ownAddress+":"+servicePort] = "there"
	lan["tcp 10.0.2.2:"+servicePort] = "127.0.0.1:" + servicePort
	lan["tcp host.banger.internal:"+servicePort] = "127.0.0.1:" + servicePort
	lan["udp host.banger.internal:"+servicePort] = "datagrams at 127.0.0.1:" + servicePort
	n.want("open", lan)
	n.h.ok("set", "open", "--network", "internet")
	n.want("open", map[string]string{
		"tcp " + lanAddress + ":" + servicePort:   "refused",
		"tcp host.banger.internal:" + servicePort: "refused",
		"tcp " + peerAddress + ":" + servicePort:  "there",
	})
	n.h.ok("set", "open", "--allow", otherPrivate+":"+servicePort)
	n.want("open", map[string]string{
		"tcp " + otherPrivate + ":" + servicePort: "there",
		"tcp " + lanAddress + ":" + servicePort:   "refused",
	})
	n.h.ok("set", "open", "--forget", otherPrivate+":"+servicePort)
}

// testAllowList: nothing but a few names, each with its port.
func testAllowList(n networked) {
	golang := "*.golang.test:" + servicePort
	n.h.ok("set", "open", "--network", "none", "--allow", "allowed.test:"+servicePort, "--allow", golang)
	n.want("open", map[string]string{
		"tcp allowed.test:" + servicePort:        allowedTest + ":" + servicePort,
		"tcp allowed.test:" + secondPort:         "refused",
		"tcp www.golang.test:" + servicePort:     belowGolang + ":" + servicePort,
		"tcp golang.test:" + servicePort:         "no address",
		"tcp denied.test:" + servicePort:         "no address",
		"tcp " + deniedTest + ":" + servicePort:  "refused",
		"tcp " + peerAddress + ":" + servicePort: "refused",
		"dns A golang.test":                      "NXDOMAIN",
		"dns A denied.test " + dnsAddress:        "refused",
		"dns A allowed.test " + dnsAddress:       "refused",
		"dns A host.banger.internal":             "NOERROR 10.0.2.2",
	})
	n.wantLog("open",
		[]string{"refused dns denied.test not on the allow-list", "hint: banger set open --allow denied.test\n"},
		[]string{"refused tcp " + allowedTest + ":" + secondPort + " (allowed.test)", "not on the allow-list", "--allow allowed.test:" + secondPort},
		[]string{"refused udp " + dnsAddress + ":53", "not on the allow-list"})
	n.h.ok("set", "open", "--network", "internet", "--forget", "allowed.test:"+servicePort, "--forget", golang)
	n.want("open", map[string]string{"tcp denied.test:" + servicePort: deniedTest + ":" + servicePort})
}

// testCut: a connection that is open when a rule comes that forbids it.
func testCut(n networked) {
	d := n.w.download("cut")
	ended := n.fetch("/trickle/cut")
	n.await("the stream to flow", d.begun)
	n.h.ok("set", "open", "--deny", peerAddress)
	if end := ended(); strings.HasPrefix(end, "0 ") {
		n.Errorf("the stream ended well: %s", end)
	}
	n.await("the peer to see the end", d.ended)
	n.want("open", map[string]string{
		"tcp " + peerAddress + ":" + servicePort: "refused",
		"tcp " + deniedTest + ":" + servicePort:  "there",
	})
	n.wantLog("open", []string{"refused tcp " + peerAddress + ":" + servicePort, `denied by the rule "` + peerAddress + `"`})
	n.h.ok("set", "open", "--forget", peerAddress)
	n.want("open", map[string]string{"tcp " + peerAddress + ":" + servicePort: "there"})
}

func (n networked) await(what string, event <-chan struct{}) {
	n.Helper()
	select {
	case <-event:
	case <-time.After(worldPatience):
		n.Fatalf("waited %s in vain for %s", worldPatience, what)
	}
}

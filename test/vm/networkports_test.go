package vm

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const insideAnswer = "the guest at 10.0.2.15:" + servicePort

// published waits until an address of the host gives an answer.
func (n networked) published(network, at, answer string) {
	n.Helper()
	got := ""
	waitFor(n, worldPatience, fmt.Sprintf("%s %s to give %q", network, at, answer), func() bool {
		got = n.w.host.ask(network, at)
		return got == answer
	})
}

// testPublished: ports of the host lead into the guest, and change while it runs.
func testPublished(n networked) {
	n.published("tcp", "127.0.0.1:8080", insideAnswer)
	if got := n.w.peer.ask("tcp", ownAddress+":8080"); got != "refused" {
		n.Errorf("a port of the loopback, from outside: %q", got)
	}
	n.h.ok("set", "open", "-p", "127.0.0.1:8053:"+servicePort+"/udp", "-p", "8081:"+servicePort)
	n.published("udp", "127.0.0.1:8053", "the guest got hello")
	n.published("tcp", "127.0.0.1:8081", insideAnswer)
	type port struct {
		Protocol  string
		GuestPort int `json:"guest_port"`
		Process   string
		Published string
	}
	var listed struct{ Ports []port }
	if err := json.Unmarshal([]byte(n.h.ok("port", "--format", "json", "open")), &listed); err != nil {
		n.Fatal(err)
	}
	have := make(map[port]bool)
	for _, p := range listed.Ports {
		have[p] = true
	}
	for _, want := range []port{
		{"tcp", 7777, "netprobe", "127.0.0.1:8080"}, {"tcp", 7777, "netprobe", "127.0.0.1:8081"},
		{"udp", 7777, "netprobe", "127.0.0.1:8053"}, {"tcp", 5432, "netprobe", ""},
	} {
		if !have[want] {
			n.Errorf("port lacks %+v: %+v", want, listed.Ports)
		}
	}
	r := n.h.try("set", "open", "-p", servicePort+":80", "-p", "8082:80")
	if r.code != 5 || !strings.Contains(r.stderr, "port 127.0.0.1:"+servicePort+" is in use") {
		n.Errorf("set with a busy port: %s", r)
	}
	n.h.ok("set", "open", "--unpublish", "8053/udp", "--unpublish", "8081")
	for network, at := range map[string]string{"udp": "127.0.0.1:8053", "tcp": "127.0.0.1:8081"} {
		n.published(network, at, "refused")
	}
	n.published("tcp", "127.0.0.1:8082", "refused")
	n.published("tcp", "127.0.0.1:8080", insideAnswer)
}

// networkPID is the process of a VM's network.
func (n networked) networkPID(vm string) int {
	n.Helper()
	data, err := os.ReadFile(filepath.Join(n.h.dir, "vms", n.h.show(vm).ID, "run/processes.json"))
	var who struct{ Net struct{ PID int } }
	if err == nil {
		err = json.Unmarshal(data, &who)
	}
	if err != nil || who.Net.PID == 0 {
		n.Fatalf("who is the network of %s? %v", vm, err)
	}
	return who.Net.PID
}

func (n networked) killNetwork(vm string) {
	n.Helper()
	if err := syscall.Kill(n.networkPID(vm), syscall.SIGKILL); err != nil {
		n.Fatal(err)
	}
}

// works waits until the guest reaches the internet by name, and the host the guest.
func (n networked) works() {
	n.Helper()
	question := "tcp peer.test:" + servicePort
	waitFor(n, worldPatience, "the network to be back", func() bool {
		return n.probe("open", question)[question] == peerAddress+":"+servicePort
	})
	n.published("tcp", "127.0.0.1:8080", insideAnswer)
}

// fetch downloads in the guest whether or not anybody looks on; the function that it
// returns waits for the end and says how it came out, as "CODE SUM". Who only reads learns
// that a connection is lost when it asks, which keep-alive does here within seconds.
func (n networked) fetch(path string) (ended func() string) {
	n.Helper()
	name := "/tmp/" + filepath.Base(path)
	n.guest("open", fmt.Sprintf(`setsid sh -c 'curl -sS --keepalive-time 2 -o %[1]s http://%[2]s:%[3]s%[4]s; echo $? $(sha256sum < %[1]s) > %[1]s.new; mv %[1]s.new %[1]s.end' </dev/null >%[1]s.log 2>&1 &`,
		name, peerAddress, servicePort, path))
	return func() (end string) {
		n.Helper()
		waitFor(n, worldPatience, "a download to end", func() bool {
			r := n.h.try("exec", "open", "cat", name+".end")
			end = strings.TrimSuffix(r.stdout, " -\n")
			return r.code == 0
		})
		return end
	}
}

// testNetworkKilled: what is under way breaks off, what is new works.
func testNetworkKilled(n networked) {
	d := n.w.download("netkilled")
	ended := n.fetch("/half/netkilled")
	n.await("the download to begin", d.begun)
	before := n.networkPID("open")
	n.killNetwork("open")
	if end := ended(); strings.HasPrefix(end, "0 ") {
		n.Errorf("a download through a killed network: %s", end)
	}
	n.works()
	if end := n.fetch("/whole")(); end != "0 "+n.w.sum() {
		n.Errorf("a new download: %s", end)
	}
	if after := n.networkPID("open"); after == before {
		n.Errorf("it is still process %d", after)
	}
}

// testDaemonKilled: the network needs no daemon.
func testDaemonKilled(n networked) {
	d := n.w.download("daemonkilled")
	ended := n.fetch("/half/daemonkilled")
	n.await("the download to begin", d.begun)
	n.h.killDaemon(n.h.daemonPID())
	n.published("tcp", "127.0.0.1:8080", insideAnswer) // no command has started the next one yet
	close(d.resume)
	if end := ended(); end != "0 "+n.w.sum() {
		n.Errorf("the download: %s", end)
	}
	pid := n.networkPID("open")
	n.h.killDaemon(n.h.daemonPID())
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		n.Fatal(err)
	}
	n.works()
	n.h.ok("set", "open", "--deny", deniedTest)
	n.want("open", map[string]string{"tcp " + deniedTest + ":" + servicePort: "refused", "tcp " + allowedTest + ":" + servicePort: "there"})
}

// testRebootKeeps: the guest's reboot is a new VMM, with the same network.
func testRebootKeeps(n networked) {
	first := n.h.show("open").Handles["guest boot id"]
	n.h.try("exec", "-u", "root", "open", "systemctl", "reboot")
	waitFor(n, bootTimeout, "the VM to run again", func() bool {
		v := n.h.show("open")
		return v.State == "RUNNING" && v.Handles["guest boot id"] != first && v.Handles["guest boot id"] != ""
	})
	n.serveInside("open")
	n.works()
	n.want("open", map[string]string{
		"tcp " + deniedTest + ":" + servicePort: "refused",
		"tcp " + lanAddress + ":" + servicePort: "refused",
	})
}

// testForward: to the guest's own loopback and to a socket, without any network, and until
// the VM ends.
func testForward(n networked) {
	forward := func(spec string) (address string, pid int) {
		n.Helper()
		var f struct {
			Address string
			PID     int
		}
		if err := json.Unmarshal([]byte(n.h.ok("forward", "-d", "--format", "json", "shut", spec)), &f); err != nil || f.PID == 0 {
			n.Fatalf("forward %s: %v %+v", spec, err, f)
		}
		return f.Address, f.PID
	}
	port, portPID := forward("0:5432")
	if got := n.w.host.ask("tcp", port); got != "the guest at 127.0.0.1:5432" {
		n.Errorf("a service of the guest's loopback: %q", got)
	}
	socket, socketPID := forward("0:/run/probe.sock")
	if got := n.w.host.ask("tcp", socket); got != "the guest at /run/probe.sock" {
		n.Errorf("a socket of the guest: %q", got)
	}
	path := filepath.Join(filepath.Dir(n.h.dir), "db.sock")
	_, pathPID := forward(path + ":5432")
	conn, err := net.Dial("unix", path)
	if err != nil {
		n.Fatal(err)
	}
	defer conn.Close()
	if got := askOn(conn, "tcp"); got != "the guest at 127.0.0.1:5432" {
		n.Errorf("by a socket of the host: %q", got)
	}
	n.h.ok("stop", "--timeout", "0s", "shut")
	for _, pid := range []int{portPID, socketPID, pathPID} {
		waitFor(n, worldPatience, "a forward to end with its VM", func() bool { return syscall.Kill(pid, 0) != nil || isZombie(pid) })
	}
	if got := n.w.host.ask("tcp", port); got != "refused" {
		n.Errorf("after the end of the VM: %q", got)
	}
}

package agent

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger/internal/guest/wire"
)

const (
	tcpTable = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000   105        0 700 1 0000000000000000 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 701 1 0000000000000000 100 0 0 10 0
   2: 0F02000A:B1C4 08080808:01BB 01 00000000:00000000 00:00000000 00000000     0        0 702 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 703 1 0000000000000000 100 0 0 10 0
   4: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 704 1 0000000000000000 100 0 0 10 0
   5: nonsense 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 704 1
short line
`
	tcp6Table = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 710 1 0000000000000000 100 0 0 10 0
   1: 00000000000000000000000001000000:1F92 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 711 1 0000000000000000 100 0 0 10 0
   2: 0000000000000000FFFF00000100007F:1F93 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 712 1 0000000000000000 100 0 0 10 0
`
	udpTable = `   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
  100: 00000000:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 720 2 0000000000000000 0
  101: 0F02000A:9C40 0202000A:0035 01 00000000:00000000 00:00000000 00000000     0        0 721 2 0000000000000000 0
`
)

func TestPorts(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"net/tcp": tcpTable, "net/tcp6": tcp6Table, "net/udp": udpTable, // and no udp6
		"1/comm": "systemd\n", "90/comm": "nginx\n", "101/comm": "nginx-worker\n", "7/comm": "evil\x1b[2J\nname\n",
	} {
		write(t, filepath.Join(root, "proc", name), text, 0o644)
	}
	for fd, target := range map[string]string{
		"1/fd/3": "socket:[701]", "1/fd/4": "socket:[700]", // kept for a service, and its own
		"90/fd/3": "socket:[701]", "90/fd/4": "socket:[703]", "90/fd/5": "socket:[704]", "90/fd/6": "/dev/null",
		"101/fd/3": "socket:[701]", "101/fd/9": "socket:[702]", "7/fd/0": "socket:[710]", "self/fd/0": "socket:[711]",
	} {
		path := filepath.Join(root, "proc", fd)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, path); err != nil {
			t.Fatal(err)
		}
	}
	a := newTestAgent(t, func(o *Options) { o.Root = root })
	var got wire.Ports
	if err := a.call(wire.Request{Op: wire.OpPorts}, &got); err != nil {
		t.Fatal(err)
	}
	want := []wire.Listening{
		{Protocol: "tcp", Address: "0.0.0.0", Port: 22, PID: 90, Process: "nginx"},
		{Protocol: "tcp", Address: "127.0.0.1", Port: 5432, PID: 1, Process: "systemd"},
		{Protocol: "tcp", Address: "127.0.0.1", Port: 8080, PID: 90, Process: "nginx"},
		{Protocol: "tcp", Address: "::", Port: 8081, PID: 7, Process: "evil[2J name"},
		{Protocol: "tcp", Address: "::1", Port: 8082},
		{Protocol: "tcp", Address: "127.0.0.1", Port: 8083},
		{Protocol: "udp", Address: "0.0.0.0", Port: 68},
	}
	if !slices.Equal(got.Ports, want) || got.More {
		t.Errorf("got  %+v\nwant %+v", got.Ports, want)
	}
}

// What this process itself listens on is found in the real /proc.
func TestPortsOfThisProcess(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a := newTestAgent(t, func(o *Options) { o.Root = "/" })
	ours := func(p wire.Listening) bool {
		return p.Protocol == "tcp" && p.Address == "127.0.0.1" && p.Port == l.Addr().(*net.TCPAddr).Port && p.PID == os.Getpid()
	}
	if all := a.listening(); !slices.ContainsFunc(all, ours) {
		t.Errorf("not among %+v", all)
	}
}

// However much listens, the reply fits into a frame and says that there is more.
func TestPortsFit(t *testing.T) {
	var many []wire.Listening
	for i := range 3000 {
		many = append(many, wire.Listening{Protocol: "tcp", Address: "2001:db8::1", Port: i + 1, PID: 1, Process: strings.Repeat("<", 15)})
	}
	for _, n := range []int{0, 10, maxPorts, 3000} {
		payload, err := encodePorts(many[:n])
		var p wire.Ports
		if err != nil || len(payload) > wire.MaxPayload || json.Unmarshal(payload, &p) != nil {
			t.Fatalf("%d: %d bytes, %v", n, len(payload), err)
		}
		if p.More != (len(p.Ports) < n) || n <= 10 && len(p.Ports) != n || n > 10 && len(p.Ports) < 200 {
			t.Errorf("of %d came %s", n, fmt.Sprint(len(p.Ports), p.More))
		}
	}
}

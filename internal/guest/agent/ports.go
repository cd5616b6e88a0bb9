package agent

import (
	"bufio"
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"banger/internal/guest/wire"
)

const (
	// maxPorts bounds the sockets that a reply holds.
	maxPorts = 1024
	// maxSockets bounds the lines that are read of each table, connections included.
	maxSockets = 1 << 18
	// maxDescriptors bounds the search for who holds a socket.
	maxDescriptors = 1 << 18
)

// The states of a socket in /proc/net, see include/net/tcp_states.h of the kernel. That
// of a UDP socket without a peer is TCP_CLOSE.
const (
	stateListen = "0A"
	stateClose  = "07"
)

// socket is a line of /proc/net.
type socket struct {
	wire.Listening
	inode string
}

func (a *Agent) ports(s *wire.Stream) error {
	payload, err := encodePorts(a.listening())
	if err != nil {
		return err
	}
	return s.Send(wire.KindReply, payload)
}

// encodePorts leaves out at the end what does not fit into a frame.
func encodePorts(all []wire.Listening) ([]byte, error) {
	p := wire.Ports{Ports: all[:min(len(all), maxPorts)]}
	for {
		p.More = len(p.Ports) < len(all)
		payload, err := json.Marshal(p)
		if err != nil || len(payload) <= wire.MaxPayload {
			return payload, err
		}
		p.Ports = p.Ports[:len(p.Ports)*3/4]
	}
}

// listening reads from /proc what takes connections or packets, and who holds it.
func (a *Agent) listening() []wire.Listening {
	var sockets []socket
	for _, table := range []struct{ file, protocol, state string }{
		{"proc/net/tcp", "tcp", stateListen}, {"proc/net/tcp6", "tcp", stateListen},
		{"proc/net/udp", "udp", stateClose}, {"proc/net/udp6", "udp", stateClose},
	} {
		f, err := os.Open(a.file(table.file))
		if err != nil {
			continue // a kernel without IPv6
		}
		sockets = append(sockets, parseSockets(f, table.protocol, table.state)...)
		f.Close()
	}
	holders := a.holders(sockets)
	listening := make([]wire.Listening, 0, len(sockets))
	for _, s := range sockets {
		if pid, ok := holders[s.inode]; ok {
			s.PID, s.Process = pid, a.processName(pid)
		}
		listening = append(listening, s.Listening)
	}
	slices.SortFunc(listening, func(x, y wire.Listening) int {
		return cmp.Or(cmp.Compare(x.Protocol, y.Protocol), cmp.Compare(x.Port, y.Port),
			cmp.Compare(x.Address, y.Address), cmp.Compare(x.PID, y.PID))
	})
	return slices.Compact(listening) // of those that share a port, SO_REUSEPORT
}

// parseSockets reads a table of /proc/net, see proc_pid_net(5).
func parseSockets(r io.Reader, protocol, state string) []socket {
	var sockets []socket
	lines := bufio.NewScanner(r)
	for range maxSockets {
		if !lines.Scan() {
			break
		}
		f := strings.Fields(lines.Text())
		if len(f) < 10 || f[3] != state {
			continue
		}
		address, port, ok := parseSocketAddress(f[1])
		if !ok || port == 0 {
			continue
		}
		l := wire.Listening{Protocol: protocol, Address: address.String(), Port: int(port)}
		sockets = append(sockets, socket{Listening: l, inode: f[9]})
	}
	return sockets
}

// parseSocketAddress reads "0100007F:1F90": words of 32 bits in the machine's order, and
// the port.
func parseSocketAddress(s string) (netip.Addr, uint16, bool) {
	host, portText, _ := strings.Cut(s, ":")
	port, err := strconv.ParseUint(portText, 16, 16)
	if err != nil {
		return netip.Addr{}, 0, false
	}
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.Addr{}, 0, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	address, ok := netip.AddrFromSlice(raw)
	return address.Unmap(), uint16(port), ok
}

// holders finds the process of each socket: the one with the lowest id, which of a server
// and its workers is the server, but PID 1, which holds sockets for others, last.
func (a *Agent) holders(sockets []socket) map[string]int {
	wanted := make(map[string]bool)
	for _, s := range sockets {
		wanted[s.inode] = true
	}
	found := make(map[string]int)
	looked := 0
	for _, pid := range a.processes() {
		dir := filepath.Join(a.file("proc"), strconv.Itoa(pid), "fd")
		names, _ := readNames(dir) // the process may have ended
		for _, name := range names {
			if looked++; looked > maxDescriptors || len(found) == len(wanted) {
				return found
			}
			target, err := os.Readlink(filepath.Join(dir, name))
			inode, ok := strings.CutPrefix(target, "socket:[")
			if err != nil || !ok {
				continue
			}
			inode = strings.TrimSuffix(inode, "]")
			if _, known := found[inode]; wanted[inode] && !known {
				found[inode] = pid
			}
		}
	}
	return found
}

// processes lists the ids of all processes in the order of holders.
func (a *Agent) processes() []int {
	names, _ := readNames(a.file("proc"))
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	if len(pids) > 0 && pids[0] == 1 {
		pids = append(pids[1:], 1)
	}
	return pids
}

func readNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}

func (a *Agent) processName(pid int) string {
	name := readBounded(filepath.Join(a.file("proc"), strconv.Itoa(pid), "comm"))
	return wire.ProcessName(strings.TrimSuffix(name, "\n"))
}

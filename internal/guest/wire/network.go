package wire

import "strings"

// Network is the guest's network card and what to make of it.
type Network struct {
	MAC     string   `json:"mac"`           // how the guest finds the card
	Address string   `json:"address"`       // with its prefix, "10.0.2.15/32"
	Gateway string   `json:"gateway"`       // "10.0.2.2"
	DNS     []string `json:"dns,omitempty"` // addresses of resolvers
	MTU     int      `json:"mtu,omitempty"` // in bytes; 0 leaves the card's own
	// HostName is a name of the gateway in /etc/hosts, empty for none.
	HostName string `json:"host_name,omitempty"`
}

// Dial asks the guest to connect to a service of its own. The guest answers with
// Started, or with an Error. Then both sides send bytes, Stdin to the service and Stdout
// from it, each at most StdinWindow beyond what StdinAck or StdoutAck has acknowledged,
// and each may end its own half first, with StdinEOF or StdoutEOF. Exit comes when both
// halves have ended: its Code is not 0 when the service broke the connection. A stream
// that breaks before StdinEOF resets the service's connection. The agent dials as root.
type Dial struct {
	Network string `json:"network"` // "tcp" or "unix"
	// Address is an absolute path, or HOST:PORT; "localhost" is tried as 127.0.0.1, then
	// as ::1.
	Address string `json:"address"`
}

// Ports is the reply to OpPorts, ordered by protocol, port and address.
type Ports struct {
	Ports []Listening `json:"ports"`
	More  bool        `json:"more,omitempty"` // there are some that had no room here
}

// Listening is a socket of the guest that takes connections or packets.
type Listening struct {
	Protocol string `json:"protocol"` // "tcp" or "udp"
	Address  string `json:"address"`  // "127.0.0.1"; "::" takes IPv4 too, as a rule
	Port     int    `json:"port"`
	PID      int    `json:"pid,omitempty"`     // who holds it, 0 when nobody was found
	Process  string `json:"process,omitempty"` // the name of PID
}

// ProcessName makes the name that a process has given itself fit to be shown on a line.
func ProcessName(s string) string {
	const limit = 15 // TASK_COMM_LEN of the kernel, without its zero
	return CleanText(strings.NewReplacer("\n", " ", "\t", " ").Replace(s), limit)
}

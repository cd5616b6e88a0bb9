// Package netwire is what bangerd and banger-net share: the files of a VM's network in
// the VM's directory, the addresses that guest and network agree on, and the requests
// of the control socket. The daemon writes Config and reads the log; banger-net, which
// the VM's shim starts in the VM's directory and starts again when it dies, needs no
// daemon.
//
//	run/net.sock      QEMU listens, banger-net dials and dials again
//	run/net.json      Config, written by the daemon as one step
//	run/netctl.sock   banger-net listens: Request and Reply, one JSON line each
//	log/network       Entry, one JSON line each; log/network.1 is the older half
package netwire

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// Version is what this release writes; fields are only ever added.
const Version = 1

// The files, relative to the VM's directory.
const (
	LinkSocket    = "run/net.sock"
	ConfigFile    = "run/net.json"
	ControlSocket = "run/netctl.sock"
	LogFile       = "log/network"
	LogOld        = "log/network.1"
)

// MTU of the guest's card in bytes. 65520 is the most that QEMU's stream takes with its
// header: twice the throughput of 1500 for a third of the CPU.
const MTU = 65520

// HostName is the name of the gateway inside the guest. With the preset "host" it is the
// host's loopback.
const HostName = "host.banger.internal"

// Guest is the guest's address with its prefix: it has no neighbours but the gateway, which
// refuses at once what an unanswered ARP would let time out. The addresses inside are those
// of QEMU's own user network, which people know; each VM has a network of its own, so all
// have the same.
func Guest() netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, 15}), 32) }

// Gateway is the router, the resolver, and HostName.
func Gateway() netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 2, 2}) }

// GatewayMAC is the gateway's Ethernet address, locally administered.
func GatewayMAC() net.HardwareAddr { return net.HardwareAddr{0x02, 0xba, 0x6e, 0, 0, 0x01} }

// Config is run/net.json.
type Config struct {
	Version int    `json:"version"`
	MAC     string `json:"mac"` // of the guest
	Network
}

// Network is what a VM may reach and what of it is published, as the record holds it.
type Network struct {
	// Preset is a netpolicy.Preset.
	Preset string `json:"preset"`
	// Allow and Deny hold rules in the grammar of netpolicy.ParseRule.
	Allow []string `json:"allow,omitempty"`
	Deny  []string `json:"deny,omitempty"`
	// Publish holds publications in the grammar of ParsePublication.
	Publish []string `json:"publish,omitempty"`
}

// Entry is one line of the log: a refusal.
type Entry struct {
	At       time.Time `json:"at"`
	Protocol string    `json:"protocol"` // "tcp", "udp", "icmp", "dns", "ethernet" …
	Target   string    `json:"target"`   // ADDRESS:PORT, or what was asked for
	Name     string    `json:"name,omitempty"`
	Reason   string    `json:"reason"`
	// Rule is what an allow rule must say to permit it, empty when none can.
	Rule  string `json:"rule,omitempty"`
	Count int64  `json:"count"` // how many were alike since the last line
}

// The requests of the control socket.
const (
	// OpReload reads run/net.json again. When the reply comes, the new policy is in
	// force, connections that it forbids are cut, and its ports are open; what cannot be
	// is Reply.Error, and then nothing has changed.
	OpReload = "reload"
	// OpStats asks for Reply.Stats.
	OpStats = "stats"
)

// Request is one line; one per connection.
type Request struct {
	Op string `json:"op"`
}

// Reply answers a Request.
type Reply struct {
	// Error says why the request failed, in words for a user.
	Error string `json:"error,omitempty"`
	// Busy is the publication whose port is taken, if that is the error.
	Busy  string `json:"busy,omitempty"`
	Stats *Stats `json:"stats,omitempty"`
}

// Stats count since banger-net started.
type Stats struct {
	Refused     int64 `json:"refused"`
	Connections int   `json:"connections"` // open now: TCP connections and UDP flows
	Sent        int64 `json:"sent"`        // bytes of payload from the guest
	Received    int64 `json:"received"`    // bytes of payload to the guest
	// Problem says in words which ports are not open although they should be.
	Problem string `json:"problem,omitempty"`
	// Busy are the publications among them whose ports another process has.
	Busy []string `json:"busy,omitempty"`
}

// WriteConfig replaces run/net.json of the VM in dir as one step.
func WriteConfig(dir string, c Config) error {
	c.Version = Version
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, ConfigFile)
	temp := path + ".new"
	if err := os.WriteFile(temp, append(data, '\n'), 0o600); err != nil {
		os.Remove(temp)
		return err
	}
	return os.Rename(temp, path)
}

// ReadConfig reads run/net.json of the VM in dir.
func ReadConfig(dir string) (Config, error) {
	data, err := os.ReadFile(filepath.Join(dir, ConfigFile))
	if err != nil {
		return Config{}, err
	}
	var c Config
	if err := json.Unmarshal(data, &c); err != nil {
		return Config{}, fmt.Errorf("cannot understand %s: %w", ConfigFile, err)
	}
	return c, nil
}

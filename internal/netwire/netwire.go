// Package netwire is what bangerd and banger-net share: the files of a VM's network in
// the VM's directory, the addresses that guest and network agree on, and the requests
// of the control socket. The daemon writes Config and reads the log; banger-net, which
// the VM's shim starts in the VM's directory and starts again when it dies, needs no
// daemon.
//
//	run/net.sock      QEMU listens, banger-net dials and dials again
//	run/net.json      Config, written by the daemon as one step; beside it the one before
//	run/netctl.sock   banger-net listens: Request and Reply, one JSON line each
//	log/network       Entry, one JSON line each; log/network.1 is the older half
package netwire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// Version is what this release writes; fields are only ever added.
const Version = 1

// The files, relative to the VM's directory.
const (
	LinkSocket    = "run/net.sock"
	ConfigFile    = "run/net.json"
	configOld     = "run/net.json.old" // what it was before
	configNew     = "run/net.json.new" // half of what it will be
	ControlSocket = "run/netctl.sock"
	LogFile       = "log/network"
	LogOld        = "log/network.1"
)

// MTU of the guest's card in bytes. 65520 is the most that QEMU's stream takes with its
// header: twice the throughput of 1500 for a third of the CPU.
const MTU = 65520

// Guest is the guest's address with its prefix: it has no neighbours but the gateway, which
// refuses at once what an unanswered ARP would let time out. The addresses inside are those
// of QEMU's own user network, which people know; each VM has a network of its own, so all
// have the same.
func Guest() netip.Prefix { return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 2, 15}), 32) }

// Gateway is the router, the resolver, and netpolicy.HostName.
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

// Entry is one line of the log: a refusal, or an Event.
type Entry struct {
	At       time.Time `json:"at"`
	Protocol string    `json:"protocol"` // "tcp", "udp", "icmp", "dns", "ethernet" …
	Target   string    `json:"target"`   // ADDRESS:PORT, or what was asked for
	Name     string    `json:"name,omitempty"`
	Reason   string    `json:"reason"`
	// Rule is what an allow rule must say to permit it, empty when none can.
	Rule string `json:"rule,omitempty"`
	// Hint is a command that shows or mends what the reason is about, where no rule can.
	Hint string `json:"hint,omitempty"`
	// Event is what happened, in one word, where nothing was refused: "cut", "dropped" or
	// "failed". It does not count in Stats.
	Event string `json:"event,omitempty"`
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

// WriteConfig replaces run/net.json of the VM in dir as one step. What it replaces is kept
// beside it: to go back to that needs no room on the disk.
func WriteConfig(dir string, c Config) error {
	c.Version = Version
	data, err := json.Marshal(c)
	if err != nil {
		return err
	}
	data = append(data, '\n')
	path, old, temp := filepath.Join(dir, ConfigFile), filepath.Join(dir, configOld), filepath.Join(dir, configNew)
	if kept, err := os.ReadFile(old); err == nil && bytes.Equal(kept, data) {
		return os.Rename(old, path)
	}
	err = os.WriteFile(temp, data, 0o600)
	if err == nil {
		err = keepConfig(path, old)
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
	}
	return err
}

// keepConfig gives what is at path, if anything is, the name old too, where the file system
// has links.
func keepConfig(path, old string) error {
	if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	err := os.Link(path, old)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EPERM) || errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// RemoveConfig removes run/net.json and what WriteConfig keeps. That nothing is there is
// no error.
func RemoveConfig(dir string) error {
	var errs []error
	for _, name := range []string{ConfigFile, configOld, configNew} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
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

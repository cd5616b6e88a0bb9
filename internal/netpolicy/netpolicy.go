// Package netpolicy says what a guest may reach. It is pure.
package netpolicy

import "net/netip"

// Preset is what a VM may reach when no rule says otherwise.
type Preset string

// The presets, each wider than the one before.
const (
	None     Preset = "none"     // nothing
	Internet Preset = "internet" // public addresses
	LAN      Preset = "lan"      // private networks too
	Host     Preset = "host"     // and the host's loopback, as host.banger.internal
)

// Action is what a rule does.
type Action int

// The actions.
const (
	Deny Action = iota
	Allow
)

// Flow is what a guest asks for.
type Flow struct {
	Protocol string     // "tcp", "udp" or "icmp"
	Address  netip.Addr // unmapped
	Port     uint16     // 0 for icmp
	// Names are those by which the guest's resolver was given Address, while the answers
	// live: lower case, without the last dot.
	Names []string
	// Own: Address belongs to an interface of the host.
	Own bool
	// Gateway: the guest asks its gateway, which is the host's loopback; Address is
	// 127.0.0.1.
	Gateway bool
}

// Verdict is the answer to a Flow or a name.
type Verdict struct {
	Allowed bool
	// Reason says in words why not, for example "private network".
	Reason string
	// Name is the name of the flow that decided, or by which a user would know it.
	Name string
	// Rule is what an allow rule must say to permit it, empty when none can.
	Rule string
}

// Policy is a preset with its rules. The zero value forbids all.
type Policy struct{ preset Preset }

// New makes a policy. Errors are *SyntaxError.
func New(preset Preset, allow, deny []string) (Policy, error) { panic("to be written") }

// Judge says whether the guest may have f.
func (p Policy) Judge(f Flow) Verdict { panic("to be written") }

// Resolve says whether the guest may look up name.
func (p Policy) Resolve(name string) Verdict { panic("to be written") }

// Answer says whether the guest may learn that name has the address addr: an answer that
// no rule and no preset could let the guest use is stripped.
func (p Policy) Answer(name string, addr netip.Addr, own bool) Verdict { panic("to be written") }

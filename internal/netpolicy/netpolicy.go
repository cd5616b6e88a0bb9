// Package netpolicy says what a guest may reach. It is pure: no sockets, no resolver, no
// type of a network stack, so that the same rules serve the user-mode network and, later,
// nftables. A policy is a preset, which is the default, with rules on top. Their order in
// the input does not matter: New sorts them by one total order, and the first that matches
// a flow decides it. The order is, each line deciding what the lines above leave equal:
//
//  1. what is named: one address or one exact name; *.longer.name before *.name; a longer
//     prefix before a shorter one. A name rule is about the very address that its name
//     resolved to, so any of them comes before any prefix, and an exact name ties with an
//     address. (Were *.name to tie with an address too, the order would have circles: an
//     exact name beats *.name, whose narrower port would beat an address, whose narrower
//     port would beat the exact name.)
//  2. fewer ports before more, all ports last
//  3. a protocol before none
//  4. deny before allow
//
// Examples, for a flow to tcp 203.0.113.5:443, which a.example.test resolved to:
//
//	wins                            over                             by
//	deny 203.0.113.5                allow 203.0.113.0/24             1
//	allow a.example.test            deny 203.0.113.0/24              1
//	allow a.example.test            deny *.example.test              1
//	deny *.example.test             allow *.test:443                 1
//	deny 203.0.113.5                allow *.example.test:443         1
//	allow 203.0.113.5:443           deny a.example.test              2
//	deny 203.0.113.5:443            allow a.example.test:400-499     2
//	allow tcp a.example.test:443    deny 203.0.113.5:443             3
//	deny a.example.test:443         allow 203.0.113.5:443            4
//
// Special addresses (special.go) are beside this order: an allow rule counts for them only
// if it names a part of their range, whatever a name resolved to and however wide a prefix
// is. So "allow evil.test" and "allow 0.0.0.0/0" leave 10.0.0.1 to the preset.
package netpolicy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// HostName is the name of the gateway inside the guest, which is the host's loopback.
const HostName = "host.banger.internal"

// Preset is what a VM may reach when no rule says otherwise.
type Preset string

// The presets, each wider than the one before.
const (
	None     Preset = "none"     // nothing
	Internet Preset = "internet" // public addresses
	LAN      Preset = "lan"      // private networks too
	Host     Preset = "host"     // and the host's addresses and loopback, this as HostName
)

// ParsePreset reads a preset.
func ParsePreset(s string) (Preset, error) {
	switch p := Preset(s); p {
	case None, Internet, LAN, Host:
		return p, nil
	}
	return "", fmt.Errorf("a network is none, internet, lan or host, not %q", s)
}

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
	// Own: Address belongs to an interface of the host, or the address that it embeds does.
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
type Policy struct {
	preset Preset
	rules  []Rule // sorted: the first that matches decides
}

// New makes a policy. What is wrong with a rule is a *SyntaxError.
func New(preset Preset, allow, deny []string) (Policy, error) {
	if _, err := ParsePreset(string(preset)); err != nil {
		return Policy{}, err
	}
	p := Policy{preset: preset}
	for _, text := range allow {
		r, err := ParseRule(Allow, text)
		if err != nil {
			return Policy{}, err
		}
		p.rules = append(p.rules, r)
	}
	for _, text := range deny {
		r, err := ParseRule(Deny, text)
		if err != nil {
			return Policy{}, err
		}
		p.rules = append(p.rules, r)
	}
	slices.SortFunc(p.rules, func(a, b Rule) int {
		if c := order(a, b); c != 0 {
			return c
		}
		// Equals decide alike, but the reason names one of them: always the same.
		return strings.Compare(a.String(), b.String())
	})
	return p, nil
}

// Judge says whether the guest may have f.
func (p Policy) Judge(f Flow) Verdict {
	f = f.clean()
	if !isProtocol(f.Protocol) {
		return Verdict{Reason: "only tcp, udp and icmp are forwarded"}
	}
	d := p.decide(f, nil)
	v := Verdict{Allowed: d.allowed, Name: d.name(f)}
	if !d.allowed {
		v.Reason = d.reason()
		v.Rule = firstThat(hints(f), func(r Rule) bool { return p.decide(f, &r).allowed })
	}
	return v
}

// Resolve says whether the guest may look up name. A deny rule forbids that only if it is
// about all ports and protocols.
func (p Policy) Resolve(name string) Verdict {
	name = cleanName(name)
	v := Verdict{Name: name}
	d := p.lookup(name, nil)
	if v.Allowed = d.allowed; v.Allowed {
		return v
	}
	v.Reason = d.reason()
	if nameFault(name) == nil {
		v.Rule = firstThat([]Rule{{Action: Allow, Name: name}, {Action: Allow, Protocol: "tcp", Name: name}},
			func(r Rule) bool { return p.lookup(name, &r).allowed })
	}
	return v
}

// AllowsName tells whether an allow rule has this very name.
func (p Policy) AllowsName(name string) bool {
	name = cleanName(name)
	return slices.ContainsFunc(p.rules, func(r Rule) bool {
		return r.Action == Allow && !r.Wildcard && r.names(name)
	})
}

// Answer says whether the guest may learn that name has the address addr: an answer that
// no rule and no preset could let the guest use is stripped. own is Flow.Own.
func (p Policy) Answer(name string, addr netip.Addr, own bool) Verdict {
	f := Flow{Address: addr, Names: []string{name}, Own: own}.clean()
	v := Verdict{Name: f.Names[0]}
	class := zoneOf(f).class
	inner, embeds := Embedded(f.Address)
	if embeds && class == public {
		class = zoneOfAddress(inner).class
	}
	if class == public || v.Name == HostName {
		v.Allowed = true
		return v
	}
	if v.Allowed = p.opensSome(f, nil); v.Allowed {
		return v
	}
	v.Reason = class.String()
	if !embeds {
		inner = f.Address
	}
	v.Rule = firstThat([]Rule{
		{Action: Allow, Prefix: single(f.Address)}, {Action: Allow, Protocol: "tcp", Prefix: single(f.Address)},
		{Action: Allow, Prefix: single(inner)}, {Action: Allow, Protocol: "tcp", Prefix: single(inner)},
	}, func(r Rule) bool { return p.opensSome(f, &r) })
	return v
}

// decision is how a flow or a lookup came out.
type decision struct {
	allowed bool
	rule    *Rule // that decided, nil if the preset did
	class   class
}

func (d decision) reason() string {
	switch {
	case d.rule != nil:
		return fmt.Sprintf("denied by the rule %q", d.rule)
	case d.class == public:
		return "not on the allow-list"
	}
	return d.class.String()
}

func (d decision) name(f Flow) string {
	names := f.names()
	if d.rule != nil && d.rule.Name != "" {
		for _, name := range names {
			if d.rule.names(name) {
				return name
			}
		}
	}
	if len(names) > 0 {
		return names[0]
	}
	return ""
}

// decide judges a clean flow by the policy, with one more allow rule if extra is not nil.
// An address that embeds another must be allowed as both.
func (p Policy) decide(f Flow, extra *Rule) decision {
	d := p.decideOne(f, extra)
	if inner, ok := Embedded(f.Address); ok && d.allowed {
		f.Address = inner
		return p.decideOne(f, extra)
	}
	return d
}

func (p Policy) decideOne(f Flow, extra *Rule) decision {
	z := zoneOf(f)
	d := decision{class: z.class}
	if z.class.closed() {
		return d
	}
	counts := func(r *Rule) bool {
		return r.matches(f) && (r.Action == Deny || z.namedBy(*r))
	}
	return p.settle(d, extra, counts)
}

// lookup judges a clean name that is asked for.
func (p Policy) lookup(name string, extra *Rule) decision {
	if name == HostName {
		return decision{allowed: true}
	}
	return p.settle(decision{class: public}, extra, func(r *Rule) bool {
		return r.names(name) && (r.Action == Allow || r.Protocol == "" && r.allPorts())
	})
}

// settle finds the first rule that counts, and falls back to the preset.
func (p Policy) settle(d decision, extra *Rule, counts func(*Rule) bool) decision {
	for i := range p.rules {
		if r := &p.rules[i]; counts(r) {
			d.rule = r
			break
		}
	}
	if extra != nil && counts(extra) && (d.rule == nil || order(*extra, *d.rule) < 0) {
		d.rule = extra
	}
	if d.rule != nil {
		d.allowed = d.rule.Action == Allow
	} else {
		d.allowed = p.preset.opens(d.class)
	}
	return d
}

// opensSome tells whether any protocol and port of a clean flow is allowed.
func (p Policy) opensSome(f Flow, extra *Rule) bool {
	near := Policy{preset: p.preset}
	starts := []uint16{1} // between two starts, all ports have the same rules
	add := func(r Rule) {
		if r.allPorts() {
			return
		}
		starts = append(starts, r.From)
		if r.To < 65535 {
			starts = append(starts, r.To+1)
		}
	}
	for _, r := range p.rules {
		if r.about(f) {
			near.rules = append(near.rules, r)
			add(r)
		}
	}
	if extra != nil {
		add(*extra)
	}
	f.Protocol, f.Port = "icmp", 0
	if near.decide(f, extra).allowed {
		return true
	}
	for _, f.Protocol = range []string{"tcp", "udp"} {
		for _, f.Port = range starts {
			if near.decide(f, extra).allowed {
				return true
			}
		}
	}
	return false
}

// hints are the allow rules that could open a clean flow, the best to read first. Names
// from the guest's resolver that no rule can hold are left out, and HostName for anything
// but the gateway, which it would open too.
func hints(f Flow) (rules []Rule) {
	var subjects []Rule
	for _, name := range f.names() {
		if f.Gateway != (name == HostName) || nameFault(name) != nil {
			continue
		}
		subjects = append(subjects, Rule{Name: name})
	}
	if !f.Gateway {
		subjects = append(subjects, Rule{Prefix: single(f.Address)})
		if inner, ok := Embedded(f.Address); ok {
			subjects = append(subjects, Rule{Prefix: single(inner)})
		}
	}
	for _, r := range subjects {
		r.Action, r.From, r.To = Allow, f.Port, f.Port
		if f.Protocol == "tcp" && f.Port != 0 {
			rules = append(rules, r)
		}
		r.Protocol = f.Protocol
		rules = append(rules, r)
	}
	return rules
}

// firstThat is the text of the first rule that opens, "" if none does.
func firstThat(rules []Rule, opens func(Rule) bool) string {
	for _, r := range rules {
		if opens(r) {
			return r.String()
		}
	}
	return ""
}

// clean makes a flow what its comments promise, whoever made it.
func (f Flow) clean() Flow {
	if f.Gateway {
		f.Address, f.Own = netip.AddrFrom4([4]byte{127, 0, 0, 1}), false
	}
	f.Address = f.Address.Unmap().WithZone("")
	if f.Protocol == "icmp" {
		f.Port = 0
	}
	names := make([]string, len(f.Names))
	for i, name := range f.Names {
		names[i] = cleanName(name)
	}
	f.Names = names
	return f
}

// names are all names of a clean flow.
func (f Flow) names() []string {
	if f.Gateway {
		return append([]string{HostName}, f.Names...)
	}
	return f.Names
}

func cleanName(name string) string { return strings.TrimSuffix(lower(name), ".") }

// lower is for ASCII only, as DNS is: Unicode has letters whose lower case is ASCII.
func lower(s string) string {
	b := []byte(s)
	for i, c := range b {
		if 'A' <= c && c <= 'Z' {
			b[i] = c + 'a' - 'A'
		}
	}
	return string(b)
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

package netpolicy

import (
	"cmp"
	"net/netip"
	"strconv"
	"strings"
)

// Rule is about a range of addresses, one name, or all names below one.
type Rule struct {
	Action   Action
	Protocol string       // "tcp", "udp", "icmp", or "" for all of them
	Prefix   netip.Prefix // valid if the rule is about addresses
	Name     string       // else: lower case, without the last dot
	Wildcard bool         // the names below Name, not Name itself
	// From and To are ports, both included; 0 and 0 are all ports, and icmp.
	From, To uint16
}

// String is the text that ParseRule takes, in its canonical form.
func (r Rule) String() string {
	var b strings.Builder
	if r.Protocol != "" {
		b.WriteString(r.Protocol + " ")
	}
	switch {
	case r.Name != "":
		if r.Wildcard {
			b.WriteString("*.")
		}
		b.WriteString(r.Name)
	default:
		text := r.Prefix.String()
		if r.Prefix.IsSingleIP() {
			text = r.Prefix.Addr().String()
		}
		if r.Prefix.Addr().Is6() {
			text = "[" + text + "]"
		}
		b.WriteString(text)
	}
	if !r.allPorts() {
		b.WriteString(":" + strconv.Itoa(int(r.From)))
		if r.To != r.From {
			b.WriteString("-" + strconv.Itoa(int(r.To)))
		}
	}
	return b.String()
}

func (r Rule) allPorts() bool { return r.From == 0 }

// names tells whether the rule is about a clean name.
func (r Rule) names(name string) bool {
	if !r.Wildcard {
		return r.Name != "" && r.Name == name
	}
	below, ok := strings.CutSuffix(name, r.Name)
	return ok && len(below) > 1 && below[len(below)-1] == '.'
}

// about tells whether the rule is about some port of a clean flow, or of the address that
// the flow's address embeds.
func (r Rule) about(f Flow) bool {
	if r.Name == "" {
		inner, ok := Embedded(f.Address)
		return r.Prefix.Contains(f.Address) || ok && r.Prefix.Contains(inner)
	}
	for _, name := range f.Names {
		if r.names(name) {
			return true
		}
	}
	return f.Gateway && r.names(HostName)
}

// matches tells whether the rule is about a clean flow.
func (r Rule) matches(f Flow) bool {
	if r.Protocol != "" && r.Protocol != f.Protocol {
		return false
	}
	if !r.allPorts() && (f.Port < r.From || f.Port > r.To) {
		return false
	}
	if r.Name == "" {
		return r.Prefix.Contains(f.Address)
	}
	return r.about(f)
}

// order is negative if a decides before b: the total order of the package comment.
func order(a, b Rule) int {
	named := func(r Rule) int {
		if r.Protocol != "" {
			return 0
		}
		return 1
	}
	return cmp.Or(
		cmp.Compare(a.distance(), b.distance()),
		cmp.Compare(a.width(), b.width()),
		cmp.Compare(named(a), named(b)),
		cmp.Compare(a.Action, b.Action),
	)
}

// distance is how far the rule is from one address: 0 is there, wildcards follow by their
// labels (a name has at most 127), then prefixes by the bits that they leave open.
func (r Rule) distance() int {
	const wildcards, prefixes = 1, 200
	switch {
	case r.Wildcard:
		return wildcards + 127 - strings.Count(r.Name, ".")
	case r.Name != "" || r.Prefix.IsSingleIP():
		return 0
	}
	return prefixes + r.Prefix.Addr().BitLen() - r.Prefix.Bits()
}

// width is the number of ports.
func (r Rule) width() int {
	if r.allPorts() {
		return 1 << 16
	}
	return int(r.To) - int(r.From) + 1
}

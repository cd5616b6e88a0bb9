package netpolicy

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// The properties draw from few addresses, names and ports, so that rules meet flows.

func drawAddress(t *rapid.T, label string) netip.Addr {
	return netip.MustParseAddr(rapid.SampledFrom([]string{
		"203.0.113.5", "203.0.113.4", "198.51.100.1", "10.0.0.1", "10.0.0.0", "192.168.1.1", "127.0.0.1", "169.254.169.254",
		"169.254.1.1", "224.0.0.1", "0.0.0.0", "240.0.0.1", "255.255.255.255", "2001:db8::1", "fd00::1", "::1", "::", "fe80::1",
		"ff02::1", "64:ff9b::cb00:7105", "64:ff9b::a00:1", "64:ff9b::7f00:1", "2002:cb00:7105::1", "2002:a00:1::1", "::a00:1",
	}).Draw(t, label))
}

func drawName(t *rapid.T, label string) string {
	return rapid.SampledFrom([]string{"test", "a.test", "b.a.test", "c.b.a.test", "evil.test", "x", HostName, "banger.internal"}).Draw(t, label)
}

func drawProtocol(t *rapid.T, label string) string {
	return rapid.SampledFrom([]string{"tcp", "udp", "icmp"}).Draw(t, label)
}

// drawRule draws a rule that has a text.
func drawRule(t *rapid.T, label string) Rule {
	r := Rule{Action: Action(rapid.IntRange(0, 1).Draw(t, label+" action"))}
	if rapid.Bool().Draw(t, label+" has protocol") {
		r.Protocol = drawProtocol(t, label+" protocol")
	}
	if rapid.Bool().Draw(t, label+" named") {
		r.Name, r.Wildcard = drawName(t, label+" name"), rapid.Bool().Draw(t, label+" wildcard")
	} else {
		a := drawAddress(t, label+" address")
		bits := a.BitLen()
		if rapid.Bool().Draw(t, label+" wide") {
			bits = rapid.IntRange(0, bits).Draw(t, label+" bits")
		}
		r.Prefix = netip.PrefixFrom(a, bits).Masked()
		if z := zoneOfAddress(r.Prefix.Addr()); z.class.closed() && r.Prefix.Bits() >= z.bits {
			r.Prefix = netip.MustParsePrefix("203.0.113.5/32")
		}
	}
	if r.Protocol != "icmp" && rapid.Bool().Draw(t, label+" has ports") {
		r.From = rapid.SampledFrom([]uint16{1, 79, 80, 443, 65535}).Draw(t, label+" from")
		r.To = max(r.From, rapid.SampledFrom([]uint16{1, 80, 81, 443, 65535}).Draw(t, label+" to"))
	}
	return r
}

func drawFlow(t *rapid.T) Flow {
	f := Flow{
		Protocol: drawProtocol(t, "protocol"), Address: drawAddress(t, "address"),
		Own: rapid.IntRange(0, 4).Draw(t, "own") == 0, Gateway: rapid.IntRange(0, 4).Draw(t, "gateway") == 0,
	}
	if f.Protocol != "icmp" {
		f.Port = rapid.SampledFrom([]uint16{0, 1, 79, 80, 81, 443, 65535}).Draw(t, "port")
	}
	for range rapid.IntRange(0, 3).Draw(t, "names") {
		f.Names = append(f.Names, drawName(t, "name"))
	}
	if rapid.IntRange(0, 4).Draw(t, "odd name") == 0 {
		f.Names = append(f.Names, rapid.SampledFrom([]string{"", "127.1", "a b", "*.test", "localhost", "-", "A.Test.", "\u212a.test"}).Draw(t, "odd"))
	}
	return f
}

func drawRules(t *rapid.T) (preset Preset, allow, deny []string) {
	preset = rapid.SampledFrom([]Preset{None, Internet, LAN, Host}).Draw(t, "preset")
	for range rapid.IntRange(0, 6).Draw(t, "rules") {
		if r := drawRule(t, "rule"); r.Action == Allow {
			allow = append(allow, r.String())
		} else {
			deny = append(deny, r.String())
		}
	}
	return preset, allow, deny
}

func must(t *rapid.T, preset Preset, allow, deny []string) Policy {
	p, err := New(preset, allow, deny)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestOrderOfRulesDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		preset, allow, deny := drawRules(t)
		f, name := drawFlow(t), drawName(t, "asked")
		a := must(t, preset, allow, deny)
		b := must(t, preset, rapid.Permutation(allow).Draw(t, "allow"), rapid.Permutation(deny).Draw(t, "deny"))
		if x, y := a.Judge(f), b.Judge(f); x != y {
			t.Fatalf("%+v\n%+v", x, y)
		}
		if x, y := a.Resolve(name), b.Resolve(name); x != y {
			t.Fatalf("%+v\n%+v", x, y)
		}
		if x, y := a.Answer(name, f.Address, f.Own), b.Answer(name, f.Address, f.Own); x != y {
			t.Fatalf("%+v\n%+v", x, y)
		}
	})
}

// TestOrderIsTotal: antisymmetric and transitive, so that "most specific" has one meaning.
func TestOrderIsTotal(t *testing.T) {
	sign := func(n int) int { return min(1, max(-1, n)) }
	rapid.Check(t, func(t *rapid.T) {
		a, b, c := drawRule(t, "a"), drawRule(t, "b"), drawRule(t, "c")
		if sign(order(a, b)) != -sign(order(b, a)) {
			t.Fatalf("%q and %q: %d %d", a, b, order(a, b), order(b, a))
		}
		if order(a, b) <= 0 && order(b, c) <= 0 && order(a, c) > 0 {
			t.Fatalf("%q before %q before %q before the first", a, b, c)
		}
	})
}

func TestMappedEqualsUnmapped(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := must(t, None, nil, nil)
		if rapid.Bool().Draw(t, "rules") {
			preset, allow, deny := drawRules(t)
			p = must(t, preset, allow, deny)
		}
		f := drawFlow(t)
		mapped := f
		mapped.Address = netip.AddrFrom16(f.Address.As16())
		if x, y := p.Judge(f), p.Judge(mapped); x != y {
			t.Fatalf("%+v\n%+v", x, y)
		}
		if x, y := p.Answer("a.test", f.Address, f.Own), p.Answer("a.test", mapped.Address, f.Own); x != y {
			t.Fatalf("%+v\n%+v", x, y)
		}
	})
}

// TestHintOpens: the rule of a refusal opens the flow, and if there is none, then no rule
// that is as specific as can be does. Names that no rule can hold, and HostName for what
// is not the gateway, are never proposed, so that the second part is without them.
func TestHintOpens(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		preset, allow, deny := drawRules(t)
		f := drawFlow(t)
		v := must(t, preset, allow, deny).Judge(f)
		if v.Allowed {
			if v.Reason != "" || v.Rule != "" {
				t.Fatalf("%+v", v)
			}
			return
		}
		if v.Reason == "" {
			t.Fatalf("%+v", v)
		}
		if v.Rule != "" {
			if v := must(t, preset, append(allow, v.Rule), deny).Judge(f); !v.Allowed {
				t.Fatalf("%+v", v)
			}
			return
		}
		odd := func(name string) bool { return nameFault(name) != nil || !f.Gateway && name == HostName }
		f.Names = slices.DeleteFunc(f.Names, odd)
		if v := must(t, preset, allow, deny).Judge(f); v.Allowed || v.Rule != "" {
			return
		}
		for _, name := range append(slices.Clone(f.Names), HostName) {
			tryRule(t, preset, allow, deny, f, Rule{Name: cleanName(name)})
		}
		tryRule(t, preset, allow, deny, f, Rule{Prefix: single(f.Address)})
		if inner, ok := Embedded(f.Address); ok {
			tryRule(t, preset, allow, deny, f, Rule{Prefix: single(inner)})
		}
		tryRule(t, preset, allow, deny, f, drawRule(t, "try"))
	})
}

func tryRule(t *rapid.T, preset Preset, allow, deny []string, f Flow, r Rule) {
	r.Protocol, r.From, r.To = f.Protocol, f.Port, f.Port
	p, err := New(preset, append(slices.Clone(allow), r.String()), deny)
	if err == nil && p.Judge(f).Allowed {
		t.Fatalf("no hint, but %q opens it", r)
	}
}

// TestAnswerAgreesWithJudge: an answer is let through if it is public, or if Judge allows
// it for some protocol and port.
func TestAnswerAgreesWithJudge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		preset, allow, deny := drawRules(t)
		f := drawFlow(t)
		f.Gateway, f.Names = false, []string{"a.test"}
		p := must(t, preset, allow, deny)
		v := p.Answer("a.test", f.Address, f.Own)
		some := false
		for _, f.Protocol = range []string{"tcp", "udp", "icmp"} {
			for _, f.Port = range []uint16{1, 2, 79, 80, 81, 82, 442, 443, 444, 65534, 65535} {
				some = some || p.Judge(f).Allowed
			}
		}
		inner, embeds := Embedded(f.Address)
		isPublic := zoneOf(f).class == public && (!embeds || zoneOfAddress(inner).class == public)
		if v.Allowed != (some || isPublic) {
			t.Fatalf("%v of %+v, Judge allows some: %v", v, f, some)
		}
		if v.Rule != "" && !must(t, preset, append(allow, v.Rule), deny).Answer("a.test", f.Address, f.Own).Allowed {
			t.Fatalf("%q does not let the answer through", v.Rule)
		}
	})
}

// TestSpecialsStayClosed: without a rule that names a part, no rules and no names open
// what the preset does not.
func TestSpecialsStayClosed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		preset, allow, deny := drawRules(t)
		f := drawFlow(t)
		f.Gateway, f.Own = false, false
		z := zoneOfAddress(f.Address)
		if z.class == public || preset.opens(z.class) {
			return
		}
		allow = slices.DeleteFunc(allow, func(text string) bool {
			r, err := ParseRule(Allow, text)
			return err != nil || r.Name == "" && r.Prefix.Contains(f.Address) && r.Prefix.Bits() >= z.bits
		})
		if v := must(t, preset, allow, deny).Judge(f); v.Allowed {
			t.Fatalf("%s is open: %q", f.Address, allow)
		}
	})
}

func TestNewNeverPanics(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		texts := rapid.SliceOfN(rapid.OneOf(rapid.String(), rapid.StringMatching(`(tcp |udp )?[\[*]?[0-9a-f.:*x/]{0,20}\]?(:[0-9-]{0,8})?`)), 0, 3)
		p, err := New(Preset(rapid.SampledFrom([]string{"none", "lan", "?"}).Draw(t, "preset")), texts.Draw(t, "allow"), texts.Draw(t, "deny"))
		if err == nil {
			p.Judge(drawFlow(t))
		}
	})
}

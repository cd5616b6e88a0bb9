package netpolicy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
)

func mustNew(t testing.TB, preset Preset, allow, deny []string) Policy {
	t.Helper()
	p, err := New(preset, allow, deny)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// flow reads "tcp 203.0.113.5:443 a.test b.test", and icmp without a port.
func flow(t *testing.T, s string) Flow {
	t.Helper()
	words := strings.Fields(s)
	f := Flow{Protocol: words[0], Names: words[2:]}
	if f.Protocol == "icmp" {
		f.Address = netip.MustParseAddr(words[1])
		return f
	}
	at, err := netip.ParseAddrPort(words[1])
	if err != nil {
		t.Fatal(err)
	}
	f.Address, f.Port = at.Addr(), at.Port()
	return f
}

// checkHint demands that the rule of a refusal opens what was refused.
func checkHint(t testing.TB, preset Preset, f Flow, v Verdict) {
	t.Helper()
	if v.Rule == "" {
		return
	}
	if v := mustNew(t, preset, []string{v.Rule}, nil).Judge(f); !v.Allowed {
		t.Errorf("%s: the hint for %+v does not open it: %+v", preset, f, v)
	}
}

// TestJudge: "+" and "-" before a rule are allow and deny; reason "" is allowed.
func TestJudge(t *testing.T) {
	const (
		web  = "tcp 203.0.113.5:443 a.example.test"
		list = "not on the allow-list"
	)
	for _, c := range []struct {
		preset Preset
		rules  string // separated by ;
		flow   string
		reason string
		rule   string
		name   string
	}{
		// The preset alone.
		{None, "", web, list, "a.example.test:443", "a.example.test"},
		{None, "", "tcp 203.0.113.5:443", list, "203.0.113.5:443", ""},
		{None, "", "udp 203.0.113.5:53", list, "udp 203.0.113.5:53", ""},
		{None, "", "icmp 203.0.113.5", list, "icmp 203.0.113.5", ""},
		{None, "", "tcp 203.0.113.5:443 127.1", list, "203.0.113.5:443", "127.1"},
		{None, "", "tcp 203.0.113.5:443 localhost b.test", list, "b.test:443", "localhost"},
		{Internet, "", web, "", "", "a.example.test"},
		{Internet, "", "tcp 192.168.1.1:80", "private network", "192.168.1.1:80", ""},
		{Internet, "", "tcp 192.168.1.1:80 nas.test", "private network", "192.168.1.1:80", "nas.test"},
		{Internet, "", "sctp 203.0.113.5:443", "only tcp, udp and icmp are forwarded", "", ""},

		// One rule.
		{None, "+203.0.113.5", "tcp 203.0.113.5:1", "", "", ""},
		{None, "+203.0.113.5", "icmp 203.0.113.5", "", "", ""},
		{None, "+203.0.113.5:443", "icmp 203.0.113.5", list, "icmp 203.0.113.5", ""},
		{None, "+203.0.113.5:443", "udp 203.0.113.5:443", "", "", ""},
		{None, "+tcp 203.0.113.5:443", "udp 203.0.113.5:443", list, "udp 203.0.113.5:443", ""},
		{None, "+203.0.113.5:80-443", "tcp 203.0.113.5:80", "", "", ""},
		{None, "+203.0.113.5:80-443", "tcp 203.0.113.5:443", "", "", ""},
		{None, "+203.0.113.5:80-443", "tcp 203.0.113.5:444", list, "203.0.113.5:444", ""},
		{None, "+203.0.113.5:80-443", "tcp 203.0.113.5:79", list, "203.0.113.5:79", ""},
		{None, "+203.0.113.0/24", "tcp 203.0.114.5:79", list, "203.0.114.5:79", ""},
		{None, "+a.example.test:443", web, "", "", "a.example.test"},
		{None, "+A.Example.Test.:443", "tcp 203.0.113.5:443 a.EXAMPLE.test.", "", "", "a.example.test"},
		{None, "+*.example.test", web, "", "", "a.example.test"},
		{None, "+*.test", web, "", "", "a.example.test"},
		{None, "+*.a.example.test", web, list, "a.example.test:443", "a.example.test"},
		{None, "+example.test", web, list, "a.example.test:443", "a.example.test"},
		{None, "+*.ample.test", web, list, "a.example.test:443", "a.example.test"},
		{None, "+a.example.test", "tcp 203.0.113.5:443", list, "203.0.113.5:443", ""},
		{None, "+k.test", "tcp 203.0.113.5:443 \u212a.test", list, "203.0.113.5:443", "\u212a.test"}, // Kelvin, not k
		{None, "+b.test", "tcp 203.0.113.5:443 a.test b.test", "", "", "b.test"},
		{Internet, "-203.0.113.5", web, `denied by the rule "203.0.113.5"`, "a.example.test:443", "a.example.test"},
		{Internet, "-tcp 203.0.113.5:443", web, `denied by the rule "tcp 203.0.113.5:443"`, "", "a.example.test"},
		{Internet, "-203.0.113.5:443", web, `denied by the rule "203.0.113.5:443"`, "tcp a.example.test:443", "a.example.test"},
		{Internet, "-*.example.test", "tcp 203.0.113.5:443 b.test a.example.test", `denied by the rule "*.example.test"`, "b.test:443", "a.example.test"},
		{Internet, "-udp 203.0.113.5", web, "", "", "a.example.test"},

		// The table of the package comment.
		{Internet, "-203.0.113.5; +203.0.113.0/24", web, `denied by the rule "203.0.113.5"`, "a.example.test:443", "a.example.test"},
		{None, "+a.example.test; -203.0.113.0/24", web, "", "", "a.example.test"},
		{None, "+a.example.test; -*.example.test", web, "", "", "a.example.test"},
		{None, "-*.example.test; +*.test:443", web, `denied by the rule "*.example.test"`, "a.example.test:443", "a.example.test"},
		{None, "-203.0.113.5; +*.example.test:443", web, `denied by the rule "203.0.113.5"`, "a.example.test:443", "a.example.test"},
		{None, "+203.0.113.5:443; -a.example.test", web, "", "", "a.example.test"},
		{None, "-203.0.113.5:443; +a.example.test:400-499", web, `denied by the rule "203.0.113.5:443"`, "tcp a.example.test:443", "a.example.test"},
		{None, "+tcp a.example.test:443; -203.0.113.5:443", web, "", "", "a.example.test"},
		{None, "-a.example.test:443; +203.0.113.5:443", web, `denied by the rule "a.example.test:443"`, "tcp a.example.test:443", "a.example.test"},

		// More of the order.
		{None, "+203.0.113.0/24; -203.0.0.0/16", web, "", "", "a.example.test"},
		{None, "-203.0.113.0/24; +203.0.0.0/16:443", web, `denied by the rule "203.0.113.0/24"`, "a.example.test:443", "a.example.test"},
		{None, "+*.example.test; -203.0.113.4/31", web, "", "", "a.example.test"},
		{None, "+*.example.test:443; -*.test:443", web, "", "", "a.example.test"},
		{None, "+tcp 203.0.113.0/24; -203.0.113.0/24:443", web, `denied by the rule "203.0.113.0/24:443"`, "a.example.test:443", "a.example.test"},
		{None, "+203.0.113.5:1-65535; -203.0.113.5", web, "", "", "a.example.test"},
		{None, "+203.0.113.0/24:443; -203.0.113.0/24:443", web, `denied by the rule "203.0.113.0/24:443"`, "a.example.test:443", "a.example.test"},
		{None, "+tcp 203.0.113.5:443; -a.example.test:443; +*.example.test", web, "", "", "a.example.test"},
		{Internet, "-0.0.0.0/0; +0.0.0.0/0:443", web, "", "", "a.example.test"},

		// Of equals, the first by its text is the one that is named.
		{Internet, "-a.example.test; -203.0.113.5", web, `denied by the rule "203.0.113.5"`, "a.example.test:443", "a.example.test"},
		{Internet, "-203.0.113.5; -a.example.test", web, `denied by the rule "203.0.113.5"`, "a.example.test:443", "a.example.test"},

		// Special ranges: a name, a wide prefix and equal terms.
		{Internet, "+nas.test", "tcp 10.0.0.5:80 nas.test", "private network", "10.0.0.5:80", "nas.test"},
		{Internet, "+nas.test; +10.0.0.5:80", "tcp 10.0.0.5:80 nas.test", "", "", "nas.test"},
		{Internet, "+10.0.0.0/24:80", "tcp 10.0.0.5:81", "private network", "10.0.0.5:81", ""},
		{Internet, "+10.0.0.0/24; -10.0.0.5", "tcp 10.0.0.5:81", `denied by the rule "10.0.0.5"`, "10.0.0.5:81", ""},
		{Internet, "+10.0.0.5; -nas.test", "tcp 10.0.0.5:81 nas.test", `denied by the rule "nas.test"`, "10.0.0.5:81", "nas.test"},
		{LAN, "-10.0.0.0/8; +nas.test", "tcp 10.0.0.5:80 nas.test", `denied by the rule "10.0.0.0/8"`, "10.0.0.5:80", "nas.test"},
		{LAN, "-0.0.0.0/0; +0.0.0.0/0:80", "tcp 10.0.0.5:80", `denied by the rule "0.0.0.0/0"`, "10.0.0.5:80", ""},
		{LAN, "-0.0.0.0/0; +10.0.0.0/8:80", "tcp 10.0.0.5:80", "", "", ""},
		{LAN, "-nas.test", "tcp 10.0.0.5:80 nas.test", `denied by the rule "nas.test"`, "10.0.0.5:80", "nas.test"},
		{Host, "+0.0.0.0/0; +evil.test", "tcp 127.0.0.1:80 evil.test", "loopback address", "", "evil.test"},

		// IPv6, and IPv4 in it.
		{None, "+[2001:db8::/32]:443", "tcp [2001:db8::1]:443", "", "", ""},
		{None, "+[2001:db8::/32]:443", "tcp [2001:db8::1]:80", list, "[2001:db8::1]:80", ""},
		{None, "+203.0.113.0/24", "tcp [::ffff:203.0.113.5]:80", "", "", ""},
		{Internet, "-203.0.113.5", "tcp [64:ff9b::cb00:7105]:80", `denied by the rule "203.0.113.5"`, "203.0.113.5:80", ""},
		{Internet, "-2000::/3; +0.0.0.0/0", "tcp [2002:cb00:7105::1]:80", `denied by the rule "[2000::/3]"`, "[2002:cb00:7105::1]:80", ""},
		{None, "", "tcp [64:ff9b::cb00:7105]:80", list, "", ""},
		{None, "", "tcp [64:ff9b::cb00:7105]:80 a.test", list, "a.test:80", "a.test"},
		{Internet, "", "tcp [64:ff9b::a00:1]:80", "private network", "10.0.0.1:80", ""},
	} {
		var allow, deny []string
		for _, text := range strings.Split(c.rules, "; ") {
			switch {
			case strings.HasPrefix(text, "+"):
				allow = append(allow, text[1:])
			case text != "":
				deny = append(deny, text[1:])
			}
		}
		f := flow(t, c.flow)
		v := mustNew(t, c.preset, allow, deny).Judge(f)
		if want := (Verdict{c.reason == "", c.reason, c.name, c.rule}); v != want {
			t.Errorf("%s %q, %s:\n got %+v\nwant %+v", c.preset, c.rules, c.flow, v, want)
		}
		if v.Rule == "" {
			continue
		}
		if v := mustNew(t, c.preset, append(allow, v.Rule), deny).Judge(f); !v.Allowed {
			t.Errorf("%s %q, %s: the hint does not open it: %+v", c.preset, c.rules, c.flow, v)
		}
	}
}

func TestZeroPolicy(t *testing.T) {
	for _, s := range []string{"tcp 203.0.113.5:443 a.test", "tcp 127.0.0.1:80", "udp 10.0.0.1:1"} {
		if v := (Policy{}).Judge(flow(t, s)); v.Allowed || v.Reason == "" {
			t.Errorf("%s: %+v", s, v)
		}
	}
	if v := (Policy{}).Judge(Flow{Gateway: true, Protocol: "tcp", Port: 1}); v.Allowed {
		t.Errorf("%+v", v)
	}
	if v := (Policy{}).Resolve("a.test"); v.Allowed {
		t.Errorf("%+v", v)
	}
	p := mustNew(t, Host, []string{"0.0.0.0/0"}, nil)
	if v := p.Judge(Flow{Protocol: "tcp", Port: 80}); v.Allowed {
		t.Errorf("no address: %+v", v)
	}
	if v := p.Answer("a.test", netip.Addr{}, false); v.Allowed {
		t.Errorf("no address: %+v", v)
	}
}

func TestResolve(t *testing.T) {
	const list = "not on the allow-list"
	denied := func(s string) string { return fmt.Sprintf("denied by the rule %q", s) }
	for _, c := range []struct {
		preset      Preset
		allow, deny string // separated by commas
		name        string
		reason      string
		rule        string
	}{
		{None, "", "", "a.test", list, "a.test"},
		{None, "", "", "localhost", list, ""},
		{None, "", "", "a b.test", list, ""},
		{None, "", "", "", list, ""},
		{None, "0.0.0.0/0,203.0.113.1", "", "a.test", list, "a.test"},
		{None, "a.test", "", "a.test", "", ""},
		{None, "a.test:443", "", "A.test.", "", ""},
		{None, "udp a.test:53", "", "a.test", "", ""},
		{None, "a.test", "", "b.a.test", list, "b.a.test"},
		{None, "*.test", "", "a.test", "", ""},
		{None, "*.test", "", "test", list, "test"},
		{None, "*.test", "a.test", "a.test", denied("a.test"), "tcp a.test"},
		{None, "*.test", "*.b.test", "a.b.test", denied("*.b.test"), "a.b.test"},
		{None, "a.b.test:443", "*.b.test", "a.b.test", "", ""},
		{None, "*.test", "a.test:80", "a.test", "", ""},
		{None, "*.test", "tcp a.test", "a.test", "", ""},
		{None, "a.test", "a.test", "a.test", denied("a.test"), "tcp a.test"},
		{None, "a.test:443", "a.test", "a.test", "", ""},
		{Internet, "", "", "a.test", "", ""},
		{Internet, "", "", "_x._udp.local", "", ""},
		{Internet, "", "", "", "", ""},
		{Internet, "", "a.test", "a.test", denied("a.test"), "tcp a.test"},
		{Internet, "", "a.test", "b.a.test", "", ""},
		{Internet, "", "*.test", "A.Test", denied("*.test"), "a.test"},
		{Internet, "", "*.test", "atest", "", ""},
		{Internet, "", "a.test:80,tcp a.test,0.0.0.0/0", "a.test", "", ""},
		{LAN, "b.test", "*.test", "b.test", "", ""},
		{Host, "", "host.banger.internal,*.internal", "host.banger.internal", "", ""},
		{None, "", "", "host.banger.internal", "", ""},
	} {
		allow, deny := strings.FieldsFunc(c.allow, isComma), strings.FieldsFunc(c.deny, isComma)
		v := mustNew(t, c.preset, allow, deny).Resolve(c.name)
		if want := (Verdict{c.reason == "", c.reason, cleanName(c.name), c.rule}); v != want {
			t.Errorf("%s +%q -%q %s: %+v, want %+v", c.preset, c.allow, c.deny, c.name, v, want)
		}
		if v.Rule == "" {
			continue
		}
		if v := mustNew(t, c.preset, append(allow, v.Rule), deny).Resolve(c.name); !v.Allowed {
			t.Errorf("%s +%q -%q %s: the hint does not open it: %+v", c.preset, c.allow, c.deny, c.name, v)
		}
	}
}

func isComma(c rune) bool { return c == ',' }

// TestAnswer: special_test.go holds the classes, this what rules make of them.
func TestAllowsName(t *testing.T) {
	p, err := New(Internet, []string{"a.test:443", "tcp both.test:1", "*.wide.test", "203.0.113.1"}, []string{"no.test", "both.test"})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"a.test": true, "A.Test.": true, "both.test": true,
		"b.a.test": false, "test": false, "wide.test": false, "x.wide.test": false, "no.test": false, "": false, "203.0.113.1": false,
	} {
		if got := p.AllowsName(name); got != want {
			t.Errorf("%q: %t", name, got)
		}
	}
}

func TestAnswer(t *testing.T) {
	for _, c := range []struct {
		preset      Preset
		allow, deny string
		address     string
		reason      string
		rule        string
	}{
		{None, "", "", "203.0.113.5", "", ""}, // of no use, but no secret of the host's
		{Internet, "", "203.0.113.5", "203.0.113.5", "", ""},
		{Internet, "", "", "10.0.0.5", "private network", "10.0.0.5"},
		{Internet, "a.test", "", "10.0.0.5", "private network", "10.0.0.5"},
		{Internet, "0.0.0.0/0", "", "10.0.0.5", "private network", "10.0.0.5"},
		{Internet, "10.0.0.5:80", "", "10.0.0.5", "", ""},
		{Internet, "icmp 10.0.0.0/24", "", "10.0.0.5", "", ""},
		{Internet, "10.0.0.0/24:80", "10.0.0.5", "10.0.0.5", "private network", "tcp 10.0.0.5"},
		{Internet, "10.0.0.0/24:80-90", "10.0.0.5:1-85", "10.0.0.5", "", ""},
		{Internet, "10.0.0.0/24:80-90", "10.0.0.5:80-90", "10.0.0.5", "private network", "10.0.0.5"},
		{Internet, "10.0.0.0/24:65535", "10.0.0.5:1-65534", "10.0.0.5", "", ""},
		{LAN, "", "", "10.0.0.5", "", ""},
		{LAN, "", "10.0.0.0/8", "10.0.0.5", "private network", "10.0.0.5"},
		{LAN, "", "a.test", "10.0.0.5", "private network", "tcp 10.0.0.5"},
		{LAN, "", "10.0.0.0/8:1-65535", "10.0.0.5", "", ""}, // ping is left
		{LAN, "", "10.0.0.0/8:1-65535,icmp 10.0.0.0/8", "10.0.0.5", "private network", "10.0.0.5"},
		{LAN, "", "tcp 10.0.0.0/8,icmp 10.0.0.0/8", "10.0.0.5", "", ""},
		{Internet, "", "", "64:ff9b::a00:5", "private network", "10.0.0.5"},
		{Internet, "10.0.0.5", "", "64:ff9b::a00:5", "", ""},
		{Internet, "", "", "::ffff:127.0.0.1", "loopback address", ""},
	} {
		allow, deny := strings.FieldsFunc(c.allow, isComma), strings.FieldsFunc(c.deny, isComma)
		v := mustNew(t, c.preset, allow, deny).Answer("A.test.", netip.MustParseAddr(c.address), false)
		if want := (Verdict{c.reason == "", c.reason, "a.test", c.rule}); v != want {
			t.Errorf("%s +%q -%q %s: %+v, want %+v", c.preset, c.allow, c.deny, c.address, v, want)
		}
		if v.Rule == "" {
			continue
		}
		if v := mustNew(t, c.preset, append(allow, v.Rule), deny).Answer("a.test", netip.MustParseAddr(c.address), false); !v.Allowed {
			t.Errorf("%s +%q -%q %s: the hint does not open it: %+v", c.preset, c.allow, c.deny, c.address, v)
		}
	}
	if v := mustNew(t, None, nil, nil).Answer(HostName, netip.MustParseAddr("10.0.2.2"), false); !v.Allowed {
		t.Errorf("the gateway's own name: %+v", v)
	}
}

func BenchmarkJudge(b *testing.B) {
	p := mustNew(b, Internet, []string{"github.com:443", "*.golang.org:443", "10.0.0.0/8:53"}, []string{"203.0.113.0/24", "*.evil.test"})
	for _, f := range []Flow{
		{Protocol: "tcp", Address: netip.MustParseAddr("198.51.100.1"), Port: 443, Names: []string{"a.golang.org"}},
		{Protocol: "tcp", Address: netip.MustParseAddr("192.168.1.1"), Port: 80},
	} {
		b.Run(f.Address.String(), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				p.Judge(f)
			}
		})
	}
}

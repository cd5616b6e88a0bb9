package netpolicy

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// TestParseRule: each text with its canonical form.
func TestParseRule(t *testing.T) {
	long := strings.Repeat("a", 63)
	for text, want := range map[string]string{
		"github.com:443":          "github.com:443",
		"GitHub.COM.:443":         "github.com:443",
		"*.golang.org:443":        "*.golang.org:443",
		"*.com":                   "*.com",
		"com":                     "com",
		"nas:80-80":               "nas:80",
		"_dmarc.x-y.test":         "_dmarc.x-y.test",
		"xn--bcher-kva.example":   "xn--bcher-kva.example",
		"1a.test":                 "1a.test",
		"0x7f.test":               "0x7f.test",
		long + ".test":            long + ".test",
		"host.banger.internal:22": "host.banger.internal:22",
		"192.168.1.1:80":          "192.168.1.1:80",
		"192.168.1.1/32":          "192.168.1.1",
		"udp 10.0.0.0/8:53":       "udp 10.0.0.0/8:53",
		"UDP 10.0.0.0/8:53-1000":  "udp 10.0.0.0/8:53-1000",
		"tcp a.test":              "tcp a.test",
		"icmp 10.0.0.1":           "icmp 10.0.0.1",
		"icmp *.a.test":           "icmp *.a.test",
		"0.0.0.0/0:1-65535":       "0.0.0.0/0:1-65535",
		"128.0.0.0/1":             "128.0.0.0/1",
		"[2001:db8::/32]:443":     "[2001:db8::/32]:443",
		"2001:db8::/32":           "[2001:db8::/32]",
		"[2001:DB8:0::1]":         "[2001:db8::1]",
		"tcp 2001:db8::1":         "tcp [2001:db8::1]",
		"fd00::5:ab":              "[fd00::5:ab]",
		"1:2:3:4:5:6:7:8":         "[1:2:3:4:5:6:7:8]",
		"::/0":                    "[::/0]",
		"[fd00::1/128]:1-2":       "[fd00::1]:1-2",
	} {
		r, err := ParseRule(Allow, text)
		if err != nil || r.String() != want {
			t.Errorf("%q: %q %v, want %q", text, r, err, want)
		}
		if again, err := ParseRule(Allow, want); err != nil || again != r {
			t.Errorf("%q again: %+v %v, want %+v", want, again, err, r)
		}
	}
	r, err := ParseRule(Deny, "tcp *.a.test:1-9")
	if want := (Rule{Action: Deny, Protocol: "tcp", Name: "a.test", Wildcard: true, From: 1, To: 9}); err != nil || r != want {
		t.Errorf("%+v %v, want %+v", r, err, want)
	}
}

// TestParseRuleRefuses: each text with the column and words of its error.
func TestParseRuleRefuses(t *testing.T) {
	const (
		odd     = "four decimal numbers"
		port    = "a port from 1 to 65535 is expected"
		url     = "a name or an address, not a URL"
		itself  = "the host's loopback is named host.banger.internal"
		nowhere = "nothing is reached at"
	)
	for _, c := range []struct {
		text   string
		column int
		words  string
	}{
		{"", 1, "a name or an address is expected"},
		{" a.test", 1, "not a space"},
		{"tcp ", 5, "a name or an address is expected"},
		{"tcp", 1, "a protocol stands before it"},
		{"udp:53", 1, "a protocol stands before it"},
		{"*.icmp", 3, "a protocol stands before it"},
		{"sctp a.test", 1, "tcp, udp or icmp"},
		{"allow a.test", 1, "tcp, udp or icmp"},
		{"tcp  a.test", 5, "only one space"},
		{"tcp a.test ", 11, "only one space"},
		{"a.test\t", 7, "only one space"},
		{"a.test\n", 7, "only one space"},
		{"10.0.0.0/33", 10, "a prefix length from 0 to 32 is expected"},
		{"10.0.0.0/", 10, "a prefix length"},
		{"10.0.0.0/08", 10, "a prefix length"},
		{"10.0.0.0/+8", 10, "a prefix length"},
		{"10.0.0.0/-1", 10, "a prefix length"},
		{"10.0.0.0/255.0.0.0", 10, "a prefix length"},
		{"tcp [fd00::/129]:1", 13, "a prefix length from 0 to 128 is expected"},
		{"10.0.0.1/8", 1, "the network is 10.0.0.0/8, the one address 10.0.0.1"},
		{"udp [fd00::1/8]:53", 6, "the network is fd00::/8, the one address fd00::1"},
		{"10.0.0.1:0", 10, port},
		{"10.0.0.1:", 10, port},
		{"10.0.0.1:65536", 10, port},
		{"10.0.0.1:+80", 10, port},
		{"10.0.0.1:080", 10, port},
		{"10.0.0.1:http", 10, port},
		{"10.0.0.1:80-", 13, port},
		{"10.0.0.1:-80", 10, port},
		{"10.0.0.1:80-70000", 13, port},
		{"10.0.0.1:1-2-3", 12, port},
		{"10.0.0.1:80-70", 13, "a range of ports goes up: 70-80"},
		{"icmp 10.0.0.1:80", 14, "icmp has no ports"},
		{"icmp [fd00::1]:80", 15, "icmp has no ports"},
		{":80", 1, "a name or an address is expected"},
		{"a.test:80:90", 10, "one port is expected"},
		{"127.1", 1, odd},
		{"0x7f.1", 1, odd},
		{"0x7f000001", 1, odd},
		{"0X7F.0.0.0x1", 1, odd},
		{"010.0.0.1", 1, odd},
		{"tcp 2130706433:80", 5, odd},
		{"10.0.0.1.", 1, odd},
		{"1.2.3.4.5", 1, odd},
		{"256.0.0.1", 1, odd},
		{"10/8", 1, odd},
		{"a.1", 1, odd},
		{"*.1", 1, odd},
		{"https://github.com", 1, url},
		{"tcp http://10.0.0.1:80", 5, url},
		{"github.com/golang", 11, url},
		{"github.com:443/x", 12, port},
		{"a..test", 3, "a label of a name is expected"},
		{".a.test", 1, "a label of a name is expected"},
		{".", 1, "a label of a name is expected"},
		{"*.", 3, "a label of a name is expected"},
		{"-a.test", 1, "begin or end with -"},
		{"x.a-.test", 4, "begin or end with -"},
		{"me@a.test", 3, "not '@'"},
		{"tcp a.te$t", 9, "not '$'"},
		{"b\u00fccher.example", 2, "punycode"},
		{"\u212aelvin.test", 1, "punycode"},
		{"a\xff.test", 2, "punycode"},
		{strings.Repeat("a", 64) + ".test", 64, "at most 63"},
		{strings.Repeat("abcdefg.", 32) + "test", 254, "at most 253"},
		{"*", 1, "*.example.org"},
		{"*:443", 1, "*.example.org"},
		{"a.*.test", 3, "only as the first label"},
		{"*a.test", 1, "only as the first label"},
		{"*.*.test", 3, "only as the first label"},
		{"*.10.0.0.1", 1, odd},
		{"[10.0.0.1]:80", 1, "only an IPv6 address"},
		{"[fd00::1", 9, "a ] is expected"},
		{"[fd00::1]80", 10, "a : with a port"},
		{"[fd00::1]:", 11, port},
		{"[fd00::g]", 2, "no IPv6 address"},
		{"[fe80::1%eth0]", 9, "without a zone"},
		{"fe80::1%eth0", 8, "without a zone"},
		{"fd00::1:443", 1, "[fd00::1]:443; [fd00::1:443] is without one"},
		{"2001:db8::/32:443", 1, "[2001:db8::/32]:443"},
		{"1:2:3:4:5:6:7:8:443", 1, "[1:2:3:4:5:6:7:8]:443"},
		{"[::ffff:10.0.0.1]:80", 2, "written as such: 10.0.0.1"},
		{"::ffff:a00:b", 1, "written as such: 10.0.0.11"},
		{"[::ffff:10.0.0.0/104]", 2, "written as such"},
		{"127.0.0.1:80", 1, itself},
		{"127.0.0.0/8", 1, itself},
		{"tcp [::1]:80", 6, itself},
		{"::1", 1, itself},
		{"localhost:80", 1, itself},
		{"LocalHost.", 1, itself},
		{"a.localhost", 1, itself},
		{"*.localhost", 3, itself},
		{"0.0.0.0:80", 1, nowhere},
		{"0.0.0.0/8", 1, nowhere},
		{"[::]:80", 2, nowhere},
		{"224.0.0.251:5353", 1, "multicast is never forwarded"},
		{"[ff02::/16]", 2, "multicast is never forwarded"},
		{"255.255.255.255", 1, "broadcast address is never forwarded"},
	} {
		r, err := ParseRule(Allow, c.text)
		var syntax *SyntaxError
		if !errors.As(err, &syntax) {
			t.Errorf("%q: %+v %v", c.text, r, err)
			continue
		}
		if syntax.Text != c.text || syntax.Column != c.column || !strings.Contains(syntax.Message, c.words) {
			t.Errorf("%v: want column %d, %q", err, c.column, c.words)
		}
	}
	_, err := ParseRule(Allow, "10.0.0.0/33")
	if want := `rule "10.0.0.0/33": column 10: a prefix length from 0 to 32 is expected`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	for _, text := range []string{"224.0.0.0/4", "255.255.255.255"} {
		if _, err := ParseRule(Deny, text); err != nil {
			t.Errorf("to deny what is closed is no error: %v", err)
		}
	}
	if _, err := ParseRule(Deny, "127.0.0.1"); err == nil {
		t.Error("a deny rule for the loopback by address is refused, as it would do nothing")
	}
}

func TestParsePreset(t *testing.T) {
	for _, text := range []string{"none", "internet", "lan", "host"} {
		if p, err := ParsePreset(text); err != nil || string(p) != text {
			t.Errorf("%q: %q %v", text, p, err)
		}
	}
	for _, text := range []string{"", "LAN", "all", "none "} {
		if p, err := ParsePreset(text); err == nil {
			t.Errorf("%q: %q", text, p)
		}
		if _, err := New(Preset(text), nil, nil); err == nil {
			t.Errorf("New(%q) made a policy", text)
		}
	}
}

// TestRoundTrip: the canonical text of any rule says the same rule.
func TestRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		r := drawRule(t, "rule")
		again, err := ParseRule(r.Action, r.String())
		if err != nil || again != r {
			t.Fatalf("%q: %+v %v, want %+v", r, again, err, r)
		}
	})
}

func FuzzParseRule(f *testing.F) {
	for _, text := range []string{
		"github.com:443", "*.golang.org:443", "192.168.1.1:80-90", "udp 10.0.0.0/8:53", "icmp 10.0.0.1",
		"[2001:db8::/32]:443", "2001:db8::1:443", "::ffff:1.2.3.4", "fe80::1%eth0", "127.1", "*", "https://x",
		"tcp", "a..b", "[", "[]:1", "b\u00fc.test", "1:2:3:4:5:6:7:8", "::/0", "localhost",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		for _, action := range []Action{Allow, Deny} {
			r, err := ParseRule(action, text)
			if err != nil {
				var syntax *SyntaxError
				if !errors.As(err, &syntax) || syntax.Column < 1 || syntax.Column > len(text)+1 || syntax.Message == "" {
					t.Fatalf("%#v", err)
				}
				continue
			}
			if again, err := ParseRule(action, r.String()); err != nil || again != r {
				t.Fatalf("%q became %q: %+v %v", text, r, again, err)
			}
			if (r.Name == "") == !r.Prefix.IsValid() || r.Protocol == "icmp" && !r.allPorts() || r.From > r.To {
				t.Fatalf("%q: %+v", text, r)
			}
		}
	})
}

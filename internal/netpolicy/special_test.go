package netpolicy

import (
	"net/netip"
	"testing"
)

// TestSpecialRanges holds for each class of address: what the presets do, the reason, a
// rule that opens it and one that is too wide to.
func TestSpecialRanges(t *testing.T) {
	const never = Preset("never")
	for _, c := range []struct {
		address string
		own     bool
		from    Preset // the first preset that opens it
		reason  string // with the presets before
		names   string // a rule that opens it, "" if none can
		wide    string // one that does not
	}{
		{"203.0.113.5", false, Internet, "not on the allow-list", "203.0.113.0/24", "198.51.100.0/24"},
		{"198.51.100.1", false, Internet, "not on the allow-list", "0.0.0.0/0", "::/0"},
		{"192.0.2.1", false, Internet, "not on the allow-list", "192.0.0.0/8", "::/0"},
		{"2001:db8::1", false, Internet, "not on the allow-list", "::/0", "0.0.0.0/0"},
		{"2606:4700::1", false, Internet, "not on the allow-list", "2000::/3", "0.0.0.0/0"},

		{"10.0.0.1", false, LAN, "private network", "10.0.0.0/8", "8.0.0.0/6"},
		{"172.31.255.255", false, LAN, "private network", "172.16.0.0/12", "172.0.0.0/8"},
		{"192.168.1.1", false, LAN, "private network", "192.168.1.0/24", "192.0.0.0/8"},
		{"100.127.255.255", false, LAN, "private network", "100.64.0.0/10", "100.0.0.0/8"},
		{"198.19.0.1", false, LAN, "private network", "198.18.0.0/15", "198.0.0.0/8"},
		{"fd12::1", false, LAN, "private network", "fc00::/7", "f000::/4"},
		{"172.32.0.1", false, Internet, "not on the allow-list", "172.0.0.0/8", "::/0"},
		{"100.128.0.1", false, Internet, "not on the allow-list", "100.0.0.0/8", "::/0"},

		{"169.254.1.1", false, never, "link-local address", "169.254.0.0/16", "169.0.0.0/8"},
		{"fe80::1", false, never, "link-local address", "fe80::/10", "fe00::/9"},
		{"169.254.169.254", false, never, "metadata address", "169.254.169.254", "169.254.169.0/24"},
		{"100.100.100.200", false, never, "metadata address", "100.100.100.200", "100.64.0.0/10"},
		{"168.63.129.16", false, never, "metadata address", "168.63.129.16", "168.63.129.0/24"},
		{"fd00:ec2::254", false, never, "metadata address", "fd00:ec2::254", "fd00:ec2::/32"},
		{"fd20:ce::254", false, never, "metadata address", "fd20:ce::254", "fd00::/8"},

		{"192.0.0.8", false, never, "reserved address", "192.0.0.0/24", "192.0.0.0/8"},
		{"240.0.0.1", false, never, "reserved address", "240.0.0.0/4", "128.0.0.0/1"},
		{"fec0::1", false, never, "reserved address", "fec0::/10", "8000::/1"},
		{"::7f00:1", false, never, "reserved address", "::/64", "::/0"},
		{"64:ff9b:1::a00:1", false, never, "reserved address", "64:ff9b:1::/48", "::/0"},
		{"2001::1", false, never, "reserved address", "2001::/32", "2000::/3"},
		{"4000::1", false, never, "reserved address", "4000::/2", "::/0"},

		{"203.0.113.9", true, Host, "an address of this host", "203.0.113.9", "203.0.113.8/31"},
		{"192.168.1.9", true, Host, "an address of this host", "192.168.1.9", "192.168.0.0/16"},
		{"169.254.1.9", true, Host, "an address of this host", "169.254.1.9", "169.254.0.0/16"},
		{"2001:db8::9", true, Host, "an address of this host", "2001:db8::9", "2001:db8::/32"},
		{"169.254.169.254", true, never, "metadata address", "169.254.169.254", "169.254.0.0/16"},
		{"127.0.0.1", true, never, "loopback address", "", "0.0.0.0/0"},

		{"127.0.0.1", false, never, "loopback address", "", "126.0.0.0/7"},
		{"127.255.0.1", false, never, "loopback address", "", "64.0.0.0/2"},
		{"::1", false, never, "loopback address", "", "::/0"},
		{"0.0.0.0", false, never, "reserved address", "", "0.0.0.0/0"},
		{"0.1.2.3", false, never, "reserved address", "", "0.0.0.0/0"},
		{"::", false, never, "reserved address", "", "::/0"},
		{"224.0.0.251", false, never, "multicast", "", "128.0.0.0/1"},
		{"239.1.1.1", false, never, "multicast", "", "0.0.0.0/0"},
		{"ff02::1", false, never, "multicast", "", "8000::/1"},
		{"255.255.255.255", false, never, "broadcast address", "", "240.0.0.0/4"},

		{"::ffff:10.0.0.1", false, LAN, "private network", "10.0.0.0/8", "::/0"},
		{"::ffff:127.0.0.1", false, never, "loopback address", "", "0.0.0.0/0"},
		{"fe80::1%eth0", false, never, "link-local address", "fe80::/10", "::/0"},
		{"64:ff9b::cb00:7105", false, Internet, "not on the allow-list", "", "64:ff9b::/96"},
		{"64:ff9b::a00:1", false, LAN, "private network", "10.0.0.0/8", "64:ff9b::/96"},
		{"64:ff9b::7f00:1", false, never, "loopback address", "", "64:ff9b::/96"},
		{"64:ff9b::a9fe:a9fe", false, never, "metadata address", "169.254.169.254", "64:ff9b::/96"},
		{"2002:a00:1::5", false, LAN, "private network", "10.0.0.1", "2002::/16"},
		{"2002:7f00:1::", false, never, "loopback address", "", "2002:7f00:1::/48"},
		{"2002:e000:1::", false, never, "multicast", "", "2002::/16"},
	} {
		f := Flow{Protocol: "tcp", Address: netip.MustParseAddr(c.address), Port: 80, Own: c.own, Names: []string{"evil.test"}}
		open := false
		for _, preset := range []Preset{None, Internet, LAN, Host} {
			open = open || preset == c.from
			v := mustNew(t, preset, nil, nil).Judge(f)
			reason := c.reason
			if _, embeds := Embedded(f.Address); embeds && preset == None {
				reason = "not on the allow-list" // as the outer address, which is judged first
			}
			if v.Allowed != open || !open && v.Reason != reason {
				t.Errorf("%s: %s own=%v: %+v", preset, c.address, c.own, v)
			}
			if !open {
				checkHint(t, preset, f, v)
			}
			if special := c.reason != "not on the allow-list"; special {
				if v := mustNew(t, preset, []string{"evil.test"}, nil).Judge(f); v.Allowed != open {
					t.Errorf("%s: %s with its name allowed: %+v", preset, c.address, v)
				}
				if v := mustNew(t, preset, nil, nil).Answer("evil.test", f.Address, c.own); v.Allowed != open || !open && v.Reason != c.reason {
					t.Errorf("%s: the answer %s: %+v", preset, c.address, v)
				}
			}
		}
		base := None
		if _, embeds := Embedded(f.Address); embeds {
			base = Internet // which opens the outer address
		}
		if c.names != "" && !mustNew(t, base, []string{c.names}, nil).Judge(f).Allowed {
			t.Errorf("%s does not open %s", c.names, c.address)
		}
		if c.from == Internet {
			base = None
		}
		if mustNew(t, base, []string{c.wide}, nil).Judge(f).Allowed {
			t.Errorf("%s opens %s", c.wide, c.address)
		}
	}
}

// TestGateway: the host's loopback, by the gateway's address.
func TestGateway(t *testing.T) {
	f := Flow{Protocol: "tcp", Address: netip.MustParseAddr("127.0.0.1"), Port: 5432, Gateway: true}
	for _, c := range []struct {
		preset      Preset
		allow, deny []string
		reason      string // "" if it is allowed
		rule        string
	}{
		{None, nil, nil, "the host's loopback", "host.banger.internal:5432"},
		{Internet, nil, nil, "the host's loopback", "host.banger.internal:5432"},
		{LAN, nil, nil, "the host's loopback", "host.banger.internal:5432"},
		{Host, nil, nil, "", ""},
		{None, []string{"host.banger.internal"}, nil, "", ""},
		{Internet, []string{"host.banger.internal:5432"}, nil, "", ""},
		{Internet, []string{"host.banger.internal:5433"}, nil, "the host's loopback", "host.banger.internal:5432"},
		{Internet, []string{"udp host.banger.internal"}, nil, "the host's loopback", "host.banger.internal:5432"},
		{Internet, []string{"0.0.0.0/0", "*.banger.internal", "*.internal"}, nil, "the host's loopback", "host.banger.internal:5432"},
		{Host, nil, []string{"0.0.0.0/0"}, `denied by the rule "0.0.0.0/0"`, "host.banger.internal:5432"},
		{Host, nil, []string{"*.internal"}, `denied by the rule "*.internal"`, "host.banger.internal:5432"},
		{Host, nil, []string{"host.banger.internal:5432"}, `denied by the rule "host.banger.internal:5432"`, "tcp host.banger.internal:5432"},
		{Host, nil, []string{"tcp host.banger.internal:5432"}, `denied by the rule "tcp host.banger.internal:5432"`, ""},
		{Host, []string{"host.banger.internal:5432"}, []string{"0.0.0.0/0", "host.banger.internal"}, "", ""},
	} {
		p := mustNew(t, c.preset, c.allow, c.deny)
		v := p.Judge(f)
		if v.Allowed != (c.reason == "") || v.Reason != c.reason || v.Rule != c.rule || v.Name != HostName {
			t.Errorf("%s allow %q deny %q: %+v", c.preset, c.allow, c.deny, v)
		}
		if v := p.Resolve("Host.banger.internal."); !v.Allowed {
			t.Errorf("%s allow %q deny %q: the name: %+v", c.preset, c.allow, c.deny, v)
		}
	}
	f.Protocol, f.Port = "icmp", 0
	if v := mustNew(t, LAN, nil, nil).Judge(f); v.Rule != "icmp host.banger.internal" {
		t.Errorf("%+v", v)
	}
	// The loopback's own address, without Gateway, stays closed, also with the name.
	f = Flow{Protocol: "tcp", Address: netip.MustParseAddr("127.0.0.1"), Port: 1, Names: []string{HostName}}
	if v := mustNew(t, Host, []string{HostName}, nil).Judge(f); v.Allowed || v.Rule != "" || v.Reason != "loopback address" {
		t.Errorf("%+v", v)
	}
}

func TestEmbedded(t *testing.T) {
	for text, want := range map[string]string{
		"64:ff9b::a00:1": "10.0.0.1", "2002:a00:1:2::3": "10.0.0.1", "64:ff9b:1::a00:1": "",
		"64:ff9b::1:a00:1": "", "::ffff:10.0.0.1": "", "10.0.0.1": "", "2003:a00:1::": "",
	} {
		got, ok := Embedded(netip.MustParseAddr(text))
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v %v", text, got, ok)
		}
	}
	if _, ok := Embedded(netip.Addr{}); ok {
		t.Error("nothing embeds something")
	}
}

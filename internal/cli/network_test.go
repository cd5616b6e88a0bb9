package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/guest/wire"
)

// TestNetworkRequests: what the flags of the network become. Rules and publications go to
// the daemon in their canonical form.
func TestNetworkRequests(t *testing.T) {
	for _, c := range []struct {
		args string
		want string
	}{
		{"create", `create {}`},
		{"create --network lan", `create {"network":{"preset":"lan"}}`},
		{"run -d --network none --allow GitHub.com:443 --allow *.golang.org:443 --deny 192.0.2.0/24",
			`create {"network":{"preset":"none","allow":["github.com:443","*.golang.org:443"],"deny":["192.0.2.0/24"]}}`},
		{"run -d -p 8080:80 --publish 0.0.0.0:53:53/udp -p [::1]:8080:80 -p 127.0.0.1:8080:80",
			`create {"network":{"publish":["127.0.0.1:8080:80/tcp","0.0.0.0:53:53/udp","[::1]:8080:80/tcp"]}}`},
		{"set shop --network lan", `set {"ref":"shop","preset":"lan"}`},
		{"set shop --allow 192.168.1.1:80 --allow 192.168.1.1:80 --deny 198.51.100.7 --forget github.com",
			`set {"ref":"shop","allow":["192.168.1.1:80"],"deny":["198.51.100.7"],"forget":["github.com"]}`},
		{"set -p 8080:80 --unpublish 3000 --unpublish 127.0.0.1:53/udp shop",
			`set {"ref":"shop","publish":["127.0.0.1:8080:80/tcp"],"unpublish":["3000","127.0.0.1:53/udp"]}`},
		{"vm set shop --network none", `set {"ref":"shop","preset":"none"}`},
		{"port shop", "show shop\n" + `ports {"ref":"id-shop"}`},
		{"port", "show id-shop\n" + `ports {"ref":"id-shop"}`},
		{"logs shop --network", "show shop\n" + `networklog {"ref":"id-shop"}`},
		{"logs --network --tail 3", "show id-shop\n" + `networklog {"ref":"id-shop"}`},
		{"logs --network -f", "show id-shop\n" + `networklog {"ref":"id-shop","follow":true}`},
	} {
		t.Run(c.args, func(t *testing.T) {
			d := withShop(t)
			d.net.ports = &bangerv1.PortsResponse{}
			r := d.run(strings.Fields(c.args)...)
			want(t, "exit code", r.code, 0)
			want(t, "requests", d.called(), c.want)
		})
	}
}

// TestNetworkUsage: what does not parse is refused at once, with its column.
func TestNetworkUsage(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"run", "-d", "--network", "wan"}, 125, "banger: --network: it is none, internet, lan or host\nhint: banger run --help\n"},
		{[]string{"run", "-d", "--allow", "tcp  a.test"}, 125, "--allow: rule \"tcp  a.test\": column 5: "},
		{[]string{"run", "-d", "--allow", "a.test:0"}, 125, "\nhint: banger set --help\n"},
		{[]string{"up", "-d", "--deny", "10.0.0.0/33"}, 125, "--deny: rule \"10.0.0.0/33\": column "},
		{[]string{"create", "--deny", "http://a.test"}, 2, "column 1: "},
		{[]string{"create", "-p", "80:0"}, 2, "banger: --publish: cannot publish \"80:0\": \"0\" is no port: it is 1 to 65535\nhint: banger create --help\n"},
		{[]string{"create", "-p", "80:80/sctp"}, 2, "the protocol is tcp or udp"},
		{[]string{"create", "-p", "80:80", "-p", "80:81"}, 2, "the host's port 127.0.0.1:80/tcp cannot lead to 81: it is in use by 127.0.0.1:80:80/tcp"},
		{[]string{"set"}, 2, "VM is missing"},
		{[]string{"set", "shop"}, 2, "banger: nothing to set: give a flag\nhint: banger set --help\n"},
		{[]string{"set", "shop", "box", "--network", "lan"}, 2, `"box" is one argument too many`},
		{[]string{"set", "shop", "--forget", "*"}, 2, "--forget: rule \"*\": column "},
		{[]string{"set", "shop", "--unpublish", "x"}, 2, `--unpublish: cannot read "x": "x" is no port`},
		{[]string{"logs", "shop"}, 2, "banger: name a log: there is that of the network\nhint: banger logs shop --network\n"},
		{[]string{"logs", "--network", "--tail", "-1"}, 2, `--tail: "-1" is no number of lines`},
		{[]string{"port", "a", "b"}, 2, `"b" is one argument too many`},
		{[]string{"forward", "shop"}, 2, "VM or REMOTE is missing"},
		{[]string{"forward", "shop", "0"}, 2, `"0" is neither a port in the guest nor an absolute path`},
		{[]string{"forward", "shop", "70000"}, 2, "neither a port"},
		{[]string{"forward", "shop", "/run/app.sock"}, 2, "a socket needs a place on the host"},
		{[]string{"forward", "shop", "x:80"}, 2, `"x" is no port, ADDRESS:PORT or path on the host`},
		{[]string{"forward", "shop", ":80"}, 2, `"" is no port`},
		{[]string{"forward", "shop", "localhost:1:80"}, 2, `"localhost:1" is no port`},
		{[]string{"forward", "shop", "./s:run/app.sock"}, 2, `"run/app.sock" is neither a port in the guest nor`},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			d := newFake(t)
			r := d.run(c.args...)
			want(t, "exit code", r.code, c.code)
			want(t, "stdout", r.out, "")
			contains(t, "stderr", r.err, c.says, "\nhint: banger ")
			want(t, "requests", d.called(), "")
		})
	}
}

// TestUpNetwork: an existing VM is changed by set only; what it has already may be said.
func TestUpNetwork(t *testing.T) {
	shop := &bangerv1.Network{Preset: "lan", Allow: []string{"github.com:443"}, Publish: []string{"127.0.0.1:8080:80/tcp"}}
	for args, says := range map[string]string{
		"--network lan --allow github.com:443 -p 8080:80": "",
		"--network none": "--network is for a new VM, and this repository has one: shop\nhint: banger set shop --network none\n",
		"--network lan --allow *.golang.org --deny 192.0.2.1 -p 81:81": "--allow is for a new VM, and this repository has one: shop\n" +
			"hint: banger set shop --network lan --allow '*.golang.org' --deny 192.0.2.1 -p 127.0.0.1:81:81/tcp\n",
		"--deny 192.0.2.1": "hint: banger set shop --deny 192.0.2.1\n",
		"-p 8081:80":       "--publish is for a new VM",
	} {
		d := withShop(t)
		d.vms["shop"].Network = shop
		r := d.run(append([]string{"up", "-d"}, strings.Fields(args)...)...)
		if says == "" {
			want(t, args, r.code, 0)
			continue
		}
		want(t, args, r.code, 125)
		contains(t, args, r.err, says)
	}
}

func TestSet(t *testing.T) {
	d := withShop(t)
	r := d.run("set", "shop", "--network", "none", "--allow", "github.com:443", "--deny", "192.0.2.1", "-p", "8080:80")
	want(t, "set", r, result{0, "network:    none; allow github.com:443; deny 192.0.2.1\npublished:  127.0.0.1:8080:80/tcp\n", ""})
	want(t, "quiet", d.run("set", "-q", "shop", "--network", "lan"), result{0, "", ""})
	var vm struct{ Network struct{ Preset string } }
	if err := json.Unmarshal([]byte(d.run("set", "--format", "json", "shop", "--network", "host").out), &vm); err != nil || vm.Network.Preset != "host" {
		t.Errorf("json: %v %+v", err, vm)
	}
	want(t, "no such VM", d.run("set", "nope", "--network", "lan").code, 3)
	// In a repository too the VM is named.
	want(t, "without a VM", d.run("set", "--network", "lan").code, 2)
}

func TestShowNetwork(t *testing.T) {
	d := withShop(t)
	shop := d.vms["shop"]
	shop.Network = &bangerv1.Network{Preset: "internet", Allow: []string{"10.0.0.1", "nas.lan"}, Deny: []string{"192.0.2.1"},
		Publish: []string{"127.0.0.1:8080:80/tcp", "0.0.0.0:53:53/udp"}}
	out := d.run("show", "shop").out
	contains(t, "show", out, "\nnetwork:     internet; allow 10.0.0.1, nas.lan; deny 192.0.2.1\n",
		"\npublished:   127.0.0.1:8080:80/tcp, 0.0.0.0:53:53/udp\n")
	if strings.Contains(out, "refused") || strings.Contains(out, "traffic") {
		t.Errorf("show tells of traffic that nobody knows:\n%s", out)
	}
	shop.Traffic = &bangerv1.Traffic{Refused: 3, Connections: 1, Sent: 1 << 20, Received: 3 << 30, Problem: "port 8080\x1b is busy"}
	contains(t, "show", d.run("show", "shop").out, "3, see banger logs shop --network\n", " 1 connection open, 1M sent, 3G received\n",
		`port 8080\x1b is busy`)
	shop.Traffic = &bangerv1.Traffic{}
	contains(t, "show", d.run("show", "shop").out, "\nrefused:     0\n")
	shop.Traffic = &bangerv1.Traffic{Problem: "it is down"}
	out = d.run("show", "shop").out
	for _, key := range []string{"refused", "traffic"} {
		_, value, _ := strings.Cut(out, "\n"+key+":")
		value, _, _ = strings.Cut(value, "\n")
		want(t, "not counted: "+key, strings.TrimSpace(value), "-")
	}
}

// TestPsWide: each running VM is asked side by side, and none is waited for longer than
// the others need.
func TestPsWide(t *testing.T) {
	d := newFake(t)
	for _, name := range []string{"a", "b", "hangs"} {
		d.add(&bangerv1.VM{Name: name, State: bangerv1.VM_RUNNING, Network: &bangerv1.Network{Preset: "none", Allow: []string{"a.test"}, Deny: []string{"b.test"}}})
	}
	d.add(&bangerv1.VM{Name: "old", State: bangerv1.VM_STOPPED})
	var came atomic.Int32
	both := make(chan struct{})
	d.net.show = func(ctx context.Context, vm *bangerv1.VM) (*bangerv1.VM, error) {
		if vm.Name == "hangs" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if came.Add(1) == 2 {
			close(both)
		}
		select { // a and b wait for each other
		case <-both:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		return &bangerv1.VM{Name: vm.Name, State: vm.State, Network: &bangerv1.Network{Preset: "lan"}, Traffic: &bangerv1.Traffic{Refused: 7}}, nil
	}
	rows := strings.Split(strings.TrimSpace(d.run("ps", "--wide").out), "\n")
	if len(rows) != 5 {
		t.Fatalf("rows: %q", rows)
	}
	for i, end := range []string{" CREATED NETWORK REFUSED", " lan 7", " lan 7", " none, 2 rules -", " - -"} {
		if got := strings.Join(strings.Fields(rows[i]), " "); !strings.HasSuffix(got, end) {
			t.Errorf("row %d is %q and lacks %q", i, got, end)
		}
	}
	calls := d.called()
	want(t, "names only", d.run("ps", "--wide", "-q").out, "a\nb\nhangs\nold\n")
	want(t, "plain", len(strings.Fields(strings.Split(d.run("ps").out, "\n")[0])), 8)
	want(t, "what -q and the plain list ask", d.called(), calls)
	contains(t, "json", d.run("ps", "--wide", "--format", "json").out, `"refused": "7"`)
}

func TestPort(t *testing.T) {
	d := withShop(t)
	d.net.ports = &bangerv1.PortsResponse{Ports: []*bangerv1.Port{
		{Protocol: "tcp", GuestAddress: "127.0.0.1", GuestPort: 5432, Process: "post\x1bgres"},
		{Protocol: "tcp", GuestAddress: "::", GuestPort: 80, Process: "nginx", Published: "127.0.0.1:8080"},
		{Protocol: "tcp", GuestAddress: "0.0.0.0", GuestPort: 80, Process: "nginx", Published: "127.0.0.1:8080"},
		{Protocol: "tcp", GuestAddress: "0.0.0.0", GuestPort: 80, Process: "nginx", Published: "127.0.0.1:8080"},
		{Protocol: "udp", GuestPort: 53, Published: "0.0.0.0:53"},
	}}
	want(t, "port", d.run("port", "shop"), result{0, "" +
		"PROTO  GUEST           PROCESS       PUBLISHED\n" +
		"tcp    127.0.0.1:5432  post\\x1bgres  -\n" +
		"tcp    [::]:80         nginx         127.0.0.1:8080\n" +
		"tcp    0.0.0.0:80      nginx         127.0.0.1:8080\n" +
		"udp    53              -             0.0.0.0:53\n", ""})
	want(t, "quiet", d.run("port", "-q").out, "5432/tcp\n80/tcp\n53/udp\n")
	contains(t, "json", d.run("port", "--format", "json").out, `"process": "nginx"`, `"published": "127.0.0.1:8080"`)
	d.net.ports = &bangerv1.PortsResponse{Error: "shop is stopped"}
	want(t, "not asked", d.run("port", "shop"), result{0, "PROTO  GUEST  PROCESS  PUBLISHED\n", "shop could not be asked what it serves: shop is stopped\n"})
	want(t, "not asked, quiet", d.run("port", "-q", "shop"), result{0, "", "shop could not be asked what it serves: shop is stopped\n"})
	want(t, "no such VM", d.run("port", "nope").code, 3)
}

// TestProxies: the variables of the user, rewritten where the guest has another name for
// the proxy, and what the command line says comes last.
func TestProxies(t *testing.T) {
	reach := func(host string, port uint16) (string, bool) {
		switch fmt.Sprintf("%s:%d", host, port) {
		case "proxy.test:3128", "proxy.test:80", "proxy.test:443", "proxy.test:1080", "[2001:db8::1]:8080":
			return host, true
		case "localhost:8888":
			return "host.banger.internal", true
		}
		return "", false
	}
	for _, c := range []struct {
		name        string
		env, given  string
		wantedLines string
	}{
		{"none", "A=1", "", ""},
		{"only what they are not for", "no_proxy=a.test NO_PROXY=b.test", "", ""},
		{"all, and both cases", "http_proxy=http://proxy.test:3128 HTTPS_PROXY=http://proxy.test:3128/ ALL_PROXY=socks5://proxy.test ftp_proxy=proxy.test no_proxy=a NO_PROXY=b", "",
			"http_proxy=http://proxy.test:3128 HTTPS_PROXY=http://proxy.test:3128/ ftp_proxy=proxy.test ALL_PROXY=socks5://proxy.test no_proxy=a NO_PROXY=b"},
		{"refused", "http_proxy=http://elsewhere.test:3128 no_proxy=a", "", ""},
		{"default ports", "http_proxy=http://proxy.test https_proxy=https://proxy.test", "", "http_proxy=http://proxy.test https_proxy=https://proxy.test"},
		{"the host's loopback", "http_proxy=http://me:p@ss@localhost:8888/x", "", "http_proxy=http://me:p@ss@host.banger.internal:8888/x"},
		{"without a scheme", "http_proxy=localhost:8888", "", "http_proxy=host.banger.internal:8888"},
		{"IPv6", "http_proxy=http://[2001:db8::1]:8080", "", "http_proxy=http://[2001:db8::1]:8080"},
		{"no proxy at all", "http_proxy=http:// https_proxy=http://proxy.test:x all_proxy=http://proxy.test:0", "", ""},
		{"empty", "http_proxy= no_proxy=a", "", ""},
		{"-e wins", "http_proxy=http://proxy.test:3128 HTTP_PROXY=http://proxy.test:3128 no_proxy=a", "http_proxy= no_proxy=b", "HTTP_PROXY=http://proxy.test:3128"},
	} {
		got := proxies(strings.Fields(c.env), strings.Fields(c.given), reach)
		want(t, c.name, strings.Join(got, " "), c.wantedLines)
	}
}

// TestProxyPassed: judged by the VM's own policy, in all that runs a command.
func TestProxyPassed(t *testing.T) {
	for _, c := range []struct {
		preset, allow, proxy string
		want                 string // of http_proxy inside
	}{
		{"internet", "", "http://203.0.113.9:3128", "http://203.0.113.9:3128"},
		{"none", "", "http://203.0.113.9:3128", ""},
		{"none", "203.0.113.9:3128", "http://203.0.113.9:3128", "http://203.0.113.9:3128"},
		{"none", "203.0.113.9:3129", "http://203.0.113.9:3128", ""},
		{"internet", "", "http://10.1.2.3:3128", ""},
		{"lan", "", "http://10.1.2.3:3128", "http://10.1.2.3:3128"},
		{"lan", "", "http://127.0.0.1:3128", ""},
		{"host", "", "http://127.0.0.1:3128", "http://host.banger.internal:3128"},
		{"host", "", "http://[::1]:3128", ""},
		{"none", "host.banger.internal:3128", "http://localhost:3128", "http://host.banger.internal:3128"},
		{"none", "host.banger.internal:3129", "http://localhost:3128", ""},
	} {
		for _, verb := range []string{"exec shop true", "exec -- true", "up -- true", "run --name box --network " + c.preset + " -- true"} {
			if c.allow != "" && strings.HasPrefix(verb, "run") {
				verb = strings.Replace(verb, " -- ", " --allow "+c.allow+" -- ", 1)
			}
			d := withShop(t)
			d.vms["shop"].Network = &bangerv1.Network{Preset: c.preset}
			if c.allow != "" {
				d.vms["shop"].Network.Allow = []string{c.allow}
			}
			got := ""
			d.exec = func(x wire.Exec, g *guestEnd) { got = strings.Join(x.Env, " "); g.started(); g.exit(0) }
			call := d.call()
			call.env = []string{"http_proxy=" + c.proxy, "NO_PROXY=a.test"}
			want(t, verb, call.start(strings.Fields(verb)...).wait(), 0)
			wanted := ""
			if c.want != "" {
				wanted = "http_proxy=" + c.want + " NO_PROXY=a.test"
			}
			want(t, fmt.Sprintf("%s with %+v", verb, c), got, wanted)
		}
	}
	// A VM without a network, as one of an older daemon, gets none.
	d := withShop(t)
	d.exec = func(x wire.Exec, g *guestEnd) { want(t, "environment", len(x.Env), 0); g.started(); g.exit(0) }
	call := d.call()
	call.env = []string{"http_proxy=http://203.0.113.9:3128"}
	want(t, "exec", call.start("exec", "shop", "true").wait(), 0)
}

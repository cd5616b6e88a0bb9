package cli

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/netpolicy"
)

// proxyKeys are the variables that name proxies; each has a twin in capitals. That of
// noProxy says what they are not for.
func proxyKeys() []string { return []string{"http_proxy", "https_proxy", "ftp_proxy", "all_proxy"} }

const noProxy = "no_proxy"

// lookupTimeout bounds how long the address of a proxy is looked for.
const lookupTimeout = 2 * time.Second

// passProxies gives cmd the proxy variables of the user that the VM's network allows, and
// that the command line does not set itself. vm is nil when only cmd.vm is known of it.
func (a *app) passProxies(ctx context.Context, c *client, cmd *command, vm *bangerv1.VM) error {
	named := func(key string) bool { return a.env.get(key) != "" || a.env.get(strings.ToUpper(key)) != "" }
	if !slices.ContainsFunc(proxyKeys(), named) {
		return nil
	}
	if vm == nil {
		var err error
		if vm, err = c.vms.Show(ctx, &bangerv1.ShowVMRequest{Ref: cmd.vm}); err != nil {
			return err
		}
	}
	if vm.Network == nil || vm.Network.Preset == string(netpolicy.None) && len(vm.Network.Allow) == 0 {
		return nil // it reaches nothing: no name need be looked up
	}
	policy, err := netpolicy.New(netpolicy.Preset(vm.Network.Preset), vm.Network.Allow, vm.Network.Deny)
	if err != nil {
		return nil // of a daemon that is younger than this banger: it is not known what they mean
	}
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout) // for all of them
	defer cancel()
	found := make(map[string][]netip.Addr)
	passed := proxies(a.env, cmd.exec.Env, func(host string, port uint16) (string, bool) {
		if _, known := found[host]; !known {
			found[host] = addressesOf(ctx, host)
		}
		return judgeProxy(policy, host, port, found[host], ownAddresses())
	})
	cmd.exec.Env = append(passed, cmd.exec.Env...)
	return nil
}

// proxies are the variables of env to pass on, without those that given sets. reach
// answers by which name a guest reaches a proxy, if it does.
func proxies(env environment, given []string, reach func(host string, port uint16) (string, bool)) []string {
	var out []string
	add := func(key, value string) {
		if _, set := environment(given).lookup(key); !set {
			out = append(out, key+"="+value)
		}
	}
	both := func(key string, pass func(key, value string)) {
		for _, key := range []string{key, strings.ToUpper(key)} {
			if value := env.get(key); value != "" {
				pass(key, value)
			}
		}
	}
	some := false
	for _, key := range proxyKeys() {
		both(key, func(key, value string) {
			p, ok := parseProxy(value)
			if !ok {
				return
			}
			host, ok := reach(p.host, p.port)
			if !ok {
				return
			}
			if host != p.host {
				value = p.before + host + p.after
			}
			some = true
			add(key, value)
		})
	}
	if some {
		both(noProxy, add)
	}
	return out
}

// proxy is the value of a proxy variable, cut around its host.
type proxy struct {
	before, host, after string
	port                uint16
}

// parseProxy reads [SCHEME://][USER[:PASSWORD]@]HOST[:PORT][/…]. It leaves what stands
// around the host as it is: every program reads the rest in its own way.
func parseProxy(value string) (p proxy, ok bool) {
	rest := value
	scheme, after, cut := strings.Cut(rest, "://")
	if !cut {
		scheme = "http"
	} else {
		rest = after
	}
	authority := rest
	if i := strings.IndexAny(authority, "/?#"); i >= 0 {
		authority = authority[:i]
	}
	if i := strings.LastIndexByte(authority, '@'); i >= 0 {
		authority, rest = authority[i+1:], rest[i+1:]
	}
	p.before = value[:len(value)-len(rest)]
	end := len(authority)
	port := ""
	if i := strings.LastIndexByte(authority, ':'); i >= 0 && !strings.HasSuffix(authority, "]") {
		end, port = i, authority[i+1:]
	}
	p.host, p.after = rest[:end], rest[end:]
	switch {
	case p.host == "":
		return p, false
	case port != "":
		n, err := strconv.ParseUint(port, 10, 16)
		p.port = uint16(n)
		return p, err == nil && n > 0
	}
	switch strings.ToLower(scheme) {
	case "http":
		p.port = 80
	case "https":
		p.port = 443
	default: // socks4, socks5, socks5h …
		p.port = 1080
	}
	return p, true
}

// judgeProxy tells by which name a guest reaches a proxy that the host has at these
// addresses. That on the host's own loopback is at the guest's gateway.
func judgeProxy(policy netpolicy.Policy, host string, port uint16, at, own []netip.Addr) (name string, ok bool) {
	name = strings.ToLower(strings.TrimSuffix(host, "."))
	for _, address := range at {
		flow := netpolicy.Flow{Protocol: "tcp", Address: address, Port: port, Own: slices.Contains(own, address)}
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		switch {
		case !address.Is4():
			continue // the guest has no IPv6
		case address == loopback:
			flow.Gateway, flow.Own, flow.Names = true, false, []string{netpolicy.HostName}
		case name != address.String():
			flow.Names = []string{name}
			if !policy.Resolve(name).Allowed {
				continue // the guest could not find it
			}
		}
		if !policy.Judge(flow).Allowed {
			continue
		}
		if flow.Gateway {
			return netpolicy.HostName, true
		}
		return host, true
	}
	return "", false
}

// addressesOf are those of a host, none when they cannot be found.
func addressesOf(ctx context.Context, host string) []netip.Addr {
	var at []netip.Addr
	if found, err := net.DefaultResolver.LookupNetIP(ctx, "ip4", host); err == nil {
		for _, address := range found {
			at = append(at, address.Unmap())
		}
	}
	return at
}

// ownAddresses are those of the host's interfaces.
func ownAddresses() []netip.Addr {
	var own []netip.Addr
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil // then the network itself refuses them
	}
	for _, a := range all {
		if prefix, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, prefix.Addr().Unmap())
		}
	}
	return own
}

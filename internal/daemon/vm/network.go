package vm

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"banger/api"
	"banger/internal/daemon/driver"
	"banger/internal/daemon/store"
	"banger/internal/guest/wire"
	"banger/internal/netpolicy"
	"banger/internal/netwire"
	"banger/internal/shim"
)

// The bounds of what one VM may ask of its network.
const (
	maxRules        = 256
	maxPublications = 64
)

// MAC is the Ethernet address of the guest in a slot of an instance: locally administered,
// the same at each start, and never the gateway's.
func MAC(instance string, slot int) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0, 0, 0, 0x80 | byte(slot>>8), byte(slot)}
	hex.Decode(mac[1:4], []byte(instance)[:min(len(instance), 6)]) // 6 digits, see config.Layout
	return mac
}

// canonicalNetwork checks n and writes each rule and publication in its one form.
func canonicalNetwork(n netwire.Network) (netwire.Network, error) {
	preset, err := netpolicy.ParsePreset(n.Preset)
	if err != nil {
		return n, invalidNetwork(err)
	}
	to := netwire.Network{Preset: string(preset)}
	if to.Allow, err = canonicalRules(netpolicy.Allow, n.Allow); err != nil {
		return n, err
	}
	if to.Deny, err = canonicalRules(netpolicy.Deny, n.Deny); err != nil {
		return n, err
	}
	if rules := len(to.Allow) + len(to.Deny); rules > maxRules {
		return n, invalidNetwork(fmt.Errorf("a VM has at most %d rules, not %d", maxRules, rules))
	}
	if _, err := netpolicy.New(preset, to.Allow, to.Deny); err != nil {
		return n, invalidNetwork(err)
	}
	var all []netwire.Publication
	for _, text := range n.Publish {
		p, err := netwire.ParsePublication(text)
		if err != nil {
			return n, invalidNetwork(err)
		}
		if all, err = addPublication(all, p); err != nil {
			return n, err
		}
	}
	for _, p := range all {
		to.Publish = append(to.Publish, p.String())
	}
	return to, nil
}

func canonicalRules(action netpolicy.Action, texts []string) (rules []string, err error) {
	for _, text := range texts {
		rule, err := canonicalRule(action, text)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(rules, rule) {
			rules = append(rules, rule)
		}
	}
	return rules, nil
}

func canonicalRule(action netpolicy.Action, text string) (string, error) {
	rule, err := netpolicy.ParseRule(action, text)
	if err != nil {
		return "", invalidNetwork(err)
	}
	if rule.Prefix.IsValid() && rule.Prefix.IsSingleIP() && rule.Prefix.Addr() == netwire.Gateway() {
		// It is judged as the host's loopback, so that such a rule would do nothing.
		return "", invalidNetwork(fmt.Errorf("rule %q: the gateway is named %s", text, netpolicy.HostName))
	}
	return rule.String(), nil
}

// addPublication adds p to all, unless the host could not have both it and another.
func addPublication(all []netwire.Publication, p netwire.Publication) ([]netwire.Publication, error) {
	for _, o := range all {
		if o == p {
			return all, nil
		}
		if err := p.Clash(o); err != nil {
			return nil, invalidNetwork(err)
		}
	}
	if len(all) == maxPublications {
		return nil, invalidNetwork(fmt.Errorf("a VM has at most %d published ports", maxPublications))
	}
	return append(all, p), nil
}

func invalidNetwork(err error) error {
	return api.Errorf(api.Invalid, "%w", err).WithHint("banger set --help")
}

// refuseNetwork refuses, in words, what a host cannot do whose VMs have no network.
func (m *Manager) refuseNetwork(preset string, rules, publish []string) error {
	if m.programs.Net != "" || !wanted(preset, rules, publish) {
		return nil
	}
	why := m.ability.NoNetwork
	if why == "" {
		why = "those in " + m.host.VMM.Name() + " have none"
	}
	return api.Errorf(api.Refused, "VMs have no network here: %s", why).WithHint("banger doctor")
}

// wanted tells whether all of it together is not just no network.
func wanted(preset string, allow, publish []string) bool {
	return preset != "" && preset != string(netpolicy.None) || len(allow)+len(publish) > 0
}

// networkOf is the network that rec asks for, or the safest one and why: a record that was
// damaged must not keep its VM from starting.
func networkOf(rec store.VM) (n netwire.Network, problem string) {
	if rec.NetworkProblem != "" {
		return netwire.Network{Preset: string(netpolicy.None)}, rec.NetworkProblem
	}
	n, err := canonicalNetwork(rec.Network)
	if err != nil {
		return netwire.Network{Preset: string(netpolicy.None)}, fmt.Sprintf("it has no network: %v", err)
	}
	return n, ""
}

// network: run/net.json, which banger-net reads when it starts and when it is told to.

func (m *Manager) preflightNetwork(ctx context.Context, v *machine) error {
	if m.programs.Net == "" {
		return nil
	}
	n, _ := networkOf(v.rec)
	hints := startHints(v.rec.Name)
	if v.creating {
		hints = createHints()
	}
	return m.tryPorts(ctx, v.rec.ID, n.Publish, hints)
}

// acquireNetwork reads the record again, under the lock of those who change it: from then
// on net.json is theirs to keep up to date.
func (m *Manager) acquireNetwork(ctx context.Context, v *machine) error {
	unlock, err := m.networkLocks.LockContext(ctx, v.rec.ID)
	if err != nil {
		return err
	}
	defer unlock()
	rec, err := m.store.VM(ctx, v.rec.ID)
	if err != nil {
		return err
	}
	v.rec.Network, v.rec.NetworkProblem = rec.Network, rec.NetworkProblem
	n, problem := networkOf(rec)
	if problem != "" {
		m.log.Warn("a VM starts without its network", "vm", rec.Name, "err", problem)
	}
	return m.writeNetwork(rec, n)
}

func (m *Manager) releaseNetwork(ctx context.Context, v *machine) error {
	errs := []error{netwire.RemoveConfig(v.dir.Path())}
	for _, name := range []string{netwire.LinkSocket, netwire.ControlSocket} {
		errs = append(errs, removeIfThere(filepath.Join(v.dir.Path(), name)))
	}
	return errors.Join(errs...)
}

func (m *Manager) writeNetwork(rec store.VM, n netwire.Network) error {
	c := netwire.Config{MAC: MAC(m.instance, rec.Slot).String(), Network: n}
	if err := netwire.WriteConfig(m.layout.VM(rec.ID).Path(), c); err != nil {
		return fmt.Errorf("cannot write the network's configuration: %w", err)
	}
	return nil
}

// networkEnv keeps the network's process small: the shim's is alike.
func networkEnv() []string { return []string{"GOMAXPROCS=1"} }

// networkProcess is nil where the VMM has no network card to offer.
func (m *Manager) networkProcess() *shim.Network {
	if m.programs.Net == "" {
		return nil
	}
	return &shim.Network{Program: m.programs.Net, Argv: []string{"banger-net"}, Env: networkEnv()}
}

func (m *Manager) card(v *machine) *driver.NIC {
	if m.programs.Net == "" {
		return nil
	}
	return &driver.NIC{MAC: MAC(m.instance, v.rec.Slot).String(), Socket: netwire.LinkSocket}
}

func (m *Manager) guestNetwork(v *machine) *wire.Network {
	if m.programs.Net == "" {
		return nil
	}
	return &wire.Network{
		MAC: MAC(m.instance, v.rec.Slot).String(), Address: netwire.Guest().String(), Gateway: netwire.Gateway().String(),
		DNS: []string{netwire.Gateway().String()}, MTU: netwire.MTU, HostName: netpolicy.HostName,
	}
}

// statsTimeout bounds how long show waits for a network that does not answer.
const statsTimeout = 500 * time.Millisecond

// traffic asks the network of a VM what went through it; nil when it has none.
func (m *Manager) traffic(ctx context.Context, v store.VM) *netwire.Stats {
	if m.programs.Net == "" || v.State != store.Running {
		return nil
	}
	dir := m.layout.VM(v.ID).Path()
	if !hasNetwork(dir) {
		return &netwire.Stats{Problem: "the VM was started by an earlier release, without a network"}
	}
	ctx, cancel := context.WithTimeout(ctx, statsTimeout)
	defer cancel()
	reply, err := netwire.Ask(ctx, dir, netwire.Request{Op: netwire.OpStats})
	switch {
	case err != nil:
		return &netwire.Stats{Problem: "its process does not answer"}
	case reply.Stats == nil:
		return &netwire.Stats{Problem: wire.CleanText(reply.Error, 1<<10)}
	}
	return reply.Stats
}

// hasNetwork tells whether the network row of the VM in dir is acquired.
func hasNetwork(dir string) bool {
	_, err := os.Lstat(filepath.Join(dir, netwire.ConfigFile))
	return !errors.Is(err, fs.ErrNotExist)
}

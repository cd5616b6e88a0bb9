package cli

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/config"
	"banger/internal/netpolicy"
	"banger/internal/netwire"
)

// presetValue is what a VM may reach when no rule says otherwise; "" means that it was
// left out.
type presetValue string

func (v *presetValue) Type() string   { return "none|internet|lan|host" }
func (v *presetValue) String() string { return string(*v) }

func (v *presetValue) Set(s string) error {
	p, err := netpolicy.ParsePreset(s)
	if err != nil {
		return errors.New("it is none, internet, lan or host")
	}
	*v = presetValue(p)
	return nil
}

// rulesValue is a flag that holds rules in their canonical form, one each time that it is
// given.
type rulesValue []string

func (v *rulesValue) Type() string   { return "RULE" }
func (v *rulesValue) String() string { return strings.Join(*v, ", ") }

func (v *rulesValue) Set(s string) error {
	r, err := netpolicy.ParseRule(netpolicy.Allow, s) // a deny rule has the same grammar
	if err != nil {
		return err
	}
	if rule := r.String(); !slices.Contains(*v, rule) {
		*v = append(*v, rule)
	}
	return nil
}

// publishValue is a flag that holds publications, in their full form.
type publishValue []string

func (v *publishValue) Type() string   { return "[ADDR:]PORT:GUEST_PORT[/udp]" }
func (v *publishValue) String() string { return strings.Join(*v, ", ") }

func (v *publishValue) Set(s string) error {
	p, err := netwire.ParsePublication(s)
	if err != nil {
		return err
	}
	for _, other := range *v {
		o, err := netwire.ParsePublication(other)
		if err == nil {
			err = p.Clash(o)
		}
		if err != nil {
			return err
		}
	}
	if full := p.String(); !slices.Contains(*v, full) {
		*v = append(*v, full)
	}
	return nil
}

// unpublishValue is a flag that holds the host's side of publications.
type unpublishValue []string

func (v *unpublishValue) Type() string   { return "[ADDR:]PORT[/udp]" }
func (v *unpublishValue) String() string { return strings.Join(*v, ", ") }

func (v *unpublishValue) Set(s string) error {
	if _, err := netwire.ParseHostSide(s); err != nil {
		return err
	}
	*v = append(*v, s)
	return nil
}

// networkFlags describe the network of a VM.
type networkFlags struct {
	preset  presetValue
	allow   rulesValue
	deny    rulesValue
	publish publishValue
}

func (f *networkFlags) add(cmd *cobra.Command, preset string) {
	fs := cmd.Flags()
	fs.Var(&f.preset, "network", preset)
	fs.Var(&f.allow, "allow", "what the VM may reach beside that: see banger set --help; may be repeated")
	fs.Var(&f.deny, "deny", "what it may not reach; may be repeated")
	fs.VarP(&f.publish, "publish", "p", "lead PORT of the host's loopback, or of ADDR, to GUEST_PORT; may be repeated")
}

// message is nil when no flag was given.
func (f *networkFlags) message() *bangerv1.Network {
	if f.preset == "" && len(f.allow)+len(f.deny)+len(f.publish) == 0 {
		return nil
	}
	return &bangerv1.Network{Preset: string(f.preset), Allow: f.allow, Deny: f.deny, Publish: f.publish}
}

// missing names the first flag that n does not fulfil already, or "".
func (f *networkFlags) missing(n *bangerv1.Network) string {
	lacks := func(have, asked []string) bool {
		return slices.ContainsFunc(asked, func(one string) bool { return !slices.Contains(have, one) })
	}
	switch {
	case f.preset != "" && string(f.preset) != n.GetPreset():
		return "--network"
	case lacks(n.GetAllow(), f.allow):
		return "--allow"
	case lacks(n.GetDeny(), f.deny):
		return "--deny"
	case lacks(n.GetPublish(), f.publish):
		return "--publish"
	}
	return ""
}

// arguments are the flags as they would be typed.
func (f *networkFlags) arguments() string {
	var words []string
	if f.preset != "" {
		words = append(words, "--network", string(f.preset))
	}
	for _, list := range []struct {
		flag   string
		values []string
	}{{"--allow", f.allow}, {"--deny", f.deny}, {"-p", f.publish}} {
		for _, value := range list.values {
			words = append(words, list.flag, shellWord(value))
		}
	}
	return strings.Join(words, " ")
}

// networkWords says what a VM may reach: "internet; allow a, b; deny c".
func networkWords(n *bangerv1.Network) string {
	if n == nil {
		return ""
	}
	words := n.Preset
	if len(n.Allow) > 0 {
		words += "; allow " + strings.Join(n.Allow, ", ")
	}
	if len(n.Deny) > 0 {
		words += "; deny " + strings.Join(n.Deny, ", ")
	}
	return words
}

// networkLines are the lines of show and set about a VM's network.
func networkLines(vm *bangerv1.VM, line func(key, value string)) {
	line("network", networkWords(vm.Network))
	line("published", strings.Join(vm.GetNetwork().GetPublish(), ", "))
	t := vm.Traffic
	if t == nil {
		return
	}
	line("problem of the network", t.Problem)
	if uncounted(t) {
		line("refused", "-")
		line("traffic", "-")
		return
	}
	refused := fmt.Sprint(t.Refused)
	if t.Refused > 0 {
		refused += ", see banger logs " + vm.Name + " --network"
	}
	line("refused", refused)
	line("traffic", fmt.Sprintf("%s open, %s sent, %s received", count(t.Connections, "connection"),
		config.FormatSize(t.Sent), config.FormatSize(t.Received)))
}

// uncounted tells that nobody could be asked for the counts: the zeros mean nothing.
func uncounted(t *bangerv1.Traffic) bool {
	return t.Problem != "" && t.Refused == 0 && t.Connections == 0 && t.Sent == 0 && t.Received == 0
}

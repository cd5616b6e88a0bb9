package cli

import (
	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func (a *app) setCommand() *cobra.Command {
	f := &networkFlags{}
	var (
		forget    rulesValue
		unpublish unpublishValue
	)
	cmd := &cobra.Command{
		Use:   "set VM",
		Short: "change a VM's network",
		Long: `Set changes what a VM may reach and which of its ports the host publishes, at once if it
runs, and prints what holds now. What is no longer allowed is cut.

--network says what may be reached when no rule says otherwise:

  none      nothing
  internet  public addresses, and neither the host nor the networks around it
  lan       private networks too
  host      the host too, its loopback as host.banger.internal

A RULE is [tcp|udp|icmp ]TARGET[:PORT|:FROM-TO]. TARGET is an address, a network such as
10.0.0.0/8, a name, or *.NAME for all names below it. The order of rules does not
matter: the most specific one wins, on equal terms deny. A rule replaces the same rule
of the other kind.
A rule about a name is one about the addresses that the guest was given for it: it opens
every other name on the same address too. Addresses that are not public are opened by
rules that name them or a part of their network, never by a name; a port of the host's
loopback by host.banger.internal:PORT.

The guest has no IPv6: it is told that names have no such addresses.
"banger logs VM --network" shows what was refused, and which rule would allow it.`,
		Example: `  banger set shop --network lan
  banger set shop --network none --allow github.com:443 --allow '*.golang.org:443'
  banger set shop --allow 192.168.1.1:80 --allow host.banger.internal:5432
  banger set shop --deny 203.0.113.0/24 --forget github.com:443
  banger set shop -p 8080:80 --unpublish 3000`,
		Args:        arguments(1, 1, "VM"),
		Annotations: exits(),
	}
	f.add(cmd, "what the VM may reach when no rule says otherwise")
	fs := cmd.Flags()
	fs.Var(&forget, "forget", "drop a rule of either kind; may be repeated")
	fs.Var(&unpublish, "unpublish", "close a port of the host again; may be repeated")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if f.message() == nil && len(forget)+len(unpublish) == 0 {
			return usage(cmd, "nothing to set: give a flag")
		}
		c, err := a.connect(cmd.Context())
		if err != nil {
			return err
		}
		defer c.close()
		vm, err := c.vms.Set(cmd.Context(), &bangerv1.SetVMRequest{
			Ref: args[0], Preset: string(f.preset), Allow: f.allow, Deny: f.deny, Forget: forget,
			Publish: f.publish, Unpublish: unpublish,
		})
		if err != nil {
			return err
		}
		switch {
		case a.json:
			return a.printJSON(vm)
		case a.ui.quiet:
			return nil
		}
		t := &table{}
		networkLines(&bangerv1.VM{Network: vm.Network}, t.line)
		if problem := vm.Traffic.GetProblem(); problem != "" {
			a.ui.note("%s: %s", vm.Name, cleanLine(problem))
		}
		return t.write(a.stdout)
	}
	return cmd
}

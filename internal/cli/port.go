package cli

import (
	"fmt"
	"net"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func (a *app) portCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "port [VM]",
		Short: "what a guest serves, and what of it is published",
		Long: `Port asks the guest of a VM, by default that of the repository here, which ports it
serves, and prints them with those that are published on the host. -q prints
PORT/PROTOCOL only.

"banger set VM -p" publishes a port; "banger forward" reaches one that serves the guest
itself only.`,
		Example:     "  banger port shop",
		Args:        arguments(0, 1, "VM"),
		Annotations: exits(),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.connect(cmd.Context())
			if err != nil {
				return err
			}
			defer c.close()
			vm, err := a.showOrHere(cmd.Context(), c, args)
			if err != nil {
				return err
			}
			res, err := c.vms.Ports(cmd.Context(), &bangerv1.PortsRequest{Ref: vm.Id})
			if err != nil {
				return err
			}
			return a.printPorts(vm, res)
		},
	}
}

func (a *app) printPorts(vm *bangerv1.VM, res *bangerv1.PortsResponse) error {
	if a.json {
		return a.printJSON(res)
	}
	t := &table{}
	if !a.ui.quiet {
		t.row("PROTO", "GUEST", "PROCESS", "PUBLISHED")
	}
	seen := make(map[string]bool) // a service on both IPv4 and IPv6 is one to -q
	for _, p := range res.Ports {
		guest := fmt.Sprint(p.GuestPort)
		if p.GuestAddress != "" && !a.ui.quiet {
			guest = net.JoinHostPort(p.GuestAddress, guest)
		}
		columns := []string{p.Protocol, guest, orElse(p.Process, "-"), orElse(p.Published, "-")}
		if a.ui.quiet {
			columns = []string{guest + "/" + p.Protocol}
		}
		if row := strings.Join(columns, "\x00"); !seen[row] {
			seen[row] = true
			t.row(columns...)
		}
	}
	if err := a.printTable(t); err != nil {
		return err
	}
	if res.Error != "" { // also with -q: else an empty list looks as if nothing were served
		a.ui.print(clean(fmt.Sprintf("%s could not be asked what it serves: %s", vm.Name, cleanLine(res.Error))))
	}
	return nil
}

package boot

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
)

const (
	// cardModule drives the network card.
	cardModule = "virtio_net"
	// cardWait is how long the card may take to appear. Its module was loaded before the
	// root disk was mounted.
	cardWait = 5 * time.Second
	// pingGroups are the groups whose members may send echo requests without a right of
	// their own, see icmp(7): all. systemd sets the same.
	pingGroups = "0 2147483647"
)

// loopbackUp sets the flag of lo; the kernel then gives it 127.0.0.1 and ::1.
func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("cannot set lo up: %w", err)
	}
	return nil
}

// networkUp makes the card work, before anything of the image runs: an image needs no
// program for it, and none takes it away that was not told to.
func (g *guest) networkUp() error {
	n := g.cfg.Network
	if n == nil {
		return nil
	}
	index, err := g.findCard(n.MAC)
	if err != nil {
		return fmt.Errorf("the guest has no network: %w", err)
	}
	if err := configureCard(index, *n); err != nil {
		return fmt.Errorf("the guest has no network: %w", err)
	}
	if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte(pingGroups), 0); err != nil {
		return fmt.Errorf("only root can ping: %w", err)
	}
	return nil
}

// findCard returns the index of the card with the address mac.
func (g *guest) findCard(mac string) (int, error) {
	const class = "/sys/class/net"
	name := cardByMAC(class, mac)
	if name == "" && !hasModule(g.cfg.Modules, cardModule) {
		// Nor is it built into this kernel, or the card would be there.
		return 0, fmt.Errorf("this kernel was pulled without %s, the driver of the card: "+
			"pull it again on the host (banger kernel pull) and restart", cardModule)
	}
	if name == "" {
		err := g.uevents.wait(cardWait, func() (bool, error) {
			name = cardByMAC(class, mac)
			return name != "", nil
		})
		if err != nil {
			return 0, fmt.Errorf("cannot find the card %s: %w", mac, err)
		}
	}
	card, err := net.InterfaceByName(name)
	if err != nil {
		return 0, fmt.Errorf("cannot find the card %s: %w", mac, err)
	}
	return card.Index, nil
}

// cardByMAC finds the interface with the address below class, which is /sys/class/net.
// It returns "" when there is none.
func cardByMAC(class, mac string) string {
	files, _ := filepath.Glob(filepath.Join(class, "*", "address"))
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err == nil && strings.EqualFold(strings.TrimSpace(string(data)), mac) {
			return filepath.Base(filepath.Dir(f))
		}
	}
	return ""
}

// hasModule says whether name is among the files of modules, "virtio_net.ko.xz" say.
func hasModule(files []string, name string) bool {
	return slices.ContainsFunc(files, func(file string) bool {
		base, _, _ := strings.Cut(filepath.Base(file), ".")
		return strings.ReplaceAll(base, "-", "_") == name
	})
}

// configureCard gives the interface its MTU, its address, and the routes to the gateway and
// by it. The gateway need not be in the address's own network, which may be that one address.
func configureCard(index int, n wire.Network) error {
	address, err := netip.ParsePrefix(n.Address)
	if err != nil {
		return fmt.Errorf("cannot read its address: %w", err)
	}
	gateway, err := netip.ParseAddr(n.Gateway)
	if err != nil {
		return fmt.Errorf("cannot read its gateway: %w", err)
	}
	nl, err := openNetlink()
	if err != nil {
		return err
	}
	defer unix.Close(nl.fd)
	for _, step := range []struct {
		what string
		msg  netlinkMessage
	}{
		{"set the card up", linkUp(index, n.MTU)},
		{"give the card the address " + n.Address, addAddress(index, address)},
		{"set the route to " + n.Gateway, addNeighbour(index, gateway)},
		{"set the default route by " + n.Gateway, addDefault(index, gateway)},
	} {
		if err := nl.do(step.msg); err != nil {
			return fmt.Errorf("cannot %s: %w", step.what, err)
		}
	}
	return nil
}

package boot

import (
	"encoding/binary"
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/guest/wire"
	"banger/test/need"
)

func TestCardByMAC(t *testing.T) {
	class := testImage(t, map[string]string{
		"lo/address": "00:00:00:00:00:00\n", "eth0/address": "02:ba:6e:aa:bb:01\n", "enp1s0/address": "02:ba:6e:aa:bb:02\n",
		"bonding_masters": "",
	})
	for mac, want := range map[string]string{"02:BA:6E:AA:BB:02": "enp1s0", "02:ba:6e:aa:bb:01": "eth0", "02:ba:6e:aa:bb:0": "", "": ""} {
		if got := cardByMAC(class, mac); got != want {
			t.Errorf("cardByMAC(%q) = %q, want %q", mac, got, want)
		}
	}
}

// A kernel of an earlier release is told from a card that does not come, and at once.
func TestKernelWithoutCard(t *testing.T) {
	for _, modules := range [][]string{nil, {"virtio_blk.ko", "virtio_net_of_sorts.ko"}} {
		g := &guest{cfg: wire.Config{Modules: modules}} // no uevents: waiting would panic
		_, err := g.findCard("02:ba:6e:00:00:99")
		if err == nil || !strings.Contains(err.Error(), "without virtio_net") || !strings.Contains(err.Error(), "banger kernel pull") {
			t.Errorf("with %q: %v", modules, err)
		}
	}
	for _, name := range []string{"virtio_net.ko", "virtio-net.ko.xz", "/banger/modules/virtio_net.ko.zst"} {
		if !hasModule([]string{"virtio.ko", name}, cardModule) {
			t.Errorf("%s is not seen", name)
		}
	}
}

// exampleNetwork is what the daemon sends.
func exampleNetwork() wire.Network {
	return wire.Network{
		MAC: "02:ba:6e:00:00:02", Address: "10.0.2.15/32", Gateway: "10.0.2.2", DNS: []string{"10.0.2.2"}, MTU: 65520,
		HostName: "host.banger.internal",
	}
}

// In a network namespace of its own, where a tap device stands for the card, the
// kernel's tables say what was asked for; and a second time changes nothing.
func TestConfigureCard(t *testing.T) {
	need.Need(t, "netns")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the namespace
		testConfigureCard(t)
	}()
	<-done
}

func testConfigureCard(t *testing.T) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Error(err)
		return
	}
	tun, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Errorf("no tap device: %v", err)
		return
	}
	defer unix.Close(tun)
	req, err := unix.NewIfreq("card0")
	if err != nil {
		t.Error(err)
		return
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(tun, unix.TUNSETIFF, req); err != nil {
		t.Errorf("no tap device: %v", err)
		return
	}
	if err := loopbackUp(); err != nil {
		t.Error(err)
	}
	before, err := net.InterfaceByName("card0")
	if err != nil {
		t.Error(err)
		return
	}
	for range 2 {
		if err := configureCard(before.Index, exampleNetwork()); err != nil {
			t.Error(err)
			return
		}
	}
	card, err := net.InterfaceByName("card0")
	if err != nil || card.MTU != 65520 || card.Flags&net.FlagUp == 0 {
		t.Errorf("the card is %+v, %v", card, err)
		return
	}
	addresses, err := card.Addrs()
	isOurs := func(a net.Addr) bool { return a.String() == "10.0.2.15/32" }
	if err != nil || !slices.ContainsFunc(addresses, isOurs) {
		t.Errorf("its addresses are %v, %v", addresses, err)
	}
	routes, err := os.ReadFile("/proc/thread-self/net/route")
	if err != nil {
		t.Error(err)
	}
	var found []string
	for line := range strings.Lines(string(routes)) {
		// Destination, gateway, flags, mask, see proc_pid_net(5).
		if f := strings.Fields(line); len(f) > 7 && f[0] == "card0" {
			found = append(found, strings.Join([]string{f[1], f[2], f[3], f[7]}, " "))
		}
	}
	slices.Sort(found)
	want := []string{
		"00000000 0202000A 0003 00000000", // all by the gateway: RTF_UP, RTF_GATEWAY
		"0202000A 00000000 0005 FFFFFFFF", // and the gateway on the link: RTF_UP, RTF_HOST
	}
	if !slices.Equal(found, want) {
		t.Errorf("the routes are %q in\n%s", found, routes)
	}
}

func TestNetworkThatCannotBe(t *testing.T) {
	for name, change := range map[string]func(*wire.Network){
		"address": func(n *wire.Network) { n.Address = "10.0.2.15" },
		"gateway": func(n *wire.Network) { n.Gateway = "" },
	} {
		n := exampleNetwork()
		change(&n)
		if err := configureCard(1<<30, n); err == nil || !strings.Contains(err.Error(), "read its "+name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// No such interface: the kernel's refusal is an error, with its errno.
	if err := configureCard(1<<30, exampleNetwork()); !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EPERM) {
		t.Errorf("no card: %v", err)
	}
}

func TestNetlinkAnswer(t *testing.T) {
	answer := func(kind uint16, seq uint32, code int32) []byte {
		b := binary.NativeEndian.AppendUint32(nil, 36)
		b = binary.NativeEndian.AppendUint16(b, kind)
		b = binary.NativeEndian.AppendUint16(b, 0)
		b = append(b, native32(seq)...)
		b = append(b, native32(0)...)
		return append(b, native32(uint32(code))...)
	}
	if err := netlinkAnswer(answer(unix.NLMSG_ERROR, 7, 0), 7); err != nil {
		t.Errorf("done: %v", err)
	}
	if err := netlinkAnswer(answer(unix.NLMSG_ERROR, 7, -int32(unix.ENODEV)), 7); !errors.Is(err, unix.ENODEV) {
		t.Errorf("refused: %v", err)
	}
	for name, b := range map[string][]byte{
		"another": answer(unix.NLMSG_ERROR, 6, 0), "no word": answer(unix.NLMSG_DONE, 7, 0), "short": answer(unix.NLMSG_ERROR, 7, 0)[:18],
	} {
		if err := netlinkAnswer(b, 7); err == nil {
			t.Errorf("%s: taken for an acknowledgement", name)
		}
	}
}

const resolvConf = resolverMark + "nameserver 10.0.2.2\n"

func TestWriteResolver(t *testing.T) {
	for name, c := range map[string]struct {
		files    map[string]string
		path     string // where the file must be
		link     bool   // etc/resolv.conf stays a link
		resolved bool
	}{
		"none":             {map[string]string{"etc/hosts": ""}, "etc/resolv.conf", false, false},
		"of the builder":   {map[string]string{"etc/resolv.conf": "nameserver 192.168.1.1\n"}, "etc/resolv.conf", false, false},
		"resolved's stub":  {map[string]string{"etc/resolv.conf": "->../run/systemd/resolve/stub-resolv.conf"}, "run/systemd/resolve/stub-resolv.conf", true, true},
		"resolved, full":   {map[string]string{"etc/resolv.conf": "->/run/systemd/resolve/resolv.conf"}, "run/systemd/resolve/resolv.conf", true, true},
		"resolvconf":       {map[string]string{"etc/resolv.conf": "->/run/resolvconf/resolv.conf"}, "run/resolvconf/resolv.conf", true, false},
		"by /var/run":      {map[string]string{"etc/resolv.conf": "->/var/run/nm/resolv.conf"}, "run/nm/resolv.conf", true, false},
		"dangling":         {map[string]string{"etc/resolv.conf": "->/mnt/wsl/resolv.conf"}, "etc/resolv.conf", false, false},
		"of a package":     {map[string]string{"etc/resolv.conf": "->../usr/resolv.conf", "usr/resolv.conf": "keep"}, "etc/resolv.conf", false, false},
		"out by dots":      {map[string]string{"etc/resolv.conf": "->../run/../../tmp/x"}, "etc/resolv.conf", false, false},
		"not quite in run": {map[string]string{"etc/resolv.conf": "->/runner/resolv.conf"}, "etc/resolv.conf", false, false},
	} {
		root := testImage(t, c.files)
		for range 2 {
			if err := writeResolver(root, []string{"10.0.2.2"}); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		if got := read(t, root, c.path); got != resolvConf {
			t.Errorf("%s: %s holds %q", name, c.path, got)
		}
		if _, err := os.Readlink(root + "/etc/resolv.conf"); (err == nil) != c.link {
			t.Errorf("%s: the link: %v", name, err)
		}
		told, _, err := readOptional(root + "/run/systemd/resolved.conf.d/banger.conf")
		if want := resolverMark + "[Resolve]\nDNS=10.0.2.2\nDomains=~.\n"; err != nil || c.resolved && told != want || !c.resolved && told != "" {
			t.Errorf("%s: resolved is told %q, %v", name, told, err)
		}
		if c.files["usr/resolv.conf"] != "" && read(t, root, "usr/resolv.conf") != "keep" {
			t.Errorf("%s: what the link led to was changed", name)
		}
	}
}

// A second boot writes nothing, and a directory in the way is an error.
func TestWriteResolverAgain(t *testing.T) {
	root := testImage(t, map[string]string{"etc/hosts": ""})
	if err := writeResolver(root, []string{"10.0.2.2"}); err != nil {
		t.Fatal(err)
	}
	before := inodes(t, root)
	if err := writeResolver(root, []string{"10.0.2.2"}); err != nil {
		t.Fatal(err)
	}
	for name, ino := range inodes(t, root) {
		if before[name] != ino {
			t.Errorf("the second boot replaced %s", name)
		}
	}
	root = testImage(t, map[string]string{"etc/resolv.conf/x": ""})
	if err := writeResolver(root, []string{"10.0.2.2"}); err == nil {
		t.Error("a directory was taken for a file")
	}
}

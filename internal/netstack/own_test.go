package netstack

import (
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/test/need"
)

// untilTrue polls until ok.
func untilTrue(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it never became true that %s", what)
		}
	}
}

// inNetns runs the test again in a process with a network of its own, and says whether
// this is that process. There, all threads see the same network.
func inNetns(t *testing.T) bool {
	t.Helper()
	const mark = "BANGER_TEST_IN_NETNS"
	if os.Getenv(mark) == t.Name() {
		return true
	}
	need.Need(t, "netns")
	c := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=2m")
	c.Env = append(os.Environ(), mark+"="+t.Name())
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := c.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// setAddress adds addr to the loopback interface, or removes it (rtnetlink(7)).
func setAddress(t *testing.T, add bool, addr netip.Addr) {
	t.Helper()
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	kind, flags := uint16(unix.RTM_DELADDR), uint16(unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	if add {
		kind, flags = unix.RTM_NEWADDR, flags|unix.NLM_F_CREATE|unix.NLM_F_EXCL
	}
	family := byte(unix.AF_INET)
	if addr.Is6() {
		family = unix.AF_INET6
	}
	var m []byte
	m = binary.NativeEndian.AppendUint32(m, 0) // the length, below
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, flags)
	m = append(m, make([]byte, 8)...)
	m = append(m, family, byte(addr.BitLen()), unix.IFA_F_NODAD, 0)
	m = binary.NativeEndian.AppendUint32(m, uint32(lo.Index))
	for _, attr := range []uint16{unix.IFA_LOCAL, unix.IFA_ADDRESS} {
		m = binary.NativeEndian.AppendUint16(m, uint16(4+addr.BitLen()/8))
		m = binary.NativeEndian.AppendUint16(m, attr)
		m = append(m, addr.AsSlice()...)
	}
	binary.NativeEndian.PutUint32(m, uint32(len(m)))
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Sendto(fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, reply, 0)
	if err != nil || n < 20 {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if code := int32(binary.NativeEndian.Uint32(reply[16:])); code != 0 {
		t.Fatalf("cannot set %s (add: %v): %v", addr, add, unix.Errno(-code))
	}
}

func TestOwnAddressesFollowTheHost(t *testing.T) {
	if !inNetns(t) {
		return
	}
	o := newOwnAddresses(func() {})
	defer o.close()
	four, six := netip.MustParseAddr("203.0.113.7"), netip.MustParseAddr("2001:db8::7")
	for range 3 {
		for _, addr := range []netip.Addr{four, six} {
			if o.has(addr) {
				t.Fatalf("%s is there before it was added", addr)
			}
			setAddress(t, true, addr)
			untilTrue(t, addr.String()+" is known", func() bool { return o.has(addr) })
		}
		if !o.has(netip.AddrFrom16(four.As16())) || !o.has(six.WithZone("lo")) {
			t.Error("a mapped address, or one with a zone, is not known")
		}
		for _, addr := range []netip.Addr{four, six} {
			setAddress(t, false, addr)
			untilTrue(t, addr.String()+" is forgotten", func() bool { return !o.has(addr) })
		}
	}
	if o.poll.Load() {
		t.Error("it polls although the kernel tells")
	}
}

// TestOwnAddressesOutliveLostEvents: more changes than the socket holds.
// An answer that was kept holds until routes change, and one that was asked for meanwhile
// is not kept.
func TestOwnAddressesFollowRoutes(t *testing.T) {
	if !inNetns(t) {
		return
	}
	ipTool(t, "link set lo up")
	changes := make(chan struct{}, 100)
	o := newOwnAddresses(func() { changes <- struct{}{} })
	defer o.close()
	addr := netip.MustParseAddr("203.0.113.9")
	for range 3 {
		for range 2 {
			if o.ends(addr) {
				t.Fatal("it ends here before there is a route")
			}
		}
		if known := o.asked.Load().known; len(known) != 1 {
			t.Fatalf("kept %v", known)
		}
		ipTool(t, "route add local 203.0.113.0/24 dev lo")
		untilTrue(t, "it ends here", func() bool { return o.ends(addr) })
		ipTool(t, "route del local 203.0.113.0/24 dev lo")
		untilTrue(t, "it does not end here any more", func() bool { return !o.ends(addr) })
	}
	old := o.asked.Load()
	old.get(netip.MustParseAddr("203.0.113.10"), func(netip.Addr) bool {
		ipTool(t, "route add local 203.0.113.0/24 dev lo")
		untilTrue(t, "the answers are others", func() bool { return o.asked.Load() != old })
		return false
	})
	untilTrue(t, "it ends here", func() bool { return o.ends(netip.MustParseAddr("203.0.113.10")) })
	for n := range 2 * maxAnswers {
		old.get(netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)}), func(netip.Addr) bool { return false })
	}
	if len(old.known) > maxAnswers {
		t.Errorf("%d answers are kept", len(old.known))
	}
}

func TestOwnAddressesOutliveLostEvents(t *testing.T) {
	if !inNetns(t) {
		return
	}
	o := newOwnAddresses(func() {})
	defer o.close()
	conn, err := o.events.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	conn.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 1) })
	if err != nil {
		t.Fatal(err)
	}
	addr := netip.MustParseAddr("203.0.113.0")
	for range 200 {
		addr = addr.Next()
		setAddress(t, true, addr)
	}
	untilTrue(t, "the last address is known", func() bool { return o.has(addr) })
	setAddress(t, false, addr)
	untilTrue(t, "it is forgotten", func() bool { return !o.has(addr) })
}

// TestOwnAddressesWithoutEvents: has reads them itself.
func TestOwnAddressesWithoutEvents(t *testing.T) {
	if !inNetns(t) {
		return
	}
	o := &ownAddresses{done: make(chan struct{})}
	close(o.done)
	defer o.close()
	addr := netip.MustParseAddr("203.0.113.7")
	if !o.has(addr) {
		t.Error("an address is taken for foreign before any was read")
	}
	o.poll.Store(true)
	if o.has(addr) {
		t.Errorf("%s is there before it was added", addr)
	}
	setAddress(t, true, addr)
	untilTrue(t, "the address is known", func() bool { return o.has(addr) })
	setAddress(t, false, addr)
	untilTrue(t, "it is forgotten", func() bool { return !o.has(addr) })
}

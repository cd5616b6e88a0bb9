package netpolicy

import "net/netip"

// class says what an address is.
type class int

const (
	public class = iota
	private
	linkLocal
	metadata
	reserved
	own       // belongs to an interface of the host
	gateway   // the host's loopback, asked by the gateway's address
	loopback  // from here on closed, whatever the rules say
	nowhere   // 0.0.0.0/8: Linux takes 0.0.0.0 for its own loopback
	multicast // the stack forwards none
	broadcast
)

// String is the reason of a refusal.
func (c class) String() string {
	return [...]string{
		public: "public address", private: "private network", linkLocal: "link-local address",
		metadata: "metadata address", reserved: "reserved address", own: "an address of this host",
		gateway: "the host's loopback", loopback: "loopback address", nowhere: "reserved address",
		multicast: "multicast", broadcast: "broadcast address",
	}[c]
}

// closed tells a class that no rule opens.
func (c class) closed() bool { return c >= loopback }

// opens tells whether a preset includes a class.
func (p Preset) opens(c class) bool {
	switch c {
	case public:
		return p == Internet || p == LAN || p == Host
	case private:
		return p == LAN || p == Host
	case own, gateway:
		return p == Host
	}
	return false
}

// special is a range that is not public.
type special struct {
	prefix netip.Prefix
	class  class
}

// specials are the ranges of the IANA special-purpose address registries (RFC 6890 and
// its successors), and the metadata services that lie outside of them or in a range that
// a preset opens. The longest that holds an address says what it is. Not here, so public:
// the documentation ranges, which no network routes and which tests take for the internet.
var specials = [...]special{
	{netip.MustParsePrefix("0.0.0.0/8"), nowhere},
	{netip.MustParsePrefix("10.0.0.0/8"), private},
	{netip.MustParsePrefix("100.64.0.0/10"), private},       // carrier-grade NAT, RFC 6598
	{netip.MustParsePrefix("100.100.100.200/32"), metadata}, // Alibaba Cloud
	{netip.MustParsePrefix("127.0.0.0/8"), loopback},
	{netip.MustParsePrefix("168.63.129.16/32"), metadata}, // Azure's host agent
	{netip.MustParsePrefix("169.254.0.0/16"), linkLocal},
	{netip.MustParsePrefix("169.254.169.254/32"), metadata},
	{netip.MustParsePrefix("172.16.0.0/12"), private},
	{netip.MustParsePrefix("192.0.0.0/24"), reserved}, // protocol assignments, RFC 6890
	{netip.MustParsePrefix("192.168.0.0/16"), private},
	{netip.MustParsePrefix("198.18.0.0/15"), private}, // benchmarks, RFC 2544; VPN clients use it inside
	{netip.MustParsePrefix("224.0.0.0/4"), multicast},
	{netip.MustParsePrefix("240.0.0.0/4"), reserved},
	{netip.MustParsePrefix("255.255.255.255/32"), broadcast},

	// Global unicast is 2000::/3 (RFC 4291) and the NAT64 prefix (RFC 6052).
	{netip.MustParsePrefix("::/3"), reserved},
	{netip.MustParsePrefix("::/128"), nowhere},
	{netip.MustParsePrefix("::1/128"), loopback},
	{netip.MustParsePrefix("64:ff9b::/96"), public},
	{netip.MustParsePrefix("2001::/32"), reserved}, // Teredo tunnels to IPv4, RFC 4380
	{netip.MustParsePrefix("4000::/2"), reserved},
	{netip.MustParsePrefix("8000::/1"), reserved},
	{netip.MustParsePrefix("fc00::/7"), private},
	{netip.MustParsePrefix("fd00:ec2::254/128"), metadata}, // AWS
	{netip.MustParsePrefix("fd20:ce::254/128"), metadata},  // Google Cloud
	{netip.MustParsePrefix("fe80::/10"), linkLocal},
	{netip.MustParsePrefix("fec0::/10"), reserved}, // site-local, withdrawn by RFC 3879
	{netip.MustParsePrefix("ff00::/8"), multicast},
}

// zone is a range of one class: bits is the length of its prefix.
type zone struct {
	class class
	bits  int
}

// namedBy tells whether an allow rule that matches an address of the zone counts there.
func (z zone) namedBy(r Rule) bool {
	switch z.class {
	case public:
		return true
	case gateway:
		return r.Name == HostName && !r.Wildcard
	}
	return r.Name == "" && r.Prefix.Bits() >= z.bits
}

// zoneOf says where a clean flow goes, by its address alone: see Embedded.
func zoneOf(f Flow) zone {
	if f.Gateway {
		return zone{gateway, 0}
	}
	z := zoneOfAddress(f.Address)
	if f.Own && !z.class.closed() && z.class != metadata {
		return zone{own, f.Address.BitLen()}
	}
	return z
}

func zoneOfAddress(a netip.Addr) zone {
	if !a.IsValid() {
		return zone{nowhere, 0}
	}
	z := zone{class: public, bits: -1}
	for _, s := range specials {
		if s.prefix.Contains(a) && s.prefix.Bits() > z.bits {
			z = zone{s.class, s.prefix.Bits()}
		}
	}
	return z
}

// Embedded is the IPv4 address that a NAT64 (RFC 6052) or 6to4 (RFC 3056) address leads
// to. Judge demands that it is allowed as well.
func Embedded(a netip.Addr) (netip.Addr, bool) {
	b := a.As16()
	switch {
	case !a.Is6():
	case [12]byte(b[:12]) == [12]byte{0, 0x64, 0xff, 0x9b}:
		return netip.AddrFrom4([4]byte(b[12:])), true
	case b[0] == 0x20 && b[1] == 0x02:
		return netip.AddrFrom4([4]byte(b[2:6])), true
	}
	return netip.Addr{}, false
}

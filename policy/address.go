package policy

import "net/netip"

// special are the addresses that are not those of hosts on the internet, by the
// special-purpose registries of IANA, and one where a cloud has the metadata of
// its machines among its public ones.
var special = prefixes(
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
	"172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16",
	"198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
	"168.63.129.16/32", // Azure
	"2001::/23", "2001:db8::/32", "3fff::/20",
)

var (
	unicast6  = netip.MustParsePrefix("2000::/3") // all that is given to hosts
	nat64     = netip.MustParsePrefix("64:ff9b::/96")
	sixToFour = netip.MustParsePrefix("2002::/16")
)

func prefixes(texts ...string) []netip.Prefix {
	ps := make([]netip.Prefix, len(texts))
	for i, text := range texts {
		ps[i] = netip.MustParsePrefix(text)
	}
	return ps
}

// public reports whether an address is that of a host on the internet. One that
// leads to an IPv4 address is what that is.
func public(addr netip.Addr) bool {
	addr = addr.Unmap()
	if addr.Zone() != "" {
		return false
	}
	if addr.Is6() {
		b := addr.As16()
		switch {
		case nat64.Contains(addr):
			return public(netip.AddrFrom4([4]byte(b[12:])))
		case sixToFour.Contains(addr):
			return public(netip.AddrFrom4([4]byte(b[2:6])))
		case !unicast6.Contains(addr):
			return false
		}
	}
	for _, p := range special {
		if p.Contains(addr) {
			return false
		}
	}
	return addr.IsValid()
}

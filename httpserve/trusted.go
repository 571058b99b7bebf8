package httpserve

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/gatehouse-authz/gatehouse/peers"
)

// trusted are the peers whose word about other callers is believed.
type trusted struct {
	nets []netip.Prefix
	ids  []string // patterns
	unix bool     // whoever reaches a socket
}

// trustedOf reads a list of CIDRs, addresses, patterns of IDs, and "unix".
func trustedOf(list []string) (t trusted, err error) {
	for _, s := range list {
		if err := t.add(s); err != nil {
			return trusted{}, err
		}
	}
	return t, nil
}

// ParseTrusted returns an error for what cannot be a trusted peer. It reports
// whether the peer is one with a certificate.
func ParseTrusted(s string) (certified bool, err error) {
	var t trusted
	err = t.add(s)
	return len(t.ids) > 0, err
}

func (t *trusted) add(s string) error {
	if s == "unix" {
		t.unix = true
		return nil
	}
	if strings.Contains(s, "://") {
		t.ids = append(t.ids, s)
		return nil
	}
	if addr, err := netip.ParseAddr(s); err == nil {
		addr = addr.Unmap()
		t.nets = append(t.nets, netip.PrefixFrom(addr, addr.BitLen()))
		return nil
	}
	prefix, err := netip.ParsePrefix(s)
	if err != nil || prefix != prefix.Masked() || prefix.Addr().Is4In6() {
		return fmt.Errorf(`%q is not an address, a CIDR like 10.0.0.0/8, a pattern like spiffe://example.org/*, or "unix"`, s)
	}
	t.nets = append(t.nets, prefix)
	return nil
}

// has reports whether the request comes from one of them.
func (t *trusted) has(r *http.Request) bool {
	if id := peers.Of(r.TLS); id != "" && peers.MatchAny(t.ids, id) {
		return true
	}
	addr, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil { // of a socket, which has no port
		return t.unix && !strings.Contains(r.RemoteAddr, ":")
	}
	return t.hasAddress(addr.Addr().Unmap().WithZone(""))
}

// hasAddress reports whether an address is one of theirs.
func (t *trusted) hasAddress(ip netip.Addr) bool {
	for _, n := range t.nets {
		if n.Contains(ip) {
			return true
		}
	}
	return false
}

// permits reports whether the peer that asks may do so for the tenant.
func (p *place) permits(r *request) bool {
	if len(p.peers) == 0 {
		return true
	}
	id := peers.Of(r.TLS)
	for pattern, names := range p.peers {
		if id != "" && peers.Match(pattern, id) && peers.MatchAny(names, string(r.Tenant)) {
			return true
		}
	}
	return false
}

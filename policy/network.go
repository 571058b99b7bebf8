package policy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// NetworkOptions say what http.send may reach.
type NetworkOptions struct {
	// Hosts are what may be reached, and nothing else:
	//
	//	host          a name, in http at port 80 and in https at port 443
	//	host:port     a name at that port
	//	address       an IP address, as a name is
	//	address:port  an IP address at that port; [::1]:8080
	//	prefix        IP addresses, such as 10.1.0.0/16, as names are
	//
	// A name is reached only at public addresses: not at loopback, link-local,
	// private, shared, multicast or reserved ones, nor at one where a cloud has
	// the metadata of its machines. At those it is reached where they are
	// listed too, as an address or in a prefix; a listed port is then the only
	// one.
	Hosts []string

	// Resolve returns the addresses of a name. Optional: by default it is what
	// the resolver of Go says.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)

	// AnswerBytes bounds the body of an answer, unpacked. Default 1 MiB.
	AnswerBytes int64

	// Requests bounds the requests at once, TenantRequests those of one tenant;
	// more of them wait. Default 64 and 8.
	Requests, TenantRequests int
}

// Network is what the http.send of policies may reach. It is shared by tenants
// of the same settings, and owns the connections to where it leads.
//
// A request goes to a listed host or is refused; so does each redirect, and none
// leads from https to http. The name is resolved for each connection, and what is
// dialled is the very address that was checked. There is no proxy; what the
// process's environment and files say plays no part, but for the certificate
// authorities of the system. A policy is not told at what address a name is.
type Network struct {
	hosts    []listed
	prefixes []listedPrefix
	resolve  func(ctx context.Context, host string) ([]netip.Addr, error)
	dialer   net.Dialer

	answerBytes int64
	requests    chan struct{} // one for each that is out
	perTenant   int

	plain *http.Transport // for requests without TLS settings of their own
}

// listed is a name that may be reached; port is empty for the default ports.
type listed struct{ host, port string }

// listedPrefix is the same of addresses.
type listedPrefix struct {
	prefix netip.Prefix
	port   string
}

// NewNetwork returns a Network. Its error names the host that is none.
func NewNetwork(opts NetworkOptions) (*Network, error) {
	n := &Network{
		resolve:     opts.Resolve,
		dialer:      net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second},
		answerBytes: opts.AnswerBytes,
		perTenant:   opts.TenantRequests,
	}
	if n.resolve == nil {
		n.resolve = lookUp
	}
	if n.answerBytes <= 0 {
		n.answerBytes = 1 << 20
	}
	if n.perTenant <= 0 {
		n.perTenant = 8
	}
	requests := opts.Requests
	if requests <= 0 {
		requests = 64
	}
	n.requests = make(chan struct{}, requests)
	for _, text := range opts.Hosts {
		if err := n.list(text); err != nil {
			return nil, fmt.Errorf("host %q: %w", text, err)
		}
	}
	n.plain = n.transport(nil)
	return n, nil
}

// list adds what an operator lists.
func (n *Network) list(text string) error {
	if prefix, err := netip.ParsePrefix(text); err == nil {
		n.prefixes = append(n.prefixes, listedPrefix{prefix: prefix.Masked()})
		return nil
	}
	host, port := text, ""
	if inner, ok := strings.CutPrefix(text, "["); ok && strings.HasSuffix(inner, "]") {
		host = strings.TrimSuffix(inner, "]")
	} else if h, p, err := net.SplitHostPort(text); err == nil {
		if number, err := strconv.ParseUint(p, 10, 16); err != nil || number == 0 {
			return errors.New("its port is not a number from 1 to 65535")
		}
		host, port = h, p
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return n.listAddr(addr, port)
	}
	name := canonical(host)
	if !isName(name) {
		return errors.New("is neither a name nor an address nor a prefix")
	}
	n.hosts = append(n.hosts, listed{name, port})
	return nil
}

func (n *Network) listAddr(addr netip.Addr, port string) error {
	if addr.Zone() != "" {
		return errors.New("an address with a zone cannot be reached")
	}
	addr = addr.Unmap()
	n.prefixes = append(n.prefixes, listedPrefix{netip.PrefixFrom(addr, addr.BitLen()), port})
	return nil
}

// canonical writes a name the one way that names are compared in.
func canonical(host string) string { return strings.ToLower(strings.TrimSuffix(host, ".")) }

// isName reports whether s can be a host name: letters, digits, hyphens and
// underscores between dots. One that consists of numbers is an address to some
// resolvers, and none to others.
func isName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	last := labels[len(labels)-1]
	return !('0' <= last[0] && last[0] <= '9')
}

// allows reports whether a request may go to a host and port; standard is the
// port of its scheme.
func (n *Network) allows(host, port, standard string) bool {
	if addr, err := netip.ParseAddr(host); err == nil {
		return n.lists(addr.Unmap(), func(own string) bool { return own == port || own == "" && port == standard })
	}
	name := canonical(host)
	return slices.ContainsFunc(n.hosts, func(l listed) bool {
		return l.host == name && (l.port == port || l.port == "" && port == standard)
	})
}

// lists reports whether an address is listed with a port that is right.
func (n *Network) lists(addr netip.Addr, right func(port string) bool) bool {
	return addr.Zone() == "" && slices.ContainsFunc(n.prefixes, func(l listedPrefix) bool {
		return l.prefix.Contains(addr) && right(l.port)
	})
}

// dial connects to a host that a request was allowed to go to.
func (n *Network) dial(ctx context.Context, _, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, errNoConnection
	}
	addrs, err := n.addressesOf(ctx, host)
	if err != nil {
		return nil, err
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return nil, errNoConnection
	}
	refused := false
	err = errNoConnection
	for _, addr := range addrs {
		addr = addr.Unmap()
		if !n.lists(addr, func(own string) bool { return own == port || own == "" }) && !public(addr) {
			refused = true
			continue
		}
		conn, dialErr := n.dialer.DialContext(ctx, "tcp", netip.AddrPortFrom(addr, uint16(number)).String())
		if dialErr == nil {
			return conn, nil
		}
		refused = false
		err = errNoConnection
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if refused {
		return nil, &networkError{text: fmt.Sprintf("host %q is where no policy may reach", host)}
	}
	return nil, err
}

func (n *Network) addressesOf(ctx context.Context, host string) ([]netip.Addr, error) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{addr}, nil
	}
	addrs, err := n.resolve(ctx, canonical(host))
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil || len(addrs) == 0 {
		return nil, &networkError{text: fmt.Sprintf("host %q has no address", host)}
	}
	return addrs, nil
}

// resolver is Go's own: that of the C library takes 0x7f.1 for an address.
var resolver = &net.Resolver{PreferGo: true}

func lookUp(ctx context.Context, host string) ([]netip.Addr, error) {
	// The dot keeps the search list of resolv.conf out of it.
	return resolver.LookupNetIP(ctx, "ip", host+".")
}

// networkError is an error that may be shown to a policy.
type networkError struct {
	text    string
	timeout bool
}

func (e *networkError) Error() string   { return e.text }
func (e *networkError) Timeout() bool   { return e.timeout }
func (e *networkError) Temporary() bool { return false }

var errNoConnection = &networkError{text: "no connection"}

// slots are what tenants take for each request that is out.
type slots []chan struct{}

// take takes one of each, and returns what gives them back.
func (s slots) take(ctx context.Context) (free func(), err error) {
	taken := 0
	free = sync.OnceFunc(func() {
		for _, slot := range s[:taken] {
			<-slot
		}
	})
	for _, slot := range s {
		select {
		case slot <- struct{}{}:
			taken++
		case <-ctx.Done():
			free()
			return nil, ctx.Err()
		}
	}
	return free, nil
}

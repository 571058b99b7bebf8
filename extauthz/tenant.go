package extauthz

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Resolver finds the tenant that a check names. Exactly one field is set.
//
// Context extensions, route metadata and the authority of the call are set by
// whoever configures Envoy. The host and the headers are sent by its clients:
// they are for proxies that check or set them.
type Resolver struct {
	// ContextExtension is the key of the context extension that is the name of
	// the tenant.
	ContextExtension string `yaml:"context_extension,omitempty"`

	// RouteMetadata is where the name stands in the metadata of the route.
	RouteMetadata *MetadataKey `yaml:"route_metadata,omitempty"`

	// Authority maps the :authority of the gRPC call itself, in lower case. An
	// entry of its map is looked up with the port and then without.
	Authority *NameMap `yaml:"authority,omitempty"`

	// PeerID maps the ID of the proxy that asks, from its certificate: see
	// peers.ID.
	PeerID *NameMap `yaml:"peer_id,omitempty"`

	// Host maps the host of the request, in lower case, without port and
	// trailing dot. A key of its map may be "*." and a suffix: the longest
	// that fits counts, and an exact key before it.
	Host *NameMap `yaml:"host,omitempty"`

	// Header is the header of the request that is the name of the tenant. More
	// than one value is refused.
	Header string `yaml:"header,omitempty"`
}

// MetadataKey names a string in the filter metadata of a route.
type MetadataKey struct {
	Namespace string `yaml:"namespace"`
	Key       string `yaml:"key"`
}

// NameMap makes a name of a tenant from another name. Exactly one field is set.
type NameMap struct {
	// Map holds the names.
	Map map[string]string `yaml:"map,omitempty"` // :: name → tenant

	// Pattern is a regular expression (RE2) that must match the whole name.
	// Its first group is the tenant.
	Pattern string `yaml:"pattern,omitempty"`
}

// errTenant: a check names no tenant, or something that cannot be the name of
// one.
var errTenant = errors.New("no tenant")

// resolve returns the name of a tenant that a check has in one place; ok is
// false where it has none there. An error, like a name that is not valid, means
// that the check is refused.
type resolve func(ctx context.Context, a *asked) (name string, ok bool, err error)

// Validate returns an error for a Resolver that can never name a tenant.
func (r Resolver) Validate() error {
	_, err := r.compile()
	return err
}

func (r Resolver) compile() (resolve, error) {
	var kinds []resolve
	if key := r.ContextExtension; key != "" {
		kinds = append(kinds, func(_ context.Context, a *asked) (string, bool, error) {
			name, ok := a.extensions.get(key)
			return name, ok, nil
		})
	}
	if key := r.RouteMetadata; key != nil {
		if key.Namespace == "" || key.Key == "" {
			return nil, fmt.Errorf("route_metadata wants a namespace and a key")
		}
		kinds = append(kinds, func(_ context.Context, a *asked) (string, bool, error) {
			return routeMetadata(a, *key)
		})
	}
	if r.Authority != nil {
		find, err := r.Authority.authority()
		if err != nil {
			return nil, fmt.Errorf("authority: %w", err)
		}
		kinds = append(kinds, func(ctx context.Context, _ *asked) (string, bool, error) {
			md, _ := metadata.FromIncomingContext(ctx)
			authority := md[":authority"]
			if len(authority) == 0 || authority[0] == "" {
				return "", false, nil
			}
			name, ok := find(lower(authority[0]))
			return name, ok, nil
		})
	}
	if r.PeerID != nil {
		find, err := r.PeerID.exact()
		if err != nil {
			return nil, fmt.Errorf("peer_id: %w", err)
		}
		kinds = append(kinds, func(ctx context.Context, _ *asked) (string, bool, error) {
			id := peerOf(ctx)
			if id == "" {
				return "", false, nil
			}
			name, ok := find(id)
			return name, ok, nil
		})
	}
	if r.Host != nil {
		find, err := r.Host.host()
		if err != nil {
			return nil, fmt.Errorf("host: %w", err)
		}
		kinds = append(kinds, func(_ context.Context, a *asked) (string, bool, error) {
			host := a.http.host
			if host == "" {
				return "", false, nil
			}
			host, err := hostOf(host)
			if err != nil {
				return "", false, err
			}
			name, ok := find(host)
			return name, ok, nil
		})
	}
	if r.Header != "" {
		header := lower(r.Header)
		if strings.Trim(header, "abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~") != "" {
			return nil, fmt.Errorf("header %q is not the name of a header", r.Header)
		}
		kinds = append(kinds, func(_ context.Context, a *asked) (string, bool, error) {
			return headerValue(&a.http, header)
		})
	}
	if len(kinds) != 1 {
		return nil, fmt.Errorf("a resolver wants exactly one of context_extension, route_metadata, authority, peer_id, host and header, got %d", len(kinds))
	}
	return kinds[0], nil
}

func routeMetadata(a *asked, key MetadataKey) (string, bool, error) {
	fields := a.routeMetadata.message.GetFilterMetadata()[key.Namespace].GetFields()
	value, ok := fields[key.Key]
	if !ok {
		return "", false, nil
	}
	name, ok := value.GetKind().(*structpb.Value_StringValue)
	if !ok {
		return "", false, fmt.Errorf("route metadata %q of %q is not a string", key.Key, key.Namespace)
	}
	return name.StringValue, true, nil
}

// headerValue returns the one value of a header. Where the headers are joined,
// more values show as a comma, which is in no name of a tenant.
func headerValue(http *exchange, header string) (string, bool, error) {
	if len(http.headers) > 0 {
		value, ok := http.headers.get(header)
		return value, ok, nil
	}
	value, found := "", false
	for _, h := range http.headerMap.GetHeaders() {
		if lower(h.GetKey()) != header {
			continue
		}
		if found {
			return "", false, fmt.Errorf("header %q has more than one value", header)
		}
		value, found = h.GetValue(), true
		if raw := h.GetRawValue(); len(raw) > 0 {
			value = string(raw)
		}
	}
	return value, found, nil
}

func (m *NameMap) authority() (func(string) (string, bool), error) {
	if m.Pattern != "" || len(m.Map) == 0 {
		return m.pattern()
	}
	names := make(map[string]string, len(m.Map)) // :: authority → tenant
	for authority, name := range m.Map {
		if err := addName(names, lower(authority), name); err != nil {
			return nil, err
		}
	}
	return func(authority string) (string, bool) {
		if name, ok := names[authority]; ok {
			return name, true
		}
		name, ok := names[withoutPort(authority)]
		return name, ok
	}, nil
}

// exact looks a name up as it is.
func (m *NameMap) exact() (func(string) (string, bool), error) {
	if m.Pattern != "" || len(m.Map) == 0 {
		return m.pattern()
	}
	names := make(map[string]string, len(m.Map)) // :: name → tenant
	for from, tenant := range m.Map {
		if err := addName(names, from, tenant); err != nil {
			return nil, err
		}
	}
	return func(s string) (string, bool) { name, ok := names[s]; return name, ok }, nil
}

func (m *NameMap) host() (func(string) (string, bool), error) {
	if m.Pattern != "" || len(m.Map) == 0 {
		return m.pattern()
	}
	exact, suffixes := map[string]string{}, map[string]string{} // :: host, or ".suffix" → tenant
	for host, name := range m.Map {
		names := exact
		suffix, wildcard := strings.CutPrefix(host, "*.")
		if wildcard {
			names, host = suffixes, suffix
		}
		host, err := hostOf(host)
		if err != nil {
			return nil, err
		}
		if wildcard {
			host = "." + host
		}
		if err := addName(names, host, name); err != nil {
			return nil, err
		}
	}
	return func(host string) (string, bool) {
		if name, ok := exact[host]; ok {
			return name, true
		}
		for i := range len(host) { // from the longest suffix on
			if host[i] == '.' {
				if name, ok := suffixes[host[i:]]; ok {
					return name, true
				}
			}
		}
		return "", false
	}, nil
}

func (m *NameMap) pattern() (func(string) (string, bool), error) {
	if len(m.Map) > 0 || m.Pattern == "" {
		return nil, fmt.Errorf("wants either a map or a pattern")
	}
	re, err := regexp.Compile(`^(?:` + m.Pattern + `)$`)
	if err != nil {
		return nil, fmt.Errorf("pattern: %w", err)
	}
	if re.NumSubexp() == 0 {
		return nil, fmt.Errorf("pattern %q has no group", m.Pattern)
	}
	return func(s string) (string, bool) {
		match := re.FindStringSubmatch(s)
		if match == nil {
			return "", false
		}
		return match[1], true
	}, nil
}

// addName adds a name to the names that a map holds.
func addName(names map[string]string, from, tenant string) error {
	if from == "" {
		return fmt.Errorf("map has an empty key")
	}
	if _, err := tenants.ParseID(tenant); err != nil {
		return fmt.Errorf("map %q: %w", from, err)
	}
	if _, ok := names[from]; ok {
		return fmt.Errorf("map has %q twice", from)
	}
	names[from] = tenant
	return nil
}

// withoutPort returns an authority without its port, if it has one.
func withoutPort(authority string) string {
	i := strings.LastIndexByte(authority, ':')
	if i < 0 || strings.IndexByte(authority[i:], ']') >= 0 { // "[::1]"
		return authority
	}
	return authority[:i]
}

// hostOf returns a host in lower case, without port and one trailing dot. It
// refuses what is neither a name in ASCII nor an IP address.
func hostOf(s string) (string, error) {
	host := lower(withoutPort(s))
	if len(host) < len(s) {
		if port := s[len(host)+1:]; port == "" || len(port) > 5 || strings.Trim(port, "0123456789") != "" {
			return "", fmt.Errorf("host %q has an invalid port", s)
		}
	}
	if address, ok := strings.CutPrefix(host, "["); ok {
		if address, ok = strings.CutSuffix(address, "]"); !ok || address == "" || strings.Trim(address, "0123456789abcdef:.") != "" {
			return "", fmt.Errorf("host %q is not an address", s)
		}
		return host, nil
	}
	host = strings.TrimSuffix(host, ".")
	if host == "" || len(host) > 253 || host[0] == '.' || strings.Contains(host, "..") ||
		strings.HasSuffix(host, ".") || strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
		return "", fmt.Errorf("host %q is not a name", s)
	}
	return host, nil
}

// router finds the tenant of a check.
type router struct {
	resolve  []resolve
	fallback tenants.ID          // for a check that names none; empty: refused
	peers    map[string][]string // :: pattern of a proxy's ID → patterns of tenants; empty: all may name all
}

func newRouter(resolvers []Resolver, fallback string, peers map[string][]string) (*router, error) {
	r := &router{peers: peers}
	for i, resolver := range resolvers {
		resolve, err := resolver.compile()
		if err != nil {
			return nil, fmt.Errorf("resolver %d: %w", i, err)
		}
		r.resolve = append(r.resolve, resolve)
	}
	if fallback != "" {
		id, err := tenants.ParseID(fallback)
		if err != nil {
			return nil, fmt.Errorf("default tenant: %w", err)
		}
		r.fallback = id
	}
	return r, nil
}

// tenantOf returns the tenant of a check that the proxy that asks may name. Its
// error wraps errTenant.
func (r *router) tenantOf(ctx context.Context, a *asked) (tenants.ID, error) {
	id, err := r.named(ctx, a)
	if err != nil {
		return "", err
	}
	if err := r.permitted(ctx, id); err != nil {
		return "", err
	}
	return id, nil
}

// named returns the tenant that a check names: the first that is named. A name
// that is not valid is never passed over for the next.
func (r *router) named(ctx context.Context, a *asked) (tenants.ID, error) {
	for _, resolve := range r.resolve {
		name, ok, err := resolve(ctx, a)
		if err != nil {
			return "", fmt.Errorf("%w: %w", errTenant, err)
		}
		if !ok {
			continue
		}
		id, err := tenants.ParseID(name)
		if err != nil {
			return "", fmt.Errorf("%w: %w", errTenant, err)
		}
		return id, nil
	}
	if r.fallback == "" {
		return "", fmt.Errorf("%w is named", errTenant)
	}
	return r.fallback, nil
}

// entryOf returns the entry point that a check names, if it names one.
func entryOf(a *asked) string {
	return strings.Trim(a.extensions.value("path"), "/")
}

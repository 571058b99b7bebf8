package httpserve

import (
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/gatehouse-authz/gatehouse/peers"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// CheckedRequest is the HTTP request that a policy is asked about as an Envoy
// would ask. A zero field is one that the input document does not have.
type CheckedRequest struct {
	ID       string
	Method   string
	Path     string // as it was sent, with the query
	Host     string
	Scheme   string
	Protocol string // like "HTTP/1.1"

	// Headers are in the order in which values of one name are joined.
	Headers []policy.Header

	Body []byte

	// PartialBody says that a part of the body, or all of it, is not in Body.
	PartialBody bool

	Source, Destination netip.AddrPort // a port of 0 is not known
	Principal           string         // the ID of the source's certificate

	// Context are the context extensions.
	Context map[string]string
}

// Inputs makes the input document of a request, as that of a check over gRPC.
type Inputs func(r *CheckedRequest, decisionID string) tenants.Input

// Headers that say what a proxy asks about. They are no headers of the request
// that it asks about.
var askingHeaders = []string{"x-forwarded-method", "x-forwarded-uri", "x-original-method", "x-original-uri"}

// Headers that are about one connection and not about a request (RFC 9110
// section 7.6.1).
var hopHeaders = []string{
	"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
	"te", "trailer", "transfer-encoding", "upgrade",
}

// Headers that a request has once. Who reads a second one may read another value
// than we do.
var singleHeaders = append([]string{
	"authorization", "content-length", "content-type", "host", "x-envoy-auth-partial-body",
	"x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix", "x-forwarded-proto", "x-original-url", "x-real-ip",
}, askingHeaders...)

// isVouching reports whether a header says something about another caller or
// connection, which counts only if a trusted peer says it.
func isVouching(name string) bool {
	return strings.HasPrefix(name, "x-forwarded-") || strings.HasPrefix(name, "x-original-") || strings.HasPrefix(name, "x-envoy-") ||
		name == "forwarded" || name == "x-real-ip"
}

// checked returns the request that r is, or that it stands for, with this path.
// What it says about other callers counts only if a trusted peer says it.
func (r *request) checked(method, path string, body *body) (*CheckedRequest, error) {
	believed := r.place.trusted.has(r.Request)
	headers, err := r.headers(believed)
	if err != nil {
		return nil, err
	}
	c := &CheckedRequest{Method: method, Path: path, Host: r.Host, Headers: headers, Body: body.text}
	if id := r.Header.Get("X-Request-ID"); isRequestID(id) {
		c.ID = id
	}
	if believed {
		if c.Scheme, err = schemeOf(r.Header); err != nil {
			return nil, err
		}
		if c.Source, err = r.place.trusted.sourceOf(r.Header.Values("X-Forwarded-For")); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// headers returns the headers of a request, by name, without those that are not
// its own.
func (r *request) headers(believed bool) ([]policy.Header, error) {
	identity := r.Offers.Auth.Headers
	var headers []policy.Header
	for name, values := range r.Header {
		name = strings.ToLower(name)
		switch {
		case strings.Contains(name, "_"):
			// Some servers take it for the name with a hyphen, and a proxy
			// that sets or removes that one does not.
			return nil, invalidf("the name of a header has an underscore")
		case len(values) > 1 && (slices.Contains(singleHeaders, name) || identity != nil && (name == identity.Subject || name == identity.Payload)):
			return nil, invalidf("header %s is there more than once", name)
		case slices.Contains(hopHeaders, name), slices.Contains(askingHeaders, name):
			continue
		case !believed && (isVouching(name) || identity != nil && (name == identity.Subject || name == identity.Payload)):
			continue
		}
		for _, v := range values {
			headers = append(headers, policy.Header{Name: name, Value: v})
		}
	}
	slices.SortStableFunc(headers, func(a, b policy.Header) int { return strings.Compare(a.Name, b.Name) })
	return headers, nil
}

// schemeOf returns the scheme that a trusted peer names; "": it names none.
func schemeOf(h http.Header) (string, error) {
	switch strings.ToLower(h.Get("X-Forwarded-Proto")) {
	case "":
		return "", nil
	case "http", "ws":
		return "http", nil
	case "https", "wss":
		return "https", nil
	}
	return "", invalidf("x-forwarded-proto is neither http nor https")
}

// sourceOf returns the client in the values of X-Forwarded-For, to whose end each
// proxy adds who has asked it: the last that is not one of the trusted peers, or
// the first if all are.
func (t *trusted) sourceOf(values []string) (source netip.AddrPort, err error) {
	list := strings.Split(strings.Join(values, ","), ",")
	for _, text := range slices.Backward(list) {
		text = strings.TrimSpace(text)
		if text == "" {
			continue
		}
		addr, err := netip.ParseAddrPort(text)
		if err != nil {
			ip, err := netip.ParseAddr(strings.Trim(text, "[]"))
			if err != nil {
				return netip.AddrPort{}, invalidf("x-forwarded-for names what is not an address")
			}
			addr = netip.AddrPortFrom(ip, 0)
		}
		source = netip.AddrPortFrom(addr.Addr().Unmap().WithZone(""), addr.Port())
		if !t.hasAddress(source.Addr()) {
			break
		}
	}
	return source, nil
}

// direct adds what is known of a request of which r itself is the original.
func (c *CheckedRequest) direct(r *request) {
	c.Protocol = strings.TrimSuffix(r.Proto, ".0")
	if r.ProtoMajor == 1 {
		c.Protocol = r.Proto
	}
	c.Principal = peers.Of(r.TLS)
	if c.Scheme == "" {
		c.Scheme = "http"
		if r.TLS != nil {
			c.Scheme = "https"
		}
	}
	if !c.Source.IsValid() {
		c.Source, _ = netip.ParseAddrPort(r.RemoteAddr) // of a socket there is none
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(interface{ String() string }); ok {
		c.Destination, _ = netip.ParseAddrPort(local.String())
	}
}

// after returns what follows the tenant's path, like "/check", in the path and
// query of the request, as it was sent. ok is false where that begins otherwise.
func (r *request) after(path string) (rest string, ok bool) {
	target := r.RequestURI
	if _, below, ok := strings.Cut(target, "://"); ok && target[0] != '/' { // RFC 9112 section 3.2.2
		i := strings.IndexByte(below, '/')
		if i < 0 {
			return "", false
		}
		target = below[i:]
	}
	return strings.CutPrefix(target, "/t/"+string(r.Tenant)+path)
}

// isMethod reports whether s can be a method of HTTP.
func isMethod(s string) bool { return len(s) <= 32 && isToken(s) }

// isToken reports whether s is a token of HTTP (RFC 9110 section 5.6.2).
func isToken(s string) bool {
	return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-.^_`|~") == ""
}

// isTarget reports whether s is a path, maybe with a query, that a proxy leads on
// as it stands: without a fragment, a space or a control character.
func isTarget(s string) bool {
	return strings.HasPrefix(s, "/") && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '#' })
}

// isHost reports whether s can be the host of a request.
func isHost(s string) bool {
	return s != "" && len(s) <= 512 && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r >= 0x7f || strings.ContainsRune(`,/\?#@"<>`, r)
	})
}

package extauthz

import (
	"fmt"
	"net/netip"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Request is an HTTP request in plain values. It is for those who ask about one
// without an Envoy that describes it. A zero field is one that the input document
// does not have.
type Request struct {
	ID       string
	Method   string
	Path     string // as it was sent, with the query
	Host     string
	Scheme   string
	Protocol string // like "HTTP/1.1"

	// Headers are without those that begin with a colon, which are made of the
	// fields above. The values of one name are joined in their order.
	Headers []policy.Header

	Body []byte

	// PartialBody says that a part of the body, or all of it, is not in Body.
	PartialBody bool

	Source, Destination netip.AddrPort // a port of 0 is not known
	Principal           string         // the ID of the source's certificate

	// Context are the context extensions.
	Context map[string]string
}

// Input returns the input document of r, as that of a check that an Envoy would
// have sent for it. It is made when the policy asks for it; r must not change
// any more.
func (s *Server) Input(r *Request, decisionID string) tenants.Input {
	return &plainInput{request: r, decisionID: decisionID, descriptors: s.routing.Load().descriptors}
}

// plainInput is the input of a Request.
type plainInput struct {
	request     *Request
	once        sync.Once
	asked       *asked // made by once
	decisionID  string
	descriptors map[string]*Descriptors
}

// Input makes the input document, at any time and any number of times.
func (in *plainInput) Input(needs tenants.Needs) (ast.Value, error) {
	a := in.made()
	if a == nil {
		return nil, fmt.Errorf("%w: path is not UTF-8", tenants.ErrInvalid)
	}
	return inputOf(a, in.decisionID, needs, in.descriptors)
}

// made returns the request as Envoy describes it; nil: its path is not UTF-8.
func (in *plainInput) made() *asked {
	in.once.Do(func() {
		if utf8.ValidString(in.request.Path) {
			in.asked = in.request.asked()
		}
	})
	return in.asked
}

// asked returns the request as Envoy describes it.
func (r *Request) asked() *asked {
	now := time.Now()
	a := &asked{there: true}
	a.request.there = true
	a.time = instant{there: true, seconds: now.Unix(), nanos: int32(now.Nanosecond())}
	a.http = exchange{
		there:    true,
		id:       clean(r.ID),
		method:   clean(r.Method),
		path:     r.Path,
		host:     clean(r.Host),
		scheme:   clean(r.Scheme),
		protocol: clean(r.Protocol),
		size:     int64(len(r.Body)),
		headers:  r.headers(),
	}
	if utf8.Valid(r.Body) && typeOf(a.http.headers.value("content-type")) != typeGRPC {
		a.http.body = string(r.Body)
	} else {
		a.http.rawBody = string(r.Body)
	}
	for key, value := range r.Context {
		a.extensions = append(a.extensions, pair{key, value})
	}
	a.source = party{address: addressOf(r.Source), principal: clean(r.Principal)}
	a.source.there = a.source.address.there || r.Principal != ""
	a.destination = party{address: addressOf(r.Destination)}
	a.destination.there = a.destination.address.there
	return a
}

// headers returns the headers as Envoy joins them, with those of its own.
func (r *Request) headers() pairs {
	joined := make(joinedHeaders, len(r.Headers)+5)
	for _, h := range r.Headers {
		joined.add(h.Name, []byte(h.Value))
	}
	for _, own := range [...]pair{{":authority", r.Host}, {":method", r.Method}, {":path", r.Path}, {":scheme", r.Scheme}} {
		delete(joined, own.key)
		if own.value != "" {
			joined.add(own.key, []byte(own.value))
		}
	}
	if r.PartialBody {
		joined["x-envoy-auth-partial-body"] = []byte("true")
	}
	return joined.headers()
}

func addressOf(a netip.AddrPort) address {
	if !a.Addr().IsValid() {
		return address{}
	}
	socket := address{there: true, socket: true, address: a.Addr().Unmap().WithZone("").String()}
	if a.Port() != 0 {
		socket.port, socket.portValue = portValue, uint32(a.Port())
	}
	return socket
}

// clean returns s as a string that is UTF-8.
func clean(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return sanitize([]byte(s))
}

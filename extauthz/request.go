package extauthz

import (
	"fmt"
	"net/netip"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/types/known/timestamppb"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

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
	return &plainInput{r, decisionID, s.routing.Load().descriptors}
}

// plainInput is the input of a Request.
type plainInput struct {
	request     *Request
	decisionID  string
	descriptors map[string]*Descriptors
}

// Input makes the input document.
func (in *plainInput) Input(needs tenants.Needs) (ast.Value, error) {
	if !utf8.ValidString(in.request.Path) {
		return nil, fmt.Errorf("%w: path is not UTF-8", tenants.ErrInvalid)
	}
	return inputOf(in.request.check(), in.decisionID, needs, in.descriptors)
}

// check returns the request as Envoy describes it.
func (r *Request) check() *authv3.CheckRequest {
	http := &authv3.AttributeContext_HttpRequest{
		Id:       clean(r.ID),
		Method:   clean(r.Method),
		Path:     r.Path,
		Host:     clean(r.Host),
		Scheme:   clean(r.Scheme),
		Protocol: clean(r.Protocol),
		Size:     int64(len(r.Body)),
		Headers:  r.headers(),
	}
	if utf8.Valid(r.Body) && typeOf(http.Headers["content-type"]) != typeGRPC {
		http.Body = string(r.Body)
	} else {
		http.RawBody = r.Body
	}
	a := &authv3.AttributeContext{
		Request:           &authv3.AttributeContext_Request{Time: timestamppb.Now(), Http: http},
		ContextExtensions: r.Context,
	}
	if address := addressOf(r.Source); address != nil || r.Principal != "" {
		a.Source = &authv3.AttributeContext_Peer{Address: address, Principal: clean(r.Principal)}
	}
	if address := addressOf(r.Destination); address != nil {
		a.Destination = &authv3.AttributeContext_Peer{Address: address}
	}
	return &authv3.CheckRequest{Attributes: a}
}

// headers returns the headers as Envoy joins them, with those of its own.
func (r *Request) headers() map[string]string {
	joined := make(joinedHeaders, len(r.Headers)+5)
	for _, h := range r.Headers {
		joined.add(h.Name, []byte(h.Value))
	}
	for name, value := range map[string]string{":authority": r.Host, ":method": r.Method, ":path": r.Path, ":scheme": r.Scheme} {
		delete(joined, name)
		if value != "" {
			joined.add(name, []byte(value))
		}
	}
	if r.PartialBody {
		joined["x-envoy-auth-partial-body"] = []byte("true")
	}
	return joined.headers()
}

func addressOf(a netip.AddrPort) *corev3.Address {
	if !a.Addr().IsValid() {
		return nil
	}
	socket := &corev3.SocketAddress{Address: a.Addr().Unmap().WithZone("").String()}
	if a.Port() != 0 {
		socket.PortSpecifier = &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())}
	}
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: socket}}
}

// clean returns s as a string that is UTF-8.
func clean(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	return sanitize([]byte(s))
}

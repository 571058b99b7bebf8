package extauthz

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// without returns an input without the time, which is that of asking.
func without(t *testing.T, v ast.Value) ast.Value {
	t.Helper()
	patched := v.(ast.Object)
	request := patched.Get(keyAttributes).Value.(ast.Object).Get(keyRequest).Value.(ast.Object)
	if request.Get(keyTime) == nil {
		t.Error("there is no time")
	}
	http := request.Get(keyHTTP)
	return ast.NewArray(http, ast.NewTerm(drop(patched, keyAttributes)), ast.NewTerm(drop(patched.Get(keyAttributes).Value.(ast.Object), keyRequest)))
}

func drop(obj ast.Object, key *ast.Term) ast.Object {
	rest := ast.NewObject()
	obj.Foreach(func(k, v *ast.Term) {
		if !k.Equal(key) {
			rest.Insert(k, v)
		}
	})
	return rest
}

// A Request has the input of the check that an Envoy would have sent.
func TestRequest(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	needs := tenants.Needs{All: true, BodyBytes: 1 << 20}
	r := &Request{
		ID: "7", Method: "POST", Path: "//a%2Fb?x=1", Host: "shop.example.com", Scheme: "https", Protocol: "HTTP/2",
		Headers: []policy.Header{
			{Name: "X-Tag", Value: "one"}, {Name: "cookie", Value: "a=1"}, {Name: "content-type", Value: "application/json"},
			{Name: "x-tag", Value: "t\xffwo"}, {Name: "Cookie", Value: "b=2"}, {Name: "x-empty", Value: ""}, {Name: ":path", Value: "/other"},
		},
		Body:   []byte(`{"a": 1}`),
		Source: netip.MustParseAddrPort("[::ffff:203.0.113.9]:4711"), Destination: netip.MustParseAddrPort("10.0.0.1:443"),
		Principal: "spiffe://example.org/alice",
		Context:   map[string]string{"k": "v"},
	}
	got, err := s.Input(r, "id-1").Input(needs)
	if err != nil {
		t.Fatal(err)
	}
	address := func(ip string, port uint32) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: ip, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}
	}
	want, err := inputOf(askedOf(&authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:            &authv3.AttributeContext_Peer{Address: address("203.0.113.9", 4711), Principal: "spiffe://example.org/alice"},
		Destination:       &authv3.AttributeContext_Peer{Address: address("10.0.0.1", 443)},
		ContextExtensions: map[string]string{"k": "v"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Id: "7", Method: "POST", Path: "//a%2Fb?x=1", Host: "shop.example.com", Scheme: "https", Protocol: "HTTP/2", Size: 8, Body: `{"a": 1}`,
			Headers: map[string]string{
				":authority": "shop.example.com", ":method": "POST", ":path": "//a%2Fb?x=1", ":scheme": "https",
				"x-tag": "one,t!wo", "cookie": "a=1; b=2", "content-type": "application/json", "x-empty": "",
			},
		}},
	}}), "id-1", needs, nil)
	if err != nil {
		t.Fatal(err)
	}
	w := want.(ast.Object)
	attributes := w.Get(keyAttributes).Value.(ast.Object)
	wanted := ast.NewArray(attributes.Get(keyRequest).Value.(ast.Object).Get(keyHTTP), ast.NewTerm(drop(w, keyAttributes)), ast.NewTerm(drop(attributes, keyRequest)))
	if g := without(t, got); g.Compare(wanted) != 0 {
		t.Errorf("got %v, want %v", g, wanted)
	}
}

func TestRequestBodies(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	needs := tenants.Needs{All: true, BodyBytes: 10}
	for _, c := range []struct {
		name, kind, body string
		partial          bool
		needs            tenants.Needs
		err              error
		raw              bool // the body is in rawBody
		truncated        bool
	}{
		{name: "none", needs: needs},
		{name: "text", kind: "text/plain", body: "text", needs: needs},
		{name: "bytes", kind: "text/plain", body: "\xff", needs: needs, raw: true},
		{name: "gRPC", kind: "application/grpc", body: "\x00\x00\x00\x00\x00", needs: needs, raw: true},
		{name: "kept by the proxy", kind: "application/json", partial: true, needs: needs, truncated: true},
		{name: "kept, and it is read", kind: "application/json", partial: true, needs: tenants.Needs{All: true, BodyBytes: 10, WholeBody: true}, err: tenants.ErrPartialBody},
		{name: "no JSON", kind: "application/json", body: "{", needs: needs, err: tenants.ErrInvalid},
		{name: "too large", kind: "text/plain", body: "01234567890", needs: needs, err: tenants.ErrTooLarge},
	} {
		r := &Request{Method: "POST", Path: "/", Headers: []policy.Header{{Name: "content-type", Value: c.kind}}, Body: []byte(c.body), PartialBody: c.partial}
		v, err := s.Input(r, "id").Input(c.needs)
		if !errors.Is(err, c.err) || err != nil && c.err == nil {
			t.Errorf("%s: got %v, want %v", c.name, err, c.err)
		}
		if err != nil {
			continue
		}
		obj := v.(ast.Object)
		http := obj.Get(keyAttributes).Value.(ast.Object).Get(keyRequest).Value.(ast.Object).Get(keyHTTP).Value.(ast.Object)
		if got := http.Get(keyRawBody) != nil; got != c.raw {
			t.Errorf("%s: raw body: got %t, want %t", c.name, got, c.raw)
		}
		if got := obj.Get(keyTruncatedBody).Value.Compare(ast.Boolean(true)) == 0; got != c.truncated {
			t.Errorf("%s: truncated: got %t, want %t", c.name, got, c.truncated)
		}
	}
	if _, err := s.Input(&Request{Path: "/\xff"}, "id").Input(needs); !errors.Is(err, tenants.ErrInvalid) {
		t.Errorf("path that is not UTF-8: got %v, want ErrInvalid", err)
	}
}

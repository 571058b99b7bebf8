package extauthz

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/url"
	"testing"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

func certificate(uris, names []string) *x509.Certificate {
	cert := &x509.Certificate{DNSNames: names}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			panic(err)
		}
		cert.URIs = append(cert.URIs, u)
	}
	return cert
}

// withPeer returns a context as that of a call of a proxy with that ID.
func withPeer(id string) context.Context {
	if id == "" {
		return context.Background()
	}
	cert := certificate([]string{id}, nil)
	return peer.NewContext(context.Background(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{
		PeerCertificates: []*x509.Certificate{cert}, VerifiedChains: [][]*x509.Certificate{{cert}},
	}}})
}

func TestPeers(t *testing.T) {
	r, err := newRouter([]Resolver{
		{ContextExtension: "tenant"},
		{PeerID: &NameMap{Map: map[string]string{"spiffe://x/orders": "orders"}}},
		{PeerID: &NameMap{Pattern: "spiffe://x/team/([a-z]+)"}},
	}, "", map[string][]string{
		"spiffe://x/shared": {"*"},
		"spiffe://x/team/*": {"team-*", "a"},
		"spiffe://x/orders": {"orders"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ peer, names, want string }{
		{"spiffe://x/shared", "anything", "anything"},
		{"spiffe://x/team/a", "team-b", "team-b"},
		{"spiffe://x/team/a", "orders", ""},
		{"spiffe://x/team/a", "", "a"},
		{"spiffe://x/team/b", "", ""}, // its ID names b, which it may not
		{"spiffe://x/orders", "", "orders"},
		{"spiffe://x/orders", "payments", ""},
		{"spiffe://y/shared", "orders", ""},
		{"", "orders", ""},
	} {
		req := new(authv3.CheckRequest)
		if c.names != "" {
			req.Attributes = &authv3.AttributeContext{ContextExtensions: map[string]string{"tenant": c.names}}
		}
		got, err := r.tenantOf(withPeer(c.peer), askedOf(req))
		if got != tenants.ID(c.want) || c.want == "" && !errors.Is(err, errTenant) {
			t.Errorf("%q names %q: got %q, %v, want %q", c.peer, c.names, got, err, c.want)
		}
	}
}

// A certificate that was shown and not verified is nobody's.
func TestUnverifiedPeer(t *testing.T) {
	ctx := peer.NewContext(context.Background(), &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{
		PeerCertificates: []*x509.Certificate{certificate([]string{"spiffe://x/a"}, nil)},
	}}})
	if got := peerOf(ctx); got != "" {
		t.Errorf("got %q, want nobody", got)
	}
}

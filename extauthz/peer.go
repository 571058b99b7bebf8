package extauthz

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// PeerID returns who a certificate is for: its one URI, as SPIFFE has it, or the
// first of its DNS names where it has no URI. It refuses a certificate with more
// than one URI, one with neither, and an ID that is not printable ASCII.
func PeerID(cert *x509.Certificate) (string, error) {
	var id string
	switch {
	case len(cert.URIs) == 1:
		id = cert.URIs[0].String()
	case len(cert.URIs) > 1:
		return "", fmt.Errorf("certificate has %d URIs, want one", len(cert.URIs))
	case len(cert.DNSNames) > 0:
		id = strings.ToLower(cert.DNSNames[0])
	default:
		return "", errors.New("certificate has neither a URI nor a DNS name")
	}
	for i := range len(id) {
		if id[i] <= ' ' || id[i] >= 0x7f {
			return "", fmt.Errorf("ID %q of the certificate is not printable", id)
		}
	}
	if id == "" {
		return "", errors.New("ID of the certificate is empty")
	}
	return id, nil
}

// peerOf returns the ID of the proxy that asks; empty where it has shown no
// certificate that was verified.
func peerOf(ctx context.Context) string {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return ""
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.VerifiedChains) == 0 {
		return ""
	}
	id, err := PeerID(info.State.PeerCertificates[0])
	if err != nil {
		return ""
	}
	return id
}

// MatchAny reports whether one of the patterns matches s. In a pattern "*"
// stands for any bytes, also for none.
func MatchAny(patterns []string, s string) bool {
	for _, p := range patterns {
		if match(p, s) {
			return true
		}
	}
	return false
}

func match(pattern, s string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == s
	}
	if !strings.HasPrefix(s, parts[0]) {
		return false
	}
	s = s[len(parts[0]):]
	for _, part := range parts[1 : len(parts)-1] {
		i := strings.Index(s, part)
		if i < 0 {
			return false
		}
		s = s[i+len(part):]
	}
	return strings.HasSuffix(s, parts[len(parts)-1])
}

// permitted returns an error, which wraps errTenant, where the proxy that asks
// may not name the tenant.
func (r *router) permitted(ctx context.Context, id tenants.ID) error {
	if len(r.peers) == 0 {
		return nil
	}
	name := peerOf(ctx)
	if name == "" {
		return fmt.Errorf("%w: the proxy has no ID", errTenant)
	}
	for peer, names := range r.peers {
		if match(peer, name) && MatchAny(names, string(id)) {
			return nil
		}
	}
	return fmt.Errorf("%w: proxy %q may not name tenant %q", errTenant, name, id)
}

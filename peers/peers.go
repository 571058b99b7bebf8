// Package peers says who is at the other end of a connection.
//
// A peer is known by the certificate that it has shown, and meant by patterns of
// such names.
package peers

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
)

// ID returns who a certificate is for: its one URI, as SPIFFE has it, or the
// first of its DNS names where it has no URI. It refuses a certificate with more
// than one URI, one with neither, and an ID that is not printable ASCII.
func ID(cert *x509.Certificate) (string, error) {
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

// Of returns the ID of the peer of a connection; empty where it has shown no
// certificate that was verified. A nil state is that of a plain connection.
func Of(state *tls.ConnectionState) string {
	if state == nil || len(state.VerifiedChains) == 0 || len(state.PeerCertificates) == 0 {
		return ""
	}
	id, err := ID(state.PeerCertificates[0])
	if err != nil {
		return ""
	}
	return id
}

// MatchAny reports whether one of the patterns matches s. In a pattern "*"
// stands for any bytes, also for none.
func MatchAny(patterns []string, s string) bool {
	for _, p := range patterns {
		if Match(p, s) {
			return true
		}
	}
	return false
}

// Match reports whether the pattern matches s.
func Match(pattern, s string) bool {
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

package peers

import (
	"crypto/x509"
	"net/url"
	"path"
	"strings"
	"testing"
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

func TestID(t *testing.T) {
	for _, c := range []struct {
		uris, names []string
		want        string // empty: an error
	}{
		{[]string{"spiffe://example.org/ns/a/sa/envoy"}, nil, "spiffe://example.org/ns/a/sa/envoy"},
		{[]string{"spiffe://example.org/a"}, []string{"envoy.example.com"}, "spiffe://example.org/a"},
		{nil, []string{"Envoy.example.com", "other.example.com"}, "envoy.example.com"},
		{[]string{"spiffe://a/b", "spiffe://a/c"}, []string{"envoy.example.com"}, ""},
		{nil, nil, ""},
		{nil, []string{""}, ""},
		{nil, []string{"envoy\x00.example.com"}, ""},
		{nil, []string{"envoy example"}, ""},
		{nil, []string{"envöy"}, ""},
	} {
		got, err := ID(certificate(c.uris, c.names))
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q, %q: got %q, %v, want %q", c.uris, c.names, got, err, c.want)
		}
	}
}

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"a", "a", true}, {"a", "ab", false}, {"", "", true}, {"", "a", false}, {"*", "", true}, {"*", "x/y", true},
		{"team-*", "team-a", true}, {"team-*", "team", false}, {"*-a", "team-a", true}, {"*-a", "team-b", false},
		{"a*b*c", "abc", true}, {"a*b*c", "a-b-c", true}, {"a*b*c", "a-c-b", false}, {"a*a", "a", false}, {"*a*", "bab", true},
		{"spiffe://x/*/envoy", "spiffe://x/ns/envoy", true}, {"spiffe://x/*", "spiffe://xy/ns", false},
	} {
		if got := Match(c.pattern, c.s); got != c.want {
			t.Errorf("Match(%q, %q): got %t, want %t", c.pattern, c.s, got, c.want)
		}
	}
}

// FuzzMatch compares with path.Match, of which our patterns are a part.
func FuzzMatch(f *testing.F) {
	f.Add("a*b*", "aabb")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if strings.ContainsAny(pattern, `?[\/`) || strings.Contains(s, "/") {
			return
		}
		want, err := path.Match(pattern, s)
		if got := Match(pattern, s); err == nil && got != want {
			t.Errorf("Match(%q, %q): got %t, want %t", pattern, s, got, want)
		}
	})
}

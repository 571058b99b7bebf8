package control_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func pemText(kind string, der []byte, err error) string {
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func public(key any) string {
	der, err := x509.MarshalPKIXPublicKey(key)
	return pemText("PUBLIC KEY", der, err)
}

func private(key any) string {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return pemText("PRIVATE KEY", der, err)
}

// quote writes a text as YAML and JSON do.
func quote(s string) string { return string(must(json.Marshal(s))) }

// signedBundle is an archive that OPA signs, by the key k1 of HS256.
func signedBundle(t *testing.T, secret string) []byte {
	t.Helper()
	text := "package a\n\nallow := true\n"
	b := bundle.Bundle{Data: map[string]any{}, Modules: []bundle.ModuleFile{{
		Path: "/a.rego", URL: "/a.rego", Raw: []byte(text), Parsed: ast.MustParseModule(text),
	}}}
	if secret != "" {
		if err := b.GenerateSignature(bundle.NewSigningConfig(secret, "HS256", ""), "k1", true); err != nil {
			t.Fatal(err)
		}
	}
	var archive bytes.Buffer
	if err := bundle.NewWriter(&archive).UseModulePath(true).DisableFormat(true).Write(b); err != nil {
		t.Fatal(err)
	}
	return archive.Bytes()
}

// TestSigning has each of three bundles fetched, and read from disk, with the
// keys of a configuration; it names the one that is accepted.
func TestSigning(t *testing.T) {
	archives := map[string][]byte{
		"signed": signedBundle(t, "s1"), "other": signedBundle(t, "s2"), "plain": signedBundle(t, ""),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(archives[strings.Trim(r.URL.Path, "/")])
	}))
	defer server.Close()
	const keys = "keys: {k1: {algorithm: HS256, key: s1}, k2: {algorithm: HS256, key: s2}}\n"
	for _, c := range []struct{ name, text, want string }{
		{"no keys", "bundles: {b: {resource: RESOURCE}}", "plain"},
		{"a named key", keys + "bundles: {b: {resource: RESOURCE, signing: {keyid: k1}}}", "signed"},
		{"another named key", keys + "bundles: {b: {resource: RESOURCE, signing: {keyid: k2}}}", "other"},
		{"no signing block", keys + "bundles: {b: {resource: RESOURCE}}", "signed"}, // both name k1
		{"a scope", keys + "bundles: {b: {resource: RESOURCE, signing: {scope: read}}}", ""},
		{"excluded files", keys + "bundles: {b: {resource: RESOURCE, signing: {keyid: k1, exclude_files: ['a*']}}}", "signed"},
		{"keys that only sign", "keys: {k1: {algorithm: HS256, private_key: s1}}\nbundles: {b: {resource: RESOURCE}}", "plain"},
	} {
		for resource, archive := range archives {
			b := mustTenant(t, "services: {s: {url: \""+server.URL+"\"}}\n"+strings.ReplaceAll(c.text, "RESOURCE", resource), "orders").Bundles[0]
			_, err := b.Source.Fetch(t.Context(), b.Resource, "")
			_, readErr := b.Read(bytes.NewReader(archive))
			for _, err := range []error{err, readErr} {
				if ok := err == nil; ok != (c.want == resource) || !ok && !errors.Is(err, bundles.ErrRefused) {
					t.Errorf("%s, %s: got %v, want %q alone to be accepted", c.name, resource, err, c.want)
				}
			}
		}
	}
}

func TestSigningDirectory(t *testing.T) {
	root := t.TempDir()
	for name, secret := range map[string]string{"signed": "s1", "plain": ""} {
		if err := os.WriteFile(filepath.Join(root, name+".tar.gz"), signedBundle(t, secret), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	dir := must(bundles.NewDir(root, bundles.Limits{}))
	template, _, err := parse(t, "keys: {k1: {algorithm: HS256, key: s1}}", control.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"signed": true, "plain": false} {
		b := must(template.Tenant(name)).Bundles[0]
		if _, err := b.Source.Fetch(t.Context(), b.Resource, ""); (err == nil) != want {
			t.Errorf("%s: got %v, want it accepted: %v", name, err, want)
		}
		if b.Read != nil || b.Service == "dir" {
			t.Errorf("got %+v, want an identity with the keys", b)
		}
	}
}

// A feed is shared by identity, so the identity has the verification in it.
func TestSigningIdentity(t *testing.T) {
	service := func(keys, signing string) string {
		t.Helper()
		return mustTenant(t, "services: {s: {url: \"https://example.com\"}}\nkeys: {"+keys+"}\nbundles: {b: {"+signing+"}}", "orders").Bundles[0].Service
	}
	seen := map[string]string{}
	for _, c := range [][2]string{
		{"", ""},
		{"k1: {algorithm: HS256, key: a}", ""},
		{"k1: {algorithm: HS256, key: b}", ""},
		{"k1: {algorithm: HS384, key: a}", ""},
		{"k1: {algorithm: HS256, key: a, scope: x}", ""},
		{"k2: {algorithm: HS256, key: a}", ""},
		{"k1: {algorithm: HS256, key: a}, k2: {algorithm: HS256, key: b}", ""},
		{"k1: {algorithm: HS256, key: a}", "signing: {keyid: k1}"},
		{"k1: {algorithm: HS256, key: a}", "signing: {scope: x}"},
		{"k1: {algorithm: HS256, key: a}", "signing: {exclude_files: [x]}"},
	} {
		id := service(c[0], c[1])
		if other, ok := seen[id]; ok {
			t.Errorf("%q and %q: got one identity", other, c)
		}
		seen[id] = strings.Join(c[:], "; ")
	}
	if service("k1: {algorithm: HS256, key: a}, k2: {algorithm: HS256, key: b}", "signing: {keyid: k1}") !=
		service("k1: {algorithm: HS256, key: a, private_key: x}, k2: {algorithm: HS256, key: c}", "signing: {keyid: k1}") {
		t.Error("another key that is not used: got another identity")
	}
}

func TestKeyFaults(t *testing.T) {
	rsaKey := must(rsa.GenerateKey(rand.Reader, 2048))
	p256 := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	for _, c := range []struct{ keys, signing, want string }{
		{"k: {key: " + quote(public(&rsaKey.PublicKey)) + "}", "", ""},
		{"k: {algorithm: PS384, key: " + quote(private(rsaKey)) + "}", "", ""},
		{"k: {algorithm: RS512, key: " + quote(pemText("RSA PUBLIC KEY", x509.MarshalPKCS1PublicKey(&rsaKey.PublicKey), nil)) + "}", "", ""},
		{"k: {algorithm: ES256, key: " + quote(public(&p256.PublicKey)) + "}", "", ""},
		{"k: {algorithm: HS512, key: secret}", "signing: {keyid: k, exclude_files: ['a/*']}", ""},

		{"k: {algorithm: none, key: secret}", "", `keys.k.algorithm: not supported: "none"`},
		{"k: {algorithm: EdDSA, key: secret}", "", `keys.k.algorithm: not supported: "EdDSA"`},
		{"k: {algorithm: HS256}", "", "keys.k.key: is missing"},
		{"k: {algorithm: HS256, key: 1}", "", "keys.k.key: is not a string"},
		{"k: {algorithm: HS256, key: secret, kind: x}", "", "keys.k.kind: unknown or unsupported key"},
		{"k: secret", "", "keys.k: is not a mapping"},
		{"k: {algorithm: HS256, key: " + quote(public(&rsaKey.PublicKey)) + "}", "", "keys.k.key: is a PUBLIC KEY, and HS256 takes a secret"},
		{"k: {key: secret}", "", "keys.k.key: is not PEM, which RS256 takes"},
		{"k: {key: " + quote(pemText("PUBLIC KEY", []byte("secret"), nil)) + "}", "", "keys.k.key: is not a public key"},
		{"k: {key: " + quote(pemText("SECRET", []byte("secret"), nil)) + "}", "", "keys.k.key: is PEM of a kind that is no key"},
		{"k: {key: " + quote(public(&p256.PublicKey)) + "}", "", "keys.k.key: is not a key that RS256 takes"},
		{"k: {algorithm: ES256, key: " + quote(public(&rsaKey.PublicKey)) + "}", "", "keys.k.key: is not a key that ES256 takes"},
		{"k: {algorithm: ES256, key: " + quote(private(edKey)) + "}", "", "keys.k.key: is not a key that ES256 takes"},
		{"k: {algorithm: ES256, key: " + quote(public(&p384.PublicKey)) + "}", "", "keys.k.key: is a key on curve P-384, and ES256 takes P-256"},
		{"k: {algorithm: HS256, key: secret}", "signing: {keyid: l}", `bundles.b.signing.keyid: no key "l" to verify with`},
		{"k: {algorithm: HS256, private_key: secret}, l: {algorithm: HS256, key: x}", "signing: {keyid: k}", `bundles.b.signing.keyid: no key "k" to verify with`},
		{"", "signing: {keyid: k}", "bundles.b.signing: there are no keys to verify with"},
		{"k: {algorithm: HS256, key: secret}", "signing: {exclude_files: ['[']}", "bundles.b.signing.exclude_files[0]: is not a pattern"},
		{"k: {algorithm: HS256, key: secret}", "signing: {key: k}", "bundles.b.signing.key: unknown or unsupported key"},
	} {
		_, _, err := parse(t, "services: {s: {url: \"https://example.com\"}}\nkeys: {"+c.keys+"}\nbundles: {b: {"+c.signing+"}}", control.Options{})
		if c.want == "" {
			if err != nil {
				t.Errorf("%s: %v", c.keys, err)
			}
			continue
		}
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(strings.ReplaceAll(err.Error(), "takes a secret", ""), "secret") {
			t.Errorf("%s, %s: got %v, want %q and no secret", c.keys, c.signing, err, c.want)
		}
	}
}

func TestKeyNotes(t *testing.T) {
	_, notes, err := parse(t, common+"keys: {k: {algorithm: HS256, key: a, private_key: b}}", control.Options{})
	if err != nil || len(notes) != 1 || notes[0].Path != "keys.k.private_key" {
		t.Errorf("got notes %v, %v, want one on keys.k.private_key", notes, err)
	}
}

func TestPersist(t *testing.T) {
	text := `
services: {s: {url: "https://example.com"}}
bundles: {b: {persist: true}}
`
	if _, _, err := parse(t, text, control.Options{}); err == nil || !strings.Contains(err.Error(), "bundles.b.persist:") {
		t.Errorf("got %v, want a fault", err)
	}
	if _, _, err := parse(t, text, control.Options{KeepArchive: true}); err != nil {
		t.Error(err)
	}
}

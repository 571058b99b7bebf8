package bundles_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/keys"
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// signer is a key with both halves.
type signer struct{ algorithm, private, public string }

var hs256 = signer{"HS256", "a secret of the two of us", "a secret of the two of us"}

var rs256 = sync.OnceValue(func() signer {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return signer{"RS256", pemText("PRIVATE KEY", key), pemText("PUBLIC KEY", &key.PublicKey)}
})

var es256 = sync.OnceValue(func() signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return signer{"ES256", pemText("PRIVATE KEY", key), pemText("PUBLIC KEY", &key.PublicKey)}
})

func pemText(kind string, key any) string {
	marshal := x509.MarshalPKIXPublicKey
	if kind == "PRIVATE KEY" {
		marshal = x509.MarshalPKCS8PrivateKey
	}
	der, err := marshal(key)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func (s signer) key() *keys.Config {
	return &keys.Config{Key: s.public, Algorithm: s.algorithm}
}

// verify verifies with one key, of id k1.
func (s signer) verify() *bundle.VerificationConfig {
	return bundle.NewVerificationConfig(map[string]*keys.Config{"k1": s.key()}, "k1", "", nil)
}

// hashes lists files as a signature does.
func (f files) hashes(t testing.TB) []bundle.FileInfo {
	t.Helper()
	hasher, err := bundle.NewSignatureHasher(bundle.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	var out []bundle.FileInfo
	for _, name := range slices.Sorted(maps.Keys(f)) {
		var value any = []byte(f[name])
		if bundle.IsStructuredDoc(name) {
			if err := util.Unmarshal([]byte(f[name]), &value); err != nil {
				t.Fatal(err)
			}
		}
		sum, err := hasher.HashFile(value)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, bundle.NewFile(name, hex.EncodeToString(sum), "SHA-256"))
	}
	return out
}

// signed returns f with a signature of its files by s.
func (f files) signed(t testing.TB, s signer) files {
	t.Helper()
	return f.withSignature(s.token(t, f.hashes(t), "k1", nil))
}

func (f files) withSignature(token string) files {
	return f.with(".signatures.json", `{"signatures":["`+token+`"]}`)
}

func (f files) without(name string) files {
	g := maps.Clone(f)
	delete(g, name)
	return g
}

// token signs with OPA's signer. Claims go instead of the key's id.
func (s signer) token(t testing.TB, infos []bundle.FileInfo, keyID string, claims map[string]any) string {
	t.Helper()
	path := ""
	if claims != nil {
		path = filepath.Join(t.TempDir(), "claims.json")
		text, err := json.Marshal(claims)
		if err != nil {
			t.Fatal(err)
		}
		mustWrite(t, path, string(text))
	}
	token, err := bundle.GenerateSignedToken(infos, bundle.NewSigningConfig(s.private, s.algorithm, path), keyID)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// rawToken signs any header with HMAC.
func rawToken(t testing.TB, header, claims map[string]any, secret string) string {
	t.Helper()
	part := func(v any) string {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(text)
	}
	token := part(header) + "." + part(claims)
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(token))
	return token + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

func readVerified(archive []byte, verify *bundle.VerificationConfig) (*bundles.Bundle, error) {
	return bundles.ReadVerified(bytes.NewReader(archive), "orders", bundles.Limits{}, verify)
}

var plain = orders.without("limits/README.md")

func TestVerified(t *testing.T) {
	t.Parallel()
	want := mustRead(t, plain.tarball(t)).Digest
	for _, s := range []signer{hs256, rs256(), es256()} {
		accept := func(name string, content files, verify *bundle.VerificationConfig) {
			t.Helper()
			b, err := readVerified(content.tarball(t), verify)
			if err != nil {
				t.Errorf("%s, %s: %v", s.algorithm, name, err)
			} else if b.Digest != want && !strings.Contains(name, "other") {
				t.Errorf("%s, %s: got another digest than without a signature", s.algorithm, name)
			}
		}
		all := map[string]*keys.Config{"k0": es256().key(), "k1": s.key()}
		accept("the key is named", plain.signed(t, s), s.verify())
		accept("the signature names it", plain.signed(t, s), bundle.NewVerificationConfig(all, "", "", nil))
		accept("another id in the signature", plain.withSignature(s.token(t, plain.hashes(t), "k9", nil)), s.verify())
		accept("scope of the bundle", plain.withSignature(s.token(t, plain.hashes(t), "k1", map[string]any{"scope": "read"})),
			bundle.NewVerificationConfig(all, "k1", "read", nil))
		scoped := s.key()
		scoped.Scope = "read"
		accept("scope of the key", plain.withSignature(s.token(t, plain.hashes(t), "k1", map[string]any{"scope": "read"})),
			bundle.NewVerificationConfig(map[string]*keys.Config{"k1": scoped}, "", "", nil))
		accept("signed files that OPA does not read", orders.signed(t, s), s.verify())
		accept("excluded, not signed: other", plain.signed(t, s).with("notes/x.txt", "-").with("extra/data.json", "{}").with(".manifest", `{}`),
			bundle.NewVerificationConfig(all, "k1", "", []string{"notes/*", "extra/data.json", ".manifest"}))
		accept("excluded, signed, changed: other", plain.signed(t, s).with("limits/data.json", `{"boss":"eve"}`),
			bundle.NewVerificationConfig(all, "k1", "", []string{"limits/*"}))
		accept("excluded, signed, not there: other", plain.signed(t, s).without("limits/data.json"),
			bundle.NewVerificationConfig(all, "k1", "", []string{"limits/data.json"}))
		accept("same data, other bytes: other", plain.signed(t, s).with("limits/data.json", "{ \"boss\": \"\\u0061lice\" }\n"), s.verify())
	}
}

// TestVerifiedAsOPA reads what OPA has signed and written.
func TestVerifiedAsOPA(t *testing.T) {
	t.Parallel()
	for _, protobuf := range []bool{false, true} {
		text := "package a\n\nallow if data.b.n == 12\n"
		src := bundle.Bundle{
			Manifest: bundle.Manifest{Revision: "r7", Roots: &[]string{"a", "b"}, Metadata: map[string]any{"team": "orders"}},
			Data:     map[string]any{"b": map[string]any{"n": json.Number("12")}},
			Modules: []bundle.ModuleFile{{
				Path: "/a/x.rego", URL: "/a/x.rego", Raw: []byte(text), Parsed: ast.MustParseModule(text),
			}},
		}
		src.SetManifestProto(protobuf)
		if err := src.GenerateSignature(bundle.NewSigningConfig(rs256().private, "RS256", ""), "k1", true); err != nil {
			t.Fatal(err)
		}
		var archive bytes.Buffer
		if err := bundle.NewWriter(&archive).UseModulePath(true).DisableFormat(true).Write(src); err != nil {
			t.Fatal(err)
		}
		b, err := readVerified(archive.Bytes(), rs256().verify())
		if err != nil {
			t.Fatal(err)
		}
		if len(b.Bundle.Modules) != 1 || b.Bundle.Manifest.Revision != "r7" {
			t.Errorf("got %d modules, revision %q", len(b.Bundle.Modules), b.Bundle.Manifest.Revision)
		}
		if _, err := readVerified(archive.Bytes(), es256().verify()); !errors.Is(err, bundles.ErrRefused) {
			t.Errorf("another key: got %v, want ErrRefused", err)
		}
	}
}

func TestVerifiedRefuses(t *testing.T) {
	t.Parallel()
	rs := rs256()
	good := plain.signed(t, rs)
	claims := func() map[string]any { return map[string]any{"files": plain.hashes(t), "keyid": "k1"} }
	weak := plain.hashes(t)
	weak[0].Algorithm = "MD5"
	// What signs a manifest says nothing of what stands in it twice.
	twice := plain.with(".manifest", `{"metadata":{"a":1},"revision":"r1","roots":["orders","limits"],"metadata":{"b":2}}`)
	noKeys := bundle.NewVerificationConfig(nil, "", "", nil)
	emptyHMAC := bundle.NewVerificationConfig(map[string]*keys.Config{"k1": {PrivateKey: "x", Algorithm: "HS256"}}, "k1", "", nil)
	unknown := bundle.NewVerificationConfig(map[string]*keys.Config{"k1": {Key: rs.public, Algorithm: "none"}}, "k1", "", nil)
	optional := rs.verify().WithOptionalSignature()
	optional.AllowUnsignedDeltaBundles = true
	byKid := bundle.NewVerificationConfig(map[string]*keys.Config{"k1": rs.key()}, "", "", nil)

	for _, test := range []struct {
		name    string
		content files
		verify  *bundle.VerificationConfig
		want    string
	}{
		{"not signed", plain, rs.verify(), "it is not signed"},
		{"not signed, no key id", plain, byKid, "it is not signed"},
		{"not signed, said to be optional", plain, optional, "it is not signed"},
		{"a delta", files{"patch.json": `{"data":[]}`}, optional, "it is a delta bundle, and keys are configured"},
		{"a signed delta", files{"patch.json": `{"data":[]}`}.signed(t, rs), optional, "it is a delta bundle, and keys are configured"},
		{"nothing but a signature", files{}.signed(t, rs), rs.verify(), "no policy and no data"},
		{"no keys", good, noKeys, "not found"},
		{"a key of another kind", good, es256().verify(), "its signature"},
		{"another key", good, signer{"RS256", "", pemText("PUBLIC KEY", &must(rsa.GenerateKey(rand.Reader, 2048)).PublicKey)}.verify(), "verif"},
		{"an id that is not there", good, bundle.NewVerificationConfig(byKid.PublicKeys, "k2", "", nil), "not found"},
		{"the signature's id is not there", plain.withSignature(rs.token(t, plain.hashes(t), "k2", nil)), byKid, "not found"},
		{"no id at all", plain.withSignature(rs.token(t, plain.hashes(t), "", map[string]any{"x": 1})), byKid, "key ID is empty"},
		{"changed Rego", good.with("orders/rule.rego", "package orders\n\nallow := true\n"), rs.verify(), "digest mismatch"},
		{"changed data", good.with("limits/data.json", `{"boss":"eve"}`), rs.verify(), "digest mismatch"},
		{"changed manifest", good.with(".manifest", `{"revision":"r2","roots":["orders","limits"]}`), rs.verify(), "digest mismatch"},
		{"added Rego", good.with("orders/more.rego", "package orders\n"), rs.verify(), "not included in bundle signature"},
		{"added data", good.with("orders/data.yaml", "a: 1"), rs.verify(), "not included in bundle signature"},
		{"added, not read", good.with("orders/README.md", "hello"), rs.verify(), "not included in bundle signature"},
		{"removed", good.without("limits/data.json"), rs.verify(), `1 files are signed and not there, "limits/data.json"`},
		{"moved", good.without("limits/data.json").with("orders/data.json", plain["limits/data.json"]), rs.verify(), "not included"},
		{"scope missing", good, bundle.NewVerificationConfig(byKid.PublicKeys, "k1", "read", nil), "scope mismatch"},
		{"scope too much", plain.withSignature(rs.token(t, plain.hashes(t), "k1", map[string]any{"scope": "read"})), rs.verify(), "scope mismatch"},
		{"a second signatures file", good.with("orders/.signatures.json", good[".signatures.json"]), rs.verify(), "more than one signatures file"},
		{"signatures elsewhere", good.without(".signatures.json").with("orders/.signatures.json", good[".signatures.json"]), rs.verify(), "its signatures file is"},
		{"no signature in it", plain.with(".signatures.json", `{"signatures":[]}`), rs.verify(), "missing JWT"},
		{"an empty document", plain.with(".signatures.json", `{}`), rs.verify(), "missing JWT"},
		{"two documents", plain.with(".signatures.json", good[".signatures.json"]+`{}`), rs.verify(), "invalid character"},
		{"two signatures", plain.with(".signatures.json", `{"signatures":["a","b"]}`), rs.verify(), "multiple JWTs"},
		{"a plugin", plain.with(".signatures.json", `{"signatures":["a"],"plugin":"p"}`), rs.verify(), "plugin"},
		{"no JWT", plain.withSignature("garbage"), rs.verify(), "its signature"},
		{"alg none", plain.withSignature(strings.TrimRight(rawToken(t, map[string]any{"alg": "none", "kid": "k1"}, claims(), ""), "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")), rs.verify(), "its signature"},
		{"public key as secret", plain.withSignature(rawToken(t, map[string]any{"alg": "HS256", "kid": "k1"}, claims(), rs.public)), rs.verify(), "its signature"},
		{"another algorithm in the header", plain.withSignature(rawToken(t, map[string]any{"alg": "none", "kid": "k1"}, claims(), hs256.private)), hs256.verify(), `names algorithm "none"`},
		{"critical extensions", plain.withSignature(rawToken(t, map[string]any{"alg": "HS256", "crit": []string{"b64"}}, claims(), hs256.private)), hs256.verify(), "critical"},
		{"a key without a secret", plain.withSignature(rawToken(t, map[string]any{"alg": "HS256"}, claims(), "")), emptyHMAC, "not found"},
		{"a key without an algorithm", good, unknown, "not found"},
		{"a weak hash", plain.withSignature(rs.token(t, weak, "k1", nil)), rs.verify(), "hash of MD5"},
		{"a key twice in the manifest", twice.signed(t, rs), rs.verify(), `"metadata" twice`},
		{"two values in data", good.with("limits/data.json", plain["limits/data.json"]+" null"), rs.verify(), "not one JSON document"},
		{"two values in the manifest", good.with(".manifest", plain[".manifest"]+" {}"), rs.verify(), "not one JSON document"},
		{"a pattern that is none", good.with("x[.txt", "-"), bundle.NewVerificationConfig(byKid.PublicKeys, "k1", "", []string{"x[.txt", "["}), "not included"},
		{"excluded above", good.with("a/b/c.txt", "-"), bundle.NewVerificationConfig(byKid.PublicKeys, "k1", "", []string{"a/*", "*"}), "not included"},
		{"no keys are given", good, nil, "verification key not provided"},
	} {
		_, err := readVerified(test.content.tarball(t), test.verify)
		if !errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want ErrRefused with %q", test.name, err, test.want)
		}
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Each source verifies, as archives and as folders, and gives the same digest.
func TestSourcesVerify(t *testing.T) {
	t.Parallel()
	rs := rs256()
	good, bad := plain.signed(t, rs), plain.signed(t, rs).with("limits/data.json", `{"boss":"eve"}`)
	check := func(kind string, s shelf, source bundles.Source) {
		s.put(t, "good", good)
		s.put(t, "bad", bad)
		s.put(t, "unsigned", plain)
		b, err := source.Fetch(t.Context(), s.asked("good"), "")
		if err != nil {
			t.Errorf("%s: %v", kind, err)
		} else if b.Digest != mustRead(t, plain.tarball(t)).Digest {
			t.Errorf("%s: got another digest", kind)
		}
		for _, name := range []string{"bad", "unsigned"} {
			if _, err := source.Fetch(t.Context(), s.asked(name), ""); !errors.Is(err, bundles.ErrRefused) {
				t.Errorf("%s, %s: got %v, want ErrRefused", kind, name, err)
			}
		}
		if _, err := s.source().Fetch(t.Context(), s.asked("good"), ""); !errors.Is(err, bundles.ErrRefused) {
			t.Errorf("%s, without keys: got %v, want ErrRefused", kind, err)
		}
	}
	for _, archives := range []bool{false, true} {
		s := newDirShelf(t, archives).(*dirShelf)
		check("Dir", s, s.dir.Verified(rs.verify()))
	}
	s := newHTTPShelf(t).(*httpShelf)
	check("HTTP", s, bundles.NewHTTP(bundles.HTTPConfig{URL: s.server.URL + "/v1/", Verify: rs.verify()}))
}

// A bundle on disk is verified again, with the keys of the day.
func TestStoreVerifies(t *testing.T) {
	t.Parallel()
	rs := rs256()
	shelf := newHTTPShelf(t).(*httpShelf)
	shelf.put(t, "orders", plain.signed(t, rs))
	source := func(s signer) *bundles.HTTP {
		return bundles.NewHTTP(bundles.HTTPConfig{URL: shelf.server.URL, Verify: s.verify(), KeepArchive: true})
	}
	b, err := source(rs).Fetch(t.Context(), shelf.asked("orders"), "")
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(b.Archive)) != b.Size {
		t.Errorf("got an archive of %d bytes, want %d", len(b.Archive), b.Size)
	}
	store := mustStore(t, t.TempDir())
	mustSave(t, store, "key", b)
	load := func(h *bundles.HTTP) (*bundles.Saved, error) {
		return store.Load("key", func(r io.Reader) (*bundles.Bundle, error) { return h.Read(r, b.Name) })
	}
	if _, err := load(source(es256())); !errors.Is(err, bundles.ErrRefused) || errors.Is(err, bundles.ErrCorrupt) {
		t.Errorf("another key: got %v, want ErrRefused", err)
	}
	if got, err := load(source(rs)); err != nil || got.Digest != b.Digest || got.ETag != b.ETag {
		t.Errorf("the same key: got %v, want the bundle", err)
	}
}

func FuzzReadVerified(f *testing.F) {
	rs := rs256()
	signature := plain.signed(f, rs)[".signatures.json"]
	f.Add(signature, plain[".manifest"], plain["limits/data.json"])
	f.Add(`{"signatures":["a.b.c"]}`, `{}`, `{}`)
	want := mustRead(f, plain.tarball(f))
	f.Fuzz(func(t *testing.T, signatures, manifest, data string) {
		content := plain.with(".signatures.json", signatures).with(".manifest", manifest).with("limits/data.json", data)
		b, err := readVerified(content.tarball(t), rs.verify())
		if err != nil {
			if !errors.Is(err, bundles.ErrRefused) {
				t.Errorf("got %v, want ErrRefused", err)
			}
			return
		}
		if !b.Bundle.Manifest.Equal(want.Bundle.Manifest) || !bytes.Equal(
			must(json.Marshal(b.Bundle.Data)), must(json.Marshal(want.Bundle.Data))) {
			t.Errorf("got another content verified: %s, %s", manifest, data)
		}
	})
}

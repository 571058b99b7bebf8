package httpserve_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lestrrat-go/jwx/v3/jwk"
	"github.com/lestrrat-go/jwx/v3/jws/jwsbb"

	"github.com/gatehouse-authz/gatehouse/httpserve"
)

// issuer signs tokens and gives its keys.
type issuer struct {
	t       testing.TB
	fetches atomic.Int32

	mu   sync.Mutex
	keys map[string]crypto.Signer // :: key ID → key; guarded by mu
	down bool                     // guarded by mu
	body string                   // instead of the keys; guarded by mu
}

func newIssuer(t testing.TB) *issuer {
	i := &issuer{t: t, keys: map[string]crypto.Signer{}}
	return i
}

// rsaKey is one for all tests: making it takes long.
var rsaKey = sync.OnceValue(func() *rsa.PrivateKey {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		panic(err)
	}
	return key
})

func ecKey(t testing.TB) crypto.Signer {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (i *issuer) set(id string, key crypto.Signer) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.keys[id] = key
}

func (i *issuer) change(f func()) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f()
}

// ServeHTTP gives the public keys.
func (i *issuer) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	i.fetches.Add(1)
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case i.down:
		w.WriteHeader(http.StatusBadGateway)
		return
	case i.body != "":
		_, _ = w.Write([]byte(i.body))
		return
	}
	set := jwk.NewSet()
	for id, key := range i.keys {
		k, err := jwk.Import(key.Public())
		if err == nil && id != "" {
			err = k.Set("kid", id)
		}
		if err == nil {
			err = set.AddKey(k)
		}
		if err != nil {
			i.t.Error(err)
		}
	}
	_ = json.NewEncoder(w).Encode(set)
}

// sign makes a token of these texts, as they stand.
func sign(t testing.TB, key any, alg, header, claims string) string {
	t.Helper()
	signed := base64.RawURLEncoding.EncodeToString([]byte(header)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims))
	signature, err := jwsbb.Sign(key, alg, []byte(signed), nil)
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

func claims(changes ...string) string {
	now := time.Now()
	all := map[string]any{"iss": "https://issuer.example.com", "aud": "orders", "sub": "alice", "exp": now.Add(time.Hour).Unix()}
	for i := 0; i < len(changes); i += 2 {
		if changes[i+1] == "" {
			delete(all, changes[i])
			continue
		}
		all[changes[i]] = json.RawMessage(changes[i+1])
	}
	text, err := json.Marshal(all)
	if err != nil {
		panic(err)
	}
	return string(text)
}

const whoami = "package app\n\nx := 1"

const jwtConfig = `
data: [app/x]
auth: {jwt: {issuer: "https://issuer.example.com", audiences: [orders, web], jwks_url: %q, cookie: __Host-session}}
cors: {origins: ["https://app.example.com"]}
`

// asked is a server of a tenant that takes tokens of the issuer.
func asked(t testing.TB, i *issuer) http.Handler {
	p, _ := pool(t, whoami, fmt.Sprintf(jwtConfig, "http://127.0.0.1:1/keys"), nil)
	return server(t, httpserve.Config{Pool: p, Client: &http.Client{Transport: direct{i}}})
}

// direct answers requests by a handler.
type direct struct{ http.Handler }

func (d direct) RoundTrip(r *http.Request) (*http.Response, error) {
	w := httptest.NewRecorder()
	d.ServeHTTP(w, r)
	return w.Result(), r.Context().Err()
}

func ask(h http.Handler, method string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "/t/orders/v1/data/app/x", nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func bearer(h http.Handler, token string) int {
	return ask(h, http.MethodGet, "Authorization", "Bearer "+token).Code
}

func TestTokens(t *testing.T) {
	i := newIssuer(t)
	ec, other := ecKey(t), ecKey(t)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	i.set("rsa", rsaKey())
	i.set("ec", ec)
	i.set("ed", ed)
	h := asked(t, i)
	now := time.Now()
	at := func(d time.Duration) string { return fmt.Sprint(now.Add(d).Unix()) }
	public, err := x509.MarshalPKIXPublicKey(rsaKey().Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + base64.RawURLEncoding.EncodeToString([]byte(claims())) + "."
	good := sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims())

	for _, c := range []struct {
		name, token string
		want        int
	}{
		{"RS256", sign(t, rsaKey(), "RS256", `{"alg":"RS256","kid":"rsa"}`, claims()), 200},
		{"ES256", good, 200},
		{"EdDSA", sign(t, ed, "EdDSA", `{"alg":"EdDSA","kid":"ed","typ":"JWT"}`, claims()), 200},
		{"no key ID", sign(t, ec, "ES256", `{"alg":"ES256"}`, claims()), 200},
		{"audience in a list", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("aud", `["x","web"]`)), 200},

		{"an algorithm that is not listed", sign(t, rsaKey(), "RS512", `{"alg":"RS512","kid":"rsa"}`, claims()), 401},
		{"none", unsigned, 401},
		{"None", strings.Replace(unsigned, "eyJhbGciOiJub25lIn0", base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"None"}`)), 1), 401},
		{"a public key as a secret", sign(t, publicPEM, "HS256", `{"alg":"HS256","kid":"rsa"}`, claims()), 401},
		{"another algorithm than the key's", sign(t, ec, "ES256", `{"alg":"RS256","kid":"ec"}`, claims()), 401},
		{"another's key", sign(t, other, "ES256", `{"alg":"ES256","kid":"ec"}`, claims()), 401},
		{"another's key in jku, jwk and x5u", sign(t, other, "ES256", `{"alg":"ES256","kid":"ec","jku":"http://127.0.0.1:1/mine","x5u":"http://127.0.0.1:1/x","jwk":{"kty":"EC"}}`, claims()), 401},
		{"a key ID that is a path", sign(t, ec, "ES256", `{"alg":"ES256","kid":"../../dev/null"}`, claims()), 401},
		{"a key ID that is not known", sign(t, ec, "ES256", `{"alg":"ES256","kid":"new"}`, claims()), 401},
		{"a key ID that is long", sign(t, ec, "ES256", `{"alg":"ES256","kid":"`+strings.Repeat("x", 300)+`"}`, claims()), 401},
		{"a jku that is not looked at", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec","jku":"http://127.0.0.1:1/mine"}`, claims()), 200},
		{"crit", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec","crit":["exp"]}`, claims()), 401},
		{"b64", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec","b64":false}`, claims()), 401},
		{"alg twice", sign(t, ec, "ES256", `{"alg":"ES256","alg":"none","kid":"ec"}`, claims()), 401},

		{"another issuer", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("iss", `"https://evil.example.com"`)), 401},
		{"no issuer", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("iss", "")), 401},
		{"another audience", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("aud", `"payments"`)), 401},
		{"no audience", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("aud", "")), 401},
		{"an audience that is none", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("aud", `["orders", 1]`)), 401},
		{"no expiry", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("exp", "")), 401},
		{"an expiry that is none", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("exp", `"tomorrow"`)), 401},
		{"an expiry far away", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("exp", "253402300799")), 200},
		{"an expiry beyond", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("exp", "1e300")), 401},
		{"expired within the leeway", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("exp", at(-20*time.Second))), 200},
		{"expired", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("exp", at(-40*time.Second))), 401},
		{"soon, within the leeway", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("nbf", at(20*time.Second))), 200},
		{"not yet", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("nbf", at(50*time.Second))), 401},
		{"no subject", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("sub", "")), 401},
		{"an empty subject", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("sub", `""`)), 401},
		{"a subject with a control character", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("sub", `"a\u0000"`)), 401},
		{"a subject twice", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, strings.Replace(claims(), `"sub":"alice"`, `"sub":"alice","sub":"admin"`, 1)), 401},
		{"a claim twice below", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("x", `{"role":"user","role":"admin"}`)), 401},
		{"claims that are no object", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, `["alice"]`), 401},

		{"two parts", good[:strings.LastIndexByte(good, '.')], 401},
		{"four parts", good + ".x", 401},
		{"a changed claim", func() string {
			parts := strings.Split(good, ".")
			parts[1] = base64.RawURLEncoding.EncodeToString([]byte(claims("sub", `"admin"`)))
			return strings.Join(parts, ".")
		}(), 401},
		{"padding", strings.Replace(good, ".", "=.", 1), 401},
		{"1 MB", sign(t, ec, "ES256", `{"alg":"ES256","kid":"ec"}`, claims("x", `"`+strings.Repeat("x", 1<<20)+`"`)), 401},
		{"no token at all", "x", 401},
	} {
		if got := bearer(h, c.token); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

// A token in the cookie counts as one in the header. A browser sends the cookie
// with the requests of any page, so that those that change something must come
// from a page that may ask.
func TestCookie(t *testing.T) {
	i := newIssuer(t)
	key := ecKey(t)
	i.set("k", key)
	h := asked(t, i)
	token := sign(t, key, "ES256", `{"alg":"ES256","kid":"k"}`, claims())
	other := sign(t, key, "ES256", `{"alg":"ES256","kid":"k"}`, claims("sub", `"bob"`))
	cookie := "__Host-session=" + token
	for _, c := range []struct {
		name, method string
		header       []string
		want         int
	}{
		{"cookie", "GET", []string{"Cookie", cookie}, 200},
		{"another cookie", "GET", []string{"Cookie", "session=" + token}, 401},
		{"both the same", "GET", []string{"Cookie", cookie, "Authorization", "Bearer " + token}, 200},
		{"both, and not the same", "GET", []string{"Cookie", cookie, "Authorization", "Bearer " + other}, 401},
		{"the cookie twice", "GET", []string{"Cookie", cookie + "; __Host-session=" + other}, 401},
		{"no page", "POST", []string{"Cookie", cookie}, 200},
		{"own page", "POST", []string{"Cookie", cookie, "Origin", "https://example.com"}, 200},
		{"a named page", "POST", []string{"Cookie", cookie, "Origin", "https://app.example.com"}, 200},
		{"a foreign page", "POST", []string{"Cookie", cookie, "Origin", "https://evil.example.com"}, 403},
		{"a page of no origin", "POST", []string{"Cookie", cookie, "Origin", "null"}, 403},
		{"a foreign page by another header", "POST", []string{"Cookie", cookie, "Sec-Fetch-Site", "cross-site"}, 403},
		{"a sibling page", "POST", []string{"Cookie", cookie, "Sec-Fetch-Site", "same-site"}, 403},
		{"own page by another header", "POST", []string{"Cookie", cookie, "Sec-Fetch-Site", "same-origin"}, 200},
		{"a foreign page with a token of its own", "POST", []string{"Authorization", "Bearer " + token, "Origin", "https://evil.example.com"}, 200},
	} {
		if got := ask(h, c.method, c.header...); got.Code != c.want {
			t.Errorf("%s: got %d %s, want %d", c.name, got.Code, got.Body, c.want)
		}
	}
}

// Keys are fetched once however many wait, again for a new key ID, and not again
// and again for one that nobody has.
func TestKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newIssuer(t)
		first, second := ecKey(t), ecKey(t)
		i.set("1", first)
		h := asked(t, i)
		token := func(key crypto.Signer, id string) string {
			return sign(t, key, "ES256", `{"alg":"ES256","kid":"`+id+`"}`, claims())
		}
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if got := bearer(h, token(first, "1")); got != 200 {
					t.Errorf("got %d", got)
				}
			})
		}
		wg.Wait()
		if got := i.fetches.Load(); got != 1 {
			t.Errorf("got %d fetches of the keys for 20 at once, want 1", got)
		}
		for n := range 20 {
			if got := bearer(h, token(second, fmt.Sprint("forged", n))); got != 401 {
				t.Errorf("got %d for a key that nobody has", got)
			}
		}
		if got := i.fetches.Load(); got != 1 {
			t.Errorf("got %d fetches, want none for unknown key IDs right after the first", got)
		}

		time.Sleep(31 * time.Second)
		i.set("2", second)
		if got := bearer(h, token(second, "2")); got != 200 {
			t.Errorf("got %d for a new key", got)
		}
		for n := range 20 {
			bearer(h, token(second, fmt.Sprint("forged", n)))
		}
		if got := i.fetches.Load(); got != 2 {
			t.Errorf("got %d fetches, want 2", got)
		}

		// The first is taken back: it is gone at the next fetch.
		i.change(func() { delete(i.keys, "1") })
		time.Sleep(6 * time.Minute)
		bearer(h, token(second, "2"))
		synctest.Wait()
		if got := bearer(h, token(first, "1")); got != 401 {
			t.Errorf("got %d for a key that was taken back", got)
		}

		// The issuer is away: what was good stays good, for a day.
		for _, wrong := range []string{"down", "<html>", `{"keys":[]}`, `{"keys":[{"kty":"oct","k":"c2VjcmV0"}]}`, `{"keys":"x"}`, strings.Repeat(" ", 2<<20)} {
			i.change(func() { i.down, i.body = wrong == "down", wrong })
			time.Sleep(2 * time.Hour)
			if got := bearer(h, token(second, "2")); got != 200 {
				t.Errorf("got %d while the issuer gives %.20q", got, wrong)
			}
		}
		time.Sleep(25 * time.Hour)
		if got := ask(h, "GET", "Authorization", "Bearer "+token(second, "2")); got.Code != 503 || got.Header().Get("Retry-After") == "" {
			t.Errorf("got %d, Retry-After %q, after a day without keys", got.Code, got.Header().Get("Retry-After"))
		}
		i.change(func() { i.down, i.body = false, "" })
		time.Sleep(6 * time.Second)
		if got := bearer(h, token(second, "2")); got != 200 {
			t.Errorf("got %d when the issuer is back", got)
		}
	})
}

func TestSecret(t *testing.T) {
	secret := "0123456789abcdef0123456789abcdef"
	p, _ := pool(t, whoami, `{data: [app/x], auth: {jwt: {issuer: "https://issuer.example.com", audiences: [orders], secret: "`+secret+`"}}}`, nil)
	h := server(t, httpserve.Config{Pool: p})
	if got := bearer(h, sign(t, []byte(secret), "HS256", `{"alg":"HS256"}`, claims())); got != 200 {
		t.Errorf("got %d", got)
	}
	for name, token := range map[string]string{
		"another secret":    sign(t, []byte(secret+"x"), "HS256", `{"alg":"HS256"}`, claims()),
		"another algorithm": sign(t, []byte(secret), "HS512", `{"alg":"HS512"}`, claims()),
		"a private key":     sign(t, ecKey(t), "ES256", `{"alg":"ES256"}`, claims()),
	} {
		if got := bearer(h, token); got != 401 {
			t.Errorf("%s: got %d", name, got)
		}
	}
}

// A tenant that does not say who may ask is not asked on a listener that others
// reach, and only under this machine's own names on one that they do not.
func TestOpen(t *testing.T) {
	p, _ := pool(t, whoami, "{data: [app/x]}", nil)
	var log strings.Builder
	public := server(t, httpserve.Config{Pool: p, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for range 3 {
		if got := ask(public, "GET"); got.Code != 403 || !strings.Contains(got.Body.String(), "does not say who may ask") {
			t.Errorf("got %d %s", got.Code, got.Body)
		}
	}
	if n := strings.Count(log.String(), "tenant refused over HTTP"); n != 1 {
		t.Errorf("got %d lines in the log, want one:\n%s", n, log.String())
	}
	local := server(t, httpserve.Config{Pool: p, Local: true, URL: "https://authz.example.com"})
	for host, want := range map[string]int{
		"localhost:8181": 200, "127.0.0.1:8181": 200, "[::1]:8181": 200, "localhost": 200, "[::1]": 200,
		"authz.example.com": 200, "evil.example.com": 421, "evil.example.com:8181": 421,
	} {
		r := httptest.NewRequest("GET", "/t/orders/v1/data/app/x", nil)
		r.Host = host
		w := httptest.NewRecorder()
		local.ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("%s: got %d, want %d", host, w.Code, want)
		}
	}
}

// withPeer gives a request a certificate with this URI.
func withPeer(r *http.Request, id string, verified bool) {
	u, err := url.Parse(id)
	if err != nil {
		panic(err)
	}
	cert := &x509.Certificate{URIs: []*url.URL{u}}
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}
	if verified {
		r.TLS.VerifiedChains = [][]*x509.Certificate{{cert}}
	}
}

func TestPeers(t *testing.T) {
	p, _ := pool(t, whoami, `{data: [app/x], auth: {mtls: ["spiffe://example.org/ns/shop/*"], headers: {subject: x-user}}}`, nil)
	h := server(t, httpserve.Config{Pool: p, TrustedPeers: []string{"spiffe://example.org/envoy", "10.0.0.0/8", "2001:db8::1"}})
	for _, c := range []struct {
		name, peer string
		verified   bool
		addr       string
		header     []string
		want       int
	}{
		{"its own", "spiffe://example.org/ns/shop/cart", true, "192.0.2.1:1", nil, 200},
		{"another", "spiffe://example.org/ns/pay/cart", true, "192.0.2.1:1", nil, 401},
		{"not verified", "spiffe://example.org/ns/shop/cart", false, "192.0.2.1:1", nil, 401},
		{"none", "", false, "192.0.2.1:1", nil, 401},
		{"a foreign page", "spiffe://example.org/ns/shop/cart", true, "192.0.2.1:1", []string{"Origin", "https://evil.example.com"}, 403},
		{"the proxy, for nobody", "spiffe://example.org/envoy", true, "192.0.2.1:1", nil, 401},
		{"the proxy, for alice", "spiffe://example.org/envoy", true, "192.0.2.1:1", []string{"X-User", "alice"}, 200},
		{"an address that is trusted", "", false, "10.1.2.3:1", []string{"X-User", "alice"}, 200},
		{"the same in IPv6", "", false, "[::ffff:10.1.2.3]:1", []string{"X-User", "alice"}, 200},
		{"an address", "", false, "[2001:db8::1]:1", []string{"X-User", "alice"}, 200},
		{"one that is not", "", false, "[2001:db8::2]:1", []string{"X-User", "alice"}, 401},
		{"a client", "", false, "192.0.2.1:1", []string{"X-User", "alice", "X-Forwarded-For", "10.1.2.3"}, 401},
		{"a socket", "", false, "@", []string{"X-User", "alice"}, 401},
		{"its own, whatever the header says", "spiffe://example.org/ns/shop/cart", true, "192.0.2.1:1", []string{"X-User", "alice"}, 200},
	} {
		r := httptest.NewRequest("POST", "/t/orders/v1/data/app/x", nil)
		r.RemoteAddr = c.addr
		if c.peer != "" {
			withPeer(r, c.peer, c.verified)
		}
		for i := 0; i < len(c.header); i += 2 {
			r.Header.Add(c.header[i], c.header[i+1])
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.want {
			t.Errorf("%s: got %d %s, want %d", c.name, w.Code, w.Body, c.want)
		}
	}
}

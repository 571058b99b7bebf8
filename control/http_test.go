package control

import (
	"crypto/sha256"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// parseHTTP reads plugins.gatehouse_http.
func parseHTTP(t *testing.T, text string) (*HTTP, error) {
	t.Helper()
	var block any
	if err := yaml.Unmarshal([]byte(text), &block); err != nil {
		t.Fatal(err)
	}
	template, _, err := Parse(map[string]any{"plugins": map[string]any{"gatehouse_http": block}}, Options{Dir: new(bundles.Dir)})
	if err != nil {
		return nil, err
	}
	tenant, err := template.Tenant("orders")
	if err != nil {
		return nil, err
	}
	return tenant.HTTP, nil
}

func TestHTTP(t *testing.T) {
	h, err := parseHTTP(t, `
data: [envoy/authz/allow, /app/x/]
batch: {items: 10, bytes: 2000, seconds: 0.5}
permissions: {package: shop.permissions, pairs: 5, memory_bytes: 4096, streams: 6, subject_streams: 7}
authzen: {package: authzen}
check: {path: envoy/authz/allow}
serve: {path: http/response}
auth:
  jwt:
    issuer: https://issuer.example.com/{{ .tenant }}
    audiences: [orders]
    jwks_url: https://issuer.example.com/keys
    algorithms: [RS256, PS256]
    cookie: __Host-session
    subject: email
    leeway_seconds: 5
  tokens: [{subject: ci, token: 0123456789abcdef}, {subject: ops, type: team, sha256: "`+strings.Repeat("0f", 32)+`"}]
  mtls: ["spiffe://example.org/*"]
  headers: {subject: X-User, payload: X-JWT-Payload}
cors: {origins: ["https://app.example.com", "http://localhost:3000"]}
`)
	if err != nil {
		t.Fatal(err)
	}
	want := &HTTP{
		Data:  []string{"envoy/authz/allow", "app/x"},
		Batch: Batch{Items: 10, Bytes: 2000, Time: 500 * time.Millisecond},
		Permissions: &Permissions{
			Package: "shop/permissions", Catalog: "shop/permissions/catalog", Allow: "shop/permissions/allow", List: "shop/permissions/list",
			Pairs: 5, Memory: 4096, Streams: 6, SubjectStreams: 7,
		},
		AuthZEN: &AuthZEN{
			Package: "authzen", Allow: "authzen/allow", Subjects: "authzen/subjects", Resources: "authzen/resources", Actions: "authzen/actions",
		},
		Check: "envoy/authz/allow",
		Serve: "http/response",
		Auth: Auth{
			JWT: &JWT{
				Issuer: "https://issuer.example.com/orders", Audiences: []string{"orders"}, Algorithms: []string{"RS256", "PS256"},
				JWKSURL: "https://issuer.example.com/keys", Cookie: "__Host-session", Subject: "email", Leeway: 5 * time.Second,
			},
			Tokens: []Token{
				{Subject: "ci", Type: "service", Digest: sha256.Sum256([]byte("0123456789abcdef"))},
				{Subject: "ops", Type: "team", Digest: [32]byte([]byte(strings.Repeat("\x0f", 32)))},
			},
			MTLS:    []string{"spiffe://example.org/*"},
			Headers: &Headers{Subject: "x-user", Payload: "x-jwt-payload", Claim: "sub"},
		},
		Origins: []string{"https://app.example.com", "http://localhost:3000"},
	}
	want.identity = h.identity
	if !reflect.DeepEqual(h, want) {
		t.Errorf("got  %+v\nwant %+v", h, want)
	}
	entries := []string{
		"app/x", "authzen/actions", "authzen/allow", "authzen/resources", "authzen/subjects", "envoy/authz/allow", "http/response",
		"shop/permissions/allow", "shop/permissions/catalog", "shop/permissions/list",
	}
	if got := h.Entries(); !slices.Equal(got, entries) {
		t.Errorf("got entry points %q, want %q", got, entries)
	}
}

func TestHTTPDefaults(t *testing.T) {
	h, err := parseHTTP(t, `{auth: {jwt: {issuer: i, audiences: [a], jwks_url: "http://127.0.0.1/keys"}}, permissions: {package: p}}`)
	if err != nil {
		t.Fatal(err)
	}
	if h.Batch != (Batch{1000, 4 << 20, 10 * time.Second}) {
		t.Errorf("got %+v", h.Batch)
	}
	if p := h.Permissions; p.Pairs != 1000 || p.Memory != 4<<20 || p.Streams != 1000 || p.SubjectStreams != 10 {
		t.Errorf("got %+v", p)
	}
	if j := h.Auth.JWT; !slices.Equal(j.Algorithms, []string{"RS256", "ES256", "EdDSA"}) || j.Leeway != 30*time.Second || j.Subject != "sub" {
		t.Errorf("got %+v", j)
	}
	var none *HTTP
	if none.Entries() != nil || none.Identity() != "" || none.Open() {
		t.Error("nothing offers something")
	}
}

func TestHTTPIdentity(t *testing.T) {
	seen := map[string]string{"": "nothing"}
	for _, text := range []string{
		"{}", "{data: [a]}", "{data: [b]}", "{check: {path: a}}", "{serve: {path: a}}",
		`{data: [a], auth: {tokens: [{subject: x, token: "0123456789abcdef"}]}}`,
		`{data: [a], auth: {tokens: [{subject: x, token: "0123456789abcdeg"}]}}`,
	} {
		h, err := parseHTTP(t, text)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := parseHTTP(t, text)
		if other, ok := seen[h.Identity()]; ok || again.Identity() != h.Identity() {
			t.Errorf("%s: has the identity of %s, or another one the second time", text, other)
		}
		seen[h.Identity()] = text
	}
}

func TestHTTPOpen(t *testing.T) {
	for text, want := range map[string]bool{
		"{}": false, "{check: {path: a}}": false,
		"{data: [a]}": true, "{permissions: {package: p}}": true, "{authzen: {package: p}}": true, "{serve: {path: a}}": true,
		`{data: [a], auth: {mtls: ["*"]}}`:                                             false,
		`{data: [a], auth: {headers: {subject: x-user}}}`:                              false,
		`{data: [a], auth: {tokens: [{subject: x, token: "0123456789abcdef"}]}}`:       false,
		`{data: [a], auth: {mtls: [], tokens: []}}`:                                    true,
		`{data: [a], auth: {jwt: {issuer: i, audiences: [a], jwks_url: "https://x"}}}`: false,
	} {
		h, err := parseHTTP(t, text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if h.Open() != want {
			t.Errorf("%s: got %t, want %t", text, !want, want)
		}
	}
}

func TestHTTPFaults(t *testing.T) {
	const jwt = `auth: {jwt: {issuer: i, audiences: [a], `
	for _, c := range []struct{ text, want string }{
		{`{colour: red}`, "gatehouse_http.colour: unknown or unsupported key"},
		{`{data: a}`, "data: is not a list"},
		{`{data: [""]}`, `data[0]: entry point "" names nothing`},
		{`{permissions: {}}`, "permissions.package: "},
		{`{permissions: {package: p, pairs: 0}}`, "permissions.pairs: is not a whole number between 1"},
		{`{authzen: {package: "/"}}`, "authzen.package: "},
		{`{check: {path: ""}}`, `check.path: `},
		{`{serve: {}}`, `serve.path: `},
		{`{serve: {path: a, body: 1}}`, "serve.body: unknown"},
		{`{batch: {items: 0}}`, "batch.items: is not a whole number between 1"},
		{`{batch: {seconds: 0}}`, "batch.seconds: is not more than 0"},
		{`{auth: {basic: {}}}`, "auth.basic: unknown"},
		{`{auth: {jwt: {}}}`, "auth.jwt.issuer: is missing"},
		{`{auth: {jwt: {}}}`, "auth.jwt.audiences: wants at least one"},
		{`{auth: {jwt: {}}}`, "auth.jwt: wants one of jwks_url and secret"},
		{`{` + jwt + `jwks_url: "https://x", secret: "0123456789abcdef0123456789abcdef"}}}`, "auth.jwt: wants one of jwks_url and secret"},
		{`{` + jwt + `jwks_url: "http://example.com/keys"}}}`, "jwks_url: is not https"},
		{`{` + jwt + `jwks_url: "http://127.0.0.1.example.com/keys"}}}`, "jwks_url: is not https"},
		{`{` + jwt + `jwks_url: "ftp://example.com/keys", allow_insecure: true}}}`, "jwks_url: is neither"},
		{`{` + jwt + `jwks_url: "https://user:pw@example.com/keys"}}}`, "jwks_url: is not a URL with a host"},
		{`{` + jwt + `jwks_url: "/keys"}}}`, "jwks_url: is not a URL with a host"},
		{`{` + jwt + `jwks_url: "https://x", algorithms: [none]}}}`, `algorithms[0]: "none" is not one of`},
		{`{` + jwt + `jwks_url: "https://x", algorithms: [RS256, HS256]}}}`, `algorithms[1]: "HS256" is not one of`},
		{`{` + jwt + `secret: "0123456789abcdef0123456789abcdef", algorithms: [RS256]}}}`, `algorithms[0]: "RS256" is not one of`},
		{`{` + jwt + `secret: short}}}`, "secret: has less than 32 bytes"},
		{`{` + jwt + `jwks_url: "https://x", cookie: session}}}`, `cookie: is not the name of a cookie that begins with "__Host-"`},
		{`{` + jwt + `jwks_url: "https://x", leeway_seconds: 301}}}`, "leeway_seconds: is more than 300"},
		{`{auth: {tokens: [{subject: x}]}}`, "auth.tokens[0]: wants one of token and sha256"},
		{`{auth: {tokens: [{token: 0123456789abcdefx}]}}`, "auth.tokens[0].subject: is missing"},
		{`{auth: {tokens: [{subject: x, token: short}]}}`, "auth.tokens[0].token: has less than 16 bytes"},
		{`{auth: {tokens: [{subject: x, sha256: abc}]}}`, "auth.tokens[0].sha256: is not a SHA-256"},
		{`{auth: {tokens: [{subject: x, token: 0123456789abcdefx}, {subject: y, token: 0123456789abcdefx}]}}`, "auth.tokens[1]: is the same token as another"},
		{`{auth: {tokens: [x]}}`, "auth.tokens[0]: is not a mapping"},
		{`{auth: {mtls: [""]}}`, "auth.mtls[0]: is empty"},
		{`{auth: {headers: {}}}`, "auth.headers: wants subject, payload or both"},
		{`{auth: {headers: {subject: Authorization}}}`, `auth.headers.subject: "authorization" is not`},
		{`{auth: {headers: {payload: "x y"}}}`, `auth.headers.payload: "x y" is not`},
		{`{cors: {origins: ["*"]}}`, `cors.origins[0]: "*" is not allowed`},
		{`{cors: {origins: ["null"]}}`, `cors.origins[0]: "null" is not allowed`},
		{`{cors: {origins: ["https://*.example.com"]}}`, `is a pattern`},
		{`{cors: {origins: ["https://example.com/"]}}`, `is not an origin`},
		{`{cors: {origins: ["https://Example.com"]}}`, `is not an origin`},
		{`{cors: {origins: ["https://example.com:443"]}}`, `has the port that a browser leaves out`},
		{`{cors: {origins: [example.com]}}`, `is not an origin`},
	} {
		_, err := parseHTTP(t, c.text)
		var faults Faults
		if !errors.As(err, &faults) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s:\ngot %v\nwant %q in it", c.text, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), "0123456789abcdef") {
			t.Errorf("%s: got %v, which has a secret in it", c.text, err)
		}
	}
}

// Who may ask is not discovered.
func TestDiscoveredHTTP(t *testing.T) {
	template, _, err := Parse(map[string]any{
		"services":  map[string]any{"s": map[string]any{"url": "https://example.com"}},
		"discovery": map[string]any{"resource": "d.tar.gz"},
		"plugins":   map[string]any{"gatehouse_http": map[string]any{"auth": map[string]any{"mtls": []any{"a"}}}},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	tenant, err := template.Tenant("orders")
	if err != nil {
		t.Fatal(err)
	}
	discovered := func(http map[string]any) (*Tenant, error) {
		return tenant.Discovery.Tenant(map[string]any{
			"bundles": map[string]any{"b": map[string]any{}},
			"plugins": map[string]any{"gatehouse_http": http},
		})
	}
	got, err := discovered(map[string]any{"data": []any{"a/b"}})
	if err != nil || !slices.Equal(got.HTTP.Data, []string{"a/b"}) || !slices.Equal(got.HTTP.Auth.MTLS, []string{"a"}) {
		t.Errorf("got %+v, %v, want what was discovered and the operator's auth", got, err)
	}
	for _, key := range []string{"auth", "cors"} {
		_, err := discovered(map[string]any{key: map[string]any{}})
		if err == nil || !strings.Contains(err.Error(), "plugins.gatehouse_http."+key+": may not be discovered") {
			t.Errorf("%s: got %v", key, err)
		}
	}
}

// Forward-auth asks what Envoy asks, unless it is told otherwise.
func TestCheckEntry(t *testing.T) {
	for text, want := range map[string]string{
		`{gatehouse_http: {check: {}}}`:                                                      "envoy/authz/allow",
		`{gatehouse_http: {check: {}}, envoy_ext_authz_grpc: {path: orders/allow}}`:          "orders/allow",
		`{gatehouse_http: {check: {path: a/b}}, envoy_ext_authz_grpc: {path: orders/allow}}`: "a/b",
	} {
		var plugins any
		if err := yaml.Unmarshal([]byte(text), &plugins); err != nil {
			t.Fatal(err)
		}
		template, _, err := Parse(map[string]any{"plugins": plugins}, Options{Dir: new(bundles.Dir)})
		if err != nil {
			t.Fatal(err)
		}
		tenant, err := template.Tenant("orders")
		if err != nil {
			t.Fatal(err)
		}
		if got := tenant.HTTP.Check; got != want {
			t.Errorf("%s: got %q, want %q", text, got, want)
		}
	}
}

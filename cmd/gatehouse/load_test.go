package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

const service = `
opa:
  services: {s3: {url: "https://example.com"}}
  bundles: {policy: {service: s3, resource: "{{ .tenant }}.tar.gz"}}
`

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gatehouse.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func mustLoad(t *testing.T, text string) *Loaded {
	t.Helper()
	cfg, err := load(writeFile(t, text), "", false)
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

func TestDefaults(t *testing.T) {
	cfg := mustLoad(t, service)
	if cfg.GRPC.Listen != "127.0.0.1:9191" || cfg.GRPC.MaxMessageBytes != 64<<20 || cfg.Admin.Listen != "127.0.0.1:8282" {
		t.Errorf("got listeners %+v, %+v", cfg.GRPC, cfg.Admin)
	}
	s, err := cfg.Settings("orders")
	if err != nil {
		t.Fatal(err)
	}
	if s.Limits.EvaluationTime != 500*time.Millisecond || s.Limits.BodyBytes != 1<<20 || s.OnError != tenants.OnErrorDeny {
		t.Errorf("got %+v", s)
	}
	if s.Bundles[0].Resource != "orders.tar.gz" || s.Entry != "envoy/authz/allow" {
		t.Errorf("got %+v", s.Tenant)
	}
}

// The whole of the configuration that DESIGN gives, at its defaults, is read.
func TestEveryKeyAtItsDefault(t *testing.T) {
	mustLoad(t, `
grpc:  {listen: "127.0.0.1:9191", max_message_bytes: 64MiB}
http:  {listen: "127.0.0.1:8181", url: "", trusted_peers: []}
admin: {listen: "127.0.0.1:8282"}
tenants:
  resolve:
    - {context_extension: tenant}
    - {route_metadata: {namespace: gatehouse, key: tenant}}
    - {authority: {map: {"orders.authz:9191": orders}}}
    - {authority: {pattern: "outbound_.*_([a-z]+)[.]authz"}}
    - {host: {map: {"orders.example.com": orders, "*.pay.example.com": payments}}}
    - {header: x-tenant}
  peers: {}
  default: ""
  capacity: 10000
  parked: 1000
  grace_period: 5m
  preload: []
  required: []
  limits: {evaluation_time: 500ms, concurrency: 0, bundle_bytes: 64MiB, bundle_expanded_bytes: 256MiB, body_bytes: 1MiB}
  on_error: deny
  on_partial_body: evaluate
  network: {allow_hosts: []}
  evaluator: auto
persist: {directory: ""}
guard: {bundle: "", path: ""}
redact: default
overrides: {}
overrides_dir: ""
telemetry: {otlp: {endpoint: ""}}
`+service)
}

func TestOverrides(t *testing.T) {
	cfg := mustLoad(t, `
tenants: {limits: {evaluation_time: 100ms, body_bytes: 2MiB}, on_error: upstream}
opa:
  services: [{name: s3, url: "https://example.com", headers: {a: "1"}}]
  labels: {app: "{{ .tenant }}", env: prod}
  bundles: {policy: {service: s3, resource: "{{ .tenant }}.tar.gz"}}
overrides:
  orders:
    limits: {evaluation_time: 50ms, concurrency: 3}
    on_error: allow
    allow_headers: [host]
    evaluator: plan
    verify: 1/100
    opa:
      services: {s3: {url: "https://orders.example.com"}}
      labels: {env: test}
      plugins: {envoy_ext_authz_grpc: {path: orders/allow}}
`)
	orders, err := cfg.Settings("orders")
	if err != nil {
		t.Fatal(err)
	}
	other, err := cfg.Settings("other")
	if err != nil {
		t.Fatal(err)
	}
	if orders.Limits.EvaluationTime != 50*time.Millisecond || orders.Limits.Concurrency != 3 || orders.Limits.BodyBytes != 2<<20 {
		t.Errorf("got limits %+v, want those of all with its own over them", orders.Limits)
	}
	if orders.OnError != tenants.OnErrorAllow || orders.Entry != "orders/allow" || len(orders.AllowHeaders) != 1 {
		t.Errorf("got %+v", orders)
	}
	if orders.Evaluator != policy.Plan || orders.Verify != 100 || other.Evaluator != policy.Auto || other.Verify != 0 {
		t.Errorf("got evaluators %q and %q, verified 1/%d and 1/%d", orders.Evaluator, other.Evaluator, orders.Verify, other.Verify)
	}
	if orders.Labels["app"] != "orders" || orders.Labels["env"] != "test" {
		t.Errorf("got labels %v", orders.Labels)
	}
	if orders.Bundles[0].Service == other.Bundles[0].Service {
		t.Error("got one service for both, want another URL for orders")
	}
	if other.Limits.EvaluationTime != 100*time.Millisecond || other.OnError != tenants.OnErrorUpstream ||
		other.Entry != "envoy/authz/allow" || other.Labels["env"] != "prod" {
		t.Errorf("other tenant: got %+v", other)
	}
}

func TestOverridesDir(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text := "overrides_dir: " + dir + service + "overrides: {payments: {on_error: allow}}\n"
	write("orders.yaml", "on_error: upstream\nopa:\n  labels: {env: test}\n")
	write("empty.yaml", "")
	write("notes.txt", "not a tenant")
	cfg := mustLoad(t, text)
	for id, want := range map[tenants.ID]tenants.OnError{
		"orders": tenants.OnErrorUpstream, "payments": tenants.OnErrorAllow, "empty": tenants.OnErrorDeny, "other": tenants.OnErrorDeny,
	} {
		s, err := cfg.Settings(id)
		if err != nil {
			t.Fatal(err)
		}
		if s.OnError != want {
			t.Errorf("%s: got on_error %d, want %d", id, s.OnError, want)
		}
	}
	if s, _ := cfg.Settings("orders"); s.Labels["env"] != "test" {
		t.Errorf("got labels %v", s.Labels)
	}

	write("orders.yaml", "on_error: maybe\n\ncolour: red\n")
	write("payments.yaml", "opa: {discovery: {}}")
	write("Bad.yaml", "{}")
	_, err := load(writeFile(t, text), "", false)
	for _, want := range []string{
		"orders.yaml:1: \"maybe\" is not deny", "orders.yaml:3: unknown key \"colour\"", "payments.yaml:1: opa.discovery.resource: is missing",
		"Bad.yaml: tenant name \"Bad\"", "overrides.payments: stands in ",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v\nwant %q in it", err, want)
		}
	}
}

func TestGuardSettings(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "guard"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "guard", "p.rego"), []byte("package envoy.authz\nallow := true"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := mustLoad(t, "guard: {bundle: "+dir+"/guard}"+service)
	if g := cfg.Guard; g == nil || g.Entry != "envoy/authz/allow" || g.Bundles[0].Resource != "guard" {
		t.Errorf("got guard %+v", g)
	}
	if mustLoad(t, service).Guard != nil {
		t.Error("got a guard that nobody asked for")
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("GATEHOUSE_TEST_HOST", "example.com")
	cfg := mustLoad(t, strings.Replace(service, "https://example.com", "https://${GATEHOUSE_TEST_HOST}", 1))
	if _, err := cfg.Settings("orders"); err != nil {
		t.Error(err)
	}
}

// The default address is listened on only where something may be offered there.
func TestListensHTTP(t *testing.T) {
	offers := "  plugins: {gatehouse_http: {data: [a/b]}}\n"
	for _, c := range []struct {
		text  string
		want  bool
		notes int
	}{
		{service, false, 0},
		{service + offers, true, 0},
		{`http: {listen: "127.0.0.1:0"}` + service, true, 0},
		{`http: {listen: ""}` + service + offers, false, 0},
		{service + "overrides: {orders: {opa: {plugins: {gatehouse_http: {serve: {path: a}}}}}}", true, 0},
		{service + "  discovery: {service: s3, resource: d.tar.gz}", true, 0},
		{service + "  plugins: {gatehouse_http: {check: {path: a}, auth: {headers: {subject: x-user}}}}", true, 2},
		{"http: {trusted_peers: [10.0.0.0/8]}" + service + "  plugins: {gatehouse_http: {check: {path: a}, auth: {headers: {subject: x-user}}}}", true, 0},
	} {
		cfg := mustLoad(t, c.text)
		if got := cfg.listensHTTP(); got != c.want || len(cfg.Notes) != c.notes {
			t.Errorf("%s\ngot %t, notes %v, want %t, %d notes", c.text, got, cfg.Notes, c.want, c.notes)
		}
	}
}

// All faults of a file are reported at once, each with its line.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"syntax", "grpc: [", []string{":1: "}},
		{"many", `grpc: {listen: nowhere, port: 1}
tenants:
  capacity: 0
  limits:
    evaluation_time: fast
    body_bytes: -1
  on_error: maybe
  resolve:
    - {context_extension: tenant, header: x}
    - {authority: {pattern: "("}}
  default: NO
  required: [a/b]
  preload: ["*"]
guard: {bundle: x}
opa:
  services: {s3: {url: "https://example.com"}}
  bundles:
    policy:
      service: s4
overrides:
  orders: {limits: {body_bytes: lots}, opa: {discovery: {}}}
  payments: {evaluator: wasm, verify: sometimes}
  Bad: {colour: red}
`, []string{
			`:1: unknown key "port"`,
			`:5: "fast" is not a time`,
			`:6: "-1" is not a size`,
			`:7: "maybe" is not deny, allow or upstream`,
			`:1: grpc.listen: "nowhere" is not host:port`,
			`:3: tenants.capacity: is 0`,
			`:9: tenants.resolve[0]: `,
			`:10: tenants.resolve[1]: `,
			`:11: tenants.default: `,
			`:12: tenants.required[0]: `,
			`:13: tenants.preload: "*" needs a directory`,
			`:14: guard.bundle: fetching bundle "x": no such bundle`,
			`:19: opa.bundles.policy.service: no service "s4"`,
			`:21: "lots" is not a size`,
			`:22: overrides.payments.evaluator: "wasm" is not auto, topdown or plan`,
			`:22: overrides.payments.verify: "sometimes" is not a share like 1/1000`,
			`:23: overrides.Bad: tenant name "Bad"`,
			`:23: unknown key "colour"`,
		}},
		{"overridden", service + `
overrides:
  orders:
    opa: {status: {service: nowhere}}
`, []string{`:8: overrides.orders.opa.status.service: no service "nowhere"`}},
		{"open over HTTP", `http: {listen: "0.0.0.0:8181"}` + service + `
  plugins: {gatehouse_http: {data: [a/b]}}
overrides:
  orders:
    opa: {plugins: {gatehouse_http: {auth: {tokens: [{subject: x, token: "0123456789abcdef"}]}}}}
  payments:
    opa: {plugins: {gatehouse_http: {auth: {mtls: ["*"]}}}}
`, []string{
			`:6: opa.plugins.gatehouse_http: would be open to all who reach http.listen "0.0.0.0:8181"`,
			`:11: overrides.payments.opa.plugins.gatehouse_http.auth.mtls: needs http.tls.client_ca`,
		}},
		{"HTTP listener", `
http:
  listen: nowhere
  url: https://example.com/path
  trusted_peers: [10.0.0.1/8, "spiffe://example.org/*", unix, localhost]
grpc: {tls: {client_optional: true}}
` + service, []string{
			`:3: http.listen: "nowhere" is not host:port`,
			`:4: http.url: "https://example.com/path" is not an address`,
			`:5: http.trusted_peers[0]: "10.0.0.1/8" is not an address`,
			`:5: http.trusted_peers[1]: needs http.tls.client_ca`,
			`:5: http.trusted_peers[2]: needs http.listen to be a socket`,
			`:5: http.trusted_peers[3]: "localhost" is not an address`,
			`:6: grpc.tls.client_optional: is of http.tls alone`,
		}},
		{"environment", strings.Replace(service, "example.com", "${GATEHOUSE_NOT_SET}", 1), []string{`:3: opa.services.s3.url: environment variable "GATEHOUSE_NOT_SET" is not set`}},
		{"empty", "", []string{"opa.bundles: a tenant needs at least one bundle"}},
		{"descriptor", service + `  plugins: {envoy_ext_authz_grpc: {proto-descriptor: /does/not/exist.pb}}`, []string{`:5: opa.plugins.envoy_ext_authz_grpc.proto-descriptor: `}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := writeFile(t, c.text)
			_, err := load(path, "", false)
			if err == nil {
				t.Fatal("got no error")
			}
			for _, want := range c.want {
				if strings.HasPrefix(want, ":") {
					want = path + want
				}
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got\n%v\nwant %q in it", err, want)
				}
			}
			var f *faults
			if !errors.As(err, &f) {
				t.Errorf("got %T, want faults", err)
			}
		})
	}
}

func TestNoFile(t *testing.T) {
	if _, err := load("/does/not/exist.yaml", "", false); err == nil {
		t.Error("got no error for a file that is not there")
	}
	if _, err := load("", "/does/not/exist", false); err == nil {
		t.Error("got no error for a directory that is not there")
	}
}

func FuzzLoad(f *testing.F) {
	f.Add(service)
	f.Add("tenants: {limits: {body_bytes: 1KiB}}\noverrides: {a: {opa: {labels: {b: \"{{ .tenant }}\"}}}}" + service)
	f.Add("opa: &a {services: *a}")
	f.Fuzz(func(t *testing.T, text string) {
		path := writeFile(t, text)
		cfg, err := load(path, "", false)
		if err != nil {
			return
		}
		if s, err := cfg.Settings("orders"); err == nil && (len(s.Bundles) == 0 || s.Limits.EvaluationTime <= 0) {
			t.Errorf("got settings %+v of a file without faults", s)
		}
	})
}

// Every key of the file is in docs/operations.md or the README, and the examples
// there are such that load reads them.
func TestDocs(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	operations, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	both := string(readme) + string(operations)
	for _, key := range keysOf(reflect.TypeFor[Config]()) {
		if !strings.Contains(both, key) {
			t.Errorf("%s stands neither in the README nor in docs/operations.md", key)
		}
	}

	text := ""
	for i, block := range strings.Split(string(readme), "```") {
		if yaml, ok := strings.CutPrefix(block, "yaml\n"); ok && i%2 == 1 && !strings.Contains(yaml, "typed_per_filter_config") {
			text += yaml
		}
	}
	dir := t.TempDir()
	for _, path := range []string{"guard/g.rego", "run/token"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, path), []byte("package guard\nallow := true"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	text = strings.NewReplacer("/etc/gatehouse", dir, "/run/secrets", dir+"/run").Replace(text)
	cfg, err := load(writeFile(t, text), "", false)
	if err != nil {
		t.Fatalf("%v\nin\n%s", err, text)
	}
	if cfg.Guard == nil || len(cfg.overrides) != 1 {
		t.Errorf("got guard %v and %d overrides, want those of the README", cfg.Guard, len(cfg.overrides))
	}
}

// keysOf returns the keys of a configuration's structs.
func keysOf(typ reflect.Type) (keys []string) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if name != "" {
			keys = append(keys, name)
		}
		if f.Type.Kind() == reflect.Struct && strings.HasSuffix(f.Type.PkgPath(), "gatehouse") {
			keys = append(keys, keysOf(f.Type)...)
		}
	}
	return keys
}

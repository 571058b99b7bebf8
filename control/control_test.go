package control_test

import (
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
)

const common = `
services: {s3: {url: "https://example.com/bucket"}}
bundles: {policy: {service: s3, resource: "bundles/{{ .tenant }}.tar.gz"}}
`

func parse(t *testing.T, text string, opts control.Options) (*control.Template, []control.Fault, error) {
	t.Helper()
	var block map[string]any
	if err := yaml.Unmarshal([]byte(text), &block); err != nil {
		t.Fatal(err)
	}
	return control.Parse(block, opts)
}

func mustTenant(t *testing.T, text, name string) *control.Tenant {
	t.Helper()
	template, _, err := parse(t, text, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	tenant, err := template.Tenant(name)
	if err != nil {
		t.Fatal(err)
	}
	return tenant
}

func TestTenant(t *testing.T) {
	tenant := mustTenant(t, `
services:
  - {name: s3, url: "https://example.com/bucket", headers: {x-tenant: "{{ .tenant }}"}}
labels: {app: "{{ .tenant }}", team: "{{ .bundlename }}-team"}
bundles:
  policy: {service: s3, resource: "bundles/{{ .tenant }}.tar.gz", polling: {min_delay_seconds: 0.5, max_delay_seconds: 2}}
  library: {resource: library.tar.gz}
plugins:
  envoy_ext_authz_grpc:
    addr: ":9191"
    path: /a/b/
    paths: [c/d]
    dry-run: true
    skip-request-body-parse: true
    proto-descriptor: /etc/x.pb
`, "orders")
	if want := map[string]string{"app": "orders", "team": "orders-team"}; !maps.Equal(tenant.Labels, want) {
		t.Errorf("got labels %v, want %v", tenant.Labels, want)
	}
	if len(tenant.Bundles) != 2 || tenant.Bundles[0].Name != "library" || tenant.Bundles[1].Name != "policy" {
		t.Fatalf("got bundles %+v, want library and policy", tenant.Bundles)
	}
	library, policy := tenant.Bundles[0], tenant.Bundles[1]
	if policy.Resource != "bundles/orders.tar.gz" || policy.MinDelay != 500*time.Millisecond || policy.MaxDelay != 2*time.Second {
		t.Errorf("got %+v", policy)
	}
	if library.Resource != "library.tar.gz" || library.MinDelay != time.Minute || library.MaxDelay != 2*time.Minute {
		t.Errorf("got %+v", library)
	}
	if tenant.Entry != "a/b" || !slices.Equal(tenant.Entries, []string{"c/d"}) {
		t.Errorf("got entry points %q and %q", tenant.Entry, tenant.Entries)
	}
	if !tenant.DryRun || !tenant.SkipBody || tenant.ProtoDescriptor != "/etc/x.pb" {
		t.Errorf("got %+v", tenant)
	}
}

// Two tenants share a source when, and only when, it would answer both alike.
func TestServiceIdentity(t *testing.T) {
	service := func(def, name string) string {
		t.Helper()
		return mustTenant(t, "services: {s: "+def+"}\nbundles: {b: {}}", name).Bundles[0].Service
	}
	same := `{url: "https://example.com/x"}`
	if service(same, "a") != service(same, "b") {
		t.Error("equal services: got different identities")
	}
	for _, def := range []string{
		`{url: "https://example.com/{{ .tenant }}"}`,
		`{url: "https://example.com", headers: {x: "{{ .tenant }}"}}`,
		`{url: "https://example.com", credentials: {bearer: {token: "{{ .tenant }}"}}}`,
		`{url: "https://example.com", credentials: {bearer: {token_path: "/run/{{ .tenant }}"}}}`,
	} {
		if service(def, "a") == service(def, "b") {
			t.Errorf("%s: got one identity for two tenants", def)
		}
	}
}

// All faults are reported at once, each with the path of its key.
func TestFaults(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       []string
	}{
		{"nothing", ``, []string{`bundles: a tenant needs at least one bundle`}},
		{"unknown keys", common + "bundels: {}\nlabels: {a: 1}", []string{`bundels: unknown or unsupported key`, `labels.a: is not a string`}},
		{"several", `
services: {s: {url: "ftp://x", flavour: sweet}, t: {url: "https://example.com"}}
bundles: {b: {service: u, trigger: never, persist: true, signing: {keyid: k}}}
discovery: {}
decision_logs: {plugin: mine}
decision_log: {}
bundle: {}
keys: {k: {key: x}}
status: {service: u}
`, []string{
			`services.s.url: "ftp://x" is not an http or https URL`, `services.s.flavour: unknown or unsupported key`,
			`bundles.b.service: no service "u"`, `bundles.b.trigger: not supported: "never"`,
			`bundles.b.persist: bundles are kept on disk where`, `keys.k.key: is not PEM`,
			`decision_logs.plugin: not supported`, `decision_logs.service: is missing`, `decision_log: not supported`,
			`discovery.resource: is missing`, `discovery.service: is missing`, `status.service: no service "u"`, `bundle: not supported`,
		}},
		{"secrets in URLs", `
services: {s: {url: "ftp://u:secret1@x/?secret2"}, t: {url: "http://u:secret3@x%"}}
bundles: {b: {service: s}}
`, []string{`services.s.url: "ftp://u:xxxxx@x/" is not an http`, `services.t.url: is not a URL`}},
		{"response_header_timeout_seconds", `
services: {s: {url: "https://example.com", response_header_timeout_seconds: 0}}
bundles: {b: {}}
`, []string{`services.s.response_header_timeout_seconds: is not more than 0`}},
		{"bearer", `
services: {s: {url: "https://example.com", credentials: {bearer: {token: a, token_path: b}}}}
bundles: {b: {}}
`, []string{`services.s.credentials.bearer: token and token_path exclude each other`}},
		{"templates", `
services: {s: {url: "https://example.com"}}
bundles: {b: {resource: "{{ .Env.HOME }}"}, c: {resource: "{{ nope }}"}, d: {resource: "{{ .tenant"}}
`, []string{`bundles.b.resource: template`, `bundles.c.resource: template`, `bundles.d.resource: template`}},
		{"plugin", common + `
plugins: {envoy_ext_authz_grpc: {query: "data.x", path: "/", colour: red}, other: {}}
`, []string{
			`plugins.envoy_ext_authz_grpc.query: not supported`, `plugins.envoy_ext_authz_grpc.path: entry point "/" names nothing`,
			`plugins.envoy_ext_authz_grpc.colour: unknown`, `plugins.other: unknown`,
		}},
		{"polling", `
services: {s: {url: "https://example.com"}}
bundles: {b: {polling: {min_delay_seconds: 10, max_delay_seconds: 5}}, c: {polling: {min_delay_seconds: x}}}
`, []string{`bundles.b.polling: max_delay_seconds is less`, `bundles.c.polling.min_delay_seconds: is not a number`}},
		{"decision logs", common + `
decision_logs:
  file: {path: "", max_files: 0}
  s3: {service: nowhere}
  reporting: {buffer_type: sorted, on_full: explode, upload_size_limit_bytes: 1, max_decisions_per_second: -1, trigger: never, buffer_size_limit_bytes: 1.5}
`, []string{
			`decision_logs.file.path: is missing`, `decision_logs.file.max_files: is not a whole number between 1 and 1000`,
			`decision_logs.s3.service: no service "nowhere"`, `decision_logs.reporting.buffer_type: "sorted" is not size or event`,
			`decision_logs.reporting.on_full: "explode" is not`, `decision_logs.reporting.upload_size_limit_bytes: is not a whole number between 90 and`,
			`decision_logs.reporting.max_decisions_per_second: is less than 0`, `decision_logs.reporting.trigger: not supported: "never"`,
			`decision_logs.reporting.buffer_size_limit_bytes: is not a whole number`,
		}},
		{"long polling", `
services: {s: {url: "https://example.com"}}
bundles: {b: {polling: {long_polling_timeout_seconds: 0.1}}}
`, []string{`bundles.b.polling.long_polling_timeout_seconds: is not between 1 and 3600`}},
		{"types", `
services: [1]
bundles: []
plugins: {envoy_ext_authz_grpc: {dry-run: "yes", paths: x}}
`, []string{`services[0]: is not a mapping`, `bundles: is not a mapping`, `dry-run: is not true or false`, `paths: is not a list`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := parse(t, c.text, control.Options{})
			var faults control.Faults
			if !errors.As(err, &faults) {
				t.Fatalf("got %v, want faults", err)
			}
			text := faults.Error()
			for _, want := range c.want {
				if !strings.Contains(text, want) {
					t.Errorf("got %s\nwant %q in it", text, want)
				}
			}
			if strings.Contains(text, "secret") {
				t.Errorf("got %s\nwith a secret in it", text)
			}
		})
	}
}

func TestNotes(t *testing.T) {
	_, notes, err := parse(t, common+`
server: {}
caching: {}
plugins: {envoy_ext_authz_grpc: {addr: ":1", enable-reflection: true}}
`, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range notes {
		got = append(got, n.Path)
	}
	slices.Sort(got)
	want := []string{"plugins.envoy_ext_authz_grpc.addr", "plugins.envoy_ext_authz_grpc.enable-reflection", "server"}
	if !slices.Equal(got, want) {
		t.Errorf("got notes on %v, want %v", got, want)
	}
}

func TestDirectory(t *testing.T) {
	dir, err := bundles.NewDir(t.TempDir(), bundles.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	template, _, err := parse(t, "labels: {app: x}", control.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	tenant, err := template.Tenant("orders")
	if err != nil {
		t.Fatal(err)
	}
	if b := tenant.Bundles[0]; b.Resource != "orders" || b.Source != bundles.Source(dir) {
		t.Errorf("got bundle %+v, want orders of the directory", b)
	}
	if _, _, err := parse(t, common, control.Options{Dir: dir}); err == nil || !strings.Contains(err.Error(), "bundles: must be absent") {
		t.Errorf("bundles beside a directory: got error %v", err)
	}
}

func TestBearer(t *testing.T) {
	var got string
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got = r.Header.Get("Authorization") + r.Header.Get("X-Key")
	}))
	defer server.Close()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for def, want := range map[string]string{
		`credentials: {bearer: {token: "secret-{{ .tenant }}"}}`: "Bearer secret-orders",
		`credentials: {bearer: {scheme: Basic, token: abc}}`:     "Basic abc",
		`credentials: {bearer: {token_path: "` + token + `"}}`:   "Bearer from-file",
		`headers: {x-key: "{{ .tenant }}"}`:                      "orders",
	} {
		tenant := mustTenant(t, `
services: {s: {url: "`+server.URL+`", `+def+`}}
bundles: {b: {}}
`, "orders")
		got = ""
		_, _ = tenant.Bundles[0].Source.Fetch(t.Context(), "b", "") // answers nothing of use
		if got != want {
			t.Errorf("%s: got %q, want %q", def, got, want)
		}
	}
}

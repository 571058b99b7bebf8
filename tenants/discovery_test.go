package tenants_test

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// service is a bundle service.
type service struct {
	*httptest.Server
	mu    sync.Mutex
	files map[string]string // :: path → the bundle's text; guarded by mu
}

func newService(t *testing.T) *service {
	s := &service{files: map[string]string{}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		text, ok := s.files[r.URL.Path]
		s.mu.Unlock()
		if !ok {
			http.NotFound(w, r)
			return
		}
		h := fnv.New64()
		_, _ = h.Write([]byte(text))
		etag := fmt.Sprintf(`"%x"`, h.Sum64())
		w.Header().Set("ETag", etag)
		if r.Header.Get("If-None-Match") == etag {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		_, _ = w.Write(authztest.Tarball(authztest.Files(text)))
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *service) set(path, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[path] = text
}

// configured returns a pool of tenants with an OPA configuration, in which
// URL stands for that of the service.
func (s *service) configured(t *testing.T, opa string) *tenants.Pool {
	t.Helper()
	block := map[string]any{}
	if err := yaml.Unmarshal([]byte(strings.ReplaceAll(opa, "URL", s.URL)), &block); err != nil {
		t.Fatal(err)
	}
	template, _, err := control.Parse(block, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return authztest.Pool(t, tenants.Config{Settings: func(id tenants.ID) (*tenants.Settings, error) {
		tenant, err := template.Tenant(string(id))
		return &tenants.Settings{Tenant: tenant}, err
	}})
}

const discovering = `
services: {s: {url: "URL"}}
discovery: {resource: "discovery/{{ .tenant }}", decision: config, polling: {min_delay_seconds: 0.05, max_delay_seconds: 0.1}}
labels: {team: "{{ .tenant }}-team"}
`

// says is a discovery bundle that says so.
func says(config string) string {
	return "package config\n" + config + "\n-- d.rego --\npackage unused"
}

const polled = `"polling": {"min_delay_seconds": 0.05, "max_delay_seconds": 0.1}`

func allowed(p *tenants.Pool, id tenants.ID) string {
	a := authztest.Ask(context.Background(), p, id, "{}")
	if a.Err != nil {
		return a.Err.Error()
	}
	return fmt.Sprint(a.Decision.Allowed)
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

func TestDiscovery(t *testing.T) {
	s := newService(t)
	p := s.configured(t, discovering)
	s.set("/discovery/orders", says(`
bundles := {"p": {"service": "s", "resource": sprintf("bundles/%s", [opa.runtime().config.labels.team]), `+polled+`}}
labels := {"team": "mine", "more": "yes"}`))
	s.set("/bundles/orders-team", `package envoy.authz
allow if {
	opa.runtime().config.labels == {"team": "orders-team", "more": "yes"}
}
-- other.rego --
package other
allow := false`)
	if got := allowed(p, "orders"); got != "true" {
		t.Fatalf("by the discovered bundle: got %s, want true", got)
	}
	t.Run("changes", func(t *testing.T) {
		s.set("/discovery/orders", says(`
bundles := {"p": {"service": "s", "resource": "bundles/orders-team", `+polled+`}}
plugins := {"envoy_ext_authz_grpc": {"path": "other/allow"}}`))
		eventually(t, "other entry point", func() bool { return allowed(p, "orders") == "false" })
	})
	t.Run("refused changes leave the last", func(t *testing.T) {
		for _, c := range []struct{ config, want string }{
			{`bundles := {"p": {"service": "s", "resource": "bundles/nowhere"}}`, "no such bundle"},
			{`bundles := {"p": {"service": "other", "resource": "x"}}`, `no service "other"`},
			{`services := {"s": {"url": "https://example.com"}}`, "services.s: may not be discovered"},
			{`decision_logs := {"file": {"path": "/tmp/x"}}`, "decision_logs.file: may not be discovered"},
			{`bundles := {"p": {"service": "s", "resource": "${HOME}"}}`, "bundle"},
			{`bundles := {"p": {"service": "s", "resource": "{{ .tenant }}"}}`, "bundle"},
			{`unknown := 1`, "unknown"},
			{`bundles[http.send({})] := 1`, "http.send"},
			{`bundles := x if { x := {"p": 1}; false }`, "undefined"},
			{`bundles := {"p": count([1 | numbers.range(1, 100000)[_] == numbers.range(1, 100000)[_]])}`, "evaluation"},
		} {
			s.set("/discovery/orders", says(c.config))
			eventually(t, c.config, func() bool {
				st, _ := p.Tenant("orders")
				return strings.Contains(st.Error, c.want)
			})
			if got := allowed(p, "orders"); got != "false" {
				t.Fatalf("%s: the last configuration answers no more: got %s", c.config, got)
			}
		}
	})
	t.Run("good again", func(t *testing.T) {
		s.set("/discovery/orders", says(`bundles := {"p": {"service": "s", "resource": "bundles/new", `+polled+`}}`))
		time.Sleep(300 * time.Millisecond)
		s.set("/bundles/new", "package envoy.authz\nallow := true")
		eventually(t, "new bundle", func() bool { return allowed(p, "orders") == "true" })
		eventually(t, "no error", func() bool { st, _ := p.Tenant("orders"); return st.Error == "" })
	})
}

// A tenant without a discovery bundle is unknown, one with a bad one is not
// ready.
func TestDiscoveryAtLoad(t *testing.T) {
	s := newService(t)
	p := s.configured(t, discovering)
	if a := authztest.Ask(context.Background(), p, "nobody", "{}"); !errors.Is(a.Err, tenants.ErrUnknown) {
		t.Errorf("no discovery bundle: got %v, want ErrUnknown", a.Err)
	}
	s.set("/discovery/bad", says(`bundles := 7`))
	s.set("/discovery/empty", says(`labels := {"a": "b"}`))
	s.set("/discovery/missing", says(`bundles := {"p": {"service": "s", "resource": "nowhere"}}`))
	for _, id := range []tenants.ID{"bad", "empty", "missing"} {
		if a := authztest.Ask(context.Background(), p, id, "{}"); !errors.Is(a.Err, tenants.ErrNotReady) {
			t.Errorf("%s: got %v, want ErrNotReady", id, a.Err)
		}
	}
}

// Refresh returns when what was discovered decides, or says why it does not.
func TestDiscoveryRefresh(t *testing.T) {
	s := newService(t)
	p := s.configured(t, strings.ReplaceAll(discovering, "polling: {min_delay_seconds: 0.05, max_delay_seconds: 0.1}", "trigger: manual"))
	manual := `bundles := {"p": {"service": "s", "resource": "%s", "trigger": "manual"}}`
	s.set("/discovery/orders", says(fmt.Sprintf(manual, "one")))
	s.set("/one", "package envoy.authz\nallow := true")
	if got := allowed(p, "orders"); got != "true" {
		t.Fatalf("got %s, want true", got)
	}
	s.set("/one", "package envoy.authz\nallow := false")
	if err := p.Refresh(t.Context(), "orders"); err != nil || allowed(p, "orders") != "false" {
		t.Errorf("after a refresh for a new bundle: %v, allowed %s, want false", err, allowed(p, "orders"))
	}
	s.set("/two", "package envoy.authz\nallow := true")
	s.set("/discovery/orders", says(fmt.Sprintf(manual, "two")))
	if err := p.Refresh(t.Context(), "orders"); err != nil || allowed(p, "orders") != "true" {
		t.Errorf("after a refresh for a new configuration: %v, allowed %s, want true", err, allowed(p, "orders"))
	}
	s.set("/discovery/orders", says(fmt.Sprintf(manual, "three")))
	if err := p.Refresh(t.Context(), "orders"); err == nil || allowed(p, "orders") != "true" {
		t.Errorf("after a refresh for a bad configuration: %v, allowed %s, want an error and true", err, allowed(p, "orders"))
	}
}

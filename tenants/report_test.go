package tenants_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/plugins/bundle"
	logstatus "github.com/open-policy-agent/opa/v1/plugins/logs/status"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// report is a status message as far as OPA's own types can read one.
type report struct {
	Labels       map[string]string
	Bundles      map[string]*reported
	Discovery    *reported
	DecisionLogs *logstatus.Status `json:"decision_logs"`
	Plugins      map[string]struct{ State string }
}

type reported struct {
	bundle.Status
	Errors  []struct{ Code, Message string } `json:"errors"` // instead of interfaces
	Metrics map[string]int64                 `json:"metrics"`
}

// reports is a status service, which takes logs too.
type reports struct {
	*httptest.Server
	mu    sync.Mutex
	codes map[string]int // :: path → the status to answer with, where it is not 200; guarded by mu
	list  []report       // guarded by mu
	tries int            // posts to /status; guarded by mu
}

func newReports(t *testing.T) *reports {
	r := &reports{codes: map[string]int{}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		text, err := io.ReadAll(req.Body)
		r.mu.Lock()
		defer r.mu.Unlock()
		isStatus := strings.HasPrefix(req.URL.Path, "/status")
		if isStatus {
			r.tries++
		}
		if code := r.codes[req.URL.Path]; code != 0 {
			w.WriteHeader(code)
			return
		}
		if isStatus {
			var m report
			if err = errors.Join(err, json.Unmarshal(text, &m)); err != nil || req.Header.Get("Content-Type") != "application/json" {
				t.Errorf("got %s with %v: %v", text, req.Header, err)
			}
			r.list = append(r.list, m)
		}
	}))
	t.Cleanup(r.Close)
	return r
}

func (r *reports) answer(path string, code int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.codes[path] = code
}

// last returns the last report of a tenant, and how many there were.
func (r *reports) last(tenant string) (last report, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.list {
		if m.Labels["tenant"] == tenant {
			last = m
			n++
		}
	}
	return last, n
}

func (r *reports) tried() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tries
}

// says waits for a report of the tenant about its bundle of which ok holds.
func (r *reports) says(t *testing.T, tenant, what string, ok func(m report, b *reported) bool) {
	t.Helper()
	defer func() {
		if t.Failed() {
			m, _ := r.last(tenant)
			t.Logf("the last report: %+v, of the bundle %+v", m, m.Bundles["policy"])
		}
	}()
	eventually(t, what, func() bool {
		m, n := r.last(tenant)
		b := m.Bundles["policy"]
		if b == nil {
			b = &reported{}
		}
		return n > 0 && ok(m, b)
	})
}

// reporting is a pool whose tenants have a bundle at a service, and report to r.
func reporting(t *testing.T, s *service, r *reports, opa string, cfg tenants.Config) *tenants.Pool {
	t.Helper()
	block := map[string]any{}
	text := fmt.Sprintf(`
services: {s: {url: %q}, r: {url: %q}}
labels: {app: shop}
bundles: {policy: {service: s, resource: "bundles/{{ .tenant }}", polling: {min_delay_seconds: 0.05, max_delay_seconds: 0.1}}}
%s`, s.URL, r.URL, opa)
	if err := yaml.Unmarshal([]byte(text), &block); err != nil {
		t.Fatal(err)
	}
	template, _, err := control.Parse(block, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cfg.Settings = func(id tenants.ID) (*tenants.Settings, error) {
		tenant, err := template.Tenant(string(id))
		return &tenants.Settings{Tenant: tenant}, err
	}
	return authztest.Pool(t, cfg)
}

// The status is sent after each change: of the bundle for the worse and the
// better, while what decided goes on.
func TestStatusOnChange(t *testing.T) {
	s, r := newService(t), newReports(t)
	p := reporting(t, s, r, `status: {service: r}`, tenants.Config{})
	s.set("/bundles/orders", allow+"\n-- .manifest --\n{\"revision\": \"r1\"}")
	if got := allowed(p, "orders"); got != "true" {
		t.Fatalf("got %s", got)
	}
	var activated time.Time
	r.says(t, "orders", "the first revision is told of", func(m report, b *reported) bool {
		activated = b.LastSuccessfulActivation
		return b.ActiveRevision == "r1" && b.Code == "" && b.Type == "snapshot" && b.Size > 0 && !b.LastRequest.IsZero() &&
			!b.LastSuccessfulDownload.IsZero() && !b.LastSuccessfulActivation.IsZero() && b.Metrics["timer_bundle_request_ns"] > 0 &&
			m.Plugins["bundle"].State == "OK" && m.Labels["app"] == "shop" && m.Labels["id"] != "" && m.Labels["version"] != "" &&
			m.DecisionLogs == nil && m.Discovery == nil
	})
	s.set("/bundles/orders", bad+"\n-- .manifest --\n{\"revision\": \"r2\"}")
	r.says(t, "orders", "a policy that does not compile is told of", func(m report, b *reported) bool {
		return b.Code == "bundle_error" && b.ActiveRevision == "r1" && b.LastSuccessfulActivation.Equal(activated) &&
			len(b.Errors) == 1 && b.Errors[0].Code == "rego_unsafe_var_error" && m.Plugins["bundle"].State == "OK"
	})
	s.set("/bundles/orders", "package envoy.authz\nallow := false\n-- .manifest --\n{\"revision\": \"r3\"}")
	r.says(t, "orders", "the next one that is good is told of", func(_ report, b *reported) bool {
		return b.Code == "" && b.ActiveRevision == "r3" && b.LastSuccessfulActivation.After(activated)
	})
	s.Close()
	r.says(t, "orders", "a service that is away is told of", func(_ report, b *reported) bool {
		return b.Code == "bundle_error" && b.ActiveRevision == "r3" && b.HTTPCode == "" && len(b.Errors) == 0
	})
	if _, n := r.last("orders"); n > 20 {
		t.Errorf("got %d reports of four changes", n)
	}
}

// A tenant that could not be loaded says why; a name that anybody may have invented
// is not told of, unless the operator names it.
func TestStatusOfFailedLoad(t *testing.T) {
	s, r := newService(t), newReports(t)
	p := reporting(t, s, r, "status: {service: r}\ndecision_logs: {service: r}", tenants.Config{Preload: []tenants.ID{"named"}, RetryAfter: 50 * time.Millisecond})
	s.set("/bundles/orders", bad)
	for _, id := range []tenants.ID{"orders", "nobody"} {
		if got := allowed(p, id); !strings.Contains(got, "unknown") && !strings.Contains(got, "not ready") {
			t.Errorf("%s: got %s", id, got)
		}
	}
	r.says(t, "orders", "what does not compile is told of", func(m report, b *reported) bool {
		return b.Code == "bundle_error" && len(b.Errors) == 1 && b.ActiveRevision == "" && b.LastSuccessfulActivation.IsZero() &&
			b.Type == "snapshot" && b.Size == 0 && m.Plugins["bundle"].State == "NOT_READY" &&
			m.DecisionLogs != nil && m.Plugins["decision_logs"].State == "OK"
	})
	r.says(t, "named", "a tenant that is to be loaded and is not there is told of", func(m report, b *reported) bool {
		return b.Code == "bundle_error" && b.HTTPCode == "404" && b.Message == "server replied with Not Found" && b.Type == "" &&
			!b.LastRequest.IsZero() && b.LastSuccessfulRequest.IsZero() && m.Plugins["bundle"].State == "NOT_READY"
	})
	s.set("/bundles/orders", allow)
	eventually(t, "the repaired one decides", func() bool { return allowed(p, "orders") == "true" })
	r.says(t, "orders", "that is told of", func(m report, b *reported) bool {
		return b.Code == "" && !b.LastSuccessfulActivation.IsZero() && m.Plugins["bundle"].State == "OK"
	})
	if _, n := r.last("nobody"); n != 0 {
		t.Errorf("got %d reports of an unknown tenant, want none", n)
	}
}

// What is discovered is told of, also where it cannot be used.
func TestStatusOfDiscovery(t *testing.T) {
	s, r := newService(t), newReports(t)
	opa := discovering + "status: {service: r}\n"
	block := map[string]any{}
	if err := yaml.Unmarshal([]byte(strings.ReplaceAll(opa, `services: {s: {url: "URL"}}`, fmt.Sprintf("services: {s: {url: %q}, r: {url: %q}}", s.URL, r.URL))), &block); err != nil {
		t.Fatal(err)
	}
	block["discovery"].(map[string]any)["service"] = "s"
	template, _, err := control.Parse(block, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := authztest.Pool(t, tenants.Config{RetryAfter: 50 * time.Millisecond, Settings: func(id tenants.ID) (*tenants.Settings, error) {
		tenant, err := template.Tenant(string(id))
		return &tenants.Settings{Tenant: tenant}, err
	}})

	s.set("/discovery/orders", "package other\nx := 1")
	_ = allowed(p, "orders")
	r.says(t, "orders", "an undefined configuration is told of", func(m report, _ *reported) bool {
		_, bundles := m.Plugins["bundle"]
		return m.Discovery != nil && m.Discovery.Code == "bundle_error" && m.Discovery.Message == "undefined configuration" &&
			m.Discovery.LastSuccessfulActivation.IsZero() && m.Plugins["discovery"].State == "NOT_READY" && !bundles && len(m.Bundles) == 0
	})
	// The bundle that is discovered is at fault: that is told of, and no panic.
	s.set("/discovery/orders", says(`bundles := {"policy": {"service": "s", "resource": "orders", `+polled+`}}`))
	s.set("/orders", bad)
	eventually(t, "the configuration is discovered", func() bool { return strings.Contains(allowed(p, "orders"), "rego_unsafe_var_error") })
	r.says(t, "orders", "the bundle at fault is told of", func(m report, b *reported) bool {
		return m.Discovery != nil && m.Discovery.Code == "" && !m.Discovery.LastSuccessfulActivation.IsZero() && m.Plugins["discovery"].State == "OK" &&
			b.Code == "bundle_error" && m.Plugins["bundle"].State == "NOT_READY"
	})
	s.set("/orders", allow)
	eventually(t, "it decides", func() bool { return allowed(p, "orders") == "true" })
	r.says(t, "orders", "that is told of", func(m report, b *reported) bool {
		return m.Discovery.Code == "" && b.Code == "" && m.Plugins["bundle"].State == "OK"
	})
	s.set("/discovery/orders", says(`bundles := {"policy": {"service": "absent"}}`))
	r.says(t, "orders", "a configuration that cannot be used is told of", func(m report, b *reported) bool {
		return m.Discovery.Code == "bundle_error" && strings.Contains(m.Discovery.Message, "absent") && b.Code == "" &&
			!m.Discovery.LastSuccessfulActivation.IsZero() && m.Plugins["discovery"].State == "OK"
	})
	if got := allowed(p, "orders"); got != "true" {
		t.Errorf("with a configuration that cannot be used: got %s, want what decided before", got)
	}
}

// With a manual trigger the status is sent when somebody asks for a refresh, and at
// no other time.
func TestStatusManual(t *testing.T) {
	s, r := newService(t), newReports(t)
	p := reporting(t, s, r, `status: {service: r, trigger: manual, partition_name: "p/q"}`, tenants.Config{})
	s.set("/bundles/orders", allow)
	if got := allowed(p, "orders"); got != "true" {
		t.Fatalf("got %s", got)
	}
	s.set("/bundles/orders", "package envoy.authz\nallow := false")
	eventually(t, "the update decides", func() bool { return allowed(p, "orders") == "false" })
	if _, n := r.last("orders"); n != 0 {
		t.Errorf("got %d reports before anybody asked, want none", n)
	}
	if err := p.Refresh(context.Background(), "orders"); err != nil {
		t.Fatal(err)
	}
	r.says(t, "orders", "the refresh is told of", func(_ report, b *reported) bool { return b.Code == "" })
	if _, n := r.last("orders"); n != 1 {
		t.Errorf("got %d reports after one refresh, want 1", n)
	}
}

// A service that takes no status is asked again, and what is told then is what is
// so then.
func TestStatusIsSentAgain(t *testing.T) {
	s, r := newService(t), newReports(t)
	r.answer("/status", http.StatusServiceUnavailable)
	p := reporting(t, s, r, `status: {service: r}`, tenants.Config{})
	s.set("/bundles/orders", allow+"\n-- .manifest --\n{\"revision\": \"r1\"}")
	_ = allowed(p, "orders")
	eventually(t, "it was tried", func() bool { return r.tried() > 0 })
	s.set("/bundles/orders", allow+"\n-- .manifest --\n{\"revision\": \"r2\"}")
	eventually(t, "the update decides", func() bool { st, _ := p.Tenant("orders"); return st.Revision == "r2" })
	r.answer("/status", 0)
	r.says(t, "orders", "what is so now is told", func(_ report, b *reported) bool { return b.ActiveRevision == "r2" })
}

// A decision log that begins to fail is told of, and so is that it does no more.
func TestStatusOfLog(t *testing.T) {
	s, r := newService(t), newReports(t)
	logs, _ := authztest.Logs(t)
	p := reporting(t, s, r, "status: {service: r}\ndecision_logs: {service: r, reporting: {min_delay_seconds: 0.1, max_delay_seconds: 0.1}}", tenants.Config{Logs: logs})
	s.set("/bundles/orders", allow)
	r.answer("/logs", http.StatusServiceUnavailable)
	_ = allowed(p, "orders")
	r.says(t, "orders", "the fault is told of", func(m report, _ *reported) bool {
		l := m.DecisionLogs
		return l != nil && l.Code == "decision_log_error" && l.HTTPCode == "503" &&
			l.Message == "log upload failed, server replied with HTTP 503 Service Unavailable" && m.Plugins["decision_logs"].State == "OK"
	})
	r.answer("/logs", 0)
	r.says(t, "orders", "its end is told of", func(m report, _ *reported) bool {
		return m.DecisionLogs != nil && m.DecisionLogs.Code == "" && m.DecisionLogs.Message == "" && m.DecisionLogs.HTTPCode == ""
	})
}

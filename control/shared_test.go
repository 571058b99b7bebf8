package control

import (
	"context"
	"fmt"
	"net/http"
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/plugins/rest"
)

// What no tenant uses any more is forgotten.
func TestSharedForgets(t *testing.T) {
	template, _, err := Parse(map[string]any{
		"services": map[string]any{"s": map[string]any{
			"url":                             "https://{{ .tenant }}.example.com",
			"response_header_timeout_seconds": 3,
			"tls":                             map[string]any{"ca_cert": "/no/{{ .tenant }}"},
			"credentials": map[string]any{"oauth2": map[string]any{
				"token_url": "https://x", "client_id": "{{ .tenant }}", "client_secret": "x",
			}},
		}},
		"bundles": map[string]any{"b": map[string]any{}},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	sizes := func() (int, int) {
		auths.mu.Lock()
		defer auths.mu.Unlock()
		transports.mu.Lock()
		defer transports.mu.Unlock()
		return len(auths.m), len(transports.m)
	}
	const n = 1000
	tenants := make([]*Tenant, n)
	for i := range tenants {
		if tenants[i], err = template.Tenant(fmt.Sprint("tenant-", i)); err != nil {
			t.Fatal(err)
		}
	}
	if a, b := sizes(); a < n || b < n {
		t.Errorf("got %d and %d, want each tenant's own", a, b)
	}
	runtime.GC()
	if a, b := sizes(); a < n || b < n {
		t.Errorf("in use: got %d and %d, want each tenant's own", a, b)
	}
	runtime.KeepAlive(tenants)
	tenants = nil
	for range 100 {
		runtime.GC()
		if a, b := sizes(); a < n/10 && b < n/10 {
			return
		}
		time.Sleep(10 * time.Millisecond) // cleanups run on a goroutine of the runtime
	}
	a, b := sizes()
	t.Errorf("got %d and %d left", a, b)
}

// stuck is a plugin that does not return before it is released.
type stuck struct{ release chan struct{} }

func (stuck) NewClient(rest.Config) (*http.Client, error) { return nil, nil }
func (p stuck) Prepare(*http.Request) error               { <-p.release; return nil }

// A plugin that hangs for good is given up, but not any number of times.
func TestAuthGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuth(map[string]any{
			"url":         "https://example.com",
			"credentials": map[string]any{"s3_signing": map[string]any{"profile_credentials": map[string]any{"path": "/no", "aws_region": "r"}}},
		}, nil)
		authorize := func(wait time.Duration) error {
			ctx, cancel := context.WithTimeout(t.Context(), wait)
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://example.com", nil)
			if err != nil {
				t.Fatal(err)
			}
			return a.authorize(req)
		}
		release := make(chan struct{})
		for i := range maxHung + 1 {
			a.turn <- struct{}{}
			a.plugin = stuck{release}
			<-a.turn
			if err := authorize(time.Second); err != context.DeadlineExceeded {
				t.Errorf("got %v, want the deadline to be met", err)
			}
			if err := authorize(time.Second); err != context.DeadlineExceeded {
				t.Errorf("before it is given up: got %v, want to wait in vain", err)
			}
			if i == maxHung {
				break
			}
			// The next one is OPA's, which finds no file.
			if err := authorize(maxPrepare); err == nil || err == context.DeadlineExceeded {
				t.Errorf("got %v, want the error of a new plugin", err)
			}
		}
		if err := authorize(2 * maxPrepare); err != context.DeadlineExceeded {
			t.Errorf("one too many: got %v, want to wait in vain", err)
		}
		close(release)
		if err := authorize(maxPrepare); err != nil {
			t.Errorf("released: got %v", err)
		}
		synctest.Wait()
		if n := a.hung.Load(); n != 0 {
			t.Errorf("got %d that hang, want none", n)
		}
	})
}

// What is said of many tenants alike is one value; what differs for one is its own.
func TestEqualSettingsAreOne(t *testing.T) {
	template, _, err := Parse(map[string]any{
		"services": map[string]any{
			"s": map[string]any{"url": "https://s.example.com", "credentials": map[string]any{"bearer": map[string]any{"token": "x"}}},
			"o": map[string]any{"url": "https://{{ .tenant }}.example.com"},
		},
		"labels":        map[string]any{"app": "{{ .tenant }}"},
		"bundles":       map[string]any{"b": map[string]any{"service": "s", "resource": "{{ .tenant }}.tar.gz"}, "own": map[string]any{"service": "o"}},
		"decision_logs": map[string]any{"service": "s", "reporting": map[string]any{"max_decisions_per_second": 7}},
		"status":        map[string]any{"service": "s"},
	}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	of := func(template *Template, name string) *Tenant {
		t.Helper()
		tenant, err := template.Tenant(name)
		if err != nil {
			t.Fatal(err)
		}
		return tenant
	}
	a, b := of(template, "a"), of(template, "b")
	if a.Log != b.Log || a.Status != b.Status || a.Bundles[0].Source != b.Bundles[0].Source {
		t.Error("what is equal for two tenants is there twice")
	}
	if a.Bundles[0].Resource == b.Bundles[0].Resource || a.Labels["app"] == b.Labels["app"] || a.Bundles[1].Source == b.Bundles[1].Source {
		t.Error("what is one tenant's own is another's too")
	}
	for name, change := range map[string]map[string]any{
		"partition": {"decision_logs": map[string]any{"service": "s", "partition_name": "{{ .tenant }}"}, "status": map[string]any{"service": "s", "partition_name": "{{ .tenant }}"}},
		"service":   {"decision_logs": map[string]any{"service": "o"}, "status": map[string]any{"service": "o"}},
	} {
		block := map[string]any{"services": template.block["services"], "bundles": template.block["bundles"]}
		for k, v := range change {
			block[k] = v
		}
		other, _, err := Parse(block, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if a, b := of(other, "a"), of(other, "b"); a.Log == b.Log || a.Status == b.Status {
			t.Errorf("%s: what differs for two tenants is there once", name)
		}
	}
}

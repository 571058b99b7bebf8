package control_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

const boot = `
services:
  s: {url: "https://example.com", credentials: {bearer: {token: secret}}}
  t: {url: "https://example.org"}
keys: {}
labels: {app: "{{ .tenant }}"}
discovery: {service: s, resource: "discovery/{{ .tenant }}", decision: example.config}
decision_logs: {service: s, reporting: {max_delay_seconds: 20, min_delay_seconds: 10}}
`

func TestDiscoveryIsRead(t *testing.T) {
	d := mustTenant(t, boot, "orders").Discovery
	if d == nil || d.Resource != "discovery/orders" || d.Decision != "example/config" || d.Name != "discovery" {
		t.Fatalf("got %+v", d)
	}
	old := mustTenant(t, strings.Replace(boot, `resource: "discovery/{{ .tenant }}", decision: example.config`, "name: a/b, prefix: p", 1), "orders").Discovery
	if old.Resource != "p/a/b" || old.Decision != "a/b" {
		t.Errorf("by the deprecated name: got resource %q and decision %q", old.Resource, old.Decision)
	}
	all := mustTenant(t, strings.Replace(boot, ", decision: example.config", "", 1), "orders").Discovery
	if all.Decision != "" {
		t.Errorf("without a decision: got %q, want all of data", all.Decision)
	}
}

func TestDiscovered(t *testing.T) {
	tenant := mustTenant(t, boot, "orders")
	doc := map[string]any{
		"labels":        map[string]any{"app": "other", "region": "eu"},
		"bundles":       map[string]any{"b": map[string]any{"service": "t", "resource": "x"}},
		"services":      map[string]any{"t": map[string]any{"url": "https://example.org"}}, // as the operator has it
		"decision_logs": map[string]any{"console": true, "reporting": map[string]any{"max_delay_seconds": 1.0, "upload_size_limit_bytes": 1000.0}},
		"plugins":       map[string]any{"envoy_ext_authz_grpc": map[string]any{"path": "a/b", "dry-run": true}},
		"discovery":     map[string]any{"resource": "elsewhere"},
		"status":        map[string]any{"service": "t"},
	}
	got, err := tenant.Discovery.Tenant(doc)
	if err != nil {
		t.Fatal(err)
	}
	if got.Labels["app"] != "orders" || got.Labels["region"] != "eu" {
		t.Errorf("got labels %v", got.Labels)
	}
	if len(got.Bundles) != 1 || got.Bundles[0].Resource != "x" || got.Entry != "a/b" || !got.DryRun || got.Status == nil {
		t.Errorf("got %+v", got)
	}
	if got.Discovery.Resource != "discovery/orders" {
		t.Errorf("got discovery from %q, want the operator's", got.Discovery.Resource)
	}
	if r := got.Log.Reporting; r.MaxDelay.Seconds() != 20 || r.UploadBytes != 1000 || len(got.Log.Sinks) != 2 {
		t.Errorf("got decision log %+v", got.Log)
	}
	if want := []string{"decision_logs.reporting.max_delay_seconds", "discovery.resource", "labels.app"}; !slices.Equal(got.Overridden, want) {
		t.Errorf("got overridden keys %q, want %q", got.Overridden, want)
	}
	if got.Log.OnFull != decisionlog.DropOldest {
		t.Errorf("got on_full %d", got.Log.OnFull)
	}
}

// Whoever writes a discovered configuration is not the operator.
func TestDiscoveredIsRestricted(t *testing.T) {
	bundle := map[string]any{"b": map[string]any{"service": "s", "resource": "x"}}
	for _, c := range []struct {
		name string
		doc  any
		want string
	}{
		{"not an object", []any{}, "discovery: the discovered configuration is not an object"},
		{"no bundles", map[string]any{}, "discovery.bundles: the discovered configuration names none"},
		{"another service", map[string]any{"bundles": bundle, "services": map[string]any{"u": map[string]any{"url": "https://evil.example"}}},
			"discovery.services.u: may not be discovered"},
		{"a service of the operator's, changed", map[string]any{"bundles": bundle, "services": map[string]any{"t": map[string]any{"url": "https://evil.example"}}},
			"discovery.services.t: may not be discovered"},
		{"a service in a list", map[string]any{"bundles": bundle, "services": []any{map[string]any{"name": "t", "url": "https://evil.example"}}},
			"discovery.services.t: may not be discovered"},
		{"services of no form", map[string]any{"bundles": bundle, "services": "s"}, "discovery.services: may not be discovered"},
		{"a key", map[string]any{"bundles": bundle, "keys": map[string]any{"k": map[string]any{"key": "x"}}}, "discovery.keys.k: may not be discovered"},
		{"a log file", map[string]any{"bundles": bundle, "decision_logs": map[string]any{"file": map[string]any{"path": "/etc/x"}}},
			"discovery.decision_logs.file: may not be discovered"},
		{"descriptors", map[string]any{"bundles": bundle, "plugins": map[string]any{"envoy.ext_authz.grpc": map[string]any{"proto-descriptor": "/etc/x"}}},
			"discovery.plugins.envoy.ext_authz.grpc.proto-descriptor: may not be discovered"},
		{"a service that is not there", map[string]any{"bundles": map[string]any{"b": map[string]any{"service": "u", "resource": "x"}}},
			`discovery.bundles.b.service: no service "u"`},
		{"a file", map[string]any{"bundles": map[string]any{"b": map[string]any{"service": "s", "resource": "file:///etc/x"}}},
			"discovery.bundles.b.resource: not supported: a file"},
		{"an unknown key", map[string]any{"bundles": bundle, "bundels": 1}, "discovery.bundels: unknown or unsupported key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := mustTenant(t, boot, "orders").Discovery.Tenant(c.doc)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v\nwant %q in it", err, c.want)
			}
		})
	}
}

// Neither templates nor the environment mean anything in what is discovered.
func TestDiscoveredIsLiteral(t *testing.T) {
	t.Setenv("GATEHOUSE_TEST_SECRET", "secret")
	got, err := mustTenant(t, boot, "orders").Discovery.Tenant(map[string]any{"bundles": map[string]any{
		"b": map[string]any{"service": "s", "resource": "{{ .tenant }}/${GATEHOUSE_TEST_SECRET}"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if got.Bundles[0].Resource != "{{ .tenant }}/${GATEHOUSE_TEST_SECRET}" {
		t.Errorf("got resource %q, want it as it stands", got.Bundles[0].Resource)
	}
}

func TestDiscoveryEqual(t *testing.T) {
	a, b := mustTenant(t, boot, "orders"), mustTenant(t, boot, "orders")
	if !a.Discovery.Equal(b.Discovery) {
		t.Error("two of one configuration: not equal")
	}
	moved := mustTenant(t, strings.Replace(boot, "https://example.org", "https://example.net", 1), "orders")
	if a.Discovery.Equal(moved.Discovery) {
		t.Error("a service that only a discovered configuration names has moved: got equal")
	}
	var none *control.Discovery
	if a.Discovery.Equal(nil) || !none.Equal(nil) {
		t.Error("none is equal to none alone")
	}
}

package control_test

import (
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

const withLogs = `
services: {s: {url: "https://example.com"}}
bundles: {main: {}}
`

func parsed(t *testing.T, more string) (*control.Tenant, []control.Fault) {
	t.Helper()
	block := map[string]any{}
	if err := yaml.Unmarshal([]byte(withLogs+more), &block); err != nil {
		t.Fatal(err)
	}
	template, notes, err := control.Parse(block, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	tenant, err := template.Tenant("orders")
	if err != nil {
		t.Fatal(err)
	}
	return tenant, notes
}

// The path is logged as the configuration has it.
func TestPath(t *testing.T) {
	for more, want := range map[string]string{
		"": "envoy/authz/allow",
		"plugins: {envoy_ext_authz_grpc: {path: /envoy/authz/other}}":      "/envoy/authz/other",
		"plugins: {envoy.ext_authz.grpc: {path: \"{{ .tenant }}/allow\"}}": "orders/allow",
	} {
		tenant, _ := parsed(t, more)
		if tenant.Path != want || tenant.Entry != strings.TrimPrefix(want, "/") {
			t.Errorf("%q: got path %q of entry point %q, want %q", more, tenant.Path, tenant.Entry, want)
		}
	}
}

// nd_builtin_cache means something at the top, and is noted elsewhere.
func TestNDBuiltinCache(t *testing.T) {
	tenant, notes := parsed(t, "decision_logs: {nd_builtin_cache: true}")
	noted := func(f control.Fault) bool { return f.Path == "decision_logs.nd_builtin_cache" }
	if tenant.NDBuiltinCache || !slices.ContainsFunc(notes, noted) {
		t.Errorf("below decision_logs: got %t, noted %v", tenant.NDBuiltinCache, notes)
	}
	tenant, notes = parsed(t, "nd_builtin_cache: true\ndecision_logs: {console: true}")
	if !tenant.NDBuiltinCache || slices.ContainsFunc(notes, noted) {
		t.Errorf("at the top: got %t, noted %v", tenant.NDBuiltinCache, notes)
	}
}

// Decisions go to a collector where there is one, and only the operator says so.
func TestLogRecords(t *testing.T) {
	parse := func(opts control.Options) (*control.Tenant, error) {
		block := map[string]any{}
		if err := yaml.Unmarshal([]byte(withLogs+"decision_logs: {otlp: true}"), &block); err != nil {
			t.Fatal(err)
		}
		template, _, err := control.Parse(block, opts)
		if err != nil {
			return nil, err
		}
		return template.Tenant("orders")
	}
	tenant, err := parse(control.Options{Records: true})
	if err != nil || len(tenant.Log.Sinks) != 1 || tenant.Log.Sinks[0] != (decisionlog.Records{}) {
		t.Errorf("got %+v, %v, want the one sink", tenant, err)
	}
	if _, err := parse(control.Options{}); err == nil || !strings.Contains(err.Error(), "decision_logs.otlp: needs telemetry.otlp.endpoint") {
		t.Errorf("without a collector: got %v", err)
	}
}

package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

func TestTelemetryKeys(t *testing.T) {
	t.Setenv("OTLP_TOKEN", "hunter2")
	cfg := mustLoad(t, service+`
telemetry:
  otlp:
    endpoint: https://collector.example.com:4318/otlp
    protocol: http
    headers: {Authorization: "Bearer ${OTLP_TOKEN}"}
    compression: none
    timeout: 3s
  traces: {sampling: 0.5, control_sampling: 0, propagators: [b3, tracecontext], prints: true}
  metrics: {enabled: false, interval: 5s}
  attributes: {deployment.environment.name: prod}
`)
	c := cfg.Telemetry
	if c.OTLP.Headers["Authorization"] != "Bearer hunter2" || time.Duration(c.OTLP.Timeout) != 3*time.Second || c.Traces.Sampling != 0.5 ||
		c.Traces.ControlSampling != 0 || !c.Traces.Prints || !c.Traces.Enabled || c.Metrics.Enabled || c.Attributes["deployment.environment.name"] != "prod" {
		t.Errorf("got %+v", c)
	}
	if want := (tenants.Propagators{tenants.B3, tenants.TraceContext}); !slices.Equal(cfg.Propagators, want) {
		t.Errorf("got %v, want %v", cfg.Propagators, want)
	}
	if keys := needRestart(mustLoad(t, service), cfg); !slices.Equal(keys, []string{"telemetry"}) {
		t.Errorf("got %v, want telemetry to need a restart", keys)
	}
}

// Bad values are refused, each with its place, and without what is secret in them.
func TestTelemetryFaults(t *testing.T) {
	for key, want := range map[string]string{
		"otlp: {endpoint: collector}":                                               `telemetry.otlp.endpoint: endpoint is not host:port`,
		`otlp: {endpoint: "https://u:hunter2@c:4317"}`:                              `telemetry.otlp.endpoint: endpoint has a user`,
		`otlp: {endpoint: "c:4317", protocol: udp}`:                                 `protocol "udp"`,
		`otlp: {protocol: udp}`:                                                     `telemetry.otlp.protocol: "udp"`,
		`otlp: {compression: zstd}`:                                                 `telemetry.otlp.compression: "zstd"`,
		`otlp: {timeout: 0s}`:                                                       `"0s" is not a time`,
		`otlp: {headers: {"a b": hunter2}}`:                                         `telemetry.otlp.headers: "a b" is not the name of a header`,
		`otlp: {endpoint: "c:4317", headers: {a: "${GATEHOUSE_TEST_NOT_SET}"}}`:     `"GATEHOUSE_TEST_NOT_SET" is not set`,
		`otlp: {endpoint: "c:4317", tls: {ca: /nonexistent.pem}}`:                   `telemetry.otlp.tls: ca:`,
		`otlp: {endpoint: "c:4317", tls: {cert: /nonexistent.pem}}`:                 `telemetry.otlp.tls: cert and key go together`,
		`otlp: {endpoint: "http://c:4317", tls: {cert: go.mod, key: go.mod}}`:       `telemetry.otlp.tls: cert:`,
		`traces: {sampling: 1.5}`:                                                   `telemetry.traces.sampling: 1.5 is not a number from 0 to 1`,
		`traces: {control_sampling: .nan}`:                                          `telemetry.traces.control_sampling`,
		`traces: {propagators: [tracecontext, baggage]}`:                            `telemetry.traces.propagators[1]: "baggage"`,
		`traces: {print: true}`:                                                     `unknown key "print"`,
		"attributes: {" + strings.Join(slices.Collect(numbered(65)), ", ") + ": x}": `telemetry.attributes: are 65, limit 64`,
	} {
		_, err := load(writeFile(t, service+"\ntelemetry: {"+key+"}\n"), "", false)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", key, err, want)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the fault has the secret: %v", key, err)
		}
	}
}

// numbered are n keys, each but the last with a value.
func numbered(n int) func(func(string) bool) {
	return func(yield func(string) bool) {
		for i := range n {
			text := fmt.Sprintf("a%d: x", i)
			if i == n-1 {
				text = fmt.Sprintf("a%d", i)
			}
			if !yield(text) {
				return
			}
		}
	}
}

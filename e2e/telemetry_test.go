package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// collector is an OpenTelemetry collector that writes to a file what it is sent.
type collector struct {
	*stage.Process
	grpc, http string // addresses
	health     string // address
	config     string // file
	out        string // file
}

func startCollector(t *testing.T) *collector {
	t.Helper()
	dir := t.TempDir()
	c := &collector{config: filepath.Join(dir, "collector.yaml"), out: filepath.Join(dir, "telemetry.jsonl")}
	for _, addr := range []*string{&c.grpc, &c.http, &c.health} {
		var err error
		if *addr, err = stage.FreeAddr(); err != nil {
			t.Fatal(err)
		}
	}
	config := fmt.Sprintf(`
receivers: {otlp: {protocols: {grpc: {endpoint: %q}, http: {endpoint: %q}}}}
exporters: {file: {path: %q, append: true, flush_interval: 50ms}}
extensions: {health_check: {endpoint: %q}}
service:
  extensions: [health_check]
  telemetry: {metrics: {level: none}}
  pipelines:
    traces: {receivers: [otlp], exporters: [file]}
    metrics: {receivers: [otlp], exporters: [file]}
    logs: {receivers: [otlp], exporters: [file]}
`, c.grpc, c.http, c.out, c.health)
	if err := os.WriteFile(c.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c.start(t)
	return c
}

// start starts it, also again, at the same addresses.
func (c *collector) start(t *testing.T) {
	t.Helper()
	binary, err := stage.Tool("otelcol")
	if err != nil {
		t.Fatal(err)
	}
	p, err := stage.Start("otelcol", exec.Command(binary, "--config", c.config))
	if err != nil {
		t.Fatal(err)
	}
	c.Process = p
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("output of the collector:\n%s", tail(p.Output(), 4<<10))
		}
	})
	eventually(t, "the collector is healthy", func() bool {
		resp, err := http.Get("http://" + c.health)
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
}

// written is all that it has written.
func (c *collector) written(t *testing.T) []byte {
	t.Helper()
	text, err := os.ReadFile(c.out)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return text
}

// otelValue is a value of OTLP's JSON.
type otelValue struct {
	StringValue string
	BoolValue   bool
	IntValue    json.Number
	DoubleValue float64
	ArrayValue  struct{ Values []otelValue }
}

func (v otelValue) text() string {
	switch {
	case v.StringValue != "":
		return v.StringValue
	case v.IntValue != "":
		return v.IntValue.String()
	case v.DoubleValue != 0:
		return fmt.Sprint(v.DoubleValue)
	}
	var all []string
	for _, v := range v.ArrayValue.Values {
		all = append(all, v.text())
	}
	return strings.Join(all, ",")
}

type otelAttrs []struct {
	Key   string
	Value otelValue
}

func (as otelAttrs) get(key string) string {
	for _, a := range as {
		if a.Key == key {
			return a.Value.text()
		}
	}
	return ""
}

// span is a span as the collector has it.
type span struct {
	TraceID, SpanID, ParentSpanID, Name string
	Kind                                int
	Attributes                          otelAttrs
	Links                               []struct{ TraceID, SpanID string }
	Status                              struct {
		Code    int
		Message string
	}

	service string
}

// spans are all those that the collector has.
func (c *collector) spans(t *testing.T) []span {
	t.Helper()
	var all []span
	for line := range bytes.Lines(c.written(t)) {
		var batch struct {
			ResourceSpans []struct {
				Resource   struct{ Attributes otelAttrs }
				ScopeSpans []struct{ Spans []span }
			}
		}
		if json.Unmarshal(line, &batch) != nil {
			continue // it is not whole yet
		}
		for _, r := range batch.ResourceSpans {
			for _, s := range r.ScopeSpans {
				for _, span := range s.Spans {
					span.service = r.Resource.Attributes.get("service.name")
					all = append(all, span)
				}
			}
		}
	}
	return all
}

// span waits for a span of which ok holds.
func (c *collector) span(t *testing.T, what string, ok func(span) bool) (found span) {
	t.Helper()
	eventually(t, "the collector has "+what, func() bool {
		all := c.spans(t)
		i := slices.IndexFunc(all, ok)
		if i >= 0 {
			found = all[i]
		}
		return i >= 0
	})
	return found
}

// decision waits for the span of a decision.
func (c *collector) decision(t *testing.T, id string) span {
	t.Helper()
	return c.span(t, "the span of decision "+id, func(s span) bool {
		return s.Name == "decision" && s.Attributes.get("gatehouse.decision.id") == id
	})
}

// metrics are the names of all metrics that the collector has of Gatehouse.
func (c *collector) metrics(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for line := range bytes.Lines(c.written(t)) {
		var batch struct {
			ResourceMetrics []struct {
				Resource     struct{ Attributes otelAttrs }
				ScopeMetrics []struct{ Metrics []struct{ Name string } }
			}
		}
		if json.Unmarshal(line, &batch) != nil {
			continue
		}
		for _, r := range batch.ResourceMetrics {
			if r.Resource.Attributes.get("service.name") != "gatehouse" || r.Resource.Attributes.get("service.instance.id") == "" {
				continue
			}
			for _, s := range r.ScopeMetrics {
				for _, m := range s.Metrics {
					names[m.Name] = true
				}
			}
		}
	}
	return names
}

// The secrets that nothing that is sent may have.
const (
	secretOfClient  = "client-secret-4711"
	secretOfBundle  = "bundle-secret-4711"
	secretOfService = "service-secret-4711"
	secretOfOTLP    = "otlp-secret-4711"
)

// telemetryConfig is a gatehouse that asks r for bundles, tells it decisions and
// status, and sends telemetry.
func telemetryConfig(r *stage.Recorder, telemetry string) string {
	return fmt.Sprintf(`
opa:
  services:
    s: {url: %q, credentials: {bearer: {token: %q}}}
  labels: {team: shop}
  bundles: {policy: {service: s, resource: "bundles/{{ .tenant }}?token=%s", polling: {min_delay_seconds: 0.2, max_delay_seconds: 0.3}}}
  decision_logs: {service: s, reporting: {min_delay_seconds: 0.2, max_delay_seconds: 0.3}}
  status: {service: s}
telemetry:
%s`, r.URL, secretOfService, secretOfBundle, telemetry)
}

// Real parts: an Envoy whose own spans go to the same collector. A decision is a
// span below Envoy's, in its trace; so is what its policy asks, in its own way the
// control plane; metrics come, and no secret does.
func TestTelemetry(t *testing.T) {
	for _, protocol := range []string{"grpc", "http"} {
		t.Run(protocol, func(t *testing.T) { testTelemetry(t, protocol) })
	}
}

func testTelemetry(t *testing.T, protocol string) {
	c := startCollector(t)
	r, err := stage.StartRecorder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	r.Put("/bundles/orders", stage.Bundle(version("v1")))
	endpoint := map[string]string{"grpc": "http://" + c.grpc, "http": "http://" + c.http}[protocol]
	g := serve(t, telemetryConfig(r, fmt.Sprintf(`
  otlp: {endpoint: %q, protocol: %s, headers: {x-key: %s}}
  traces: {sampling: 1}
  metrics: {interval: 500ms}
  attributes: {deployment.environment.name: test}
`, endpoint, protocol, secretOfOTLP)))
	n := startEnvoy(t, envoyBinary(t, versions[0]), g.GRPC, options{Collector: c.grpc}, listener{
		Name: "main", Routes: []route{{Prefix: "/orders/", Context: map[string]string{"tenant": "orders"}}},
	})
	ask := func(headers ...string) (decision string) {
		t.Helper()
		resp := n.get(t, "main", "/orders/1", append(headers, "authorization: Bearer "+secretOfClient, "cookie: session="+secretOfClient)...)
		n.allowed(t, resp)
		return n.logged(t, resp)["decision_id"].(string)
	}

	id := ask()
	decision := c.decision(t, id)
	parent := c.span(t, "the parent of the decision", func(s span) bool { return s.SpanID == decision.ParentSpanID })
	if parent.service != "envoy" || parent.TraceID != decision.TraceID || decision.service != "gatehouse" || decision.Kind != 2 {
		t.Errorf("the decision %+v is below %+v", decision, parent)
	}
	for key, want := range map[string]string{
		"gatehouse.tenant": "orders", "gatehouse.decision.outcome": "allowed", "gatehouse.entry_point": "envoy/authz/allow",
		"gatehouse.bundle.revisions": "v1", "gatehouse.label.team": "shop",
	} {
		equal(t, key, decision.Attributes.get(key), want)
	}

	// The decision log has the IDs of the span.
	eventually(t, "the decision is logged", func() bool {
		events, err := r.Events("/logs")
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range events {
			var e struct {
				DecisionID string `json:"decision_id"`
				TraceID    string `json:"trace_id"`
				SpanID     string `json:"span_id"`
			}
			if json.Unmarshal(text, &e) == nil && e.DecisionID == id {
				equal(t, "logged", e.TraceID+"/"+e.SpanID, decision.TraceID+"/"+decision.SpanID)
				return true
			}
		}
		return false
	})

	// A trace that its caller does not record has no span; the spans of what was
	// asked later are there when it is looked for.
	const unsampled = "4bf92f3577b34da6a3ce929d0e0e4736"
	dark := ask("traceparent: 00-" + unsampled + "-00f067aa0ba902b7-00")
	lit := ask("traceparent: 00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	equal(t, "the trace of the caller", c.decision(t, lit).TraceID, "5bf92f3577b34da6a3ce929d0e0e4736")
	for _, s := range c.spans(t) {
		if s.TraceID == unsampled || s.Attributes.get("gatehouse.decision.id") == dark {
			t.Errorf("there is a span of what is not recorded: %+v", s)
		}
	}

	testControlPlane(t, c, r, id)

	eventually(t, "metrics come", func() bool {
		names := c.metrics(t)
		return names["gatehouse_checks_total"] && names["gatehouse_decision_seconds"] && names["go_goroutines"]
	})
	eventually(t, "an exemplar that names a trace comes", func() bool { return exemplar.Match(c.written(t)) })
	exemplars(t, g)

	// A collector that is killed is missed by nobody; one that comes back has the
	// spans of what comes then.
	c.Kill()
	for range 50 {
		ask()
	}
	c.start(t)
	var after string
	eventually(t, "spans come again", func() bool {
		after = ask()
		return slices.ContainsFunc(c.spans(t), func(s span) bool {
			return s.service == "gatehouse" && s.Attributes.get("gatehouse.decision.id") == after
		})
	})

	// What is left is sent at the end.
	last := ask()
	if err := g.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-g.Done()
	c.decision(t, last)
	text := string(c.written(t)) + g.Output()
	for _, secret := range []string{secretOfClient, secretOfBundle, secretOfService, secretOfOTLP} {
		if i := strings.Index(text, secret); i >= 0 {
			t.Errorf("the secret %s was sent or logged: %s", secret, text[max(0, i-300):i+50])
		}
	}
}

// testControlPlane checks the spans of round trips. Id is a decision that was
// logged.
func testControlPlane(t *testing.T, c *collector, r *stage.Recorder, id string) {
	t.Helper()
	fetch := func(result string) span {
		return c.span(t, "a request for a bundle: "+result, func(s span) bool {
			return s.Name == "bundle fetch" && s.Attributes.get("gatehouse.bundle.result") == result
		})
	}
	fetched := fetch("new")
	equal(t, "resource", fetched.Attributes.get("gatehouse.bundle.resource"), "bundles/orders")
	equal(t, "path", fetched.Attributes.get("url.path"), "/bundles/orders")
	equal(t, "status", fetched.Attributes.get("http.response.status_code"), "200")
	equal(t, "status", fetch("not_modified").Attributes.get("http.response.status_code"), "304")
	activation := c.span(t, "the activation", func(s span) bool { return s.Name == "bundle activation" })
	if len(activation.Links) != 1 || activation.Links[0].SpanID != fetched.SpanID || activation.Attributes.get("gatehouse.bundle.revisions") != "v1" {
		t.Errorf("got %+v, fetched by %s", activation, fetched.SpanID)
	}
	upload := c.span(t, "the upload of the decision", func(s span) bool {
		return s.Name == "decision log upload" && strings.Contains(s.Attributes.get("gatehouse.decision.ids"), id)
	})
	if len(upload.Links) == 0 || upload.Attributes.get("gatehouse.tenant") != "orders" || upload.Attributes.get("gatehouse.decision_log.events") == "" ||
		upload.Attributes.get("http.response.status_code") != "200" {
		t.Errorf("got %+v", upload)
	}
	c.span(t, "a report", func(s span) bool {
		return s.Name == "status report" && s.Attributes.get("gatehouse.tenant") == "orders"
	})

	for _, path := range []string{"/bundles/orders", "/logs", "/status"} {
		all := r.Requests(path)
		if len(all) == 0 {
			t.Fatalf("%s was not asked", path)
		}
		parent := strings.Split(all[0].Header.Get("Traceparent"), "-")
		if len(parent) != 4 {
			t.Fatalf("%s was asked with %v", path, all[0].Header)
		}
		c.span(t, "the span of a request to "+path, func(s span) bool { return s.TraceID == parent[1] && s.SpanID == parent[2] })
	}
}

// exemplar is one in OTLP's JSON.
var exemplar = regexp.MustCompile(`"exemplars":\[\{[^]]*"traceId":"[0-9a-f]{32}"`)

// exemplars checks that /metrics leads to traces.
func exemplars(t *testing.T, g *stage.Gatehouse) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, "http://"+g.Admin+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var text bytes.Buffer
	if _, err := text.ReadFrom(resp.Body); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(text.String()) {
		if strings.HasPrefix(line, "gatehouse_decision_seconds_bucket") && strings.Contains(line, "# {") && strings.Contains(line, `trace_id="`) {
			return
		}
	}
	t.Error("no bucket of gatehouse_decision_seconds has an exemplar")
}

// B3 is read where the operator says so, in one header and in several.
func TestTelemetryB3(t *testing.T) {
	c := startCollector(t)
	g, _ := startGatehouse(t, fmt.Sprintf(`
telemetry:
  otlp: {endpoint: %q, insecure: true}
  traces: {sampling: 0, propagators: [b3, b3multi]}
`, c.grpc), tenants{"orders": "allow := true"})
	n := startEnvoy(t, envoyBinary(t, versions[0]), g.GRPC, options{}, listener{
		Name: "main", Routes: []route{{Prefix: "/orders/", Context: map[string]string{"tenant": "orders"}}},
	})
	const trace, parent = "80f198ee56343ba864fe8b2a57d3eff7", "e457b5a2e4d86bd1"
	ids := map[string]string{} // :: what → decision
	for _, c := range []struct {
		what    string
		headers []string
	}{
		{"nothing", nil},
		{"unsampled", []string{"b3: 90f198ee56343ba864fe8b2a57d3eff7-" + parent + "-0"}},
		{"no", []string{"b3: 0"}},
		{"single", []string{"b3: " + trace + "-" + parent + "-1"}},
		{"multi", []string{"x-b3-traceid: " + trace, "x-b3-spanid: " + parent, "x-b3-sampled: 1"}},
	} {
		resp := n.get(t, "main", "/orders/1", c.headers...)
		n.allowed(t, resp)
		ids[c.what] = n.logged(t, resp)["decision_id"].(string)
	}
	for _, what := range []string{"single", "multi"} {
		s := c.decision(t, ids[what])
		if s.TraceID != trace || s.ParentSpanID != parent {
			t.Errorf("%s: got %+v", what, s)
		}
	}
	for _, s := range c.spans(t) {
		if id := s.Attributes.get("gatehouse.decision.id"); id != "" && id != ids["single"] && id != ids["multi"] {
			t.Errorf("there is a span of what is not recorded: %+v", s)
		}
	}
}

package tenants_test

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// spans keeps what is recorded.
type spans struct{ *tracetest.SpanRecorder }

func newSpans() (spans, tenants.Tracing) {
	s := spans{tracetest.NewSpanRecorder()}
	tracer := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(s)).Tracer("test")
	return s, tenants.Tracing{Decisions: tracer, Control: tracer}
}

// named returns the spans of that name that have ended.
func (s spans) named(name string) []sdktrace.ReadOnlySpan {
	var list []sdktrace.ReadOnlySpan
	for _, span := range s.Ended() {
		if span.Name() == name {
			list = append(list, span)
		}
	}
	return list
}

// attrs are the attributes of a span, as text.
func attrs(span sdktrace.ReadOnlySpan) map[string]string {
	m := map[string]string{}
	for _, a := range span.Attributes() {
		m[string(a.Key)] = a.Value.String()
	}
	return m
}

// caller is a caller's trace.
var caller = tenants.Trace{TraceID: "4bf92f3577b34da6a3ce929d0e0e4736", SpanID: "00f067aa0ba902b7", State: "vendor=1"}

func (s *stage) decide(id tenants.ID, questions ...tenants.Question) {
	s.t.Helper()
	if err := s.Decide(context.Background(), id, questions, func(int, tenants.Answer) {}); err != nil {
		s.t.Fatal(err)
	}
}

// A decision is a span of its caller's trace, and is logged under its own IDs.
func TestDecisionSpan(t *testing.T) {
	rec, tracing := newSpans()
	s, console := logged(t, tenants.Config{Tracing: tracing}, func(_ tenants.ID, s *tenants.Settings) {
		s.Labels = map[string]string{"team": "shop"}
	})
	s.Set("orders", allow+"\n-- .manifest --\n{\"revision\": \"r7\"}")
	s.decide("orders", tenants.Question{DecisionID: "d1", Input: authztest.Input(`{}`), Trace: caller})

	list := rec.named("decision")
	if len(list) != 1 {
		t.Fatalf("got %d spans, want 1", len(list))
	}
	span := list[0]
	if span.Parent().TraceID().String() != caller.TraceID || span.Parent().SpanID().String() != caller.SpanID || !span.Parent().IsRemote() ||
		span.SpanContext().TraceState().String() != caller.State || span.SpanKind() != trace.SpanKindServer {
		t.Errorf("got %+v below %+v", span.SpanContext(), span.Parent())
	}
	got := attrs(span)
	for k, want := range map[string]string{
		"gatehouse.tenant": "orders", "gatehouse.decision.id": "d1", "gatehouse.decision.outcome": "allowed",
		"gatehouse.entry_point": "envoy/authz/allow", "gatehouse.bundle.names": `["policy"]`, "gatehouse.bundle.revisions": `["r7"]`,
		"gatehouse.label.team": "shop",
	} {
		if got[k] != want {
			t.Errorf("%s: got %q, want %q", k, got[k], want)
		}
	}
	if got["gatehouse.wait.duration"] == "" || got["gatehouse.evaluation.duration"] == "" || span.Status().Code != codes.Unset {
		t.Errorf("got %v, %v", got, span.Status())
	}
	e := console.Events(1)[0]
	if e["trace_id"] != caller.TraceID || e["span_id"] != span.SpanContext().SpanID().String() {
		t.Errorf("logged as %v, %v", e["trace_id"], e["span_id"])
	}
}

// What the caller does not record is not recorded, and is logged under the
// caller's IDs.
func TestUnsampled(t *testing.T) {
	rec, tracing := newSpans()
	s, console := logged(t, tenants.Config{Tracing: tracing}, nil)
	unsampled := caller
	unsampled.Unsampled = true
	s.decide("orders", tenants.Question{DecisionID: "d", Input: authztest.Input(`{}`), Trace: unsampled})
	if n := len(rec.named("decision")); n != 0 {
		t.Errorf("got %d spans, want none", n)
	}
	if e := console.Events(1)[0]; e["trace_id"] != caller.TraceID || e["span_id"] != caller.SpanID {
		t.Errorf("logged as %v, %v", e["trace_id"], e["span_id"])
	}
}

// A fault is an error that says what kind it is and where, and quotes nothing.
func TestSpanOfFault(t *testing.T) {
	rec, tracing := newSpans()
	s := newStage(t, tenants.Config{Tracing: tracing}, nil)
	s.Set("orders", "-- authz.rego --\npackage envoy.authz\n\nallow := true if input.a\n\nallow := false if input.b")
	s.Set("typed", "package envoy.authz\nallow := input.secret")
	for _, c := range []struct {
		tenant           tenants.ID
		input            string
		outcome, message string
	}{
		{"orders", `{"a": "hunter2", "b": "hunter2"}`, "bad_result", "conflicting results at"},
		{"orders", `{"x": "hunter2"}`, "undefined", "undefined decision"},
		{"typed", `{"secret": "hunter2"}`, "bad_result", "ill-typed result"},
		{"orders", `hunter2`, "invalid", "request cannot be parsed"},
	} {
		rec.Reset()
		s.decide(c.tenant, tenants.Question{DecisionID: "d", Input: authztest.Input(c.input)})
		list := rec.named("decision")
		if len(list) != 1 {
			t.Fatalf("%s: got %d spans, want 1", c.input, len(list))
		}
		got := attrs(list[0])
		if st := list[0].Status(); st.Code != codes.Error || !strings.HasPrefix(st.Description, c.message) {
			t.Errorf("%s: got status %v", c.input, st)
		}
		if got["gatehouse.decision.outcome"] != c.outcome || got["error.type"] != c.outcome {
			t.Errorf("%s: got %v", c.input, got)
		}
		if text := fmt.Sprint(got, list[0].Status(), list[0].Events()); strings.Contains(text, "hunter2") {
			t.Errorf("a span has the secret: %s", text)
		}
	}
}

// Each item of a batch has a span, also one whose answer is that of another.
func TestSpansOfBatch(t *testing.T) {
	rec, tracing := newSpans()
	s, console := logged(t, tenants.Config{Tracing: tracing}, nil)
	place := func(i int) *decisionlog.Batch { return &decisionlog.Batch{Key: "k", Index: i, Size: 3} }
	s.decide("orders",
		tenants.Question{DecisionID: "1", Input: authztest.Input(`{}`), Trace: caller, BatchDecisionID: "b", Batch: place(0),
			Twins: []tenants.Twin{{DecisionID: "2", Batch: place(1)}}},
		tenants.Question{DecisionID: "3", Input: authztest.Input(`{"a":1}`), Trace: caller, BatchDecisionID: "b", Batch: place(2)},
	)
	ids := map[string]string{} // :: decision → span
	for _, span := range rec.named("decision") {
		a := attrs(span)
		if a["gatehouse.decision.batch_id"] != "b" || span.SpanKind() != trace.SpanKindInternal || span.SpanContext().TraceID().String() != caller.TraceID {
			t.Errorf("got %v, %v", a, span.SpanKind())
		}
		ids[a["gatehouse.decision.id"]] = span.SpanContext().SpanID().String()
	}
	if len(ids) != 3 {
		t.Errorf("got spans of %v, want 3", ids)
	}
	for _, e := range console.Events(3) {
		if e["span_id"] != ids[e["decision_id"].(string)] {
			t.Errorf("%v is logged as %v, its span is %v", e["decision_id"], e["span_id"], ids[e["decision_id"].(string)])
		}
	}
}

// What a policy prints is told only where the operator wants it, and within bounds.
func TestPrints(t *testing.T) {
	const prints = "package envoy.authz\nallow if {\n\tsome i in numbers.range(1, 100)\n\tprint(\"line\", i)\n\ti == 100\n}"
	for _, wanted := range []bool{true, false} {
		rec, tracing := newSpans()
		tracing.Prints = wanted
		s := newStage(t, tenants.Config{Tracing: tracing}, nil)
		s.Set("orders", prints)
		s.decide("orders", tenants.Question{DecisionID: "d", Input: authztest.Input(`{}`)})
		events := rec.named("decision")[0].Events()
		if !wanted {
			if len(events) != 0 {
				t.Errorf("got %v, want nothing", events)
			}
			continue
		}
		if len(events) != 32 || events[0].Name != "print" {
			t.Fatalf("got %d events, want 32", len(events))
		}
		if want := attribute.String("gatehouse.print", "line 1"); events[0].Attributes[0] != want {
			t.Errorf("got %v, want %v", events[0].Attributes, want)
		}
	}
}

// http.send is a span below the decision's, and who is asked is told of it.
func TestSpanOfSend(t *testing.T) {
	var mu sync.Mutex
	var parent string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		parent = r.Header.Get("Traceparent")
		w.WriteHeader(http.StatusForbidden)
	}))
	defer server.Close()
	address := netip.MustParseAddrPort(strings.TrimPrefix(server.URL, "http://"))
	network, err := policy.NewNetwork(policy.NetworkOptions{Hosts: []string{address.String()}})
	if err != nil {
		t.Fatal(err)
	}
	rec, tracing := newSpans()
	s := newStage(t, tenants.Config{Tracing: tracing}, func(_ tenants.ID, s *tenants.Settings) { s.Network = network })
	s.Set("orders", `package envoy.authz
allow if http.send({"method": "get", "url": "`+server.URL+`/users/7?token=hunter2", "headers": {"authorization": "hunter2"}}).status_code == 403`)
	s.decide("orders", tenants.Question{DecisionID: "d", Input: authztest.Input(`{}`), Trace: caller})
	sent := rec.named("GET")
	if len(sent) != 1 {
		t.Fatalf("got %d spans, want 1", len(sent))
	}
	decision := rec.named("decision")[0]
	if sent[0].Parent().SpanID() != decision.SpanContext().SpanID() || sent[0].SpanKind() != trace.SpanKindClient {
		t.Errorf("it is below %v, want %v", sent[0].Parent().SpanID(), decision.SpanContext().SpanID())
	}
	mu.Lock()
	defer mu.Unlock()
	if want := "00-" + caller.TraceID + "-" + sent[0].SpanContext().SpanID().String() + "-01"; parent != want {
		t.Errorf("who was asked got %q, want %q", parent, want)
	}
	got := attrs(sent[0])
	for k, want := range map[string]string{
		"http.request.method": "GET", "url.path": "/users/7", "http.response.status_code": "403", "server.address": "127.0.0.1",
		"server.port": fmt.Sprint(address.Port()),
	} {
		if got[k] != want {
			t.Errorf("%s: got %q, want %q", k, got[k], want)
		}
	}
	if text := fmt.Sprint(got, sent[0].Status(), attrs(decision)); strings.Contains(text, "hunter2") {
		t.Errorf("a span has the secret: %s", text)
	}
}

// Tracing that is off, or on for a trace that is not recorded, costs no memory.
func TestTracingCostsNothing(t *testing.T) {
	unsampled := caller
	unsampled.Unsampled = true
	_, tracing := newSpans()
	cost := func(tracing tenants.Tracing, trace tenants.Trace) float64 {
		s := newStage(t, tenants.Config{Tracing: tracing}, nil)
		s.allows("orders")
		q := []tenants.Question{{DecisionID: "d", Input: made{ast.NewObject()}, Trace: trace}}
		least := math.Inf(1) // what the collector takes out of pools is not the decision's
		for range 5 {
			least = min(least, testing.AllocsPerRun(100, func() {
				if err := s.Decide(context.Background(), "orders", q, func(int, tenants.Answer) {}); err != nil {
					t.Error(err)
				}
			}))
		}
		return least
	}
	none := cost(tenants.Tracing{}, tenants.Trace{})
	for name, got := range map[string]float64{
		"off, in a trace": cost(tenants.Tracing{}, caller), "on, not sampled": cost(tracing, unsampled),
	} {
		if got > none+1 { // the race detector has pools lose some
			t.Errorf("%s: got %v allocations, %v without", name, got, none)
		}
	}
	if sampled := cost(tracing, caller); sampled <= none+2 {
		t.Errorf("a span costs %v allocations, and none %v: the measure is wrong", sampled, none)
	}
}

// The control plane: a request for a bundle, its answer that nothing has changed,
// the activation of what was new, and a report.
func TestControlSpans(t *testing.T) {
	rec, tracing := newSpans()
	var mu sync.Mutex
	parents := map[string]string{} // :: path → the last traceparent
	files := newService(t)
	reports := newReports(t)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		parents[r.URL.Path] = r.Header.Get("Traceparent")
		mu.Unlock()
		if strings.HasPrefix(r.URL.Path, "/bundles/") {
			files.Config.Handler.ServeHTTP(w, r)
		} else {
			reports.Config.Handler.ServeHTTP(w, r)
		}
	}))
	defer proxy.Close()
	files.set("/bundles/orders", allow+"\n-- .manifest --\n{\"revision\": \"r1\"}")
	template, _, err := control.Parse(map[string]any{
		"services": map[string]any{"s": map[string]any{"url": proxy.URL, "headers": map[string]any{"x-key": "hunter2"}}},
		"bundles": map[string]any{"policy": map[string]any{"service": "s", "resource": "bundles/{{ .tenant }}?token=hunter2",
			"polling": map[string]any{"min_delay_seconds": 0.05, "max_delay_seconds": 0.1}}},
		"status": map[string]any{"service": "s"},
	}, control.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := authztest.Pool(t, tenants.Config{Tracing: tracing, Settings: func(id tenants.ID) (*tenants.Settings, error) {
		tenant, err := template.Tenant(string(id))
		return &tenants.Settings{Tenant: tenant}, err
	}})
	if got := allowed(p, "orders"); got != "true" {
		t.Fatalf("got %s", got)
	}
	result := func(want string) (found sdktrace.ReadOnlySpan) {
		eventually(t, "a request with the result "+want, func() bool {
			for _, span := range rec.named("bundle fetch") {
				if attrs(span)["gatehouse.bundle.result"] == want {
					found = span
					return true
				}
			}
			return false
		})
		return found
	}
	fetched := result("new")
	got := attrs(fetched)
	for k, want := range map[string]string{
		"gatehouse.bundle.source": "http", "gatehouse.bundle.resource": "bundles/orders", "http.response.status_code": "200", "url.path": "/bundles/orders",
	} {
		if got[k] != want {
			t.Errorf("%s: got %q, want %q", k, got[k], want)
		}
	}
	if got["gatehouse.bundle.size"] == "" || fetched.SpanKind() != trace.SpanKindClient {
		t.Errorf("got %v", got)
	}
	if got := attrs(result("not_modified"))["http.response.status_code"]; got != "304" {
		t.Errorf("got status %s, want 304", got)
	}
	activated := rec.named("bundle activation")
	if len(activated) != 1 || len(activated[0].Links()) != 1 || activated[0].Links()[0].SpanContext.SpanID() != fetched.SpanContext().SpanID() ||
		attrs(activated[0])["gatehouse.bundle.revisions"] != `["r1"]` {
		t.Errorf("got %v", activated)
	}
	eventually(t, "a report", func() bool { return len(rec.named("status report")) > 0 })
	mu.Lock()
	for _, path := range []string{"/bundles/orders", "/status"} {
		c := propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": parents[path]})
		if !trace.SpanContextFromContext(c).IsSampled() {
			t.Errorf("%s was asked with %q", path, parents[path])
		}
	}
	mu.Unlock()
	files.set("/bundles/orders", bad)
	eventually(t, "an activation that failed", func() bool {
		for _, span := range append(rec.named("bundle activation"), rec.named("bundle fetch")...) {
			if span.Status().Code == codes.Error {
				return true
			}
		}
		return false
	})
	for _, span := range rec.Ended() {
		if text := fmt.Sprint(span.Name(), attrs(span), span.Status(), span.Events()); strings.Contains(text, "hunter2") {
			t.Errorf("a span has the secret: %s", text)
		}
	}
}

// What is sent must be text: what a bundle says is cut and mended.
func TestSpanTextIsUTF8(t *testing.T) {
	rec, tracing := newSpans()
	s := newStage(t, tenants.Config{Tracing: tracing}, func(_ tenants.ID, s *tenants.Settings) {
		s.Labels = map[string]string{"team": strings.Repeat("ü", 200), "bad": "\xff"}
	})
	s.decide("orders", tenants.Question{DecisionID: "d", Input: authztest.Input(`{}`)})
	for k, v := range attrs(rec.named("decision")[0]) {
		if v != strings.ToValidUTF8(v, "") || len(v) > 260 {
			t.Errorf("%s: got %d bytes: %q", k, len(v), v)
		}
	}
}

func TestParsePropagator(t *testing.T) {
	for _, name := range []string{"tracecontext", "b3", "b3multi"} {
		if p, err := tenants.ParsePropagator(name); err != nil || string(p) != name {
			t.Errorf("%s: got %q, %v", name, p, err)
		}
	}
	if _, err := tenants.ParsePropagator("baggage"); err == nil || !strings.Contains(err.Error(), `"baggage"`) {
		t.Errorf("got %v", err)
	}
}

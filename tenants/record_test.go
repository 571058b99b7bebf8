package tenants_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// logged is a stage whose tenants log to a console.
func logged(t *testing.T, cfg tenants.Config, change func(tenants.ID, *tenants.Settings)) (*stage, *authztest.Console) {
	t.Helper()
	logs, console := authztest.Logs(t)
	cfg.Logs = logs
	return newStage(t, cfg, func(id tenants.ID, s *tenants.Settings) {
		s.Log = authztest.Logged()
		if change != nil {
			change(id, s)
		}
	}), console
}

// member returns what is at a path of an event.
func member(event map[string]any, path ...string) any {
	var v any = event
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	return v
}

// told are the members of an event that two runs have alike.
func told(t *testing.T, event map[string]any) string {
	t.Helper()
	some := map[string]any{}
	for _, name := range []string{"path", "bundles", "input", "result", "erased", "masked", "custom", "nd_builtin_cache"} {
		if v, ok := event[name]; ok {
			some[name] = v
		}
	}
	text, err := json.Marshal(some)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The drop and mask rules are those of the tenant's own bundle, and nobody else's.
func TestLogFilters(t *testing.T) {
	s, console := logged(t, tenants.Config{}, nil)
	s.Set("orders", `package envoy.authz
default allow := true
-- drop.rego --
package system.log
drop if input.input.health
mask contains "/input/password"
mask contains {"op": "upsert", "path": "/input/user", "value": sprintf("of %s", [input.labels.app])}
-- .manifest --
{"revision": "r1"}
`)
	for _, id := range []tenants.ID{"orders", "payments"} {
		for _, input := range []string{`{"health": true}`, `{"user": "ann", "password": "secret", "kept": 1}`} {
			authztest.Ask(context.Background(), s.Pool, id, input)
		}
	}
	want := map[string][]string{ // :: tenant → events
		"orders": {
			`{"bundles":{"policy":{"revision":"r1"}},"erased":["/input/password"],"input":{"kept":1,"user":"of orders"},"masked":["/input/user"],"path":"envoy/authz/allow","result":true}`,
		},
		"payments": {
			`{"bundles":{"policy":{}},"input":{"health":true},"path":"envoy/authz/allow","result":false}`,
			`{"bundles":{"policy":{}},"input":{"kept":1,"password":"secret","user":"ann"},"path":"envoy/authz/allow","result":false}`,
		},
	}
	got := map[string][]string{}
	for _, e := range console.Events(3) {
		tenant, _ := member(e, "labels", "tenant").(string)
		got[tenant] = append(got[tenant], told(t, e))
		if id, version := member(e, "labels", "id"), member(e, "labels", "version"); id == "" || version == "" || member(e, "labels", "app") != tenant {
			t.Errorf("%s: labels: got %v", tenant, e["labels"])
		}
		if e["decision_id"] != "test" || member(e, "metrics", "timer_server_handler_ns") == nil || member(e, "metrics", "timer_rego_query_eval_ns") == nil {
			t.Errorf("%s: got %v", tenant, e)
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// What came not of the tenant's policy is told: the operator's own, and a denial
// that was let through.
func TestLogCustom(t *testing.T) {
	guard := &authztest.Memory{}
	guard.Set("guard", `package envoy.authz
default allow := true
allow := false if input.blocked
-- .manifest --
{"revision": "g1"}
`)
	settings, err := authztest.Settings(guard, nil)("guard")
	if err != nil {
		t.Fatal(err)
	}
	s, console := logged(t, tenants.Config{Guard: settings}, func(id tenants.ID, s *tenants.Settings) { s.DryRun = id == "payments" })
	eventually(t, "the guard is there", func() bool { return len(s.Unready()) == 0 })
	for _, q := range []struct {
		id    tenants.ID
		input string
	}{{"orders", `{}`}, {"orders", `{"blocked": true}`}, {"payments", `{}`}} {
		authztest.Ask(context.Background(), s.Pool, q.id, q.input)
	}
	want := []string{
		`orders {"guard":{"answered":false,"revision":"g1"}} true`,
		`orders {"guard":{"answered":true,"revision":"g1"}} false`,
		`payments {"dry_run":true,"guard":{"answered":false,"revision":"g1"}} false`,
	}
	var got []string
	for _, e := range console.Events(3) {
		custom, err := json.Marshal(e["custom"])
		if err != nil {
			t.Fatal(err)
		}
		result, _ := json.Marshal(e["result"])
		got = append(got, member(e, "labels", "tenant").(string)+" "+string(custom)+" "+string(result))
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// A decision that cannot be kept is not given where the tenant wants that, and
// nothing makes a permission of that.
func TestLogFull(t *testing.T) {
	dead := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }))
	t.Cleanup(dead.Close)
	full := func(choice decisionlog.OnFull) *control.Log {
		l := authztest.Logged()
		l.Sinks = []decisionlog.Sink{decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{URL: dead.URL}})}
		l.OnFull, l.Reporting.BufferBytes = choice, 4<<10
		return l
	}
	s, _ := logged(t, tenants.Config{}, func(id tenants.ID, s *tenants.Settings) {
		s.OnError, s.DryRun = tenants.OnErrorAllow, true
		s.Log = full(map[tenants.ID]decisionlog.OnFull{"orders": decisionlog.Deny, "payments": decisionlog.DropNewest}[id])
	})
	refused := 0
	for range 50 {
		switch a := s.ask("orders"); {
		case a.Err == nil:
		case !errors.Is(a.Err, tenants.ErrNotLogged) || a.OnError != tenants.OnErrorDeny || a.DryRun || a.Decision.Allowed || a.Decision.Value != nil:
			t.Fatalf("got %+v, want %v, not softened, without a decision", a, tenants.ErrNotLogged)
		default:
			refused++
		}
		if a := s.ask("payments"); a.Err != nil {
			t.Fatalf("a tenant that has events dropped: %v", a.Err)
		}
	}
	if refused == 0 || refused == 50 {
		t.Errorf("got %d of 50 refused, want those that do not fit", refused)
	}
	for _, id := range []tenants.ID{"orders", "payments"} {
		st, _ := s.Tenant(id)
		if l := st.Log; l == nil || l.Recorded != 50 || l.Recorded != l.Delivered+l.Dropped["buffer_full"]+l.Buffered {
			t.Errorf("%s: the books do not balance: %+v", id, l)
		}
	}
}

// An answer that was given without waiting for the evaluation any more is logged
// with what had been asked.
func TestLogLate(t *testing.T) {
	s, console := logged(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) { s.Limits.EvaluationTime = 50 * time.Millisecond })
	s.allows("orders") // warms nothing of loops, but the pool
	eventually(t, "loops is loaded", func() bool {
		return errors.Is(s.ask("loops").Err, tenants.ErrDeadline)
	})
	a := authztest.Ask(context.Background(), s.Pool, "loops", `{"who": "late"}`)
	if !errors.Is(a.Err, tenants.ErrDeadline) {
		t.Fatalf("got %v, want %v", a.Err, tenants.ErrDeadline)
	}
	for n := 2; ; n++ {
		events := console.Events(n)
		if len(events) < n {
			t.Fatalf("no event of the late answer among %v", events)
		}
		e := events[n-1]
		if member(e, "input", "who") != "late" {
			continue
		}
		if e["error"] == nil || e["result"] != nil || member(e, "bundles", "policy") == nil {
			t.Errorf("got %v, want an error, no result and the bundles", e)
		}
		return
	}
}

// What a tenant that is known is answered before it is ready is logged, and what
// is asked of a name that anybody may have invented is not.
func TestLogUnready(t *testing.T) {
	s, console := logged(t, tenants.Config{}, nil)
	s.Fail("orders", errors.New("away"))
	s.fails("orders", tenants.ErrNotReady)
	s.fails("nobody", tenants.ErrUnknown)
	s.denies("payments")
	events := console.Events(2)
	if len(events) != 2 {
		t.Fatalf("got %d events, want 2: %v", len(events), events)
	}
	for _, e := range events {
		if tenant := member(e, "labels", "tenant"); tenant == "orders" && (e["error"] == nil || e["bundles"] != nil) || tenant == "nobody" {
			t.Errorf("got %v", e)
		}
	}
}

// The path is the configuration's word for the entry point; another that was asked
// for is as it was asked for. A request that is none has the input null.
func TestLogPathAndInput(t *testing.T) {
	s, console := logged(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) {
		s.Path, s.Entries = "/envoy/authz/allow", []string{"envoy/authz/other"}
	})
	s.Set("orders", "package envoy.authz\nallow := true\nother := false")
	questions := []tenants.Question{
		{DecisionID: "1", Input: authztest.Input(`{"a": 1}`), Trace: tenants.Trace{TraceID: "t", SpanID: "s"}, RequestID: 7, RequestedBy: "10.0.0.1"},
		{DecisionID: "2", Input: authztest.Input(`{}`), Entry: "envoy/authz/other", BatchDecisionID: "b", Batch: &decisionlog.Batch{Key: "k", Size: 3}},
		{DecisionID: "3", Input: authztest.Input(`no JSON`)},
		{DecisionID: "4", Input: authztest.Input(`{}`), Entry: "envoy/authz/allow"},
	}
	if err := s.Decide(context.Background(), "orders", questions, func(int, tenants.Answer) {}); err != nil {
		t.Fatal(err)
	}
	want := map[any]string{
		"1": `{"bundles":{"policy":{}},"input":{"a":1},"path":"/envoy/authz/allow","result":true}`,
		"2": `{"bundles":{"policy":{}},"custom":{"batch":{"index":0,"key":"k","size":3}},"input":{},"path":"envoy/authz/other","result":false}`,
		"3": `{"bundles":{"policy":{}},"input":null,"path":"/envoy/authz/allow"}`,
		"4": `{"bundles":{"policy":{}},"input":{},"path":"/envoy/authz/allow","result":true}`,
	}
	for _, e := range console.Events(len(questions)) {
		id := e["decision_id"]
		if got := told(t, e); got != want[id] {
			t.Errorf("%v: got  %s\nwant %s", id, got, want[id])
		}
		delete(want, id)
		beside := []any{e["trace_id"], e["span_id"], e["req_id"], e["requested_by"], e["batch_decision_id"]}
		switch id {
		case "1":
			if !reflect.DeepEqual(beside, []any{"t", "s", 7., "10.0.0.1", nil}) {
				t.Errorf("1: got %v beside", beside)
			}
		case "2":
			if !reflect.DeepEqual(beside, []any{nil, nil, nil, nil, "b"}) {
				t.Errorf("2: got %v beside", beside)
			}
		}
	}
	if len(want) > 0 {
		t.Errorf("not logged: %v", want)
	}
}

// A logged input can be given to the policy again as it stands, and with what
// builtins gave then the evaluation is the same.
func TestReplay(t *testing.T) {
	const text = `package envoy.authz
allow := {
	"allowed": input.user == "ann",
	"headers": {"x-id": uuid.rfc4122(input.user), "x-dice": sprintf("%d", [rand.intn("dice", 1000000)]), "x-at": sprintf("%d", [time.now_ns()])},
	"n": input.n,
}`
	s, console := logged(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) { s.NDBuiltinCache = true })
	s.Set("orders", text)
	inputs := []string{
		`{"user": "ann", "n": 12345678901234567890, "deep": [{"a": [1.50, 1e3, -0.0]}, null, "é\u2028\u0000<>&"]}`,
		`{"user": "bob", "n": 0.1, "": {"": []}}`,
	}
	for _, input := range inputs {
		if a := authztest.Ask(context.Background(), s.Pool, "orders", input); a.Err != nil {
			t.Fatal(a.Err)
		}
	}
	p := authztest.Policy(t, text)
	for _, e := range console.Lines(len(inputs)) {
		event := valueOf(t, e).(ast.Object)
		get := func(name string) ast.Value { return event.Get(ast.StringTerm(name)).Value }
		o := &policy.Observed{Builtins: rememberedIn(t, get("nd_builtin_cache"))}
		got, err := p.EvalObserved(context.Background(), "envoy/authz/allow", get("input"), policy.NewEnv(nil), nil, o)
		if err != nil {
			t.Fatal(err)
		}
		if got.Compare(get("result")) != 0 {
			t.Errorf("got  %v\nwant %v", got, get("result"))
		}
	}
}

func valueOf(t *testing.T, text []byte) ast.Value {
	t.Helper()
	v, err := ast.ValueFromReader(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// rememberedIn reads a logged nd_builtin_cache, in which the operands of a call
// are JSON.
func rememberedIn(t *testing.T, logged ast.Value) ast.Object {
	t.Helper()
	all := ast.NewObject()
	logged.(ast.Object).Foreach(func(name, calls *ast.Term) {
		results := ast.NewObject()
		calls.Value.(ast.Object).Foreach(func(operands, result *ast.Term) {
			results.Insert(ast.NewTerm(valueOf(t, []byte(operands.Value.(ast.String)))), result)
		})
		all.Insert(name, ast.NewTerm(results))
	})
	return all
}

package tenants_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// remembering is a stage that remembers decisions; which says which tenants have a
// log, too.
func remembering(t testing.TB, cfg tenants.Config, each int, change func(tenants.ID, *tenants.Settings)) (*stage, *authztest.Console) {
	t.Helper()
	logs, console := authztest.LogsWith(t, decisionlog.Config{Redact: true, Recent: each})
	cfg.Logs = logs
	return newStage(t, cfg, change), console
}

// askAs asks one question under a name.
func askAs(p *tenants.Pool, id tenants.ID, name, input string) tenants.Answer {
	var answer tenants.Answer
	q := []tenants.Question{{DecisionID: name, Input: authztest.Input(input)}}
	if err := p.Decide(context.Background(), id, q, func(_ int, a tenants.Answer) { answer = a }); err != nil {
		return tenants.Answer{Err: err}
	}
	return answer
}

// recalled returns what is remembered, as "ID outcome".
func (s *stage) recalled(id tenants.ID, q tenants.DecisionsQuery) []string {
	s.t.Helper()
	d, err := s.Pool.Decisions(context.Background(), id, q)
	if err != nil {
		s.t.Errorf("%s: %v", id, err)
		return nil
	}
	got := []string{}
	for _, one := range d.Decisions {
		var event struct {
			ID string `json:"decision_id"`
		}
		if err := json.Unmarshal(one.Event, &event); err != nil {
			s.t.Errorf("%s: %v", id, err)
		}
		got = append(got, event.ID+" "+one.Outcome)
	}
	return got
}

const masked = `package envoy.authz
default allow := false
allow if input.user == "ann"
-- log.rego --
package system.log
drop if input.input.health
mask contains "/input/password"
-- .manifest --
{"revision": "r1"}
`

// What is remembered of a decision is shown as it is in the log: with the rules of
// the policy that decided, and secrets hidden. It is so without a log, too.
func TestDecisionsAsLogged(t *testing.T) {
	s, console := remembering(t, tenants.Config{}, 10, func(id tenants.ID, s *tenants.Settings) {
		if id == "orders" {
			s.Log = authztest.Logged()
		}
	})
	s.Set("orders", masked)
	s.Set("payments", masked)
	const input = `{"user": "bob", "password": "hunter2", "headers": {"authorization": "Bearer xyzzy", "x": "y"}}`
	for _, id := range []tenants.ID{"orders", "payments"} {
		askAs(s.Pool, id, "dropped", `{"health": true}`)
		askAs(s.Pool, id, "kept", input)
		d, err := s.Pool.Decisions(context.Background(), id, tenants.DecisionsQuery{})
		if err != nil || len(d.Decisions) != 1 || d.Remembered != 2 || d.Withheld != 1 || !strings.Contains(d.Why, "drop rule") {
			t.Fatalf("%s: got %+v, %v, want one of two, the other withheld by the drop rule", id, d, err)
		}
		one := d.Decisions[0]
		text := string(one.Event)
		if one.Outcome != "denied" || one.Time.IsZero() || strings.Contains(text, "hunter2") || strings.Contains(text, "xyzzy") {
			t.Errorf("%s: got %s %s", id, one.Outcome, text)
		}
		var event map[string]any
		if err := json.Unmarshal(one.Event, &event); err != nil {
			t.Fatal(err)
		}
		if member(event, "labels", "tenant") != string(id) || fmt.Sprint(event["erased"]) != "[/input/password]" || fmt.Sprint(event["masked"]) != "[/input/headers/authorization]" {
			t.Errorf("%s: got %s", id, text)
		}
		if id == "orders" {
			logged := console.Events(1)[0]
			for _, name := range []string{"labels", "decision_id", "bundles", "path", "input", "result", "erased", "masked", "metrics", "custom"} {
				if !reflect.DeepEqual(event[name], logged[name]) {
					t.Errorf("%s: got %v, and %v in the log", name, event[name], logged[name])
				}
			}
		}
	}
}

// Decisions are found by outcome and by ID, the newest first, and so many of each
// tenant are remembered.
func TestDecisionsFound(t *testing.T) {
	s, _ := remembering(t, tenants.Config{}, 3, nil)
	s.Set("orders", masked)
	for i, user := range []string{"ann", "bob", "ann", "bob"} {
		askAs(s.Pool, "orders", fmt.Sprint("d", i), fmt.Sprintf(`{"user": %q}`, user))
	}
	askAs(s.Pool, "payments", "other", `{}`)
	for _, c := range []struct {
		query tenants.DecisionsQuery
		want  []string
	}{
		{tenants.DecisionsQuery{}, []string{"d3 denied", "d2 allowed", "d1 denied"}},
		{tenants.DecisionsQuery{Outcomes: []string{"denied"}}, []string{"d3 denied", "d1 denied"}},
		{tenants.DecisionsQuery{Outcomes: []string{"denied", "allowed"}, Limit: 2}, []string{"d3 denied", "d2 allowed"}},
		{tenants.DecisionsQuery{ID: "d2"}, []string{"d2 allowed"}},
		{tenants.DecisionsQuery{ID: "d0"}, []string{}},
		{tenants.DecisionsQuery{ID: "other"}, []string{}},
	} {
		if got := s.recalled("orders", c.query); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v: got %v, want %v", c.query, got, c.want)
		}
	}
}

// Faults are remembered with their error, also where no policy was asked, but not
// under names that nobody has.
func TestDecisionsFaults(t *testing.T) {
	s, _ := remembering(t, tenants.Config{}, 10, nil)
	s.Set("orders", `package envoy.authz
allow if input.user == "ann"
`)
	s.Set("broken", "package envoy.authz\nallow if {")
	askAs(s.Pool, "orders", "undefined", `{}`)
	askAs(s.Pool, "orders", "invalid", `{`)
	if got, want := s.recalled("orders", tenants.DecisionsQuery{}), []string{"invalid invalid", "undefined undefined"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	askAs(s.Pool, "broken", "first", `{}`)
	if got, want := s.recalled("broken", tenants.DecisionsQuery{}), []string{"first not_ready"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	d, _ := s.Pool.Decisions(context.Background(), "orders", tenants.DecisionsQuery{ID: "undefined"})
	if text := string(d.Decisions[0].Event); !strings.Contains(text, `"error":{"message":"undefined decision"}`) {
		t.Errorf("got %s, want its error", text)
	}
	askAs(s.Pool, "invented", "nobody", `{}`)
	if _, err := s.Pool.Decisions(context.Background(), "invented", tenants.DecisionsQuery{}); !errors.Is(err, tenants.ErrUnknown) {
		t.Errorf("a name that nobody has: got %v", err)
	}
	none, _ := remembering(t, tenants.Config{}, 0, nil)
	none.allows("orders")
	if _, err := none.Pool.Decisions(context.Background(), "orders", tenants.DecisionsQuery{}); !errors.Is(err, tenants.ErrNotRemembered) {
		t.Errorf("by settings that remember none: got %v", err)
	}
}

// When the policy that decided is out of use, what masks is that of now; where that
// masks nothing, what it might have masked is withheld.
func TestDecisionsOfOldRevisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := remembering(t, tenants.Config{}, 10, nil)
		s.Set("orders", masked)
		askAs(s.Pool, "orders", "old", `{"user": "bob", "password": "hunter2", "token": "t0ken"}`)
		event := func() string {
			t.Helper()
			d, err := s.Pool.Decisions(context.Background(), "orders", tenants.DecisionsQuery{ID: "old"})
			if err != nil || len(d.Decisions) != 1 {
				t.Fatalf("got %+v, %v", d, err)
			}
			return string(d.Decisions[0].Event)
		}
		if text := event(); strings.Contains(text, "hunter2") || !strings.Contains(text, "t0ken") {
			t.Errorf("by the rules that it was decided under: got %s", text)
		}
		s.Set("orders", strings.ReplaceAll(masked, "/input/password", "/input/token"))
		time.Sleep(3 * time.Second)
		if text := event(); strings.Contains(text, "t0ken") {
			t.Errorf("by the rules of now: got %s", text)
		}
		s.Set("orders", allow)
		time.Sleep(3 * time.Second)
		if text := event(); strings.Contains(text, "input\":{") || !strings.Contains(text, `"erased":["/input","/result"]`) {
			t.Errorf("without rules: got %s, want neither input nor result", text)
		}
	})
}

const explainedPolicy = `package envoy.authz

default allow := false

allow if {
	print("asked with", input.password, "and", input.headers.authorization)
	input.user == "ann"
	input.method == "GET"
}
-- log.rego --
package system.log
mask contains "/input/password"
-- .manifest --
{"revision": "r1"}
`

// failing are the places of what failed.
func failing(x *tenants.Explanation) []string {
	var places []string
	for _, s := range x.Trace {
		if s.Op == "fail" {
			places = append(places, fmt.Sprintf("%s:%d %s", s.File, s.Line, s.Text))
		}
	}
	return places
}

// A decision that is remembered is evaluated again by what decides now, and the
// expression that failed is named with its line; secrets stay hidden.
func TestExplainDecision(t *testing.T) {
	s, console := remembering(t, tenants.Config{}, 10, func(_ tenants.ID, s *tenants.Settings) { s.Log = authztest.Logged() })
	s.Set("orders", explainedPolicy)
	askAs(s.Pool, "orders", "d1", `{"user": "ann", "method": "DELETE", "password": "hunter2", "headers": {"authorization": "Bearer abcdefgh"}}`)
	x, err := s.Pool.Explain(context.Background(), "orders", tenants.ExplainQuery{DecisionID: "d1"})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := failing(x), []string{`policy.rego:8 input.method == "GET"`}; !reflect.DeepEqual(got, want) {
		t.Errorf("failed: got %q, want %q", got, want)
	}
	if x.Outcome != "denied" || string(x.Result) != "false" || x.Then == nil || x.Then.Outcome != "denied" || !x.Then.Same ||
		x.Bundles["policy"] != "r1" || x.Evaluator != "topdown" || x.Policy != "tenant" || x.Path != "envoy/authz/allow" || len(x.Notes) > 0 {
		t.Errorf("got %+v, then %+v", x, x.Then)
	}
	want := []policy.Print{{Text: "asked with " + decisionlog.Redacted + " and " + decisionlog.Redacted, File: "policy.rego", Line: 6}}
	if !reflect.DeepEqual(x.Prints, want) {
		t.Errorf("printed: got %v, want %v", x.Prints, want)
	}
	if text, _ := json.Marshal(x); strings.Contains(string(text), "hunter2") || strings.Contains(string(text), "abcdefgh") {
		t.Errorf("has a secret: %s", text)
	}
	if n := len(console.Lines(1)); n != 1 {
		t.Errorf("got %d decisions in the log, want the one that was asked", n)
	}
	status, _ := s.Pool.Tenant("orders")
	if got := fmt.Sprint(status.Checks); got != "map[denied:1]" {
		t.Errorf("checks: got %s, want the one that was asked", got)
	}
	for query, want := range map[string]error{"other": tenants.ErrNotRemembered} {
		if _, err := s.Pool.Explain(context.Background(), "orders", tenants.ExplainQuery{DecisionID: query}); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", query, err, want)
		}
	}
}

// An input is explained, too, by the entry point that is named.
func TestExplainInput(t *testing.T) {
	s, _ := remembering(t, tenants.Config{}, 10, nil)
	s.Set("orders", explainedPolicy)
	x, err := s.Pool.Explain(context.Background(), "orders", tenants.ExplainQuery{Input: []byte(`{"user": "bob", "password": "s3same", "headers": {"authorization": "x"}}`), Path: "/envoy/authz/allow"})
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(failing(x)); got != `[policy.rego:7 input.user == "ann"]` || x.Then != nil || x.Outcome != "denied" {
		t.Errorf("got %s, %+v", got, x)
	}
	if text, _ := json.Marshal(x); strings.Contains(string(text), "s3same") {
		t.Errorf("has a secret: %s", text)
	}
	for _, c := range []struct {
		query tenants.ExplainQuery
		want  error
	}{
		{tenants.ExplainQuery{Input: []byte(`{`)}, tenants.ErrInvalid},
		{tenants.ExplainQuery{Input: []byte(`{}`), Path: "other/rule"}, tenants.ErrEntry},
		{tenants.ExplainQuery{Input: []byte(`{}`), Path: "//"}, tenants.ErrEntry},
	} {
		if _, err := s.Pool.Explain(context.Background(), "orders", c.query); !errors.Is(err, c.want) {
			t.Errorf("%s %s: got %v, want %v", c.query.Input, c.query.Path, err, c.want)
		}
	}
	if _, err := s.Pool.Explain(context.Background(), "invented", tenants.ExplainQuery{Input: []byte(`{}`)}); !errors.Is(err, tenants.ErrUnknown) {
		t.Errorf("no such tenant: got %v", err)
	}
}

// An explanation says when another policy decides now than then, and what the
// operator's own says.
func TestExplainOther(t *testing.T) {
	guard := &authztest.Memory{}
	guard.Set("guard", "package envoy.authz\n\ndefault allow := true\n\nallow := false if {\n\tinput.blocked\n}\n-- .manifest --\n{\"revision\": \"g1\"}\n")
	settings, err := authztest.Settings(guard, nil)("guard")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		s, _ := remembering(t, tenants.Config{Guard: settings}, 10, nil)
		s.Set("orders", explainedPolicy)
		time.Sleep(2 * time.Second) // until the guard is loaded
		askAs(s.Pool, "orders", "d1", `{"user": "ann"}`)
		askAs(s.Pool, "orders", "d2", `{"user": "ann", "blocked": true}`)
		x, err := s.Pool.Explain(context.Background(), "orders", tenants.ExplainQuery{DecisionID: "d2"})
		if err != nil || x.Policy != "guard" || x.Bundles["policy"] != "g1" || x.Outcome != "denied" || !strings.Contains(fmt.Sprint(x.Trace), "{exit data.envoy.authz.allow policy.rego 5") {
			t.Errorf("got %+v, %v, want the rule of the guard that denied", x, err)
		}
		s.Set("orders", strings.ReplaceAll(allow, "r1", "r2"))
		time.Sleep(3 * time.Second)
		x, err = s.Pool.Explain(context.Background(), "orders", tenants.ExplainQuery{DecisionID: "d1"})
		if err != nil || x.Then.Same || x.Outcome != "allowed" || x.Then.Outcome != "denied" || !strings.Contains(fmt.Sprint(x.Notes), "not in force any more") {
			t.Errorf("got %+v, then %+v, %v, want another policy that allows", x, x.Then, err)
		}
	})
}

// A policy that never ends is explained as far as it got, and holds nobody up.
func TestExplainLoops(t *testing.T) {
	s, _ := remembering(t, tenants.Config{}, 10, func(_ tenants.ID, s *tenants.Settings) { s.Limits.EvaluationTime = 20 * time.Millisecond })
	s.Set("loops", `package envoy.authz
default allow := false
allow if {
	some i in numbers.range(1, 100000)
	some j in numbers.range(1, 100000)
	i + j == 0
}
`)
	s.fails("loops", tenants.ErrDeadline)
	x, err := s.Pool.Explain(context.Background(), "loops", tenants.ExplainQuery{Input: []byte(`{}`)})
	if err != nil || x.Outcome != "deadline" || !strings.Contains(fmt.Sprint(x.Notes), "did not end in time") || len(x.Error) == 0 {
		t.Errorf("got %+v, %v, want what was seen until its time was over", x, err)
	}
}

// A question that nobody could ask is explained without an evaluation.
func TestExplainInvalid(t *testing.T) {
	s, _ := remembering(t, tenants.Config{}, 10, nil)
	askAs(s.Pool, "orders", "invalid", `{`)
	x, err := s.Pool.Explain(context.Background(), "orders", tenants.ExplainQuery{DecisionID: "invalid"})
	if err != nil || x.Then.Outcome != "invalid" || x.Outcome != "" || len(x.Trace) != 0 || !strings.Contains(fmt.Sprint(x.Notes), "no policy was asked") {
		t.Errorf("got %+v, %v", x, err)
	}
}

// BenchmarkRemember is a decision with what is remembered of it.
func BenchmarkRemember(b *testing.B) {
	const input = `{"attributes": {"request": {"http": {"method": "GET", "path": "/a", "headers": {"a": "1", "b": "2", "c": "3", "d": "4", "e": "5", "f": "6", "g": "7", "h": "8", "i": "9", "j": "10"}}}}}`
	value, err := policy.ParseJSON(input, nil)
	if err != nil {
		b.Fatal(err)
	}
	for name, c := range map[string]struct {
		each   int
		logged bool
	}{"without": {0, false}, "with": {100, false}, "log/without": {0, true}, "log/with": {100, true}} {
		b.Run(name, func(b *testing.B) {
			s, _ := remembering(b, tenants.Config{}, c.each, func(_ tenants.ID, s *tenants.Settings) {
				if c.logged {
					s.Log = authztest.Logged()
					s.Log.Reporting.DecisionsPerSecond = 1 // the others are recorded, and nothing more
				}
			})
			q := []tenants.Question{{DecisionID: "test", Input: ready{value}}}
			b.ReportAllocs()
			for b.Loop() {
				if err := s.Pool.Decide(context.Background(), "orders", q, func(int, tenants.Answer) {}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// ready is an input that is there.
type ready struct{ ast.Value }

func (r ready) Input(tenants.Needs) (ast.Value, error) { return r.Value, nil }

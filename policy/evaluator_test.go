package policy_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/plan"
	"github.com/gatehouse-authz/gatehouse/policy"
)

func compileBy(t *testing.T, by policy.Evaluator, text string, entries ...string) *policy.Policy {
	t.Helper()
	p, err := compile(map[string]string{"policy.rego": text}, policy.Options{Entries: entries, Evaluator: by})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestParseEvaluator(t *testing.T) {
	for _, name := range []string{"auto", "topdown", "plan"} {
		if e, err := policy.ParseEvaluator(name); err != nil || string(e) != name {
			t.Errorf("%s: got %q, %v", name, e, err)
		}
	}
	for _, name := range []string{"", "Plan", "wasm"} {
		if e, err := policy.ParseEvaluator(name); err == nil {
			t.Errorf("%q: got %q, want an error", name, e)
		}
	}
}

// What a plan cannot do is topdown's, for that entry point alone, and is told.
func TestFallback(t *testing.T) {
	const text = `
package envoy.authz

allow if input.a

odd[1][2] := 3 if input.a
`
	p := compileBy(t, policy.Plan, text, "envoy/authz/allow", "envoy/authz/odd")
	list := p.Evaluated(false)
	if len(list) != 2 || list[0].By != policy.Plan || list[0].Why != nil || list[1].By != policy.Topdown || !errors.Is(list[1].Why, plan.ErrUnsupported) {
		t.Errorf("got %v, want allow by its plan and odd not", list)
	}
	for entry, want := range map[string]string{"envoy/authz/allow": `true`, "envoy/authz/odd": `{1: {2: 3}}`} {
		v, err := p.Eval(context.Background(), entry, value(t, `{"a": true}`), nil, nil)
		if err != nil || v.Compare(ast.MustParseTerm(want).Value) != 0 {
			t.Errorf("%s: got %v, %v, want %s", entry, v, err, want)
		}
	}
	for _, e := range compileBy(t, policy.Topdown, text, "envoy/authz/allow").Evaluated(false) {
		if e.By != policy.Topdown || e.Why != nil {
			t.Errorf("topdown: got %v", e)
		}
	}
}

// Labels of rules are observed whatever evaluates, and errors are those of
// topdown.
func TestPlanObserved(t *testing.T) {
	const text = `
package envoy.authz

# METADATA
# labels:
#   team: orders
allow if input.a

allow := false if input.b

other if startswith(input.c, "x")
`
	for _, by := range []policy.Evaluator{policy.Topdown, policy.Plan} {
		p := compileBy(t, by, text, entry)
		var o policy.Observed
		if _, err := p.DecideObserved(context.Background(), entry, value(t, `{"a": true}`), nil, nil, &o); err != nil {
			t.Fatal(err)
		}
		if len(o.RuleLabels) != 1 || o.RuleLabels[0]["team"] != "orders" {
			t.Errorf("%s: got labels %v, want those of allow", by, o.RuleLabels)
		}
		if o.At.IsZero() {
			t.Errorf("%s: got no time", by)
		}
		var again atomic.Int64
		env := policy.NewEnvWith(policy.EnvOptions{Again: &again})
		_, err := p.Decide(context.Background(), entry, value(t, `{"a": true, "b": true}`), env, nil)
		if !errors.Is(err, policy.ErrConflict) {
			t.Errorf("%s: got %v, want %v", by, err, policy.ErrConflict)
		}
		if want := map[policy.Evaluator]int64{policy.Plan: 1}[by]; again.Load() != want {
			t.Errorf("%s: got topdown asked again %d times, want %d", by, again.Load(), want)
		}
		if list := p.Evaluated(true); list[0].By != policy.Topdown || (list[0].Why != nil) != (by == policy.Plan) {
			t.Errorf("%s: got %v, want topdown, and why", by, list)
		}
	}
}

// A policy that would build gigabytes ends with an error, which is its own, and
// topdown is not asked to build them.
func TestMemoryBound(t *testing.T) {
	p := compileBy(t, policy.Plan, `
package envoy.authz

allow if count(all) > 0

all contains sprintf("%d-%d-%s", [x, y, input.a]) if {
	some x in numbers.range(1, 100000)
	some y in numbers.range(1, 100000)
}
`, entry)
	var again atomic.Int64
	env := policy.NewEnvWith(policy.EnvOptions{Again: &again})
	_, err := p.Decide(context.Background(), entry, value(t, `{"a": "a text"}`), env, nil)
	if !errors.Is(err, policy.ErrEval) || !errors.Is(err, plan.ErrBound) || !strings.Contains(err.Error(), "67108864 bytes") {
		t.Errorf("got %v, want %v that names the bound", err, policy.ErrEval)
	}
	if again.Load() != 0 {
		t.Error("topdown was asked again")
	}
}

func TestVerify(t *testing.T) {
	const text = `
package envoy.authz

allow if input.a

deny if input.b

random := rand.intn("n", 1000000000)

conflict if input.a

conflict := 1 if input.a
`
	entries := []string{"envoy/authz/allow", "envoy/authz/deny", "envoy/authz/random", "envoy/authz/conflict"}
	p := compileBy(t, policy.Plan, text, entries...)
	input := value(t, `{"a": true}`)
	for entry, want := range map[string]bool{
		"envoy/authz/allow": true, "envoy/authz/deny": true, "envoy/authz/random": true,
		"envoy/authz/conflict": false, // which topdown answers
		"no/such/entry":        false,
	} {
		if d, verified := p.Verify(context.Background(), entry, input, nil, nil); d != nil || verified != want {
			t.Errorf("%s: got %v, %t, want no difference and %t", entry, d, verified, want)
		}
	}
	stopped := new(policy.Cancel)
	stopped.Cancel()
	p.Swap("envoy/authz/allow", "envoy/authz/deny")
	if d, verified := p.Verify(context.Background(), "envoy/authz/allow", input, nil, stopped); d != nil || verified {
		t.Errorf("cancelled: got %v, %t, want none", d, verified)
	}
	d, _ := p.Verify(context.Background(), "envoy/authz/allow", input, nil, nil)
	if d == nil || d.Plan != nil || d.Topdown != ast.Boolean(true) || d.Err != nil {
		t.Fatalf("got %+v, want undefined and true", d)
	}
	if want := "result: plan gives nothing, topdown true"; d.String() != want {
		t.Errorf("got %q, want %q", d, want)
	}
	// And now topdown answers.
	if v, err := p.Eval(context.Background(), "envoy/authz/allow", input, nil, nil); err != nil || v != ast.Boolean(true) {
		t.Errorf("got %v, %v, want true", v, err)
	}
	if slices.ContainsFunc(p.Evaluated(false), func(e policy.Evaluated) bool { return e.By != policy.Topdown || e.Why == nil }) {
		t.Errorf("got %v, want all by topdown, and why", p.Evaluated(false))
	}
}

// What a difference is told as has no texts of the answers, which may be secrets.
func TestDifference(t *testing.T) {
	of := func(text string) ast.Value { return ast.MustParseTerm(text).Value }
	for _, c := range []struct {
		plan, topdown ast.Value
		want          string
	}{
		{of(`{"allowed": true, "headers": {"x-token": "secret"}}`), of(`{"allowed": true, "headers": {"x-token": "geheim!"}}`),
			"result.headers.x-token: plan gives a string of 6 bytes, topdown a string of 7 bytes"},
		{of(`{"a": [1, {2}]}`), of(`{"a": [1, {2, 3}]}`), "result.a[1]: plan gives a set of 1, topdown a set of 2"},
		{of(`{"a": [1, 2]}`), of(`{"a": [1]}`), "result.a: plan gives an array of 2, topdown an array of 1"},
		{of(`{}`), of(`{"a": null}`), "result.a: plan gives nothing, topdown null"},
		{of(`1`), nil, "result: plan gives 1, topdown nothing"},
	} {
		d := policy.Difference{Plan: c.plan, Topdown: c.topdown}
		if got := d.String(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

// Where a part of the data is the input for a while, and has a member put into it,
// the data stay as they are: for that evaluation and for the next.
func TestWithLeavesData(t *testing.T) {
	for _, by := range []policy.Evaluator{policy.Topdown, policy.Plan} {
		p, err := compile(map[string]string{"data.json": `{"o": {"a": {"b": 1}}}`, "policy.rego": `
package envoy.authz

allow := {"seen": seen, "keys": object.keys(data.o), "a": data.o.a}

whole := input

seen := x if x := whole with input as data.o with input.c.d as 1 with input.a.x as 2

seen_before := [data.o, seen]
`}, policy.Options{Entries: []string{"envoy/authz/allow", "envoy/authz/seen_before"}, Evaluator: by})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			for entry, want := range map[string]string{
				"envoy/authz/allow":       `{"seen": SEEN, "keys": {"a"}, "a": {"b": 1}}`,
				"envoy/authz/seen_before": `[{"a": {"b": 1}}, SEEN]`,
			} {
				want = strings.ReplaceAll(want, "SEEN", `{"a": {"b": 1, "x": 2}, "c": {"d": 1}}`)
				v, err := p.Eval(context.Background(), entry, value(t, `{}`), nil, nil)
				if err != nil || v.Compare(ast.MustParseTerm(want).Value) != 0 {
					t.Errorf("%s: %s: got %v, %v, want %s", by, entry, v, err, want)
				}
			}
		}
	}
}

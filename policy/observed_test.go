package policy_test

import (
	"context"
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

func TestObserved(t *testing.T) {
	p := authztest.Policy(t, `
# METADATA
# scope: package
# labels:
#   team: orders
package envoy.authz

# METADATA
# labels:
#   rule: late
#   team: night
allow if time.now_ns() > 1000

allow if admin

# METADATA
# labels:
#   rule: admin
admin if input.user == "alice"

# METADATA
# labels:
#   rule: never
admin if input.user == "nobody"
`)
	o := policy.Observed{At: time.Unix(0, 1), WantBuiltins: true}
	d, err := p.DecideObserved(context.Background(), entry, value(t, `{"user": "alice"}`), nil, nil, &o)
	if err != nil || !d.Allowed {
		t.Fatalf("got %v, %v, want allowed", d.Allowed, err)
	}
	if want := value(t, `{}`).(ast.Object); want.Compare(o.Builtins) == 0 || o.Builtins.Get(ast.StringTerm("time.now_ns")) == nil {
		t.Errorf("got builtins %v, want time.now_ns", o.Builtins)
	}
	wantLabels := []map[string]any{
		{"rule": "admin", "team": "orders"},
		{"team": "orders"},
	}
	if !reflect.DeepEqual(o.RuleLabels, wantLabels) {
		t.Errorf("got labels %v, want %v", o.RuleLabels, wantLabels)
	}
	if o.Duration <= 0 {
		t.Errorf("got duration %v, want some", o.Duration)
	}

	o = policy.Observed{}
	before := time.Now()
	if d, err := p.DecideObserved(context.Background(), entry, value(t, `{}`), nil, nil, &o); err != nil || !d.Allowed {
		t.Fatalf("got %v, %v, want allowed", d.Allowed, err)
	}
	if o.Builtins != nil || o.At.Before(before) {
		t.Errorf("got builtins %v and time %v, want none and now", o.Builtins, o.At)
	}
}

// With what was observed, a decision can be made again as it was.
func TestObservedAgain(t *testing.T) {
	p := authztest.Policy(t, `
package envoy.authz

allow := {"allowed": true, "headers": {
	"random": sprintf("%d", [rand.intn("n", 1000000000)]),
	"id": uuid.rfc4122("x"),
	"now": sprintf("%d", [time.now_ns()]),
}}
`)
	decide := func(o *policy.Observed) policy.Decision {
		d, err := p.DecideObserved(context.Background(), entry, value(t, `{}`), nil, nil, o)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	var o policy.Observed
	o.WantBuiltins = true
	first := decide(&o)
	known := o.Builtins.String()
	again := decide(&policy.Observed{At: o.At, Builtins: o.Builtins})
	if !reflect.DeepEqual(first.Headers, again.Headers) {
		t.Errorf("again: got %v, want %v", again.Headers, first.Headers)
	}
	if other := decide(&policy.Observed{At: o.At}); reflect.DeepEqual(first.Headers, other.Headers) {
		t.Errorf("without what was observed: got %v, too", other.Headers)
	}
	if got := o.Builtins.String(); got != known {
		t.Errorf("what was observed is now %s, want %s", got, known)
	}
}

func TestOptional(t *testing.T) {
	const text = `
package envoy.authz

allow := true
-- mask.rego --
package system.log

mask contains "/input/secret" if input.input.secret
-- system/switch/data.json --
{"on": false}
-- other.rego --
package system.other

drop[x] := 1 if x := "y"
`
	b, err := authztest.Bundle(text)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile([]policy.Named{{Name: "policy", Part: prepare(t, b.Bundle)}}, policy.Options{
		Entries:  []string{entry},
		Optional: []string{"system/log/mask", "system/log/drop", "system/switch/on", "system/other", "none", entry, "system/log/drop/x"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for entry, want := range map[string]bool{
		entry: true, "system/log/mask": true, "system/switch/on": true, "system/other": true,
		"system/log/drop": false, "none": false, "system/log/drop/x": false, "a/b": false,
	} {
		if got := p.Has(entry); got != want {
			t.Errorf("Has(%q): got %v, want %v", entry, got, want)
		}
		if _, err := p.Eval(context.Background(), entry, value(t, `{}`), nil, nil); errors.Is(err, policy.ErrEntry) == want {
			t.Errorf("Eval(%q): got error %v", entry, err)
		}
	}
	v, err := p.Eval(context.Background(), "system/log/mask", value(t, `{"input": {"secret": 1}}`), nil, nil)
	if err != nil || v.String() != `{"/input/secret"}` {
		t.Errorf("mask: got %v, %v", v, err)
	}
}

func TestDocument(t *testing.T) {
	p := authztest.Policy(t, `
package config.services

main := {"url": data.urls[opa.runtime().config.labels.region]}

f(x) := x
-- urls/data.json --
{"eu": "https://eu"}
-- system/note/data.json --
{"a": 1}
-- input.rego --
package config.needs

no_input if not input
some_input if input
`, "", "config", "config/none", "urls/eu")
	env := policy.NewEnv(map[string]string{"region": "eu"})
	for entry, want := range map[string]string{
		"":        `{"config": {"needs": {"no_input": true}, "services": {"main": {"url": "https://eu"}}}, "urls": {"eu": "https://eu"}}`,
		"config":  `{"needs": {"no_input": true}, "services": {"main": {"url": "https://eu"}}}`,
		"urls/eu": `"https://eu"`,
	} {
		got, err := p.Document(context.Background(), entry, env, nil)
		if err != nil || got.Compare(value(t, want)) != 0 {
			t.Errorf("%q: got %v, %v, want %s", entry, got, err, want)
		}
	}
	if _, err := p.Document(context.Background(), "config/none", env, nil); !errors.Is(err, policy.ErrUndefined) {
		t.Errorf("got error %v, want %v", err, policy.ErrUndefined)
	}
	cancelled := new(policy.Cancel)
	cancelled.Cancel()
	if _, err := p.Document(context.Background(), "", env, cancelled); !errors.Is(err, policy.ErrCanceled) {
		t.Errorf("got error %v, want %v", err, policy.ErrCanceled)
	}
}

func BenchmarkDecideObserved(b *testing.B) {
	for name, text := range map[string]string{
		"trivial": "package envoy.authz\ndefault allow := true",
		"labels":  "# METADATA\n# scope: package\n# labels: {a: b}\npackage envoy.authz\ndefault allow := true",
	} {
		b.Run(name, func(b *testing.B) {
			p := authztest.Policy(b, text)
			env := policy.NewEnv(nil)
			input := value(b, `{"a": 1}`)
			b.ReportAllocs()
			for b.Loop() {
				var o policy.Observed
				if _, err := p.DecideObserved(context.Background(), entry, input, env, nil, &o); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

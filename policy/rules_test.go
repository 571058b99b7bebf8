package policy

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
)

// compiledOf compiles one module.
func compiledOf(t *testing.T, text string, opts Options) *Policy {
	t.Helper()
	m, err := ast.ParseModuleWithOpts("p.rego", text, ast.ParserOptions{ProcessAnnotation: true})
	if err != nil {
		t.Fatal(err)
	}
	part, err := Prepare(&bundle.Bundle{
		Manifest: bundle.Manifest{Revision: "1", Roots: &[]string{""}},
		Data:     map[string]any{"roles": map[string]any{"alice": []any{"admin"}}},
		Modules:  []bundle.ModuleFile{{URL: "p.rego", Path: "p.rego", Raw: []byte(text), Parsed: m}},
	})
	if err != nil {
		t.Fatal(err)
	}
	p, err := Compile([]Named{{Name: "policy", Part: part}}, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const remade = `package p

allow if "admin" in data.roles[input.user]

# The user is who asks.
conflict := 1 if input.user
conflict := 2 if input.other
`

// Of a policy whose plans answer, no rules are kept. They are made once when
// topdown is asked, and give what they gave.
func TestRulesAreMadeAgain(t *testing.T) {
	opts := Options{Entries: []string{"p/allow", "p/conflict", "p/nothing"}, Optional: []string{"p/none"}, Evaluator: Plan}
	input := ast.MustParseTerm(`{"user": "alice", "other": true}`).Value
	byTopdown := opts
	byTopdown.Evaluator = Topdown
	want := compiledOf(t, remade, byTopdown)
	if want.rules.current.Load() == nil {
		t.Fatal("rules that topdown evaluates are not kept")
	}
	p := compiledOf(t, remade, opts)
	if p.rules.current.Load() != nil {
		t.Fatal("rules are kept beside the plans of all entry points")
	}
	little := p.Size()
	for range 3 {
		if v, err := p.Eval(t.Context(), "p/allow", input, nil, nil); err != nil || v.Compare(ast.Boolean(true)) != 0 {
			t.Fatalf("got %v, %v", v, err)
		}
	}
	if p.rules.current.Load() != nil {
		t.Fatal("rules were made for what a plan answers")
	}
	var work sync.WaitGroup
	made := make([]*compiled, 8)
	for i := range made {
		work.Go(func() {
			for _, entry := range opts.Entries {
				got := p.Explain(context.Background(), entry, input, nil, nil, ExplainOptions{})
				wanted := want.Explain(context.Background(), entry, input, nil, nil, ExplainOptions{})
				if fmt.Sprint(got.Value, got.Err, got.Steps) != fmt.Sprint(wanted.Value, wanted.Err, wanted.Steps) {
					t.Errorf("%s: got %+v\nwant %+v", entry, got, wanted)
				}
			}
			made[i] = p.rules.current.Load()
		})
	}
	work.Wait()
	for _, c := range made {
		if c == nil || c != made[0] {
			t.Error("the rules were made more than once")
		}
	}
	if p.Size() <= little {
		t.Errorf("got a size of %d with rules and %d without", p.Size(), little)
	}
}

// Topdown tells of an error of a plan, and the rules are made for it.
func TestRulesAfterAnError(t *testing.T) {
	opts := Options{Entries: []string{"p/conflict"}, Evaluator: Plan}
	input := ast.MustParseTerm(`{"user": "alice", "other": true}`).Value
	p := compiledOf(t, remade, opts)
	_, err := p.Eval(t.Context(), "p/conflict", input, nil, nil)
	opts.Evaluator = Topdown
	_, want := compiledOf(t, remade, opts).Eval(t.Context(), "p/conflict", input, nil, nil)
	if err == nil || err.Error() != want.Error() || PlaceOf(err) != PlaceOf(want) || p.rules.current.Load() == nil {
		t.Errorf("got %v at %q, want %v at %q", err, PlaceOf(err), want, PlaceOf(want))
	}
}

// Rules are kept where topdown is asked by rule, and where making them again would
// take long.
func TestRulesAreKept(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		opts Options
	}{
		"a plan that cannot be": {"package p\n\nallow := x if { x := [y | some y in [1]; {y: 1}[z]] }\n\nq[1][x] := 1 if x := input.x\n\nr := q", Options{Entries: []string{"p/allow", "p/q"}}},
		"labels":                {"package p\n\n# METADATA\n# labels:\n#   team: x\nallow := true", Options{Entries: []string{"p/allow"}}},
		"print":                 {"package p\n\nallow := true if print(1)", Options{Entries: []string{"p/allow"}, Print: true}},
		"large":                 {"package p\n\nallow := true\n" + strings.Repeat("# a comment is text, too\n", maxRemade/25+1), Options{Entries: []string{"p/allow"}}},
	} {
		c.opts.Evaluator = Plan
		if p := compiledOf(t, c.text, c.opts); p.rules.current.Load() == nil {
			t.Errorf("%s: the rules are not kept", name)
		}
	}
}

// What opa.runtime shows is made when a policy asks for it, however it does.
func TestRuntimeIsMadeWhenAsked(t *testing.T) {
	shows := ast.MustParseTerm(`"orders"`).Value
	for text, asks := range map[string]bool{
		"allow := input.user":                                                                                false,
		"allow := opa.runtime().config.labels.app":                                                           true,
		"allow := f(1)\n\nf(_) := opa.runtime().config.labels.app":                                           true,
		"allow := x if { some x in [y | y := opa.runtime().config.labels.app] }":                             true,
		"allow := x if { x := g with g as \"orders\" }\n\ng := opa.runtime()":                                true,
		"allow := x if { x := g.config.labels.app with g as opa.runtime() }\n\ng := 1 if input.none":         true,
		"default allow := \"none\"\n\nallow := \"none\" if false\n\nelse := opa.runtime().config.labels.app": true,
	} {
		for _, by := range []Evaluator{Plan, Topdown} {
			env := NewEnv(map[string]string{"app": "orders"})
			p := compiledOf(t, "package p\n\n"+text, Options{Entries: []string{"p/allow"}, Evaluator: by})
			v, err := p.Eval(t.Context(), "p/allow", ast.MustParseTerm(`{"user": "orders"}`).Value, env, nil)
			if err != nil || v.Compare(shows) != 0 || (env.shown.Load() != nil) != asks {
				t.Errorf("%s by %s: got %v, %v, made: %t", text, by, v, err, env.shown.Load() != nil)
			}
		}
	}
}

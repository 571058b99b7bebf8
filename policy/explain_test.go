package policy_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

const explained = `package envoy.authz

import data.roles

default allow := false

allow if {
	input.user == "alice"
	some role in roles[input.user]
	role == "manager"
}

allow if {
	not blocked
	some role in roles[input.user]
	print("role", role)
	role == "manager"
}

blocked if input.headers["x-blocked"] ==
	"yes"
-- data.json --
{"roles": {"bob": ["clerk", "packer", "driver"], "carol": ["manager"]}}
`

// toldSteps are steps as lines.
func toldSteps(steps []policy.Step) string {
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintf(&b, "%s:%d %s%s %s", s.File, s.Line, strings.Repeat("| ", s.Depth), s.Op, s.Text)
		if s.Times > 0 {
			fmt.Fprintf(&b, " (%d times)", s.Times)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// The rules that were tried are told, also those that an index would pass over,
// and in each the expression that failed, with its line.
func TestExplainRules(t *testing.T) {
	p := authztest.Policy(t, explained)
	for _, c := range []struct{ name, input, value, want string }{
		{"denied", `{"user": "bob"}`, "false", `
policy.rego:7 enter data.envoy.authz.allow
policy.rego:8 fail input.user == "alice"
policy.rego:13 enter data.envoy.authz.allow
policy.rego:20 | | enter data.envoy.authz.blocked
policy.rego:20 | | fail input.headers["x-blocked"] == "yes"
policy.rego:17 fail role == "manager" (3 times)
policy.rego:5 enter default data.envoy.authz.allow
policy.rego:5 exit default data.envoy.authz.allow
`},
		{"blocked", `{"user": "carol", "headers": {"x-blocked": "yes"}}`, "false", `
policy.rego:7 enter data.envoy.authz.allow
policy.rego:8 fail input.user == "alice"
policy.rego:13 enter data.envoy.authz.allow
policy.rego:20 | | enter data.envoy.authz.blocked
policy.rego:20 | | exit data.envoy.authz.blocked
policy.rego:14 fail not blocked
policy.rego:5 enter default data.envoy.authz.allow
policy.rego:5 exit default data.envoy.authz.allow
`},
		{"allowed", `{"user": "carol"}`, "true", `
policy.rego:7 enter data.envoy.authz.allow
policy.rego:8 fail input.user == "alice"
policy.rego:13 enter data.envoy.authz.allow
policy.rego:20 | | enter data.envoy.authz.blocked
policy.rego:20 | | fail input.headers["x-blocked"] == "yes"
policy.rego:13 exit data.envoy.authz.allow
`},
	} {
		x := p.Explain(context.Background(), "envoy/authz/allow", value(t, c.input), nil, nil, policy.ExplainOptions{})
		if x.Err != nil || x.Value.String() != c.value {
			t.Errorf("%s: got value %v, error %v, want %s", c.name, x.Value, x.Err, c.value)
		}
		if got := toldSteps(x.Steps); got != c.want[1:] {
			t.Errorf("%s: got\n%swant\n%s", c.name, got, c.want[1:])
		}
		if x.Truncated || len(x.Prints)+len(x.Anew)+len(x.Refused) > 0 {
			t.Errorf("%s: got %+v, want neither bounds met nor anything beside the steps", c.name, x)
		}
	}
}

// compiled compiles a text with options.
func compiled(t *testing.T, text string, opts policy.Options) *policy.Policy {
	t.Helper()
	b, err := authztest.Bundle(text)
	if err != nil {
		t.Fatal(err)
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	opts.Entries = []string{"envoy/authz/allow"}
	p, err := policy.Compile([]policy.Named{{Name: "policy", Part: part}}, opts)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// What the policy prints is told where it was compiled to print, and nothing of
// its variables otherwise.
func TestExplainPrint(t *testing.T) {
	input := value(t, `{"user": "bob", "password": "hunter2"}`)
	x := compiled(t, explained, policy.Options{Print: true}).Explain(context.Background(), "envoy/authz/allow", input, nil, nil, policy.ExplainOptions{})
	got := ""
	for _, p := range x.Prints {
		got += fmt.Sprintf("%s:%d %s\n", p.File, p.Line, p.Text)
	}
	want := "policy.rego:16 role clerk\npolicy.rego:16 role packer\npolicy.rego:16 role driver\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	for _, mode := range policy.TraceModes {
		x := compiled(t, explained, policy.Options{}).Explain(context.Background(), "envoy/authz/allow", input, nil, nil, policy.ExplainOptions{Mode: mode})
		if text := toldSteps(x.Steps); strings.Contains(text, "hunter2") || strings.Contains(text, "bob") || strings.Contains(text, "clerk") {
			t.Errorf("%s: the steps have values:\n%s", mode, text)
		}
		if len(x.Prints) > 0 {
			t.Errorf("%s: got %v printed, by a policy that was not compiled to print", mode, x.Prints)
		}
	}
}

// The modes of OPA say what they say there.
func TestExplainModes(t *testing.T) {
	p := authztest.Policy(t, `package envoy.authz
default allow := false
allow if {
	trace("asked")
	input.n > 1
}
`)
	for mode, want := range map[policy.TraceMode]string{
		policy.TraceNotes: `
:0 enter data.envoy.authz.allow = result
policy.rego:3 | enter data.envoy.authz.allow
policy.rego:4 | note asked
`,
		policy.TraceFails: `
:0 enter data.envoy.authz.allow = result
policy.rego:3 | enter data.envoy.authz.allow
policy.rego:5 | fail input.n > 1
`,
		policy.TraceRules: `
policy.rego:3 enter data.envoy.authz.allow
policy.rego:4 note asked
policy.rego:5 fail input.n > 1
policy.rego:2 enter default data.envoy.authz.allow
policy.rego:2 exit default data.envoy.authz.allow
`,
	} {
		x := p.Explain(context.Background(), "envoy/authz/allow", value(t, `{"n": 0}`), nil, nil, policy.ExplainOptions{Mode: mode})
		if got := toldSteps(x.Steps); got != want[1:] {
			t.Errorf("%s: got\n%swant\n%s", mode, got, want[1:])
		}
	}
	full := p.Explain(context.Background(), "envoy/authz/allow", value(t, `{"n": 0}`), nil, nil, policy.ExplainOptions{Mode: policy.TraceFull})
	if text := toldSteps(full.Steps); !strings.Contains(text, "eval input.n > 1") || !strings.Contains(text, "index ") || !strings.Contains(text, "redo ") {
		t.Errorf("full: got\n%s", text)
	}
}

// Builtins that depend on more than their arguments give what they gave then;
// what was not recorded is asked again, but nothing is sent.
func TestExplainBuiltins(t *testing.T) {
	p := compiled(t, `package envoy.authz
default allow := false
allow if {
	time.now_ns() == 1700000000000000000
	rand.intn("die", 6) >= 0
	response := http.send({"method": "GET", "url": "http://127.0.0.1:1/"})
	response.status_code == 200
}
`, policy.Options{Network: true})
	network, err := policy.NewNetwork(policy.NetworkOptions{Hosts: []string{"127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	env := policy.NewEnvWith(policy.EnvOptions{Network: network})
	at := time.Unix(1_700_000_000, 0)
	x := p.Explain(context.Background(), "envoy/authz/allow", value(t, `{}`), env, nil, policy.ExplainOptions{At: at})
	if x.Value.String() != "false" || !strings.Contains(toldSteps(x.Steps), `policy.rego:6 fail`) {
		t.Errorf("got %v, %s, want false for what http.send would have to say", x.Value, toldSteps(x.Steps))
	}
	if fmt.Sprint(x.Refused) != "[http.send]" || fmt.Sprint(x.Anew) != "[rand.intn time.now_ns]" {
		t.Errorf("got %v refused and %v asked again", x.Refused, x.Anew)
	}

	recorded := value(t, `{"http.send": {}}`).(ast.Object)
	calls := ast.NewObject(ast.Item(
		ast.ArrayTerm(ast.ObjectTerm(ast.Item(ast.StringTerm("method"), ast.StringTerm("GET")), ast.Item(ast.StringTerm("url"), ast.StringTerm("http://127.0.0.1:1/")))),
		ast.ObjectTerm(ast.Item(ast.StringTerm("status_code"), ast.IntNumberTerm(200)))))
	recorded.Insert(ast.StringTerm("http.send"), ast.NewTerm(calls))
	x = p.Explain(context.Background(), "envoy/authz/allow", value(t, `{}`), env, nil, policy.ExplainOptions{At: at, Builtins: recorded})
	if x.Value == nil || x.Value.String() != "true" || len(x.Refused) > 0 {
		t.Errorf("with what http.send gave: got %v, %v, %v refused, want true", x.Value, x.Err, x.Refused)
	}
}

// An explanation is bounded, whatever the policy does, and heeds its end.
func TestExplainBounds(t *testing.T) {
	p := authztest.Policy(t, `package envoy.authz
default allow := false
allow if {
	some x in numbers.range(1, 20000)
	y := x + 1
	y < 0
}
`)
	x := p.Explain(context.Background(), "envoy/authz/allow", value(t, `{}`), nil, nil, policy.ExplainOptions{Mode: policy.TraceFull})
	if !x.Truncated || len(x.Steps) > 10_000 || x.Value.String() != "false" {
		t.Errorf("got %d steps, truncated %t, value %v, want at most 10000, and the value", len(x.Steps), x.Truncated, x.Value)
	}
	if x = p.Explain(context.Background(), "envoy/authz/allow", value(t, `{}`), nil, nil, policy.ExplainOptions{}); x.Truncated || !strings.Contains(toldSteps(x.Steps), "fail y < 0 (20000 times)") {
		t.Errorf("got truncated %t, steps\n%s, want what failed once, counted", x.Truncated, toldSteps(x.Steps))
	}
	cancel := new(policy.Cancel)
	cancel.Cancel()
	if x = p.Explain(context.Background(), "envoy/authz/allow", value(t, `{}`), nil, cancel, policy.ExplainOptions{}); !errors.Is(x.Err, policy.ErrCanceled) {
		t.Errorf("cancelled: got %v", x.Err)
	}
	if x = p.Explain(context.Background(), "other", value(t, `{}`), nil, nil, policy.ExplainOptions{}); !errors.Is(x.Err, policy.ErrEntry) {
		t.Errorf("another entry point: got %v", x.Err)
	}
}

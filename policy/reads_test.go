package policy_test

import (
	"testing"

	"github.com/gatehouse-authz/gatehouse/authztest"
)

func TestReadsBody(t *testing.T) {
	for _, c := range []struct {
		rules string
		want  bool
	}{
		{`allow := true`, false},
		{`allow if input.attributes.request.http.method == "GET"`, false},
		{`allow if input.parsed_path[0] == "a"`, false},
		{`allow if input.truncated_body`, false},
		{`allow if input.parsed_body.x == 1`, true},
		{`allow if "x" in input.parsed_body`, true},
		{`allow if input.attributes.request.http.body == ""`, true},
		{`allow if input.attributes.request.http.rawBody == ""`, true},
		{`allow if some k, v in input.attributes.request.http.headers`, false},
		{`allow if count(input.attributes.request.http) > 3`, true},
		{`allow if count(input.attributes) > 3`, true},
		{`allow if count(input) > 3`, true},
		{`allow if { x := input; x.a }`, true},
		{`allow if { k := concat("_", ["parsed", "body"]); input[k] }`, true},
		{`allow if input[data.k].x`, true},
		{`allow if { walk(input, [p, v]); v == 1 }`, true},
		{"allow if helper\nhelper if input.parsed_body", true},
		{"allow if f(1)\nf(x) if input.parsed_body.x == x", true},
		{"allow if false\nother if input.parsed_body", false},
		{"allow := 1 if false else := 2 if input.parsed_body", true},
		{"default allow := false\nallow if { every x in input.parsed_body { x > 1 } }", true},
		{`allow if [x | x := input.parsed_body[_]] == []`, true},
		{`allow if data.other.rule`, true},
		{`allow if data.other[input.parsed_path[0]]`, true},
		{`allow if data.data_only.parsed_body`, false},
		{"allow if plain with input as {}\nplain if input.x", true}, // it cannot be told
	} {
		p := authztest.Policy(t, "package envoy.authz\n"+c.rules+`
-- other.rego --
package other
rule if input.parsed_body
`)
		if got := p.ReadsBody(entry); got != c.want {
			t.Errorf("%s: got %t, want %t", c.rules, got, c.want)
		}
	}
}

func TestReadsTokenClaims(t *testing.T) {
	for _, c := range []struct {
		rules string
		want  bool
	}{
		{`allow if input.subject.claims.role == "admin"`, false},
		{`allow if some role in input.subject.claims.roles`, false},
		{`allow if input.subject.id == "x"`, false},
		{`allow if input.resource.exp`, false},
		{`allow if input.subject.claims.jti == "x"`, true},
		{`allow if input.subject.claims.exp > 1`, true},
		{`allow if input.subject.claims[input.action.name]`, true},
		{`allow if some k, v in input.subject.claims`, true},
		{`allow if { s := input.subject; s.claims.role }`, true},
		{`allow if count(input) > 1`, true},
		{"allow if f(input.subject)\nf(s) if s.claims.role", true},
		{"allow if other\nother if input.subject.claims.nbf", true},
		{"allow if true\nother if input.subject.claims.nbf", false},
	} {
		p := authztest.Policy(t, "package envoy.authz\n"+c.rules)
		if got := p.ReadsTokenClaims(entry); got != c.want {
			t.Errorf("%s: got %t, want %t", c.rules, got, c.want)
		}
	}
}

func TestVaries(t *testing.T) {
	for _, c := range []struct {
		rules string
		want  bool
	}{
		{`allow := true`, false},
		{`allow if input.x == "time.now_ns"`, false},
		{`allow if time.parse_rfc3339_ns(input.x) > 1`, false},
		{`allow if opa.runtime().config.labels.app == "x"`, false},
		{`allow if io.jwt.verify_hs256(input.x, "secret")`, false},
		{`allow if data.time.now_ns`, false},
		{`allow if time.now_ns() > 1`, true},
		{`allow if { x := time.now_ns(); x > 1 }`, true},
		{`allow if [x | x := time.now_ns()][0] > 1`, true},
		{`allow if rand.intn("x", 2) == 1`, true},
		{`allow if uuid.rfc4122("x") == "y"`, true},
		{`allow if io.jwt.decode_verify(input.x, {"secret": "x"})[0]`, true},
		{"allow if late\nlate if time.now_ns() > 1", true},
		{"allow if f(1)\nf(x) if time.now_ns() > x", true},
		{"allow if true\nlate if time.now_ns() > 1", false},
		{"allow := 1 if input.x else := 2 if time.now_ns() > 1", true},
		{"allow if plain with rand.intn as f\nplain if rand.intn(\"x\", 2) == 1\nf(_, _) := 1", true}, // it cannot be told,
		{"allow if { every x in input.xs { time.now_ns() > x } }", true},
	} {
		p := authztest.Policy(t, "package envoy.authz\n"+c.rules)
		if got := p.Varies(entry); got != c.want {
			t.Errorf("%s: got %t, want %t", c.rules, got, c.want)
		}
	}
}

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

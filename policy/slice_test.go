package policy_test

import (
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// paths are those that a Slice has, "*" where it is all that is below.
func paths(s *policy.Slice) string {
	var all []string
	var walk func(prefix string, s *policy.Slice)
	walk = func(prefix string, s *policy.Slice) {
		if s.Whole {
			all = append(all, strings.TrimPrefix(prefix+".*", "."))
		}
		for _, m := range s.Members {
			walk(prefix+"."+m.Name, m.Slice)
		}
	}
	walk("", s)
	return strings.Join(all, " ")
}

func TestSlice(t *testing.T) {
	for _, c := range []struct{ rules, want string }{
		{`allow := true`, ""},
		{`allow if input.attributes.request.http.method == "GET"`, "attributes.request.http.method.*"},
		{`allow if input.attributes.request.http.headers["x-user"] == "a"`, "attributes.request.http.headers.x-user.*"},
		{`allow if input.parsed_path[0] == "a"`, "parsed_path.*"},
		{`allow if "a" in input.parsed_path`, "parsed_path.*"},
		{"allow if { input.a.b; input.a.c }", "a.b.* a.c.*"},
		{"allow if { input.a.b; input.a }", "a.*"},
		{"allow if { input.a; input.a.b }", "a.*"},
		{"allow if { input.a[1].b; input.a.c }", "a.*"},
		{"allow if not input.a.b", "a.b.*"},
		{"allow if { x := input.a; x.b }", "a.*"},
		{"allow if { x := input; x.b }", "*"},
		{"allow if { input = x; x.b }", "*"},
		{"allow if input == {}", "*"},
		{"allow if { some k; input[k] }", "*"},
		{"allow if { some k; input.a[k].c }", "a.*"},
		{"allow if { some k, v in input.a; k == v }", "a.*"},
		{"allow if { some k, v in input; k == v }", "*"},
		{"allow if { every x in input.a { x > input.b } }", "a.* b.*"},
		{"allow if { walk(input, [p, v]); v == 1 }", "*"},
		{"allow if { walk(input.a, [p, v]); v == 1 }", "a.*"},
		{`allow if object.get(input, ["a", "b"], 1) == 1`, "*"},
		{`allow if object.get(input.a, "b", 1) == 1`, "a.*"},
		{`allow if json.filter(input, ["a/b"]) == {}`, "*"},
		{`allow if count(json.marshal(input)) > 1`, "*"},
		{"allow if f(input.a)\nf(x) if x.b", "a.*"},
		{"allow if f(input)\nf(x) if x.b", "*"},
		{"allow if f(1)\nf(x) if input.b == x", "b.*"},
		{"allow if f(\"b\")\nf(x) if input[x]", "*"},
		{"allow if input[data.k]", "*"},
		{"allow if input.a[input.b].c", "a.* b.*"},
		{"allow if [x | x := input.a[_]] == []", "a.*"},
		{"allow if {x | x := input.a.b} == set()", "a.b.*"},
		{"allow if {k: v | some k, v in input.a} == {}", "a.*"},
		{"allow := input.a", "a.*"},
		{"allow contains input.a.b if input.c", "a.b.* c.*"},
		{"allow[input.a] := input.b if input.c", "a.* b.* c.*"},
		{"allow[x] if { x := input.a }", "a.*"},
		{"allow.b[input.a.x].c := 1", "a.x.*"},
		{"allow := 1 if input.a else := 2 if input.b else := input.c", "a.* b.* c.*"},
		{"default allow := false\nallow if input.a", "a.*"},
		{"default f(_) := false\nf(x) if input.a == x\nallow if f(1)", "a.*"},
		{"allow if other\nother if input.a", "a.*"},
		{"allow if false\nother if input.a", ""},
		{"allow if data.other.rule", "o.*"},
		{"allow if data.other[input.a]", "a.* o.*"},
		{"allow if data.other == {}", "o.*"},
		{"allow if input.a with input as {}", "*"},
		{"allow if plain with input.b as 1\nplain if input.a.x", "*"},
		{"allow if plain with data.x as input.b\nplain if { input.a.x; data.x }", "a.x.* b.*"},
		{"allow if plain with count as mock\nplain if count(\"\") == 1\nmock(_) := 1 if input.a", "a.*"},
		{"allow if plain with data.other.rule as true\nplain if data.other.rule", "o.*"},
		{`allow if sprintf("%v", [input.a.b]) == ""`, "a.b.*"},
		{`allow if $"{input.a.b}" == ""`, "a.b.*"},
		{`allow if input.a["b"]["c d"]`, "a.b.c d.*"},
		{`allow if input.a[true].b`, "a.*"},
		{`allow if input.a[null]`, "a.*"},
		{`allow if input.a[{"x": 1}]`, "a.*"},
		{`allow if {"x": [input.a.b, {input.c}]} == {"x": [1, {2}]}`, "a.b.* c.*"},
		{"allow if { print(input.a); input.b }", "b.*"}, // calls of print are compiled away
		{"allow if input.a.b.c.d.e.f.g.h.i.j", "a.b.c.d.e.f.g.h.*"},
		{"allow if input" + strings.Repeat("\nallow if input.a", 3), "*"},
	} {
		p := authztest.Policy(t, "package envoy.authz\nimport rego.v1\n"+c.rules+`
-- other.rego --
package other
rule if input.o
-- data.json --
{"k": "a"}
`)
		if got := paths(p.Slice(entry)); got != c.want {
			t.Errorf("%s: got %q, want %q", c.rules, got, c.want)
		}
	}
	var many strings.Builder
	for i := range 70 {
		many.WriteString("allow if input.a.x" + strings.Repeat("x", i) + "\n")
	}
	p := authztest.Policy(t, "package envoy.authz\n"+many.String())
	if got := paths(p.Slice(entry)); got != "a.*" {
		t.Errorf("many members: got %q", got)
	}
	if got := p.Slice("nothing/like/that"); got.Whole || len(got.Members) > 0 {
		t.Errorf("no entry point: got %q", paths(got))
	}
}

func TestSliceJoin(t *testing.T) {
	slice := func(rules string) *policy.Slice {
		return authztest.Policy(t, "package envoy.authz\nimport rego.v1\n"+rules).Slice(entry)
	}
	for _, c := range []struct{ a, b, want string }{
		{"allow := 1", "allow := 1", ""},
		{"allow if input.a.b", "allow := 1", "a.b.*"},
		{"allow if input.a.b", "allow if input.a.c", "a.b.* a.c.*"},
		{"allow if input.a.b", "allow if input.a", "a.*"},
		{"allow if input.a.b", "allow if input == 1", "*"},
	} {
		a, b := slice(c.a), slice(c.b)
		for _, got := range []string{paths(a.Join(b)), paths(b.Join(a))} {
			if got != c.want {
				t.Errorf("%s and %s: got %q, want %q", c.a, c.b, got, c.want)
			}
		}
	}
}

func TestSliceOf(t *testing.T) {
	s := authztest.Policy(t, "package envoy.authz\nallow if input.a.b").Slice(entry)
	if a := s.Of("a"); a == nil || a.Whole || a.Of("b") != policy.All || a.Of("c") != nil || s.Of("b") != nil || policy.All.Of("x") != policy.All {
		t.Errorf("got %q", paths(s))
	}
}

package policy_test

import (
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// A bundle is refused in which a variable could only hold itself; one in which it
// need not decides.
func TestValueThatContainsItself(t *testing.T) {
	for _, rule := range []string{
		`r := x if { {x: 1} = x }`,
		`r := x if { {x} = x }`,
		`r := x if { x = {{x}} }`,
		`r := x if { {1: {x: 1}} = x }`,
		`r := x if { [{x: 1}] = x }`,
		`r := x if { x = {{x: 1}: 1} }`,
		`r := x if { [x, y] = [{y: 1}, {x: 1}] }`,
		`r := x if { [x, y] = [y, {x: 1}] }`,
		`r := x if { {"a": x, "b": y} = {"a": {y: 1}, "b": x} }`,
		`r := 1 if { {x: 1} = x; count(x) }`,
		`r := {x: 1 | {x: 1} = x}`,
		`r := 1 if { some x in input.o; y := {x: 1 | {x: 1} == x}; y }`,
		`r := 1 if { x = input.o[_]; count({1 | {x: 1} == x; x}) == 0 }`,
		`r := 1 if { every z in input.o { {x: z} = x } }`,
	} {
		err := compileOne(t, "package t\n"+rule+"\n")
		if err == nil || !strings.Contains(err.Error(), "can hold no value that contains itself") {
			t.Errorf("%s: got %v", rule, err)
		}
	}
	for rule, want := range map[string]string{
		`r := {x: 1} if { some x in input.o; y := {x: 1}; y[x] == 1; x == 1 }`:                   `{1: 1}`,
		`r := y if { some x in input.o; x == 2; y := {x: {"x": x}} }`:                            `{2: {"x": 2}}`,
		`r := 1 if { some x in input.o; {x: 1} == {x: 1}; x == 1 }`:                              `1`,
		`r := [x, y] if { some x, y in input.o; y == 2; {x: y} != {y: x} }`:                      `[1, 2]`,
		`r := [1 | some x in input.o; [x] == x]`:                                                 `[]`,
		`r := {k: v | some k, v in input.o; {k: v} != {v: k}; w := {k: v}; w[k] == v}`:           `{0: 1, 1: 2}`,
		`r := {x | some x in input.o; {x} == {x}}`:                                               `{1, 2}`,
		`r := 1 if { x := {1}; y := {x: x}; z := {y: x}; count(z) == 1; {x: y} == {x: {x: x}} }`: `1`,
	} {
		p := authztest.Policy(t, "-- p.rego --\npackage t\n"+rule+"\n", "t/r")
		v, err := p.Eval(t.Context(), "t/r", ast.MustParseTerm(`{"o": [1, 2]}`).Value, nil, nil)
		if err != nil || v.Compare(ast.MustParseTerm(want).Value) != 0 {
			t.Errorf("%s: got %v, %v, want %s", rule, v, err, want)
		}
	}
}

// compileOne compiles one module with the entry point t/r.
func compileOne(t *testing.T, text string) error {
	t.Helper()
	b, err := authztest.Bundle("-- p.rego --\n" + text)
	if err != nil {
		t.Fatal(err)
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		return err
	}
	_, err = policy.Compile([]policy.Named{{Name: "p", Part: part}}, policy.Options{Entries: []string{"t/r"}})
	return err
}

package plan

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

// greedy are rules each of which would build gigabytes.
const greedy = `package t

arrays := [[x, y, z] | some x in numbers.range(1, 5000); some y in numbers.range(1, 5000); some z in numbers.range(1, 500)]

sets := {sprintf("%d-%d", [x, y]) | some x in numbers.range(1, 5000); some y in numbers.range(1, 5000)}

objects := {x: {y: z | some y in numbers.range(1, 5000); z := y} | some x in numbers.range(1, 5000)}

partial contains sprintf("%d-%d", [x, y]) if {
	some x in numbers.range(1, 5000)
	some y in numbers.range(1, 5000)
}

partial_object[x][y] := 1 if {
	some x in numbers.range(1, 5000)
	some y in numbers.range(1, 5000)
}

calls := [f([x, y]) | some x in numbers.range(1, 5000); some y in numbers.range(1, 5000)]

f(x) := {"a": x, "b": [x]}

range := count(numbers.range(1, 1000000000))

range_back := count(numbers.range(1000000000, -1))

step := count(numbers.range_step(0, 100000000000, 100))

huge := count(numbers.range(0, 1e30))

cidr := count(net.cidr_expand("10.0.0.0/8"))

cidr6 := count(net.cidr_expand("fe80::/10"))

shift := bits.lsh(1, 100000000000)

k1 := concat("", [s | some _ in numbers.range(1, 1000); s := input.text])

k2 := concat("", [k1 | some _ in numbers.range(1, 1000)])

k3 := concat(k2, ["a", "b", "c", k2])

join := count(concat("", [k2 | some _ in numbers.range(1, 1000)]))

join_by := count(concat(k1, ["" | some _ in numbers.range(1, 1000)]))

replaced := count(replace(k1, "0", k1))

replaced_empty := count(replace(k1, "", k1))

replaced_n := count(strings.replace_n({"0": k1, "1": k1}, k1))

replaced_re := count(regex.replace(k1, "[0-9]", k1))

parts := count(split(k2, ""))

printed := count(sprintf("%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d%999999d", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]))

printed_list := count(sprintf("%v %v %v %v", [d9, d9, d9, d9]))

marshalled := count(json.marshal(d9))

templated := count(strings.render_template("{{range .a}}{{range $.a}}{{range $.a}}{{$.text}}{{end}}{{end}}{{end}}", {"a": numbers.range(1, 500), "text": input.text}))

templated_doubling := count(strings.render_template(concat("", array.concat(["{{$x := .text}}"], ["{{$x = printf \"%s%s\" $x $x}}" | some _ in numbers.range(1, 60)])), {"text": input.text}))

templated_calls := count(strings.render_template(concat("", array.concat([sprintf("{{define \"t%d\"}}{{template \"t%d\" .}}{{template \"t%d\" .}}{{end}}", [i, i + 1, i + 1]) | some i in numbers.range(1, 60)], ["{{define \"t61\"}}{{.text}}{{end}}{{template \"t1\" .}}"])), {"text": input.text}))

paths := count(graph.reachable_paths({sprintf("%d-%d", [i, j]): [sprintf("%d-0", [i + 1]), sprintf("%d-1", [i + 1])] | some i in numbers.range(1, 40); some j in [0, 1]}, {"1-0"}))

cidr_matches := count(net.cidr_contains_matches({sprintf("a%d", [x]): "10.0.0.0/8" | some x in numbers.range(1, 1000)}, {sprintf("b%d", [x]): "10.0.0.1" | some x in numbers.range(1, 1000)}))

walked := count([p | walk(d9, [p, _])])

parsed := [y | some x in numbers.range(1, 100000); y := json.unmarshal(input.json)]

united := [y | some x in numbers.range(1, 100000); y := object.union(input.big, {"x": x})]

d0 := [input.text, input.text, input.text, input.text, input.text, input.text, input.text, input.text, input.text]

d1 := [d0, d0, d0, d0, d0, d0, d0, d0, d0]

d2 := [d1, d1, d1, d1, d1, d1, d1, d1, d1]

d3 := [d2, d2, d2, d2, d2, d2, d2, d2, d2]

d4 := [d3, d3, d3, d3, d3, d3, d3, d3, d3]

d9 := [d4, d4, d4, d4, d4, d4, d4, d4, d4]

with_input := [y | some x in numbers.range(1, 100000000); y := input.big with input.big.a as x]
`

// What would build gigabytes ends with an error that names the bound, before it has.
func TestMaxMemory(t *testing.T) {
	const most = 8 << 20
	input := ast.MustInterfaceToValue(map[string]any{
		"text": strings.Repeat("0123456789", 10), "json": "[" + strings.Repeat(`{"a":[1,2]},`, 100) + "1]",
		"big": func() map[string]any {
			m := map[string]any{}
			for _, c := range "abcdefghijklmnopqrstuvwxyz" {
				m[string(c)] = []any{string(c), map[string]any{"x": 1}}
			}
			return m
		}(),
	})
	helpers := map[string]bool{"k1": true, "d0": true, "d1": true, "d2": true, "d3": true, "d4": true, "f(x)": true, "k3": true, "k2": true, "d9": true}
	for line := range strings.Lines(greedy) {
		name, _, ok := strings.Cut(line, " ")
		name, _, _ = strings.Cut(name, "[")
		if !ok || line[0] == '\t' || name == "package" || helpers[name] {
			continue
		}
		t.Run(name, func(t *testing.T) {
			p := programOf(t, greedy, "data.t."+name+" = result", map[string]any{})
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			v, err := p.Eval(context.Background(), input, &Env{MaxMemory: most})
			runtime.ReadMemStats(&after)
			bound := uint64(most)
			if name == "paths" || name == "cidr_matches" || strings.HasPrefix(name, "templated") {
				bound = MaxBuilt // whatever is left
			}
			if v != nil || !errors.Is(err, ErrBound) || !strings.Contains(err.Error(), fmt.Sprintf("%d bytes", bound)) {
				t.Errorf("got %.100v, %v, want an error that names the bound", v, err)
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > 8*garbage*bound {
				t.Errorf("%d bytes were allocated, the bound is %d", got, bound)
			}
		})
	}
}

// A decision is far from the bound, and what is over it for one is forgotten.
func TestMemoryIsOfOneEvaluation(t *testing.T) {
	for _, bc := range benchCases {
		c := bc.make(t)
		p := c.program(t)
		for range 20 {
			if _, err := p.Eval(context.Background(), c.input, &Env{MaxMemory: 64 << 10, JSON: parseJSON}); err != nil {
				t.Errorf("%s: %v", bc.name, err)
			}
		}
	}
}

package plan

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// opas are OPA's forms of what stands in the registry in their place.
var opas = func() map[string]topdown.BuiltinFunc {
	m := map[string]topdown.BuiltinFunc{}
	for _, name := range []string{
		ast.Concat.Name, ast.NetCIDRContainsMatches.Name, ast.ReachableBuiltin.Name, ast.ReachablePathsBuiltin.Name, ast.RenderTemplate.Name,
	} {
		m[name] = topdown.GetBuiltin(name)
	}
	return m
}()

// builtinOutcome is what a builtin gives.
func builtinOutcome(f topdown.BuiltinFunc, bctx topdown.BuiltinContext, operands ...*ast.Term) string {
	var got []string
	err := f(bctx, operands, func(t *ast.Term) error {
		got = append(got, t.String())
		return nil
	})
	return fmt.Sprint(got, err)
}

// The builtins that stand in the place of OPA's give what those give.
func TestRegistryIsOPAs(t *testing.T) {
	same := func(t *testing.T, name string, operands ...*ast.Term) {
		t.Helper()
		before := fmt.Sprint(operands)
		want := builtinOutcome(opas[name], topdown.BuiltinContext{}, operands...)
		defer func() {
			if after := fmt.Sprint(operands); after != before {
				t.Errorf("%s: operands are %.300s, were %.300s", name, after, before)
			}
		}()
		if got := builtinOutcome(topdown.GetBuiltin(name), topdown.BuiltinContext{}, operands...); got != want {
			t.Errorf("%s%v:\n got %.300s\nwant %.300s", name, operands, got, want)
		}
	}
	t.Run("concat", func(t *testing.T) {
		for _, length := range []int{0, 1, 1000, maxCopied - 1, maxCopied, maxCopied + 1, 3*maxCopied + 17} {
			long := strings.Repeat("0123456789abcdef", length/16+1)[:length]
			for _, sep := range []string{"", ",", ", ", long} {
				for _, list := range []string{`[]`, `[LONG]`, `[LONG, "a"]`, `["a", LONG, LONG]`, `["", "", LONG]`, `{"a", LONG, "b"}`, `[LONG, 1]`, `[1, LONG]`, `{LONG, "x", 2}`, `"x"`, `1`} {
					value := ast.MustParseTerm(strings.ReplaceAll(list, "LONG", `"`+long+`"`))
					same(t, ast.Concat.Name, ast.StringTerm(sep), value)
				}
			}
			same(t, ast.Concat.Name, ast.NumberTerm("1"), ast.ArrayTerm(ast.StringTerm(long), ast.StringTerm(long)))
		}
	})
	t.Run("net.cidr_contains_matches", func(t *testing.T) {
		operands := []*ast.Term{ast.NumberTerm("1")}
		for _, text := range []string{
			`"10.0.0.0/8"`, `"10.1.2.3"`, `"nothing"`, `[]`, `["10.0.0.0/8", "10.1.0.0/16", "fe80::/10"]`, `{"10.1.2.3", "192.168.0.1", "fe80::1"}`,
			`{"a": "10.0.0.0/8", "b": ["10.1.0.0/16", "x"], "c": "0.0.0.0/0"}`, `["10.0.0.0/8", 1]`, `["10.0.0.0/8", []]`, `["10.0.0.0/8", "x"]`, `[["10.0.0.0/8", 1]]`, `[[1]]`,
			`["::ffff:10.0.0.0/104", "10.0.0.0/8"]`, `{["10.0.0.0/8"], "11.0.0.0/33"}`, `null`,
		} {
			operands = append(operands, ast.MustParseTerm(text))
		}
		for _, a := range operands {
			for _, b := range operands {
				same(t, ast.NetCIDRContainsMatches.Name, a, b)
			}
		}
	})
	t.Run("graphs", func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		node := func() *ast.Term {
			if n := random.IntN(9); n < 7 {
				return ast.StringTerm(string(rune('a' + n)))
			}
			return ast.NumberTerm("1")
		}
		nodes := func() *ast.Term {
			var list []*ast.Term
			for range random.IntN(4) {
				list = append(list, node())
			}
			switch random.IntN(20) {
			case 0:
				return ast.NullTerm()
			case 1:
				return ast.StringTerm("a")
			}
			if random.IntN(2) == 0 {
				return ast.ArrayTerm(list...)
			}
			return ast.SetTerm(list...)
		}
		for range 5000 {
			graph := ast.NewObject()
			for range random.IntN(7) {
				graph.Insert(node(), nodes())
			}
			from := nodes()
			same(t, ast.ReachableBuiltin.Name, ast.NewTerm(graph), from)
			same(t, ast.ReachablePathsBuiltin.Name, ast.NewTerm(graph), from)
		}
		same(t, ast.ReachableBuiltin.Name, ast.StringTerm("x"), nodes())
		same(t, ast.ReachablePathsBuiltin.Name, ast.StringTerm("x"), nodes())
	})
	t.Run("strings.render_template", func(t *testing.T) {
		variables := ast.MustParseTerm(`{"s": "a<b>&\"c'", "n": 5, "f": 1.5, "big": 12345678901234567890, "t": true, "z": null, "list": [1, "two", [3]], "o": {"k": {"l": "m"}}, "e": []}`)
		for _, text := range []string{
			"", "plain", "{{.s}} {{.n}} {{.f}} {{.big}} {{.t}} {{.z}} {{.list}} {{.o}} {{.missing}}",
			"{{range .list}}[{{.}}]{{else}}none{{end}}{{range .e}}x{{else}}none{{end}}",
			"{{range $k, $v := .o}}{{$k}}={{$v.l}}{{end}}", "{{with .o.k}}{{.l}}{{end}}", "{{if eq .s \"x\"}}y{{else}}n{{end}}",
			"{{print .s .n}}|{{println .n .f}}|{{printf \"%s-%v-%d-%q\" .s .n .n .s}}", "{{html .s}}{{js .s}}{{urlquery .s}}",
			"{{.s | printf \"%10s|%-5v\" .n | html}}", "{{len .list}}{{index .list 1}}{{slice .s 1 2}}",
			"{{$x := printf \"%s!\" .s}}{{$x}}{{$x = print $x $x}}{{$x}}", `{{define "t"}}<{{.}}>{{end}}{{template "t" .n}}{{block "b" .s}}{{.}}{{end}}`,
			"{{", "{{.a.b.c}}", "{{nofunc}}", "{{index .list 9}}", "{{template \"absent\"}}", "{{printf}}", "{{.s.x}}", "{{call .s}}", "<no value>",
			"{{and .t .s}}{{or .z .n}}{{not .t}}{{lt 1 2}}", "{{printf \"%5d|%x\" 42 255}}{{range $i := 3}}{{$i}}{{end}}",
			"{{printf .s .n}}", "{{print}}{{println}}{{html}}", "{{/* no text */}}{{- \" x \" -}} y",
		} {
			same(t, ast.RenderTemplate.Name, ast.StringTerm(text), variables)
		}
		same(t, ast.RenderTemplate.Name, ast.NumberTerm("1"), variables)
		same(t, ast.RenderTemplate.Name, ast.StringTerm("x"), ast.StringTerm("x"))
	})
}

// What would build gigabytes in one call ends where topdown evaluates, too.
func TestMaxBuilt(t *testing.T) {
	input := ast.MustParseTerm(`{"text": "` + strings.Repeat("0123456789", 10) + `"}`)
	for _, name := range []string{
		"range", "range_back", "step", "huge", "cidr", "cidr6", "shift", "join", "join_by", "replaced", "replaced_empty", "replaced_n", "replaced_re",
		"templated", "templated_doubling", "templated_calls", "paths", "doubled", "flattened", "encoded", "printed_much", "cidr_matches",
	} {
		t.Run(name, func(t *testing.T) {
			module := ast.MustParseModule(strings.ReplaceAll(greedy, "[s | some _ in numbers.range(1, 1000)", "[s | some _ in numbers.range(1, 10000)") + doublings())
			compiler := ast.NewCompiler()
			if compiler.Compile(map[string]*ast.Module{"t.rego": module}); compiler.Failed() {
				t.Fatal(compiler.Errors)
			}
			o := oracle{compiler: compiler, query: ast.MustParseBody("data.t." + name + " = result"), data: map[string]any{}}
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			v, err := o.topdown(t, input)
			runtime.ReadMemStats(&after)
			if v != nil && v.Len() > 0 || !errors.Is(err, ErrBound) || !strings.Contains(err.Error(), "67108864 bytes") {
				t.Errorf("got %.100v, %v, want an error that names the bound", v, err)
			}
			if got := after.TotalAlloc - before.TotalAlloc; got > 16*MaxBuilt {
				t.Errorf("%d bytes were allocated, the bound is %d", got, MaxBuilt)
			}
		})
	}
}

// Topdown looks at what walk gives one after the other, however much there is.
func TestTopdownWalksOn(t *testing.T) {
	const many = MaxBuilt/(memoryElement+memoryValue) + 1
	list := make([]*ast.Term, many)
	for i := range list {
		list[i] = ast.InternedTerm(1)
	}
	seen := 0
	err := topdown.GetBuiltin(ast.WalkBuiltin.Name)(topdown.BuiltinContext{}, []*ast.Term{ast.ArrayTerm(list...)}, func(*ast.Term) error {
		seen++
		return nil
	})
	if err != nil || seen != many+1 {
		t.Errorf("got %d values, %v, want %d", seen, err, many+1)
	}
}

// doublings are rules whose values double, or so, from one to the next.
func doublings() string {
	var b strings.Builder
	b.WriteString("\nx0 := [1, 2]\n\ny0 := [1, 2]\n\nz0 := input.text\n")
	const many = 60
	for i := range many {
		fmt.Fprintf(&b, "\nx%d := array.concat(x%d, x%d)\n\ny%d := array.flatten([y%d, y%d])\n\nz%d := urlquery.encode(hex.encode(base64.encode(z%d)))\n", i+1, i, i, i+1, i, i, i+1, i)
	}
	fmt.Fprintf(&b, "\ndoubled := count(x%d)\n\nflattened := count(y%d)\n\nencoded := count(z%d)\n", many, many, many)
	b.WriteString("\nprinted_much := count(sprintf(concat(\"\", [\"%999999d\" | some _ in numbers.range(1, 100)]), numbers.range(1, 100)))\n")
	return b.String()
}

// Long walks and joins end when the evaluation is cancelled.
func TestRegistryCancelled(t *testing.T) {
	cancel := topdown.NewCancel()
	cancel.Cancel()
	long := ast.StringTerm(strings.Repeat("x", 2*maxCopied))
	for name, operands := range map[string][]*ast.Term{
		ast.Concat.Name:                 {ast.StringTerm(","), ast.ArrayTerm(long, long)},
		ast.NetCIDRContainsMatches.Name: {ast.StringTerm("10.0.0.0/8"), ast.StringTerm("10.0.0.1")},
		ast.ReachableBuiltin.Name:       chain(2),
		ast.ReachablePathsBuiltin.Name:  chain(2),
		ast.RenderTemplate.Name:         {ast.StringTerm("x"), ast.ObjectTerm()},
	} {
		err := topdown.GetBuiltin(name)(topdown.BuiltinContext{Cancel: cancel}, operands, func(*ast.Term) error { return nil })
		var halt topdown.Halt
		if !errors.As(err, &halt) || !topdown.IsCancel(halt.Err) {
			t.Errorf("%s: got %v, want it cancelled", name, err)
		}
	}
}

// chain is a graph of so many nodes, each with an edge to the next, and the first.
func chain(nodes int) []*ast.Term {
	graph := ast.NewObject()
	for i := range nodes {
		graph.Insert(ast.InternedTerm(i), ast.ArrayTerm(ast.InternedTerm(i+1)))
	}
	return []*ast.Term{ast.NewTerm(graph), ast.ArrayTerm(ast.InternedTerm(0))}
}

// A long path takes little more than itself, and has an end.
func TestLongPath(t *testing.T) {
	paths := topdown.GetBuiltin(ast.ReachablePathsBuiltin.Name)
	for _, nodes := range []int{20_000, maxPath + 1} {
		operands := chain(nodes)
		got := 0
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := paths(topdown.BuiltinContext{}, operands, func(v *ast.Term) error {
			got = v.Value.(ast.Set).Slice()[0].Value.(*ast.Array).Len()
			return nil
		})
		runtime.ReadMemStats(&after)
		var halt topdown.Halt
		switch {
		case nodes <= maxPath && (err != nil || got != nodes):
			t.Errorf("got a path of %d, %v, want %d", got, err, nodes)
		case nodes > maxPath && (!errors.As(err, &halt) || !errors.Is(halt.Err, ErrBound)):
			t.Errorf("a path of %d: got %d, %v, want an error that names the bound", nodes, got, err)
		}
		if took := after.TotalAlloc - before.TotalAlloc; took > MaxBuilt {
			t.Errorf("%d bytes were allocated for a path of %d", took, nodes)
		}
	}
}

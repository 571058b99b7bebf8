package plan

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// otherRules are for rules that refer to them by a name that is computed.
const otherRules = `package rules

no := false

yes := true

obj := {"a": input.b}
`

// ask compares a Program with topdown on a module, data and inputs.
func ask(t *testing.T, module, query string, data map[string]any, inputs ...string) {
	t.Helper()
	compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": module, "rules.rego": otherRules}, ast.CompileOpts{})
	if err != nil {
		t.Fatal(err)
	}
	o := oracle{compiler: compiler, query: ast.MustParseBody(query), data: data}
	for _, text := range inputs {
		input := ast.MustParseTerm(text)
		want, wantErr := o.topdown(t, input)
		got, gotErr := o.plan(t, input)
		if err := agree(got, gotErr, want, wantErr); err != nil {
			t.Errorf("input %s: %v", text, err)
		}
	}
}

// Regression: the value of a rule and of its else, in locals of one number, were
// taken for the same constant.
func TestElseIsNotTheSameConstant(t *testing.T) {
	ask(t, `package t

p := 1 if {
	input.a
} else := q

q := input.b
`, "data.t.p = result", map[string]any{}, `{"b": 2}`, `{"a": true}`, `{"a": false, "b": 3}`, `{}`)
}

// Regression: members that change after they were put into an object left it with
// a wrong hash, and where hashes collide with members that were lost.
func TestNestedRulesWithCollidingKeys(t *testing.T) {
	ask(t, `package t

p[x].b := x if some x in input.keys

q[x][y] contains x if {
	some x in input.keys
	some y in input.keys
}

same if q == q2

q2[x][y] contains x if {
	some x in input.keys
	some y in input.keys
}
`, "data.t = result", map[string]any{}, `{"keys": [0, null, [null], [0], 1, false, [], {}]}`, `{"keys": ["a", "b"]}`)
}

// Regression: what a negation looks for lies in nested blocks of the plan where
// the rule is found by name, and a rule that is false was taken for one that is
// not.
func TestNotOfRuleByName(t *testing.T) {
	ask(t, `package t

p contains k if {
	some k in {"no", "yes", "none", "base", "obj"}
	not data.rules[k]
}

q contains k if {
	some k in {"no", "yes", "none", "base", "obj"}
	not data.rules[k].a
}

r contains k if {
	some k in {"no", "yes", "none", "base", "obj"}
	not data.rules[k].a with input.b as true
}
`, "data.t = result", map[string]any{}, `{"b": false}`, `{"b": true}`, `{}`)
}

// Regression: a part of a literal that is undefined.
func TestLiteralOfUndefined(t *testing.T) {
	ask(t, `package t

p := true if {
	some x, y in data.n.b
	x != y
} else := {"c": {[], count(input.arr["1"])}, 2: data.o} if {
	data.o
}

q := {"c": {[], count(input.arr["1"])}, 2: data.o}

r := [1, {"a": input.a}, {input.b}]
`, "data.t = result", map[string]any{"o": 1}, `{"arr": ["c", {}, false]}`, `{"a": 1}`, `{"b": 1}`, `{"a": 1, "b": 2, "arr": {"1": "abc"}}`)
}

// Rules whose keys are those of data have others too when topdown is asked for one.
func TestKeysOfData(t *testing.T) {
	const module = `package t

list[i] := data.list[i]

set contains i if data.list[i]

object[k] := data.object[k]

nested[i][j] := data.lists[i][j]

pairs contains [i, "a"] if data.list[i]

named[k] := data.names[k]

p1 := list["0"]

p2 := object[1]

p3 := list[input.key]

p4 := nested[_]["0"]

p5 := nested[0]["0"]

p6 if set["0"]

p7 if pairs[["0", "a"]]

q1 := named.a

q2 := named[input.name]

q3 if 0 in set

q4 := count(list)

q5 := {i: x | some i, x in list}

q6 := list[_]

q7 := list[i] if some i in set

q8 := list[0]

q9 := object["1"]
`
	data := map[string]any{"list": []any{"x"}, "object": map[string]any{"1": "y"}, "names": map[string]any{"a": 1}, "lists": []any{[]any{"z"}}}
	compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": module}, ast.CompileOpts{})
	if err != nil {
		t.Fatal(err)
	}
	for rule, refused := range map[string]bool{
		"p1": true, "p2": true, "p4": true, "p5": true, "p6": true, "p7": true, "q1": false, "q2": false, "q3": false, "q4": false, "q5": false, "q6": false, "list": false, "q7": false, "q8": false, "q9": false,
	} {
		o := oracle{compiler: compiler, query: ast.MustParseBody("data.t." + rule + " = result"), data: data}
		if _, err := o.program(); errors.Is(err, ErrUnsupported) != refused {
			t.Errorf("%s: got %v, want that it is refused: %t", rule, err, refused)
			continue
		}
		if refused {
			continue
		}
		for _, text := range []string{`{"key": "0", "name": "a"}`, `{"name": "0"}`} {
			input := ast.MustParseTerm(text)
			want, wantErr := o.topdown(t, input)
			got, gotErr := o.plan(t, input)
			if err := agree(got, gotErr, want, wantErr); err != nil {
				t.Errorf("%s, input %s: %v", rule, text, err)
			}
		}
	}
	p := programOf(t, module, "data.t.p3 = result", data)
	for key, want := range map[string]error{`"0"`: ErrUnsupported, `0`: nil, `"x"`: ErrUndefined, `0.0`: ErrUnsupported, `7`: ErrUndefined} {
		if _, err := p.Eval(t.Context(), ast.MustParseTerm(`{"key": `+key+`}`).Value, nil); !errors.Is(err, want) {
			t.Errorf("key %s: got %v, want %v", key, err, want)
		}
	}
}

// A function is called so often that the policy ends only because each call is
// remembered, as topdown does.
func TestCallsAreRemembered(t *testing.T) {
	module := "package t\n\nf40(x) := x + 1\n"
	for i := range 40 {
		module += fmt.Sprintf("\nf%d(x) := y if {\n\ty := f%d(x) + f%d(x)\n}\n", i, i+1, i+1)
	}
	ask(t, module+"\np := f0(input.x)\n", "data.t.p = result", map[string]any{}, `{"x": 1}`, `{"x": "a"}`)
}

// The planner has the second with of each of these replace the other document.
func TestWithAfterFunction(t *testing.T) {
	for _, module := range []string{
		"p if { q with data.t.f as 1 with input as {\"a\": 1} }",
		"p if { q with count as 1 with data.a as 1 }",
		"p if { every x in [1] { x == 1; q with count as 1 with data.a as 1 } }",
	} {
		compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": "package t\n\nf(x) := x\n\nq if input.a == f(1)\n\n" + module}, ast.CompileOpts{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Of(compiler, ast.MustParseBody("data.t.p = result")); !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s: got %v, want %v", module, err, ErrUnsupported)
		}
	}
	ask(t, "package t\n\nf(x) := x\n\nq if input.a == f(1)\n\np if { q with input as {\"a\": 1} with data.t.f as 1 }\n",
		"data.t.p = result", map[string]any{}, `{"a": 1}`, `{}`)
}

// The plan of a small policy would be too large to be made.
func TestTooLargePlans(t *testing.T) {
	refs, withs := "package t\n\np if {\n", "package t\n"
	for i := range 12 {
		refs += fmt.Sprintf("\tdata.rules[x%d]\n", i)
		withs += fmt.Sprintf("\nr%d if {\n\tr%d with data.a as 1\n\tr%d with data.t.r12 as 2\n}\n", i, i+1, i+1)
	}
	for _, module := range []string{refs + "}\n", withs + "\nr12 := data.a\n\np := r0\n"} {
		compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": module, "rules.rego": otherRules}, ast.CompileOpts{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Of(compiler, ast.MustParseBody("data.t.p = result")); !errors.Is(err, ErrUnsupported) {
			t.Errorf("got %v, want %v", err, ErrUnsupported)
		}
	}
}

func programOf(t *testing.T, module, query string, data map[string]any) *Program {
	t.Helper()
	compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": module}, ast.CompileOpts{})
	if err != nil {
		t.Fatal(err)
	}
	o := oracle{compiler: compiler, query: ast.MustParseBody(query), data: data}
	p, err := o.program()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

const loops = `package t

p if {
	some x in numbers.range(1, 400)
	some y in numbers.range(1, 400)
	x * y == -1
}

q contains x if {
	some x in numbers.range(1, 5)
	f(x) > 0
}

f(x) := count([y | some y in numbers.range(1, 400); y > x; y < 0; p]) + 1
`

// trap is a Cancel that is set when it has been asked so often.
type trap struct{ left atomic.Int64 }

func (c *trap) Cancel()         { c.left.Store(0) }
func (c *trap) Cancelled() bool { return c.left.Add(-1) < 0 }

func TestCancel(t *testing.T) {
	for _, query := range []string{"data.t.p = result", "data.t.q = result"} {
		p := programOf(t, loops, query, map[string]any{})
		for _, asked := range []int64{0, 1, 100} {
			cancel := new(trap)
			cancel.left.Store(asked)
			v, err := p.Eval(context.Background(), nil, &Env{Cancel: cancel})
			if !topdown.IsCancel(err) || v != nil {
				t.Errorf("%s, cancelled when asked %d times: got %v, %v", query, asked, v, err)
			}
			if left := cancel.left.Load(); left < -2 {
				t.Errorf("%s, cancelled when asked %d times: was asked %d times more", query, asked, -left)
			}
		}
	}
}

func TestMaxSteps(t *testing.T) {
	p := programOf(t, loops, "data.t.p = result", map[string]any{})
	v, err := p.Eval(context.Background(), nil, &Env{MaxSteps: 10_000})
	if err == nil || v != nil || !strings.Contains(err.Error(), "more than 10000 steps") {
		t.Errorf("got %v, %v, want an error that names the bound", v, err)
	}
	if _, err := p.Eval(context.Background(), nil, &Env{MaxSteps: 100_000_000}); !errors.Is(err, ErrUndefined) {
		t.Errorf("got %v, want %v", err, ErrUndefined)
	}
}

// What a rule of data alone gives is kept, but not what differs from one evaluation
// to the next, nor the lack of what a builtin had an error for.
func TestKept(t *testing.T) {
	const module = `package t

list := [x | some x in data.list; x > 1]

number := to_number(data.text)

random := rand.intn("n", 1000000000)

labels := opa.runtime()
`
	p := programOf(t, module, "data.t.list = result", map[string]any{"list": []any{1, 2, 3}})
	first, err := p.Eval(context.Background(), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := p.Eval(context.Background(), nil, nil); err != nil || again != first {
		t.Errorf("got %v, %v, want the very value of before", again, err)
	}

	p = programOf(t, module, "data.t.number = result", map[string]any{"text": "x"})
	for range 2 {
		if _, err := p.Eval(context.Background(), nil, nil); !errors.Is(err, ErrUndefined) {
			t.Errorf("got %v, want %v", err, ErrUndefined)
		}
		if _, err := p.Eval(context.Background(), nil, &Env{StrictBuiltinErrors: true}); err == nil || errors.Is(err, ErrUndefined) {
			t.Errorf("strict: got %v, want the error of to_number", err)
		}
	}

	p = programOf(t, module, "data.t.random = result", map[string]any{})
	if first, err = p.Eval(context.Background(), nil, nil); err != nil {
		t.Fatal(err)
	}
	if again, err := p.Eval(context.Background(), nil, nil); err != nil || again.Compare(first) == 0 {
		t.Errorf("got %v, %v again, want another number", again, err)
	}

	p = programOf(t, module, "data.t.labels = result", map[string]any{})
	for _, label := range []string{"a", "b"} {
		runtime := ast.ObjectTerm(ast.Item(ast.StringTerm("label"), ast.StringTerm(label)))
		if v, err := p.Eval(context.Background(), nil, &Env{Runtime: runtime}); err != nil || v.Compare(runtime.Value) != 0 {
			t.Errorf("got %v, %v, want %v", v, err, runtime)
		}
	}
}

// A Program is asked by many at once.
func TestConcurrent(t *testing.T) {
	c := rolesCase(t)
	p := c.program(t)
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			for j := range 200 {
				input := checkInput(fmt.Sprintf("/area-%d/%d/item-%d/notes/1", (i+7)%20, j, j%5), map[string]any{"x-user": fmt.Sprintf("user-%04d", i)})
				if v, err := p.Eval(context.Background(), input, nil); err != nil || v != ast.Boolean(true) {
					t.Errorf("got %v, %v, want true", v, err)
				}
			}
		})
	}
	group.Wait()
}

// Decisions of the benchmark's policies cost few allocations.
func TestAllocations(t *testing.T) {
	for _, bc := range benchCases {
		most, ok := map[string]float64{"trivial": 2, "roles": 20, "rules1000": 2}[bc.name]
		if !ok {
			continue
		}
		c := bc.make(t)
		p := c.program(t)
		// The race detector has pools forget what they hold, now and then.
		got := most + 1
		for range 50 {
			got = min(got, testing.AllocsPerRun(1, func() { p.Eval(context.Background(), c.input, nil) }))
		}
		if got > most {
			t.Errorf("%s: got %v allocations, want at most %v", bc.name, got, most)
		}
	}
}

// Of many rules that compare a part of the input with one of two texts, those are run
// that can hold, with all others that are there.
func TestRulesByFewTexts(t *testing.T) {
	module := "package t\n\ndefault p := \"none\"\n"
	for i := range 24 {
		module += fmt.Sprintf("\np := %d if {\n\tinput.method == %q\n\tinput.path == [\"a\", %d]\n}\n", i, []string{"GET", "PUT"}[i%2], i%20)
		module += fmt.Sprintf("\ns contains %d if {\n\tinput.method == %q\n\tinput.n > %d\n} \n", i, []string{"GET", "PUT"}[i%2], i)
	}
	module += "\np := \"any\" if input.path == [\"b\"]\n\np := \"late\" if {\n\tinput.method == \"PUT\"\n\tinput.late\n} else := \"later\" if input.later\n\ns contains \"any\" if input.any\n"
	for _, rule := range []string{"p", "s"} {
		ask(t, module, "data.t."+rule+" = result", map[string]any{},
			`{"method": "GET", "path": ["a", 4], "n": 9}`, `{"method": "PUT", "path": ["a", 5], "n": 3.5}`, `{"method": "PUT", "path": ["a", 4], "n": 100}`,
			`{"method": "GET", "path": ["a", 1]}`, `{"method": "GET", "path": ["a", 0]}`, `{"method": "PUT", "path": ["a", 1]}`, `{"method": "GET", "path": ["b"], "any": true}`, `{"path": ["b"]}`,
			`{"method": "POST", "path": ["a", 4], "n": 1, "any": 1}`, `{"method": ["GET"]}`, `{"method": "PUT", "late": 1, "later": 1}`,
			`{"method": "GET", "late": 1, "later": 1}`, `{"later": 1}`, `{}`, `[]`)
	}
}

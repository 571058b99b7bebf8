package plan

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// budget cancels an evaluation after so many questions.
type budget struct{ left int }

func (b *budget) Cancel() {}
func (b *budget) Cancelled() bool {
	b.left--
	return b.left < 0
}

// tally counts what became of generated policies.
type tally struct{ compiled, planned, asked, refused, odd, canceled, failed, undefined int }

// differ asks both evaluators all questions of a generated policy and returns an
// error that tells of the first difference.
func differ(t testing.TB, choices []byte, n *tally) error {
	return generate(choices).differ(t, n)
}

func (c policyCase) differ(t testing.TB, n *tally) error {
	compiler := c.compile()
	if compiler == nil || cyclic(compiler) {
		return nil // not every policy is one
	}
	n.compiled++
	data, err := ast.JSON(ast.MustParseTerm(c.data).Value)
	if err != nil {
		return nil
	}
	for _, q := range c.queries {
		o := oracle{compiler: compiler, query: ast.MustParseBody(q), data: data.(map[string]any)}
		o.env.Time = time.Unix(1_700_000_000, 0)
		n.planned++
		prog, err := o.program()
		if refused := (*refusedError)(nil); errors.As(err, &refused) {
			n.refused++
			if os.Getenv("PLAN_VERBOSE") != "" {
				t.Log(err)
			}
			continue
		} else if err != nil {
			return err
		}
		for i, in := range append(c.inputs, "", c.inputs[0]) {
			for _, strict := range []bool{false, true} {
				var input *ast.Term
				if in != "" {
					// As JSON, in which no key is there twice.
					v, err := ast.JSON(ast.MustParseTerm(in).Value)
					if err != nil {
						return err
					}
					input = ast.NewTerm(ast.MustInterfaceToValue(v))
				}
				o.strict = strict
				o.env.Cancel = &budget{100_000}
				want, wantErr := o.topdown(t, input)
				env := o.env
				env.StrictBuiltinErrors, env.JSON, env.MaxMemory = strict, parseJSON, 64<<20
				env.Cancel = &budget{100_000}
				got, gotErr := prog.results(t.Context(), input, &env)
				if topdown.IsCancel(wantErr) || topdown.IsCancel(gotErr) {
					n.canceled++
					continue
				}
				if errors.Is(gotErr, ErrUnsupported) {
					n.odd++
					continue
				}
				n.asked++
				if wantErr != nil {
					n.failed++
				} else if want.Len() == 0 {
					n.undefined++
				}
				if excused(gotErr, wantErr, strict) {
					continue
				}
				if err := agree(got, gotErr, want, wantErr); err != nil {
					return fmt.Errorf("%s, input %d, strict %v: %w\n%s", q, i, strict, err, c.text())
				}
			}
		}
	}
	return nil
}

// excused reports whether a difference is one that is known and harmless: a
// Program looks at all of a rule where topdown looks for a part, and meets a
// conflict that topdown does not come to.
func excused(got, want error, strict bool) bool {
	if codeOf(want) == topdown.InternalErr && strings.Contains(want.Error(), "requires evaluation") {
		return true // topdown has met a fault of its own
	}
	if strict {
		// Where the first error of a builtin is the end, it matters which
		// expressions are looked at although nothing depends on them.
		for _, err := range []error{got, want} {
			if code := codeOf(err); code == topdown.TypeErr || code == topdown.BuiltinErr {
				return true
			}
		}
	}
	return codeOf(got) == topdown.ConflictErr && codeOf(want) != topdown.ConflictErr
}

// cyclic reports whether a policy compares a variable with a value that has it in
// it. topdown can bind the one to the other then, and ends the process.
func cyclic(compiler *ast.Compiler) (found bool) {
	for _, m := range compiler.Modules {
		ast.WalkExprs(m, func(e *ast.Expr) bool {
			if e.IsEquality() {
				for i := range 2 {
					x, ok := e.Operand(i).Value.(ast.Var)
					other := e.Operand(1 - i)
					found = found || ok && !other.Equal(e.Operand(i)) && other.Vars().Contains(x)
				}
			}
			return found
		})
	}
	return found
}

// compile compiles the policy without those of its rules that do not compile, or
// returns nil.
func (c policyCase) compile() *ast.Compiler {
	for range 20 {
		compiler, err := ast.CompileModulesWithOpt(c.modules, ast.CompileOpts{})
		if err == nil {
			return compiler
		}
		var errs ast.Errors
		if !errors.As(err, &errs) {
			return nil
		}
		for _, e := range errs {
			if e.Location != nil {
				c.modules[e.Location.File] = without(c.modules[e.Location.File], e.Location.Row)
			}
		}
	}
	return nil
}

// without returns a module without the rule at a line, all others being where
// they were.
func without(module string, row int) string {
	lines := strings.Split(module, "\n")
	from, to := row-1, row-1
	for from > 0 && lines[from-1] != "" {
		from--
	}
	for to < len(lines) && lines[to] != "" {
		to++
	}
	for i := from; i < to && from > 0; i++ {
		lines[i] = ""
	}
	return strings.Join(lines, "\n")
}

func (c policyCase) text() string {
	s := ""
	for name, m := range c.modules {
		s += "-- " + name + " --\n" + m
	}
	s += "-- data --\n" + c.data
	for i, in := range c.inputs {
		s += fmt.Sprintf("\n-- input %d --\n%s", i, in)
	}
	return s
}

// FuzzDifferential compares Programs with topdown on policies made of the fuzzer's
// bytes.
func FuzzDifferential(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 8 {
		f.Add(randomChoices(r)[:200])
	}
	f.Fuzz(func(t *testing.T, choices []byte) {
		// Small ones: under the fuzzer all of OPA is instrumented, and slow.
		var n tally
		if err := differ(t, choices[:min(len(choices), 400)], &n); err != nil {
			t.Fatal(err)
		}
	})
}

func randomChoices(r *rand.Rand) []byte {
	choices := make([]byte, 200+r.IntN(2000))
	for i := range choices {
		choices[i] = byte(r.Uint32())
	}
	return choices
}

// TestGenerated compares Programs with topdown on random policies, the same each
// time. PLAN_POLICIES asks for other than 150 of them, PLAN_SEED for others.
func TestGenerated(t *testing.T) {
	count, seed := 150, 1
	if s := os.Getenv("PLAN_POLICIES"); s != "" {
		count, _ = strconv.Atoi(s)
	}
	if s := os.Getenv("PLAN_SEED"); s != "" {
		seed, _ = strconv.Atoi(s)
	}
	r := rand.New(rand.NewPCG(uint64(seed), 0))
	var n tally
	different := 0
	for i := range count {
		if err := differ(t, randomChoices(r), &n); err != nil {
			if different++; different <= 3 {
				t.Errorf("policy %d: %v", i, err)
			}
		}
	}
	t.Logf("%+v, %d of %d policies differ", n, different, count)
	if n.compiled < count/4 {
		t.Errorf("%d of %d policies compile, want more", n.compiled, count)
	}
	if n.refused > n.planned/4 {
		t.Errorf("%d of %d plans are refused, want fewer", n.refused, n.planned)
	}
}

// FuzzNative compares the native forms of builtins with those of the registry.
func FuzzNative(f *testing.F) {
	f.Add(uint8(0), `"a"`, `["a", "b"]`, `null`)
	f.Add(uint8(1), `1`, `1.0`, `2`)
	f.Add(uint8(2), `"/a/*/b"`, `["/"]`, `"/a/c/b"`)
	f.Add(uint8(3), `{"a": 1}`, `"a"`, `["a"]`)
	f.Add(uint8(4), `["a", 1]`, `[]`, `{"x", "y"}`)
	f.Add(uint8(5), `9007199254740993`, `-1`, `1e3`)
	for i := range 30 {
		f.Add(uint8(i), `"ab"`, `"a"`, `"b"`)
		f.Add(uint8(i), `","`, `{"a", "b", "c"}`, `"b"`)
		f.Add(uint8(i), `3`, `4`, `"b"`)
		f.Add(uint8(i), `[1, 2]`, `[1.0, 2]`, `[]`)
		f.Add(uint8(i), `{1: 2}`, `1.0`, `"none"`)
	}
	for i := range 60 {
		f.Add(uint8(i), `"a/b/c"`, `"/"`, `2`)
		f.Add(uint8(i), `"%s-%v-%d"`, `["a", "b", 3]`, `2`)
		f.Add(uint8(i), `" Ää "`, `" "`, `2`)
		f.Add(uint8(i), `"^a.*b$"`, `"a, b"`, `2`)
		f.Add(uint8(i), `"abc"`, `1`, `-1`)
		f.Add(uint8(i), `"a%%b %v"`, `[1.0]`, `1`)
	}
	names := slices.Sorted(maps.Keys(natives))
	names = slices.DeleteFunc(append(names, ast.GlobMatch.Name, ast.RegexMatch.Name), func(name string) bool { return name == ast.NowNanos.Name })
	regexps := regexMatch(new(remembered[*regexp.Regexp]))
	known := make(map[string]*patterns)
	f.Fuzz(func(t *testing.T, which uint8, a, b, c string) {
		name := names[int(which)%len(names)]
		var terms []*ast.Term
		var args []operand
		for _, text := range []string{a, b, c}[:ast.BuiltinMap[name].Decl.Arity()] {
			term, err := ast.ParseTerm(text)
			if err != nil || !ast.IsConstant(term.Value) {
				return
			}
			terms = append(terms, term)
			args = append(args, operand{term: term})
		}
		n := natives[name]
		if name == ast.RegexMatch.Name {
			n = regexps
		}
		if name == ast.GlobMatch.Name {
			if n = globMatch(terms[1], known); n == nil {
				return
			}
		}
		got, ok := n(new(machine), args)
		if !ok {
			return
		}
		var want *ast.Term
		bctx := topdown.BuiltinContext{Metrics: metrics.NoOp()}
		err := topdown.GetBuiltin(name)(bctx, terms, func(v *ast.Term) error {
			want = v
			return nil
		})
		if err != nil || want == nil || want.String() != got.String() {
			t.Errorf("%s(%v): got %v, want %v, %v", name, terms, got, want, err)
		}
	})
}

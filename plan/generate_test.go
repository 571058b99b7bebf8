package plan

import (
	"fmt"
	"strings"
)

// generator makes a policy, its data and inputs out of bytes, each of which is a
// choice. Where they end, the first choice is taken, which is always a short one.
//
// Rules call only rules after them, so that there is no recursion, and variables
// are used only where they are bound, so that most policies compile.
type generator struct {
	choices []byte
	vars    []string // bound where the generator is
	names   int      // of variables made
	rule    int      // the rule that is made
	rules   []ruleShape
	depth   int

	withData bool // whether "with" may replace data
}

// ruleShape is what others need to know of a rule.
type ruleShape struct {
	name string
	pkg  string
	kind int
	args int
}

const (
	complete = iota
	partialSet
	partialObject
	nestedObject
	nestedSet
	funcRule
	ruleKinds
)

func (g *generator) pick(n int) int {
	if len(g.choices) == 0 {
		return 0
	}
	c := int(g.choices[0])
	g.choices = g.choices[1:]
	return c % n
}

// one picks one of several ways to go on, none of which is run but that one.
func one[T any](g *generator, ways ...func() T) T { return ways[g.pick(len(ways))]() }

func (g *generator) word(words ...string) string { return words[g.pick(len(words))] }

func (g *generator) scalar() string {
	return g.word("1", `"a"`, "true", "0", "2", `"b"`, `"c"`, "false", "null", `"1"`, `"ab"`, "1.5", `"0"`, "-1")
}

// value makes a value without variables.
func (g *generator) value(depth int) string {
	if depth == 0 {
		return g.scalar()
	}
	switch g.pick(6) {
	case 1:
		return "[" + g.list(3, func() string { return g.value(depth - 1) }) + "]"
	case 2, 3:
		return "{" + g.list(3, func() string { return g.word(`"a"`, `"b"`, `"c"`, `"1"`) + ": " + g.value(depth-1) }) + "}"
	case 4:
		return "[" + g.list(4, g.scalar) + "]"
	}
	return g.scalar()
}

func (g *generator) list(most int, item func() string) string {
	var items []string
	for range g.pick(most + 1) {
		items = append(items, item())
	}
	return strings.Join(items, ", ")
}

// document makes data or an input: an object with some members that the policy
// asks for.
func (g *generator) document() string {
	var members []string
	for _, name := range []string{"a", "b", "o", "n", "arr"} {
		switch {
		case g.pick(5) == 4:
			continue
		case name == "o":
			members = append(members, fmt.Sprintf(`"o": {"a": %s, "b": %s, "c": {"a": %s}}`, g.value(1), g.value(2), g.value(1)))
		case name == "n":
			members = append(members, fmt.Sprintf(`"n": {"1": %s, "0": %s}`, g.value(1), g.value(1)))
		case name == "arr":
			members = append(members, fmt.Sprintf(`"arr": [%s, %s, %s]`, g.value(1), g.value(2), g.scalar()))
		default:
			members = append(members, fmt.Sprintf(`"%s": %s`, name, g.value(2)))
		}
	}
	if g.pick(2) == 1 {
		members = append(members, `"list": [`+g.list(6, func() string {
			return one(g, g.record, g.record, func() string { return g.value(1) })
		})+`]`)
	}
	if g.pick(4) == 1 {
		members = append(members, `"dyn": {"base": `+g.value(2)+`}`)
	}
	return "{" + strings.Join(members, ", ") + "}"
}

// record makes an element for which a policy may search.
func (g *generator) record() string {
	return fmt.Sprintf(`{"a": %s, "b": %s, "1": %s}`, g.word("1", "1.0", `"a"`, "[1, 2]", `["a", "b"]`, "true", "1e0", `{"b": "a"}`),
		g.word(`"a"`, `"b"`, "2", `["a"]`, "-0", "0"), g.scalar())
}

func (g *generator) fresh() string {
	g.names++
	return fmt.Sprintf("x%d", g.names)
}

func (g *generator) bound() string {
	if len(g.vars) == 0 {
		return g.scalar()
	}
	return g.vars[g.pick(len(g.vars))]
}

// scoped runs f and forgets the variables that it has bound.
func (g *generator) scoped(f func() string) string {
	n := len(g.vars)
	defer func() { g.vars = g.vars[:n] }()
	return f()
}

// callee picks a rule after the one that is made, or nil.
func (g *generator) callee(want func(ruleShape) bool) *ruleShape {
	var fit []int
	for i := g.rule + 1; i < len(g.rules); i++ {
		if want(g.rules[i]) {
			fit = append(fit, i)
		}
	}
	if len(fit) == 0 {
		return nil
	}
	return &g.rules[fit[g.pick(len(fit))]]
}

func isValue(r ruleShape) bool { return r.kind != funcRule }
func isFunc(r ruleShape) bool  { return r.kind == funcRule }

// ref makes a reference without free variables.
func (g *generator) ref() string {
	base := one(g,
		func() string { return "input." + g.word("a", "b", "o", "n", "arr") },
		func() string { return "data." + g.word("a", "b", "o", "n", "arr") },
		func() string {
			if r := g.callee(isValue); r != nil {
				return "data." + r.pkg + "." + r.name
			}
			return "input"
		},
		func() string {
			if r := g.callee(isValue); r != nil {
				return "data." + r.pkg + "." + r.name
			}
			return "data.o"
		},
	)
	for g.pick(3) == 1 {
		base += g.key()
	}
	return base
}

func (g *generator) key() string {
	switch g.pick(5) {
	case 1:
		return "[" + g.bound() + "]"
	case 2:
		return "[" + g.word("0", "1", "2") + "]"
	case 3:
		return `["1"]`
	}
	return "." + g.word("a", "b", "c")
}

// term makes a term of bound variables alone.
func (g *generator) term() string {
	if g.depth > 4 {
		return g.scalar()
	}
	g.depth++
	defer func() { g.depth-- }()
	return one(g,
		g.scalar, g.bound, g.ref, g.ref, g.bound, g.call,
		func() string { return "[" + g.list(3, g.term) + "]" },
		func() string {
			return "{" + g.list(2, func() string { return g.word(`"a"`, `"b"`, g.bound()) + ": " + g.term() }) + "}"
		},
		func() string {
			if s := g.list(3, g.term); s != "" {
				return "{" + s + "}"
			}
			return "set()"
		},
		g.comprehension,
	)
}

// collection makes a term that may have elements.
func (g *generator) collection() string {
	return one(g, g.opaque, g.opaque, g.comprehension,
		func() string { return "[" + g.term() + ", " + g.term() + "]" },
		func() string { return "{" + g.term() + ", " + g.term() + "}" },
		func() string { return `{"a": ` + g.term() + `, "b": ` + g.term() + "}" },
	)
}

// opaque makes a term whose form is not known.
func (g *generator) opaque() string {
	if len(g.vars) > 0 && g.pick(2) == 1 {
		return g.bound()
	}
	return g.ref()
}

func (g *generator) comprehension() string {
	return g.scoped(func() string {
		body := g.body(1+g.pick(2), "; ")
		switch g.pick(3) {
		case 1:
			return "{" + g.term() + " | " + body + "}"
		case 2:
			return "{" + g.bound() + ": " + g.term() + " | " + body + "}"
		}
		return "[" + g.term() + " | " + body + "]"
	})
}

// call makes the call of a function or builtin that gives a value.
func (g *generator) call() string {
	switch g.pick(14) {
	case 1:
		return "count(" + g.opaque() + ")"
	case 2:
		return "concat(\",\", " + g.opaque() + ")"
	case 3:
		return "to_number(" + g.opaque() + ")"
	case 4:
		return "object.get(" + g.opaque() + ", " + g.scalar() + ", " + g.scalar() + ")"
	case 5:
		return "array.concat(" + g.opaque() + ", " + g.opaque() + ")"
	case 6:
		return "(" + g.opaque() + " " + g.word("+", "-", "*", "/", "%") + " " + g.opaque() + ")"
	case 7:
		return "sprintf(\"%v\", [" + g.opaque() + "])"
	case 8:
		return "object.keys(" + g.opaque() + ")"
	case 9:
		return "(" + g.opaque() + " " + g.word("&", "|", "-") + " " + g.opaque() + ")"
	case 10:
		return "sum(" + g.opaque() + ")"
	case 11:
		return "object.union(" + g.opaque() + ", " + g.opaque() + ")"
	}
	if f := g.callee(isFunc); f != nil {
		args := make([]string, f.args)
		for i := range args {
			args[i] = g.term()
		}
		return "data." + f.pkg + "." + f.name + "(" + strings.Join(args, ", ") + ")"
	}
	return "count(" + g.opaque() + ")"
}

func (g *generator) body(n int, sep string) string {
	var exprs []string
	for range n {
		exprs = append(exprs, g.expr())
	}
	return strings.Join(exprs, sep)
}

// bind makes an expression that binds a variable.
func (g *generator) bind(make func(name string) string) string {
	name := g.fresh()
	s := make(name)
	g.vars = append(g.vars, name)
	return s + "; " + name + ` != "zz"` // that is never unused
}

func (g *generator) expr() string {
	if g.depth > 3 {
		return "true"
	}
	g.depth++
	defer func() { g.depth-- }()
	switch g.pick(26) {
	case 24, 25:
		return g.guarded()
	case 0:
		return g.ref()
	case 1, 2:
		return g.bind(func(x string) string { return "some " + x + " in " + g.collection() })
	case 3:
		k := g.fresh()
		s := g.bind(func(v string) string { return "some " + k + ", " + v + " in " + g.ref() })
		g.vars = append(g.vars, k)
		return s + "; " + k + ` != "zz"`
	case 4, 5:
		return g.bind(func(x string) string { return x + " := " + g.term() })
	case 6, 7:
		return g.term() + " " + g.word("==", "!=", "<", ">=", "in") + " " + g.opaque()
	case 8, 9:
		return g.scoped(func() string { return "not " + g.plain() })
	case 10:
		return g.scoped(func() string {
			domain := g.term()
			x := g.fresh()
			g.vars = append(g.vars, x)
			return "every " + x + " in " + domain + " { " + x + ` != "zz"; ` + g.body(1+g.pick(2), "; ") + " }"
		})
	case 11:
		return g.bind(func(x string) string { return "[" + x + ", " + g.scalar() + "] = " + g.opaque() })
	case 12:
		return g.bind(func(x string) string { return `{"a": ` + x + "} = " + g.opaque() })
	case 13, 14, 15:
		return g.plain() + g.with()
	case 16:
		return g.bind(func(x string) string { return g.ref() + "[" + x + "]" })
	case 17:
		return g.ref() + "[_]" + g.word("", ".a", "[_]")
	case 18:
		p := g.fresh()
		s := g.bind(func(v string) string { return "walk(" + g.term() + ", [" + p + ", " + v + "])" })
		g.vars = append(g.vars, p)
		return s
	case 19:
		return g.bind(func(x string) string { return x + " := " + g.ref() + "[_]" })
	case 20:
		// A rule by a name that is computed.
		return g.bind(func(x string) string { return x + " := data.dyn[" + g.bound() + "]" + g.word("", ".a", "[0]", "[_]") })
	case 21:
		return g.bind(func(x string) string { return "some " + x + ` in {"no", "set", "yes", "obj", "maybe", "base", "fn"}` })
	case 22:
		return "not data.dyn[" + g.bound() + "]" + g.word("", ".a", "[0]")
	}
	return g.word("true", "false", "1 == 1", "input", g.bound())
}

// guarded makes a search in data for elements that have something that is known.
func (g *generator) guarded() string {
	base := "data." + g.word("list", "a", "arr", "o", "b", "list", "n")
	value := one(g, g.bound, g.ref, g.scalar, g.bound, func() string { return "input." + g.word("a", "b") })
	part := g.word(".a", "", ".b", "[0]", ".a.b", "[_]", ".a[_]", `["1"]`)
	return g.bind(func(x string) string {
		switch g.pick(5) {
		case 1:
			return "some " + x + " in " + base + "; " + value + " == " + x + part
		case 2:
			return base + "[" + x + "]" + part + " == " + value
		case 3:
			return "some " + x + " in " + base + "; " + value + " in " + x + g.word("", ".a", ".b")
		case 4:
			return "some " + x + " in " + base + "; " + x + g.word(".a", ".b") + " == " + value + "; " + x + part + " == " + g.bound()
		}
		return "some " + x + " in " + base + "; " + x + part + " == " + value
	})
}

// plain makes an expression that binds nothing.
func (g *generator) plain() string {
	return one(g, g.ref, g.call, g.ref,
		func() string { return g.opaque() + " == " + g.term() },
		func() string { return g.term() + " in " + g.opaque() },
		func() string { return "startswith(" + g.opaque() + ", \"a\")" },
		g.bound,
	)
}

func (g *generator) with() string {
	s := ""
	for range 1 + g.pick(2) {
		switch g.pick(8) {
		case 0:
			s += " with input as " + g.term()
		case 1, 2:
			s += " with input." + g.word("a", "b", "o", "o.a", "o.c.a") + " as " + g.term()
		case 3:
			if !g.withData {
				continue // a Program refuses it where keys of data are computed
			}
			s += " with data." + g.word("a", "b", "o", "o.a", "o.c.a") + " as " + g.term()
		case 4, 5:
			if r := g.callee(isValue); r != nil && g.withData {
				s += " with data." + r.pkg + "." + r.name + " as " + g.term()
			}
		case 6:
			s += " with count as " + g.scalar()
		case 7:
			if f := g.callee(isFunc); f != nil {
				s += " with data." + f.pkg + "." + f.name + " as " + g.scalar()
			}
		}
	}
	return s
}

// head makes the head of a rule once its body is made, of what that has bound.
func (g *generator) head(r ruleShape, args []string) string {
	switch r.kind {
	case partialSet:
		return r.name + " contains " + g.term()
	case partialObject:
		return r.name + "[" + g.headKey() + "] := " + g.term()
	case nestedObject:
		return one(g,
			func() string { return r.name + "[" + g.headKey() + "][" + g.headKey() + "] := " + g.term() },
			func() string { return r.name + ".a[" + g.headKey() + "] := " + g.term() },
			func() string { return r.name + "[" + g.headKey() + "].b := " + g.term() },
			func() string { return r.name + ".a.c := " + g.term() },
		)
	case nestedSet:
		return r.name + "[" + g.headKey() + "] contains " + g.term()
	case funcRule:
		return r.name + "(" + strings.Join(args, ", ") + ") := " + g.word(g.term(), "true", "1")
	}
	return r.name + " := " + g.word(g.term(), "true", "false", "1")
}

// headKey makes a part of the name of a rule: a constant must be a string.
func (g *generator) headKey() string {
	if len(g.vars) == 0 || g.pick(8) == 7 {
		return g.word(`"a"`, `"b"`)
	}
	return g.bound()
}

// args makes the parameters of a function: variables, or patterns.
func (g *generator) args(n int) []string {
	var out []string
	for range n {
		switch g.pick(6) {
		case 4:
			out = append(out, g.scalar())
		case 5:
			x := g.fresh()
			g.vars = append(g.vars, x)
			out = append(out, "["+x+", "+g.scalar()+"]")
		default:
			x := g.fresh()
			g.vars = append(g.vars, x)
			out = append(out, x)
		}
	}
	return out
}

// policyCase is what a generator makes.
type policyCase struct {
	modules map[string]string
	data    string
	inputs  []string
	queries []string
}

// dynamicRules are those that others call by names that are computed. They call
// none, so that there is no recursion.
const dynamicRules = `package dyn

no := false

yes := true

set contains input.a

set contains "a"

obj := {"a": false, "b": input.o}

obj2[k] := v if some k, v in input.o

maybe := input.b

fn(x) := x
`

func generate(choices []byte) policyCase {
	g := &generator{choices: choices}
	g.withData = g.pick(4) == 1
	for i := range 3 + g.pick(4) {
		r := ruleShape{name: fmt.Sprintf("r%d", i), pkg: g.word("t", "t", "lib"), kind: g.pick(ruleKinds)}
		if r.kind == funcRule {
			r.args = 1 + g.pick(2)
		}
		g.rules = append(g.rules, r)
	}
	text := map[string]*strings.Builder{"t": {}, "lib": {}}
	for pkg, b := range text {
		b.WriteString("package " + pkg + "\n\ns := \"a\"\n")
	}
	text["dyn"] = new(strings.Builder)
	text["dyn"].WriteString(dynamicRules)
	for i, r := range g.rules {
		g.rule = i
		b := text[r.pkg]
		for range 1 + g.pick(3) {
			g.vars = nil
			var args []string
			if r.kind == funcRule {
				args = g.args(r.args)
			}
			body := g.body(1+g.pick(4), "\n\t")
			fmt.Fprintf(b, "\n%s if {\n\t%s\n}", g.head(r, args), body)
			if (r.kind == complete || r.kind == funcRule) && g.pick(3) == 1 {
				g.vars = g.vars[:0]
				for _, a := range args {
					if strings.HasPrefix(a, "x") {
						g.vars = append(g.vars, a)
					}
				}
				body := g.body(1+g.pick(2), "\n\t")
				fmt.Fprintf(b, " else := %s if {\n\t%s\n}", g.term(), body)
			}
			b.WriteString("\n")
		}
		if r.kind == complete && g.pick(3) == 1 {
			fmt.Fprintf(b, "\ndefault %s := %s\n", r.name, g.scalar())
		}
	}
	c := policyCase{modules: map[string]string{}, data: g.document()}
	for pkg, b := range text {
		c.modules[pkg+".rego"] = b.String()
	}
	for range 3 {
		c.inputs = append(c.inputs, g.document())
	}
	for _, r := range g.rules {
		if r.kind != funcRule {
			c.queries = append(c.queries, "data."+r.pkg+"."+r.name+" = result")
		}
	}
	c.queries = append(c.queries, "data.t = result", "data = result")
	return c
}

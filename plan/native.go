package plan

import (
	"strconv"
	"strings"

	"github.com/gobwas/glob"
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"

	"github.com/gatehouse-authz/gatehouse/document"
)

// native is a builtin without the registry's context, errors and callbacks. It
// reports false where it does not know the result: the registry's is asked then,
// as for all that is not a plain success.
type native func(m *machine, args []operand) (*ast.Term, bool)

// natives are the builtins that policies use at each decision.
var natives = map[string]native{ // :: name → its native form
	ast.Equal.Name: func(m *machine, a []operand) (*ast.Term, bool) { return truth(equal(a[0].load(m), a[1].load(m))), true },
	ast.NotEqual.Name: func(m *machine, a []operand) (*ast.Term, bool) {
		return truth(!equal(a[0].load(m), a[1].load(m))), true
	},
	ast.LessThan.Name:      func(m *machine, a []operand) (*ast.Term, bool) { return truth(order(m, a) < 0), true },
	ast.LessThanEq.Name:    func(m *machine, a []operand) (*ast.Term, bool) { return truth(order(m, a) <= 0), true },
	ast.GreaterThan.Name:   func(m *machine, a []operand) (*ast.Term, bool) { return truth(order(m, a) > 0), true },
	ast.GreaterThanEq.Name: func(m *machine, a []operand) (*ast.Term, bool) { return truth(order(m, a) >= 0), true },
	ast.Member.Name:        member,
	ast.StartsWith.Name:    onStrings(strings.HasPrefix),
	ast.EndsWith.Name:      onStrings(strings.HasSuffix),
	ast.Contains.Name:      onStrings(strings.Contains),
	ast.Count.Name:         elements,
	ast.ObjectGet.Name:     objectGet,
	ast.Concat.Name:        concat,
	ast.ArrayConcat.Name:   arrayConcat,
	ast.Plus.Name:          arithmetic(func(a, b int64) int64 { return a + b }),
	ast.Minus.Name:         arithmetic(func(a, b int64) int64 { return a - b }),
	ast.Multiply.Name:      arithmetic(func(a, b int64) int64 { return a * b }),
}

// builders are the builtins whose native form gives values that were not there.
var builders = map[string]bool{
	ast.Concat.Name: true, ast.ArrayConcat.Name: true, ast.JWTDecode.Name: true, ast.JWTDecodeVerify.Name: true,
}

func truth(b bool) *ast.Term {
	if b {
		return termTrue
	}
	return termFalse
}

func order(m *machine, a []operand) int { return ast.Compare(a[0].load(m).Value, a[1].load(m).Value) }

// onStrings makes the native form of a test of two strings.
func onStrings(test func(string, string) bool) native {
	return func(m *machine, a []operand) (*ast.Term, bool) {
		s, ok := a[0].load(m).Value.(ast.String)
		if !ok {
			return nil, false
		}
		t, ok := a[1].load(m).Value.(ast.String)
		if !ok {
			return nil, false
		}
		return truth(test(string(s), string(t))), true
	}
}

func member(m *machine, a []operand) (*ast.Term, bool) {
	x := a[0].load(m)
	switch c := a[1].load(m).Value.(type) {
	case *document.Value:
		for _, e := range c.All() {
			if e.Equal(x.Value) {
				return termTrue, true
			}
		}
		return termFalse, true
	case ast.Set:
		return truth(c.Contains(x)), true
	case *ast.Array:
		for i := range c.Len() {
			if equal(x, c.Elem(i)) {
				return termTrue, true
			}
		}
		return termFalse, true
	}
	return nil, false
}

func elements(m *machine, a []operand) (*ast.Term, bool) {
	t := a[0].load(m)
	switch t.Value.(type) {
	case *ast.Array, ast.Object, ast.Set, *document.Value:
		return ast.InternedTerm(length(t)), true
	}
	return nil, false
}

func objectGet(m *machine, a []operand) (*ast.Term, bool) {
	if v, ok := a[0].load(m).Value.(*document.Value); ok {
		return dataGet(*v, a[1].load(m), a[2].load(m))
	}
	obj, ok := a[0].load(m).Value.(ast.Object)
	if !ok {
		return nil, false
	}
	key := a[1].load(m)
	if _, ok := key.Value.(*ast.Array); ok {
		return nil, false
	}
	if v := obj.Get(key); v != nil {
		return v, true
	}
	return a[2].load(m), true
}

// dataGet is object.get of an object of the data.
func dataGet(v document.Value, key, other *ast.Term) (*ast.Term, bool) {
	if v.Kind() != document.Object {
		return nil, false
	}
	path, ok := key.Value.(*ast.Array)
	if !ok {
		v = byValue.in(v, key)
	} else {
		for i := range path.Len() {
			v = byValue.in(v, path.Elem(i))
		}
	}
	if !v.Defined() {
		return other, true
	}
	return v.Term(), true
}

// maxConcat is the longest string that is joined here, in bytes. The registry's
// form looks at the cancellation while it works.
const maxConcat = 1 << 12

func concat(m *machine, a []operand) (*ast.Term, bool) {
	sep, ok := a[0].load(m).Value.(ast.String)
	if !ok {
		return nil, false
	}
	list := a[1].load(m).Value
	var parts []*ast.Term
	n := 0
	switch l := list.(type) {
	case *ast.Array:
		n = l.Len()
	case ast.Set:
		parts = l.Slice()
		n = len(parts)
	}
	if n < 2 {
		return nil, false
	}
	at := func(i int) *ast.Term {
		if parts != nil {
			return parts[i]
		}
		return list.(*ast.Array).Elem(i)
	}
	size := len(sep) * (n - 1)
	for i := range n {
		s, ok := at(i).Value.(ast.String)
		if !ok {
			return nil, false
		}
		if size += len(s); size > maxConcat {
			return nil, false
		}
	}
	var b strings.Builder
	b.Grow(size)
	for i := range n {
		if i > 0 {
			b.WriteString(string(sep))
		}
		b.WriteString(string(at(i).Value.(ast.String)))
	}
	return ast.NewTerm(ast.String(b.String())), true
}

func arrayConcat(m *machine, a []operand) (*ast.Term, bool) {
	x, ok := a[0].load(m).Value.(*ast.Array)
	if !ok {
		return nil, false
	}
	y, ok := a[1].load(m).Value.(*ast.Array)
	if !ok {
		return nil, false
	}
	if x.Len() == 0 {
		return a[1].load(m), true
	}
	if y.Len() == 0 {
		return a[0].load(m), true
	}
	terms := make([]*ast.Term, 0, x.Len()+y.Len())
	for i := range x.Len() {
		terms = append(terms, x.Elem(i))
	}
	for i := range y.Len() {
		terms = append(terms, y.Elem(i))
	}
	return ast.ArrayTerm(terms...), true
}

// maxInt is the greatest integer, and the least but for its sign, that is reckoned
// with here: two of them multiplied are an int64.
const maxInt = 1 << 30

func arithmetic(op func(a, b int64) int64) native {
	return func(m *machine, a []operand) (*ast.Term, bool) {
		x, ok := small(a[0].load(m))
		if !ok {
			return nil, false
		}
		y, ok := small(a[1].load(m))
		if !ok {
			return nil, false
		}
		return ast.InternedTerm(int(op(x, y))), true
	}
}

// small returns a number that is an integer, written as one, and not too great.
func small(t *ast.Term) (int64, bool) {
	n, ok := t.Value.(ast.Number)
	if !ok {
		return 0, false
	}
	i, err := strconv.ParseInt(string(n), 10, 64)
	return i, err == nil && i <= maxInt && i >= -maxInt
}

// Bounds of the patterns that a Program remembers: for each set of delimiters, and of
// regex.match. When there are as many the rest are left to the registry and what it
// remembers.
const (
	maxPatterns = 1024
	maxPattern  = 256 // bytes
)

// patterns are compiled patterns with the same delimiters.
type patterns struct {
	remembered[*glob.Pattern]
	delimiters []rune
}

func (p *patterns) compile(pattern string) (*glob.Pattern, error) {
	return glob.Compile(pattern, p.delimiters...)
}

// globMatch returns the native form of glob.match for delimiters that are known,
// or nil.
func globMatch(delimiters *ast.Term, all map[string]*patterns) native {
	if delimiters == nil {
		return nil
	}
	var set []rune
	switch v := delimiters.Value.(type) {
	case ast.Null:
	case *ast.Array:
		runes, err := builtins.RuneSliceOperand(v, 2)
		if err != nil {
			return nil
		}
		if set = runes; len(set) == 0 {
			set = []rune{'.'}
		}
	default:
		return nil
	}
	p := all[string(set)]
	if p == nil {
		p = &patterns{delimiters: set}
		all[string(set)] = p
	}
	return func(m *machine, a []operand) (*ast.Term, bool) {
		pattern, ok := a[0].load(m).Value.(ast.String)
		if !ok {
			return nil, false
		}
		s, ok := a[2].load(m).Value.(ast.String)
		if !ok {
			return nil, false
		}
		g, ok := p.get(string(pattern), p.compile)
		if !ok {
			return nil, false
		}
		return truth(g.Match(string(s))), true
	}
}

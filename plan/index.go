package plan

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
)

// index says which blocks of a function can have an effect, by the value of one
// part of the input that many of its rules compare with a constant. A rule that
// compares it with another is not run: before that comparison it would do nothing
// that can be seen.
type index struct {
	path   *inputPath
	always []int            // blocks that are run whatever the value is
	some   map[string][]int // :: value → blocks that are run beside those
}

// An index pays where rules compare the same part with so many constants, or where
// so many rules compare it with at least two.
const (
	minIndexed      = 4
	minIndexedRules = 16
)

// indexOf returns the index of a function, or nil.
func (c *compiler) indexOf(f *ir.Func) *index {
	guards := make([][]guard, len(f.Blocks))
	values := map[string]map[string]bool{} // :: part of the input → constants it is compared with
	rules := map[string]int{}              // :: part of the input → comparisons with it
	for i, b := range f.Blocks {
		guards[i] = c.guardsOf(b)
		for _, g := range guards[i] {
			if values[g.name()] == nil {
				values[g.name()] = map[string]bool{}
			}
			values[g.name()][g.value] = true
			rules[g.name()]++
		}
	}
	best := ""
	for name, v := range values {
		if len(v) > len(values[best]) || len(v) == len(values[best]) && name < best {
			best = name
		}
	}
	if n := len(values[best]); n < minIndexed && (n < 2 || rules[best] < minIndexedRules) {
		return nil
	}
	x := &index{some: map[string][]int{}}
	for i := 0; i < len(f.Blocks); i++ {
		at := slices.IndexFunc(guards[i], func(g guard) bool { return g.name() == best })
		if at < 0 {
			x.always = append(x.always, i)
			continue
		}
		g := guards[i][at]
		keys := make([]operand, 0, len(g.path))
		for _, t := range g.path {
			keys = append(keys, operand{term: t})
		}
		x.path = c.inputPath(keys)
		x.some[g.value] = append(x.some[g.value], i)
		if i+1 < len(f.Blocks) && endsRule(f.Blocks[i+1]) {
			i++ // it looks at what the rule has given
			x.some[g.value] = append(x.some[g.value], i)
		}
	}
	return x
}

// endsRule reports whether a block is the end of the rule before it: it asks
// first whether that has given a value.
func endsRule(b *ir.Block) bool {
	if len(b.Stmts) == 0 {
		return false
	}
	_, ok := b.Stmts[0].(*ir.IsDefinedStmt)
	return ok
}

// guard is a comparison of a part of the input with a string.
type guard struct {
	path  []*ast.Term
	value string
}

func (g guard) name() string {
	name := ""
	for _, t := range g.path {
		name += "\x00" + string(t.Value.(ast.String))
	}
	return name
}

// guardsOf returns the comparisons that a rule begins with: those before which it
// only looks at things.
func (c *compiler) guardsOf(b *ir.Block) (guards []guard) {
	paths := map[ir.Local][]*ast.Term{ir.Input: {}}
	str := func(op ir.Operand) *ast.Term {
		if i, ok := op.Value.(ir.StringIndex); ok {
			return c.strings[i]
		}
		return nil
	}
	for n, s := range b.Stmts {
		switch s := s.(type) {
		case *ir.ResetLocalStmt:
			if n > 0 {
				return guards
			}
		case *ir.NopStmt, *ir.MakeNullStmt, *ir.MakeNumberIntStmt, *ir.MakeNumberRefStmt:
		case *ir.DotStmt:
			if s.Target == ir.Input || s.Target == ir.Data {
				return guards
			}
			delete(paths, s.Target)
			l, isLocal := s.Source.Value.(ir.Local)
			if path, ok := paths[l]; ok && isLocal {
				if k := str(s.Key); k != nil {
					paths[s.Target] = append(slices.Clone(path), k)
				}
			}
		case *ir.AssignVarStmt:
			delete(paths, s.Target)
			if l, ok := s.Source.Value.(ir.Local); ok && len(paths[l]) > 0 {
				paths[s.Target] = paths[l]
			}
		case *ir.NotEqualStmt, *ir.IsDefinedStmt:
			if n == 0 {
				return guards
			}
		case *ir.EqualStmt:
			a, b := s.A, s.B
			if str(a) != nil {
				a, b = b, a
			}
			l, ok := a.Value.(ir.Local)
			if k := str(b); k != nil && ok && len(paths[l]) > 0 {
				guards = append(guards, guard{paths[l], string(k.Value.(ast.String))})
			}
		default:
			return guards
		}
	}
	return guards
}

// indexed runs those blocks of a function that its index says, in their order.
func (m *machine) indexed(f *function) *ast.Term {
	x := f.rules
	some := x.some[""][:0:0]
	if v := m.inputAt(x.path); v != nil {
		if s, ok := v.Value.(ast.String); ok {
			some = x.some[string(s)]
		}
	}
	always := x.always
	for len(always) > 0 || len(some) > 0 {
		var next int
		if len(some) == 0 || len(always) > 0 && always[0] < some[0] {
			next, always = always[0], always[1:]
		} else {
			next, some = some[0], some[1:]
		}
		switch sig := runBlock(m, f.blocks[next]); sig {
		case sigReturn:
			return m.output
		case sigDone:
			return f.early
		case sigError:
			return nil
		}
	}
	return nil
}

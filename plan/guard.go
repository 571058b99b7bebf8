package plan

import (
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
)

// scanGuard is something that an element of a scan must have for the block of the
// scan to have any effect: at a path into the element, a value that is the same
// for all elements.
type scanGuard struct {
	path  []pathStep
	value func(*machine) *ast.Term // nil where it is undefined
	fixed bool                     // value is a constant of the policy
}

// pathStep is one key of a path into an element.
type pathStep struct {
	key *ast.Term // nil: any
	by  getter
}

// nameOf tells paths apart.
func nameOf(path []pathStep) string {
	var b strings.Builder
	for _, s := range path {
		if s.key == nil {
			b.WriteString("*")
		} else {
			b.WriteString(strconv.Quote(s.key.String()))
		}
		b.WriteString(strconv.FormatBool(bool(s.by)))
	}
	return b.String()
}

// sym is what is known of a local while an element is looked at.
type sym struct {
	element bool       // it is what the element has at path
	path    []pathStep // of the element
	load    func(*machine) *ast.Term
	fixed   bool
	derived bool // as unit.derived
}

// search follows the statements that a scan's block begins with, as long as they
// only look at things.
type search struct {
	c      *compiler
	writes map[ir.Local]bool // what the block of the scan changes, anywhere
	syms   map[ir.Local]*sym // nil: nothing is known
	passed []ir.Local        // what has been written
	before int               // of that, how many before the last guard
	guards []scanGuard
}

// maxGuards is how many guards of a scan are used, the first ones.
const maxGuards = 2

// scanGuards returns the guards of a scan, if elements without them can be passed
// over: nobody must ever look at what the statements before a guard have written
// for such an element.
func (c *compiler) scanGuards(s *ir.ScanStmt) []scanGuard {
	sc := &search{c: c, writes: map[ir.Local]bool{}, syms: map[ir.Local]*sym{}}
	inside := facts{reads: map[ir.Local]int{}, writes: map[ir.Local]int{}, mutates: map[ir.Local]int{}, asks: map[ir.Local]int{}}
	count := func(s ir.Stmt) {
		e := effectsOf(s)
		for _, l := range e.reads {
			inside.reads[l]++
		}
		for _, l := range e.asks {
			inside.asks[l]++
		}
		for _, l := range append(e.writes, e.mutates...) {
			inside.writes[l]++
			sc.writes[l] = true
		}
	}
	for _, l := range []ir.Local{s.Key, s.Value} {
		inside.writes[l]++
		sc.writes[l] = true
		sc.passed = append(sc.passed, l)
		sc.syms[l] = nil
	}
	walk(s.Block, count)
	sc.syms[s.Value] = &sym{element: true, derived: c.unit.derived[s.Source]}
	sc.block(s.Block.Stmts)

	for _, l := range sc.passed[:sc.before] {
		_, shared := c.unit.shared[l]
		if shared || c.unit.reads[l] != inside.reads[l] || c.unit.asks[l] != inside.asks[l] ||
			c.unit.writes[l]+c.unit.mutates[l] != inside.writes[l] {
			return nil
		}
	}
	slices.SortStableFunc(sc.guards, func(a, b scanGuard) int {
		switch {
		case a.fixed == b.fixed:
			return 0
		case a.fixed:
			return 1
		}
		return -1
	})
	if len(sc.guards) > 1 && !sc.guards[0].fixed {
		// A constant has mostly many elements.
		sc.guards = slices.DeleteFunc(sc.guards, func(g scanGuard) bool { return g.fixed })
	}
	return sc.guards[:min(len(sc.guards), maxGuards)]
}

func (sc *search) set(l ir.Local, s *sym) {
	sc.passed = append(sc.passed, l)
	sc.syms[l] = s
}

// of returns what is known of an operand, or nil.
func (sc *search) of(op ir.Operand) *sym {
	if t := sc.c.constant(op); t != nil {
		return &sym{load: func(*machine) *ast.Term { return t }, fixed: true}
	}
	l, ok := op.Value.(ir.Local)
	if !ok {
		return nil
	}
	if s, ok := sc.syms[l]; ok {
		return s
	}
	if sc.writes[l] {
		return nil
	}
	v := sc.c.local(l)
	return &sym{load: v.load, fixed: v.term != nil, derived: l == ir.Data || sc.c.unit.derived[l]}
}

func (sc *search) constant(l ir.Local, t *ast.Term) {
	sc.set(l, &sym{load: func(*machine) *ast.Term { return t }, fixed: true})
}

// block follows the statements of a block, until one may have an effect.
func (sc *search) block(list []ir.Stmt) {
	list = straightened(list)
	for i, s := range list {
		switch s := s.(type) {
		case *ir.NopStmt, *ir.NotEqualStmt, *ir.IsArrayStmt, *ir.IsObjectStmt, *ir.IsSetStmt:
		case *ir.MakeNullStmt:
			sc.constant(s.Target, termNull)
		case *ir.MakeNumberIntStmt:
			sc.constant(s.Target, ast.InternedTerm(int(s.Value)))
		case *ir.MakeNumberRefStmt:
			sc.constant(s.Target, sc.c.number(s.Index))
		case *ir.LenStmt:
			sc.set(s.Target, nil)
		case *ir.AssignVarStmt:
			if s.Source.Value == ir.Data {
				return
			}
			from := sc.of(s.Source)
			if from != nil {
				copied := *from
				copied.derived = false
				from = &copied
			}
			sc.set(s.Target, from)
		case *ir.DotStmt:
			sc.set(s.Target, sc.dot(s))
		case *ir.EqualStmt:
			sc.equal(sc.of(s.A), sc.of(s.B))
		case *ir.CallStmt:
			if s.Func != ast.Member.Name || sc.c.byName[s.Func] != nil || len(s.Args) != 2 {
				return
			}
			sc.set(s.Result, nil)
			if i+1 < len(list) && holds(list[i+1], s.Result) {
				in := sc.of(s.Args[1])
				if in != nil && in.element {
					sc.equal(sc.of(s.Args[0]), &sym{element: true, path: append(slices.Clone(in.path), pathStep{})})
				}
			}
		case *ir.ScanStmt:
			if i != len(list)-1 {
				return
			}
			sc.set(s.Key, nil)
			sc.set(s.Value, nil)
			if src := sc.of(ir.Operand{Value: s.Source}); src != nil && src.element {
				sc.syms[s.Value] = &sym{element: true, path: append(slices.Clone(src.path), pathStep{}), derived: src.derived}
			}
			sc.block(s.Block.Stmts)
			return
		default:
			return
		}
	}
}

// holds reports whether a statement is that what a test gave is not false.
func holds(s ir.Stmt, l ir.Local) bool {
	ne, ok := s.(*ir.NotEqualStmt)
	return ok && ne.A.Value == l && ne.B.Value == ir.Bool(false)
}

func (sc *search) dot(s *ir.DotStmt) *sym {
	src, key := sc.of(s.Source), sc.of(s.Key)
	if _, ok := s.Source.Value.(ir.Local); !ok || src == nil || key == nil || key.load == nil {
		return nil
	}
	if src.element {
		if k := sc.c.constant(s.Key); k != nil {
			return &sym{element: true, path: append(slices.Clone(src.path), pathStep{k, getter(src.derived)}), derived: src.derived}
		}
		if key.fixed {
			return &sym{element: true, path: append(slices.Clone(src.path), pathStep{key.load(nil), getter(src.derived)}), derived: src.derived}
		}
		return nil
	}
	if s.Source.Value == ir.Input && key.fixed {
		path := sc.c.inputPath([]operand{{term: key.load(nil)}})
		return &sym{load: func(m *machine) *ast.Term { return m.inputAt(path) }}
	}
	from, k, by, held := src.load, key.load, getter(src.derived), sc.c.held
	return &sym{
		load: func(m *machine) *ast.Term {
			v, key := from(m), k(m)
			if v == nil || key == nil {
				return nil
			}
			return placeOf(v).at(by, key).term(held)
		},
		derived: src.derived,
	}
}

// equal takes note that two values must be equal.
func (sc *search) equal(a, b *sym) {
	if a == nil || b == nil || a.element == b.element {
		return
	}
	if b.element {
		a, b = b, a
	}
	sc.guards = append(sc.guards, scanGuard{a.path, b.load, b.fixed})
	sc.before = len(sc.passed)
}

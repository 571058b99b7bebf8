package plan

import (
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
)

// effects are the locals that a statement itself, without its blocks, looks at.
type effects struct {
	reads   []ir.Local
	writes  []ir.Local
	mutates []ir.Local // whose value it changes
	asks    []ir.Local // of which it reads whether they are defined
}

func effectsOf(s ir.Stmt) (e effects) {
	read := func(ops ...ir.Operand) {
		for _, op := range ops {
			if l, ok := op.Value.(ir.Local); ok {
				e.reads = append(e.reads, l)
			}
		}
	}
	write := func(l ir.Local) { e.writes = append(e.writes, l) }
	switch s := s.(type) {
	case *ir.ReturnLocalStmt:
		e.reads = append(e.reads, s.Source)
	case *ir.CallStmt:
		read(s.Args...)
		write(s.Result)
	case *ir.CallDynamicStmt:
		e.reads = append(e.reads, s.Args...)
		read(s.Path...)
		write(s.Result)
	case *ir.DotStmt:
		read(s.Source, s.Key)
		write(s.Target)
	case *ir.LenStmt:
		read(s.Source)
		write(s.Target)
	case *ir.ScanStmt:
		e.reads = append(e.reads, s.Source)
		write(s.Key)
		write(s.Value)
	case *ir.AssignIntStmt:
		write(s.Target)
	case *ir.AssignVarStmt:
		read(s.Source)
		write(s.Target)
	case *ir.AssignVarOnceStmt:
		read(s.Source)
		e.asks = append(e.asks, s.Target)
		write(s.Target)
	case *ir.ResetLocalStmt:
		write(s.Target)
	case *ir.MakeNullStmt:
		write(s.Target)
	case *ir.MakeNumberIntStmt:
		write(s.Target)
	case *ir.MakeNumberRefStmt:
		write(s.Target)
	case *ir.MakeArrayStmt:
		write(s.Target)
	case *ir.MakeObjectStmt:
		write(s.Target)
	case *ir.MakeSetStmt:
		write(s.Target)
	case *ir.EqualStmt:
		read(s.A, s.B)
	case *ir.NotEqualStmt:
		read(s.A, s.B)
	case *ir.IsArrayStmt:
		read(s.Source)
	case *ir.IsObjectStmt:
		read(s.Source)
	case *ir.IsSetStmt:
		read(s.Source)
	case *ir.IsDefinedStmt:
		e.reads = append(e.reads, s.Source)
		e.asks = append(e.asks, s.Source)
	case *ir.IsUndefinedStmt:
		e.reads = append(e.reads, s.Source)
		e.asks = append(e.asks, s.Source)
	case *ir.ArrayAppendStmt:
		read(s.Value)
		e.mutates = append(e.mutates, s.Array)
	case *ir.ObjectInsertStmt:
		read(s.Key, s.Value)
		e.mutates = append(e.mutates, s.Object)
	case *ir.ObjectInsertOnceStmt:
		read(s.Key, s.Value)
		e.mutates = append(e.mutates, s.Object)
	case *ir.ObjectMergeStmt:
		e.reads = append(e.reads, s.A, s.B)
		write(s.Target)
	case *ir.SetAddStmt:
		read(s.Value)
		e.mutates = append(e.mutates, s.Set)
	case *ir.WithStmt:
		read(s.Value)
		e.reads = append(e.reads, s.Local)
		e.asks = append(e.asks, s.Local)
		write(s.Local)
	case *ir.ResultSetAddStmt:
		e.reads = append(e.reads, s.Value)
	}
	return e
}

// blocksOf returns the blocks of a statement.
func blocksOf(s ir.Stmt) []*ir.Block {
	switch s := s.(type) {
	case *ir.BlockStmt:
		return s.Blocks
	case *ir.ScanStmt:
		return []*ir.Block{s.Block}
	case *ir.NotStmt:
		return []*ir.Block{s.Block}
	case *ir.WithStmt:
		return []*ir.Block{s.Block}
	}
	return nil
}

// walk calls f for each statement of a block and of the blocks in it, in the
// order in which they stand.
func walk(b *ir.Block, f func(ir.Stmt)) {
	for _, s := range b.Stmts {
		f(s)
		for _, inner := range blocksOf(s) {
			walk(inner, f)
		}
	}
}

// unit is a function or query that is compiled: what is known of its locals, and
// where they are in its frame.
//
// A local that is of one rule alone gets a place for as long as that rule is
// compiled, and none where no step needs it.
type unit struct {
	shared map[ir.Local]int // the places of those that are not of one rule alone
	own    map[ir.Local]int // the places of the rule's own
	high   int              // how many places a frame has
	facts

	nested int       // how deep the function changes what is in the object it makes
	early  *ast.Term // what each rule of the function gives
	result ir.Local  // the local in which it does
}

// facts are about the locals of one rule.
type facts struct {
	reads   map[ir.Local]int
	writes  map[ir.Local]int
	mutates map[ir.Local]int
	asks    map[ir.Local]int
	undoes  map[ir.Local]int       // reads that only give the data back after a "with"
	known   map[ir.Local]*ast.Term // those with one value
	derived map[ir.Local]bool      // those that a reference to data has come to
	stored  map[ir.Local]*ast.Term // those that are parts of this part of the data
	holds   map[ir.Local]bool      // those whose term may hold a value of the data: see findHolds
}

func newUnit(blocks []*ir.Block, params []ir.Local) *unit {
	u := &unit{shared: map[ir.Local]int{}}
	share := func(l ir.Local) {
		if _, ok := u.shared[l]; !ok {
			u.shared[l] = u.high
			u.high++
		}
	}
	for _, p := range params {
		share(p)
	}
	for _, b := range rulesOf(blocks) {
		// A local whose first mention in a block is not that it is written has
		// been written in another.
		seen := map[ir.Local]bool{}
		walk(b, func(s ir.Stmt) {
			e := effectsOf(s)
			for _, ls := range [][]ir.Local{e.reads, e.mutates, e.asks} {
				for _, l := range ls {
					if !seen[l] {
						seen[l] = true
						share(l)
					}
				}
			}
			for _, l := range e.writes {
				seen[l] = true
			}
		})
	}
	return u
}

// rulesOf returns the blocks of a function in which locals mean something of
// their own: those of its rules, of which one with an else has several in one.
func rulesOf(blocks []*ir.Block) (rules []*ir.Block) {
	for _, b := range blocks {
		if s := alternatives(b); s != nil {
			rules = append(rules, s.Blocks...)
		} else {
			rules = append(rules, b)
		}
	}
	return rules
}

// alternatives returns the statement of a block that has no other, where that is
// nested blocks.
func alternatives(b *ir.Block) *ir.BlockStmt {
	if len(b.Stmts) != 1 {
		return nil
	}
	s, _ := b.Stmts[0].(*ir.BlockStmt)
	return s
}

// enter begins a rule.
func (u *unit) enter(b *ir.Block) {
	u.own = map[ir.Local]int{}
	u.facts = facts{
		reads: map[ir.Local]int{}, writes: map[ir.Local]int{}, mutates: map[ir.Local]int{},
		asks: map[ir.Local]int{}, undoes: map[ir.Local]int{}, known: map[ir.Local]*ast.Term{},
		derived: map[ir.Local]bool{}, stored: map[ir.Local]*ast.Term{},
	}
	walk(b, func(s ir.Stmt) {
		e := effectsOf(s)
		for _, l := range e.reads {
			u.reads[l]++
		}
		for _, l := range e.writes {
			u.writes[l]++
		}
		for _, l := range e.mutates {
			u.mutates[l]++
		}
		for _, l := range e.asks {
			u.asks[l]++
		}
		if w, ok := s.(*ir.WithStmt); ok && w.Local == ir.Data && len(w.Path) == 0 {
			if l, ok := w.Value.Value.(ir.Local); ok {
				u.undoes[l]++
			}
		}
	})
	u.findHolds(b)
}

// single reports whether a local of the rule alone is written once and never
// asked whether it is defined: where it is read, it has what was written.
func (u *unit) single(l ir.Local) bool {
	_, shared := u.shared[l]
	return !shared && u.writes[l] == 1 && u.asks[l] == 0
}

// unread reports whether nobody looks at a local.
func (u *unit) unread(l ir.Local) bool {
	_, shared := u.shared[l]
	return !shared && u.reads[l] == 0 && u.asks[l] == 0 && u.mutates[l] == 0
}

// needed reports whether anybody looks at a local of a scan, other than to assign
// it to one that nobody looks at.
func (u *unit) needed(b *ir.Block, l ir.Local) bool {
	reads := u.reads[l]
	walk(b, func(s ir.Stmt) {
		if a, ok := s.(*ir.AssignVarStmt); ok && a.Source.Value == l && u.unread(a.Target) {
			reads--
		}
	})
	return reads > 0 || u.asks[l] > 0
}

// slot returns the place of a local in the frame.
func (u *unit) slot(l ir.Local) int {
	if i, ok := u.shared[l]; ok {
		return i
	}
	i, ok := u.own[l]
	if !ok {
		i = len(u.shared) + len(u.own)
		u.own[l] = i
		u.high = max(u.high, i+1)
	}
	return i
}

func (u *unit) size() int { return u.high }

// findNested finds out how deep in the object that it makes the function changes
// others.
func (u *unit) findNested(f *ir.Func) {
	for _, b := range f.Blocks {
		depth := map[ir.Local]int{f.Return: 0} // of those that lie in the result
		walk(b, func(s ir.Stmt) {
			dot, ok := s.(*ir.DotStmt)
			if !ok {
				return
			}
			if l, ok := dot.Source.Value.(ir.Local); ok {
				if d, ok := depth[l]; ok {
					depth[dot.Target] = d + 1
					u.nested = max(u.nested, d+1)
				}
			}
		})
	}
}

// findEarly finds out whether all rules of a function give the same constant, so
// that nothing more needs to be known once one of them has: topdown does not look
// at the rest then either.
func (u *unit) findEarly(c *compiler, f *ir.Func) {
	var value *ast.Term
	var result ir.Local
	same, inNot := true, 0
	numbers := map[ir.Local]*ast.Term{}
	var visit func(b *ir.Block)
	visit = func(b *ir.Block) {
		for _, s := range b.Stmts {
			e := effectsOf(s)
			for _, l := range append(e.writes, e.mutates...) {
				delete(numbers, l) // a local of another rule has the same number
			}
			switch s := s.(type) {
			case *ir.MakeNumberRefStmt:
				numbers[s.Target] = c.number(s.Index)
			case *ir.AssignVarOnceStmt:
				if s.Target == f.Return {
					break
				}
				v := c.constant(s.Source)
				if l, ok := s.Source.Value.(ir.Local); ok {
					v = numbers[l]
				}
				if v == nil || inNot > 0 || value != nil && (s.Target != result || !equal(v, value)) {
					same = false
				}
				value, result = v, s.Target
			case *ir.NotStmt:
				inNot++
				visit(s.Block)
				inNot--
				continue
			}
			for _, inner := range blocksOf(s) {
				visit(inner)
			}
		}
	}
	for _, b := range f.Blocks {
		visit(b)
	}
	if same && value != nil {
		u.early, u.result = value, result
	}
}

package plan

import (
	"fmt"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"

	"github.com/gatehouse-authz/gatehouse/document"
)

// runBlock runs the steps of a block.
func runBlock(m *machine, steps []step) signal {
	for _, s := range steps {
		if sig := s(m); sig != sigNext {
			return sig
		}
	}
	return sigNext
}

// outer is what the end of a nested block with this signal means for the block
// that it is in, other than that it goes on.
func outer(sig signal) signal {
	if sig >= sigReturn {
		return sig
	}
	return sig - 1
}

func (c *compiler) blockStmt(s *ir.BlockStmt) (step, error) {
	blocks := make([][]step, 0, len(s.Blocks))
	for _, b := range s.Blocks {
		if len(c.nest) == 1 && c.alternatives == s {
			c.unit.enter(b)
		}
		steps, err := c.block(b, plainBlock)
		if err != nil {
			return nil, err
		}
		blocks = append(blocks, steps)
	}
	if len(blocks) == 1 {
		steps := blocks[0]
		return func(m *machine) signal {
			if sig := runBlock(m, steps); sig > sigBreak {
				return outer(sig)
			}
			return sigNext
		}, nil
	}
	return func(m *machine) signal {
		for _, steps := range blocks {
			if sig := runBlock(m, steps); sig > sigBreak {
				return outer(sig)
			}
		}
		return sigNext
	}, nil
}

func (c *compiler) not(s *ir.NotStmt) (step, error) {
	steps, err := c.block(withFound(s.Block), notBlock)
	if err != nil {
		return nil, err
	}
	return func(m *machine) signal {
		switch sig := runBlock(m, steps); sig {
		case sigNext, sigFound:
			return sigBreak
		case sigBreak:
			return sigNext
		default:
			return outer(sig)
		}
	}, nil
}

// foundStmt stands where a negated expression has been found to hold.
type foundStmt struct{ ir.Location }

// withFound returns the block of a negation so that it tells by a signal whether
// what is negated holds, where its end does not: it is so with a rule called by
// name, after which the plan goes on in a nested block.
func withFound(b *ir.Block) *ir.Block {
	n := len(b.Stmts)
	if n == 0 {
		return b
	}
	var last ir.Stmt
	switch s := b.Stmts[n-1].(type) {
	case *ir.WithStmt:
		inner := withFound(s.Block)
		if inner == s.Block {
			return b
		}
		with := *s
		with.Block = inner
		last = &with
	case *ir.BlockStmt:
		if !byName(s) {
			return b
		}
		inner := withFound(s.Blocks[0])
		if inner == s.Blocks[0] {
			inner = &ir.Block{Stmts: append(slices.Clone(inner.Stmts), &foundStmt{}, &ir.BreakStmt{})}
		}
		// What is found leaves all by a signal. To come to the end is not to
		// have found.
		return &ir.Block{Stmts: append(slices.Clone(b.Stmts[:n-1]), &ir.BlockStmt{Blocks: []*ir.Block{inner}}, &ir.BreakStmt{})}
	default:
		return b
	}
	return &ir.Block{Stmts: append(slices.Clone(b.Stmts[:n-1]), last)}
}

// byName reports whether a statement is the call of a rule by name, with what
// follows it.
func byName(s *ir.BlockStmt) bool {
	if len(s.Blocks) != 1 || len(s.Blocks[0].Stmts) == 0 {
		return false
	}
	b, ok := s.Blocks[0].Stmts[0].(*ir.BlockStmt)
	if !ok || len(b.Blocks) != 1 || len(b.Blocks[0].Stmts) == 0 {
		return false
	}
	alternatives, ok := b.Blocks[0].Stmts[0].(*ir.BlockStmt)
	if !ok || len(alternatives.Blocks) != 2 || len(alternatives.Blocks[0].Stmts) == 0 {
		return false
	}
	_, ok = alternatives.Blocks[0].Stmts[0].(*ir.CallDynamicStmt)
	return ok
}

func (c *compiler) with(s *ir.WithStmt) (step, error) {
	if s.Local != ir.Input && s.Local != ir.Data {
		return nil, fmt.Errorf("%w: with of local %d", ErrUnsupported, s.Local)
	}
	path := make([]*ast.Term, 0, len(s.Path))
	for _, i := range s.Path {
		path = append(path, c.strings[i])
	}
	v := c.operand(s.Value)
	steps, err := c.block(s.Block, withBlock)
	if err != nil {
		return nil, err
	}
	t := c.unit.slot(s.Local)
	return func(m *machine) signal {
		before, scope := m.regs[t], m.scope
		after := upsert(before, path, v.load(m))
		if m.regs[t] = after; after != nil && len(path) > 0 && !m.chargeFor(after) {
			return sigError
		}
		m.scope = m.enter(m.regs[0], m.regs[1])
		sig := runBlock(m, steps)
		m.regs[t], m.scope = before, scope
		if sig > sigBreak {
			return outer(sig)
		}
		return sig
	}, nil
}

func (c *compiler) scan(s *ir.ScanStmt) (step, error) {
	src := c.visible(s.Source)
	if s.Source == ir.Data || c.unit.derived[s.Source] {
		c.unit.derived[s.Value] = true
	}
	var guards *guarded
	if root := c.unit.stored[s.Source]; root != nil {
		guards = c.guarded(c.scanGuards(s), root, c.unit.known[s.Source])
		if c.unit.single(s.Value) && c.unit.mutates[s.Value] == 0 {
			c.unit.stored[s.Value] = root
		}
	}
	needKey, needVal := c.unit.needed(s.Block, s.Key), c.unit.needed(s.Block, s.Value)
	if needKey {
		c.searched(s)
	}
	steps, err := c.block(s.Block, scanBlock)
	if err != nil {
		return nil, err
	}
	key, val := 0, 0
	if needKey {
		key = c.unit.slot(s.Key)
	}
	if needVal {
		val = c.unit.slot(s.Value)
	}
	// each runs the block for one element, and reports whether to go on.
	each := func(m *machine, k, v *ast.Term) signal {
		if m.step() {
			return sigError
		}
		if needKey {
			m.regs[key] = k
		}
		if needVal {
			m.regs[val] = v
		}
		if sig := runBlock(m, steps); sig > sigBreak {
			return sig
		}
		return sigNext
	}
	holds, once := c.holding(s.Value), c.unit.within(s.Block, s.Value)
	// in is each for an element where it lies.
	in := func(m *machine, holder *document.Holder, k, v place) signal {
		var key, val *ast.Term
		if needKey {
			key = k.term(asOPA)
		}
		if needVal {
			if holder != nil && v.t == nil {
				val = holder.Hold(v.v)
			} else {
				val = v.term(holds)
			}
		}
		return each(m, key, val)
	}
	return func(m *machine) signal {
		t := src(m)
		if t == nil {
			return sigNext
		}
		if guards != nil {
			d, first, none := guards.find(m, t.Value)
			switch {
			case m.err != nil:
				return sigError
			case none:
				return sigNext
			case d != nil:
				return d.scan(m, t.Value, first, needKey, in)
			}
		}
		if guards == nil && needVal && holds == asOPA {
			t = document.Whole(t) // which is made once, and not each element each time
		}
		switch v := t.Value.(type) {
		case *document.Value:
			var holder *document.Holder // of one element after the other
			if holds != asOPA && once && needVal {
				holder = new(document.Holder)
			}
			i := 0
			for k, e := range v.All() {
				key := place{v: k}
				if needKey && !k.Defined() {
					key = place{t: ast.InternedTerm(i)}
				}
				i++
				if sig := in(m, holder, key, place{v: e}); sig != sigNext {
					return outer(sig)
				}
			}
		case *ast.Array:
			for i := range v.Len() {
				var k *ast.Term
				if needKey {
					k = ast.InternedTerm(i)
				}
				if sig := each(m, k, v.Elem(i)); sig != sigNext {
					return outer(sig)
				}
			}
		case ast.Set:
			for _, k := range v.Slice() {
				if sig := each(m, k, k); sig != sigNext {
					return outer(sig)
				}
			}
		case ast.Object:
			sig := sigNext
			v.Until(func(k, v *ast.Term) bool {
				sig = each(m, k, v)
				return sig != sigNext
			})
			if sig != sigNext {
				return outer(sig)
			}
		}
		return sigNext
	}, nil
}

// makeArray compiles the making of an array: of one whose elements follow, or of
// a comprehension.
func (c *compiler) makeArray(s *ir.MakeArrayStmt, list []ir.Stmt) (step, int, error) {
	if len(list) > 1 {
		if b, ok := list[1].(*ir.BlockStmt); ok && c.fills(b, s.Target) {
			block, err := c.blockStmt(b)
			if err != nil {
				return nil, 0, err
			}
			t := c.unit.slot(s.Target)
			return func(m *machine) signal {
				arr := &unfinished{}
				m.regs[t] = &ast.Term{Value: arr}
				sig := block(m)
				m.regs[t] = ast.ArrayTerm(arr.terms...)
				return sig
			}, 2, nil
		}
	}
	if st, n, err := c.literal(s.Target, list, arrayOf); n > 0 || err != nil {
		return st, n, err
	}
	t := c.unit.slot(s.Target)
	return func(m *machine) signal {
		m.regs[t] = ast.InternedEmptyArray
		return sigNext
	}, 1, nil
}

// fills reports whether a block only adds to an array.
func (c *compiler) fills(b *ir.BlockStmt, l ir.Local) bool {
	adds, others := 0, 0
	for _, block := range b.Blocks {
		walk(block, func(s ir.Stmt) {
			e := effectsOf(s)
			others += count(e.reads, l) + count(e.writes, l) + count(e.asks, l)
			adds += count(e.mutates, l)
		})
	}
	return adds > 0 && others == 0 && adds == c.unit.mutates[l]
}

func count(list []ir.Local, l ir.Local) (n int) {
	for _, other := range list {
		if other == l {
			n++
		}
	}
	return n
}

func (c *compiler) makeObject(s *ir.MakeObjectStmt, list []ir.Stmt) (step, int, error) {
	if n := c.isResult(s, list); n > 0 {
		return c.giveResult(list[n-2].(*ir.ObjectInsertStmt)), n, nil
	}
	if st, n, err := c.literal(s.Target, list, objectOfPairs); n > 0 || err != nil {
		return st, n, err
	}
	t := c.unit.slot(s.Target)
	return func(m *machine) signal {
		m.regs[t] = ast.NewTerm(ast.NewObject())
		return m.built(memoryValue)
	}, 1, nil
}

func (c *compiler) makeSet(s *ir.MakeSetStmt, list []ir.Stmt) (step, int, error) {
	if st, n, err := c.literal(s.Target, list, setOf); n > 0 || err != nil {
		return st, n, err
	}
	t := c.unit.slot(s.Target)
	return func(m *machine) signal {
		m.regs[t] = ast.NewTerm(ast.NewSet())
		return m.built(memoryValue)
	}, 1, nil
}

// isResult reports how many statements make the result of a query that has one
// variable, or 0.
func (c *compiler) isResult(s *ir.MakeObjectStmt, list []ir.Stmt) int {
	if len(list) < 3 {
		return 0
	}
	in, ok := list[1].(*ir.ObjectInsertStmt)
	if !ok || in.Object != s.Target || !equal(c.constant(in.Key), resultKey) {
		return 0
	}
	if add, ok := list[2].(*ir.ResultSetAddStmt); !ok || add.Value != s.Target {
		return 0
	}
	return 3
}

// giveResult compiles the result of a query of one variable, of which mostly
// nobody wants an object.
func (c *compiler) giveResult(s *ir.ObjectInsertStmt) step {
	v := c.operand(s.Value)
	return func(m *machine) signal {
		t := v.load(m)
		if m.all != nil {
			m.all.Add(ast.ObjectTerm(ast.Item(resultKey, t)))
			return sigNext
		}
		if m.result != nil && !equal(t, m.result) {
			m.several = true
		}
		m.result = t
		return sigNext
	}
}

// The ways in which a literal is made of its parts.
func arrayOf(parts []*ast.Term) *ast.Term { return ast.ArrayTerm(parts...) }
func setOf(parts []*ast.Term) *ast.Term   { return ast.SetTerm(parts...) }

func objectOfPairs(parts []*ast.Term) *ast.Term {
	pairs := make([][2]*ast.Term, 0, len(parts)/2)
	for i := 0; i < len(parts); i += 2 {
		for j := range pairs {
			if equal(pairs[j][0], parts[i]) { // the last one counts
				pairs = append(pairs[:j], pairs[j+1:]...)
				break
			}
		}
		pairs = append(pairs, [2]*ast.Term{parts[i], parts[i+1]})
	}
	return ast.ObjectTerm(pairs...)
}

// literal compiles an array, object or set whose parts are all added in the
// statements that follow: it is made at once when all of them are there, or now
// if they are constants. It says how many statements that are, or 0.
func (c *compiler) literal(target ir.Local, list []ir.Stmt, build func([]*ast.Term) *ast.Term) (step, int, error) {
	if !c.unit.single(target) || c.unit.mutates[target] == 0 {
		return nil, 0, nil
	}
	var parts []ir.Operand
	var between []ir.Stmt
	n := 1
	for left := c.unit.mutates[target]; left > 0; n++ {
		if n == len(list) {
			return nil, 0, nil
		}
		e := effectsOf(list[n])
		if count(e.mutates, target) > 0 {
			switch s := list[n].(type) {
			case *ir.ArrayAppendStmt:
				parts = append(parts, s.Value)
			case *ir.SetAddStmt:
				parts = append(parts, s.Value)
			case *ir.ObjectInsertStmt:
				parts = append(parts, s.Key, s.Value)
			default:
				return nil, 0, nil
			}
			left--
			continue
		}
		if count(e.reads, target) > 0 || len(blocksOf(list[n])) > 0 {
			return nil, 0, nil
		}
		for _, l := range append(e.writes, e.mutates...) {
			for _, p := range parts {
				if p.Value == l {
					return nil, 0, nil
				}
			}
		}
		between = append(between, list[n])
	}
	steps, err := c.stmts(between)
	if err != nil {
		return nil, 0, err
	}
	operands := make([]operand, 0, len(parts))
	constant := true
	for _, p := range parts {
		operands = append(operands, c.operand(p))
		constant = constant && operands[len(operands)-1].term != nil
	}
	if constant {
		terms := make([]*ast.Term, 0, len(parts))
		for _, o := range operands {
			terms = append(terms, o.term)
		}
		c.unit.known[target] = build(terms)
		if len(steps) == 0 {
			return nil, n, nil
		}
		return func(m *machine) signal { return runBlock(m, steps) }, n, nil
	}
	t := c.unit.slot(target)
	return func(m *machine) signal {
		if sig := runBlock(m, steps); sig != sigNext {
			return sig
		}
		terms := make([]*ast.Term, len(operands))
		for i := range operands {
			terms[i] = operands[i].load(m)
		}
		m.regs[t] = build(terms)
		return m.built(memoryValue + int64(len(terms))*memoryMember)
	}, n, nil
}

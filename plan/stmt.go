package plan

import (
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/gatehouse-authz/gatehouse/document"
)

// operand is where a step takes a value from: a constant, or a place of the frame.
type operand struct {
	term *ast.Term // nil: it is in the frame
	slot int
}

func (o operand) load(m *machine) *ast.Term {
	if o.term != nil {
		return o.term
	}
	return m.regs[o.slot]
}

var (
	termTrue  = ast.InternedTerm(true)
	termFalse = ast.InternedTerm(false)
	termNull  = ast.InternedNullTerm
)

// constant returns the value of an operand that has only one, or nil.
func (c *compiler) constant(op ir.Operand) *ast.Term {
	switch v := op.Value.(type) {
	case ir.Bool:
		if v {
			return termTrue
		}
		return termFalse
	case ir.StringIndex:
		return c.strings[v]
	case ir.Local:
		return c.unit.known[v]
	}
	return nil
}

func (c *compiler) number(index int) *ast.Term {
	return ast.NewTerm(ast.Number(c.policy.Static.Strings[index].Value))
}

// operand says where the value of op is.
func (c *compiler) operand(op ir.Operand) operand {
	if t := c.constant(op); t != nil {
		return operand{term: t}
	}
	return operand{slot: c.unit.slot(op.Value.(ir.Local))}
}

func (c *compiler) local(l ir.Local) operand { return c.operand(ir.Operand{Value: l}) }

// location returns where a statement stands in the policy.
func (c *compiler) location(s ir.Stmt) *ast.Location {
	l := s.GetLocation()
	file := ""
	if l.File < len(c.policy.Static.Files) {
		file = c.policy.Static.Files[l.File].Value
	}
	return &ast.Location{File: file, Row: l.Row, Col: l.Col, Text: l.Text}
}

// stmts compiles the statements of a block.
func (c *compiler) stmts(list []ir.Stmt) ([]step, error) {
	list = straightened(list)
	c.findKnown(list)
	out := make([]step, 0, len(list))
	for i := 0; i < len(list); {
		s, n, err := c.stmt(list[i:])
		if err != nil {
			return nil, err
		}
		if s != nil {
			out = append(out, s)
		}
		i += n
	}
	return out, nil
}

// findKnown finds the locals that have one value only.
func (c *compiler) findKnown(list []ir.Stmt) {
	for _, s := range list {
		switch s := s.(type) {
		case *ir.MakeNullStmt:
			c.know(s.Target, termNull)
		case *ir.MakeNumberIntStmt:
			c.know(s.Target, ast.InternedTerm(int(s.Value)))
		case *ir.MakeNumberRefStmt:
			c.know(s.Target, c.number(s.Index))
		case *ir.AssignVarStmt:
			if t := c.constant(s.Source); t != nil {
				c.know(s.Target, t)
			}
		}
	}
}

func (c *compiler) know(l ir.Local, t *ast.Term) {
	if c.unit.single(l) && c.unit.mutates[l] == 0 {
		c.unit.known[l] = t
	}
}

// stmt compiles the first statement of list, together with as many of those after
// it as it tells. The step is nil where there is nothing to do.
func (c *compiler) stmt(list []ir.Stmt) (step, int, error) {
	for _, l := range effectsOf(list[0]).writes {
		delete(c.unit.derived, l)
	}
	switch s := list[0].(type) {
	case *foundStmt:
		return func(*machine) signal { return sigFound }, 1, nil
	case *ir.NopStmt:
		return nil, 1, nil
	case *ir.DotStmt:
		st, n, err := c.dots(list)
		if err != nil || len(c.asked) == 0 {
			return st, n, err
		}
		st, err = c.withKeys(list[:n], st)
		return st, n, err
	case *ir.ReturnLocalStmt:
		v, depth := c.local(s.Source), c.unit.nested
		if depth > 0 {
			return func(m *machine) signal {
				m.output = rebuilt(v.load(m), depth)
				return sigReturn
			}, 1, nil
		}
		return func(m *machine) signal {
			m.output = v.load(m)
			return sigReturn
		}, 1, nil
	case *ir.CallStmt:
		st, err := c.call(s)
		return st, 1, err
	case *ir.CallDynamicStmt:
		st, err := c.callDynamic(s)
		return st, 1, err
	case *ir.BlockStmt:
		st, err := c.blockStmt(s)
		return st, 1, err
	case *ir.BreakStmt:
		if err := c.leaves(s.Index); err != nil {
			return nil, 0, err
		}
		sig := sigBreak + signal(s.Index)
		return func(*machine) signal { return sig }, 1, nil
	case *ir.LenStmt:
		v, t := c.operand(s.Source), c.unit.slot(s.Target)
		return func(m *machine) signal {
			m.regs[t] = ast.InternedTerm(length(v.load(m)))
			return sigNext
		}, 1, nil
	case *ir.ScanStmt:
		st, err := c.scan(s)
		return st, 1, err
	case *ir.NotStmt:
		st, err := c.not(s)
		return st, 1, err
	case *ir.WithStmt:
		st, err := c.with(s)
		return st, 1, err
	case *ir.AssignIntStmt:
		return c.set(s.Target, ast.InternedTerm(int(s.Value))), 1, nil
	case *ir.MakeNullStmt:
		return c.set(s.Target, termNull), 1, nil
	case *ir.MakeNumberIntStmt:
		return c.set(s.Target, ast.InternedTerm(int(s.Value))), 1, nil
	case *ir.MakeNumberRefStmt:
		return c.set(s.Target, c.number(s.Index)), 1, nil
	case *ir.AssignVarStmt:
		return c.assign(s), 1, nil
	case *ir.AssignVarOnceStmt:
		return c.assignOnce(s), 1, nil
	case *ir.ResetLocalStmt:
		t := c.unit.slot(s.Target)
		return func(m *machine) signal {
			m.regs[t] = nil
			return sigNext
		}, 1, nil
	case *ir.MakeArrayStmt:
		return c.makeArray(s, list)
	case *ir.MakeObjectStmt:
		return c.makeObject(s, list)
	case *ir.MakeSetStmt:
		return c.makeSet(s, list)
	case *ir.EqualStmt:
		return c.compare(s.A, s.B, true), 1, nil
	case *ir.NotEqualStmt:
		return c.compare(s.A, s.B, false), 1, nil
	case *ir.IsArrayStmt:
		v := c.operand(s.Source)
		return func(m *machine) signal {
			if t := v.load(m); t != nil {
				if isArray(t) {
					return sigNext
				}
			}
			return sigBreak
		}, 1, nil
	case *ir.IsObjectStmt:
		v := c.operand(s.Source)
		return func(m *machine) signal {
			if t := v.load(m); t != nil {
				if isObject(t) {
					return sigNext
				}
			}
			return sigBreak
		}, 1, nil
	case *ir.IsSetStmt:
		v := c.operand(s.Source)
		return func(m *machine) signal {
			if t := v.load(m); t != nil {
				if _, ok := t.Value.(ast.Set); ok {
					return sigNext
				}
			}
			return sigBreak
		}, 1, nil
	case *ir.IsDefinedStmt:
		t := c.unit.slot(s.Source)
		return func(m *machine) signal {
			if m.regs[t] == nil {
				return sigBreak
			}
			return sigNext
		}, 1, nil
	case *ir.IsUndefinedStmt:
		t := c.unit.slot(s.Source)
		return func(m *machine) signal {
			if m.regs[t] != nil {
				return sigBreak
			}
			return sigNext
		}, 1, nil
	case *ir.ArrayAppendStmt:
		v, t := c.operand(s.Value), c.unit.slot(s.Array)
		return func(m *machine) signal {
			switch arr := m.regs[t].Value.(type) {
			case *unfinished:
				arr.terms = append(arr.terms, v.load(m))
			case *ast.Array:
				m.regs[t] = ast.NewTerm(arr.Append(v.load(m)))
			}
			return m.built(memoryElement)
		}, 1, nil
	case *ir.ObjectInsertStmt:
		k, v, t := c.operand(s.Key), c.operand(s.Value), c.unit.slot(s.Object)
		return func(m *machine) signal {
			insert(m, t, k.load(m), v.load(m))
			return m.built(memoryMember)
		}, 1, nil
	case *ir.ObjectInsertOnceStmt:
		k, v, t, loc := c.operand(s.Key), c.operand(s.Value), c.unit.slot(s.Object), c.location(s)
		return func(m *machine) signal {
			obj, key, val := m.regs[t].Value.(ast.Object), k.load(m), v.load(m)
			if old := obj.Get(key); old != nil {
				if !equal(old, val) {
					return m.conflict(loc, "object keys must be unique")
				}
				return sigNext
			}
			obj.Insert(key, val)
			return m.built(memoryMember)
		}, 1, nil
	case *ir.ObjectMergeStmt:
		a, b, t := c.visible(s.A), c.local(s.B), c.unit.slot(s.Target)
		return func(m *machine) signal {
			v := merged(a(m), b.load(m))
			if m.regs[t] = v; v != nil && !m.chargeFor(v) {
				return sigError
			}
			return sigNext
		}, 1, nil
	case *ir.SetAddStmt:
		v, t := c.operand(s.Value), c.unit.slot(s.Set)
		return func(m *machine) signal {
			m.regs[t].Value.(ast.Set).Add(v.load(m))
			return m.built(memoryMember)
		}, 1, nil
	case *ir.ResultSetAddStmt:
		v := c.local(s.Value)
		return func(m *machine) signal {
			m.addResult(v.load(m))
			return m.built(memoryMember)
		}, 1, nil
	}
	return nil, 0, fmt.Errorf("%w: statement %T", ErrUnsupported, list[0])
}

// built is charge, of a step.
func (m *machine) built(n int64) signal {
	if !m.charge(n) {
		return sigError
	}
	return sigNext
}

// conflict ends the evaluation with a conflict.
func (m *machine) conflict(loc *ast.Location, text string) signal {
	m.err = &topdown.Error{Code: topdown.ConflictErr, Message: text, Location: loc}
	return sigError
}

// resultKey is the variable whose value Program.Eval returns.
var resultKey = ast.InternedTerm("result")

func (m *machine) addResult(t *ast.Term) {
	if m.all != nil {
		m.all.Add(t)
		return
	}
	v := t.Value.(ast.Object).Get(resultKey)
	if m.result != nil && v != nil && !equal(v, m.result) {
		m.several = true
	}
	m.result = v
}

// set assigns a constant, which needs no step where all that read it know it.
func (c *compiler) set(l ir.Local, v *ast.Term) step {
	if c.unit.known[l] != nil {
		return nil
	}
	t := c.unit.slot(l)
	return func(m *machine) signal {
		m.regs[t] = v
		return sigNext
	}
}

func (c *compiler) assign(s *ir.AssignVarStmt) step {
	if l, ok := s.Source.Value.(ir.Local); ok && c.unit.stored[l] != nil && c.unit.single(s.Target) && c.unit.mutates[s.Target] == 0 {
		c.unit.stored[s.Target] = c.unit.stored[l]
	}
	if c.unit.known[s.Target] != nil {
		return nil
	}
	if c.unit.unread(s.Target) {
		return nil
	}
	if l, ok := s.Source.Value.(ir.Local); ok && l == ir.Data && c.unit.undoes[s.Target] != c.unit.reads[s.Target] {
		v, t := c.visible(l), c.unit.slot(s.Target)
		return func(m *machine) signal {
			m.regs[t] = v(m)
			return sigNext
		}
	}
	v := c.operand(s.Source)
	if v.term != nil {
		if c.know(s.Target, v.term); c.unit.known[s.Target] != nil {
			return nil
		}
		t := c.unit.slot(s.Target)
		return func(m *machine) signal {
			m.regs[t] = v.term
			return sigNext
		}
	}
	t := c.unit.slot(s.Target)
	return func(m *machine) signal {
		m.regs[t] = m.regs[v.slot]
		return sigNext
	}
}

// visible returns how the value of l is loaded where it may be all of data, which
// a policy sees without what is below system.
func (c *compiler) visible(l ir.Local) func(*machine) *ast.Term {
	v := c.local(l)
	if l != ir.Data {
		return v.load
	}
	return func(m *machine) *ast.Term { return withoutSystem(m.regs[v.slot]) }
}

func (c *compiler) assignOnce(s *ir.AssignVarOnceStmt) step {
	v, t, loc := c.operand(s.Source), c.unit.slot(s.Target), c.location(s)
	if c.unit.early != nil && s.Target == c.unit.result {
		return func(*machine) signal { return sigDone }
	}
	return func(m *machine) signal {
		val := v.load(m)
		if old := m.regs[t]; old != nil && !equal(old, val) {
			return m.conflict(loc, "rule or function produced conflicting values")
		}
		m.regs[t] = val
		return sigNext
	}
}

// compare compiles a comparison for equality, or its opposite.
func (c *compiler) compare(ao, bo ir.Operand, want bool) step {
	a, b := c.operand(ao), c.operand(bo)
	if a.term != nil {
		a, b = b, a
	}
	if a.term != nil {
		if equal(a.term, b.term) == want {
			return nil
		}
		return func(*machine) signal { return sigBreak }
	}
	x := a.slot
	if b.term == nil {
		y := b.slot
		return func(m *machine) signal {
			if equal(m.regs[x], m.regs[y]) != want {
				return sigBreak
			}
			return sigNext
		}
	}
	switch v := b.term.Value.(type) {
	case ast.Boolean:
		return func(m *machine) signal {
			if is, ok := m.regs[x].Value.(ast.Boolean); (ok && is == v) != want {
				return sigBreak
			}
			return sigNext
		}
	case ast.String:
		return func(m *machine) signal {
			if is, ok := m.regs[x].Value.(ast.String); (ok && is == v) != want {
				return sigBreak
			}
			return sigNext
		}
	}
	y := b.term
	return func(m *machine) signal {
		if equal(m.regs[x], y) != want {
			return sigBreak
		}
		return sigNext
	}
}

// dots compiles a lookup, with those after it that look into what it gives.
func (c *compiler) dots(list []ir.Stmt) (step, int, error) {
	first := list[0].(*ir.DotStmt)
	src, ok := first.Source.Value.(ir.Local)
	if !ok {
		return func(*machine) signal { return sigBreak }, 1, nil // a scalar has no parts
	}
	keys := []operand{c.operand(first.Key)}
	target, n := first.Target, 1
	for n < len(list) {
		if c.silent(list[n]) {
			n++
			continue
		}
		next, ok := list[n].(*ir.DotStmt)
		if !ok {
			break
		}
		l, ok := next.Source.Value.(ir.Local)
		if k, isLocal := next.Key.Value.(ir.Local); isLocal && k == target {
			break
		}
		if !ok || l != target || c.unit.reads[target] != 1 || !c.unit.single(target) {
			break
		}
		keys = append(keys, c.operand(next.Key))
		target = next.Target
		n++
	}

	at := byValue
	delete(c.unit.derived, target)
	if src == ir.Data || c.unit.derived[src] {
		at = byPath
		c.unit.derived[target] = true
		for _, k := range keys {
			if !c.withData {
				break
			}
			// What a "with" gives has other keys than data has, and one cannot
			// tell them apart.
			if k.term == nil {
				return nil, 0, fmt.Errorf("%w: computed keys of data where some with replaces data", ErrUnsupported)
			}
			if s, ok := k.term.Value.(ast.String); !ok || isIndex(string(s)) {
				return nil, 0, fmt.Errorf("%w: keys of data that are numbers where some with replaces data", ErrUnsupported)
			}
			at = byValue
		}
	}
	c.store(src, keys, target)
	v := c.local(src)
	if v.term != nil {
		return c.lookup(func(*machine) *ast.Term { return v.term }, at, keys, target), n, nil
	}
	x := v.slot
	if src == ir.Input {
		if path := c.inputPath(keys); path != nil {
			from := func(m *machine) *ast.Term { return m.inputAt(path) }
			if st, more := c.compared(from, at, nil, target, list[n:]); st != nil {
				return st, n + more, nil
			}
			return c.lookup(from, at, nil, target), n, nil
		}
	}
	from := func(m *machine) *ast.Term { return m.regs[x] }
	if src == ir.Data {
		if st, ok := c.dataDots(x, at, keys, target); ok {
			return st, n, nil
		}
	} else if st, more := c.compared(from, at, keys, target, list[n:]); st != nil {
		return st, n + more, nil
	}
	return c.lookup(from, at, keys, target), n, nil
}

// store takes note where a lookup gives a part of the Program's data.
func (c *compiler) store(src ir.Local, keys []operand, target ir.Local) {
	root := c.unit.stored[src]
	if src == ir.Data {
		root = c.data
	}
	if root == nil || c.withData || !c.unit.single(target) || c.unit.mutates[target] > 0 {
		return
	}
	if src == ir.Data || sameData(c.unit.known[src], root) {
		p := placeOf(root)
		for len(keys) > 0 && keys[0].term != nil {
			p, keys = p.at(byPath, keys[0].term), keys[1:]
		}
		root = p.term(asHeld)
	}
	if root != nil {
		c.unit.stored[target] = root
	}
}

// inputPath is a path into the input that is looked up once in an evaluation.
type inputPath struct {
	index int // in machine.found
	keys  []*ast.Term
}

// inputPath returns the path of keys, or nil if they are not all constants.
func (c *compiler) inputPath(keys []operand) *inputPath {
	name := ""
	terms := make([]*ast.Term, 0, len(keys))
	for _, k := range keys {
		if k.term == nil {
			return nil
		}
		name += k.term.String() + "\x00"
		terms = append(terms, k.term)
	}
	p := c.paths[name]
	if p == nil {
		p = &inputPath{len(c.paths), terms}
		c.paths[name] = p
	}
	return p
}

// inputAt returns what the input has at a path, or nil.
func (m *machine) inputAt(p *inputPath) *ast.Term {
	v := m.regs[0]
	own := v == m.base.input
	if own {
		if found := m.found[p.index]; found != nil {
			return defined(found)
		}
	}
	for _, k := range p.keys {
		if v == nil {
			break
		}
		v = get(v.Value, k)
	}
	if own {
		if v != nil {
			m.found[p.index] = v
		} else {
			m.found[p.index] = undefined
		}
	}
	return v
}

// compared compiles a lookup whose only use is the comparison that follows it,
// and says how many statements that takes. The step is nil where it is not so.
func (c *compiler) compared(from func(*machine) *ast.Term, at getter, keys []operand, target ir.Local, list []ir.Stmt) (step, int) {
	if c.unit.reads[target] != 1 || !c.unit.single(target) {
		return nil, 0
	}
	n := 0
	for n < len(list) && c.silent(list[n]) {
		n++
	}
	if n == len(list) {
		return nil, 0
	}
	var a, b ir.Operand
	var want bool
	switch s := list[n].(type) {
	case *ir.EqualStmt:
		a, b, want = s.A, s.B, true
	case *ir.NotEqualStmt:
		a, b, want = s.A, s.B, false
	default:
		return nil, 0
	}
	if b.Value == target {
		a, b = b, a
	}
	if a.Value != target {
		return nil, 0
	}
	other := c.operand(b)
	if len(keys) == 1 && keys[0].term != nil {
		k := keys[0].term
		return func(m *machine) signal {
			p := placeOf(from(m)).at(at, k)
			if !p.defined() || p.equals(other.load(m)) != want {
				return sigBreak
			}
			return sigNext
		}, n + 1
	}
	return func(m *machine) signal {
		p := placeOf(from(m))
		for i := range keys {
			p = p.at(at, keys[i].load(m))
		}
		if !p.defined() || p.equals(other.load(m)) != want {
			return sigBreak
		}
		return sigNext
	}, n + 1
}

// silent reports whether a statement needs no step, because all who read what it
// sets know it.
func (c *compiler) silent(s ir.Stmt) bool {
	switch s := s.(type) {
	case *ir.NopStmt:
		return true
	case *ir.MakeNullStmt:
		return c.unit.known[s.Target] != nil
	case *ir.MakeNumberIntStmt:
		return c.unit.known[s.Target] != nil
	case *ir.MakeNumberRefStmt:
		return c.unit.known[s.Target] != nil
	case *ir.AssignVarStmt:
		return c.unit.known[s.Target] != nil || c.unit.unread(s.Target)
	}
	return false
}

// maxEarly is how many values may be in a part of the data for it to be made as OPA
// has it when the Program is compiled.
const maxEarly = 128

// dataDots compiles a lookup in data: the part of it that is the same each time
// is done now.
func (c *compiler) dataDots(data int, by getter, keys []operand, target ir.Local) (step, bool) {
	p, n := placeOf(c.data), 0
	for n < len(keys) && keys[n].term != nil && p.defined() {
		p = p.at(by, keys[n].term)
		n++
	}
	if n == 0 {
		return nil, false
	}
	rest, holds := keys[n:], c.holding(target)
	var static step
	switch {
	case !p.defined():
		static = func(*machine) signal { return sigBreak }
	case len(rest) == 0 && holds == asOPA && p.v.Count(maxEarly) > maxEarly:
		t := c.unit.slot(target)
		static = func(m *machine) signal {
			m.regs[t] = p.v.Term()
			return sigNext
		}
	case len(rest) == 0:
		at := p.term(holds)
		if !c.withData && c.unit.single(target) && c.unit.mutates[target] == 0 {
			if _, ok := at.Value.(*document.Value); !ok {
				c.early += sizeEarly * int64(p.v.Count(maxEarly))
			}
			c.unit.known[target] = at
			return nil, true
		}
		t := c.unit.slot(target)
		static = func(m *machine) signal {
			m.regs[t] = at
			return sigNext
		}
	default:
		at := p.term(asHeld)
		static = c.lookup(func(*machine) *ast.Term { return at }, by, rest, target)
	}
	if !c.withData {
		return static, true
	}
	own := c.data
	other := c.lookup(func(m *machine) *ast.Term { return m.regs[data] }, by, keys, target)
	return func(m *machine) signal {
		if m.regs[data] == own {
			return static(m)
		}
		return other(m)
	}, true
}

// lookup compiles a walk along keys.
func (c *compiler) lookup(from func(*machine) *ast.Term, by getter, keys []operand, target ir.Local) step {
	t, holds := c.unit.slot(target), c.holding(target)
	if len(keys) == 1 && keys[0].term != nil {
		k := keys[0].term
		return func(m *machine) signal {
			v := placeOf(from(m)).at(by, k).term(holds)
			if v == nil {
				return sigBreak
			}
			m.regs[t] = v
			return sigNext
		}
	}
	return func(m *machine) signal {
		p := placeOf(from(m))
		for i := range keys {
			p = p.at(by, keys[i].load(m))
		}
		v := p.term(holds)
		if v == nil {
			return sigBreak
		}
		m.regs[t] = v
		return sigNext
	}
}

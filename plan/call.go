package plan

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/gatehouse-authz/gatehouse/document"
)

func (c *compiler) call(s *ir.CallStmt) (step, error) {
	f, ok := c.byName[s.Func]
	if !ok {
		return c.builtin(s)
	}
	if len(s.Args) != f.arity {
		return nil, fmt.Errorf("%w: %s is called with %d arguments, it takes %d", ErrUnsupported, s.Func, len(s.Args), f.arity)
	}
	if s.Args[0].Value != ir.Input || s.Args[1].Value != ir.Data {
		return nil, fmt.Errorf("%w: %s is called with other than input and data", ErrUnsupported, s.Func)
	}
	args := make([]operand, 0, len(s.Args))
	for _, a := range s.Args {
		args = append(args, c.operand(a))
	}
	t := c.unit.slot(s.Result)
	return func(m *machine) signal {
		v := m.invoke(f, args)
		if v == nil {
			if m.err != nil {
				return sigError
			}
			return sigBreak
		}
		m.regs[t] = v
		return sigNext
	}, nil
}

// invoke calls a function of the plan and returns its value, or nil if it is
// undefined or the evaluation has ended.
func (m *machine) invoke(f *function, args []operand) *ast.Term {
	if f.arity != 2 {
		return m.invokeWith(f, args)
	}
	own := f.constant && m.scope.data == m.prog.data
	if own {
		if v := f.kept.Load(); v != nil {
			return defined(v)
		}
	}
	if v := m.scope.memo[f.index]; v != nil {
		return defined(v)
	}
	scope, failures := m.scope, m.failures
	v := m.run(f, args)
	if m.err != nil {
		return nil
	}
	known := v
	if known == nil {
		known = undefined
	}
	scope.memo[f.index] = known
	if own && failures == m.failures && m.prog.mayKeep(known) {
		f.kept.Store(known)
	}
	return v
}

// Bounds of what a Program keeps of rules that look at data alone: in values, and
// values in them. What is more is found out by each evaluation.
const (
	maxKept    = 10_000
	maxKeptAll = 100_000
)

// mayKeep reports whether there is room to keep t, and takes it.
func (p *Program) mayKeep(t *ast.Term) bool {
	n := 1
	if t != undefined {
		n = sizeOf(t.Value, maxKept)
	}
	return n <= maxKept && p.kept.Add(int64(n)) <= maxKeptAll
}

// sizeOf counts the values in v, until they are more than most.
func sizeOf(v ast.Value, most int) int {
	n := 1
	add := func(t *ast.Term) bool {
		n += sizeOf(t.Value, most-n)
		return n > most
	}
	switch v := v.(type) {
	case *ast.Array:
		v.Until(add)
	case ast.Set:
		v.Until(add)
	case ast.Object:
		v.Until(func(k, v *ast.Term) bool { return add(k) || add(v) })
	}
	return n
}

// Functions are remembered only where it pays: after so many calls in one
// evaluation, for so many combinations of arguments.
const (
	callsUnremembered = 16
	maxRemembered     = 4096
)

// calls are the results of a function for arguments, by a hash of these.
type calls struct {
	byHash map[int][]result
	size   int
}

type result struct {
	args []*ast.Term // without input and data
	v    *ast.Term   // undefined where it is
}

// invokeWith calls a function that has arguments. topdown remembers each call, and
// there are policies that end only for that.
func (m *machine) invokeWith(f *function, args []operand) *ast.Term {
	if m.called == nil {
		m.called = make(map[*function]int)
	}
	if m.called[f]++; m.called[f] <= callsUnremembered {
		return m.run(f, args)
	}
	scope := m.scope
	known := scope.calls[f]
	if known == nil {
		known = &calls{byHash: make(map[int][]result)}
		if scope.calls == nil {
			scope.calls = make(map[*function]*calls)
		}
		scope.calls[f] = known
	}
	own := make([]*ast.Term, 0, len(args)-2)
	hash := 0
	for _, a := range args[2:] {
		t := a.load(m)
		own = append(own, t)
		hash = hash*31 + t.Hash()
	}
	for _, r := range known.byHash[hash] {
		if slices.EqualFunc(own, r.args, same) {
			return defined(r.v)
		}
	}
	v := m.run(f, args)
	if m.err != nil {
		return nil
	}
	if known.size < maxRemembered {
		known.size++
		r := result{own, v}
		if v == nil {
			r.v = undefined
		}
		known.byHash[hash] = append(known.byHash[hash], r)
	}
	return v
}

// same reports whether two arguments are equal and look the same: 1 and 1.0 are
// equal.
func same(a, b *ast.Term) bool {
	if a == b {
		return true
	}
	switch x := a.Value.(type) {
	case ast.String:
		y, ok := b.Value.(ast.String)
		return ok && x == y
	case ast.Number:
		y, ok := b.Value.(ast.Number)
		return ok && x == y
	}
	return equal(a, b)
}

func defined(v *ast.Term) *ast.Term {
	if v == undefined {
		return nil
	}
	return v
}

// run runs a function in a frame of its own.
func (m *machine) run(f *function, args []operand) *ast.Term {
	if m.step() {
		return nil
	}
	caller, top := m.regs, m.top
	frame := m.frame(f.locals)
	for i, a := range args {
		frame[i] = a.load(m)
	}
	m.regs = frame
	v := m.body(f)
	m.regs, m.top = caller, top
	return v
}

func (m *machine) body(f *function) *ast.Term {
	if f.rules != nil {
		return m.indexed(f)
	}
	for _, b := range f.blocks {
		switch sig := runBlock(m, b); sig {
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

// callDynamic compiles the call of a rule whose name is known only when it runs.
// Where there is no such rule the block ends; where it is undefined, so do the
// three around it, as the plan has it.
func (c *compiler) callDynamic(s *ir.CallDynamicStmt) (step, error) {
	if err := c.leaves(3); err != nil {
		return nil, err
	}
	if len(s.Args) != 2 || s.Args[0] != ir.Input || s.Args[1] != ir.Data {
		return nil, fmt.Errorf("%w: call by name with other than input and data", ErrUnsupported)
	}
	args := []operand{c.local(s.Args[0]), c.local(s.Args[1])}
	path := make([]operand, 0, len(s.Path))
	for _, p := range s.Path {
		path = append(path, c.operand(p))
	}
	t, tree := c.unit.slot(s.Result), c.dynamic
	return func(m *machine) signal {
		n := tree
		for i := range path {
			name, ok := path[i].load(m).Value.(ast.String)
			if !ok {
				return sigBreak
			}
			if n = n.children[string(name)]; n == nil {
				return sigBreak
			}
		}
		if n.fn == nil {
			return sigBreak
		}
		v := m.invoke(n.fn, args)
		if v == nil {
			if m.err != nil {
				return sigError
			}
			return sigBreak + 3
		}
		m.regs[t] = v
		return sigNext
	}, nil
}

// builtin compiles the call of a builtin, as it stands in OPA's registry.
func (c *compiler) builtin(s *ir.CallStmt) (step, error) {
	decl, f := ast.BuiltinMap[s.Func], builtinOf(s.Func)
	if decl == nil || f == nil {
		return nil, fmt.Errorf("%w: builtin %q", ErrUnsupported, s.Func)
	}
	args := make([]operand, 0, len(s.Args))
	for _, a := range s.Args {
		args = append(args, c.operand(a))
	}
	b := &builtin{
		name: s.Func, f: f, args: args, loc: c.location(s),
		void: decl.Decl.Result() == nil, relation: decl.Relation,
		varies: decl.IsNondeterministic(), bare: decl.CanSkipBctx,
		target: c.unit.slot(s.Result), native: natives[s.Func],
		memory: foreseen[s.Func], growth: cmp.Or(growths[s.Func], growth), builds: builders[s.Func],
	}
	if s.Func == ast.GlobMatch.Name && len(args) == 3 {
		b.native = globMatch(args[1].term, c.patterns)
	}
	if s.Func == ast.RegexMatch.Name && len(args) == 2 {
		if l, ok := s.Args[0].Value.(ir.Local); args[0].term != nil || ok && c.unit.stored[l] != nil {
			b.native = regexMatch(c.regexps)
		}
	}
	if b.native == nil {
		b.native = c.tokens.native(s.Func)
	}
	if s.Func == ast.Member.Name && len(s.Args) == 2 {
		b.native = c.member(s.Args[1])
	}
	return b.call, nil
}

// member returns the native form of x in y, which looks for x in an index where y
// is a part of the data.
func (c *compiler) member(y ir.Operand) native {
	l, _ := y.Value.(ir.Local)
	root := c.unit.stored[l]
	if root == nil {
		return member
	}
	g := c.guarded([]scanGuard{{}}, root, nil)
	return func(m *machine, a []operand) (*ast.Term, bool) {
		if is, ok := g.member(m, a[0].load(m), a[1].load(m).Value); ok {
			return truth(is), true
		}
		return member(m, a)
	}
}

// builtin is the call of a builtin.
type builtin struct {
	name     string
	f        topdown.BuiltinFunc
	args     []operand
	loc      *ast.Location
	target   int
	void     bool // it gives nothing
	relation bool // it gives several values
	varies   bool // it is no function of its operands
	bare     bool // it looks at no context
	native   native
	builds   bool // its native form gives values that were not there

	memory func(left allowance, operands []*ast.Term) (int64, bool) // see foreseen
	growth int64                                                    // see growths
}

// none stands for what a builtin that gives nothing has not given.
var none = new(ast.Term)

func (b *builtin) call(m *machine) signal {
	if m.step() {
		return sigError
	}
	if b.native != nil && !(b.varies && m.env.NDBuiltinCache != nil) {
		v, ok := b.native(m, b.args)
		if ok {
			if b.builds && !m.chargeResult(b, v) {
				return sigError
			}
			m.regs[b.target] = v
			return sigNext
		}
		if m.err != nil {
			return sigError
		}
	}
	operands := m.operands[:0]
	for i := range b.args {
		operands = append(operands, document.Whole(b.args[i].load(m)))
	}
	m.operands = operands
	if !m.foresee(b, operands) {
		return sigError
	}
	bctx := &m.loc
	if !b.bare {
		if !m.ready {
			m.context()
		}
		bctx = &m.bctx
		if b.varies && bctx.Time == nil {
			bctx.Time = m.timeTerm()
		}
	}
	bctx.Location = b.loc
	remember := b.varies && bctx.NDBuiltinCache != nil
	if remember {
		if v, ok := bctx.NDBuiltinCache.Get(b.name, ast.NewArray(slices.Clone(operands)...)); ok {
			if !b.void {
				m.regs[b.target] = ast.NewTerm(v)
			}
			return sigNext
		}
	}
	var err error
	if b.relation {
		m.outputs = m.outputs[:0]
		if err = b.f(*bctx, operands, m.collect); err == nil {
			if !m.charge(memoryElement * int64(len(m.outputs))) {
				return sigError
			}
			m.regs[b.target] = ast.ArrayTerm(append([]*ast.Term(nil), m.outputs...)...)
			return sigNext
		}
	} else {
		m.output = none
		err = b.f(*bctx, operands, m.take)
	}
	if (b.varies || err != nil) && m.stopped() {
		return sigError // what it gave may be for that alone
	}
	if err != nil {
		if halt, ok := err.(topdown.Halt); ok {
			m.err = halt.Err
			return sigError
		}
		m.failures++
		if m.failed == nil {
			m.failed = err
		}
	}
	switch out := m.output; {
	case b.relation || out == none:
		return sigBreak
	case b.void:
		return sigNext
	default:
		if !m.chargeResult(b, out) {
			return sigError
		}
		if remember {
			bctx.NDBuiltinCache.Put(b.name, ast.NewArray(slices.Clone(operands)...), out.Value)
		}
		m.regs[b.target] = out
		return sigNext
	}
}

package plan

import (
	"errors"
	"fmt"
	"regexp"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"

	"github.com/gatehouse-authz/gatehouse/document"
)

// Program is a plan with its data, ready to be evaluated. It never changes, but
// for what it remembers of rules that look at nothing but data.
type Program struct {
	data   *ast.Term
	funcs  []*function
	blocks [][]step // of the query
	locals int      // that the query has
	paths  int      // of the input

	kept     atomic.Int64 // values in what functions keep
	stmts    int          // of the plan
	reserved int64        // bytes, for indexes over the data
	early    int64        // bytes, of data that was made as OPA has it
}

// Size estimates what the Program takes in memory beside its data, in bytes, with
// what indexes over the data may take when they are made, but without what it keeps
// of rules and patterns when they are first asked for.
func (p *Program) Size() int64 {
	return sizeProgram + sizeFunction*int64(len(p.funcs)) + sizeStmt*int64(p.stmts) + p.early + p.reserved
}

// Estimates, in bytes.
const (
	sizeProgram  = 512
	sizeFunction = 300
	sizeStmt     = 60
	sizeEarly    = 80 // for each value
)

// function is a planned rule, or function of the policy.
type function struct {
	name   string
	index  int // in Program.funcs
	arity  int // with input and data
	locals int
	blocks [][]step
	rules  *index    // nil: all blocks are run
	early  *ast.Term // the one value that sigDone stands for

	// constant says that the value follows from the data of the Program alone.
	// It is then kept here when it is first known: undefined where it is none.
	constant bool
	kept     atomic.Pointer[ast.Term]
}

// step is a statement, compiled. It says where to go on.
type step func(*machine) signal

// signal says where execution goes on after a step.
type signal int

const (
	sigNext   signal = 0 // with the next step
	sigBreak  signal = 1 // after the block; n more leave n blocks more
	sigReturn signal = 1<<20 + iota
	sigDone          // the function has the value that each of its rules would give
	sigFound         // after the negation, which does not hold
	sigError         // nowhere: the evaluation has ended
)

// ErrUnsupported: the plan has something that a Program cannot do as topdown does
// it.
var ErrUnsupported = errors.New("not supported")

// maxStatements bounds the statements of a plan.
const maxStatements = 1 << 20

// Compile makes a Program of a plan that has one query. The data is taken as it
// is and must not change. The error wraps ErrUnsupported where the plan is one
// that is better not run by a Program.
func Compile(p *ir.Policy, data document.Value) (*Program, error) {
	return compile(p, data, newIndexes(minScanned, scansBefore), asSmall)
}

func compile(p *ir.Policy, data document.Value, indexes *indexes, held holding) (prog *Program, err error) {
	defer func() {
		if r := recover(); r != nil {
			prog, err = nil, fmt.Errorf("compiling plan: panic: %v", r)
		}
	}()
	if data.Kind() != document.Object {
		return nil, errors.New("compiling plan: data is not an object")
	}
	if p.Plans == nil || len(p.Plans.Plans) != 1 {
		return nil, fmt.Errorf("compiling plan: %w: other than one query", ErrUnsupported)
	}
	if n := statements(p); n > maxStatements {
		return nil, fmt.Errorf("compiling plan: %w: it has %d statements, the limit is %d", ErrUnsupported, n, maxStatements)
	}
	c := &compiler{
		policy: p,
		data:   data.Held(), held: held,
		byName:  make(map[string]*function),
		strings: make([]*ast.Term, len(p.Static.Strings)),
		dynamic: &node{}, patterns: make(map[string]*patterns), paths: make(map[string]*inputPath),
		indexes: indexes, tokens: new(tokens), regexps: new(remembered[*regexp.Regexp]), searchedKeys: searchedKeys{}, givesKeys: map[string]keyKinds{},
	}
	for i, s := range p.Static.Strings {
		c.strings[i] = ast.InternedTerm(s.Value)
	}
	prog = &Program{data: c.data, stmts: statements(p)}
	for _, f := range p.Funcs.Funcs {
		if c.byName[f.Name] != nil {
			return nil, fmt.Errorf("compiling plan: function %q is there twice", f.Name)
		}
		if len(f.Params) < 2 || f.Params[0] != ir.Input || f.Params[1] != ir.Data {
			return nil, fmt.Errorf("compiling plan: %w: function %q takes no input and data", ErrUnsupported, f.Name)
		}
		fn := &function{name: f.Name, index: len(prog.funcs), arity: len(f.Params)}
		c.byName[f.Name] = fn
		prog.funcs = append(prog.funcs, fn)
		if fn.arity == 2 {
			c.dynamic.insert(f.Path, fn)
		}
	}
	c.withData = rewritesData(p)
	c.findConstants()
	functions := func() error {
		for i, f := range p.Funcs.Funcs {
			if err := c.function(prog.funcs[i], f); err != nil {
				return fmt.Errorf("compiling plan: function %q: %w", f.Name, err)
			}
		}
		return nil
	}
	if err := functions(); err != nil {
		return nil, err
	}
	if len(c.givesKeys) > 0 { // which those that were compiled before did not know
		if err := functions(); err != nil {
			return nil, err
		}
	}
	u := newUnit(p.Plans.Plans[0].Blocks, []ir.Local{ir.Input, ir.Data})
	c.unit = u
	c.findAsked(p.Plans.Plans[0].Blocks)
	if prog.blocks, err = c.bodies(p.Plans.Plans[0].Blocks); err != nil {
		return nil, fmt.Errorf("compiling plan: query: %w", err)
	}
	prog.locals, prog.paths = u.size(), len(c.paths)
	prog.reserved, prog.early = c.indexes.budget.Load(), c.early
	c.indexes.paths, c.indexes.roots = nil, nil
	return prog, nil
}

// compiler has what is needed while a plan is compiled.
type compiler struct {
	policy   *ir.Policy
	data     *ast.Term
	held     holding // of locals that all look at where it lies
	withData bool    // some "with" has another data
	byName   map[string]*function
	strings  []*ast.Term
	dynamic  *node
	patterns map[string]*patterns  // :: delimiters → patterns
	paths    map[string]*inputPath // :: keys → path
	indexes  *indexes
	tokens   *tokens
	regexps  *remembered[*regexp.Regexp]
	early    int64 // bytes, of what the data has that is made as OPA has it
	unit     *unit
	nest     []blockKind

	searchedKeys searchedKeys        // of the function that is compiled
	givesKeys    map[string]keyKinds // :: function → those of its keys
	asked        searchedKeys        // of the function that is compiled: see findAsked

	alternatives *ir.BlockStmt // of the block that is compiled, each a rule
}

// node is one of the tree of functions by path.
type node struct {
	fn       *function
	children map[string]*node
}

func (n *node) insert(path []string, f *function) {
	for _, s := range path {
		if n.children == nil {
			n.children = make(map[string]*node)
		}
		child := n.children[s]
		if child == nil {
			child = &node{}
			n.children[s] = child
		}
		n = child
	}
	n.fn = f
}

// blockKind says what a block is the block of.
type blockKind int

const (
	plainBlock blockKind = iota
	scanBlock
	notBlock
	withBlock
)

// function compiles one function.
func (c *compiler) function(fn *function, f *ir.Func) (err error) {
	c.unit = newUnit(f.Blocks, f.Params) // which are the first of the frame
	c.nest = c.nest[:0]
	c.searchedKeys = searchedKeys{}
	c.findAsked(f.Blocks)
	c.unit.findNested(f)
	c.unit.findEarly(c, f)
	fn.early = c.unit.early
	if fn.blocks, err = c.bodies(f.Blocks); err != nil {
		return err
	}
	if k := c.searchedKeys.given(f); k != 0 {
		c.givesKeys[f.Name] = k
	}
	fn.locals = c.unit.size()
	fn.rules = c.indexOf(f)
	return nil
}

// bodies compiles the blocks of a function or query. Each is a rule, in which
// locals mean something else than in the next.
func (c *compiler) bodies(blocks []*ir.Block) ([][]step, error) {
	out := make([][]step, 0, len(blocks))
	for _, b := range blocks {
		if c.alternatives = alternatives(b); c.alternatives == nil {
			c.unit.enter(b)
		}
		steps, err := c.block(b, plainBlock)
		if err != nil {
			return nil, err
		}
		out = append(out, steps)
	}
	return out, nil
}

// block compiles a block.
func (c *compiler) block(b *ir.Block, kind blockKind) ([]step, error) {
	c.nest = append(c.nest, kind)
	defer func() { c.nest = c.nest[:len(c.nest)-1] }()
	if kind == notBlock {
		if err := checkNot(b); err != nil {
			return nil, err
		}
	}
	return c.stmts(b.Stmts)
}

// leaves reports an error for a jump out of so many enclosing blocks that does
// not mean the same everywhere: out of a loop, or of the function.
func (c *compiler) leaves(n uint32) error {
	if int(n) >= len(c.nest) {
		return fmt.Errorf("%w: break leaves the function", ErrUnsupported)
	}
	for i := range int(n) {
		if c.nest[len(c.nest)-1-i] == scanBlock {
			return fmt.Errorf("%w: break leaves a scan", ErrUnsupported)
		}
	}
	return nil
}

// checkNot refuses what a plan cannot negate. The block of a negation that ends
// with a check of what it found is sound. In one without, which a search would
// always come to the end of, there must be no search.
func checkNot(b *ir.Block) error {
	if n := len(b.Stmts); n > 0 {
		if _, ok := b.Stmts[n-1].(*ir.IsDefinedStmt); ok {
			return nil
		}
	}
	for _, s := range b.Stmts {
		switch s := s.(type) {
		case *ir.ScanStmt:
			return fmt.Errorf("%w: negation of a search", ErrUnsupported)
		case *ir.WithStmt:
			if err := checkNot(s.Block); err != nil {
				return err
			}
		}
	}
	return nil
}

// statements counts the statements of a plan.
func statements(p *ir.Policy) (n int) {
	for _, f := range p.Funcs.Funcs {
		for _, b := range f.Blocks {
			walk(b, func(ir.Stmt) { n++ })
		}
	}
	return n
}

// rewritesData reports whether some "with" of the plan has another data.
func rewritesData(p *ir.Policy) (found bool) {
	look := func(s ir.Stmt) {
		if w, ok := s.(*ir.WithStmt); ok && w.Local == ir.Data {
			found = true
		}
	}
	for _, f := range p.Funcs.Funcs {
		for _, b := range f.Blocks {
			walk(b, look)
		}
	}
	for _, b := range p.Plans.Plans[0].Blocks {
		walk(b, look)
	}
	return found
}

// findConstants finds the functions whose value follows from the data alone.
func (c *compiler) findConstants() {
	callers := map[string][]string{} // :: function → those that call it
	varies := map[string]bool{}
	var queue []string
	mark := func(name string) {
		if !varies[name] {
			varies[name] = true
			queue = append(queue, name)
		}
	}
	for _, f := range c.policy.Funcs.Funcs {
		if len(f.Params) != 2 {
			// What it gives follows from its arguments too, but in a function that
			// has none they are data.
			for _, b := range f.Blocks {
				walk(b, func(s ir.Stmt) {
					if readsInput(s) {
						mark(f.Name)
					}
				})
			}
		}
		for _, b := range f.Blocks {
			walk(b, func(s ir.Stmt) {
				switch s := s.(type) {
				case *ir.CallStmt:
					if c.byName[s.Func] != nil {
						callers[s.Func] = append(callers[s.Func], f.Name)
					} else if varying(s.Func) {
						mark(f.Name)
					}
				case *ir.CallDynamicStmt:
					mark(f.Name) // it may be any
				}
				if readsInput(s) {
					mark(f.Name)
				}
			})
		}
	}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		for _, caller := range callers[name] {
			mark(caller)
		}
	}
	for _, f := range c.policy.Funcs.Funcs {
		c.byName[f.Name].constant = len(f.Params) == 2 && !varies[f.Name]
	}
}

// readsInput reports whether a statement looks at the input, other than to hand
// it to a function of the plan as its input.
func readsInput(s ir.Stmt) bool {
	e := effectsOf(s)
	if call, ok := s.(*ir.CallStmt); ok && len(call.Args) > 0 {
		if l, ok := call.Args[0].Value.(ir.Local); ok && l == ir.Input {
			e.reads = e.reads[1:]
		}
	}
	for _, l := range e.reads {
		if l == ir.Input {
			return true
		}
	}
	for _, l := range e.writes {
		if l == ir.Input {
			return true
		}
	}
	return false
}

// varying reports whether a builtin gives something else at another time, for
// another tenant, or does something beside.
func varying(name string) bool {
	b := ast.BuiltinMap[name]
	if b == nil || b.IsNondeterministic() || b.Decl.Result() == nil {
		return true
	}
	switch name {
	case "trace", "internal.print", "print", "internal.test_case", "opa.runtime",
		"crypto.x509.parse_and_verify_certificates",
		"crypto.x509.parse_and_verify_certificates_with_options",
		"json.match_schema", "json.verify_schema":
		return true
	}
	return false
}

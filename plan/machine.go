package plan

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"
	"github.com/open-policy-agent/opa/v1/topdown/cache"
	"github.com/open-policy-agent/opa/v1/topdown/print"
)

// ErrUndefined: the query has no value for this input.
var ErrUndefined = errors.New("undefined")

// ErrResults: the query has more than one value.
var ErrResults = errors.New("multiple evaluation results")

// Env is what an evaluation sees beside its input and the data of its Program.
// The zero Env is good: the time is now, nothing is cached beyond the evaluation
// and nothing stops it.
type Env struct {
	Time    time.Time // that the policy sees; zero: now
	Seed    io.Reader // of what is random; nil: crypto/rand
	Runtime *ast.Term // what opa.runtime shows; nil: nothing

	// Cancel is asked every few steps, and by the builtins that take long.
	Cancel topdown.Cancel

	// StrictBuiltinErrors makes the first error of a builtin the error of the
	// evaluation. Otherwise what has such an error is undefined.
	StrictBuiltinErrors bool

	InterQueryBuiltinCache      cache.InterQueryCache
	InterQueryBuiltinValueCache cache.InterQueryValueCache

	// NDBuiltinCache has what the builtins gave that are no functions of their
	// operands. What it has is taken, what it has not is added.
	NDBuiltinCache builtins.NDBCache

	// JSON parses a JSON text to the value that json.unmarshal has of it, for tokens.
	// Where it has an error OPA's registry is asked. Nil: it always is.
	JSON func(text []byte) (ast.Value, error)

	PrintHook       print.Hook
	RoundTripper    topdown.CustomizeRoundTripper
	RequestMetadata map[string]any
	Capabilities    *ast.Capabilities

	// MaxSteps bounds the steps of an evaluation: calls, and elements looked at.
	// 0: there is no bound.
	MaxSteps int64

	// MaxMemory bounds the values that an evaluation builds, in bytes as package
	// plan estimates them: all together, also those it no longer needs. 0: there is
	// no bound.
	MaxMemory int64
}

// machine runs one evaluation at a time and is then used for the next.
type machine struct {
	prog *Program
	env  Env // a copy, so that a caller's need not be on the heap
	ctx  context.Context

	regs  []*ast.Term // the frame of the function that runs: local → value, nil where undefined
	stack []*ast.Term // what frames are cut from
	top   int         // of stack, how much is in use
	high  int         // of stack, how much has been in use

	scope  *scope
	scopes []*scope // those beside base that have been used

	base scope

	found  []*ast.Term       // :: path of the input → what is there, undefined, or nil if not known
	called map[*function]int // :: function with arguments → how often it has been called

	cancel   topdown.Cancel
	steps    int64
	most     int64 // steps; 0: no bound
	left     int64 // of the bytes that may be built
	err      error // why the evaluation ended
	failed   error // the first error of a builtin
	failures int   // how many builtins have had one

	bctx    topdown.BuiltinContext
	loc     topdown.BuiltinContext // for builtins that look at no context
	ready   bool                   // bctx is set
	time    *ast.Term              // that the policy sees, once it has been asked for
	output  *ast.Term              // of the builtin that was called last
	outputs []*ast.Term            // of a relation
	// operands are those of the builtin that is called, which must not keep the slice.
	operands []*ast.Term
	take     func(*ast.Term) error
	collect  func(*ast.Term) error

	result  *ast.Term // the value of the query
	several bool      // it has another value too
	all     ast.Set   // all results, where they are wanted
}

// scope is what is remembered for one input and one data: the values of the rules
// without arguments. A "with" opens another.
type scope struct {
	input, data *ast.Term
	memo        []*ast.Term          // :: function → its value, undefined, or nil if not known
	calls       map[*function]*calls // :: function with arguments → what it has given
}

// undefined stands for no value where nil means not known.
var undefined = new(ast.Term)

// Sizes, in locals, of what a machine keeps between evaluations.
const (
	stackFirst = 1 << 10
	stackKept  = 1 << 16
)

var machines = sync.Pool{New: func() any {
	m := &machine{stack: make([]*ast.Term, stackFirst)}
	m.take = func(t *ast.Term) error {
		m.output = t
		return nil
	}
	m.collect = func(t *ast.Term) error {
		m.outputs = append(m.outputs, t)
		if !m.charge(memoryElement) {
			return topdown.Halt{Err: m.err}
		}
		return nil
	}
	return m
}}

// Eval returns the value of the query for an input; nil is an undefined input.
// Where env is nil it is the zero Env.
//
// The error is ErrUndefined, ErrResults, one that wraps ErrBound, one that wraps
// ErrUnsupported where topdown must be asked what this is, or a
// *topdown.Error with the code that topdown gives. Eval may be called by any number of goroutines at once.
func (p *Program) Eval(ctx context.Context, input ast.Value, env *Env) (ast.Value, error) {
	var in *ast.Term
	if input != nil {
		in = ast.NewTerm(input)
	}
	m := machines.Get().(*machine)
	err := m.eval(ctx, p, in, env)
	result, several := m.result, m.several
	m.reset()
	switch {
	case err != nil:
		return nil, err
	case result == nil:
		return nil, ErrUndefined
	case several:
		return nil, ErrResults
	}
	return result.Value, nil
}

// results returns all results of any query: objects from variable to value.
func (p *Program) results(ctx context.Context, input *ast.Term, env *Env) (ast.Set, error) {
	m := machines.Get().(*machine)
	defer m.reset()
	m.all = ast.NewSet()
	err := m.eval(ctx, p, input, env)
	return m.all, err
}

func (m *machine) eval(ctx context.Context, p *Program, input *ast.Term, env *Env) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &topdown.Error{Code: topdown.InternalErr, Message: fmt.Sprintf("panic: %v", r)}
		}
	}()
	m.prog, m.ctx = p, ctx
	if env != nil {
		m.env = *env
	}
	m.cancel, m.most = m.env.Cancel, m.env.MaxSteps
	if m.left = m.env.MaxMemory; m.left == 0 {
		m.left = math.MaxInt64
	}
	m.base.input, m.base.data = input, p.data
	m.base.size(len(p.funcs))
	if cap(m.found) < p.paths {
		m.found = make([]*ast.Term, p.paths)
	}
	m.found = m.found[:p.paths]
	m.scope = &m.base

	if m.stopped() {
		return m.err
	}
	m.regs = m.frame(p.locals)
	m.regs[0], m.regs[1] = input, p.data
	for _, b := range p.blocks {
		if s := runBlock(m, b); s >= sigReturn {
			break
		}
	}
	switch {
	case m.failed != nil && m.env.StrictBuiltinErrors:
		return m.failed
	case m.err != nil:
		return m.err
	}
	return nil
}

// frame cuts a cleared frame of n locals from the stack.
func (m *machine) frame(n int) []*ast.Term {
	if m.top+n > len(m.stack) {
		// Frames that are in use hold on to the stack they were cut from.
		m.stack = make([]*ast.Term, 2*len(m.stack)+n)
		m.high = 0
	}
	f := m.stack[m.top : m.top+n : m.top+n]
	m.top += n
	m.high = max(m.high, m.top)
	clear(f)
	return f
}

// reset makes the machine ready for another evaluation, so that it keeps nothing
// of this one alive.
func (m *machine) reset() {
	clear(m.stack[:m.high])
	if len(m.stack) > stackKept {
		m.stack = make([]*ast.Term, stackFirst)
	}
	m.top, m.high, m.regs = 0, 0, nil
	m.base.forget()
	m.scope, m.scopes = nil, nil
	m.prog, m.env, m.ctx = nil, Env{}, nil
	m.cancel, m.steps, m.most = nil, 0, 0
	m.err, m.failed, m.failures = nil, nil, 0
	if m.ready {
		if m.bctx.Cache != nil {
			clear(m.bctx.Cache)
		}
		m.bctx = topdown.BuiltinContext{Cache: m.bctx.Cache}
		m.ready = false
	}
	m.loc.Location, m.time = nil, nil
	clear(m.called)
	clear(m.found)
	m.output, m.result, m.several, m.all = nil, nil, false, nil
	clear(m.operands[:cap(m.operands)])
	clear(m.outputs[:cap(m.outputs)])
	m.outputs = m.outputs[:0]
	machines.Put(m)
}

// size makes room for what n functions give.
func (s *scope) size(n int) {
	if cap(s.memo) < n {
		s.memo = make([]*ast.Term, n)
	}
	s.memo = s.memo[:n]
}

func (s *scope) forget() {
	s.input, s.data = nil, nil
	clear(s.memo)
	s.calls = nil
}

// enter returns the scope of an input and data. Since what is remembered depends
// on nothing else, going back to those of before finds it all again.
func (m *machine) enter(input, data *ast.Term) *scope {
	if m.base.input == input && m.base.data == data {
		return &m.base
	}
	for i := len(m.scopes) - 1; i >= 0 && i >= len(m.scopes)-maxScopes; i-- {
		if s := m.scopes[i]; s.input == input && s.data == data {
			return s
		}
	}
	s := &scope{input: input, data: data}
	s.size(len(m.prog.funcs))
	if len(m.scopes) >= maxScopes {
		copy(m.scopes, m.scopes[1:])
		m.scopes = m.scopes[:maxScopes-1]
	}
	m.scopes = append(m.scopes, s)
	return s
}

// maxScopes is how many scopes beside the first are remembered.
const maxScopes = 8

// cancelSteps is after how many steps an evaluation asks whether to stop.
const cancelSteps = 8

// step counts a step and reports whether the evaluation must stop.
func (m *machine) step() bool {
	m.steps++
	if m.steps%cancelSteps != 0 {
		return false
	}
	return m.stopped()
}

func (m *machine) stopped() bool {
	if m.most > 0 && m.steps > m.most {
		m.err = bound("evaluation takes more than %d steps", m.most)
		return true
	}
	if m.cancel != nil && m.cancel.Cancelled() {
		m.err = &topdown.Error{Code: topdown.CancelErr, Message: "caller cancelled query execution"}
		return true
	}
	return false
}

// now is the time that the policy sees, in nanoseconds. It is asked for once.
func (m *machine) now() int64 {
	if m.env.Time.IsZero() {
		m.env.Time = time.Now()
	}
	return m.env.Time.UnixNano()
}

// timeTerm is now as a number of the policy, the same one each time.
func (m *machine) timeTerm() *ast.Term {
	if m.time == nil {
		m.time = ast.NewTerm(ast.Number(strconv.FormatInt(m.now(), 10)))
	}
	return m.time
}

// context makes what builtins see, once for an evaluation.
func (m *machine) context() {
	m.ready = true
	env := &m.env
	b := &m.bctx
	b.Context = m.ctx
	b.Metrics = metrics.NoOp()
	b.Seed = env.Seed
	if b.Seed == nil {
		b.Seed = rand.Reader
	}
	b.Cancel = env.Cancel
	b.Runtime = env.Runtime
	if b.Cache == nil {
		b.Cache = builtins.Cache{}
	}
	b.InterQueryBuiltinCache = env.InterQueryBuiltinCache
	b.InterQueryBuiltinValueCache = env.InterQueryBuiltinValueCache
	b.NDBuiltinCache = env.NDBuiltinCache
	b.PrintHook = env.PrintHook
	b.RoundTripper = env.RoundTripper
	b.RequestMetadata = env.RequestMetadata
	if b.RequestMetadata == nil {
		b.RequestMetadata = noMetadata
	}
	b.Capabilities = env.Capabilities
}

var noMetadata = map[string]any{}

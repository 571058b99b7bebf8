package policy

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// rules are those of a policy as topdown evaluates them.
//
// They are most of what a small policy takes. Where plans answer all that can be
// asked of one, they are not kept: topdown is asked by Explain, by Verify and after
// an error of a plan, and then they are made again from the modules, once.
type rules struct {
	current atomic.Pointer[compiled] // nil: to be made
	size    int64                    // that they take while they are there, in bytes

	// What they are made of again; zero where they are kept from the beginning.
	mu    sync.Mutex // held while they are made
	parts []Named
	opts  Options
}

// maxRemade bounds the rules that are made again, by the bytes of their text: an
// evaluation waits for that.
const maxRemade = 32 << 10

// keepRules keeps what compiling p has made, if it is to be kept.
func (p *Policy) keepRules(c *compiled, parts []Named, opts Options) {
	source := int64(0)
	for _, part := range parts {
		source += part.source
	}
	p.rules.size = sizeFixed + sizeRules*source
	if !usesWith(c.compiler) {
		p.rules.size -= sizeTypes
	}
	kept := p.labelled || opts.Print || source > maxRemade // topdown tells of labels, and what is printed
	for _, e := range p.entries {
		kept = kept || e.program == nil
	}
	if kept {
		c.strip()
		p.rules.current.Store(c)
		return
	}
	p.rules.parts, p.rules.opts = parts, opts
}

// queryOf returns the query of an entry point, for one evaluation.
func (p *Policy) queryOf(e *entry) (topdown.Query, error) {
	c := p.rules.current.Load()
	if c == nil {
		var err error
		if c, err = p.makeRules(); err != nil {
			return topdown.Query{}, err
		}
	}
	return c.queries[e.name], nil
}

// makeRules makes the rules again.
func (p *Policy) makeRules() (c *compiled, err error) {
	r := &p.rules
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.current.Load(); c != nil {
		return c, nil
	}
	defer func() {
		if r := recover(); r != nil {
			c, err = nil, fmt.Errorf("compiling: panic: %v", r)
		}
		if err != nil { // it was without one before
			err = &faultError{ErrEval, err}
		}
	}()
	compiler, err := compile(modulesOf(r.parts), p.store, &r.opts)
	if err != nil {
		return nil, err
	}
	c = newCompiled(compiler, p.store)
	for name := range p.entries {
		ref, _, err := refOf(name)
		if err != nil {
			return nil, err
		}
		if err := c.prepare(name, ref); err != nil {
			return nil, err
		}
	}
	c.strip()
	r.current.Store(c)
	return c, nil
}

// modulesOf returns the modules of parts, by names of which each is there once.
func modulesOf(parts []Named) map[string]*ast.Module {
	modules := make(map[string]*ast.Module)
	for _, part := range parts {
		for path, m := range part.modules {
			modules[part.Name+"/"+strings.TrimPrefix(path, "/")] = m
		}
	}
	return modules
}

// compile compiles modules.
func compile(modules map[string]*ast.Module, store *store, opts *Options) (*ast.Compiler, error) {
	compiler := ast.NewCompiler().
		WithCapabilities(capabilitiesOf(opts)).
		WithKeepModules(false).
		WithEnablePrintStatements(opts.Print).
		WithPathConflictsCheck(store.conflicts)
	if compiler.Compile(modules); compiler.Failed() {
		return nil, fmt.Errorf("compiling: %w", compiler.Errors)
	}
	if err := checkOccurs(compiler.Modules); err != nil {
		return nil, fmt.Errorf("compiling: %w", err)
	}
	return compiler, nil
}

// compiled are the rules of a policy, with the queries of its entry points.
type compiled struct {
	compiler *ast.Compiler
	store    *store
	queries  map[string]topdown.Query // :: entry point → "data.<path> = result"; copied for each evaluation
}

func newCompiled(compiler *ast.Compiler, store *store) *compiled {
	return &compiled{compiler, store, map[string]topdown.Query{}}
}

// prepare compiles the query of an entry point.
func (c *compiled) prepare(name string, ref ast.Ref) error {
	body, err := c.compiler.QueryCompiler().Compile(questionOf(ref))
	if err != nil {
		return err
	}
	c.queries[name] = *topdown.NewQuery(body).
		WithCompiler(c.compiler).
		WithStore(c.store).
		WithTransaction(c.store).
		WithBaseCache(baseCache{c.store}).
		WithMetrics(metrics.NoOp()).
		WithRequestMetadata(noMetadata)
	return nil
}

// questionOf returns the query for the value of ref.
func questionOf(ref ast.Ref) ast.Body {
	return ast.NewBody(ast.Equality.Expr(ast.NewTerm(ref), ast.NewTerm(resultVar)))
}

// strip leaves out what only compiling wants, of which there is no more.
func (c *compiled) strip() {
	if !usesWith(c.compiler) {
		// Types are for compiling queries, and for "with", which may replace a
		// function. They are half of a small policy.
		c.compiler.TypeEnv = nil
	}
	c.compiler.Modules, c.compiler.ModuleTree, c.compiler.Graph = nil, nil, nil
}

// defines reports whether a rule or data can give ref, which is path, a value.
func (c *compiled) defines(ref ast.Ref, path storage.Path) bool {
	return c.store.find(path).Defined() ||
		len(c.compiler.GetRulesDynamicWithOpts(ref, ast.RulesOptions{IncludeHiddenModules: true})) > 0
}

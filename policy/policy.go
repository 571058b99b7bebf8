// Package policy answers: it compiles a set of bundles into an immutable
// Policy and asks it questions.
//
// In the common case a tenant has one bundle. Prepare turns its files into a
// Part: parsed modules and one immutable data document. Compile turns the parts
// into a Policy with a fixed set of entry points, and Decide evaluates one entry
// point for one input.
//
// A Policy never changes. It owns no lock, no file and no goroutine, so any
// number of goroutines may ask it at once, an update is a new Policy in its
// place, and what is no longer asked is garbage. Its data is read through a
// store that cannot be written and takes no lock.
//
// An entry point is evaluated by topdown, or by OPA's plan of it, which package plan
// runs: Options.Evaluator says which is wanted, Evaluated which it is. Where a plan
// ends with an error topdown is asked again, whose word it is then. Verify asks both.
//
// A Policy holds only what follows from its content, and may be shared by all
// tenants that have the same content. What belongs to one tenant (its labels,
// its caches) is in an Env, given with each question.
//
// Policies are untrusted: they are compiled without the builtins that reach the
// network, or with http.send alone where there is a Network for it, opa.runtime
// shows labels and no environment, and schemas never refer to remote documents.
package policy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/gatehouse-authz/gatehouse/plan"
)

// Policy is a set of bundles, compiled. It is never changed, but that it goes
// back to topdown where Verify finds a difference.
type Policy struct {
	rules        rules
	store        *store
	capabilities *ast.Capabilities
	entries      map[string]*entry // :: entry point → its compiled query
	bundles      []Revision
	headers      headerRules
	labelled     bool // some rule has labels, which an Observed can ask for
	size         int64

	distrusted atomic.Bool // a plan has answered otherwise than topdown
}

// Revision names one bundle of a Policy and its revision.
type Revision struct {
	Name     string
	Revision string
}

// Named is a Part under the name that its user gives the bundle.
type Named struct {
	Name string
	*Part
}

// Options are what a Policy is compiled with. They are part of its identity:
// equal parts under equal names with equal options make equal policies.
type Options struct {
	// Entries are the entry points that may be asked, like
	// "envoy/authz/allow": paths below data, as ParseEntry returns them, or ""
	// for all of data. That an entry point has no rule is not an error: its
	// decision is undefined.
	Entries []string

	// Optional are entry points that may be asked only if a rule or the data
	// of a bundle says something about them: see Has. To ask for one that is
	// not there is ErrEntry.
	Optional []string

	// Network says that the policy may call http.send, which then reaches what
	// the Network of the Env is for. Without it, such a policy does not compile.
	Network bool

	// AllowHeaders names the headers that the policy may change although
	// they are reserved: in lower case, a trailing "*" matches any rest.
	AllowHeaders []string

	// Evaluator says how the entry points are evaluated. "" is Auto.
	Evaluator Evaluator

	// Print keeps calls of print, which Explain tells. Without it they are
	// compiled away.
	Print bool
}

// entry is one entry point.
type entry struct {
	name  string
	reads reads
	slice *Slice // of the input

	program   *plan.Program // nil: topdown runs the query
	unplanned error         // why there is none where one was wanted
}

// resultVar captures the value of an entry point.
const resultVar = ast.Var("result")

// ParseEntry returns the entry point that path names: leading, trailing and
// doubled slashes are dropped, as opa-envoy-plugin does.
func ParseEntry(path string) (string, error) {
	segments := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	if len(segments) == 0 {
		return "", fmt.Errorf("entry point %q names nothing", path)
	}
	return strings.Join(segments, "/"), nil
}

// refOf returns data.<entry>, and its path below data. A segment of digits alone
// indexes an array.
func refOf(entry string) (ast.Ref, storage.Path, error) {
	path, ok := storage.ParsePath("/" + entry)
	if !ok {
		return nil, nil, fmt.Errorf("entry point %q is not a path", entry)
	}
	return path.Ref(ast.DefaultRootDocument), path, nil
}

// Compile compiles parts into a Policy. Its error says which module, entry
// point or pair of bundles is at fault, with the place in the file.
//
// Compile cannot be interrupted; what bounds it is the size of the bundles.
func Compile(parts []Named, opts Options) (p *Policy, err error) {
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, fmt.Errorf("compiling: panic: %v", r)
		}
	}()
	if err := checkRoots(parts); err != nil {
		return nil, err
	}
	evaluator := opts.Evaluator
	if evaluator == "" || evaluator == Auto {
		evaluator = Evaluator(autoEvaluator)
	}

	store, err := newStore(parts)
	if err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	revisions := make([]Revision, 0, len(parts))
	for _, part := range parts {
		revisions = append(revisions, Revision{part.Name, part.Revision})
	}

	compiler, err := compile(modulesOf(parts), store, &opts)
	if err != nil {
		return nil, err
	}
	p = &Policy{
		store:        store,
		capabilities: compiler.Capabilities(),
		entries:      make(map[string]*entry, len(opts.Entries)),
		bundles:      revisions,
		headers:      newHeaderRules(opts.AllowHeaders),
		labelled:     compiler.GetAnnotationSet().HasLabels(),
		size:         sizePolicy,
	}
	compiled := newCompiled(compiler, store)
	for _, path := range opts.Entries {
		if err := p.prepare(compiled, path, false, evaluator); err != nil {
			return nil, fmt.Errorf("entry point %q: %w", path, err)
		}
	}
	for _, path := range opts.Optional {
		if err := p.prepare(compiled, path, true, evaluator); err != nil {
			return nil, fmt.Errorf("entry point %q: %w", path, err)
		}
	}
	p.keepRules(compiled, parts, opts)
	return p, nil
}

// prepare makes path an entry point; one that is optional only if it is defined.
func (p *Policy) prepare(c *compiled, path string, optional bool, evaluator Evaluator) error {
	ref, segments, err := refOf(path)
	if err != nil {
		return err
	}
	if p.entries[path] != nil || optional && !c.defines(ref, segments) {
		return nil
	}
	if err := c.prepare(path, ref); err != nil {
		return err
	}
	e := &entry{name: path}
	e.reads, e.slice = readsOf(c.compiler, ref)
	p.entries[path] = e
	if evaluator == Plan {
		p.plan(c.compiler, e, questionOf(ref))
	}
	return nil
}

// Has reports whether the entry point may be asked.
func (p *Policy) Has(entry string) bool { return p.entries[entry] != nil }

// noMetadata is shared by all evaluations, which only read it.
var noMetadata = map[string]any{}

// Revisions returns the bundles of p in the order of their names. It must not
// be changed.
func (p *Policy) Revisions() []Revision { return p.bundles }

// Decide asks the entry point and reads its value as a decision. Where env is
// nil the policy sees no labels and remembers nothing between questions.
//
// The error wraps ErrEntry, ErrUndefined, ErrConflict, ErrResult, ErrEval or
// ErrCanceled; the Decision is then the zero one, a denial, but for Value,
// which holds an ill-typed result.
//
// Decide returns soon after cancel is set, unless a single builtin keeps it.
func (p *Policy) Decide(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel) (Decision, error) {
	return p.DecideObserved(ctx, entry, input, env, cancel, nil)
}

// DecideObserved is Decide that also tells, in o, what the evaluation did. A nil
// o is told nothing.
func (p *Policy) DecideObserved(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel, o *Observed) (Decision, error) {
	v, err := p.EvalObserved(ctx, entry, input, env, cancel, o)
	if err != nil {
		return Decision{}, err
	}
	d, err := decisionOf(v, &p.headers)
	if err != nil {
		return Decision{Value: v}, err
	}
	return d, nil
}

// Eval asks the entry point and returns its value as it is. Its errors are
// those of Decide without ErrResult. A nil input is undefined to the policy.
func (p *Policy) Eval(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel) (ast.Value, error) {
	return p.EvalObserved(ctx, entry, input, env, cancel, nil)
}

// EvalObserved is to Eval what DecideObserved is to Decide.
func (p *Policy) EvalObserved(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel, o *Observed) (ast.Value, error) {
	e, ok := p.entries[entry]
	if !ok {
		return nil, fmt.Errorf("%w %q", ErrEntry, entry)
	}
	if o == nil {
		return p.evaluate(ctx, e, input, env, cancel, nil)
	}
	return o.observe(func() (ast.Value, error) { return p.evaluate(ctx, e, input, env, cancel, o) })
}

// evaluate has the plan of an entry point answer, or topdown.
func (p *Policy) evaluate(ctx context.Context, e *entry, input ast.Value, env *Env, cancel *Cancel, o *Observed) (ast.Value, error) {
	told := o != nil && (p.labelled || o.WantPrints) // what only topdown tells
	if p.planned(e) && !told {
		if v, ok, err := p.runPlan(ctx, e, input, env, cancel, o); ok {
			return v, err
		}
	}
	return p.runTopdown(ctx, e, input, env, cancel, o)
}

func (p *Policy) runTopdown(ctx context.Context, e *entry, input ast.Value, env *Env, cancel *Cancel, o *Observed) (ast.Value, error) {
	q, err := p.queryOf(e)
	if err != nil {
		return nil, err
	}
	if input != nil {
		q.WithInput(ast.NewTerm(input))
	}
	if cancel != nil {
		q.WithCancel(cancel)
	}
	if env != nil {
		env.lend(&q, e)
	} else {
		q.WithRuntime(noRuntime)
	}
	if o == nil {
		return run(ctx, &q)
	}
	return o.run(ctx, &q, p.labelled)
}

// run evaluates a query that has exactly one value.
func run(ctx context.Context, q *topdown.Query) (ast.Value, error) {
	var value ast.Value
	results := 0
	err := q.Iter(ctx, func(r topdown.QueryResult) error {
		results++
		value = r[resultVar].Value
		return nil
	})
	switch {
	case err != nil:
		return nil, evalError(err)
	case results == 0:
		return nil, ErrUndefined
	case results > 1:
		return nil, &faultError{ErrConflict, fmt.Errorf("multiple evaluation results")}
	}
	return value, nil
}

// Document returns the value of an entry point that needs no input, such as a
// configuration. The entry point "" is all of data, without what is below
// system. Its errors are those of Eval.
func (p *Policy) Document(ctx context.Context, entry string, env *Env, cancel *Cancel) (ast.Value, error) {
	v, err := p.Eval(ctx, entry, nil, env, cancel)
	if obj, ok := v.(ast.Object); ok && entry == "" {
		return without(obj, ast.SystemDocumentKey), nil
	}
	return v, err
}

// without returns obj without the member of that key, which may share what it
// holds with obj.
func without(obj ast.Object, key ast.Value) ast.Object {
	rest := ast.NewObjectWithCapacity(obj.Len())
	obj.Foreach(func(k, v *ast.Term) {
		if k.Value.Compare(key) != 0 {
			rest.Insert(k, v)
		}
	})
	return rest
}

func evalError(err error) error {
	switch {
	case topdown.IsCancel(err):
		return &faultError{ErrCanceled, err}
	case errors.Is(err, conflict):
		return &faultError{ErrConflict, err}
	}
	return &faultError{ErrEval, err}
}

// conflict is any error of topdown with this code.
var conflict = &topdown.Error{Code: topdown.ConflictErr}

// checkRoots reports bundles that claim the same part of data.
func checkRoots(parts []Named) error {
	if len(parts) == 0 {
		return fmt.Errorf("no bundle to compile")
	}
	for i, a := range parts {
		for _, b := range parts[i+1:] {
			if a.Name == b.Name {
				return fmt.Errorf("bundle %q is named twice", a.Name)
			}
			for _, ra := range a.Roots {
				for _, rb := range b.Roots {
					if overlap(ra, rb) {
						return fmt.Errorf("bundles %q and %q overlap: roots %q and %q", a.Name, b.Name, ra, rb)
					}
				}
			}
		}
	}
	return nil
}

// overlap reports whether one root lies within the other.
func overlap(a, b string) bool {
	as, bs := segmentsOf(a), segmentsOf(b)
	n := min(len(as), len(bs))
	return slices.Equal(as[:n], bs[:n])
}

func segmentsOf(root string) []string {
	if root = strings.Trim(root, "/"); root == "" {
		return nil
	}
	return strings.Split(root, "/")
}

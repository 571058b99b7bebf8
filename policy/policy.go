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
// A Policy holds only what follows from its content, and may be shared by all
// tenants that have the same content. What belongs to one tenant (its labels,
// its caches) is in an Env, given with each question.
//
// Policies are untrusted: they are compiled without the builtins that reach the
// network, opa.runtime shows labels and no environment, and schemas never refer
// to remote documents.
package policy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// Policy is a set of bundles, compiled. It is never changed.
type Policy struct {
	compiler *ast.Compiler
	store    *store
	entries  map[string]*entry // :: entry point → its compiled query
	bundles  []Revision
	headers  headerRules
	size     int64
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
	// "envoy/authz/allow": paths below data, as ParseEntry returns them. That
	// an entry point has no rule is not an error: its decision is undefined.
	Entries []string

	// AllowHeaders names the headers that the policy may change although
	// they are reserved: in lower case, a trailing "*" matches any rest.
	AllowHeaders []string
}

// entry is one entry point: the query "data.<path> = result", compiled.
type entry struct {
	query     topdown.Query // copied for each evaluation
	readsBody bool
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

// refOf returns data.<entry>. A segment of digits alone indexes an array.
func refOf(entry string) (ast.Ref, error) {
	path, ok := storage.ParsePath("/" + entry)
	if !ok {
		return nil, fmt.Errorf("entry point %q is not a path", entry)
	}
	return path.Ref(ast.DefaultRootDocument), nil
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

	store := newStore(parts)
	size := int64(sizeFixed)
	modules := make(map[string]*ast.Module)
	revisions := make([]Revision, 0, len(parts))
	for _, part := range parts {
		for path, m := range part.modules {
			modules[part.Name+"/"+strings.TrimPrefix(path, "/")] = m
		}
		revisions = append(revisions, Revision{part.Name, part.Revision})
		size += sizeRules * part.source
	}

	compiler := ast.NewCompiler().
		WithCapabilities(capabilities).
		WithKeepModules(false).
		WithPathConflictsCheck(store.conflicts)
	if compiler.Compile(modules); compiler.Failed() {
		return nil, fmt.Errorf("compiling: %w", compiler.Errors)
	}

	p = &Policy{
		compiler: compiler,
		store:    store,
		entries:  make(map[string]*entry, len(opts.Entries)),
		bundles:  revisions,
		headers:  newHeaderRules(opts.AllowHeaders),
		size:     size,
	}
	for _, path := range opts.Entries {
		e, err := p.prepare(path)
		if err != nil {
			return nil, fmt.Errorf("entry point %q: %w", path, err)
		}
		p.entries[path] = e
	}
	return p, nil
}

func (p *Policy) prepare(path string) (*entry, error) {
	ref, err := refOf(path)
	if err != nil {
		return nil, err
	}
	qc := p.compiler.QueryCompiler()
	body, err := qc.Compile(ast.NewBody(ast.Equality.Expr(ast.NewTerm(ref), ast.NewTerm(resultVar))))
	if err != nil {
		return nil, err
	}
	query := topdown.NewQuery(body).
		WithCompiler(p.compiler).
		WithQueryCompiler(qc).
		WithStore(p.store).
		WithTransaction(p.store).
		WithMetrics(metrics.NoOp()).
		WithRequestMetadata(noMetadata)
	return &entry{query: *query, readsBody: readsBody(p.compiler, ref)}, nil
}

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
	v, err := p.Eval(ctx, entry, input, env, cancel)
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
// those of Decide without ErrResult.
func (p *Policy) Eval(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel) (ast.Value, error) {
	e, ok := p.entries[entry]
	if !ok {
		return nil, fmt.Errorf("%w %q", ErrEntry, entry)
	}
	q := e.query // a copy: With… below changes only this one
	q.WithInput(ast.NewTerm(input))
	if cancel != nil {
		q.WithCancel(cancel)
	}
	if env != nil {
		q.WithRuntime(env.runtime).WithInterQueryBuiltinValueCache(env.values)
	} else {
		q.WithRuntime(noRuntime)
	}

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

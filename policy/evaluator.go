package policy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/gatehouse-authz/gatehouse/plan"
)

// Evaluator says how a policy is evaluated. What it answers is the same.
type Evaluator string

const (
	// Auto is what this version takes for the best: Plan.
	Auto Evaluator = "auto"

	// Topdown is OPA's evaluator.
	Topdown Evaluator = "topdown"

	// Plan runs OPA's plan of each entry point, as plan.Program does, and Topdown
	// where that cannot be: Evaluated tells of both.
	Plan Evaluator = "plan"
)

// autoEvaluator is what Auto stands for. The linker sets it where tests are to run
// with the other.
var autoEvaluator = string(Plan)

// ParseEvaluator returns the Evaluator of that name.
func ParseEvaluator(name string) (Evaluator, error) {
	switch e := Evaluator(name); e {
	case Auto, Topdown, Plan:
		return e, nil
	}
	return "", fmt.Errorf("evaluator %q is not auto, topdown or plan", name)
}

// Evaluated says how one entry point is evaluated.
type Evaluated struct {
	Entry string
	By    Evaluator // Topdown or Plan
	Why   error     // why it is Topdown where it was to be Plan
}

// Evaluated says how the entry points are evaluated, by name; observed is whether
// evaluations have an Observed, which asks for the labels of rules where there are
// any. Where it asks for what is printed, it is Topdown all the same.
func (p *Policy) Evaluated(observed bool) []Evaluated {
	list := make([]Evaluated, 0, len(p.entries))
	for _, name := range slices.Sorted(maps.Keys(p.entries)) {
		e := p.entries[name]
		switch {
		case p.planned(e) && observed && p.labelled:
			list = append(list, Evaluated{name, Topdown, errLabelled})
		case p.planned(e):
			list = append(list, Evaluated{name, Plan, nil})
		case e.program != nil:
			list = append(list, Evaluated{name, Topdown, errDistrusted})
		default:
			list = append(list, Evaluated{name, Topdown, e.unplanned})
		}
	}
	return list
}

// plan has the entry point run by its plan, if that can be.
func (p *Policy) plan(compiler *ast.Compiler, e *entry, body ast.Body) {
	planned, err := plan.Of(compiler, body)
	if err == nil {
		e.program, err = plan.Compile(planned, p.store.root)
	}
	if e.unplanned = err; err == nil {
		p.size += e.program.Size()
	}
}

// maxMemory is how much one evaluation by a plan may build, in bytes as package plan
// estimates them: far more than a decision needs, and little enough for each worker
// to have at once. An evaluation over it has ErrEval. Of steps there is no bound of
// its own: an evaluation ends when its Cancel is set, which it looks at every few
// steps, and time is what is short.
const maxMemory = plan.MaxBuilt

// runPlan evaluates an entry point by its plan. It reports false where topdown is
// to be asked: an error is topdown's to tell, in its words, and there are conflicts
// that a plan meets where topdown does not look.
func (p *Policy) runPlan(ctx context.Context, e *entry, input ast.Value, env *Env, cancel *Cancel, o *Observed) (ast.Value, bool, error) {
	lent := plan.Env{MaxMemory: maxMemory, JSON: tokenJSON, Runtime: noRuntime, Capabilities: p.capabilities, RequestMetadata: noMetadata}
	if cancel != nil {
		lent.Cancel = cancel
	}
	if env != nil {
		lent.Runtime = env.runtime(e)
		lent.InterQueryBuiltinValueCache = env.values
		if env.network != nil {
			lent.InterQueryBuiltinCache = env.answers
			lent.RoundTripper = env.network
		}
	}
	if o != nil {
		lent.Time = o.At
		if o.WantBuiltins || o.Builtins != nil {
			lent.NDBuiltinCache = resultsOf(o.Builtins)
		}
	}
	v, err := e.program.Eval(ctx, input, &lent)
	if lent.NDBuiltinCache != nil {
		o.Builtins = lent.NDBuiltinCache.AsValue().(ast.Object)
	}
	switch {
	case err == nil:
		return v, true, nil
	case errors.Is(err, plan.ErrUndefined):
		return nil, true, ErrUndefined
	case topdown.IsCancel(err), errors.Is(err, plan.ErrBound):
		return nil, true, evalError(err) // topdown would not end either
	}
	if env != nil && env.again != nil {
		env.again.Add(1)
	}
	return nil, false, nil
}

// tokenJSON parses what is in a token: where ParseJSON has an error, topdown's own
// way is gone.
func tokenJSON(text []byte) (ast.Value, error) { return ParseJSON(text, nil) }

// Difference is a question that a plan and topdown answered otherwise.
type Difference struct {
	Entry   string
	Input   ast.Value
	Plan    ast.Value // nil: undefined
	Topdown ast.Value // nil: undefined, or an error
	Err     error     // of topdown
}

// Verify asks both evaluators and returns how their answers differ, or nil, and
// whether it has. Both
// see the same time and the same results of builtins that are no functions of their
// operands. From a difference on, topdown answers alone.
//
// Nothing is verified where the entry point may ask the network, is not evaluated
// by its plan, or cancel is set before the end.
func (p *Policy) Verify(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel) (d *Difference, verified bool) {
	e, ok := p.entries[entry]
	if !ok || !p.planned(e) || env != nil && env.network != nil && e.reads.varies {
		return nil, false
	}
	seen := &Observed{WantBuiltins: true}
	want, wantErr := seen.observe(func() (ast.Value, error) { return p.runTopdown(ctx, e, input, env, cancel, seen) })
	if errors.Is(wantErr, ErrCanceled) {
		return nil, false
	}
	got, ok, gotErr := p.runPlan(ctx, e, input, env, cancel, &Observed{At: seen.At, Builtins: seen.Builtins})
	if !ok || errors.Is(gotErr, ErrCanceled) || errors.Is(gotErr, plan.ErrBound) {
		return nil, false // topdown answers then, or has no such bound
	}
	undefined := errors.Is(wantErr, ErrUndefined)
	if gotErr == nil && wantErr == nil && got.Compare(want) == 0 || gotErr != nil && undefined {
		return nil, true
	}
	p.distrusted.Store(true)
	d = &Difference{Entry: entry, Input: input, Plan: got, Topdown: want}
	if !undefined {
		d.Err = wantErr
	}
	return d, true
}

// planned reports whether the plan of an entry point answers.
func (p *Policy) planned(e *entry) bool { return e.program != nil && !p.distrusted.Load() }

// errDistrusted is why topdown answers what a plan has answered otherwise.
var errDistrusted = errors.New("the plan of this policy has answered otherwise than topdown")

// errLabelled is why topdown answers where a plan could.
var errLabelled = errors.New("rules of this policy have labels, which are recorded with its decisions: a plan does not tell them")

// String says where the answers differ, and how, without what texts are there:
// these may be secrets.
func (d *Difference) String() string {
	if d.Err != nil {
		return "plan gives " + kindOf(d.Plan) + ", topdown an error"
	}
	path, a, b := differing("result", d.Plan, d.Topdown)
	return path + ": plan gives " + kindOf(a) + ", topdown " + kindOf(b)
}

// differing returns the first place at which two values differ, with what is there.
func differing(path string, a, b ast.Value) (string, ast.Value, ast.Value) {
	switch x := a.(type) {
	case ast.Object:
		y, ok := b.(ast.Object)
		if !ok {
			break
		}
		for _, k := range append(x.Keys(), y.Keys()...) {
			if v, w := valueAt(x, k), valueAt(y, k); v == nil || w == nil || v.Compare(w) != 0 {
				return differing(path+"."+keyText(k), v, w)
			}
		}
	case *ast.Array:
		y, ok := b.(*ast.Array)
		if !ok || x.Len() != y.Len() {
			break
		}
		for i := range x.Len() {
			if v, w := x.Elem(i).Value, y.Elem(i).Value; v.Compare(w) != 0 {
				return differing(fmt.Sprintf("%s[%d]", path, i), v, w)
			}
		}
	}
	return path, a, b
}

// kindOf tells of a value what may be told of any.
func kindOf(v ast.Value) string {
	switch v := v.(type) {
	case nil:
		return "nothing"
	case ast.Boolean, ast.Null, ast.Number:
		return v.String()
	case ast.String:
		return fmt.Sprintf("a string of %d bytes", len(v))
	case *ast.Array:
		return fmt.Sprintf("an array of %d", v.Len())
	case ast.Set:
		return fmt.Sprintf("a set of %d", v.Len())
	case ast.Object:
		return fmt.Sprintf("an object of %d", v.Len())
	}
	return ast.ValueName(v)
}

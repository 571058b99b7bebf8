package policy

import (
	"context"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"
)

// Observed is what an evaluation did beside giving a value. It is for one
// evaluation: set what is to be observed, and read the rest when it is over.
type Observed struct {
	// At is the time that the policy sees. Zero means now, and is then set.
	At time.Time

	// Builtins are the results of the builtins that are not functions of their
	// operands alone, such as time.now_ns, http.send and the verification of a
	// token: an object from name to one from the array of operands to result,
	// as in OPA's nd_builtin_cache. They are observed where WantBuiltins is set.
	//
	// A result that is there before is taken and its builtin not called: with
	// the At and the Builtins of an evaluation, another sees what that one saw.
	Builtins     ast.Object
	WantBuiltins bool

	// RuleLabels are the labels that the METADATA of the evaluated rules and of
	// what these are in give, once each, in the order of evaluation. Nil where
	// no rule of the policy has labels.
	RuleLabels []map[string]any

	// Prints are the lines that the policy printed, at most 32 with 16 KiB, where
	// WantPrints is set and the policy was compiled with Options.Print.
	Prints     []Printed
	WantPrints bool

	// Duration is how long the evaluation took.
	Duration time.Duration
}

// observe has evaluate, which sees o.At, observed.
func (o *Observed) observe(evaluate func() (ast.Value, error)) (ast.Value, error) {
	start := time.Now()
	if o.At.IsZero() {
		o.At = start
	}
	v, err := evaluate()
	o.Duration = time.Since(start)
	return v, err
}

// run evaluates a query as run does. The labels of rules are looked for only if
// there are any.
func (o *Observed) run(ctx context.Context, q *topdown.Query, labelled bool) (ast.Value, error) {
	q.WithTime(o.At)
	var results builtins.NDBCache
	if o.WantBuiltins || o.Builtins != nil {
		results = resultsOf(o.Builtins)
		q.WithNDBuiltinCache(results)
	}
	var rules *topdown.EvaluatedRuleTracker
	if labelled {
		rules = new(topdown.EvaluatedRuleTracker)
		q.WithEvaluatedRuleTracker(rules)
	}
	var prints *printer
	if o.WantPrints {
		prints = new(printer)
		q.WithPrintHook(prints)
	}
	v, err := run(ctx, q)
	if prints != nil {
		o.Prints = prints.lines
	}
	if results != nil {
		o.Builtins = results.AsValue().(ast.Object)
	}
	if rules != nil {
		o.RuleLabels = rules.Labels
	}
	return v, err
}

// resultsOf returns what Observed.Builtins says as topdown takes it. What is not
// of that form is left out.
func resultsOf(known ast.Object) builtins.NDBCache {
	cache := builtins.NDBCache{}
	if known == nil {
		return cache
	}
	known.Foreach(func(name, results *ast.Term) {
		s, isName := name.Value.(ast.String)
		obj, isObject := results.Value.(ast.Object)
		if !isName || !isObject {
			return
		}
		own := ast.NewObjectWithCapacity(obj.Len()) // topdown adds to it
		obj.Foreach(func(k, v *ast.Term) { own.Insert(k, v) })
		cache[string(s)] = own
	})
	return cache
}

package plan

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/util"
)

// Of returns OPA's plan of a query over the modules of a compiler, which must
// have compiled them without error. Its error is that of the planner, which refuses
// some policies, or wraps ErrUnsupported.
//
// It changes the compiler for as long as it runs, and is not to be called at the
// same time as anything else that uses it.
func Of(compiler *ast.Compiler, query ast.Body) (p *ir.Policy, err error) {
	defer func() {
		if r := recover(); r != nil {
			p, err = nil, fmt.Errorf("planning: panic: %v", r)
		}
	}()
	if err := plannable(compiler, query); err != nil {
		return nil, fmt.Errorf("planning: %w", err)
	}
	defer compiler.WithEvalMode(ast.EvalModeTopdown)
	ctx := context.WithValue(context.Background(), planKey{}, &p)
	_, err = rego.New(
		rego.Compiler(compiler),
		rego.ParsedQuery(query),
		rego.Target(target),
	).PrepareForEval(ctx)
	if err != nil {
		return nil, fmt.Errorf("planning: %w", err)
	}
	if p == nil {
		return nil, errors.New("planning: the planner gave nothing")
	}
	return p, nil
}

// target names this package to OPA, which hands plans only to a plugin.
const target = "gatehouse/plan"

type planKey struct{}

func init() { rego.RegisterPlugin(target, catcher{}) }

// catcher keeps the plan it is given where the context says.
type catcher struct{}

func (catcher) IsTarget(t string) bool { return t == target }

func (catcher) PrepareForEval(ctx context.Context, p *ir.Policy, _ ...rego.PrepareOption) (rego.TargetPluginEval, error) {
	if out, ok := ctx.Value(planKey{}).(**ir.Policy); ok {
		*out = p
	}
	return catcher{}, nil
}

func (catcher) Eval(context.Context, *rego.EvalContext, ast.Value) (ast.Value, error) {
	return nil, errors.New("a plan is evaluated by its Program")
}

// The planner copies what follows a reference for each rule that the reference
// may mean, and rules for each "with" that replaces others, so that the plan of a
// small policy can be immense. These bound how immense.
const (
	maxReplacing = 6      // uses of "with" that replace data or functions
	maxCopies    = 4096   // of what follows, in one rule
	maxSize      = 100000 // of what follows, in all
)

// plannable refuses rules that OPA's planner takes for something else than topdown
// does, and those whose plan would be too large.
func plannable(compiler *ast.Compiler, query ast.Body) error {
	replacing, size := 0, 0
	for _, r := range reachable(compiler, query) {
		ref := r.Head.Ref()
		n := len(ref) - 1
		if r.Head.RuleKind() == ast.MultiValue {
			n++
		}
		for i := 1; i < n; i++ {
			// To topdown p[1] of p[1][2] is there whether or not p[1][2] is.
			if _, ok := ref[i].Value.(ast.String); !ok && ref[i].IsGround() {
				return fmt.Errorf("%w: rule %v has a constant in its name that is no string", ErrUnsupported, ref)
			}
		}
		if ordersVariables(r) {
			return fmt.Errorf("%w: rule %v has an array comprehension, and a set or object with keys that are variables", ErrUnsupported, ref)
		}
		copies := 1
		ast.WalkRefs(r, func(ref ast.Ref) bool {
			if copies <= maxCopies {
				copies *= meanings(compiler.RuleTree, ref)
			}
			return false
		})
		confused := false
		ast.WalkExprs(r, func(e *ast.Expr) bool {
			documents := 0
			for _, w := range e.With {
				target, ok := w.Target.Value.(ast.Ref)
				if !ok {
					continue
				}
				if !target[0].Equal(ast.InputRootDocument) {
					replacing++
				}
				if !isFunction(compiler, target) {
					taken, _ := e.With[documents].Target.Value.(ast.Ref)
					confused = confused || len(taken) == 0 ||
						taken[0].Equal(ast.DefaultRootDocument) != target[0].Equal(ast.DefaultRootDocument)
					documents++
				}
			}
			return false
		})
		if confused {
			// The planner counts those with that replace documents, and looks up
			// what they replace among all.
			return fmt.Errorf("%w: rule %v has a with that replaces a document after one that replaces a function", ErrUnsupported, ref)
		}
		if size += copies; copies > maxCopies || size > maxSize {
			return fmt.Errorf("%w: rule %v refers to too many others by names that are computed", ErrUnsupported, ref)
		}
		if replacing > maxReplacing {
			return fmt.Errorf("%w: more than %d uses of with that replace data or functions", ErrUnsupported, maxReplacing)
		}
	}
	return nil
}

// ordersVariables reports whether a rule may make an array of what it finds in a
// set, or object, that is written with variables: topdown takes these in the order
// that the variables have, and twice what two of them are.
func ordersVariables(r *ast.Rule) bool {
	arrays, variables := false, false
	ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.ArrayComprehension:
			arrays = true
		case ast.Set:
			variables = variables || x.Len() > 1 && !x.IsGround()
		case ast.Object:
			variables = variables || x.Len() > 1 && slices.ContainsFunc(x.Keys(), func(k *ast.Term) bool { return !k.IsGround() })
		}
		return arrays && variables
	}).Walk(r)
	return arrays && variables
}

// isFunction reports whether the target of a "with" is a function or builtin.
func isFunction(compiler *ast.Compiler, target ast.Ref) bool {
	if target[0].Equal(ast.InputRootDocument) {
		return false
	}
	if !target[0].Equal(ast.DefaultRootDocument) {
		return true
	}
	for _, r := range compiler.GetRulesExact(target) {
		if len(r.Head.Args) > 0 {
			return true
		}
	}
	return false
}

// meanings returns how many rules, and the data beside, a reference may mean
// because of variables in it.
func meanings(tree *ast.TreeNode, ref ast.Ref) int {
	if !ref[0].Equal(ast.DefaultRootDocument) {
		return 1
	}
	node := tree.Child(ref[0].Value)
	for _, t := range ref[1:] {
		if node == nil || len(node.Values) > 0 {
			return 1
		}
		if !t.IsGround() {
			return 1 + below(node, maxCopies)
		}
		node = node.Child(t.Value)
	}
	return 1
}

// below counts the rules below a node, until they are more than most.
func below(node *ast.TreeNode, most int) int {
	n := len(node.Values)
	for _, child := range node.Children {
		if n > most {
			break
		}
		n += below(child, most-n)
	}
	return n
}

// reachable returns the rules that a query may ask for.
func reachable(compiler *ast.Compiler, query ast.Body) (rules []*ast.Rule) {
	seen := map[util.T]bool{}
	var queue []util.T
	add := func(node util.T) {
		if !seen[node] {
			seen[node] = true
			queue = append(queue, node)
		}
	}
	ast.WalkRefs(query, func(ref ast.Ref) bool {
		for _, r := range compiler.GetRulesDynamicWithOpts(ref, ast.RulesOptions{IncludeHiddenModules: true}) {
			add(r)
		}
		return false
	})
	for len(queue) > 0 {
		node := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if r, ok := node.(*ast.Rule); ok {
			rules = append(rules, r)
		}
		for dependency := range compiler.Graph.Dependencies(node) {
			add(dependency)
		}
	}
	return rules
}

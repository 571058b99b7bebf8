package policy

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util"
)

// bodyPaths are where a request's body is in an input document.
var bodyPaths = []ast.Ref{
	ast.MustParseRef("input.parsed_body"),
	ast.MustParseRef("input.attributes.request.http.body"),
	ast.MustParseRef("input.attributes.request.http.rawBody"),
}

// ReadsBody reports whether the entry point can read the body of a request. It
// is true too where that cannot be told: of a rule that takes the whole input,
// or a part of it by a name that is computed.
func (p *Policy) ReadsBody(entry string) bool {
	e, ok := p.entries[entry]
	return ok && e.readsBody
}

// readsBody looks for what reads the body in all rules that the value of ref
// can depend on.
func readsBody(c *ast.Compiler, ref ast.Ref) bool {
	seen := map[util.T]bool{}
	var queue []util.T
	add := func(node util.T) {
		if !seen[node] {
			seen[node] = true
			queue = append(queue, node)
		}
	}
	for _, rule := range c.GetRulesDynamicWithOpts(ref, ast.RulesOptions{}) {
		add(rule)
	}
	for len(queue) > 0 {
		node := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if rule, ok := node.(*ast.Rule); ok && ruleReadsBody(rule) {
			return true
		}
		for dependency := range c.Graph.Dependencies(node) {
			add(dependency)
		}
	}
	return false
}

func ruleReadsBody(rule *ast.Rule) bool {
	reads := false
	var visitor *ast.GenericVisitor
	visitor = ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.Rule:
			return x != rule // an else is a node of the graph itself, too
		case ast.Ref:
			if x[0].Equal(ast.InputRootDocument) {
				reads = reads || slices.ContainsFunc(bodyPaths, func(path ast.Ref) bool { return meets(x, path) })
				for _, t := range x[1:] {
					visitor.Walk(t)
				}
				return true
			}
		case ast.Var:
			reads = reads || x.Equal(ast.InputRootDocument.Value)
		}
		return reads
	})
	visitor.Walk(rule)
	if rule.Else != nil && ruleReadsBody(rule.Else) {
		return true
	}
	return reads
}

// meets reports whether ref can be a value that holds path, or lies in it.
func meets(ref, path ast.Ref) bool {
	for i := 1; i < min(len(ref), len(path)); i++ {
		if ast.IsConstant(ref[i].Value) && !ref[i].Equal(path[i]) {
			return false
		}
	}
	return true
}

// usesWith reports whether some expression of the modules has a "with".
func usesWith(c *ast.Compiler) (found bool) {
	for _, m := range c.Modules {
		ast.WalkExprs(m, func(e *ast.Expr) bool {
			found = found || len(e.With) > 0
			return found
		})
	}
	return found
}

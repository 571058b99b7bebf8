package policy

import (
	"iter"
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

// tokenPaths are the claims of a subject that differ from one of its tokens to
// the next, where they are in an input document.
var tokenPaths = func() (paths []ast.Ref) {
	for _, claim := range []string{
		"iat", "exp", "nbf", "jti", "auth_time", "nonce", "at_hash", "c_hash", "sid", "uti", "rh", "aio",
	} {
		paths = append(paths, ast.MustParseRef("input.subject.claims").Append(ast.StringTerm(claim)))
	}
	return paths
}()

// TokenClaims returns the names of those claims of a subject that differ from one
// of its tokens to the next, in input.subject.claims. They must not be changed.
func TokenClaims() []ast.Value { return tokenClaims }

var tokenClaims = func() (names []ast.Value) {
	for _, path := range tokenPaths {
		names = append(names, path[len(path)-1].Value)
	}
	return names
}()

// varying are the builtins that are no functions of their operands, by name.
// What opa.runtime gives follows from a tenant's settings, and schemas never
// refer to remote documents.
var varying = func() map[string]bool {
	names := map[string]bool{}
	for _, b := range ast.Builtins {
		if b.IsNondeterministic() {
			names[b.Name] = true
		}
	}
	for _, b := range []*ast.Builtin{ast.OPARuntime, ast.JSONSchemaVerify, ast.JSONMatchSchema} {
		delete(names, b.Name)
	}
	return names
}()

// reads is what the value of an entry point can follow from, of those things that
// somebody wants to know. Each is true too where it cannot be told: of a rule that
// takes the whole input, or a part of it by a name that is computed.
type reads struct {
	body   bool // the body of a request
	token  bool // TokenClaims
	varies bool // what a builtin gives that is no function of its operands

	runtime bool // opa.runtime, which shows the tenant's labels
}

// ReadsBody reports whether the entry point can read the body of a request.
func (p *Policy) ReadsBody(entry string) bool {
	e, ok := p.entries[entry]
	return ok && e.reads.body
}

// ReadsTokenClaims reports whether the entry point can read a claim of
// TokenClaims.
func (p *Policy) ReadsTokenClaims(entry string) bool {
	e, ok := p.entries[entry]
	return ok && e.reads.token
}

// Varies reports whether the entry point can have another value for the same
// input: because of the time, of chance, of what http.send gets, or of a token
// that is only valid for a time.
func (p *Policy) Varies(entry string) bool {
	e, ok := p.entries[entry]
	return ok && e.reads.varies
}

// readsOf looks for what is read in all rules that the value of ref can depend
// on.
func readsOf(c *ast.Compiler, ref ast.Ref) (r reads, of *Slice) {
	var input sliceTree
	for rule := range reachable(c, ref) {
		if r != (reads{true, true, true, true}) {
			r.rule(rule)
		}
		if !input.whole {
			input.rule(rule)
		}
	}
	return r, input.slice()
}

// reachable yields all rules that the value of ref can depend on.
func reachable(c *ast.Compiler, ref ast.Ref) iter.Seq[*ast.Rule] {
	return func(yield func(*ast.Rule) bool) {
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
			if rule, ok := node.(*ast.Rule); ok && !yield(rule) {
				return
			}
			for dependency := range c.Graph.Dependencies(node) {
				add(dependency)
			}
		}
	}
}

// rule adds what a rule reads.
func (r *reads) rule(rule *ast.Rule) {
	var visitor *ast.GenericVisitor
	visitor = ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.Rule:
			return x != rule // an else is a node of the graph itself, too
		case ast.Ref:
			if x[0].Equal(ast.InputRootDocument) {
				reads := func(path ast.Ref) bool { return meets(x, path) }
				r.body = r.body || slices.ContainsFunc(bodyPaths, reads)
				r.token = r.token || slices.ContainsFunc(tokenPaths, reads)
				for _, t := range x[1:] {
					visitor.Walk(t)
				}
				return true
			}
			if !x[0].Equal(ast.DefaultRootDocument) && !(r.varies && r.runtime) {
				name := x.String()
				r.varies = r.varies || varying[name]
				r.runtime = r.runtime || name == ast.OPARuntime.Name
			}
		case ast.Var:
			if x.Equal(ast.InputRootDocument.Value) {
				r.body, r.token = true, true
			}
		}
		return false
	})
	visitor.Walk(rule)
	if rule.Else != nil {
		r.rule(rule.Else)
	}
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

package plan

import (
	"runtime"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

// MaxBuilt is how much one call of a builtin may build, whoever evaluates, in bytes as
// this package estimates them. A call over it ends the evaluation with ErrBound.
const MaxBuilt = 64 << 20

// ours are the builtins that stand in the registry in the place of OPA's, for topdown
// too, with the same results: OPA's cannot be stopped while they build.
var ours = map[string]topdown.BuiltinFunc{
	ast.Concat.Name:                 concatLong(topdown.GetBuiltin(ast.Concat.Name)),
	ast.NetCIDRContainsMatches.Name: cidrMatches(topdown.GetBuiltin(ast.NetCIDRContains.Name)),
	ast.ReachableBuiltin.Name:       reachableNodes,
	ast.ReachablePathsBuiltin.Name:  reachablePaths,
	ast.RenderTemplate.Name:         renderTemplate,
}

// registry are the builtins as an evaluation by a plan calls them, where that is not as
// they are registered: it has looked at its own bound before.
var registry = map[string]topdown.BuiltinFunc{}

// Topdown has no bound of memory. In the registry stands what looks at one before it
// calls a builtin that may build much.
func init() {
	for name, f := range ours {
		topdown.RegisterBuiltinFunc(name, f)
	}
	for name := range growths {
		topdown.RegisterBuiltinFunc(name, within(name))
	}
	for name := range foreseen {
		// What topdown is given one after the other takes no memory.
		if growths[name] == 0 && !ast.BuiltinMap[name].Relation {
			topdown.RegisterBuiltinFunc(name, within(name))
		}
	}
}

// within is a builtin that is called only where what it builds fits into MaxBuilt.
func within(name string) topdown.BuiltinFunc {
	f := topdown.GetBuiltin(name)
	registry[name] = f
	memory, times := foreseen[name], growths[name]
	return func(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
		left := allowance(MaxBuilt)
		if memory != nil {
			if n, ok := memory(left, operands); ok && n > MaxBuilt {
				return tooLarge(name)
			}
		}
		if times > 0 && product(textBytes(operands), times) > MaxBuilt {
			return tooLarge(name)
		}
		return f(bctx, operands, iter)
	}
}

// builtinOf returns a builtin as a plan calls it; nil: there is none.
func builtinOf(name string) topdown.BuiltinFunc {
	if f := registry[name]; f != nil {
		return f
	}
	return topdown.GetBuiltin(name)
}

// tooLarge ends an evaluation in which a builtin would build more than MaxBuilt.
func tooLarge(name string) error {
	return topdown.Halt{Err: bound("%s builds more than %d bytes", name, MaxBuilt)}
}

// cancelled ends an evaluation that nobody waits for any more.
func cancelled(bctx *topdown.BuiltinContext, name string) error {
	if bctx.Cancel == nil || !bctx.Cancel.Cancelled() {
		return nil
	}
	return topdown.Halt{Err: &topdown.Error{Code: topdown.CancelErr, Message: name + ": timed out before finishing"}}
}

// maxCopied is how much is copied before others have their turn, in bytes. The runtime
// stops all goroutines now and then, and cannot stop one that copies or clears memory:
// where the operating system has yet to find that memory, thirty megabytes take it a
// fifth of a second on some virtual machines, and all answers wait.
const maxCopied = 64 << 10

// concatLong joins long texts, and leaves the others to f.
func concatLong(f topdown.BuiltinFunc) topdown.BuiltinFunc {
	return func(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
		sep, ok := operands[0].Value.(ast.String)
		if !ok {
			return f(bctx, operands, iter)
		}
		var at func(i int) *ast.Term
		count := 0
		switch list := operands[1].Value.(type) {
		case *ast.Array:
			at, count = list.Elem, list.Len()
		case ast.Set:
			parts := list.Slice()
			at, count = func(i int) *ast.Term { return parts[i] }, len(parts)
		}
		size := len(sep) * max(count-1, 0)
		for i := range count {
			s, ok := at(i).Value.(ast.String)
			if !ok {
				return f(bctx, operands, iter) // which says so
			}
			size += len(s)
		}
		if size <= maxCopied || count < 2 {
			return f(bctx, operands, iter)
		}
		var b strings.Builder
		b.Grow(size)
		copied := 0
		for i := range count {
			for k, s := range [2]string{string(sep), string(at(i).Value.(ast.String))} {
				for i+k > 0 && len(s) > 0 { // before the first there is no separator
					n := min(len(s), maxCopied-copied)
					b.WriteString(s[:n])
					s = s[n:]
					if copied += n; copied == maxCopied {
						if err := cancelled(&bctx, ast.Concat.Name); err != nil {
							return err
						}
						runtime.Gosched()
						copied = 0
					}
				}
			}
		}
		return iter(ast.StringTerm(b.String()))
	}
}

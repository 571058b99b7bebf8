package plan

import (
	"errors"
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
)

var errCIDRElement = errors.New("element must be string or non-empty array")

// cidrMatches is net.cidr_contains_matches with OPA's own test of each pair. There are
// as many pairs as the product of two collections: it ends where those that match are
// over MaxBuilt, and when the evaluation is cancelled.
func cidrMatches(contains topdown.BuiltinFunc) topdown.BuiltinFunc {
	return func(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
		result, left := ast.NewSet(), allowance(MaxBuilt)
		err := eachCIDR(1, operands[0], func(cidr1, index1 *ast.Term) error {
			return eachCIDR(2, operands[1], func(cidr2, index2 *ast.Term) error {
				if err := cancelled(&bctx, ast.NetCIDRContainsMatches.Name); err != nil {
					return err
				}
				matches := false
				err := contains(topdown.BuiltinContext{}, []*ast.Term{cidr1, cidr2}, func(t *ast.Term) error {
					matches = ast.Boolean(true).Equal(t.Value)
					return nil
				})
				if err != nil {
					if cause := errors.Unwrap(err); cause != nil {
						return cause // the registry's has put its own name before it
					}
					return err
				}
				if !matches {
					return nil
				}
				result.Add(ast.ArrayTerm(index1, index2))
				if left -= memoryMember + memoryValue + 2*memoryElement; left < 0 {
					return tooLarge(ast.NetCIDRContainsMatches.Name)
				}
				return nil
			})
		})
		if err != nil {
			return err
		}
		return iter(ast.NewTerm(result))
	}
}

// eachCIDR calls f for the addresses of an operand, each with what tells of it.
func eachCIDR(operand int, t *ast.Term, f func(cidr, index *ast.Term) error) error {
	element := func(t, index *ast.Term) error {
		switch v := t.Value.(type) {
		case ast.String:
			return f(t, index)
		case *ast.Array:
			if v.Len() > 0 {
				return f(v.Elem(0), index)
			}
		}
		return fmt.Errorf("operand %v: %v", operand, errCIDRElement)
	}
	switch v := t.Value.(type) {
	case ast.String:
		return f(t, t)
	case *ast.Array:
		for i := range v.Len() {
			if err := element(v.Elem(i), ast.InternedTerm(i)); err != nil {
				return err
			}
		}
	case ast.Set:
		return v.Iter(func(t *ast.Term) error { return element(t, t) })
	case ast.Object:
		return v.Iter(func(k, t *ast.Term) error { return element(t, k) })
	}
	return nil
}

package policy

import (
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"
)

// checkOccurs refuses a policy in which a variable could only hold a value that has
// the variable inside, as x in {x: 1} = x: no value is such. It looks at keys of
// objects and members of sets alone, so that [x] == x, which is false, stays so.
func checkOccurs(modules map[string]*ast.Module) (err error) {
	for _, m := range modules {
		ast.WalkExprs(m, func(e *ast.Expr) bool {
			if err == nil && e.IsEquality() {
				if v, ok := occurs(e.Operand(0), e.Operand(1)); ok {
					err = fmt.Errorf("%v: %s can hold no value that contains itself", e.Location, v)
				}
			}
			return err != nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// occurs reports whether two terms that are to be equal have a variable hold
// itself, and which.
func occurs(a, b *ast.Term) (ast.Var, bool) {
	h := holds{edges: map[ast.Var]map[ast.Var]struct{}{}}
	h.equal(a, b)
	for _, u := range h.unchecked {
		if h.reaches(u[1], u[0], map[ast.Var]struct{}{}) {
			return u[0], true
		}
	}
	return "", false
}

// holds says which variables hold others if two terms are equal.
type holds struct {
	edges     map[ast.Var]map[ast.Var]struct{} // :: variable → those that it holds, or is equal to
	unchecked [][2]ast.Var                     // a variable, and one that it holds in a key or in a set
}

// equal notes what follows from the equality of two terms.
func (h *holds) equal(a, b *ast.Term) {
	if v, ok := a.Value.(ast.Var); ok {
		h.hold(v, b, false)
	}
	if v, ok := b.Value.(ast.Var); ok {
		h.hold(v, a, false)
	}
	switch x := a.Value.(type) {
	case *ast.Array:
		if y, ok := b.Value.(*ast.Array); ok && x.Len() == y.Len() {
			for i := range x.Len() {
				h.equal(x.Elem(i), y.Elem(i))
			}
		}
	case ast.Object:
		y, ok := b.Value.(ast.Object)
		if !ok {
			return
		}
		x.Foreach(func(kx, vx *ast.Term) {
			y.Foreach(func(ky, vy *ast.Term) {
				if kx.Equal(ky) || !kx.IsGround() || !ky.IsGround() { // or else they are two keys
					h.equal(vx, vy)
				}
			})
		})
	}
}

// hold notes that a variable holds what is in a term. Unchecked: the term stands in
// a key or in a set.
func (h *holds) hold(v ast.Var, t *ast.Term, unchecked bool) {
	switch x := t.Value.(type) {
	case ast.Var:
		if h.edges[v] == nil {
			h.edges[v] = map[ast.Var]struct{}{}
		}
		h.edges[v][x] = struct{}{}
		if unchecked {
			h.unchecked = append(h.unchecked, [2]ast.Var{v, x})
		}
	case *ast.Array:
		x.Foreach(func(e *ast.Term) { h.hold(v, e, unchecked) })
	case ast.Set:
		x.Foreach(func(e *ast.Term) { h.hold(v, e, true) })
	case ast.Object:
		x.Foreach(func(k, e *ast.Term) {
			h.hold(v, k, true)
			h.hold(v, e, unchecked)
		})
	case ast.Ref:
		for _, e := range x[1:] {
			h.hold(v, e, unchecked)
		}
	}
}

// reaches reports whether one variable holds another, through any number.
func (h *holds) reaches(from, to ast.Var, seen map[ast.Var]struct{}) bool {
	if from == to {
		return true
	}
	if _, ok := seen[from]; ok {
		return false
	}
	seen[from] = struct{}{}
	for next := range h.edges[from] {
		if h.reaches(next, to, seen) {
			return true
		}
	}
	return false
}

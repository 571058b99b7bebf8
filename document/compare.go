package document

import "github.com/open-policy-agent/opa/v1/ast"

// Equal reports whether v equals a value of OPA, which may be a *Value, without
// making a term of more than its numbers. No value equals nothing.
func (v Value) Equal(x ast.Value) bool {
	if w, ok := x.(*Value); ok {
		return v.same(*w)
	}
	if !v.Defined() || x == nil {
		return false
	}
	switch v.Kind() {
	case String:
		s, ok := x.(ast.String)
		return ok && v.Text() == string(s)
	case Array:
		arr, ok := x.(*ast.Array)
		if !ok || arr.Len() != v.Len() {
			return false
		}
		i := 0
		for _, e := range v.All() {
			if !e.Equal(arr.Elem(i).Value) {
				return false
			}
			i++
		}
		return true
	case Object:
		obj, ok := x.(ast.Object)
		return ok && obj.Len() == v.Len() && !obj.Until(func(k, e *ast.Term) bool {
			key, ok := k.Value.(ast.String)
			return !ok || !v.Member(string(key)).Equal(e.Value)
		})
	}
	return ast.Compare(v.scalar().Value, x) == 0
}

// same reports whether two values are equal.
func (v Value) same(w Value) bool {
	switch {
	case !v.Defined() || !w.Defined():
		return false
	case v == w:
		return true
	case v.Kind() != w.Kind():
		return false
	}
	switch v.Kind() {
	case String:
		return v.Text() == w.Text()
	case Array:
		if v.Len() != w.Len() {
			return false
		}
		i := 0
		for _, e := range v.All() {
			if !e.same(w.Elem(i)) {
				return false
			}
			i++
		}
		return true
	case Object:
		if v.Len() != w.Len() {
			return false
		}
		for k, e := range v.All() {
			if !e.same(w.Member(k.Text())) {
				return false
			}
		}
		return true
	}
	return ast.Compare(v.scalar().Value, w.scalar().Value) == 0
}

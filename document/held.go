package document

import "github.com/open-policy-agent/opa/v1/ast"

// Hold returns a term for v that costs little: where v has parts the term's value is a
// *Value, which only those may be given that know of it. It is the term that Term
// returns where v has none, or that term is there already. The term of no value is nil.
func (v Value) Hold() *ast.Term {
	if v.b == nil || !v.composite() {
		return v.scalar()
	}
	m := &v.b.terms
	if t := m.get(v.slot, false); t != nil {
		return t
	}
	if t := m.get(v.slot, true); t != nil {
		return t
	}
	h := &held{v: v}
	h.term.Value = &h.v
	return v.b.remember(v.slot, true, &h.term, sizeHeld)
}

type held struct {
	term ast.Term
	v    Value
}

// Whole returns a term that anybody may be given: t, or what it holds as OPA has it.
func Whole(t *ast.Term) *ast.Term {
	if t != nil {
		if v, ok := t.Value.(*Value); ok {
			return v.Term()
		}
	}
	return t
}

// A *Value is an ast.Value, so that a term can hold it. These are right wherever they
// are called, by what the value is as OPA has it. That is not enough for those
// who ask what type a value has: they must have Whole.

// Compare compares as OPA does.
func (v *Value) Compare(other ast.Value) int {
	if w, ok := other.(*Value); ok {
		other = w.Value()
	}
	return ast.Compare(v.Value(), other)
}

// Find returns what is at a path.
func (v *Value) Find(path ast.Ref) (ast.Value, error) { return v.Value().Find(path) }

// Hash returns the hash of the value.
func (v *Value) Hash() int { return v.Value().Hash() }

// IsGround reports that there are no variables in it.
func (v *Value) IsGround() bool { return true }

// String returns the value as Rego.
func (v *Value) String() string { return v.Value().String() }

// StringLength returns the length of String, in bytes.
func (v *Value) StringLength() int { return v.Value().StringLength() }

var _ ast.Value = (*Value)(nil)

package document

import "github.com/open-policy-agent/opa/v1/ast"

// Bounds of what Hold makes a term of OPA of.
const (
	smallLen   = 23  // members or elements
	smallCount = 128 // values in all
	sizeSmall  = 100 // bytes for each of these, about
)

// Hold returns a term for v that costs little: of what is small and has room in what is
// remembered the one that Term returns, else one whose value is a *Value, which only
// those may be given that know of it. The term of no value is nil.
func (v Value) Hold() *ast.Term {
	if v.b == nil || !v.composite() {
		return v.scalar()
	}
	if t := v.small(); t != nil {
		return t
	}
	return v.Held()
}

// Held returns the term for v whose value is a *Value, or that Term returns where v has
// no parts.
func (v Value) Held() *ast.Term {
	if v.b == nil || !v.composite() {
		return v.scalar()
	}
	if t := v.b.terms.get(v.slot, true); t != nil {
		return t
	}
	h := &held{v: v}
	h.term.Value = &h.v
	v.b.add(v.slot, true, &h.term, sizeHeld)
	return &h.term
}

// small returns the term of a small array or object, if it is remembered or should
// be, or nil.
func (v Value) small() *ast.Term {
	if v.slot&^slotMask == slotBig || v.Len() > smallLen {
		return nil // even if it is remembered, for what v's term is must not change much
	}
	m := &v.b.terms
	if t := m.get(v.slot, false); t != nil {
		return t
	}
	if !m.wants() {
		return nil
	}
	if n := v.Count(smallCount); n > smallCount || int64(n)*sizeSmall > m.room.most.Load() {
		return nil
	}
	var mk maker
	t := mk.term(v)
	v.b.add(v.slot, false, t, mk.size)
	return t
}

type held struct {
	term ast.Term
	v    Value
}

// Holder is a term that holds one value after the other.
type Holder struct{ held held }

// Hold is Value.Hold, but that the term is that of v only until the next one is held.
func (h *Holder) Hold(v Value) *ast.Term {
	if v.b == nil || !v.composite() {
		return v.scalar()
	}
	if t := v.b.terms.get(v.slot, false); t != nil && v.Len() <= smallLen {
		return t
	}
	h.held.v = v
	h.held.term.Value = &h.held.v
	return &h.held.term
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

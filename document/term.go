package document

import (
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Estimates, in bytes, of what terms take on a 64-bit machine.
const (
	sizeTerm   = 24
	sizeScalar = 16  // the header of a boxed text
	sizeMember = 76  // of an object: its element, its key's place and its place in the map
	sizeElem   = 24  // of an array: its pointer and its hash
	sizeObject = 180 // an object without members
	sizeArray  = 96  // an array without elements
	sizeHeld   = 40
)

// Term returns a term with the value as OPA has it: what ast.InterfaceToValue gives. It
// must not be changed. The term of no value is nil.
func (v Value) Term() *ast.Term {
	switch v.slot &^ slotMask {
	case slotArray, slotObject, slotBig:
		return v.whole()
	}
	return v.scalar()
}

// Value returns the value as OPA has it, or nil.
func (v Value) Value() ast.Value {
	if t := v.Term(); t != nil {
		return t.Value
	}
	return nil
}

// scalar returns the term of what has no parts.
func (v Value) scalar() *ast.Term {
	if v.b == nil {
		return nil
	}
	switch v.slot &^ slotMask {
	case slotLiteral:
		switch v.slot {
		case literalNull:
			return ast.InternedNullTerm
		case literalFalse:
			return ast.InternedTerm(false)
		case literalTrue:
			return ast.InternedTerm(true)
		case literalArray:
			return ast.InternedEmptyArray
		default:
			return ast.InternedEmptyObject
		}
	case slotInt:
		if n := v.int(); ast.HasInternedIntNumberTerm(n) {
			return ast.InternedTerm(n)
		}
	}
	if t := v.b.terms.get(v.slot, false); t != nil {
		return t
	}
	t, size := v.newScalar()
	if size > 0 {
		v.b.add(v.slot, false, t, size)
	}
	return t
}

// newScalar makes the term of a text or number, and says what it takes: nothing if
// it is there for all.
func (v Value) newScalar() (*ast.Term, int64) {
	switch v.slot &^ slotMask {
	case slotInt:
		text := strconv.Itoa(v.int())
		return ast.NewTerm(ast.Number(text)), sizeTerm + sizeScalar + 8
	case slotNumber:
		return ast.NewTerm(ast.Number(v.Text())), sizeTerm + sizeScalar
	}
	text := v.Text()
	if ast.HasInternedValue(text) {
		return ast.InternedTerm(text), 0
	}
	return ast.NewTerm(ast.String(text)), sizeTerm + sizeScalar
}

// whole returns the term of an array or object that is not empty.
func (v Value) whole() *ast.Term {
	if t := v.Known(); t != nil {
		return t
	}
	m := &v.b.terms
	var mk maker
	if v.Count(largeTerm/sizeScalar) < largeTerm/sizeScalar {
		if t := mk.term(v); mk.size < largeTerm {
			v.b.add(v.slot, false, t, mk.size)
			return t
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if t := m.getLarge(v.slot); t != nil {
		return t
	}
	mk = maker{}
	t := mk.term(v)
	m.addLarge(v.slot, t, mk.size)
	return t
}

// maker makes terms, many at a time, and counts what they take.
type maker struct {
	size  int64
	terms []ast.Term
	slab  int
}

func (mk *maker) new(v ast.Value) *ast.Term {
	if len(mk.terms) == 0 {
		mk.slab = min(max(2*mk.slab, 4), 128)
		mk.terms = make([]ast.Term, mk.slab)
	}
	t := &mk.terms[0]
	mk.terms = mk.terms[1:]
	t.Value = v
	mk.size += sizeTerm
	return t
}

// term makes the term of a value: of what is remembered it is that.
func (mk *maker) term(v Value) *ast.Term {
	switch v.slot &^ slotMask {
	case slotLiteral:
		return v.scalar()
	case slotInt:
		if n := v.int(); ast.HasInternedIntNumberTerm(n) {
			return ast.InternedTerm(n)
		}
	}
	if t := v.Known(); t != nil {
		return t
	}
	switch v.Kind() {
	case Array:
		elems := make([]*ast.Term, 0, v.Len())
		for _, e := range v.All() {
			elems = append(elems, mk.term(e))
		}
		mk.size += sizeArray + sizeElem*int64(len(elems))
		return mk.new(ast.NewArray(elems...))
	case Object:
		n := v.Len()
		members := make([][2]*ast.Term, 0, n)
		for k, e := range v.All() {
			members = append(members, [2]*ast.Term{mk.term(k), mk.term(e)})
		}
		mk.size += sizeObject + sizeMember*int64(n)
		return mk.new(ast.NewObject(members...))
	case Number:
		mk.size += sizeScalar
		return mk.new(ast.Number(v.Text()))
	}
	text := v.Text()
	if ast.HasInternedValue(text) {
		return ast.InternedTerm(text)
	}
	mk.size += sizeScalar
	return mk.new(ast.String(text))
}

// Known returns the term of a value where it is remembered, or nil.
func (v Value) Known() *ast.Term {
	if v.b == nil {
		return nil
	}
	if t := v.b.terms.get(v.slot, false); t != nil {
		return t
	}
	return v.b.terms.getLarge(v.slot)
}

package plan

import (
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/document"
)

// place is where a walk has come to: a term, or a value of the data where it lies.
// The zero place is nowhere.
type place struct {
	t *ast.Term // as OPA has it
	v document.Value
}

// placeOf returns the place of a term, which may hold a value of the data.
func placeOf(t *ast.Term) place {
	if t == nil {
		return place{}
	}
	if v, ok := t.Value.(*document.Value); ok {
		return place{v: *v}
	}
	return place{t: t}
}

func (p place) defined() bool { return p.t != nil || p.v.Defined() }

// at returns what is there at a key.
func (p place) at(by getter, key *ast.Term) place {
	switch {
	case p.t != nil:
		return place{t: by.of(p.t.Value, key)}
	case p.v.Defined():
		return place{v: by.in(p.v, key)}
	}
	return place{}
}

// holding says what terms are made of values of the data.
type holding int

const (
	asOPA   holding = iota // as OPA has them
	asSmall                // so if they are small, else such as hold them
	asHeld                 // such as hold them
)

// term returns the term of what is there, or nil. Another than asOPA is only for a
// local that may have such a term: see compiler.holding.
func (p place) term(h holding) *ast.Term {
	switch {
	case p.t != nil:
		return p.t
	case h == asSmall:
		return p.v.Hold()
	case h == asHeld:
		return p.v.Held()
	}
	return p.v.Term()
}

// equals reports whether what is there equals a term, which may hold a value too.
func (p place) equals(t *ast.Term) bool {
	switch {
	case t == nil:
		return false
	case p.t != nil:
		return equal(p.t, t)
	}
	return p.v.Equal(t.Value)
}

// isText reports whether a string is there.
func (p place) isText() bool {
	if p.t == nil {
		return p.v.Kind() == document.String
	}
	_, ok := p.t.Value.(ast.String)
	return ok
}

// text returns the string that is there.
func (p place) text() string {
	if p.t == nil {
		return p.v.Text()
	}
	s, _ := p.t.Value.(ast.String)
	return string(s)
}

// getter says how a key is looked up: byValue, as a value, or byPath, as topdown does
// on the way of a reference to data, which it reads by a path of strings. There
// a number is the key that it is written as, and a string that is a number an index.
type getter bool

const (
	byValue getter = false
	byPath  getter = true
)

// of returns what v has at a key, or nil.
func (by getter) of(v ast.Value, key *ast.Term) *ast.Term {
	if by == byPath {
		return getData(v, key)
	}
	return get(v, key)
}

// in returns what a value of the data has at a key, or none.
func (by getter) in(v document.Value, key *ast.Term) document.Value {
	switch k := key.Value.(type) {
	case ast.String:
		if by == byPath && v.Kind() == document.Array {
			i, err := strconv.Atoi(string(k))
			if err != nil {
				return document.Value{}
			}
			return v.Elem(i)
		}
		return v.Member(string(k))
	case ast.Number:
		if v.Kind() == document.Array {
			i, ok := k.Int()
			if !ok {
				return document.Value{}
			}
			return v.Elem(i)
		}
		if by == byPath {
			return v.Member(string(k))
		}
	}
	return document.Value{}
}

// elements returns how many elements or members there are, and what returns the
// i-th of them, with its key where it has one.
func (p place) elements() (n int, at func(i int) (key, value place)) {
	if p.t == nil {
		return p.v.Len(), func(i int) (place, place) {
			k, v := p.v.Nth(i)
			return place{v: k}, place{v: v}
		}
	}
	switch v := p.t.Value.(type) {
	case *ast.Array:
		return v.Len(), func(i int) (place, place) { return place{}, place{t: v.Elem(i)} }
	case ast.Object:
		keys := v.Keys()
		return len(keys), func(i int) (place, place) { return place{t: keys[i]}, place{t: v.Get(keys[i])} }
	case ast.Set:
		list := v.Slice()
		return len(list), func(i int) (place, place) { return place{}, place{t: list[i]} }
	}
	return 0, nil
}

// placeOperands are the operands of builtins whose native form looks at values of the data
// where they lie. Others are given them as OPA has them.
var placeOperands = map[string][]int{ // :: name → operands
	ast.Equal.Name:     {0, 1},
	ast.NotEqual.Name:  {0, 1},
	ast.Member.Name:    {1},
	ast.Count.Name:     {0},
	ast.ObjectGet.Name: {0},
}

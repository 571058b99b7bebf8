package document

import (
	"iter"
	"strconv"
)

// Kind says what a Value is.
type Kind uint8

// The kinds, in the order in which OPA has them.
const (
	None Kind = iota // no value
	Null
	Boolean
	Number
	String
	Array
	Object
)

// Value is a value of a document. The zero Value is none. A *Value is an ast.Value
// too, so that it can stand in a term: see Hold.
type Value struct {
	b    *block
	slot uint32
}

// Kind returns what v is.
func (v Value) Kind() Kind {
	if v.b == nil {
		return None
	}
	switch v.slot &^ slotMask {
	case slotLiteral:
		switch v.slot {
		case literalNull:
			return Null
		case literalArray:
			return Array
		case literalObject:
			return Object
		}
		return Boolean
	case slotInt, slotNumber:
		return Number
	case slotString:
		return String
	case slotArray:
		return Array
	case slotBig:
		if !v.b.big(v.slot & slotMask).object {
			return Array
		}
	}
	return Object
}

// Defined reports whether there is a value.
func (v Value) Defined() bool { return v.b != nil }

// composite reports whether v is an array or object that is not empty.
func (v Value) composite() bool {
	switch v.slot &^ slotMask {
	case slotArray, slotObject, slotBig:
		return true
	}
	return false
}

// Bool returns what a boolean is.
func (v Value) Bool() bool { return v.slot == literalTrue }

// Text returns the text of a string or number. It may be part of the document, of
// which it keeps a block in memory.
func (v Value) Text() string {
	switch v.slot &^ slotMask {
	case slotString, slotNumber:
		return v.b.text(v.slot & slotMask)
	case slotInt:
		return strconv.Itoa(v.int())
	}
	return ""
}

func (v Value) int() int {
	n := int(v.slot & slotMask >> 1)
	if v.slot&1 == 1 {
		return -n
	}
	return n
}

// Len returns how many elements or members v has.
func (v Value) Len() int {
	switch v.slot &^ slotMask {
	case slotArray:
		n, _ := v.b.number(v.slot & slotMask)
		return n
	case slotObject:
		k, _ := v.members()
		return k.n
	case slotBig:
		return v.b.big(v.slot & slotMask).n
	}
	return 0
}

// members returns the keys of an object that is not cut, and the place of the slots
// of its values.
func (v Value) members() (keys, uint32) {
	at := v.slot & slotMask
	return v.b.keys(v.b.word(at)), at + 4
}

// Member returns the value of a key of an object, or none.
func (v Value) Member(key string) Value {
	switch v.slot &^ slotMask {
	case slotObject:
		k, values := v.members()
		if i := k.find(key); i >= 0 {
			return v.b.value(v.b.word(values + 4*uint32(i)))
		}
	case slotBig:
		if g := v.b.big(v.slot & slotMask); g.object {
			return g.piece(g.near(key)).Member(key)
		}
	}
	return Value{}
}

// Elem returns an element of an array, or none.
func (v Value) Elem(i int) Value {
	if i < 0 {
		return Value{}
	}
	switch v.slot &^ slotMask {
	case slotArray:
		if n, at := v.b.number(v.slot & slotMask); i < n {
			return v.b.value(v.b.word(at + 4*uint32(i)))
		}
	case slotBig:
		if g := v.b.big(v.slot & slotMask); !g.object && i < g.n {
			p := g.holding(i)
			return g.piece(p).Elem(i - g.first(p))
		}
	}
	return Value{}
}

// Nth returns the i-th member of an object, in the order of the keys, or element of an
// array, whose key is none.
func (v Value) Nth(i int) (key, value Value) {
	switch v.slot &^ slotMask {
	case slotObject:
		k, values := v.members()
		if i >= 0 && i < k.n {
			return Value{v.b, slotString | v.b.word(k.texts+4*uint32(i))}, v.b.value(v.b.word(values + 4*uint32(i)))
		}
	case slotBig:
		if g := v.b.big(v.slot & slotMask); i >= 0 && i < g.n {
			p := g.holding(i)
			return g.piece(p).Nth(i - g.first(p))
		}
	}
	return Value{}, v.Elem(i)
}

// Count returns how many values there are in v, itself, its members' keys and all in
// them, or more than most when there are more.
func (v Value) Count(most int) int {
	n := 1
	for k, e := range v.All() {
		if k.Defined() {
			n++
		}
		if n += e.Count(most - n); n > most {
			break
		}
	}
	return n
}

// All returns the members of an object, in the order of their keys, or the elements
// of an array, whose keys are none.
func (v Value) All() iter.Seq2[Value, Value] {
	return func(yield func(key, value Value) bool) { v.each(yield) }
}

func (v Value) each(yield func(key, value Value) bool) bool {
	switch v.slot &^ slotMask {
	case slotArray:
		n, at := v.b.number(v.slot & slotMask)
		for range n {
			if !yield(Value{}, v.b.value(v.b.word(at))) {
				return false
			}
			at += 4
		}
	case slotObject:
		k, at := v.members()
		for i := range uint32(k.n) {
			key := Value{v.b, slotString | v.b.word(k.texts+4*i)}
			if !yield(key, v.b.value(v.b.word(at+4*i))) {
				return false
			}
		}
	case slotBig:
		g := v.b.big(v.slot & slotMask)
		for p := range g.pieces {
			if !g.piece(p).each(yield) {
				return false
			}
		}
	}
	return true
}

// At returns what is at a path of keys, where that of an element is its index,
// or none.
func (v Value) At(path ...string) Value {
	for _, segment := range path {
		switch v.Kind() {
		case Object:
			v = v.Member(segment)
		case Array:
			i, err := strconv.Atoi(segment)
			if err != nil {
				return Value{}
			}
			v = v.Elem(i)
		default:
			return Value{}
		}
	}
	return v
}

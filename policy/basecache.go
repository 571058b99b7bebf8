package policy

import (
	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/document"
)

// baseCache is what topdown takes for a cache of the data that an evaluation has
// read. It reads the documents themselves, which remember what they have made for
// topdown, so that nothing is kept for an evaluation, and the way to a value need
// not be made into strings.
type baseCache struct{ store *store }

// Get returns the value at ref, below data. Nil is not known: topdown then asks
// the store, which has the last word. An index like 1.0 is 1, as in a plan; with a
// cache of its own topdown says so only if it has read the whole array before.
func (c baseCache) Get(ref ast.Ref) ast.Value {
	if len(ref) < 2 {
		return nil // all of data, of which topdown leaves out what is below system
	}
	v := c.store.root
	for i, t := range ref[1:] {
		if known := v.Known(); known != nil {
			return elementOf(known.Value, ref[1+i:])
		}
		switch key := t.Value.(type) {
		case ast.String:
			if v.Kind() != document.Object {
				return nil
			}
			v = v.Member(string(key))
		case ast.Number:
			n, ok := key.Int()
			if !ok || n < 0 || v.Kind() != document.Array || n >= v.Len() {
				return nil
			}
			v = v.Elem(n)
		default:
			return nil
		}
		if !v.Defined() {
			return nil
		}
	}
	return v.Value()
}

// elementOf returns what v has at path, or nil.
func elementOf(v ast.Value, path ast.Ref) ast.Value {
	for _, t := range path {
		switch parent := v.(type) {
		case ast.Object:
			if _, ok := t.Value.(ast.String); !ok {
				return nil
			}
			child := parent.Get(t)
			if child == nil {
				return nil
			}
			v = child.Value
		case *ast.Array:
			n, ok := t.Value.(ast.Number)
			if !ok {
				return nil
			}
			i, ok := n.Int()
			if !ok || i < 0 || i >= parent.Len() {
				return nil
			}
			v = parent.Elem(i).Value
		default:
			return nil
		}
	}
	return v
}

// Put keeps nothing: it is there already.
func (baseCache) Put(ast.Ref, ast.Value) {}

package plan

import (
	"strconv"
	"unicode/utf8"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/document"
)

// equal reports whether two values are equal. What is undefined equals nothing.
func equal(a, b *ast.Term) bool {
	if a == nil || b == nil {
		return false
	}
	if a == b {
		return true
	}
	switch x := a.Value.(type) {
	case *document.Value:
		return x.Equal(b.Value)
	case ast.String:
		y, ok := b.Value.(ast.String)
		return ok && x == y
	case ast.Boolean:
		y, ok := b.Value.(ast.Boolean)
		return ok && x == y
	case ast.Null:
		_, ok := b.Value.(ast.Null)
		return ok
	}
	if y, ok := b.Value.(*document.Value); ok {
		return y.Equal(a.Value)
	}
	return ast.Compare(a.Value, b.Value) == 0
}

// get returns what v has at a key, or nil: an element of an array, a member of an
// object, of a set the key itself.
func get(v ast.Value, key *ast.Term) *ast.Term {
	switch v := v.(type) {
	case ast.Object:
		return v.Get(key)
	case *ast.Array:
		if n, ok := key.Value.(ast.Number); ok {
			if i, ok := n.Int(); ok && i >= 0 && i < v.Len() {
				return v.Elem(i)
			}
		}
	case ast.Set:
		if v.Contains(key) {
			return key
		}
	}
	return nil
}

// getData is get on the way of a reference to data, which topdown reads by a path
// of strings: there a number is the key that it is written as, and a string that
// is a number an index.
func getData(v ast.Value, key *ast.Term) *ast.Term {
	switch v := v.(type) {
	case ast.Object:
		if n, ok := key.Value.(ast.Number); ok {
			key = ast.InternedTerm(string(n))
		}
		return v.Get(key)
	case *ast.Array:
		s, ok := key.Value.(ast.String)
		if !ok {
			return get(v, key)
		}
		if i, err := strconv.Atoi(string(s)); err == nil && i >= 0 && i < v.Len() {
			return v.Elem(i)
		}
		return nil
	}
	return get(v, key)
}

// isIndex reports whether getData takes a string for an index of an array.
func isIndex(s string) bool {
	_, err := strconv.Atoi(s)
	return err == nil
}

// isArray reports whether t is an array.
func isArray(t *ast.Term) bool {
	switch v := t.Value.(type) {
	case *document.Value:
		return v.Kind() == document.Array
	case *ast.Array:
		return true
	}
	return false
}

// isObject reports whether t is an object.
func isObject(t *ast.Term) bool {
	switch v := t.Value.(type) {
	case *document.Value:
		return v.Kind() == document.Object
	case ast.Object:
		return true
	}
	return false
}

// sameData reports whether two terms are one, or hold one value of the data.
func sameData(a, b *ast.Term) bool {
	if a == nil || b == nil || a == b {
		return a == b
	}
	x, ok := a.Value.(*document.Value)
	if !ok {
		return false
	}
	y, ok := b.Value.(*document.Value)
	return ok && *x == *y
}

// length returns how many elements t has, or characters.
func length(t *ast.Term) int {
	if t == nil {
		return 0
	}
	switch v := t.Value.(type) {
	case *document.Value:
		return v.Len()
	case *ast.Array:
		return v.Len()
	case ast.Object:
		return v.Len()
	case ast.Set:
		return v.Len()
	case ast.String:
		return utf8.RuneCountInString(string(v))
	}
	return 0
}

// merged returns a and b in one. Where both say something, what is not two
// objects, it is that of a.
func merged(a, b *ast.Term) *ast.Term {
	if a == nil {
		return b
	}
	if b == nil {
		return a
	}
	x, ok := a.Value.(ast.Object)
	if !ok {
		return a
	}
	y, ok := b.Value.(ast.Object)
	if !ok {
		return a
	}
	out := ast.NewObjectWithCapacity(x.Len() + y.Len())
	x.Foreach(func(k, v *ast.Term) { out.Insert(k, merged(v, y.Get(k))) })
	y.Foreach(func(k, v *ast.Term) {
		if x.Get(k) == nil {
			out.Insert(k, v)
		}
	})
	return ast.NewTerm(out)
}

// upsert returns a value like old that has v at a path. What is not an object on
// the way is replaced by one.
func upsert(old *ast.Term, path []*ast.Term, v *ast.Term) *ast.Term {
	if len(path) == 0 {
		return v
	}
	var next *ast.Term
	size := 1
	before, ok := objectOf(document.Whole(old))
	if ok {
		next = before.Get(path[0])
		size += before.Len()
	}
	out := ast.NewObjectWithCapacity(size)
	if ok {
		before.Foreach(func(k, v *ast.Term) {
			if v != next {
				out.Insert(k, v)
			} else if k.Value.Compare(path[0].Value) != 0 {
				out.Insert(k, v) // the same value at another key
			}
		})
	}
	out.Insert(path[0], upsert(next, path[1:], v))
	return ast.NewTerm(out)
}

func objectOf(t *ast.Term) (ast.Object, bool) {
	if t == nil {
		return nil, false
	}
	obj, ok := t.Value.(ast.Object)
	return obj, ok
}

var systemKey = ast.NewTerm(ast.SystemDocumentKey)

// withoutSystem returns all of data as a policy sees it.
func withoutSystem(data *ast.Term) *ast.Term {
	data = document.Whole(data)
	obj, ok := objectOf(data)
	if !ok || obj.Get(systemKey) == nil {
		return data
	}
	out := ast.NewObjectWithCapacity(obj.Len())
	obj.Foreach(func(k, v *ast.Term) {
		if k.Value.Compare(systemKey.Value) != 0 {
			out.Insert(k, v)
		}
	})
	return ast.NewTerm(out)
}

// unfinished is an array while it is being made. It is a value only so that it can
// stand in a frame; nothing else looks at it.
type unfinished struct {
	ast.Null
	terms []*ast.Term
}

// insert puts a member into the object that is made at place t of the frame. An
// object of OPA must not have a member replaced: where hashes collide it loses
// others. So what is there already is left, and what is other makes a new object.
func insert(m *machine, t int, k, v *ast.Term) {
	obj := m.regs[t].Value.(ast.Object)
	old := obj.Get(k)
	if old == nil {
		obj.Insert(k, v)
		return
	}
	if old == v {
		return // it may have changed: see rebuilt
	}
	m.charge(memoryMember * int64(obj.Len()))
	out := ast.NewObjectWithCapacity(obj.Len())
	obj.Foreach(func(k2, v2 *ast.Term) {
		if v2 != old || k2.Value.Compare(k.Value) != 0 {
			out.Insert(k2, v2)
		}
	})
	out.Insert(k, v)
	m.regs[t] = ast.NewTerm(out)
}

// rebuilt returns an object whose members, and theirs to that depth, have changed
// since they were put into it, which its hash does not know.
func rebuilt(t *ast.Term, depth int) *ast.Term {
	obj, ok := objectOf(t)
	if !ok || depth < 0 {
		return t
	}
	out := ast.NewObjectWithCapacity(obj.Len())
	obj.Foreach(func(k, v *ast.Term) { out.Insert(k, rebuilt(v, depth-1)) })
	return ast.NewTerm(out)
}

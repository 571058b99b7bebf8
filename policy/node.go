package policy

import (
	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util"
)

// node is a value that changes: what it was, and what is other now. The value
// that it was stays as it is. The objects on the way to a change are copied, once
// for all changes, when the new value is asked for.
type node struct {
	base    ast.Value
	changed map[string]*node // of an object :: key → its value; nil: removed
	elems   []*node          // of an array, all of them; only if opened
	opened  bool
}

type nodeKind int

const (
	kindLeaf nodeKind = iota
	kindObject
	kindArray
)

func (n *node) kind() nodeKind {
	switch n.base.(type) {
	case ast.Object:
		return kindObject
	case *ast.Array:
		return kindArray
	}
	return kindLeaf
}

// open makes an object or array ready to be changed.
func (n *node) open() {
	if n.opened {
		return
	}
	n.opened = true
	switch base := n.base.(type) {
	case ast.Object:
		n.changed = make(map[string]*node)
	case *ast.Array:
		nodes := make([]node, base.Len())
		n.elems = make([]*node, base.Len())
		for i := range nodes {
			nodes[i].base = base.Elem(i).Value
			n.elems[i] = &nodes[i]
		}
	}
}

// find returns the node at path, or nil.
func (n *node) find(path []string) *node {
	for _, segment := range path {
		if n = n.child(segment); n == nil {
			return nil
		}
	}
	return n
}

// child returns a member or element, which may then be changed, or nil.
func (n *node) child(segment string) *node {
	switch base := n.base.(type) {
	case ast.Object:
		if c, ok := n.changed[segment]; ok {
			return c
		}
		t := base.Get(ast.StringTerm(segment))
		if t == nil {
			return nil
		}
		c := &node{base: t.Value}
		n.set(segment, c)
		return c
	case *ast.Array:
		n.open()
		if i, ok := util.Atoi(segment); ok && i >= 0 && i < len(n.elems) {
			return n.elems[i]
		}
	}
	return nil
}

// set makes c a member, or an element in the place of one that is there. A nil c
// removes the member.
func (n *node) set(segment string, c *node) {
	n.open()
	if n.kind() == kindArray {
		i, _ := util.Atoi(segment)
		n.elems[i] = c
		return
	}
	n.changed[segment] = c
}

// value returns the value that n is now.
func (n *node) value() ast.Value {
	if !n.opened {
		return n.base
	}
	base, ok := n.base.(ast.Object)
	if !ok {
		terms := make([]*ast.Term, len(n.elems))
		for i, c := range n.elems {
			terms[i] = ast.NewTerm(c.value())
		}
		return ast.NewArray(terms...)
	}
	obj := ast.NewObjectWithCapacity(base.Len() + len(n.changed))
	n.members(func(k, v *ast.Term) { obj.Insert(k, v) }, func(key string, c *node) {
		obj.Insert(ast.StringTerm(key), ast.NewTerm(c.value()))
	})
	return obj
}

// members calls same for the members of an object that are what they were, and
// other for the others that there are.
func (n *node) members(same func(k, v *ast.Term), other func(key string, c *node)) {
	n.base.(ast.Object).Foreach(func(k, v *ast.Term) {
		if s, ok := k.Value.(ast.String); ok {
			if _, ok := n.changed[string(s)]; ok {
				return
			}
		}
		same(k, v)
	})
	for key, c := range n.changed {
		if c != nil {
			other(key, c)
		}
	}
}

// size estimates what the value takes, as sizeOf does.
func (n *node) size() int64 {
	if !n.opened {
		return sizeOf(n.base)
	}
	size := int64(sizeTerm + sizeObject)
	if n.kind() == kindArray {
		size = sizeTerm + sizeArray
		for _, c := range n.elems {
			size += sizeElem + c.size()
		}
		return size
	}
	n.members(func(k, v *ast.Term) {
		size += sizeMember + sizeOf(k.Value) + sizeOf(v.Value)
	}, func(key string, c *node) {
		size += sizeMember + sizeOf(ast.String(key)) + c.size()
	})
	return size
}

package policy

import (
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/gatehouse-authz/gatehouse/document"
)

// node is a value that changes: what it was, and what is other now. The value
// that it was stays as it is. The objects on the way to a change are made anew, once
// for all changes, when a document is made of the new value.
type node struct {
	base    document.Value
	changed map[string]*node // of an object :: key → its value; nil: removed
	elems   []*node          // of an array, all of them; only if opened
	opened  bool
}

// emptyObject is an object without members.
var emptyObject = func() document.Value {
	doc, err := document.Of(map[string]any{})
	if err != nil {
		panic(err)
	}
	return doc.Root()
}()

// open makes an object or array ready to be changed.
func (n *node) open() {
	if n.opened {
		return
	}
	n.opened = true
	switch n.base.Kind() {
	case document.Object:
		n.changed = make(map[string]*node)
	case document.Array:
		nodes := make([]node, n.base.Len())
		n.elems = make([]*node, 0, len(nodes))
		for _, e := range n.base.All() {
			c := &nodes[len(n.elems)]
			c.base = e
			n.elems = append(n.elems, c)
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
	switch n.base.Kind() {
	case document.Object:
		if c, ok := n.changed[segment]; ok {
			return c
		}
		v := n.base.Member(segment)
		if !v.Defined() {
			return nil
		}
		c := &node{base: v}
		n.set(segment, c)
		return c
	case document.Array:
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
	if n.base.Kind() == document.Array {
		i, _ := util.Atoi(segment)
		n.elems[i] = c
		return
	}
	n.changed[segment] = c
}

// value returns what n is now, as document.Of takes it.
func (n *node) value() any {
	switch {
	case !n.opened:
		return n.base
	case n.base.Kind() == document.Array:
		elems := make([]any, len(n.elems))
		for i, c := range n.elems {
			elems[i] = c.value()
		}
		return elems
	}
	members := make(map[string]any, len(n.changed))
	for key, c := range n.changed {
		if c == nil {
			members[key] = document.Removed
		} else {
			members[key] = c.value()
		}
	}
	return document.Edit{Base: n.base, Members: members}
}

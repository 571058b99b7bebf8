package plan

import (
	"fmt"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
)

// A rule such as p[i] := data.list[i] has the indexes of an array, or the keys of an
// object, for its own. Asked for p["0"] or p[1], topdown looks for data.list["0"],
// which it takes for data.list[0], and for data.object[1], which it takes for
// data.object["1"]: it gives members that p as a whole has not. A plan has p as a
// whole. Where such a rule is asked for such a key, what follows has topdown asked:
// always where the key is a constant, otherwise by an evaluation that meets one.

// keyKinds say what keys of data a value may have for its own.
type keyKinds int

const (
	listKeys   keyKinds = 1 << iota // indexes, which a text of digits may stand for
	numberKeys                      // texts of digits, which a number may stand for
)

// odd reports whether a key could be written in another way for topdown.
func (k keyKinds) odd(v ast.Value) bool {
	odd := false
	switch v := v.(type) {
	case ast.String:
		return k&listKeys != 0 && isIndex(string(v))
	case ast.Number:
		_, err := strconv.ParseUint(string(v), 10, 63)
		return k&numberKeys != 0 || err != nil
	case *ast.Array:
		v.Foreach(func(t *ast.Term) { odd = odd || k.odd(t.Value) })
	case ast.Object, ast.Set:
		return true
	}
	return odd
}

// searchedKeys are the keys of scans of data, in the function that is compiled.
type searchedKeys map[ir.Local]keyKinds

// searched takes note of the key of a scan of data that somebody looks at.
func (c *compiler) searched(s *ir.ScanStmt) {
	root := c.unit.stored[s.Source]
	switch {
	case s.Source != ir.Data && !c.unit.derived[s.Source]:
		return
	case root == nil:
		root = c.data
	}
	if k := kindsOf(placeOf(root), !sameData(root, c.unit.known[s.Source])); k != 0 {
		c.searchedKeys[s.Key] |= k
	}
}

// kindsOf returns what keys there are that may be written in two ways, or in any
// value below where that is asked.
func kindsOf(p place, below bool) (k keyKinds) {
	n, at := p.elements()
	for i := range n {
		key, v := at(i)
		switch {
		case !key.defined():
			k |= listKeys
		case !key.isText() || isIndex(key.text()):
			k |= numberKeys
		}
		if below {
			k |= kindsOf(v, true)
		}
		if k == listKeys|numberKeys || k == listKeys && !below {
			break
		}
	}
	return k
}

// given returns which of those keys come to be keys of what a function gives.
func (keys searchedKeys) given(f *ir.Func) (gives keyKinds) {
	if len(keys) == 0 {
		return 0
	}
	of := func(op ir.Operand) keyKinds {
		l, _ := op.Value.(ir.Local)
		return keys[l]
	}
	for changed := true; changed; {
		changed = false
		from := func(op ir.Operand, to ir.Local) {
			if k := of(op); keys[to]|k != keys[to] {
				keys[to] |= k
				changed = true
			}
		}
		for _, b := range f.Blocks {
			walk(b, func(s ir.Stmt) {
				switch s := s.(type) {
				case *ir.AssignVarStmt:
					from(s.Source, s.Target)
				case *ir.AssignVarOnceStmt:
					from(s.Source, s.Target)
				case *ir.ArrayAppendStmt:
					from(s.Value, s.Array)
				case *ir.ObjectInsertStmt:
					gives |= of(s.Key)
				case *ir.ObjectInsertOnceStmt:
					gives |= of(s.Key)
				case *ir.SetAddStmt:
					gives |= of(s.Value)
				}
			})
		}
	}
	return gives
}

// findAsked finds the locals that have what functions with such keys give, or what
// is in it.
func (c *compiler) findAsked(blocks []*ir.Block) {
	c.asked = nil
	if len(c.givesKeys) == 0 {
		return
	}
	c.asked = searchedKeys{}
	all := keyKinds(0)
	for _, k := range c.givesKeys {
		all |= k
	}
	for changed := true; changed; {
		changed = false
		add := func(l ir.Local, k keyKinds) {
			if c.asked[l]|k != c.asked[l] {
				c.asked[l] |= k
				changed = true
			}
		}
		for _, b := range blocks {
			walk(b, func(s ir.Stmt) {
				switch s := s.(type) {
				case *ir.CallStmt:
					add(s.Result, c.givesKeys[s.Func])
				case *ir.CallDynamicStmt:
					add(s.Result, all)
				case *ir.AssignVarStmt:
					if l, ok := s.Source.Value.(ir.Local); ok {
						add(s.Target, c.asked[l])
					}
				case *ir.ScanStmt:
					add(s.Value, c.asked[s.Source])
				case *ir.DotStmt:
					if l, ok := s.Source.Value.(ir.Local); ok {
						add(s.Target, c.asked[l])
					}
				}
			})
		}
	}
}

var errOddKey = fmt.Errorf("%w: a rule with keys of data is asked for one that could be written as a number or a string", ErrUnsupported)

// withKeys returns a step that looks something up, after having looked at its keys
// where they are asked of such a function.
func (c *compiler) withKeys(list []ir.Stmt, st step) (step, error) {
	var keys []operand
	var kinds []keyKinds
	for _, s := range list {
		dot, ok := s.(*ir.DotStmt)
		if !ok {
			continue
		}
		l, ok := dot.Source.Value.(ir.Local)
		if !ok || c.asked[l] == 0 {
			continue
		}
		key := c.operand(dot.Key)
		if key.term == nil {
			keys, kinds = append(keys, key), append(kinds, c.asked[l])
		} else if c.asked[l].odd(key.term.Value) {
			return nil, errOddKey
		}
	}
	if len(keys) == 0 {
		return st, nil
	}
	return func(m *machine) signal {
		for i := range keys {
			if t := keys[i].load(m); t != nil && kinds[i].odd(t.Value) {
				m.err = errOddKey
				return sigError
			}
		}
		return st(m)
	}, nil
}

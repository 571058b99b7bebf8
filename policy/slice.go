package policy

import (
	"maps"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Slice says what can be read of a value: all of it, or of an object some members,
// or nothing. To an evaluation that reads no more, a value is the same with what it
// does not read and without. It is never changed.
type Slice struct {
	// Whole says that all of the value may be read.
	Whole bool

	// Members are those that may be read, by name; none where Whole. That a
	// value may be no object, or have them not, says nothing about them.
	Members []Member
}

// Member is a member of an object of which something may be read.
type Member struct {
	Name  string
	Key   *ast.Term // the same
	Slice *Slice
}

// All is the Slice of what is read as a whole.
var All = &Slice{Whole: true}

// Of returns what may be read of a member; nil: nothing.
func (s *Slice) Of(name string) *Slice {
	if s.Whole {
		return All
	}
	for i := range s.Members {
		if s.Members[i].Name == name {
			return s.Members[i].Slice
		}
	}
	return nil
}

// Join returns what is read where both are.
func (s *Slice) Join(other *Slice) *Slice {
	if s.Whole || other.Whole {
		return All
	}
	t := new(sliceTree)
	t.join(s)
	t.join(other)
	return t.slice()
}

// Slice returns what the entry point can read of its input: of one that there is
// not, nothing.
func (p *Policy) Slice(entry string) *Slice {
	if e, ok := p.entries[entry]; ok {
		return e.slice
	}
	return new(Slice)
}

// Bounds of a Slice: what is read deeper is read as a whole, and so is an object
// with more members.
const (
	sliceDepth   = 8
	sliceMembers = 64
)

// sliceTree is a Slice that grows.
type sliceTree struct {
	whole   bool
	members map[string]*sliceTree
}

func (t *sliceTree) take() { t.whole, t.members = true, nil }

// member returns a member, or nil where the value is read as a whole.
func (t *sliceTree) member(name string) *sliceTree {
	if t.whole {
		return nil
	}
	m, ok := t.members[name]
	if ok {
		return m
	}
	if len(t.members) == sliceMembers {
		t.take()
		return nil
	}
	if t.members == nil {
		t.members = make(map[string]*sliceTree)
	}
	m = new(sliceTree)
	t.members[name] = m
	return m
}

// read notes that what a path leads to is read: whatever that may be, from the
// first element on that is no name.
func (t *sliceTree) read(path []*ast.Term) {
	for i, term := range path {
		name, ok := term.Value.(ast.String)
		if !ok || i == sliceDepth {
			break
		}
		if t = t.member(string(name)); t == nil {
			return
		}
	}
	t.take()
}

func (t *sliceTree) join(s *Slice) {
	if s.Whole {
		t.take()
		return
	}
	for _, m := range s.Members {
		if member := t.member(m.Name); member != nil {
			member.join(m.Slice)
		}
	}
}

func (t *sliceTree) slice() *Slice {
	if t.whole {
		return All
	}
	s := &Slice{Members: make([]Member, 0, len(t.members))}
	for _, name := range slices.Sorted(maps.Keys(t.members)) {
		key := ast.InternedTerm(name)
		s.Members = append(s.Members, Member{name, key, t.members[name].slice()})
	}
	return s
}

// rule notes what a rule reads of the input.
func (t *sliceTree) rule(rule *ast.Rule) {
	visitor := ast.NewGenericVisitor(nil)
	visitor = ast.NewGenericVisitor(func(x any) bool {
		switch x := x.(type) {
		case *ast.Rule:
			return x != rule
		case *ast.With:
			// What a rule sees is not the input then, but the input is not what
			// it was either where it is put together again.
			if isInput(x.Target) {
				t.take()
			}
		case ast.Ref:
			if !x[0].Equal(ast.InputRootDocument) {
				return false
			}
			t.read(x[1:])
			for _, term := range x[1:] {
				visitor.Walk(term)
			}
			return true
		case ast.Var:
			if x.Equal(ast.InputRootDocument.Value) {
				t.take()
			}
		}
		return t.whole
	})
	visitor.Walk(rule)
	for _, term := range rule.Head.Ref()[1:] {
		visitor.Walk(term)
	}
	if rule.Else != nil {
		t.rule(rule.Else)
	}
}

func isInput(t *ast.Term) bool {
	ref, ok := t.Value.(ast.Ref)
	return ok && ref[0].Equal(ast.InputRootDocument) || t.Equal(ast.InputRootDocument)
}

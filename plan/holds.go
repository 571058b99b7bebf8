package plan

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ir"
)

// findHolds finds the locals of a rule that all who read them look at where it lies,
// so that they may be given a term that holds a value of the data and nothing needs to
// be made of it. All others, and whatever leaves a rule, are as OPA has them: what
// is not named here is given no such term.
func (u *unit) findHolds(b *ir.Block) {
	u.holds = map[ir.Local]bool{}
	looked := map[ir.Local]int{}        // :: local → how often it is read by who looks at it where it lies
	passed := map[ir.Local][]ir.Local{} // :: local → those that are given it
	look := func(ops ...ir.Operand) {
		for _, op := range ops {
			if l, ok := op.Value.(ir.Local); ok {
				looked[l]++
			}
		}
	}
	walk(b, func(s ir.Stmt) {
		switch s := s.(type) {
		case *ir.DotStmt:
			look(s.Source)
		case *ir.LenStmt:
			look(s.Source)
		case *ir.IsArrayStmt:
			look(s.Source)
		case *ir.IsObjectStmt:
			look(s.Source)
		case *ir.IsSetStmt:
			look(s.Source)
		case *ir.EqualStmt:
			look(s.A, s.B)
		case *ir.NotEqualStmt:
			look(s.A, s.B)
		case *ir.AssignVarStmt:
			if l, ok := s.Source.Value.(ir.Local); ok {
				looked[l]++
				passed[l] = append(passed[l], s.Target)
			}
		case *ir.ScanStmt:
			looked[s.Source]++
		case *ir.CallStmt:
			for _, i := range placeOperands[s.Func] {
				if i < len(s.Args) {
					look(s.Args[i])
				}
			}
		}
	})
	for l := range u.writes {
		u.holds[l] = u.single(l) && u.mutates[l] == 0 && u.reads[l] == looked[l]
	}
	for again := true; again; {
		again = false
		for l, to := range passed {
			if u.holds[l] && slices.ContainsFunc(to, func(l ir.Local) bool { return !u.holds[l] }) {
				u.holds[l], again = false, true
			}
		}
	}
}

// within reports whether a local that a scan sets, and those that are given what it
// has, are read in the block of the scan alone.
func (u *unit) within(b *ir.Block, l ir.Local) bool {
	if !u.holds[l] {
		return false
	}
	reads, all := 0, true
	walk(b, func(s ir.Stmt) {
		reads += count(effectsOf(s).reads, l)
		if a, ok := s.(*ir.AssignVarStmt); ok && a.Source.Value == l {
			all = all && u.within(b, a.Target)
		}
	})
	return all && reads == u.reads[l]
}

// holding says what terms a local may have.
func (c *compiler) holding(l ir.Local) holding {
	if c.unit.holds[l] {
		return c.held
	}
	return asOPA
}

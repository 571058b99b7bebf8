package plan

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ir"
)

// straightened returns a list of statements with those in it that the planner has
// put into nested blocks for nothing: where data and rules may both give a value,
// it has a block for each and one that ends the outer block where none does. With
// one way to a value there is nothing to choose, and what fails ends the outer
// block by itself.
func straightened(list []ir.Stmt) []ir.Stmt {
	for i, s := range list {
		inner := only(s)
		if inner == nil {
			continue
		}
		out := append(slices.Clone(list[:i]), inner...)
		for _, s := range list[i+1:] {
			if inner := only(s); inner != nil {
				out = append(out, inner...)
			} else {
				out = append(out, s)
			}
		}
		return out
	}
	return list
}

// only returns the statements S of {{S; break 1}; break 1}, where each is one that
// ends the block it is in or goes on, and nil for all else.
func only(s ir.Stmt) []ir.Stmt {
	outer, ok := s.(*ir.BlockStmt)
	if !ok || len(outer.Blocks) != 1 {
		return nil
	}
	stmts := outer.Blocks[0].Stmts
	if len(stmts) != 2 || !isBreak(stmts[1]) {
		return nil
	}
	inner, ok := stmts[0].(*ir.BlockStmt)
	if !ok || len(inner.Blocks) != 1 {
		return nil
	}
	stmts = inner.Blocks[0].Stmts
	n := len(stmts) - 1
	if n < 0 || !isBreak(stmts[n]) {
		return nil
	}
	for _, s := range stmts[:n] {
		switch s.(type) {
		case *ir.DotStmt, *ir.CallStmt, *ir.AssignVarStmt, *ir.EqualStmt, *ir.NotEqualStmt, *ir.NopStmt,
			*ir.MakeNullStmt, *ir.MakeNumberIntStmt, *ir.MakeNumberRefStmt:
		default:
			return nil
		}
	}
	return stmts[:n:n]
}

func isBreak(s ir.Stmt) bool {
	b, ok := s.(*ir.BreakStmt)
	return ok && b.Index == 1
}

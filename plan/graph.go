package plan

import (
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/builtins"
)

// reachablePaths is graph.reachable_paths. There may be more paths than anything can
// hold, of a few dozen nodes: it ends where they are over MaxBuilt, and when the
// evaluation is cancelled.
func reachablePaths(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
	graph, err := builtins.ObjectOperand(operands[0].Value, 1)
	if err != nil {
		return err
	}
	var roots []*ast.Term
	switch initial := operands[1].Value.(type) {
	case *ast.Array, ast.Set:
		roots = vertices(initial)
	default:
		return builtins.NewOperandTypeErr(2, initial, "{array, set}")
	}
	w := pathWalk{graph: graph, bctx: &bctx, found: ast.NewSet(), left: MaxBuilt, on: map[int]int{}}
	for _, root := range roots {
		edges := graph.Get(root)
		if edges == nil {
			continue
		}
		w.enter(root)
		next := vertices(edges.Value)
		if len(next) == 0 {
			err = w.add()
		}
		for _, neighbour := range next {
			if err == nil {
				err = w.walk(neighbour)
			}
		}
		w.leave()
		if err != nil {
			return err
		}
	}
	return iter(ast.NewTerm(w.found))
}

// vertices are the elements of an array or a set; anything else has none. They may be
// the set's own.
func vertices(v ast.Value) (list []*ast.Term) {
	switch v := v.(type) {
	case *ast.Array:
		v.Foreach(func(t *ast.Term) { list = append(list, t) })
	case ast.Set:
		list = v.Slice()
	}
	return list
}

// maxPath bounds the nodes of a path: each takes some of the stack, too.
const maxPath = MaxBuilt / 512

// pathWalk is a walk over the paths of a graph.
type pathWalk struct {
	graph ast.Object
	bctx  *topdown.BuiltinContext
	path  []*ast.Term
	on    map[int]int // :: hash → how many of the path have it
	found ast.Set
	left  allowance
}

func (w *pathWalk) enter(node *ast.Term) {
	w.path = append(w.path, node)
	w.on[node.Hash()]++
}

func (w *pathWalk) leave() {
	last := len(w.path) - 1
	w.on[w.path[last].Hash()]--
	w.path = w.path[:last]
}

func (w *pathWalk) passed(node *ast.Term) bool {
	return w.on[node.Hash()] > 0 && slices.ContainsFunc(w.path, node.Equal)
}

// walk finds the paths that go on with node, which is not on the path.
func (w *pathWalk) walk(node *ast.Term) error {
	if err := cancelled(w.bctx, ast.ReachablePathsBuiltin.Name); err != nil {
		return err
	}
	if len(w.path) == maxPath {
		return tooLarge(ast.ReachablePathsBuiltin.Name)
	}
	edges := w.graph.Get(node)
	if edges == nil {
		return w.add() // what is not in the graph is on no path
	}
	w.enter(node)
	defer w.leave()
	next := vertices(edges.Value)
	if len(next) == 0 {
		return w.add()
	}
	for _, neighbour := range next {
		var err error
		if w.passed(neighbour) {
			err = w.add() // a path ends before it comes round
		} else {
			err = w.walk(neighbour)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// add adds the path as it is.
func (w *pathWalk) add() error {
	path := ast.ArrayTerm(slices.Clone(w.path)...)
	before := w.found.Len()
	w.found.Add(path)
	if w.found.Len() > before {
		if w.left -= allowance(memoryOf(path)) + memoryMember; w.left < 0 {
			return tooLarge(ast.ReachablePathsBuiltin.Name)
		}
	}
	return nil
}

// reachableNodes is graph.reachable. OPA's looks at a node as often as an edge leads to it,
// and at all its edges each time.
func reachableNodes(bctx topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
	graph, err := builtins.ObjectOperand(operands[0].Value, 1)
	if err != nil {
		return err
	}
	var queue []*ast.Term
	switch initial := operands[1].Value.(type) {
	case *ast.Array, ast.Set:
		queue = slices.Clone(vertices(initial))
	default:
		return builtins.NewOperandTypeErr(2, initial, "{array, set}")
	}
	reached, seen := ast.NewSet(), ast.NewSet()
	for _, node := range queue {
		seen.Add(node)
	}
	for len(queue) > 0 {
		if err := cancelled(&bctx, ast.ReachableBuiltin.Name); err != nil {
			return err
		}
		node := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		edges := graph.Get(node)
		if edges == nil {
			continue
		}
		reached.Add(node)
		for _, neighbour := range vertices(edges.Value) {
			if !seen.Contains(neighbour) {
				seen.Add(neighbour)
				queue = append(queue, neighbour)
			}
		}
	}
	return iter(ast.NewTerm(reached))
}

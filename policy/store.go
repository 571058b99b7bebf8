package policy

import (
	"context"
	"errors"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
)

// store is the data of a Policy under OPA's storage interface. It is never
// written, so it needs no lock and its one transaction is itself.
//
// The documents of the bundles are shared, not copied: only the objects on the
// way to a bundle's roots are the store's own.
type store struct {
	storage.PolicyNotSupported
	storage.TriggersNotSupported

	root ast.Object
}

var (
	errReadOnly = errors.New("policy data is read-only")
	// errNotFound is one value for all reads that miss: rules are looked up as
	// data too, so that misses are common and must not cost an allocation.
	errNotFound = &storage.Error{Code: storage.NotFoundErr, Message: "document does not exist"}
)

// newStore joins the data of parts, whose roots do not overlap.
func newStore(parts []Named) *store {
	root := ast.NewObject()
	system := ast.NewObject()
	for _, part := range parts {
		root = merge(root, part.data)
		system.Insert(ast.StringTerm(part.Name), ast.ObjectTerm(
			ast.Item(ast.StringTerm("manifest"), ast.NewTerm(part.manifest))))
	}
	root = merge(root, ast.NewObject(ast.Item(ast.StringTerm("system"),
		ast.ObjectTerm(ast.Item(ast.StringTerm("bundles"), ast.NewTerm(system))))))
	return &store{root: root}
}

// merge returns a and b in one object. Below a key that only one of them has,
// the value itself is taken.
func merge(a, b ast.Object) ast.Object {
	switch {
	case a.Len() == 0:
		return b
	case b.Len() == 0:
		return a
	}
	merged := ast.NewObject()
	a.Foreach(func(k, v *ast.Term) { merged.Insert(k, v) })
	b.Foreach(func(k, v *ast.Term) {
		if old := merged.Get(k); old != nil {
			ao, aok := old.Value.(ast.Object)
			bo, bok := v.Value.(ast.Object)
			if aok && bok {
				v = ast.NewTerm(merge(ao, bo))
			}
		}
		merged.Insert(k, v)
	})
	return merged
}

// find returns the value at path, or nil.
func (s *store) find(path []string) ast.Value {
	var v ast.Value = s.root
	for _, segment := range path {
		switch parent := v.(type) {
		case ast.Object:
			child := parent.Get(ast.InternedTerm(segment))
			if child == nil {
				return nil
			}
			v = child.Value
		case *ast.Array:
			i, err := strconv.Atoi(segment)
			if err != nil || i < 0 || i >= parent.Len() {
				return nil
			}
			v = parent.Elem(i).Value
		default:
			return nil
		}
	}
	return v
}

// conflicts reports whether data has a value where a rule of that path would
// be, or one on the way to it that is not an object.
func (s *store) conflicts(path []string) (bool, error) {
	if s.find(path) != nil {
		return true, nil
	}
	for i := len(path) - 1; i > 0; i-- {
		if v := s.find(path[:i]); v != nil {
			_, isObject := v.(ast.Object)
			return !isObject, nil
		}
	}
	return false, nil
}

// ID makes the store its own transaction.
func (s *store) ID() uint64 { return 0 }

func (s *store) NewTransaction(context.Context, ...storage.TransactionParams) (storage.Transaction, error) {
	return s, nil
}

// Read returns an ast.Value, which topdown takes as it is.
func (s *store) Read(_ context.Context, _ storage.Transaction, path storage.Path) (any, error) {
	if v := s.find(path); v != nil {
		return v, nil
	}
	return nil, errNotFound
}

func (s *store) Write(context.Context, storage.Transaction, storage.PatchOp, storage.Path, any) error {
	return errReadOnly
}

func (s *store) Truncate(context.Context, storage.Transaction, storage.TransactionParams, storage.Iterator) error {
	return errReadOnly
}

func (s *store) Commit(context.Context, storage.Transaction) error { return nil }
func (s *store) Abort(context.Context, storage.Transaction)        {}

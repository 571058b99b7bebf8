package policy

import (
	"context"
	"errors"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"

	"github.com/gatehouse-authz/gatehouse/document"
)

// store is the data of a Policy under OPA's storage interface. It is never
// written, so it needs no lock and its one transaction is itself.
//
// The documents of the bundles are shared, not copied: only the objects on the
// way to a bundle's roots are the store's own. What is read becomes ast.Value then,
// and the document remembers it.
type store struct {
	storage.PolicyNotSupported
	storage.TriggersNotSupported

	root document.Value
}

var (
	errReadOnly = errors.New("policy data is read-only")
	// errNotFound is one value for all reads that miss: rules are looked up as
	// data too, so that misses are common and must not cost an allocation.
	errNotFound = &storage.Error{Code: storage.NotFoundErr, Message: "document does not exist"}
)

// newStore joins the data of parts, whose roots do not overlap.
func newStore(parts []Named) (*store, error) {
	objects := make([]document.Value, 0, len(parts)+1)
	bundles := make(map[string]any, len(parts))
	for _, part := range parts {
		objects = append(objects, part.data.Root())
		bundles[part.Name] = map[string]any{"manifest": part.manifest.Root()}
	}
	system, err := document.Of(map[string]any{"system": map[string]any{"bundles": bundles}})
	if err != nil {
		return nil, err
	}
	root, err := document.Join(append(objects, system.Root())...)
	return &store{root: root}, err
}

// find returns the value at path, or none.
func (s *store) find(path []string) document.Value { return s.root.At(path...) }

// read returns the value at path, or nil: what is there already, or is part of
// such, as it is.
func (s *store) read(path []string) ast.Value {
	v := s.root
	for i, segment := range path {
		if t := v.Known(); t != nil {
			return valueIn(t.Value, path[i:])
		}
		if v = v.At(segment); !v.Defined() {
			return nil
		}
	}
	return v.Value()
}

// valueIn returns what v has at path, or nil.
func valueIn(v ast.Value, path []string) ast.Value {
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
	if s.find(path).Defined() {
		return true, nil
	}
	for i := len(path) - 1; i > 0; i-- {
		if v := s.find(path[:i]); v.Defined() {
			return v.Kind() != document.Object, nil
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
	if v := s.read(path); v != nil {
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

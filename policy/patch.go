package policy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/gatehouse-authz/gatehouse/document"
)

// The bounds of a delta.
const (
	maxPatches  = 10_000  // operations
	maxMoves    = 1 << 27 // elements that its operations move in arrays together
	maxPartSize = 1 << 30 // bytes, where the caller of Patch gives no bound
)

// Patch returns the part that a delta bundle makes of p, as OPA does: it upserts,
// replaces and removes values of the data, one operation after the other, and
// its manifest takes the place of that of p. What it does not change is shared
// with p, which stays as it is.
//
// It returns an error, that names the operation, unless the delta has the roots
// of p, each of its at most 10,000 operations is within them and names a place
// that is there. Nor may the new part be larger than maxSize, in bytes as Size
// estimates them. Not positive, maxSize is 1 GiB.
func (p *Part) Patch(b *bundle.Bundle, maxSize int64) (part *Part, err error) {
	defer func() {
		if r := recover(); r != nil {
			part, err = nil, fmt.Errorf("patching: panic: %v", r)
		}
	}()
	if maxSize <= 0 {
		maxSize = maxPartSize
	}
	switch n := len(b.Patch.Data); {
	case n > maxPatches:
		return nil, fmt.Errorf("patching: %d operations, limit %d", n, maxPatches)
	case len(b.Modules) > 0 || len(b.Data) > 0:
		return nil, errors.New("patching: the bundle is not a delta")
	}
	own := *p
	own.Revision, own.Roots = b.Manifest.Revision, rootsOf(b.Manifest)
	if !sameRoots(own.Roots, p.Roots) {
		return nil, fmt.Errorf("patching: roots %q are not those of the bundle, %q", own.Roots, p.Roots)
	}
	if own.manifest, err = manifestOf(b.Manifest); err != nil {
		return nil, err
	}
	d := draft{data: node{base: p.data.Root()}}
	for i, op := range b.Patch.Data {
		if err := d.apply(op, p.Roots); err != nil {
			return nil, fmt.Errorf("patching: operation %d, %s of %q: %w", i, shown(op.Op), shown(op.Path), err)
		}
	}
	if own.data, err = document.Of(d.data.value()); err != nil {
		return nil, fmt.Errorf("patching: %w", err)
	}
	if own.Size() > maxSize {
		return nil, fmt.Errorf("patching: the bundle is then larger than %d bytes in memory", maxSize)
	}
	return &own, nil
}

// shown cuts a text that a delta's author chose, for use in an error.
func shown(s string) string { return s[:min(len(s), 200)] }

func sameRoots(a, b []string) bool {
	set := func(roots []string) []string {
		trimmed := make([]string, len(roots))
		for i, root := range roots {
			trimmed[i] = strings.Trim(root, "/")
		}
		slices.Sort(trimmed)
		return slices.Compact(trimmed)
	}
	return slices.Equal(set(a), set(b))
}

// patchPath parses the path of an operation: a JSON Pointer that may also be
// escaped like a URL.
func patchPath(text string) (storage.Path, error) {
	path, ok := storage.ParsePathEscaped("/" + strings.Trim(text, "/"))
	if !ok {
		return nil, errors.New("not a path")
	}
	if len(path) == 0 {
		return nil, errors.New("all of data cannot be changed at once")
	}
	for i, segment := range path {
		path[i] = strings.ReplaceAll(strings.ReplaceAll(segment, "~1", "/"), "~0", "~")
	}
	return path, nil
}

// draft is data that changes.
type draft struct {
	data  node
	moves int // elements moved so far
}

var (
	errNoPlace  = errors.New("there is no such place")
	errNotThere = errors.New("there is no such value")
)

func (d *draft) apply(op bundle.PatchOperation, roots []string) error {
	path, err := patchPath(op.Path)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(roots, func(root string) bool { return within(path, segmentsOf(root)) }) {
		return fmt.Errorf("not within roots %q", roots)
	}
	var v document.Value // none: it is removed
	if op.Op != "remove" {
		doc, err := document.Of(op.Value)
		if err != nil {
			return err
		}
		v = doc.Root()
	}
	last := path[len(path)-1]
	switch op.Op {
	case "upsert":
		parent, err := d.reach(path[:len(path)-1])
		if err != nil {
			return err
		}
		return d.put(parent, last, v)
	case "replace", "remove":
		parent := d.data.find(path[:len(path)-1])
		if parent == nil {
			return errNoPlace
		}
		return d.replace(parent, last, v)
	}
	return errors.New("no such operation")
}

// within reports whether path is root or in it.
func within(path, root []string) bool {
	return len(path) >= len(root) && slices.Equal(path[:len(root)], root)
}

// reach returns the node at path. Objects that are not there are made, in objects.
func (d *draft) reach(path []string) (*node, error) {
	if n := d.data.find(path); n != nil {
		return n, nil
	}
	n := &d.data
	for _, segment := range path {
		next := n.child(segment)
		if next == nil {
			if n.base.Kind() != document.Object {
				return nil, errNoPlace
			}
			if err := d.put(n, segment, emptyObject); err != nil {
				return nil, err
			}
			next = n.child(segment)
		}
		n = next
	}
	return n, nil
}

// put sets a member of an object, or inserts an element into an array.
func (d *draft) put(parent *node, segment string, v document.Value) error {
	switch parent.base.Kind() {
	case document.Object:
		parent.set(segment, &node{base: v})
		return nil
	case document.Array:
		parent.open()
		i := len(parent.elems)
		if segment != "-" && segment != strconv.Itoa(i) {
			var ok bool
			if i, ok = util.Atoi(segment); !ok || i < 0 || i >= len(parent.elems) {
				return errNoPlace
			}
		}
		if err := d.move(len(parent.elems) - i); err != nil {
			return err
		}
		parent.elems = slices.Insert(parent.elems, i, &node{base: v})
		return nil
	}
	return errNoPlace
}

// replace replaces a value that is there by v, or removes it if v is none.
func (d *draft) replace(parent *node, segment string, v document.Value) error {
	if parent.child(segment) == nil {
		return errNotThere
	}
	if v.Defined() {
		parent.set(segment, &node{base: v})
		return nil
	}
	if parent.base.Kind() == document.Object {
		parent.set(segment, nil)
		return nil
	}
	i, _ := util.Atoi(segment)
	if err := d.move(len(parent.elems) - i); err != nil {
		return err
	}
	parent.elems = slices.Delete(parent.elems, i, i+1)
	return nil
}

// move counts elements that are moved.
func (d *draft) move(n int) error {
	if d.moves += n; d.moves > maxMoves {
		return fmt.Errorf("the operations so far move more than %d elements of arrays", maxMoves)
	}
	return nil
}

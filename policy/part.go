package policy

import (
	"fmt"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
)

// Part is one bundle made ready to be compiled: parsed modules and data as one
// immutable document. It may be part of any number of policies.
type Part struct {
	Revision string
	Roots    []string

	modules  map[string]*ast.Module // :: path in the bundle → module
	data     ast.Object
	manifest ast.Object // as policies see it below data.system.bundles
	source   int64      // bytes of its modules' text
	size     int64
}

// Prepare makes a Part of a bundle as OPA reads it. The bundle's parsed modules
// become the part's own; its data is copied.
func Prepare(b *bundle.Bundle) (part *Part, err error) {
	defer func() {
		if r := recover(); r != nil {
			part, err = nil, fmt.Errorf("preparing: panic: %v", r)
		}
	}()
	part = &Part{
		Revision: b.Manifest.Revision,
		Roots:    []string{""},
		modules:  make(map[string]*ast.Module, len(b.Modules)),
	}
	if b.Manifest.Roots != nil {
		part.Roots = slices.Clone(*b.Manifest.Roots)
	}
	for _, m := range b.Modules {
		if m.Parsed == nil {
			return nil, fmt.Errorf("module %q is not parsed", m.Path)
		}
		part.modules[m.Path] = m.Parsed
		part.source += int64(len(m.Raw))
	}
	if part.data, err = objectOf(b.Data); err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	manifest := map[string]any{"revision": part.Revision, "roots": part.Roots}
	if len(b.Manifest.Metadata) > 0 {
		manifest["metadata"] = b.Manifest.Metadata
	}
	if part.manifest, err = objectOf(manifest); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	part.size = sizeOf(part.data) + sizeParsed*part.source
	return part, nil
}

func objectOf(m map[string]any) (ast.Object, error) {
	v, err := ast.InterfaceToValue(m)
	if err != nil {
		return nil, err
	}
	obj, ok := v.(ast.Object)
	if !ok {
		return ast.NewObject(), nil // of a nil map
	}
	return obj, nil
}

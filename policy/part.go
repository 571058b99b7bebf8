package policy

import (
	"fmt"
	"slices"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"

	"github.com/gatehouse-authz/gatehouse/document"
)

// Part is one bundle made ready to be compiled: parsed modules and data as one
// immutable document. It may be part of any number of policies.
type Part struct {
	Revision string
	Roots    []string

	modules  map[string]*ast.Module // :: path in the bundle → module
	data     *document.Document
	manifest *document.Document // as policies see it below data.system.bundles
	source   int64              // bytes of its modules' text
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
		Roots:    rootsOf(b.Manifest),
		modules:  make(map[string]*ast.Module, len(b.Modules)),
	}
	for _, m := range b.Modules {
		if m.Parsed == nil {
			return nil, fmt.Errorf("module %q is not parsed", m.Path)
		}
		part.modules[m.Path] = m.Parsed
		part.source += int64(len(m.Raw))
	}
	if part.data, err = document.Of(orEmpty(b.Data)); err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	if part.manifest, err = manifestOf(b.Manifest); err != nil {
		return nil, err
	}
	return part, nil
}

// Prints reports whether a rule of the part calls print.
func (p *Part) Prints() bool {
	prints := false
	for _, m := range p.modules {
		ast.WalkExprs(m, func(e *ast.Expr) bool {
			prints = prints || e.IsCall() && e.Operator().Equal(ast.Print.Ref())
			return prints
		})
	}
	return prints
}

func rootsOf(m bundle.Manifest) []string {
	if m.Roots == nil {
		return []string{""}
	}
	return slices.Clone(*m.Roots)
}

func manifestOf(m bundle.Manifest) (*document.Document, error) {
	shown := map[string]any{"revision": m.Revision, "roots": rootsOf(m)}
	if len(m.Metadata) > 0 {
		shown["metadata"] = m.Metadata
	}
	doc, err := document.Of(shown)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	return doc, nil
}

// orEmpty makes an object of a nil map too.
func orEmpty(m map[string]any) map[string]any {
	if m == nil {
		return map[string]any{}
	}
	return m
}

package tenants

import (
	"context"
	"fmt"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// Regression: what a document comes to take after it is held must count, and
// go when it is released, whatever it takes by then.
func TestMemoryGrows(t *testing.T) {
	users := map[string]any{}
	for i := range 2000 {
		users[fmt.Sprint("user-", i)] = map[string]any{"roles": []any{"reader"}}
	}
	b := &bundle.Bundle{Data: map[string]any{"users": users}}
	b.Modules = []bundle.ModuleFile{{Path: "p.rego", Parsed: ast.MustParseModule("package p\n\nn := count([u | some u in data.users])")}}
	part, err := policy.Prepare(b)
	if err != nil {
		t.Fatal(err)
	}
	pol, err := policy.Compile([]policy.Named{{Name: "b", Part: part}}, policy.Options{Entries: []string{"p/n"}, Evaluator: policy.Topdown})
	if err != nil {
		t.Fatal(err)
	}
	rev := &revision{policy: pol, content: []content{{part: part}}}
	m := newMemory()
	m.hold(rev)
	m.hold(rev)
	first := m.bytes
	if v, err := pol.Eval(context.Background(), "p/n", nil, nil, nil); err != nil || v.Compare(ast.Number("2000")) != 0 {
		t.Fatalf("got %v, %v, want 2000", v, err)
	}
	if m.measure(rev); m.bytes < 2*first {
		t.Errorf("got %d bytes after all users were looked at, want more than twice %d", m.bytes, first)
	}
	m.release(rev)
	if all, own := m.size(rev); all != m.bytes || own != all {
		t.Errorf("got sizes %d and %d, want %d", all, own, m.bytes)
	}
	if m.release(rev); m.bytes != 0 || len(m.uses) != 0 {
		t.Errorf("got %d bytes and %d uses when nothing is held", m.bytes, len(m.uses))
	}
}

package httpserve

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

// What all items have in common is under what each says: as the plain way to merge
// two maps has it, and neither is changed.
func TestMergeLikeMaps(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var random func(depth int) any
	random = func(depth int) any {
		switch n := r.IntN(8); {
		case n < 5 && depth > 0:
			m := map[string]any{}
			for range r.IntN(25) {
				m[fmt.Sprintf("k%d", r.IntN(30))] = random(depth - 1)
			}
			return m
		case n == 5:
			return []any{random(0), "x"}
		case n == 6:
			return nil
		}
		return r.IntN(3)
	}
	object := func() map[string]any {
		for {
			if m, ok := random(3).(map[string]any); ok {
				return m
			}
		}
	}
	var plain func(common, over map[string]any) map[string]any
	plain = func(common, over map[string]any) map[string]any {
		m := map[string]any{}
		for k, v := range common {
			m[k] = v
		}
		for k, v := range over {
			a, isObject := m[k].(map[string]any)
			b, wasObject := v.(map[string]any)
			if isObject && wasObject {
				v = plain(a, b)
			}
			m[k] = v
		}
		return m
	}
	value := func(v any) ast.Object { return ast.MustInterfaceToValue(v).(ast.Object) }
	for range 500 {
		common, over := object(), object()
		a, b := value(common), value(over)
		want := value(plain(common, over))
		got := merge(a, b)
		if got.Compare(want) != 0 || got.Hash() != want.Hash() || got.String() != want.String() || !got.IsGround() {
			t.Fatalf("%v over %v: got %v, want %v", b, a, got, want)
		}
		got.Foreach(func(k, v *ast.Term) {
			if want.Get(k) == nil || !want.Get(k).Equal(v) || !got.Get(k).Equal(v) {
				t.Fatalf("%v over %v: got %v at %v", b, a, v, k)
			}
		})
		if a.Compare(value(common)) != 0 || b.Compare(value(over)) != 0 {
			t.Fatal("what was merged has changed")
		}
	}
}

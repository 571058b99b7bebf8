package document

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

func users(n int) map[string]any {
	all := map[string]any{}
	for i := range n {
		all[fmt.Sprintf("user-%05d", i)] = map[string]any{"roles": []any{fmt.Sprintf("role-%d", i%20), fmt.Sprintf("role-%d", (i+7)%20)}}
	}
	return all
}

// What is equal is there once, in all documents, for as long as one has it.
func TestShared(t *testing.T) {
	unused(t, 0)
	a := of(t, map[string]any{"users": users(20000), "a": 1})
	alone := inUse()
	b := of(t, map[string]any{"users": users(20000), "b": 1})
	if got, want := inUse()-alone, 1; got != want {
		t.Errorf("a document that differs in one member: got %d blocks more, want %d", got, want)
	}
	if got, want := alone, 10; got < want {
		t.Errorf("got %d blocks for a large document, want at least %d", got, want)
	}
	changed := users(20000)
	changed["user-10000"], changed["user-10000x"] = true, "new"
	delete(changed, "user-00500")
	had := inUse()
	c := of(t, map[string]any{"users": changed, "a": 1})
	if got := inUse() - had; got > 6 {
		t.Errorf("a document that differs in three users: got %d blocks more, want a few", got)
	}
	edited := of(t, Edit{Base: a.Root(), Members: map[string]any{"users": Edit{Base: a.Root().Member("users"), Members: map[string]any{
		"user-10000": true, "user-10000x": "new", "user-00500": Removed, "no such user": Removed,
	}}}})
	check(t, edited.Root(), ast.MustInterfaceToValue(map[string]any{"users": changed, "a": 1}))
	if got := inUse() - had; got > 9 {
		t.Errorf("edited: got %d blocks more, want a few", got)
	}
	check(t, a.Root(), ast.MustInterfaceToValue(map[string]any{"users": users(20000), "a": 1}))
	runtime.KeepAlive(a)
	runtime.KeepAlive(b)
	runtime.KeepAlive(c)
	a, b, c, edited = nil, nil, nil, nil
	unused(t, 0)
}

// unused waits until no more blocks are in use than n.
func unused(t *testing.T, n int) {
	t.Helper()
	for i := 0; inUse() > n; i++ {
		if i == 1000 {
			t.Fatalf("got %d blocks that no document uses", inUse()-n)
		}
		runtime.GC()
		runtime.Gosched()
	}
}

func inUse() int {
	blocks.Lock()
	defer blocks.Unlock()
	return len(blocks.byDigest)
}

// Random edits give what the same changes give to a map.
func TestEdit(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 30 {
		v := map[string]any{}
		for range r.IntN(4000) {
			v[fmt.Sprint(r.IntN(10000))] = randomValue(r, 2)
		}
		doc := of(t, v)
		for range 3 {
			edit := Edit{Base: doc.Root(), Members: map[string]any{}}
			for range r.IntN(50) {
				key := fmt.Sprint(r.IntN(10000))
				if r.IntN(2) == 0 {
					edit.Members[key] = Removed
					delete(v, key)
				} else {
					edit.Members[key] = randomValue(r, 2)
					v[key] = edit.Members[key]
				}
			}
			doc = of(t, edit)
		}
		if want := ast.MustInterfaceToValue(v); !doc.Root().Equal(want) {
			t.Fatalf("got %v, want %v", short(doc.Root().Value()), short(want))
		}
		checkPlace(t, doc.Root(), ast.MustInterfaceToValue(v))
	}
}

func randomValue(r *rand.Rand, depth int) any {
	switch n := r.IntN(9); {
	case n == 0:
		return nil
	case n == 1:
		return r.IntN(2) == 0
	case n < 4:
		return json.Number([]string{"0", "1", "1.0", "-3", "1e2", "123456789", "600"}[r.IntN(7)])
	case n < 6 || depth == 0:
		return strings.Repeat("text", r.IntN(4))
	case n < 8:
		m := map[string]any{}
		for range r.IntN(14) {
			m[string(rune('a'+r.IntN(20)))] = randomValue(r, depth-1)
		}
		return m
	}
	l := []any{}
	for range r.IntN(6) {
		l = append(l, randomValue(r, depth-1))
	}
	return l
}

func TestJoin(t *testing.T) {
	a := of(t, map[string]any{"users": users(5000), "app": map[string]any{"x": 1, "deep": map[string]any{"l": []any{1}}}})
	b := of(t, decoded(t, `{"app": {"y": [1, 2], "deep": {"m": {}}}, "s": "text"}`))
	c := of(t, decoded(t, `{"s": {"t": 1}}`))
	v, err := Join(a.Root(), b.Root(), c.Root())
	if err != nil {
		t.Fatal(err)
	}
	check(t, v, ast.MustInterfaceToValue(map[string]any{
		"users": users(5000), "s": map[string]any{"t": 1},
		"app": map[string]any{"x": 1, "y": []any{1, 2}, "deep": map[string]any{"l": []any{1}, "m": map[string]any{}}},
	}))
	if v.Member("users") != a.Root().Member("users") {
		t.Error("what only one has is not that one's")
	}
	if v, err = Join(a.Root()); err != nil || v != a.Root() {
		t.Errorf("of one: got %v, %v, want itself", v, err)
	}
}

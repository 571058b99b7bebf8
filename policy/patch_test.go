package policy_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// snapshot is a bundle of data alone, with these roots or all of data.
func snapshot(data string, roots ...string) *bundle.Bundle {
	b := &bundle.Bundle{Manifest: bundle.Manifest{Revision: "1"}}
	b.Data = util.MustUnmarshalJSON([]byte(data)).(map[string]any)
	if len(roots) > 0 {
		b.Manifest.Roots = &roots
	}
	b.Manifest.Init()
	return b
}

// delta is a bundle of operations, each "OP PATH VALUE" in a line.
func delta(t testing.TB, text string, roots ...string) *bundle.Bundle {
	t.Helper()
	b := &bundle.Bundle{Manifest: bundle.Manifest{Revision: "2"}}
	if len(roots) > 0 {
		b.Manifest.Roots = &roots
	}
	b.Manifest.Init()
	for line := range strings.Lines(text) {
		fields := strings.SplitN(strings.TrimSpace(line), " ", 3)
		op := bundle.PatchOperation{Op: fields[0], Path: fields[1]}
		if len(fields) > 2 {
			if err := util.UnmarshalJSON([]byte(fields[2]), &op.Value); err != nil {
				t.Fatal(err)
			}
		}
		b.Patch.Data = append(b.Patch.Data, op)
	}
	return b
}

func prepare(t testing.TB, b *bundle.Bundle) *policy.Part {
	t.Helper()
	part, err := policy.Prepare(b)
	if err != nil {
		t.Fatal(err)
	}
	return part
}

// dataOf returns all that a policy of one part has as data.
func dataOf(t testing.TB, part *policy.Part) any {
	t.Helper()
	p, err := policy.Compile([]policy.Named{{Name: "b", Part: part}}, policy.Options{Entries: []string{""}})
	if err != nil {
		t.Fatal(err)
	}
	v, err := p.Document(context.Background(), "", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := ast.JSON(v)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// activated returns the data that OPA has after the bundles.
func activated(bs ...*bundle.Bundle) (any, error) {
	ctx := context.Background()
	store := inmem.New()
	for _, b := range bs {
		err := storage.Txn(ctx, store, storage.WriteParams, func(txn storage.Transaction) error {
			return bundle.Activate(&bundle.ActivateOpts{
				Ctx: ctx, Store: store, Txn: txn, Compiler: ast.NewCompiler(), Metrics: metrics.New(),
				Bundles: map[string]*bundle.Bundle{"b": b},
			})
		})
		if err != nil {
			return nil, err
		}
	}
	data, err := storage.ReadOne(ctx, store, storage.Path{})
	if err != nil {
		return nil, err
	}
	rest := map[string]any{}
	for k, v := range data.(map[string]any) {
		if k != "system" {
			rest[k] = v
		}
	}
	return rest, nil
}

func TestPatch(t *testing.T) {
	const base = `{"a": {"b": {"c": 1}, "l": [1, 2, {"x": 1}]}, "s": "text", "k/y": {"z~": 1}}`
	for _, c := range []struct{ ops, want string }{
		{`upsert /a/b/c 2`, `{"a": {"b": {"c": 2}, "l": [1, 2, {"x": 1}]}, "s": "text", "k/y": {"z~": 1}}`},
		{`upsert a/n/o/p [1]`, `{"a": {"b": {"c": 1}, "l": [1, 2, {"x": 1}], "n": {"o": {"p": [1]}}}, "s": "text", "k/y": {"z~": 1}}`},
		{"upsert /a/l/- 3\nupsert /a/l/0 0\nremove /a/l/1\nreplace /a/l/1 9", `{"a": {"b": {"c": 1}, "l": [0, 9, {"x": 1}, 3]}, "s": "text", "k/y": {"z~": 1}}`},
		{`upsert /a/l/2/y 2`, `{"a": {"b": {"c": 1}, "l": [1, 2, {"x": 1, "y": 2}]}, "s": "text", "k/y": {"z~": 1}}`},
		{"remove /a\nremove /s\nupsert /k~1y/%7ez 1\nreplace /k~1y/z~0 null", `{"k/y": {"z~": null, "~z": 1}}`},
		{"remove /a\nupsert /a/b/d 1", `{"a": {"b": {"d": 1}}, "s": "text", "k/y": {"z~": 1}}`},
	} {
		part := prepare(t, snapshot(base))
		patched, err := part.Patch(delta(t, c.ops), 0)
		if err != nil {
			t.Errorf("%s: got error %v", c.ops, err)
			continue
		}
		want := util.MustUnmarshalJSON([]byte(c.want))
		if got := dataOf(t, patched); !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %v, want %v", c.ops, got, want)
		}
		if opa, err := activated(snapshot(base), delta(t, c.ops)); err != nil || !reflect.DeepEqual(opa, want) {
			t.Errorf("%s: OPA has %v, %v, want %v", c.ops, opa, err, want)
		}
		if got := dataOf(t, part); !reflect.DeepEqual(got, snapshot(base).Data) {
			t.Errorf("%s: the part itself is now %v", c.ops, got)
		}
		if patched.Revision != "2" || part.Revision != "1" {
			t.Errorf("%s: got revisions %q and %q, want 2 and 1", c.ops, patched.Revision, part.Revision)
		}
		if got, want := patched.Size(), prepare(t, snapshot(c.want)).Size(); got != want {
			t.Errorf("%s: got size %d, want %d", c.ops, got, want)
		}
	}
}

func TestPatchRefused(t *testing.T) {
	const base = `{"a": {"l": [1]}, "s": "text"}`
	for ops, want := range map[string]string{
		`upsert / {}`:                          "all of data cannot be changed at once",
		`upsert /%zz 1`:                        "not a path",
		`remove /a/x`:                          `operation 0, remove of "/a/x": there is no such value`,
		`replace /a/x 1`:                       "there is no such value",
		`replace /x/y 1`:                       "there is no such place",
		"upsert /a/k 1\nupsert /s/x 1":         `operation 1, upsert of "/s/x": there is no such place`,
		`upsert /a/l/x 1`:                      "there is no such place",
		`upsert /a/l/2 1`:                      "there is no such place",
		`upsert /a/l/2/x 1`:                    "there is no such place",
		`remove /a/l/-`:                        "there is no such value",
		`add /a/x 1`:                           "no such operation",
		strings.Repeat("upsert /a 1\n", 10001): "10001 operations, limit 10000",
	} {
		_, err := prepare(t, snapshot(base)).Patch(delta(t, ops), 0)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40s: got error %v, want %q", ops, err, want)
		}
		if ops == `upsert / {}` || len(ops) > 100 {
			continue // OPA panics, or has no bound
		}
		if _, err := activated(snapshot(base), delta(t, ops)); err == nil {
			t.Errorf("%s: OPA takes it", ops)
		}
	}

	part := prepare(t, snapshot(base, "a", "s"))
	for ops, roots := range map[string][]string{
		`upsert /b 1`:    {"a", "s"},
		`upsert /%61b 1`: {"a", "s"},
		`upsert /a/x 1`:  {"a"},
		`upsert /a/y 1`:  nil,
	} {
		if _, err := part.Patch(delta(t, ops, roots...), 0); err == nil || !strings.Contains(err.Error(), "roots") {
			t.Errorf("%s in roots %q: got error %v, want one of roots", ops, roots, err)
		}
	}
	if _, err := part.Patch(delta(t, `upsert /a/x 1`, "/s", "a/"), 0); err != nil {
		t.Errorf("equal roots, written otherwise: got error %v", err)
	}
	if _, err := part.Patch(snapshot(base, "a", "s"), 0); err == nil {
		t.Error("a snapshot: got no error")
	}
	big := fmt.Sprintf("upsert /a/x %q", strings.Repeat("x", 10000))
	if _, err := part.Patch(delta(t, big, "a", "s"), 5000); err == nil || !strings.Contains(err.Error(), "larger than 5000 bytes") {
		t.Errorf("a part that is too large: got error %v", err)
	}
}

// What is not on the way to a change is shared.
func TestPatchShares(t *testing.T) {
	data := map[string]any{}
	for i := range 100 {
		data[fmt.Sprint("k", i)] = map[string]any{"list": slices.Repeat([]any{"x"}, 1000)}
	}
	part := prepare(t, &bundle.Bundle{Data: data})
	d := delta(t, `upsert /k0/y 1`)
	allocs := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			if _, err := part.Patch(d, 0); err != nil {
				b.Fatal(err)
			}
		}
	})
	if got := allocs.AllocedBytesPerOp(); got > 100_000 {
		t.Errorf("got %d bytes for one small change, want no copy of %d", got, part.Size())
	}
}

// Random operations do to a part what they do to OPA's store.
func TestPatchAsOPA(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	taken := 0
	for range 1000 {
		base := map[string]any{"a": randomValue(r, 3), "b": randomValue(r, 3)}
		text, err := json.Marshal(base)
		if err != nil {
			t.Fatal(err)
		}
		var ops []string
		for range 1 + r.IntN(4) {
			ops = append(ops, randomOperation(t, r))
		}
		part := prepare(t, snapshot(string(text)))
		inOne, inOneErr := part.Patch(delta(t, strings.Join(ops, "\n")), 0)

		// In one transaction, OPA's store looks for what to replace in the data
		// before it. So each operation is a delta of its own first.
		all := []*bundle.Bundle{snapshot(string(text))}
		ok := true
		for _, op := range ops {
			all = append(all, delta(t, op))
			want, wantErr := activated(all...)
			next, err := part.Patch(delta(t, op), 0)
			if (err == nil) != (wantErr == nil) {
				t.Fatalf("%s on %v: got error %v, OPA %v", op, dataOf(t, part), err, wantErr)
			}
			if err != nil {
				ok = false
				break
			}
			taken++
			part = next
			if got := dataOf(t, part); !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: got %v, OPA has %v", strings.Join(ops, "; "), got, want)
			}
		}
		if ok != (inOneErr == nil) {
			t.Fatalf("%s on %s: in one got error %v, one by one %v", strings.Join(ops, "; "), text, inOneErr, ok)
		}
		if ok && !reflect.DeepEqual(dataOf(t, inOne), dataOf(t, part)) {
			t.Fatalf("%s on %s: in one got %v, one by one %v", strings.Join(ops, "; "), text, dataOf(t, inOne), dataOf(t, part))
		}
		if want, err := activated(all[0], delta(t, strings.Join(ops, "\n"))); err == nil && (!ok || !reflect.DeepEqual(dataOf(t, inOne), want)) {
			t.Fatalf("%s on %s: got %v, OPA has %v", strings.Join(ops, "; "), text, inOneErr, want)
		}
	}
	if taken < 500 {
		t.Errorf("only %d operations were taken", taken)
	}
}

func randomValue(r *rand.Rand, depth int) any {
	switch n := r.IntN(6); {
	case depth == 0 || n < 1:
		return r.IntN(10)
	case n < 4:
		m := map[string]any{}
		for range r.IntN(4) {
			m[string(rune('a'+r.IntN(3)))] = randomValue(r, depth-1)
		}
		return m
	default:
		l := []any{}
		for range r.IntN(4) {
			l = append(l, randomValue(r, depth-1))
		}
		return l
	}
}

func randomOperation(t *testing.T, r *rand.Rand) string {
	op := []string{"upsert", "upsert", "replace", "remove"}[r.IntN(4)]
	path := ""
	for range 1 + r.IntN(4) {
		path += "/" + []string{"a", "b", "c", "0", "1", "2", "-"}[min(r.IntN(10), 6)]
	}
	value, err := json.Marshal(randomValue(r, 2))
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s %s %s", op, path, value)
}

// A delta as a service supplies it is one that Patch takes.
func TestPatchSupplied(t *testing.T) {
	snapshot := authztest.Tarball(map[string]string{
		".manifest":       `{"revision": "1", "roots": ["/users/", "envoy"]}`,
		"users/data.json": `{"alice": true}`,
		"allow.rego":      "package envoy.authz\n\nallow if data.users[input.user]",
	})
	change := authztest.Tarball(map[string]string{
		".manifest":  `{"revision": "2", "roots": ["envoy", "users"]}`,
		"patch.json": `{"data": [{"op": "upsert", "path": "/users/bob", "value": true}, {"op": "remove", "path": "/users/alice"}]}`,
	})
	base, _ := service(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"1"`)
		if r.Header.Get("If-None-Match") != "" {
			w.Write(change)
			return
		}
		w.Write(snapshot)
	})
	h := bundles.NewHTTP(bundles.HTTPConfig{URL: base})
	first, err := h.Next(t.Context(), "orders", bundles.Have{})
	if err != nil {
		t.Fatal(err)
	}
	second, err := h.Next(t.Context(), "orders", bundles.Have{ETag: first.ETag, Digest: first.Digest})
	if err != nil {
		t.Fatal(err)
	}
	part := prepare(t, first.Bundle)
	patched, err := part.Patch(second.Bundle, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		part *policy.Part
		user string
	}{{part, "alice"}, {patched, "bob"}} {
		p, err := policy.Compile([]policy.Named{{Name: "b", Part: c.part}}, policy.Options{Entries: []string{entry}})
		if err != nil {
			t.Fatal(err)
		}
		for _, user := range []string{"alice", "bob"} {
			_, err := p.Decide(t.Context(), entry, value(t, `{"user": "`+user+`"}`), nil, nil)
			if allowed := err == nil; allowed != (user == c.user) {
				t.Errorf("revision %s, %s: got allowed %v, %v", c.part.Revision, user, allowed, err)
			}
		}
	}
}

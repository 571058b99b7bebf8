package document

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util"
)

func decoded(t testing.TB, text string) any {
	t.Helper()
	var v any
	if err := util.NewJSONDecoder(strings.NewReader(text)).Decode(&v); err != nil {
		t.Fatal(err)
	}
	return v
}

func of(t testing.TB, v any) *Document {
	t.Helper()
	d, err := Of(v)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// check holds a document to the value that it is of, in each way to read it.
func check(t testing.TB, v Value, want ast.Value) {
	t.Helper()
	if !v.Equal(want) {
		t.Fatalf("%v is not equal to %v in place", short(v.Value()), short(want))
	}
	checkPlace(t, v, want)
	got := v.Value()
	if got.Compare(want) != 0 || got.String() != want.String() || got.Hash() != want.Hash() {
		t.Fatalf("got %v, want %v", short(got), short(want))
	}
	checkPlace(t, v, want) // with what is remembered
	if n := v.Count(1 << 30); n != values(want) {
		t.Fatalf("got %d values, want %d", n, values(want))
	}
	if h := v.Hold(); Whole(h).Value.Compare(want) != 0 || h.Value.Compare(want) != 0 {
		t.Fatalf("held: got %v, want %v", short(h.Value), short(want))
	}
}

func values(v ast.Value) int {
	n := 1
	switch v := v.(type) {
	case ast.Object:
		v.Foreach(func(_, e *ast.Term) { n += 1 + values(e.Value) })
	case *ast.Array:
		v.Foreach(func(e *ast.Term) { n += values(e.Value) })
	}
	return n
}

func short(v ast.Value) string {
	if v == nil {
		return "nothing"
	}
	s := v.String()
	return s[:min(len(s), 200)]
}

// checkPlace looks at each value in place.
func checkPlace(t testing.TB, v Value, want ast.Value) {
	t.Helper()
	switch want := want.(type) {
	case ast.Object:
		if v.Kind() != Object || v.Len() != want.Len() {
			t.Fatalf("got %d with %d members, want an object with %d", v.Kind(), v.Len(), want.Len())
		}
		keys := want.Keys()
		i := 0
		for k, e := range v.All() {
			if text := string(keys[i].Value.(ast.String)); k.Text() != text {
				t.Fatalf("got key %q, want %q", k.Text(), text)
			}
			if key, nth := v.Nth(i); key != k || nth != e {
				t.Fatalf("member %d: got %v and %v, want %v and %v", i, key, nth, k, e)
			}
			if other := v.Member(k.Text()); other != e {
				t.Fatalf("member %q: got %v, want %v", k.Text(), other, e)
			}
			checkPlace(t, e, want.Get(keys[i]).Value)
			i++
		}
		if i != len(keys) {
			t.Fatalf("got %d members, want %d", i, len(keys))
		}
		for _, k := range []string{"", "no such key", "\xff"} {
			if got, is := v.Member(k).Defined(), want.Get(ast.StringTerm(k)) != nil; got != is {
				t.Fatalf("member %q: got %v, want %v", k, got, is)
			}
		}
	case *ast.Array:
		if v.Kind() != Array || v.Len() != want.Len() {
			t.Fatalf("got %d with %d elements, want an array with %d", v.Kind(), v.Len(), want.Len())
		}
		i := 0
		for k, e := range v.All() {
			if k.Defined() || v.Elem(i) != e {
				t.Fatalf("element %d: got key %v, and %v where %v is expected", i, k, v.Elem(i), e)
			}
			checkPlace(t, e, want.Elem(i).Value)
			i++
		}
		if _, nth := v.Nth(i - 1); i > 0 && nth != v.Elem(i-1) {
			t.Fatalf("element %d: got %v, want %v", i-1, nth, v.Elem(i-1))
		}
		if v.Elem(-1).Defined() || v.Elem(want.Len()).Defined() || i != want.Len() {
			t.Fatalf("got %d elements or more, want %d", i, want.Len())
		}
	case ast.String:
		if v.Kind() != String || v.Text() != string(want) {
			t.Fatalf("got %d, %q, want %q", v.Kind(), v.Text(), string(want))
		}
	case ast.Number:
		if v.Kind() != Number || v.Text() != string(want) {
			t.Fatalf("got %d, %q, want number %q", v.Kind(), v.Text(), string(want))
		}
	case ast.Boolean:
		if v.Kind() != Boolean || v.Bool() != bool(want) {
			t.Fatalf("got %d, want %v", v.Kind(), want)
		}
	case ast.Null:
		if v.Kind() != Null {
			t.Fatalf("got %d, want null", v.Kind())
		}
	}
	if !want.IsGround() || !v.Defined() {
		t.Fatal("it is not there")
	}
}

func TestValues(t *testing.T) {
	for _, text := range []string{
		`null`, `true`, `false`, `""`, `"x"`, `{}`, `[]`, `[[]]`, `[{}]`, `{"":""}`,
		`0`, `-0`, `1`, `-1`, `00000001`[7:], `99999999`, `100000000`, `-99999999`, `1.0`, `1e3`, `1E+3`, `0.10`, `123456789012345678901234567890`,
		`["1", 1, 1.0, "1.0", [1], [1.0], {"a": 1}, {"a": 1.0}]`,
		`{"a":{"b":[1,2,{"c":null}]},"aa":{"b":[1,2,{"c":null}]},"Z":false,"ä":"ö","\u0000":"\u2028"}`,
		`[` + strings.Repeat(`{"a":1},`, 5) + `{"a":1,"b":2}]`,
		strings.Repeat(`[`, 500) + strings.Repeat(`]`, 500),
	} {
		v := decoded(t, text)
		check(t, of(t, v).Root(), ast.MustInterfaceToValue(v))
	}
	if _, err := Of(json.Number("1e999999999")); err == nil {
		t.Error("a number that OPA refuses: got no error")
	}
	if _, err := Of(ast.NewSet()); err == nil {
		t.Error("a set: got no error")
	}
	if _, err := Of(deep(maxDepth + 1)); err == nil || !strings.Contains(err.Error(), "10000") {
		t.Errorf("nested too deep: got error %v", err)
	}
	check(t, of(t, map[string]any{"s": []string{"a"}, "i": 7, "f": 1.5, "m": map[string]string{"k": "v"}}).Root(),
		ast.MustInterfaceToValue(map[string]any{"s": []string{"a"}, "i": 7, "f": 1.5, "m": map[string]string{"k": "v"}}))
}

func deep(n int) any {
	var v any
	for range n {
		v = []any{v}
	}
	return v
}

// Sizes around each bound of the layout: those of the index, of a block, of a piece.
func TestSizes(t *testing.T) {
	for _, n := range []int{1, 7, 8, 9, 10, 15, 16, 17, 127, 128, 129, 500, 1000, 5000, 20000} {
		object, array, objects := map[string]any{}, []any{}, []any{}
		for i := range n {
			key := fmt.Sprintf("key-%d", i)
			object[key] = []any{key, i, "shared"}
			array = append(array, i)
			objects = append(objects, map[string]any{"name": key, "n": json.Number(fmt.Sprint(i, ".5")), "on": i%2 == 0})
		}
		v := map[string]any{"object": object, "array": array, "objects": objects, "text": strings.Repeat("x", n)}
		check(t, of(t, v).Root(), ast.MustInterfaceToValue(v))
	}
	wide := map[string]any{} // one piece with a large member, and one after another
	for i := range 20 {
		wide[fmt.Sprint(i)] = strings.Repeat(fmt.Sprint(i), 100_000)
	}
	check(t, of(t, wide).Root(), ast.MustInterfaceToValue(wide))
}

// Keys of pieces that begin alike, and others that do not.
func TestFences(t *testing.T) {
	for _, prefix := range []string{"", "p", "a prefix that is longer than eight bytes, "} {
		v := map[string]any{}
		for i := range 3000 {
			v[fmt.Sprint(prefix, i)] = strings.Repeat("x", i%300)
			v[fmt.Sprint(prefix, "the same eight bytes and more of it ", i)] = i
			v[prefix+strings.Repeat("z", i)] = i
			v[prefix+strings.Repeat("\x00", i%40)] = "zero"
		}
		root := of(t, v).Root()
		check(t, root, ast.MustInterfaceToValue(v))
		for k := range v {
			for _, other := range []string{k + "\x00", k + " ", "a" + k, "\xff" + k, k[:len(k)/2], k + "\xff"} {
				if got, want := root.Member(other).Defined(), v[other] != nil; got != want {
					t.Fatalf("%.100q: got %v, want %v", other, got, want)
				}
			}
		}
	}
}

func TestAt(t *testing.T) {
	v := of(t, decoded(t, `{"a":[{"b":1}],"0":{"c":2}}`)).Root()
	for path, want := range map[string]string{
		"": `{"0": {"c": 2}, "a": [{"b": 1}]}`, "a/0/b": "1", "a/00/b": "1", "0/c": "2", "a/1": "nothing", "a/x": "nothing", "a/-1": "nothing", "a/0/b/c": "nothing", "x": "nothing",
	} {
		var segments []string
		if path != "" {
			segments = strings.Split(path, "/")
		}
		if got := short(v.At(segments...).Value()); got != want {
			t.Errorf("%s: got %s, want %s", path, got, want)
		}
	}
}

// What is remembered of small terms is bounded by the block; a large one is made once.
func TestRemembered(t *testing.T) {
	doc := of(t, map[string]any{"users": users(50000)})
	size := doc.Size()
	json := int64(len(text(t, map[string]any{"users": users(50000)})))
	root := doc.Root().Member("users")
	for range 2 {
		for _, u := range root.All() {
			u.Term()
			u.Member("roles").Hold()
			u.Member("roles").Elem(0).Term()
		}
		if got := doc.Size(); got < 2*size || got > (perJSON+1)*json {
			t.Errorf("all small terms: got size %d, want at least twice %d and at most %d", got, size, (perJSON+1)*json)
		}
	}
	u := root.Member("user-00000")
	for i := 0; u.Known() == nil; i++ {
		if i == 1000 {
			t.Fatal("a small term that is asked for often is not remembered")
		}
		u.Term()
	}
	if u.Term() != u.Known() || u.Hold() != u.Known() {
		t.Error("a small term that is remembered is not what one is given")
	}
	small := doc.Size()
	if root.Known() != nil {
		t.Error("a large term is known before it is asked for")
	}
	whole := root.Term()
	if root.Term() != whole || root.Known() != whole {
		t.Error("a large term is not remembered")
	}
	if got := doc.Size(); got < small+json {
		t.Errorf("with the large term: got size %d, want much more than %d", got, small)
	}
}

func TestConcurrent(t *testing.T) {
	v := map[string]any{"users": users(3000), "list": []any{1, "x", []any{}, map[string]any{"k": 1.5}}}
	want := ast.MustInterfaceToValue(v)
	doc := of(t, v)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(i), 0))
			for range 2000 {
				u := doc.Root().Member("users").Member(fmt.Sprintf("user-%05d", r.IntN(3100)))
				if !u.Defined() {
					continue
				}
				if u.Term().Value.(ast.Object).Len() != 1 || u.Hold() == nil || u.Member("roles").Elem(1).Term() == nil {
					t.Error("a user is not there")
				}
			}
			if doc.Root().Value().Compare(want) != 0 {
				t.Error("the whole is not what it was")
			}
			if other := of(t, v); other.Root() != doc.Root() {
				t.Error("an equal document is not the same")
			}
		})
	}
	wg.Wait()
}

// A held term tells of itself what the term of OPA does.
func TestHeld(t *testing.T) {
	v := decoded(t, `{"a": [1, {"b": "c"}, "`+strings.Repeat("x", 100)+`",`+strings.Repeat(" 1,", smallCount)+` 1]}`)
	want := ast.MustInterfaceToValue(v)
	h := of(t, v).Root().Hold()
	if _, ok := h.Value.(*Value); !ok {
		t.Fatalf("got a %T, want a value of the document", h.Value)
	}
	path := ast.MustParseRef("x.a[1].b")[1:]
	found, err := h.Value.Find(path)
	if err != nil || found.Compare(ast.String("c")) != 0 {
		t.Errorf("find: got %v, %v", found, err)
	}
	if h.Hash() != want.Hash() || h.String() != want.String() || h.Value.StringLength() != want.StringLength() || !h.IsGround() {
		t.Error("its hash, text or length is not that of the value")
	}
	if other := of(t, v).Root().Hold(); h.Value.Compare(other.Value) != 0 || h.Value.Compare(ast.Number("1")) == 0 {
		t.Error("it is not equal to itself, or equal to another")
	}
	if Whole(nil) != nil || (Value{}).Hold() != nil || (Value{}).Term() != nil || (Value{}).Value() != nil || (Value{}).Kind() != None {
		t.Error("no value is something")
	}
}

// FuzzDocument holds any JSON to what ast.InterfaceToValue makes of it.
func FuzzDocument(f *testing.F) {
	f.Add(`{"a":[1,2.50,"x",null,true,{"b":{}}],"b":[1,2.50,"x",null,true,{"b":{}}]}`, uint16(3))
	f.Add(`[-0,0,1e5,12345678901,"`+strings.Repeat("y", 300)+`"]`, uint16(900))
	f.Fuzz(func(t *testing.T, text string, n uint16) {
		var v any
		dec := json.NewDecoder(strings.NewReader(text))
		dec.UseNumber()
		if dec.Decode(&v) != nil {
			return
		}
		want, err := ast.InterfaceToValue(v)
		doc, docErr := Of(v)
		if (err == nil) != (docErr == nil) {
			t.Fatalf("got error %v, want %v", docErr, err)
		}
		if err != nil {
			return
		}
		check(t, doc.Root(), want)
		// The same, often and under other names, so that it is cut.
		many := map[string]any{}
		for i := range n % 2000 {
			many[fmt.Sprint(i)] = []any{v, int(i)}
		}
		large := of(t, many)
		if !large.Root().Equal(ast.MustInterfaceToValue(many)) {
			t.Fatal("many of it are not equal to themselves")
		}
		if of(t, v).Root() != doc.Root() {
			t.Fatal("an equal document is not the same")
		}
	})
}

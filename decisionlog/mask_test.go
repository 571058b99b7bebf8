package decisionlog

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

// masked is what a mask makes of the parts of an event, as an object.
func masked(t testing.TB, event, mask string) (ast.Value, error) {
	t.Helper()
	rules, err := maskRules(value(t, mask))
	if err != nil {
		return nil, err
	}
	var p parts
	obj := value(t, event).(ast.Object)
	before := obj.String()
	for _, name := range []string{"input", "result", "nd_builtin_cache"} {
		if part := obj.Get(ast.StringTerm(name)); part != nil {
			*p.named(name) = part.Value
		}
	}
	p.apply(rules, newEncoder())
	if after := obj.String(); after != before {
		t.Errorf("the event itself has changed: got %s, want %s", after, before)
	}
	out := ast.NewObject()
	for _, name := range []string{"input", "result", "nd_builtin_cache"} {
		if v := *p.named(name); v != nil {
			out.Insert(ast.StringTerm(name), ast.NewTerm(v))
		}
	}
	for name, list := range map[string][]string{"erased": p.erased, "masked": p.masked} {
		if len(list) > 0 {
			var terms []*ast.Term
			for _, s := range list {
				terms = append(terms, ast.StringTerm(s))
			}
			out.Insert(ast.StringTerm(name), ast.ArrayTerm(terms...))
		}
	}
	return out, nil
}

func remove(path string) string { return fmt.Sprintf(`{"op": "remove", "path": %q}`, path) }

func upsertOf(path, value string) string {
	return fmt.Sprintf(`{"op": "upsert", "path": %q, "value": %s}`, path, value)
}

// TestMask has the cases of OPA's own test of masks, and more.
func TestMask(t *testing.T) {
	same := func(event string) string { return event }
	for _, test := range []struct{ note, rule, event, want string }{
		{"erase input", remove("/input"), `{"input": {"a": 1}}`, `{"erased": ["/input"]}`},
		{"upsert input", upsertOf("/input", `{"RandoString": "foo"}`), `{"input": {"a": 1}}`, `{"masked": ["/input"], "input": {"RandoString": "foo"}}`},
		{"erase result", remove("/result"), `{"result": "foo"}`, `{"erased": ["/result"]}`},
		{"upsert result", upsertOf("/result", `"upserted"`), `{"result": "foo"}`, `{"masked": ["/result"], "result": "upserted"}`},
		{"erase undefined input", remove("/input/foo"), `{}`, `{}`},
		{"upsert undefined input", upsertOf("/input/foo", "1"), `{}`, `{}`},
		{"upsert all of an undefined input", upsertOf("/input", "1"), `{}`, `{}`},
		{"erase undefined result", remove("/result/foo"), `{}`, `{}`},
		{"upsert undefined result", upsertOf("/result/foo", "1"), `{}`, `{}`},
		{"erase undefined node", remove("/input/foo"), `{"input": {"bar": 1}}`, same(`{"input": {"bar": 1}}`)},
		{"upsert undefined node without a value", `{"op": "upsert", "path": "/input/foo"}`, `{"input": {"bar": 1}}`, `{"input": {"bar": 1, "foo": null}, "masked": ["/input/foo"]}`},
		{"upsert undefined node with a value", upsertOf("/input/foo", `"upserted"`), `{"input": {"bar": 1}}`, `{"input": {"bar": 1, "foo": "upserted"}, "masked": ["/input/foo"]}`},
		{"erase undefined node-2", remove("/input/foo/bar"), `{"input": {"foo": 1}}`, `{"input": {"foo": 1}}`},
		{"upsert into a number", upsertOf("/input/foo/bar", "1"), `{"input": {"foo": 1}}`, `{"input": {"foo": 1}}`},
		{"upsert into a string", upsertOf("/input/foo/bar", "1"), `{"input": {"foo": "bar"}}`, `{"input": {"foo": "bar"}}`},
		{"upsert into null", upsertOf("/input/foo/bar", "1"), `{"input": {"foo": null}}`, `{"input": {"foo": null}}`},
		{"upsert into a part that is a string", upsertOf("/input/foo", "1"), `{"input": "x"}`, `{"input": "x"}`},
		{"erase: missing key", remove("/input/foo/bar/baz"), `{"input": {"foo": {}}}`, `{"input": {"foo": {}}}`},
		{"upsert: missing key", upsertOf("/input/foo/bar/baz", "100"), `{"input": {"foo": {}}}`, `{"input": {"foo": {"bar": {"baz": 100}}}, "masked": ["/input/foo/bar/baz"]}`},
		{"erase: scalar", remove("/input/foo/bar/baz"), `{"input": {"foo": 1}}`, `{"input": {"foo": 1}}`},
		{"erase: index that is none", remove("/input/foo/bar/baz"), `{"input": {"foo": [{"baz": 1}]}}`, `{"input": {"foo": [{"baz": 1}]}}`},
		{"upsert: index that is none", upsertOf("/input/foo/bar/baz", "1"), `{"input": {"foo": [{"baz": 1}]}}`, `{"input": {"foo": [{"baz": 1}]}}`},
		{"erase: negative index", remove("/input/foo/-1/baz"), `{"input": {"foo": [{"baz": 1}]}}`, `{"input": {"foo": [{"baz": 1}]}}`},
		{"upsert: negative index", upsertOf("/input/foo/-1/baz", "1"), `{"input": {"foo": [{"baz": 1}]}}`, `{"input": {"foo": [{"baz": 1}]}}`},
		{"erase: index out of range", remove("/input/foo/1/baz"), `{"input": {"foo": [{"baz": 1}]}}`, `{"input": {"foo": [{"baz": 1}]}}`},
		{"upsert: index out of range", upsertOf("/input/foo/1/baz", "1"), `{"input": {"foo": [{"baz": 1}]}}`, `{"input": {"foo": [{"baz": 1}]}}`},
		{"erase: element", remove("/input/foo/0"), `{"input": {"foo": [1]}}`, `{"input": {"foo": []}, "erased": ["/input/foo/0"]}`},
		{"erase: element, nested", remove("/input/foo/0/bar/1"), `{"input": {"foo": [{"bar": [1, 2]}]}}`, `{"input": {"foo": [{"bar": [1]}]}, "erased": ["/input/foo/0/bar/1"]}`},
		{"erase: no such element", remove("/input/foo/0/bar/9"), `{"input": {"foo": [{"bar": [1, 2]}]}}`, `{"input": {"foo": [{"bar": [1, 2]}]}}`},
		{"upsert: element", upsertOf("/input/foo/0", "2"), `{"input": {"foo": [1]}}`, `{"input": {"foo": [2]}, "masked": ["/input/foo/0"]}`},
		{"upsert: element, nested", upsertOf("/input/foo/0/bar/0", "2"), `{"input": {"foo": [{"bar": [1]}]}}`, `{"input": {"foo": [{"bar": [2]}]}, "masked": ["/input/foo/0/bar/0"]}`},
		{"upsert: element of two dimensions", upsertOf("/input/foo/0/0", "2"), `{"input": {"foo": [[1]]}}`, `{"input": {"foo": [[2]]}, "masked": ["/input/foo/0/0"]}`},
		{"upsert: no such element", upsertOf("/input/foo/1", "2"), `{"input": {"foo": [1]}}`, `{"input": {"foo": [1]}}`},
		{"erase: key", remove("/input/foo"), `{"input": {"bar": 1, "foo": [{"baz": 1}]}}`, `{"input": {"bar": 1}, "erased": ["/input/foo"]}`},
		{"upsert: key", upsertOf("/input/foo", `[{"nabs": 1}]`), `{"input": {"bar": 1, "foo": [{"baz": 1}]}}`, `{"input": {"bar": 1, "foo": [{"nabs": 1}]}, "masked": ["/input/foo"]}`},
		{"erase: key in an array", remove("/input/foo/0/bar"), `{"input": {"foo": [{"bar": 1, "baz": 2}]}}`, `{"input": {"foo": [{"baz": 2}]}, "erased": ["/input/foo/0/bar"]}`},
		{"erase: special character", remove("/input/:path"), `{"input": {"bar": 1, ":path": "token"}}`, `{"input": {"bar": 1}, "erased": ["/input/:path"]}`},
		{"upsert: special character", upsertOf("/input/:path", `"upserted"`), `{"input": {"bar": 1, ":path": "token"}}`, `{"input": {"bar": 1, ":path": "upserted"}, "masked": ["/input/:path"]}`},
		{"erase: root is an array", remove("/input/0"), `{"input": ["secret", "public"]}`, `{"input": ["public"], "erased": ["/input/0"]}`},
		{"erase: result is an array", remove("/result/1"), `{"result": ["a", "secret", "c"]}`, `{"result": ["a", "c"], "erased": ["/result/1"]}`},
		{"upsert: result is an array", upsertOf("/result/0", `"**REDACTED**"`), `{"result": ["secret", "public"]}`, `{"result": ["**REDACTED**", "public"], "masked": ["/result/0"]}`},
		{"erase: out of the root's range", remove("/input/5"), `{"input": ["a"]}`, `{"input": ["a"]}`},
		{"erase: root's index is none", remove("/input/notanindex"), `{"input": ["a"]}`, `{"input": ["a"]}`},
		{"a pointer alone erases", `"/input/a/b"`, `{"input": {"a": {"b": 1, "c": 2}}}`, `{"input": {"a": {"c": 2}}, "erased": ["/input/a/b"]}`},
		{"an empty segment", `"/input//foo"`, `{"input": {"": {"foo": 1}}}`, `{"input": {"": {}}, "erased": ["/input//foo"]}`},
		{"form values", `"/input/parsed_body/password/0"`, `{"input": {"parsed_body": {"password": ["p", "q"]}}}`, `{"input": {"parsed_body": {"password": ["q"]}}, "erased": ["/input/parsed_body/password/0"]}`},
		{"upsert: a form's value", upsertOf("/input/parsed_query/token/0", `"***"`), `{"input": {"parsed_query": {"token": ["t"]}}}`, `{"input": {"parsed_query": {"token": ["***"]}}, "masked": ["/input/parsed_query/token/0"]}`},
		{"a slash in a key", `"/input/a%2Fb"`, `{"input": {"a/b": 1, "c": 2}}`, `{"input": {"c": 2}, "erased": ["/input/a%252Fb"]}`},
		{"a space in a key", `"/input/a b"`, `{"input": {"a b": 1}}`, `{"input": {}, "erased": ["/input/a%20b"]}`},
		{"the escaped key goes first", `"/input/a b"`, `{"input": {"a b": 1, "a%20b": 2}}`, `{"input": {"a b": 1}, "erased": ["/input/a%20b"]}`},
		{"a key that is no string", `"/nd_builtin_cache/time.now_ns/[]"`, `{"nd_builtin_cache": {"time.now_ns": {[]: 1}}}`, `{"nd_builtin_cache": {"time.now_ns": {}}, "erased": ["/nd_builtin_cache/time.now_ns/%5B%5D"]}`},
		{"an element of a set", `"/result/0"`, `{"result": {"b", "a"}}`, `{"result": ["b"], "erased": ["/result/0"]}`},
	} {
		want := value(t, test.want)
		for _, mask := range []string{"{" + test.rule + "}", "[" + test.rule + "]"} {
			got, err := masked(t, test.event, mask)
			if err != nil {
				t.Errorf("%s: %v", test.note, err)
			} else if got.Compare(want) != 0 {
				t.Errorf("%s: got %v, want %v", test.note, got, want)
			}
		}
	}
}

func TestMaskInOrder(t *testing.T) {
	got, err := masked(t, `{"input": {"a": {"b": "removeme", "y": "stays"}}, "result": {"c": {"d": "removeme", "z": "stays"}}}`,
		`{"/input/a/b", "/result/c/d", `+upsertOf("/input/a/b", "7")+`}`)
	if err != nil {
		t.Fatal(err)
	}
	want := value(t, `{"input": {"a": {"b": 7, "y": "stays"}}, "result": {"c": {"z": "stays"}}, "erased": ["/input/a/b", "/result/c/d"], "masked": ["/input/a/b"]}`)
	if got.Compare(want) != 0 {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestMaskInvalid(t *testing.T) {
	for _, test := range []struct{ mask, want string }{
		{`{"invalid": 1}`, "unexpected rule format"},
		{`true`, "unexpected rule format"},
		{`{"/input/a", [1, 2]}`, "invalid mask rule format"},
		{`{""}`, "mask must be non-empty"},
		{`{"foo"}`, "mask must be slash-prefixed"},
		{`{"/"}`, "mask prefix not allowed"},
		{`{"/labels/foo"}`, "mask prefix not allowed"},
		{`{"/input/a/%F/b"}`, "invalid URL escape"},
		{`[{"op": "undefinedOP", "path": "/input/a"}]`, "mask op is not supported: undefinedOP"},
		{`[{"path": "/input/a"}]`, "mask op is not supported"},
		{`[{"op": 1, "path": "/input/a"}]`, `invalid "op" value`},
		{`[{"op": "remove", "path": ""}]`, `invalid "path" value`},
		{`[{"op": "remove"}]`, "mask must be non-empty"},
	} {
		if _, err := maskRules(value(t, test.mask)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %s", test.mask, err, test.want)
		}
	}
}

// FuzzMask compares masks with what they do to a tree that may be changed. What
// OPA finds under its escaped key is all there is here.
func FuzzMask(f *testing.F) {
	for _, path := range []string{"/input/a/0/b", "/input/a/1", "/input", "/input/c/d/e", "/input//", "/input/a/-1", "/input/a/00", "/input/%41"} {
		f.Add(path, true)
		f.Add(path, false)
	}
	f.Fuzz(func(t *testing.T, path string, put bool) {
		const event = `{"a": [{"b": "x"}, [1, 2]], "c": {"d": null}, "": {"": 1}, "A": {"e": {"f": 1}}}`
		rules, err := maskRules(ast.NewArray(ast.ObjectTerm(
			ast.Item(ast.StringTerm("op"), ast.StringTerm(map[bool]string{true: "upsert", false: "remove"}[put])),
			ast.Item(ast.StringTerm("path"), ast.StringTerm(path)),
			ast.Item(ast.StringTerm("value"), ast.StringTerm("new")))))
		if err != nil {
			return
		}
		var path1 []string
		for _, s := range rules[0].path[1:] {
			if s.escaped != s.decoded || s.escaped != s.raw {
				return
			}
			path1 = append(path1, s.raw)
		}
		p := parts{input: value(t, event), result: ast.Boolean(true), ndCache: ast.Boolean(true)}
		p.apply(rules, newEncoder())
		if rules[0].path[0].raw != "input" || len(path1) == 0 {
			return
		}
		tree := parse(t, []byte(event))
		done := change(&tree, path1, put)
		if got := len(p.erased)+len(p.masked) == 1; got != done {
			t.Errorf("%q: done %v, want %v", path, got, done)
		}
		if got := ast.MustJSON(p.input); !reflect.DeepEqual(got, tree) {
			t.Errorf("%q: got %v, want %v", path, got, tree)
		}
	})
}

// change erases or puts what a path leads to, in place.
func change(node *any, path []string, put bool) bool {
	last := len(path) == 1
	switch v := (*node).(type) {
	case map[string]any:
		child, ok := v[path[0]]
		switch {
		case last && put:
			v[path[0]] = "new"
			return true
		case last:
			delete(v, path[0])
			return ok
		case !ok && !put:
			return false
		case !ok:
			child = map[string]any{}
		}
		if !change(&child, path[1:], put) {
			return false
		}
		v[path[0]] = child
		return true
	case []any:
		i, err := strconv.Atoi(path[0])
		switch {
		case err != nil || i < 0 || i >= len(v):
			return false
		case last && put:
			v[i] = "new"
			return true
		case last:
			*node = append(v[:i], v[i+1:]...)
			return true
		}
		return change(&v[i], path[1:], put)
	}
	return false
}

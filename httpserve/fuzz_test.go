package httpserve

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/url"
	"reflect"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// A path names a route, a tenant and an entry point, each segment by itself, or
// nothing.
func FuzzPath(f *testing.F) {
	f.Add("/t/orders/v1/data/app/allow")
	f.Add("/t/orders/v1/batch/data/app%2fallow")
	f.Add("/t/or%64ers/v1/data/app/../x")
	f.Add("//t/orders/v1/data/a\x00b")
	f.Add(`/t/orders/v1/data/app"];x`)
	f.Add("/t/orders/check//a/../b")
	f.Add("/.well-known/authzen-configuration/t/orders")
	f.Fuzz(func(t *testing.T, path string) {
		r, tenant, rest, ok := routeOf(path)
		if !ok {
			return
		}
		want := "/t/" + tenant + r.path + rest
		if r == discovery {
			want = r.path + "/t/" + tenant
		}
		if path != want {
			t.Fatalf("%q is read as %q", path, want)
		}
		id, err := tenants.ParseID(tenant)
		if err != nil {
			return
		}
		entry, ok := entryOf(rest)
		if !ok {
			return
		}
		segments := strings.Split(entry, "/")
		for i, s := range segments {
			segments[i] = url.PathEscape(s)
		}
		again, ok := entryOf(strings.Join(segments, "/"))
		if !ok || again != entry || strings.Count(entry, "/") != strings.Count(rest, "/") || strings.Contains(string(id), "/") {
			t.Errorf("%q is read as tenant %q and entry point %q", path, id, entry)
		}
		if parsed, err := policy.ParseEntry(entry); err != nil || parsed != entry {
			t.Errorf("entry point %q is another one: %q, %v", entry, parsed, err)
		}
	})
}

// The members of a body are those that encoding/json finds, but for names that
// are there twice.
func FuzzMembers(f *testing.F) {
	f.Add([]byte(`{"inputs": {"a": {"b": [1, "}"]}, "\u0061b": -1.5e3}, "common_input" : null}`))
	f.Add([]byte(`{"inputs":"\\\"", "x":[[],{}]}`))
	f.Add([]byte(`  `))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := membersOf(text, "inputs", "common_input")
		var want map[string]json.RawMessage
		wantErr := json.Unmarshal(text, &want)
		if len(bytes.TrimSpace(text)) == 0 || string(bytes.TrimSpace(text)) == "null" {
			return
		}
		if err != nil {
			if wantErr == nil && !strings.Contains(err.Error(), "twice") {
				t.Errorf("%q: got %v", text, err)
			}
			return
		}
		if wantErr != nil {
			t.Fatalf("%q: got %q, want %v", text, got, wantErr)
		}
		for _, name := range []string{"inputs", "common_input"} {
			if string(want[name]) == "null" {
				delete(want, name)
			}
			if !bytes.Equal(got[name], want[name]) {
				t.Errorf("%q: %s: got %q, want %q", text, name, got[name], want[name])
			}
		}
		if inputs := got["inputs"]; inputs != nil && inputs[0] == '{' {
			found := map[string]any{}
			for key, text := range members(inputs) {
				var v any
				if err := json.Unmarshal(text, &v); err != nil {
					t.Errorf("%q: item %q is %q: %v", inputs, key, text, err)
				}
				found[key] = v
			}
			var all map[string]any
			if err := json.Unmarshal(inputs, &all); err != nil || len(all) != len(found) {
				t.Errorf("%q: got %v, want %v", inputs, found, all)
			}
		}
	})
}

// What is written of a value is what OPA writes.
func FuzzValue(f *testing.F) {
	f.Add(`{"a": [1, 2.50, "ä<>\n", null, true, {}], "b": {"c": 1e400}}`)
	f.Fuzz(func(t *testing.T, text string) {
		v, err := policy.ParseJSON(text, nil)
		if err != nil {
			return
		}
		got, err := appendValue(nil, v)
		if err != nil {
			t.Fatal(err)
		}
		native, err := ast.JSON(v)
		if err != nil {
			t.Fatal(err)
		}
		want, err := json.Marshal(native)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(decoded(t, got), decoded(t, want)) {
			t.Errorf("got %s, want %s", got, want)
		}
	})
}

// decoded keeps the texts of numbers.
func decoded(t *testing.T, text []byte) (v any) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

// merge is object.union.
func TestMerge(t *testing.T) {
	common := ast.MustParseTerm(`{"u": {"role": "admin", "id": 1}, "l": [1], "s": 1}`).Value.(ast.Object)
	for over, want := range map[string]string{
		`{}`:                        `{"u": {"role": "admin", "id": 1}, "l": [1], "s": 1}`,
		`{"u": {"role": null}}`:     `{"u": {"role": null, "id": 1}, "l": [1], "s": 1}`,
		`{"u": 1, "l": {"x": 1}}`:   `{"u": 1, "l": {"x": 1}, "s": 1}`,
		`{"n": {"x": {}}, "l": []}`: `{"u": {"role": "admin", "id": 1}, "l": [], "s": 1, "n": {"x": {}}}`,
	} {
		o := ast.MustParseTerm(over).Value.(ast.Object)
		if got := merge(common, o); got.Compare(ast.MustParseTerm(want).Value) != 0 {
			t.Errorf("%s: got %v, want %s", over, got, want)
		}
		if o.Compare(ast.MustParseTerm(over).Value) != 0 || common.Len() != 3 {
			t.Errorf("%s: the parts have changed", over)
		}
	}
}

// What a proxy asks about is the path that it sent, to the byte, or nothing.
func FuzzOriginal(f *testing.F) {
	f.Add("/t/orders/check/a?x=1", "GET", "", "")
	f.Add("/t/orders/check//a/../b%2f", "POST", "POST", "//a/../b%2f")
	f.Add("/t/orders/check", "GET", "PUT", "/a#b")
	f.Add("http://host/t/orders/check/a", "GET", "", "/a")
	f.Add("/t/orders/%63heck/\u00e4", "GET", "", "")
	f.Fuzz(func(t *testing.T, target, method, namedMethod, namedPath string) {
		u, err := url.ParseRequestURI(target)
		if err != nil {
			return
		}
		route, tenant, _, ok := routeOf(u.EscapedPath())
		if !ok || route.path != "/check" && route.path != "/check/" || tenant != "orders" {
			return
		}
		h := http.Header{}
		if namedMethod != "" {
			h.Set("X-Forwarded-Method", namedMethod)
		}
		if namedPath != "" {
			h.Set("X-Original-Uri", namedPath)
		}
		r := &request{Request: &http.Request{Method: method, RequestURI: target, URL: u, Header: h}, Tenant: "orders"}
		gotMethod, path, named, err := r.original()
		if err != nil {
			return
		}
		if named && (gotMethod != namedMethod || path != namedPath || !strings.HasSuffix(strings.SplitN(target, "?", 2)[0], "/t/orders/check")) ||
			!named && (gotMethod != method || !strings.HasSuffix(target, "/t/orders/check"+path)) {
			t.Errorf("%q with %q: got %q %q", target, h, gotMethod, path)
		}
		if namedPath != "" && path != namedPath || namedMethod != "" && gotMethod != namedMethod {
			t.Errorf("%q with %q: got %q %q against its headers", target, h, gotMethod, path)
		}
		if path[0] != '/' || strings.ContainsAny(path, "# \r\n\x00") || strings.ContainsAny(gotMethod, " ,\r\n") {
			t.Errorf("got %q %q", gotMethod, path)
		}
	})
}

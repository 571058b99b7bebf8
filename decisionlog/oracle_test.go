package decisionlog

import (
	"encoding/json"
	"net/url"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util"
)

// oracle says what of a value is hidden, by a walk over the value as a whole: each
// place is looked at with all that stands around it.
type oracle struct {
	path   []string
	parent string // the key of the object that the member is in; "" in an array
	masked []string
}

func (o *oracle) hide() any {
	if pointer := "/" + strings.Join(o.path, "/"); !slices.Contains(o.masked, pointer) {
		o.masked = append(o.masked, pointer)
	}
	return Redacted
}

// within walks a value that is at key, or an index, of what is at parent.
func (o *oracle) within(segment, parent string, f func() any) any {
	before := o.parent
	o.path, o.parent = append(o.path, url.PathEscape(segment)), parent
	defer func() { o.path, o.parent = o.path[:len(o.path)-1], before }()
	return f()
}

func (o *oracle) value(v any, key string) any {
	switch v := v.(type) {
	case map[string]any:
		return o.object(v, key, false)
	case []any:
		out := []any{}
		for i, x := range v {
			out = append(out, o.within(strconv.Itoa(i), "", func() any {
				if obj, ok := x.(map[string]any); ok {
					return o.object(obj, "", isSecretHeader(obj))
				}
				return o.value(x, "")
			}))
		}
		return out
	}
	return v
}

func isSecretHeader(obj map[string]any) bool {
	for _, name := range []string{"key", "name"} {
		if s, ok := obj[name].(string); ok && secretHeader(s) {
			return true
		}
	}
	return false
}

func (o *oracle) object(obj map[string]any, at string, secret bool) any {
	out := map[string]any{}
	for _, k := range slices.Sorted(mapKeys(obj)) {
		v := obj[k]
		out[k] = o.within(k, at, func() any {
			inner, isObject := v.(map[string]any)
			switch {
			case secret && slices.Contains([]string{"value", "values", "raw_value", "rawValue"}, k):
				return o.hide()
			case secretHeader(k) || k == "certificate" && (at == "source" || at == "destination"):
				if _, ok := v.(bool); ok || v == nil || v == Redacted || isObject && !strings.Contains(strings.ToLower(at), "header") {
					return o.value(v, k)
				}
				return o.hide()
			case k == "header" && isObject:
				return o.object(inner, k, isSecretHeader(inner))
			}
			return o.value(v, k)
		})
	}
	return out
}

func mapKeys(m map[string]any) func(func(string) bool) {
	return func(yield func(string) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// written is a Document that writes a value in its parts.
type written struct{ v ast.Value }

func (d written) Value() (ast.Value, error) { return d.v, nil }

func (d written) Write(w Writer) bool {
	write(w, d.v)
	return true
}

func write(w Writer, v ast.Value) {
	switch v := v.(type) {
	case ast.Object:
		w.Object()
		v.Foreach(func(k, v *ast.Term) {
			w.Key(string(k.Value.(ast.String)))
			write(w, v.Value)
		})
		w.EndObject()
	case *ast.Array:
		w.Array()
		for t := range elements(v) {
			write(w, t.Value)
		}
		w.EndArray()
	case ast.String:
		w.String(string(v))
	case ast.Boolean:
		w.Bool(bool(v))
	case ast.Null:
		w.Null()
	case ast.Number:
		if n, err := strconv.ParseInt(string(v), 10, 64); err == nil && strconv.FormatInt(n, 10) == string(v) {
			w.Int(n)
		} else {
			w.Number(string(v))
		}
	}
}

// FuzzRedact compares what the encoder hides with what the oracle hides, of values
// and of documents that write themselves.
func FuzzRedact(f *testing.F) {
	for _, seed := range []string{
		`{"attributes": {"source": {"certificate": "S", "authorization": {"x-api-key": {"a": 1}}}, "request": {"http": {"headers": {"authorization": "S", "cookie": ["S", {"a": {}}], "set-cookie": {"x": [1]}, "x": "y"}}}}}`,
		`{"headers": [{"key": "Cookie", "value": "S", "values": [1], "raw_value": null, "rawValue": {"a": {"b": []}}}, {"name": "authorization", "a": {"cookie": 1}, "value": 7}, [{"key": "x-amz-a", "value": "b"}]]}`,
		`{"header": {"key": "cookie", "value": "S", "header": {"name": "cookie", "value": "S"}}, "cookie": {"header": {"key": "cookie", "value": "S"}}}`,
		`[{"cookie": "` + Redacted + `"}, {"cookie": null}, {"cookie": true}, {"cookie": 1.5e3}, {"a/b": {"cookie": "S"}}, {"key": ["cookie"], "value": "plain"}]`,
		`{"set-cookie-header": {"cookie": {"a": [{}]}}, "x": [[], {}, [{"authorization": [[{}]]}, 3]], "destination": [{"certificate": "plain"}]}`,
		`{"cookie": {"cookie": {"cookie": "S"}}, "source": {"source": {"certificate": ["S"]}}, "": {"": {"x-amz-\u0000": "\""}}}`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var x any
		if util.UnmarshalJSON([]byte(text), &x) != nil {
			return
		}
		v := ast.MustInterfaceToValue(x)
		if native, err := ast.JSON(v); err != nil {
			return
		} else if _, err := json.Marshal(native); err != nil {
			return // a number out of range, which a parser lets pass
		}
		o := oracle{path: []string{"input"}}
		want := o.value(x, "input")
		e := newEncoder()
		for name, p := range map[string]parts{"value": {input: v}, "document": {document: written{v}}} {
			e.reset(true)
			c := newConstants(nil)
			e.event(&Event{DecisionID: "d"}, &p, &c)
			if e.err != nil {
				t.Fatalf("%s: %v", name, e.err)
			}
			got := parse(t, e.buf).(map[string]any)
			if !reflect.DeepEqual(got["input"], want) {
				t.Errorf("%s: got %s, want %v", name, e.buf, want)
			}
			var masked []string
			if list, ok := got["masked"].([]any); ok {
				for _, m := range list {
					masked = append(masked, m.(string))
				}
			}
			if !slices.Equal(masked, o.masked) {
				t.Errorf("%s: masked %q, want %q", name, masked, o.masked)
			}
		}
	})
}

package policy_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

var update = flag.Bool("update", false, "rewrite the wanted results in testdata")

const entry = "envoy/authz/allow"

// TestScripts runs the questions of testdata; see the README there.
func TestScripts(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, path := range paths {
		for _, by := range []policy.Evaluator{policy.Topdown, policy.Plan} {
			t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar")+"/"+string(by), func(t *testing.T) { runScript(t, path, by) })
		}
	}
}

func runScript(t *testing.T, path string, by policy.Evaluator) {
	archive, err := txtar.ParseFile(path)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	bundle := map[string]string{}
	for _, f := range archive.Files {
		files[f.Name] = string(f.Data)
		if ext := filepath.Ext(f.Name); ext != ".input" && ext != ".want" && ext != ".err" && f.Name != "labels" {
			bundle[f.Name] = string(f.Data)
		}
	}
	p, err := compile(bundle, policy.Options{Entries: []string{entry}, Evaluator: by})
	if want, ok := files["compile.err"]; ok {
		if err == nil {
			t.Fatalf("compiles, want error %q", want)
		}
		for _, part := range strings.Split(strings.TrimSpace(want), "\n") {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("got error %q, want %q in it", err, part)
			}
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	labels := map[string]string{}
	for _, line := range strings.Fields(files["labels"]) {
		k, v, _ := strings.Cut(line, "=")
		labels[k] = v
	}
	env := policy.NewEnv(labels)

	results := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		question, ok := strings.CutSuffix(name, ".input")
		if !ok {
			continue
		}
		input, err := policy.ParseJSON([]byte(files[name]), nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		d, err := p.Decide(context.Background(), entry, input, env, nil)
		if err != nil {
			if d.Allowed {
				t.Errorf("%s: a decision with an error allows", question)
			}
			results[question+".err"] = err.Error() + "\n"
			continue
		}
		results[question+".want"] = show(t, d)
	}
	if *update {
		archive.Files = slices.DeleteFunc(archive.Files, func(f txtar.File) bool {
			ext := filepath.Ext(f.Name)
			return ext == ".want" || ext == ".err"
		})
		for name, result := range results {
			at := slices.IndexFunc(archive.Files, func(f txtar.File) bool {
				return f.Name == strings.TrimSuffix(name, filepath.Ext(name))+".input"
			})
			archive.Files = slices.Insert(archive.Files, at+1, txtar.File{Name: name, Data: []byte(result)})
		}
		if err := os.WriteFile(path, txtar.Format(archive), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for name, got := range results {
		if want, ok := files[name]; !ok {
			t.Errorf("%s: got %s, want another kind of result", name, got)
		} else if got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

// compile compiles a bundle as a tenant's one bundle.
func compile(files map[string]string, opts policy.Options) (*policy.Policy, error) {
	var text strings.Builder
	for name, data := range files {
		text.WriteString("-- " + name + " --\n" + data + "\n")
	}
	b, err := authztest.Bundle(text.String())
	if err != nil {
		return nil, err
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		return nil, err
	}
	return policy.Compile([]policy.Named{{Name: "policy", Part: part}}, opts)
}

// show renders a decision without what it leaves at zero.
func show(t *testing.T, d policy.Decision) string {
	t.Helper()
	shown := map[string]any{"allowed": d.Allowed}
	add := func(name string, v any, zero bool) {
		if !zero {
			shown[name] = v
		}
	}
	add("object", d.Object, !d.Object)
	add("status", d.Status, d.Status == 0)
	add("headers", d.Headers, d.Headers == nil)
	add("body", d.Body, d.Body == "")
	add("remove_headers", d.RemoveHeaders, d.RemoveHeaders == nil)
	add("response_headers", d.ResponseHeaders, d.ResponseHeaders == nil)
	add("set_query", d.SetQuery, d.SetQuery == nil)
	add("remove_query", d.RemoveQuery, d.RemoveQuery == nil)
	if d.Metadata != nil {
		metadata, err := ast.JSON(d.Metadata)
		if err != nil {
			t.Fatal(err)
		}
		add("metadata", metadata, false)
	}
	text, err := json.Marshal(shown)
	if err != nil {
		t.Fatal(err)
	}
	return string(text) + "\n"
}

func TestErrorsHaveClasses(t *testing.T) {
	p := authztest.Policy(t, `
package envoy.authz

allow := input.decision
allow := 1 if input.conflict
`)
	for input, want := range map[string]error{
		`{}`:                                policy.ErrUndefined,
		`{"decision": 1}`:                   policy.ErrResult,
		`{"decision": 2, "conflict": true}`: policy.ErrConflict,
	} {
		_, err := p.Decide(context.Background(), entry, value(t, input), nil, nil)
		if !errors.Is(err, want) {
			t.Errorf("input %s: got error %v, want %v", input, err, want)
		}
	}
	if _, err := p.Decide(context.Background(), "a/b", value(t, `{}`), nil, nil); !errors.Is(err, policy.ErrEntry) {
		t.Errorf("entry point that was not compiled: got error %v, want %v", err, policy.ErrEntry)
	}
}

func TestCancel(t *testing.T) {
	p := authztest.Policy(t, `
package envoy.authz

allow if {
	some x in numbers.range(1, 100000)
	some y in numbers.range(1, 100000)
	x * y == -1
}
`)
	cancel := new(policy.Cancel)
	time.AfterFunc(20*time.Millisecond, cancel.Cancel)
	if _, err := p.Decide(context.Background(), entry, value(t, `{}`), nil, cancel); !errors.Is(err, policy.ErrCanceled) {
		t.Errorf("got error %v, want %v", err, policy.ErrCanceled)
	}
}

// A Policy has no state of its own: what many ask at once gets what each asks.
func TestConcurrentUse(t *testing.T) {
	p := authztest.Policy(t, `
package envoy.authz

allow if data.users[input.user].admin
allow := false if not data.users[input.user].admin
-- data.json --
{"users": {"alice": {"admin": true}, "bob": {}}}
`)
	env := policy.NewEnv(nil)
	var wg sync.WaitGroup
	for user, want := range map[string]bool{"alice": true, "bob": false, "carol": false} {
		for range 4 {
			wg.Go(func() {
				for range 200 {
					d, err := p.Decide(context.Background(), entry, value(t, `{"user": "`+user+`"}`), env, nil)
					if err != nil || d.Allowed != want {
						t.Errorf("%s: got %v, %v, want %v", user, d.Allowed, err, want)
						return
					}
				}
			})
		}
	}
	wg.Wait()
}

func TestSeveralBundles(t *testing.T) {
	named := func(name, text string) policy.Named {
		b, err := authztest.Bundle(text)
		if err != nil {
			t.Fatal(err)
		}
		part, err := policy.Prepare(b.Bundle)
		if err != nil {
			t.Fatal(err)
		}
		return policy.Named{Name: name, Part: part}
	}
	rules := named("rules", `
package envoy.authz

allow if data.shared.users[input.user]
-- .manifest --
{"revision": "1", "roots": ["envoy"]}
`)
	users := named("users", `
-- shared/users/data.json --
{"alice": true}
-- .manifest --
{"revision": "2", "roots": ["shared/users"]}
`)
	groups := named("groups", `
-- shared/groups/data.json --
{"ops": ["alice"]}
-- .manifest --
{"revision": "3", "roots": ["shared/groups"]}
`)
	opts := policy.Options{Entries: []string{entry}}
	p, err := policy.Compile([]policy.Named{rules, users, groups}, opts)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := p.Decide(context.Background(), entry, value(t, `{"user": "alice"}`), nil, nil); err != nil || !d.Allowed {
		t.Errorf("got %v, %v, want allowed", d.Allowed, err)
	}
	want := []policy.Revision{{Name: "rules", Revision: "1"}, {Name: "users", Revision: "2"}, {Name: "groups", Revision: "3"}}
	if got := p.Revisions(); !slices.Equal(got, want) {
		t.Errorf("got revisions %v, want %v", got, want)
	}

	other := named("other", `
-- shared/users/bob/data.json --
true
-- .manifest --
{"roots": ["shared/users/bob"]}
`)
	_, err = policy.Compile([]policy.Named{users, other}, opts)
	if err == nil || !strings.Contains(err.Error(), `bundles "users" and "other" overlap`) {
		t.Errorf("overlapping roots: got error %v", err)
	}
}

func TestAllowHeaders(t *testing.T) {
	b, err := authztest.Bundle(`
package envoy.authz

allow := {"allowed": true, "headers": {input.name: "x"}}
`)
	if err != nil {
		t.Fatal(err)
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile([]policy.Named{{Name: "policy", Part: part}},
		policy.Options{Entries: []string{entry}, AllowHeaders: []string{"Host", "x-envoy-max-*"}})
	if err != nil {
		t.Fatal(err)
	}
	for name, allowed := range map[string]bool{
		"host": true, "HOST": true, "x-envoy-max-retries": true,
		"x-envoy-retry-on": false, ":path": false, "x-user": true, "connection": false,
	} {
		_, err := p.Decide(context.Background(), entry, value(t, `{"name": "`+name+`"}`), nil, nil)
		if allowed != (err == nil) {
			t.Errorf("header %q: got error %v, want allowed %t", name, err, allowed)
		}
	}
}

// What no response can carry makes a result ill-typed.
func TestUTF8(t *testing.T) {
	p := authztest.Policy(t, `
package envoy.authz

allow := {"allowed": input.allowed, input.field: input.value}
`)
	bad := ast.String("a\xff")
	header := ast.NewObject(ast.Item(ast.StringTerm("x"), ast.NewTerm(bad)))
	name := ast.NewObject(ast.Item(ast.NewTerm(bad), ast.StringTerm("x")))
	list := ast.NewArray(ast.NewTerm(bad))
	for _, c := range []struct {
		field   string
		allowed bool
		value   ast.Value
	}{
		{"headers", true, header}, {"headers", true, name}, {"headers", false, header},
		{"response_headers_to_add", true, header}, {"request_headers_to_remove", true, list},
		{"query_parameters_to_set", true, header}, {"query_parameters_to_set", true, name},
		{"query_parameters_to_remove", true, list}, {"body", false, bad},
		{"dynamic_metadata", true, header}, {"dynamic_metadata", false, name},
		{"dynamic_metadata", true, ast.NewObject(ast.Item(ast.StringTerm("l"), ast.NewTerm(list)))},
	} {
		input := ast.NewObject(
			ast.Item(ast.StringTerm("field"), ast.StringTerm(c.field)),
			ast.Item(ast.StringTerm("allowed"), ast.BooleanTerm(c.allowed)),
			ast.Item(ast.StringTerm("value"), ast.NewTerm(c.value)))
		if d, err := p.Decide(context.Background(), entry, input, nil, nil); !errors.Is(err, policy.ErrResult) || d.Allowed {
			t.Errorf("%s of %v: got %v, want %v", c.field, c.value, err, policy.ErrResult)
		}
	}
}

func TestParseEntry(t *testing.T) {
	for path, want := range map[string]string{
		"envoy/authz/allow": entry, "/envoy//authz/allow/": entry, "": "", "//": "",
	} {
		got, err := policy.ParseEntry(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("ParseEntry(%q): got %q, %v, want %q", path, got, err, want)
		}
	}
}

// FuzzDecision: no result is taken for an allowing decision unless it says so.
func FuzzDecision(f *testing.F) {
	p := authztest.Policy(f, "package envoy.authz\nallow := input")
	for _, seed := range []string{
		`true`, `false`, `{"allowed": true}`, `{"allowed": false, "http_status": 302, "headers": {"location": "/"}}`,
		`{"allowed": true, "headers": [{"a": ["b"]}], "dynamic_metadata": {"x": [1, null]}}`, `[]`, `"x"`, `1e400`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		v, err := policy.ParseJSON(text, nil)
		if err != nil {
			return
		}
		d, err := p.Decide(context.Background(), entry, v, nil, nil)
		says := v.Compare(ast.Boolean(true)) == 0
		if obj, ok := v.(ast.Object); ok {
			allowed := obj.Get(ast.StringTerm("allowed"))
			says = allowed != nil && allowed.Value.Compare(ast.Boolean(true)) == 0
		}
		if d.Allowed && (!says || err != nil) {
			t.Errorf("%s: got allowed, %v", text, err)
		}
		for _, h := range append(slices.Clone(d.Headers), d.ResponseHeaders...) {
			if strings.ContainsAny(h.Name+h.Value, "\r\n\x00") {
				t.Errorf("%s: header %q has a line break", text, h)
			}
		}
	})
}

func value(t testing.TB, text string) ast.Value {
	t.Helper()
	v, err := policy.ParseJSON([]byte(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func BenchmarkDecide(b *testing.B) {
	for name, text := range map[string]string{
		"trivial": "package envoy.authz\ndefault allow := true",
		"object":  "package envoy.authz\nallow := {\"allowed\": true, \"headers\": {\"x-user\": \"alice\"}}",
	} {
		for _, by := range []policy.Evaluator{policy.Topdown, policy.Plan} {
			b.Run(name+"/"+string(by), func(b *testing.B) {
				p, err := compile(map[string]string{"policy.rego": text}, policy.Options{Entries: []string{entry}, Evaluator: by})
				if err != nil {
					b.Fatal(err)
				}
				env := policy.NewEnv(nil)
				input := value(b, `{"a": 1}`)
				b.ReportAllocs()
				for b.Loop() {
					if _, err := p.Decide(context.Background(), entry, input, env, nil); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

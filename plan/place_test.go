package plan

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/document"
)

// Large parts of the data are looked at where they lie: nothing large is made of
// them, and the answers are those of topdown.
func TestInPlace(t *testing.T) {
	users, list := map[string]any{}, []any{}
	for i := range 20_000 {
		name := fmt.Sprintf("user-%05d", i)
		users[name] = map[string]any{"roles": []any{fmt.Sprint("role-", i%20), "all"}, "at": i, "deep": map[string]any{"er": []any{name}}}
		list = append(list, map[string]any{"name": name, "n": i})
	}
	data := map[string]any{"users": users, "list": list, "names": map[string]any{"a": map[string]any{"user-00007": "x"}}}
	doc, err := document.Of(data)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(data)
	if err != nil {
		t.Fatal(err)
	}
	most := 7 * int64(len(text)) / 2 // with all small values that it remembers; as OPA has it, it is 8 times and more
	for _, rule := range []string{
		`v := data.users[input.user].roles`,
		`some v in data.users[input.user].roles`,
		`v := count(data.users)`,
		`v := [count(data.list), data.users == data.list, data.users != 1]`,
		`v := object.get(data.users, input.user, "none")`,
		`v := object.get(data.users, [input.user, "deep", "er", 0], "none")`,
		`v := object.get(data.users, [input.user, "deep", "no", 0], "none")`,
		`v := object.get(data.users, [], "none").nobody`,
		`v := object.get(data.users, 1, "none")`,
		`u := data.users; x := u[input.user]; v := [x.at, x.deep.er[0]]`,
		`data.users[input.user].at == input.at; v := true`,
		`some x in data.list; x.name == input.user; v := x`,
		`some i, x in data.list; x.name == input.user; v := [i, x.n]`,
		`data.users[k].at == input.at; v := k`,
		`v := data.list[input.at].name`,
		`v := data.list["7"].name`,
		`v := input.user in data.list`,
		`v := data.users[data.list[input.at].name].deep`,
		`is_object(data.users[input.user]); v := data.names.a[input.user]`,
		`every x in data.users[input.user].roles { x != "none" }; v := 1`,
		`v := {x | some x in data.users[input.user].roles}`,
		`not data.users[input.none]; v := 1`,
		`x := data.names with data.names as {"b": 1}; v := x`,
		`v := data.names.a["user-00007"] with data.users as {}`,
	} {
		compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": "package t\n\nimport rego.v1\n\nr contains v if { " + rule + " }"}, ast.CompileOpts{})
		if err != nil {
			t.Fatal(rule, err)
		}
		o := oracle{compiler: compiler, query: ast.MustParseBody("data.t.r = result"), data: data}
		p, err := Of(compiler, o.query)
		if err != nil {
			t.Fatal(rule, err)
		}
		prog, err := Compile(p, doc.Root())
		if err != nil {
			t.Fatal(rule, err)
		}
		if strings.Contains(rule, " with ") || strings.Contains(rule, "get(data.users, [],") {
			continue // these want the whole, and are compared below
		}
		for range 2 * scansBefore {
			if _, err := prog.Eval(t.Context(), ast.MustParseTerm(`{"user": "user-00007", "at": 7}`).Value, nil); err != nil {
				t.Fatal(rule, err)
			}
		}
		if got := doc.Size(); got > most {
			t.Fatalf("%s: the document takes %d bytes after it, want at most %d", rule, got, most)
		}
		for _, text := range []string{`{"user": "user-00007", "at": 7}`, `{"user": "nobody", "at": -1}`, `{"user": 7, "at": "7"}`, `{}`} {
			input := ast.MustParseTerm(text)
			want, wantErr := o.topdown(t, input)
			got, gotErr := prog.results(t.Context(), input, nil)
			if err := agree(got, gotErr, want, wantErr); err != nil {
				t.Errorf("%s for %s: %v", rule, text, err)
			}
		}
	}
}

package plan

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/gatehouse-authz/gatehouse/document"
)

// searches are rules that look for something in data.
const searches = `package t

bound contains b.role if {
	some b in data.bindings
	b.user == input.user
	b.kind == "x"
}

turned contains b.role if {
	some b in data.bindings
	input.user == b.user
}

index contains i if data.bindings[i].user == input.user

ordered := [b.role | some b in data.bindings; b.user == input.user]

fixed := [b.role | some b in data.bindings; b.kind == "x"]

numbers := [i | some i, b in data.bindings; b.n == input.n]

composite := [i | some i, b in data.bindings; b.tags == input.tags]

tagged := [i | some i, b in data.bindings; input.tag in b.tags]

deep := [[i, j] | some i, j; data.bindings[i].tags[j] == input.tag]

undefined := [i | some i, b in data.bindings; b.user == input.nothing]

member contains role if {
	some role
	data.roles[role].members[_] == input.user
}

named := [role | some role, r in data.roles; r.name == input.user]

in_list if input.user in data.users

in_object if input.user in data.roles.r1

at_key := [k | some k, v in data.roles[input.role]; v == input.user]

listed if data.users[_] == input.user

none if {
	not other
}

other if {
	some b in data.bindings
	b.user == input.user
	b.kind == "y"
}

joined contains g.name if {
	some b in data.bindings
	b.user == input.user
	some g in data.grants
	g.role == b.role
}

every_one if {
	every b in data.bindings { b.user != input.user }
}

one := b.role if {
	some b in data.bindings
	b.user == input.user
}

last[b.role] := i if {
	some i, b in data.bindings
	b.user == input.user
}

chosen := b.role if {
	some b in data.bindings
	b.user == data.users[input.at]
	b.kind == "x"
}
`

// searchData has n bindings, grants and users, and some roles.
func searchData(n int) map[string]any {
	var bindings, grants, users []any
	for i := range n {
		user := any(fmt.Sprintf("user-%d", i/2))
		switch i % 11 {
		case 3:
			user = i / 4
		case 5:
			user = []any{"a", i}
		case 7:
			user = float64(i) / 4
		}
		b := map[string]any{
			"user": user, "role": fmt.Sprintf("role-%d", i%7), "kind": []any{"x", "y", "z"}[i%3],
			"n": []any{1, 1.5, "1", true, nil, 100, 2e3, -1}[i%8], "tags": []any{fmt.Sprintf("tag-%d", i%5), i, "t", "t"},
		}
		if i%13 == 1 {
			delete(b, "user")
		}
		if i%17 == 1 {
			b["tags"] = map[string]any{"a": "tag-1", "b": i}
		}
		bindings = append(bindings, b)
		grants = append(grants, map[string]any{"role": fmt.Sprintf("role-%d", i), "name": fmt.Sprintf("grant-%d", i)})
		users = append(users, fmt.Sprintf("user-%d", i))
	}
	bindings = append(bindings, "a string", map[string]any{"user": "user-2", "kind": "x"})
	roles := map[string]any{}
	for r := range n {
		var members []any
		for u := range 3 + r%40 {
			members = append(members, fmt.Sprintf("user-%d", r*u%50))
		}
		if r == 20 {
			members = append(members, "rare")
		}
		roles[fmt.Sprintf("r%d", r)] = map[string]any{"name": fmt.Sprintf("user-%d", r), "members": members, "at": r}
	}
	return map[string]any{"bindings": bindings, "grants": grants, "users": users, "roles": roles}
}

// searchProgram is one that makes indexes when any would.
func searchProgram(t *testing.T, query string, data map[string]any) *Program {
	t.Helper()
	compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": searches}, ast.CompileOpts{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := Of(compiler, ast.MustParseBody(query))
	if err != nil {
		t.Fatal(err)
	}
	prog, err := Compile(p, documentOf(data))
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

var searchInputs = []string{
	`{"user": "user-2", "n": 1.0, "tag": "tag-1", "tags": ["tag-0", 0, "t", "t"], "role": "r1", "at": 3}`,
	`{"user": "user-7", "n": 15e-1, "tag": "t", "tags": {"a": "tag-1", "b": 1}, "role": "r30", "at": 100000}`,
	`{"user": 1, "n": "1", "tag": 4, "role": "no"}`,
	`{"user": 1.00, "n": true, "tag": 4.0}`,
	`{"user": 1.75, "n": null, "tag": 4.0}`,
	`{"user": ["a", 5], "n": 1e2, "tag": ["tag-1"]}`,
	`{"user": "nobody", "n": 20e2}`,
	`{"user": 12345678901234567890123, "n": -1.0}`,
	`{}`,
}

// Searches in data by an index find what a scan finds, in the same order.
func TestSearch(t *testing.T) {
	compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": searches}, ast.CompileOpts{})
	if err != nil {
		t.Fatal(err)
	}
	queries := []string{"data.t = result"}
	for line := range strings.Lines(searches) {
		if name := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '[' || r == '\n' }); len(name) > 1 && line[0] != '\t' && name[0] != "package" {
			queries = append(queries, "data.t."+name[0]+" = result")
		}
	}
	if len(queries) < 20 {
		t.Fatalf("got %d queries", len(queries))
	}
	for _, size := range []int{0, 1, 30, 200} {
		for _, q := range queries {
			o := oracle{compiler: compiler, query: ast.MustParseBody(q), data: searchData(size)}
			prog := searchProgram(t, q, o.data)
			for _, text := range searchInputs {
				input := ast.MustParseTerm(text)
				want, wantErr := o.topdown(t, input)
				for range scansBefore + 2 {
					got, gotErr := prog.results(t.Context(), input, nil)
					if err := agree(got, gotErr, want, wantErr); err != nil {
						t.Fatalf("%s, size %d, input %s: %v", q, size, text, err)
					}
				}
			}
		}
	}
}

// A search that an index answers looks at few elements.
func TestSearchSteps(t *testing.T) {
	data := searchData(5000)
	for rule, most := range map[string]int64{
		"bound": 100, "turned": 100, "index": 100, "ordered": 100, "tagged": 100, "member": 100, "named": 100,
		"undefined": 100, "in_list": 100, "listed": 100, "none": 100, "other": 100, "joined": 200, "last": 100, "chosen": 100,
	} {
		p := searchProgram(t, "data.t."+rule+" = result", data)
		input := ast.MustParseTerm(`{"user": "user-20", "tag": 100, "at": 20, "role": "r1"}`).Value
		if rule == "member" {
			input = ast.MustParseTerm(`{"user": "rare"}`).Value
		}
		var err error
		for range scansBefore + 1 {
			_, err = p.Eval(context.Background(), input, nil)
		}
		if err != nil && !errors.Is(err, ErrUndefined) {
			t.Fatal(err)
		}
		if _, err := p.Eval(context.Background(), input, &Env{MaxSteps: most}); err != nil && !errors.Is(err, ErrUndefined) {
			t.Errorf("%s: %v", rule, err)
		}
	}
}

// Indexes are made by whoever comes first, while others ask.
func TestSearchConcurrently(t *testing.T) {
	data := searchData(2000)
	for _, rule := range []string{"bound", "member", "joined"} {
		compiler, err := ast.CompileModulesWithOpt(map[string]string{"t.rego": searches}, ast.CompileOpts{})
		if err != nil {
			t.Fatal(err)
		}
		o := oracle{compiler: compiler, query: ast.MustParseBody("data.t." + rule + " = result"), data: data}
		input := ast.MustParseTerm(`{"user": "user-20"}`)
		want, wantErr := o.topdown(t, input)
		prog, err := o.program()
		if err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				for range 20 {
					got, gotErr := prog.results(t.Context(), input, nil)
					if err := agree(got, gotErr, want, wantErr); err != nil {
						t.Errorf("%s: %v", rule, err)
					}
				}
			})
		}
		group.Wait()
	}
}

// An evaluation that is cancelled while it makes an index leaves none behind that
// is half made.
func TestSearchCancelled(t *testing.T) {
	p := searchProgram(t, "data.t.ordered = result", searchData(5000))
	input := ast.MustParseTerm(`{"user": "user-20"}`).Value
	want, err := p.Eval(context.Background(), input, nil)
	if err != nil {
		t.Fatal(err)
	}
	for asked := range 8 {
		p := searchProgram(t, "data.t.ordered = result", searchData(5000))
		for range scansBefore {
			if _, err := p.Eval(context.Background(), input, nil); err != nil {
				t.Fatal(err)
			}
		}
		cancel := new(trap)
		cancel.left.Store(int64(asked))
		if _, err := p.Eval(context.Background(), input, &Env{Cancel: cancel}); err != nil && !topdown.IsCancel(err) {
			t.Error(err)
		}
		if got, err := p.Eval(context.Background(), input, nil); err != nil || got.Compare(want) != 0 {
			t.Errorf("after it was cancelled: got %v, %v, want %v", got, err, want)
		}
	}
}

// What indexes take is what Size reckons with, at most.
func TestIndexSize(t *testing.T) {
	data := searchData(3000)
	p := searchProgram(t, "data.t = result", data)
	reserved := p.reserved
	if reserved <= 0 || reserved > p.Size() {
		t.Fatalf("got %d bytes reserved of %d", reserved, p.Size())
	}
	doc, err := document.Of(data) // whose blocks are those of the Program
	if err != nil {
		t.Fatal(err)
	}
	before, remembered := heap(), doc.Size()
	for range scansBefore + 2 {
		for _, text := range searchInputs {
			if _, err := p.Eval(context.Background(), ast.MustParseTerm(text).Value, nil); err != nil && !errors.Is(err, ErrUndefined) && codeOf(err) != topdown.ConflictErr {
				t.Fatal(err)
			}
		}
	}
	is := int64(heap()) - int64(before) - (doc.Size() - remembered)
	t.Logf("indexes take %d bytes, %d are reserved", is, reserved)
	if is > reserved+reserved/2 {
		t.Errorf("indexes take %d bytes, Size reckons with %d", is, reserved)
	}
	runtime.KeepAlive(p)
}

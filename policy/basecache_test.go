package policy

import (
	"errors"
	"fmt"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
)

// Whatever way a policy reads data, it reads what topdown reads with its own
// cache.
func TestBaseCache(t *testing.T) {
	reads := []string{
		`data.obj.k`, `data.obj.missing`, `data.obj.k.deeper`, `data.obj[input.key]`, `data.obj["1"]`, `data.obj[1]`, `data.obj[null]`,
		`data.obj[[1]]`, `data.obj[{"k"}]`, `data.obj[true]`, `data.arr[0]`, `data.arr["0"]`, `data.arr[-1]`, `data.arr[99]`,
		`data.arr[input.n].x`, `data.arr`, `data.scalar`, `data.scalar[0]`, `data.nothing`, `data.empty`, `data.empty.x`,
		`data.system`, `data.system.bundles`, `data.system[input.system]`, `data.system.none`, `count(data.obj)`, `data.obj[input.key][input.n]`,
		`[p | walk(data.obj, [p, _])]`, `[x | x := data.obj[_]]`, `[[k, v] | some k, v in data.obj]`, `[x | x := data.obj[_][_]]`, `[x | x := data.arr[_].x]`,
		`data.mix`, `data.mix.base`, `data.mix.rule`, `data.mix.rule.deep`, `[k | data.mix[k]]`, `data.mix.sub.base`, `data.mix.sub.rule`, `data.mix[input.mix]`,
		`[data.obj.k, data.obj, data.obj.k, data.obj.deep.er]`, `[data.obj.deep, data.obj.deep.er, data.obj.deep.er["2"]]`,
		`v if { v := data.obj with data.obj as {"k": 7} }`, `v if { v := data.obj.k with data.obj.k as 7 }`,
		`v if { v := [data.obj.k, data.obj] with data.obj.new as 7 }`, `v if { v := data.mix with data.mix.base as {"x": 1} }`,
		`v if { v := data.arr with data.arr as [9] }`,
	}
	text := "package reads\n"
	entries := []string{""}
	for i, r := range reads {
		if len(r) > 4 && r[:4] == "v if" {
			text += fmt.Sprintf("r%d := %s\n", i, r)
		} else {
			text += fmt.Sprintf("r%d := v if v := %s\n", i, r)
		}
		entries = append(entries, fmt.Sprintf("reads/r%d", i))
	}
	mix := "package mix\n\nrule := {\"deep\": data.obj.k}\n"
	sub := "package mix.sub\n\nrule := data.mix.base\n"
	b := &bundle.Bundle{
		Manifest: bundle.Manifest{Revision: "1", Roots: &[]string{""}},
		Data: map[string]any{
			"obj":    map[string]any{"k": "v", "1": "one", "deep": map[string]any{"er": map[string]any{"2": "two"}}},
			"arr":    []any{map[string]any{"x": "a"}, map[string]any{"x": "b"}},
			"scalar": "s", "empty": map[string]any{},
			"mix": map[string]any{"base": map[string]any{"b": "c"}, "sub": map[string]any{"base": "sb"}},
		},
	}
	for name, text := range map[string]string{"reads.rego": text, "mix.rego": mix, "sub.rego": sub} {
		b.Modules = append(b.Modules, bundle.ModuleFile{URL: name, Path: name, Raw: []byte(text), Parsed: ast.MustParseModule(text)})
	}
	part, err := Prepare(b)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Compile([]Named{{Name: "policy", Part: part}}, Options{Entries: entries, Evaluator: Topdown})
	if err != nil {
		t.Fatal(err)
	}
	inputs := []string{
		`{"key": "k", "n": 1, "system": "bundles", "mix": "rule"}`,
		`{"key": "1", "n": 0, "system": "none", "mix": "base"}`,
		`{"key": 1, "n": "1", "system": 1, "mix": "sub"}`,
		`{"key": ["k"], "n": 1.5, "system": null, "mix": "none"}`, `{}`,
	}
	defined := 0
	for i, entry := range entries {
		for _, input := range inputs {
			v := ast.MustParseTerm(input)
			own, _ := p.queryOf(p.entries[entry])
			own.WithBaseCache(nil).WithInput(v).WithRuntime(noRuntime)
			want, wantErr := run(t.Context(), &own)
			got, err := p.Eval(t.Context(), entry, v.Value, nil, nil)
			if (err == nil) != (wantErr == nil) || err == nil && got.Compare(want) != 0 || errors.Is(err, ErrUndefined) != errors.Is(wantErr, ErrUndefined) {
				t.Errorf("%s for %s: got %v, %v, want %v, %v", append([]string{"data"}, reads...)[i], input, got, err, want, wantErr)
			}
			if err == nil {
				defined++
			}
		}
	}
	if defined < len(reads) {
		t.Errorf("only %d reads had a value: too few to tell", defined)
	}
}

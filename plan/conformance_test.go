package plan

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/test/cases"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/types"

	"github.com/gatehouse-authz/gatehouse/document"
)

// falls says which of OPA's cases a Program does not answer, and why: Compile, or
// OPA's planner before it, refuses their plan, and topdown answers.
//
// Those of today replace data by "with" and look into data with a key that is
// computed. topdown reads data by paths of strings, so that 2 finds "2", and what
// "with" gives as it is.
var falls = map[string]string{ // :: version/note → part of the error
	"v0/withkeyword/with rule chain":                            "computed keys of data",
	"v1/withkeyword/with rule chain":                            "computed keys of data",
	"v1/a with statement replacing the collection is seen":      "computed keys of data",
	"v1/a with statement may replace the collection with a set": "computed keys of data",
	"v1/a set the subject is not in reaches no rule":            "computed keys of data",
}

// differs says which of OPA's cases a Program answers otherwise than topdown.
var differs = map[string]string{} // :: version/note → why

func TestMain(m *testing.M) {
	// Some of OPA's cases call a builtin of its tests.
	ast.RegisterBuiltin(&ast.Builtin{Name: "test.sleep", Decl: types.NewFunction(types.Args(types.S), types.Nl)})
	topdown.RegisterBuiltinFunc("test.sleep", func(_ topdown.BuiltinContext, operands []*ast.Term, iter func(*ast.Term) error) error {
		d, err := time.ParseDuration(string(operands[0].Value.(ast.String)))
		if err != nil {
			return err
		}
		time.Sleep(d)
		return iter(ast.NullTerm())
	})
	m.Run()
}

// TestConformance runs OPA's own cases on topdown and on Programs: they must
// agree on all results and all codes of errors.
func TestConformance(t *testing.T) {
	for version, parser := range map[string]ast.RegoVersion{"v0": ast.RegoV0, "v1": ast.RegoV1} {
		all := cases.MustLoad(filepath.Join(opaDir(t), "v1/test/cases/testdata", version)).Sorted().Cases
		if len(all) < 1000 {
			t.Fatalf("got %d cases of %s, want those of OPA", len(all), version)
		}
		for _, tc := range all {
			t.Run(version+"/"+tc.Note, func(t *testing.T) {
				if len(tc.Env) == 0 {
					t.Parallel()
				}
				for k, v := range tc.Env {
					t.Setenv(k, v)
				}
				conform(t, version+"/"+tc.Note, &tc, parser)
			})
		}
	}
}

func conform(t *testing.T, name string, tc *cases.TestCase, version ast.RegoVersion) {
	modules := map[string]string{}
	for i, m := range tc.Modules {
		modules[fmt.Sprintf("test-%d.rego", i)] = m
	}
	opts := ast.ParserOptions{RegoVersion: version}
	if tc.ExperimentalKeywords {
		opts.Capabilities = ast.CapabilitiesForThisVersion(ast.CapabilitiesExperimentalKeywords(true))
	}
	compiler, err := ast.CompileModulesWithOpt(modules, ast.CompileOpts{ParserOptions: opts})
	if err != nil {
		t.Fatal(err)
	}
	var input *ast.Term
	if tc.InputTerm != nil {
		input = ast.MustParseTerm(*tc.InputTerm)
	} else if tc.Input != nil {
		input = ast.NewTerm(ast.MustInterfaceToValue(*tc.Input))
	}
	data := map[string]any{}
	if tc.Data != nil {
		data = *tc.Data
	}
	o := oracle{compiler: compiler, query: ast.MustParseBody(tc.Query), data: data, strict: tc.StrictError}

	want, wantErr := o.topdown(t, input)
	if tc.WantErrorCode != nil && codeOf(wantErr) != *tc.WantErrorCode {
		t.Fatalf("topdown: got %v, want code %s", wantErr, *tc.WantErrorCode)
	}

	got, gotErr := o.plan(t, input)
	var refused *refusedError
	if errors.As(gotErr, &refused) || errors.Is(gotErr, ErrUnsupported) {
		if why, ok := falls[name]; !ok || !strings.Contains(gotErr.Error(), why) {
			t.Errorf("falls back: %v", gotErr)
		}
		return
	}
	if _, ok := falls[name]; ok {
		t.Errorf("does not fall back")
	}
	err = agree(got, gotErr, want, wantErr)
	if _, ok := differs[name]; ok {
		if err == nil {
			t.Error("does not differ")
		}
		return
	}
	if err != nil {
		t.Error(err)
	}
}

// agree returns an error that tells how what a Program gave differs from what
// topdown did.
func agree(got ast.Set, gotErr error, want ast.Set, wantErr error) error {
	switch {
	case wantErr != nil && gotErr == nil:
		return fmt.Errorf("got %v, want error %v", got, wantErr)
	case wantErr == nil && gotErr != nil:
		return fmt.Errorf("got error %v, want %v", gotErr, want)
	case wantErr != nil:
		if codeOf(gotErr) != codeOf(wantErr) {
			return fmt.Errorf("got error %v, want %v", gotErr, wantErr)
		}
	case got.Compare(want) != 0:
		return fmt.Errorf("got %v, want %v", got, want)
	}
	return nil
}

func codeOf(err error) string {
	var e *topdown.Error
	if errors.As(err, &e) {
		return e.Code
	}
	if err != nil {
		return "other: " + err.Error()
	}
	return ""
}

// oracle asks both evaluators one question.
type oracle struct {
	compiler *ast.Compiler
	query    ast.Body
	data     map[string]any
	strict   bool
	env      Env
}

func (o *oracle) topdown(t testing.TB, input *ast.Term) (ast.Set, error) {
	qc := o.compiler.QueryCompiler()
	query, err := qc.Compile(o.query)
	if err != nil {
		t.Fatal(err)
	}
	// Not the store's lazy objects: a "with" over a part of data would change them.
	store := inmem.NewFromObjectWithOpts(o.data, inmem.OptReturnASTValuesOnRead(true))
	rs, err := topdown.NewQuery(query).
		WithCompiler(o.compiler).
		WithStore(store).
		WithTransaction(storage.NewTransactionOrDie(t.Context(), store)).
		WithInput(input).
		WithTime(o.env.Time).
		WithCancel(o.env.Cancel).
		WithStrictBuiltinErrors(o.strict).
		Run(t.Context())
	if err != nil {
		return nil, err
	}
	names := qc.RewrittenVars()
	out := ast.NewSet()
	for _, r := range rs {
		obj := ast.NewObject()
		for k, v := range r {
			if name, ok := names[k]; ok {
				k = name
			}
			if !k.IsGenerated() && !k.IsWildcard() {
				obj.Insert(ast.StringTerm(string(k)), v)
			}
		}
		out.Add(ast.NewTerm(obj))
	}
	return out, nil
}

// refusedError is why there is no Program.
type refusedError struct{ error }

func (e *refusedError) Unwrap() error { return e.error }

func (o *oracle) program() (*Program, error) { return o.programOf(asHeld) }

// programOf makes a Program that looks at values of the data in a way, and that has
// indexes wherever it can, which is the harder case.
func (o *oracle) programOf(h holding) (*Program, error) {
	p, err := Of(o.compiler, o.query)
	if err != nil {
		return nil, &refusedError{err}
	}
	prog, err := compile(p, documentOf(o.data), newIndexes(0, 0), h)
	if err != nil {
		return nil, &refusedError{err}
	}
	return prog, nil
}

func (o *oracle) plan(t testing.TB, input *ast.Term) (ast.Set, error) {
	env := o.env
	env.StrictBuiltinErrors = o.strict
	env.JSON, env.MaxMemory = parseJSON, 64<<20
	var got ast.Set
	var err error
	for i, h := range []holding{asHeld, asSmall} {
		prog, refused := o.programOf(h)
		if refused != nil {
			return nil, refused
		}
		if i == 0 {
			got, err = prog.results(t.Context(), input, &env)
		}
		for range 2 { // what is remembered must not change anything
			again, againErr := prog.results(t.Context(), input, &env)
			if codeOf(err) != codeOf(againErr) || err == nil && (got.Len() != again.Len()) {
				t.Errorf("asked again: got %v, %v, before it was %v, %v", again, againErr, got, err)
			}
		}
	}
	return got, err
}

// opaDir returns where the module of OPA is.
func opaDir(t testing.TB) string {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/open-policy-agent/opa").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// documentOf returns the value of a document.
func documentOf(data any) document.Value {
	doc, err := document.Of(data)
	if err != nil {
		panic(err)
	}
	return doc.Root()
}

package plan

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/ir"
	"golang.org/x/tools/txtar"
)

var gather = flag.Int("gather", 0, "make testdata/corpus anew of so many random policies")

const corpus = "testdata/corpus"

// TestCorpus compares Programs with topdown on policies that are kept. They stay
// what they are when the generator changes, and each has something that no other
// has: a statement within another, or a builtin, or an outcome of these.
func TestCorpus(t *testing.T) {
	if *gather > 0 {
		gatherCorpus(t, *gather)
	}
	files, err := filepath.Glob(filepath.Join(corpus, "*.txtar"))
	if err != nil || len(files) < 50 {
		t.Fatalf("got %d files, %v, want at least 50", len(files), err)
	}
	var n tally
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := parseCase(text).differ(t, &n); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
	t.Logf("%+v", n)
	if n.compiled < len(files) || n.refused > n.planned/5 {
		t.Errorf("got %+v, want all compiled and few refused", n)
	}
}

// parseCase reads what policyCase.archive has written.
func parseCase(text []byte) policyCase {
	c := policyCase{modules: map[string]string{}}
	for _, f := range txtar.Parse(text).Files {
		switch content := string(f.Data); {
		case f.Name == "queries":
			c.queries = strings.Split(strings.TrimSuffix(content, "\n"), "\n")
		case f.Name == "data":
			c.data = content
		case strings.HasPrefix(f.Name, "input"):
			c.inputs = append(c.inputs, strings.TrimSuffix(content, "\n"))
		default:
			c.modules[f.Name] = content
		}
	}
	return c
}

func (c policyCase) archive() []byte {
	var a txtar.Archive
	add := func(name, text string) {
		a.Files = append(a.Files, txtar.File{Name: name, Data: []byte(strings.TrimSuffix(text, "\n") + "\n")})
	}
	for _, name := range slices.Sorted(maps.Keys(c.modules)) {
		add(name, c.modules[name])
	}
	add("data", c.data)
	add("queries", strings.Join(c.queries, "\n"))
	for i, in := range c.inputs {
		add(fmt.Sprintf("input %d", i), in)
	}
	return txtar.Format(&a)
}

// features are what a policy has that can go wrong by itself.
func (c policyCase) features() map[string]bool {
	compiler := c.compile()
	if compiler == nil || cyclic(compiler) {
		return nil
	}
	found := map[string]bool{}
	for _, q := range c.queries {
		p, err := Of(compiler, ast.MustParseBody(q))
		if err != nil {
			continue
		}
		for _, plan := range p.Plans.Plans {
			blockFeatures(found, "plan", plan.Blocks)
		}
		for _, f := range p.Funcs.Funcs {
			blockFeatures(found, "func", f.Blocks)
		}
	}
	return found
}

// blockFeatures adds each statement with what it is in and what is before it.
func blockFeatures(found map[string]bool, in string, blocks []*ir.Block) {
	for _, b := range blocks {
		if b == nil {
			continue
		}
		before := "begin"
		for _, s := range b.Stmts {
			name := strings.TrimPrefix(fmt.Sprintf("%T", s), "*ir.")
			if call, ok := s.(*ir.CallStmt); ok && !strings.HasPrefix(call.Func, "g0.") {
				found[call.Func] = true
			}
			found[in+" > "+name] = true
			found[before+", "+name] = true
			before = name
			switch s := s.(type) {
			case *ir.BlockStmt:
				blockFeatures(found, name, s.Blocks)
			case *ir.ScanStmt:
				blockFeatures(found, name, []*ir.Block{s.Block})
			case *ir.NotStmt:
				blockFeatures(found, name, []*ir.Block{s.Block})
			case *ir.WithStmt:
				blockFeatures(found, name, []*ir.Block{s.Block})
			}
		}
	}
}

// gatherCorpus keeps of random policies those that together have all features
// that any of them has, first the one with the most that none before it has.
func gatherCorpus(t *testing.T, count int) {
	type candidate struct {
		text     []byte
		features map[string]bool
	}
	var all []candidate
	r := rand.New(rand.NewPCG(42, 0))
	for range count {
		c := generate(randomChoices(r))
		c.modules = maps.Clone(c.modules)
		if f := c.features(); len(f) > 0 {
			all = append(all, candidate{c.archive(), f})
		}
	}
	if err := os.RemoveAll(corpus); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(corpus, 0o755); err != nil {
		t.Fatal(err)
	}
	met := map[string]bool{}
	for n := 0; ; n++ {
		best, most := -1, 0
		for i, c := range all {
			more := 0
			for f := range c.features {
				if !met[f] {
					more++
				}
			}
			if more > most || more == most && more > 0 && len(c.text) < len(all[best].text) {
				best, most = i, more
			}
		}
		if best < 0 {
			break
		}
		maps.Copy(met, all[best].features)
		if err := os.WriteFile(filepath.Join(corpus, fmt.Sprintf("%03d.txtar", n)), all[best].text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d features", len(met))
}

package plan

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/util/test"
)

// Policies of OPA's own benchmarks (v1/topdown, v1/rego), those that ask a policy
// for one value. Each gives true to data.envoy.authz.allow, or what is said.

func opaCase(module string, data map[string]any, input string) benchCase {
	return benchCase{"package envoy.authz\n\n" + module, data, ast.MustParseTerm(input).Value}
}

// virtualDocsCase is BenchmarkVirtualDocs.
func virtualDocsCase(total, hits int) benchCase {
	module, input := test.GenerateVirtualDocsBenchmarkData(total, hits)
	return benchCase{strings.Replace(module, "package a.b.c", "package envoy.authz", 1), map[string]any{}, ast.MustInterfaceToValue(input)}
}

// rulesetCase is BenchmarkIndexedRulesetEval.
func rulesetCase(n int) benchCase {
	var b strings.Builder
	groups := map[string]any{}
	for i := range n {
		fmt.Fprintf(&b, "allow if {\n\tinput.subject in data.groups.g%d.members\n\tinput.resource.foo == \"A\"\n}\n\n", i)
		var members []any
		for j := range 20 {
			members = append(members, fmt.Sprintf("u%d_%d", i, j))
		}
		groups[fmt.Sprintf("g%d", i)] = map[string]any{"members": members}
	}
	return opaCase(b.String(), map[string]any{"groups": groups}, fmt.Sprintf(`{"subject": "u%d_19", "resource": {"foo": "A"}}`, n/2))
}

// comprehensionCase is BenchmarkComprehensionIndexing.
func comprehensionCase(n int) benchCase {
	items := map[string]any{}
	for i := range n {
		items[strconv.Itoa(i)] = strconv.Itoa(i)
	}
	return opaCase("allow if {\n\tv := data.items[_]\n\tks := [k | some k; v == data.items[k]]\n\tcount(ks) != 1\n} else := true\n", map[string]any{"items": items}, `{}`)
}

// functionCase is BenchmarkFunctionArgumentIndex.
func functionCase(n int) benchCase {
	var b strings.Builder
	fmt.Fprintf(&b, "allow := f(%d)\n\n", n)
	for i := 1; i <= n; i++ {
		fmt.Fprintf(&b, "f(x) := y if { y := true; x == %d }\n\n", i)
	}
	return opaCase(b.String(), map[string]any{}, `{}`)
}

// labelsCase is BenchmarkAggregatedLabels, without the labels, which are not a
// plan's.
func labelsCase() benchCase {
	return opaCase(`allow if count(reasons) == 2

reasons contains "admin" if "admin" in input.roles

reasons contains "viewer" if "viewer" in input.roles

reasons contains "editor" if "editor" in input.roles
`, map[string]any{}, `{"roles": ["admin", "editor"]}`)
}

// iterationCase is BenchmarkArrayIteration, that comes to the end of the array.
func iterationCase(n int) benchCase {
	var list []any
	for i := range n {
		list = append(list, i)
	}
	return opaCase("default allow := true\n\nallow := false if {\n\tsome x in data.fixture\n\tx < 0\n}\n", map[string]any{"fixture": list}, `{}`)
}

var opaCases = []struct {
	name string
	make func(testing.TB) benchCase
}{
	{"opa-virtual-docs-1000x1", func(testing.TB) benchCase { return virtualDocsCase(1000, 1) }},
	{"opa-virtual-docs-1000x100", func(testing.TB) benchCase { return virtualDocsCase(1000, 100) }},
	{"opa-ruleset-500", func(testing.TB) benchCase { return rulesetCase(500) }},
	{"opa-comprehension-1000", func(testing.TB) benchCase { return comprehensionCase(1000) }},
	{"opa-function-1000", func(testing.TB) benchCase { return functionCase(1000) }},
	{"opa-labels", func(testing.TB) benchCase { return labelsCase() }},
	{"opa-iteration-10000", func(testing.TB) benchCase { return iterationCase(10000) }},
	{"opa-simple-authz", func(testing.TB) benchCase {
		return opaCase("default allow := false\n\nallow if input.user.role == \"admin\"\n\nallow if input.user.id == input.resource.owner\n",
			map[string]any{}, `{"user": {"id": "user123", "role": "user"}, "resource": {"id": "doc456", "owner": "user123"}}`)
	}},
}

func init() { benchCases = append(benchCases, opaCases...) }

package faults

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// greedy are conditions that want gigabytes, or have no end, in one call of a builtin or
// in a few; text has a hundred thousand digits. Short: OPA's builtins do not give up.
var greedy = map[string]string{
	"replace":   `count(replace(text, "1", text)) == 1`,
	"join":      `count(concat(text, ["x" | some _ in numbers.range(1, 100000)])) == 1`,
	"join list": `count(concat("", [text | some _ in numbers.range(1, 50000)])) == 1`,
	"shift":     `bits.lsh(1, 100000000000) == 1`,
	"range":     `count(numbers.range(1, 100000000000)) == 1`,
	"format":    `count(sprintf(concat("", ["%999999d" | some _ in numbers.range(1, 5000)]), numbers.range(1, 5000))) == 1`,
	"addresses": `count(net.cidr_expand("fe80::/10")) == 1`,
	"paths":     `count(graph.reachable_paths({sprintf("%d-%d", [i, j]): [sprintf("%d-0", [i + 1]), sprintf("%d-1", [i + 1])] | some i in numbers.range(1, 60); some j in [0, 1]}, {"1-0"})) == 1`,
	"template":  `count(strings.render_template(concat("", array.concat(["{{$x := .}}"], ["{{$x = printf \"%s%s\" $x $x}}" | some _ in numbers.range(1, 60)])), {"text": text})) == 1`,
	"doubling":  doublingArrays(60),
	"matches":   `count(net.cidr_contains_matches(["10.0.0.0/8" | some _ in numbers.range(1, 30000)], ["10.0.0.1" | some _ in numbers.range(1, 30000)])) == 1`,
	"reachable": `count(graph.reachable({x: all | all := numbers.range(1, 20000); some x in all}, {1})) == 1`,
	"list":      `count([[x, y, z] | some x in numbers.range(1, 5000); some y in numbers.range(1, 5000); some z in numbers.range(1, 500)]) == 1`,
}

func doublingArrays(n int) string {
	lines := []string{"x0 := [1, 2]"}
	for i := range n {
		lines = append(lines, fmt.Sprintf("x%d := array.concat(x%d, x%d)", i+1, i, i))
	}
	return strings.Join(append(lines, fmt.Sprintf("count(x%d) == 1", n)), "\n\t")
}

// Policies that would take all memory are denied, by either evaluator, and the others
// do not notice.
func TestGreedyPolicies(t *testing.T) {
	for _, evaluator := range []string{"plan", "topdown"} {
		t.Run(evaluator, func(t *testing.T) {
			s := newShelf(t)
			s.publish("orders", 1)
			var names []string
			for name, condition := range greedy {
				tenant := "greedy-" + strings.ReplaceAll(name, " ", "-")
				names = append(names, tenant)
				s.Put(tenant, stage.Bundle(map[string]string{"policy.rego": "package envoy.authz\n\n" +
					"text := concat(\"\", [sprintf(\"%d\", [x]) | some x in numbers.range(10000, 29999)])\n\n" +
					"default allow := false\n\nallow if {\n\t" + condition + "\n}\n\nallow if not broken\n\nbroken if {\n\tcount(text) > 0\n}\n"}))
			}
			slices.Sort(names)
			g := serve(t, from(s.URL)+"tenants: {evaluator: "+evaluator+"}\n")
			c := dial(t, g.GRPC)
			c.becomes(t, "orders", 1, 5*time.Second)
			memory := watchMemory(t, g.Pid())
			stop := asks(t, s.judge, 200, []string{"orders"}, c.ask)
			statuses := map[int]int{}
			var mu sync.Mutex
			var clients sync.WaitGroup
			for i := range 4 {
				clients.Go(func() {
					for k := range 3 * len(names) {
						name := names[(i*3+k)%len(names)]
						a := c.ask(name, 0)
						mu.Lock()
						statuses[a.status]++
						mu.Unlock()
						if a.allowed {
							t.Errorf("%s was allowed", name)
						}
					}
				})
			}
			clients.Wait()
			r := stop(t)
			for _, name := range names {
				if s := statusOf(t, g, name); s.Activated == "" || s.Error != "" {
					t.Errorf("%s has no policy: %s", name, s.Error)
				}
			}
			before, peak := memory()
			if peak-before > 1<<30 {
				t.Errorf("memory rose from %s to %s", mib(before), mib(peak))
			}
			if r.failed*50 > r.answers {
				t.Errorf("faults of others: %v of %d, want at most 2 %%", r.faults, r.answers)
			}
			t.Logf("PASS %s: %d policies, answers by status %v; others: %s; memory %s, at most %s", evaluator, len(names), statuses, r, mib(before), mib(peak))
		})
	}
}

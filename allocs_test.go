//go:build !race

package gatehouse_test

import (
	"flag"
	"fmt"
	"maps"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// testdata/allocs.txt says how many allocations each thing that is done for a
// check may make. "go test -run TestAllocations -update ." (make allocs UPDATE=1)
// writes what is made now, without headroom. There are no times in it: those depend on the machine,
// and allocations do not.
var update = flag.Bool("update", false, "write testdata/allocs.txt anew")

const (
	allocsTable = "testdata/allocs.txt"
	allocsHead  = `# Allocations at most: of all goroutines of the process, the network left out. Written by
#   make allocs UPDATE=1
# A change that makes more has to say why; one that makes fewer tightens the table.
`
)

// What the evaluation of a plan may ever make, whatever the table says.
var ceilings = map[string]float64{
	"eval    trivial  plan": 2,
	"eval    roles    plan": 20,
}

// slack is by how much a figure may miss the table: pools and batches of the log
// are not the same in each run. far is how much less makes the table stale.
func slack(bound float64) float64 { return max(0.5, bound*0.02) }
func far(bound float64) float64   { return max(2, bound*0.1) }

// No change makes more allocations unnoticed. Where far fewer are made the table
// is to be tightened, and the test says so: what was won could be lost again.
func TestAllocations(t *testing.T) {
	made := map[string]float64{}
	for _, c := range allocCases(t) {
		made[c.name] = allocations(c.do)
		if most, ok := ceilings[c.name]; ok && made[c.name] > most {
			t.Errorf("%s: got %.1f allocations, and more than %.0f are never right", c.name, made[c.name], most)
		}
	}
	if *update {
		if err := os.WriteFile(allocsTable, []byte(tableOf(made)), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	bounds := readBounds(t)
	for _, name := range slices.Sorted(maps.Keys(made)) {
		bound, ok := bounds[name]
		delete(bounds, name)
		switch got := made[name]; {
		case !ok:
			t.Errorf("%s: %s has no line for it", name, allocsTable)
		case got > bound+slack(bound):
			t.Errorf("%s: got %.1f allocations, want at most %.1f", name, got, bound)
		case got < bound-far(bound):
			t.Logf("%s: got %.1f allocations, and %s allows %.1f: tighten it (make allocs UPDATE=1)", name, got, allocsTable, bound)
		}
	}
	for name := range bounds {
		t.Errorf("%s has a line for %q, which nothing measures", allocsTable, name)
	}
}

// allocCase is one thing that is done again and again.
type allocCase struct {
	name string
	do   func(n int) // does it n times, and returns when all that follows is done
}

// Each case is done in rounds, of which the one that made least counts: what the
// runtime does beside allocates now and then.
const (
	allocRounds = 7
	allocTimes  = 200 // in a round
)

// allocations returns how many allocations doing it once makes.
func allocations(do func(n int)) float64 {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties pools
	do(allocTimes)
	least := math.Inf(1)
	for range allocRounds {
		runtime.GC() // of what the round before left
		do(allocTimes / 4)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		do(allocTimes)
		runtime.ReadMemStats(&after)
		least = min(least, float64(after.Mallocs-before.Mallocs)/allocTimes)
	}
	return math.Round(least*10) / 10
}

func tableOf(made map[string]float64) string {
	var b strings.Builder
	b.WriteString(allocsHead)
	for _, name := range slices.Sorted(maps.Keys(made)) {
		fmt.Fprintf(&b, "%-36s%8.1f\n", name, made[name])
	}
	return b.String()
}

// readBounds reads the table: each line ends with a number.
func readBounds(t *testing.T) map[string]float64 {
	t.Helper()
	text, err := os.ReadFile(allocsTable)
	if err != nil {
		t.Fatal(err)
	}
	bounds := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		var n float64
		if _, err := fmt.Sscan(line[i+1:], &n); i < 0 || err != nil {
			t.Fatalf("%s: %q does not end with a number", allocsTable, line)
		}
		bounds[strings.TrimSpace(line[:i])] = n
	}
	return bounds
}

// allocCases are all that are measured, by both evaluators.
func allocCases(t *testing.T) (cases []allocCase) {
	for _, evaluator := range []string{"topdown", "plan"} {
		for _, c := range benchCases(t) {
			p := c.policy(t, evaluator)
			cases = append(cases, allocCase{fmt.Sprintf("eval    %-8s %s", c.name, evaluator), func(n int) {
				for range n {
					c.eval(t, p)
				}
			}})
			for _, logged := range []bool{false, true} {
				s := newHouse(t, c, evaluator, logged)
				name := fmt.Sprintf("check   %-8s %s", c.name, evaluator)
				if logged {
					name += ", log"
				}
				cases = append(cases, allocCase{name, func(n int) {
					for range n {
						s.check(t, nil)
					}
					s.delivered(t)
				}})
				if logged {
					continue
				}
				cases = append(cases, allocCase{fmt.Sprintf("decide  %-8s %s", c.name, evaluator), func(n int) {
					for range n {
						s.decide(t)
					}
				}})
				if c.name == "roles" {
					for _, items := range []int{1, 100} {
						var bodies [][]byte
						for first := 0; first < allocUsers; first += items {
							bodies = append(bodies, c.batch(first, items))
						}
						next := 0
						cases = append(cases, allocCase{fmt.Sprintf("item    %-8s %s, %d at once", c.name, evaluator, items), func(n int) {
							for range max(1, n/items) {
								s.batch(t, bodies[next%len(bodies)])
								next++
							}
						}})
					}
				}
			}
		}
	}
	return cases
}

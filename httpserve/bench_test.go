package httpserve_test

import (
	"encoding/json"
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// roleRules are those of the policy that e2e/bench measures: a user has roles, a
// role has permissions, methods on paths with wildcards.
const roleRules = `package app

default x := false

x if {
	some role in data.users[input.attributes.request.http.headers["x-user"]].roles
	some permission in data.roles[role]
	permission.method == input.attributes.request.http.method
	glob.match(permission.path, ["/"], path)
}

path := concat("/", array.concat([""], input.parsed_path))
-- data.json --
%s
`

// roleBundle has a thousand users, each with two of twenty roles, each role with
// five permissions.
func roleBundle(b *testing.B) string {
	b.Helper()
	type permission struct {
		Method string `json:"method"`
		Path   string `json:"path"`
	}
	rolesData, usersData := map[string][]permission{}, map[string]any{}
	for r := range 20 {
		for p := range 5 {
			name := fmt.Sprintf("role-%02d", r)
			rolesData[name] = append(rolesData[name], permission{"GET", fmt.Sprintf("/area-%d/*/item-%d/**", r, p)})
		}
	}
	for u := range 1000 {
		usersData[fmt.Sprintf("user-%04d", u)] = map[string]any{
			"roles": []string{fmt.Sprintf("role-%02d", u%20), fmt.Sprintf("role-%02d", (u+7)%20)},
		}
	}
	data, err := json.Marshal(map[string]any{"users": usersData, "roles": rolesData})
	if err != nil {
		b.Fatal(err)
	}
	return fmt.Sprintf(roleRules, data)
}

// byEvaluator runs a benchmark once for each evaluator.
func byEvaluator(b *testing.B, run func(b *testing.B, change func(*tenants.Settings))) {
	for _, e := range []policy.Evaluator{policy.Topdown, policy.Plan} {
		b.Run(string(e), func(b *testing.B) {
			run(b, func(s *tenants.Settings) { s.Evaluator, s.Limits.EvaluationTime = e, time.Minute })
		})
	}
}

// cpuTime returns the CPU time that the process has taken.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		b.Fatal(err)
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// reportCPU reports the CPU time of an item since begun: a batch is answered by
// several workers at once.
func reportCPU(b *testing.B, items int, begun time.Duration) {
	b.Helper()
	b.ReportMetric(float64((cpuTime(b)-begun).Nanoseconds())/float64(b.N*items), "cpu-ns/item")
}

// BenchmarkBatch asks batches of role-based questions. The items of "common" have
// what all have in common in common_input; of the items of "equal" each has nine
// like it.
func BenchmarkBatch(b *testing.B) {
	bundle := roleBundle(b)
	text := func(i int) string {
		return fmt.Sprintf(`{"attributes":{"request":{"http":{"method":"GET","headers":{"x-user":"user-%04d"}}}},"parsed_path":["area-%d","%d","item-4","notes","1"]}`,
			i, (i+7)%20, i)
	}
	bodies := []struct {
		name string
		n    int
		body string
	}{
		{"100 common", 100, `{"common_input":{"attributes":{"request":{"http":{"method":"GET","headers":{"x-user":"user-0042"}}}}},` +
			inputs(100, func(i int) string { return fmt.Sprintf(`{"parsed_path":["area-9","%d","item-4","notes","1"]}`, i) })[1:]},
		{"100 equal", 100, inputs(100, func(i int) string { return text(i % 10) })},
	}
	for _, n := range []int{1, 10, 100, 1000} {
		bodies = append(bodies, struct {
			name string
			n    int
			body string
		}{fmt.Sprint(n), n, inputs(n, text)})
	}
	byEvaluator(b, func(b *testing.B, change func(*tenants.Settings)) {
		p, _ := pool(b, bundle, offersX, change)
		h := server(b, httpserve.Config{Pool: p, Local: true})
		for _, c := range bodies {
			b.Run(c.name, func(b *testing.B) {
				b.ReportAllocs()
				begun := cpuTime(b)
				for b.Loop() {
					if w := post(h, "/t/orders/v1/batch/data/app/x", c.body); w.Code != 200 {
						b.Fatal(w.Code, w.Body)
					}
				}
				reportCPU(b, c.n, begun)
			})
		}
	})
}

// BenchmarkEvaluations asks AuthZEN for a hundred evaluations.
func BenchmarkEvaluations(b *testing.B) {
	byEvaluator(b, func(b *testing.B, change func(*tenants.Settings)) {
		p, _ := pool(b, "package authzen\n\nallow if input.resource.id == data.owned[input.subject.id][_]\n-- data.json --\n"+
			`{"owned": {"alice": ["1", "7", "12", "50"]}}`, "{authzen: {package: authzen}}", change)
		h := server(b, httpserve.Config{Pool: p, Local: true})
		items := ""
		for i := range 100 {
			items += fmt.Sprintf(`,{"resource":{"type":"doc","id":"%d"}}`, i)
		}
		body := `{"subject":{"type":"user","id":"alice"},"action":{"name":"read"},"evaluations":[` + items[1:] + "]}"
		b.ReportAllocs()
		begun := cpuTime(b)
		for b.Loop() {
			if w := post(h, "/t/orders/access/v1/evaluations", body, "Content-Type", "application/json"); w.Code != 200 {
				b.Fatal(w.Code, w.Body)
			}
		}
		reportCPU(b, 100, begun)
	})
}

// BenchmarkList asks for the permission list of 200 pairs: one that is computed,
// one that is remembered, and one that the client has.
func BenchmarkList(b *testing.B) {
	catalog, grants := map[string][]string{}, map[string]map[string]bool{}
	for i := range 20 {
		kind := fmt.Sprintf("type%d", i)
		grants[kind] = map[string]bool{}
		for j := range 10 {
			action := fmt.Sprintf("action%d", j)
			catalog[kind] = append(catalog[kind], action)
			if j < 5 {
				grants[kind][action] = true
			}
		}
	}
	data, err := json.Marshal(map[string]any{"catalog": catalog, "grants": map[string]any{"user0": grants}})
	if err != nil {
		b.Fatal(err)
	}
	byEvaluator(b, func(b *testing.B, change func(*tenants.Settings)) {
		s := listServer(b, fmt.Sprintf(roles, "1", data), usersConfig("{package: permissions, memory_bytes: 1000000000}", "user0"),
			httpserve.Config{ListMemory: 1 << 30}, change)
		tag := s.get(tokenOf("user0")).Header().Get("ETag")
		b.Run("cold", func(b *testing.B) {
			b.ReportAllocs()
			begun := cpuTime(b)
			for b.Loop() {
				s.Forget()
				if w := s.get(tokenOf("user0")); w.Code != 200 {
					b.Fatal(w.Body)
				}
			}
			reportCPU(b, 200, begun)
		})
		b.Run("remembered", func(b *testing.B) {
			b.ReportAllocs()
			begun := cpuTime(b)
			for b.Loop() {
				if w := s.get(tokenOf("user0")); w.Code != 200 {
					b.Fatal(w.Body)
				}
			}
			reportCPU(b, 1, begun)
		})
		b.Run("304", func(b *testing.B) {
			b.ReportAllocs()
			begun := cpuTime(b)
			for b.Loop() {
				if w := s.get(tokenOf("user0"), "If-None-Match", tag); w.Code != 304 {
					b.Fatal(w.Code)
				}
			}
			reportCPU(b, 1, begun)
		})
	})
}

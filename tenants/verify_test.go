package tenants_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Each third decision is made again by both evaluators, and it is told what
// evaluates.
func TestVerifiedDecisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStage(t, tenants.Config{Registerer: reg}, func(id tenants.ID, settings *tenants.Settings) {
			settings.Evaluator, settings.Verify = policy.Plan, 3
			if id == "payments" {
				settings.Evaluator = policy.Topdown
			}
		})
		s.Set("odd", "package envoy.authz\n\nallow if odd[1][2]\n\nodd[1][2] := true")
		for range 7 {
			s.allows("orders")
			s.denies("payments")
			s.allows("odd")
			synctest.Wait()
		}
		const want = `
			# HELP gatehouse_verified_decisions_total Decisions that were made again by both evaluators, by outcome: equal; different, after which topdown evaluates that policy; dropped, since too many waited.
			# TYPE gatehouse_verified_decisions_total counter
			gatehouse_verified_decisions_total{outcome="different"} 0
			gatehouse_verified_decisions_total{outcome="dropped"} 0
			gatehouse_verified_decisions_total{outcome="equal"} 2
			# HELP gatehouse_entry_points Entry points of warm and parked tenants, by what evaluates them: plan, topdown, or fallback, which is topdown where it was to be plan.
			# TYPE gatehouse_entry_points gauge
			gatehouse_entry_points{evaluator="fallback"} 1
			gatehouse_entry_points{evaluator="plan"} 1
			gatehouse_entry_points{evaluator="topdown"} 1
		`
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "gatehouse_verified_decisions_total", "gatehouse_entry_points"); err != nil {
			t.Error(err)
		}
		for id, want := range map[tenants.ID]policy.Evaluator{"orders": policy.Plan, "payments": policy.Topdown, "odd": policy.Topdown} {
			status, _ := s.Tenant(id)
			if e := status.Evaluators; len(e) != 1 || e[0].Evaluator != want || e[0].Entry != "envoy/authz/allow" || (e[0].Reason != "") != (id == "odd") {
				t.Errorf("%s: got %+v, want %s", id, e, want)
			}
		}
	})
}

// Both answers are told, masked as they are in the tenant's decision log.
func TestDifferenceTold(t *testing.T) {
	var out bytes.Buffer
	handler := slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelError}) // nobody else logs errors
	cfg := tenants.Config{Logger: slog.New(handler)}
	s, _ := remembering(t, cfg, 10, nil)
	s.Set("masked", `package envoy.authz
allow := true
-- log.rego --
package system.log
drop if input.input.health
mask contains "/result/headers/x-token"
`)
	value := func(text string) ast.Value { return ast.MustParseTerm(text).Value }
	large := ast.String(strings.Repeat("é", 5000))
	for _, c := range []struct {
		id            tenants.ID
		d             policy.Difference
		plan, topdown string
	}{
		{"orders", policy.Difference{Plan: value(`{"allowed": true, "headers": {"authorization": "SECRET"}}`), Topdown: value(`false`)},
			`{"allowed":true,"headers":{"authorization":"` + decisionlog.Redacted + `"}}`, `false`},
		{"orders", policy.Difference{Topdown: value(`true`)}, "undefined", "true"},
		{"orders", policy.Difference{Plan: value(`true`), Err: errors.New("SECRET")}, "true", "an error"},
		{"orders", policy.Difference{Plan: large, Topdown: value(`true`)}, `"` + strings.Repeat("é", 2047) + "…", "true"},
		{"masked", policy.Difference{Plan: value(`{"headers": {"x-token": "SECRET"}}`), Topdown: value(`{"headers": {}}`)}, `{"headers":{}}`, `{"headers":{}}`},
		{"masked", policy.Difference{Input: value(`{"health": "SECRET"}`), Plan: value(`"SECRET"`), Topdown: value(`true`)},
			"decision is withheld: the tenant's drop rule keeps it out of logs", "decision is withheld: the tenant's drop rule keeps it out of logs"},
	} {
		s.allows(c.id)
		c.d.Entry = "envoy/authz/allow"
		out.Reset()
		s.Pool.TellDifference(c.id, "d1", &c.d)
		var line struct {
			Level      string
			Tenant     string
			DecisionID string `json:"decision_id"`
			Plan       string
			Topdown    string
			Difference string
		}
		if err := json.Unmarshal(out.Bytes(), &line); err != nil {
			t.Fatal(err)
		}
		if line.Level != "ERROR" || line.Tenant != string(c.id) || line.DecisionID != "d1" || line.Difference != c.d.String() {
			t.Errorf("got %+v", line)
		}
		if strings.Contains(out.String(), "SECRET") {
			t.Errorf("a secret is in the log: %s", out.String())
		}
		if line.Plan != c.plan || line.Topdown != c.topdown {
			t.Errorf("got %q and %q, want %q and %q", line.Plan, line.Topdown, c.plan, c.topdown)
		}
	}
}

func TestParseShare(t *testing.T) {
	for text, want := range map[string]int{"": 0, "1/1": 1, "1/1000": 1000} {
		if n, ok := tenants.ParseShare(text); !ok || n != want {
			t.Errorf("%q: got %d, %t, want %d", text, n, ok, want)
		}
	}
	for _, text := range []string{"1", "2/3", "1/0", "1/-1", "1/x", "1/ 2", "0.1"} {
		if n, ok := tenants.ParseShare(text); ok {
			t.Errorf("%q: got %d, want none", text, n)
		}
	}
}

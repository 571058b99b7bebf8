package tenants_test

import (
	"context"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// A twin is recorded as a decision of its own, with the answer to the question
// that was asked, which is told once.
func TestTwins(t *testing.T) {
	logs, console := authztest.Logs(t)
	source := new(authztest.Memory)
	source.Set("orders", "package envoy.authz\n\nallow := input.n == 1\n-- .manifest --\n{\"revision\": \"7\"}")
	pool := authztest.Pool(t, tenants.Config{Logs: logs, Parallel: 1, Settings: authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) {
		s.Log = authztest.Logged()
	})})
	questions := []tenants.Question{
		{DecisionID: "a", BatchDecisionID: "batch", Batch: &decisionlog.Batch{Key: "a", Size: 4}, Timed: true, Input: authztest.Input(`{"n": 1}`), Twins: []tenants.Twin{
			{DecisionID: "b", Batch: &decisionlog.Batch{Key: "b", Index: 1, Size: 4}},
			{DecisionID: "c", Batch: &decisionlog.Batch{Key: "c", Index: 2, Size: 4}},
		}},
		{DecisionID: "d", BatchDecisionID: "batch", Batch: &decisionlog.Batch{Key: "d", Index: 3, Size: 4}, Input: authztest.Input(`{"n": 2}`)},
	}
	told := map[int]bool{}
	err := pool.Decide(t.Context(), "orders", questions, func(i int, a tenants.Answer) {
		if _, twice := told[i]; twice || a.Err != nil || len(a.Bundles) != 1 || a.Bundles[0].Revision != "7" || i == 0 && a.Evaluation <= 0 {
			t.Errorf("question %d: got %+v, told before: %t", i, a, twice)
		}
		told[i] = a.Decision.Allowed
	})
	if err != nil || len(told) != 2 || !told[0] || told[1] {
		t.Errorf("got %v, %v", told, err)
	}
	results := map[string]any{}
	for _, e := range console.Events(4) {
		place := e["custom"].(map[string]any)["batch"].(map[string]any)
		if e["decision_id"] != place["key"] || e["batch_decision_id"] != "batch" {
			t.Errorf("got event %v", e)
		}
		results[e["decision_id"].(string)] = e["result"]
	}
	for id, want := range map[string]any{"a": true, "b": true, "c": true, "d": false} {
		if results[id] != want {
			t.Errorf("decision %q: got %v in the log, want %t", id, results[id], want)
		}
	}
}

// Once the caller is gone, nothing more is begun.
func TestCallerGone(t *testing.T) {
	source := new(authztest.Memory)
	source.Set("orders", "package envoy.authz\n\nallow := true")
	pool := authztest.Pool(t, tenants.Config{Settings: authztest.Settings(source, nil)})
	authztest.Ask(t.Context(), pool, "orders", "{}")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	start := time.Now()
	answered := 0
	err := pool.Decide(ctx, "orders", make([]tenants.Question, 10_000), func(_ int, a tenants.Answer) {
		answered++
		if a.Err == nil {
			t.Error("got an answer to a question without an input")
		}
	})
	if err != nil || answered != 10_000 || time.Since(start) > 5*time.Second {
		t.Errorf("got %d answers, %v, after %s", answered, err, time.Since(start))
	}
}

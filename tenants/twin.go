package tenants

import (
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// Twin is a question whose answer is that of another, its twin. It differs from
// it in what names it.
type Twin struct {
	DecisionID string
	Batch      *decisionlog.Batch
}

// recordAll keeps one answer in the tenant's decision log: for the question, and
// for each of its twins. Its error, which wraps ErrNotLogged, says that the answer
// must not be given to any of them.
func (c *call) recordAll(q *Question, a *Answer, r *result, took time.Duration) error {
	if err := c.record(q, a, r, took); err != nil {
		return err
	}
	for _, t := range q.Twins {
		twin := *q
		twin.DecisionID, twin.Batch = t.DecisionID, t.Batch
		if err := c.recordTraced(&twin, a, r, took); err != nil {
			return err
		}
	}
	return nil
}

// apart returns the questions with each twin as one of its own, where the entry
// point can answer one question in two ways. Then answers say for whom they are.
func (c *call) apart(questions []Question) []Question {
	n := 0
	for i := range questions {
		if q := &questions[i]; len(q.Twins) > 0 && c.varies(q) {
			n += len(q.Twins)
		}
	}
	if n == 0 {
		return questions
	}
	type place struct{ question, of int }
	all := make([]Question, 0, len(questions)+n)
	places := make([]place, 0, len(questions)+n)
	for i, q := range questions {
		if len(q.Twins) == 0 || !c.varies(&q) {
			all, places = append(all, q), append(places, place{i, 0})
			continue
		}
		twins := q.Twins
		q.Twins = nil
		all, places = append(all, q), append(places, place{i, 1})
		for k, t := range twins {
			q.DecisionID, q.Batch = t.DecisionID, t.Batch
			all, places = append(all, q), append(places, place{i, k + 2})
		}
	}
	tell := c.tell
	c.tell = func(n int, a Answer) {
		a.Of = places[n].of
		tell(places[n].question, a)
	}
	return all
}

// varies reports whether the entry point of a question, or the operator's policy,
// can answer one question in two ways.
func (c *call) varies(q *Question) bool {
	entry, err := c.in.entryOf(q)
	if err != nil {
		return false
	}
	guard := c.pool.guard
	return c.rev.policy.Varies(entry) || guard != nil && guard.current.Load().policy.Varies(guard.settings.Entry)
}

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

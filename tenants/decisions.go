package tenants

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// ErrNotRemembered: no decision of this ID is remembered, or none at all are.
var ErrNotRemembered = errors.New("decision is not remembered")

// remember keeps an answer among the tenant's last decisions.
func (c *call) remember(q *Question, a *Answer, r *result, e *decisionlog.Event) {
	entry, err := c.in.entryOf(q)
	if err != nil {
		entry = q.Entry
	}
	m := decisionlog.Memory{
		Event: *e, Tenant: string(c.in.id), Labels: c.pool.labels(c.in),
		Asked: decisionlog.Asked{Entry: entry, Value: q.Value, At: r.observed.At, State: c.state, Guard: a.Guard || errors.Is(a.Err, ErrGuard)},
	}
	if c.rev != nil {
		m.Rules = c.rev.rules
	}
	c.pool.cfg.Logs.Remember(&m)
}

// Outcomes are what a question can come to, as gatehouse_checks_total has them.
func Outcomes() []string { return slices.Clone(outcomeNames[:]) }

// DecisionsQuery says which of a tenant's last decisions are wanted.
type DecisionsQuery struct {
	ID       string   // that of the decision; "": any
	Outcomes []string // some of Outcomes; none: any
	Limit    int      // at most so many, the newest; 0: all
}

// Decisions are some of the last decisions of a tenant, as they would have left in
// its decision log.
type Decisions struct {
	Tenant ID `json:"tenant"`

	// Remembered is how many there are, whatever was wanted.
	Remembered int `json:"remembered"`

	// Withheld is how many were wanted and are not here: the tenant's drop rule
	// keeps them out of logs, or its rules failed. Why is the reason for the last
	// of these.
	Withheld int    `json:"withheld"`
	Why      string `json:"why,omitempty"`

	Decisions []RecentDecision `json:"decisions"` // the newest first
}

// RecentDecision is one decision.
type RecentDecision struct {
	Outcome string          `json:"outcome"` // one of Outcomes
	Time    time.Time       `json:"time"`
	Event   json.RawMessage `json:"event"` // OPA's decision log event

	// Bare says that the decision was too large to be remembered with its input
	// and its result.
	Bare bool `json:"too_large,omitempty"`
}

// Decisions returns what is remembered of the decisions of a tenant. It loads no
// tenant. The error wraps ErrUnknown where the tenant is not known and nothing is
// remembered of it, or ErrNotRemembered where none are remembered of any; else it
// is that of ctx.
func (p *Pool) Decisions(ctx context.Context, id ID, q DecisionsQuery) (*Decisions, error) {
	logs := p.cfg.Logs
	if logs == nil || !logs.Remembers() {
		return nil, fmt.Errorf("%w: no decisions are, by the settings", ErrNotRemembered)
	}
	found, of := logs.Recall(string(id), func(m *decisionlog.Memory) bool {
		return (q.ID == "" || m.DecisionID == q.ID) && (len(q.Outcomes) == 0 || slices.Contains(q.Outcomes, m.Outcome))
	})
	in := p.known(id)
	if of == 0 && in == nil {
		return nil, fmt.Errorf("%w: %q is not known here; a check loads it", ErrUnknown, id)
	}
	d := &Decisions{Tenant: id, Remembered: of, Decisions: []RecentDecision{}}
	filter, limit := filterNow(in)
	err := logs.Show(ctx, found, filter, limit, func(s decisionlog.Shown, err error) bool {
		if err != nil {
			d.Withheld++
			d.Why = err.Error()
			return true
		}
		d.Decisions = append(d.Decisions, RecentDecision{Outcome: s.Outcome, Time: s.Timestamp, Event: s.JSON, Bare: s.Bare})
		return q.Limit <= 0 || len(d.Decisions) < q.Limit
	})
	return d, err
}

// known returns the instance of a tenant; nil: it is not known.
func (p *Pool) known(id ID) *instance {
	p.mu.Lock()
	defer p.mu.Unlock()
	if in, ok := p.warm.Peek(id); ok {
		return in
	}
	if in, ok := p.parked.Peek(id); ok {
		return in
	}
	if in, ok := p.refused.Peek(id); ok && !errors.Is(in.refusal, ErrUnknown) {
		return in
	}
	return nil
}

// filterNow returns the drop and mask rules that are in force for an instance,
// which may be nil, and how long one evaluation of them may take.
func filterNow(in *instance) (decisionlog.Filter, time.Duration) {
	if in == nil {
		return nil, maxFilterTime
	}
	rev := in.current.Load()
	if rev == nil {
		return nil, in.filterTime()
	}
	return rev.filter, in.filterTime()
}

package tenants

import (
	"cmp"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// Status tells of one tenant.
type Status struct {
	Tenant ID    `json:"tenant"`
	State  State `json:"state"`

	// Revision is the revision of the tenant's bundle; where it has several,
	// Bundles has them all and Revision is that of the first by name.
	Revision string         `json:"revision"`
	Bundles  []BundleStatus `json:"bundles,omitempty"`

	// Error is why the newest content does not decide, or why the source
	// cannot be asked; empty when all is well.
	Error string `json:"error"`

	// StaleSince is since when the source of a bundle gives nothing.
	StaleSince *time.Time `json:"stale_since"`

	// Activated is when the current policy began to decide.
	Activated *time.Time `json:"activated,omitempty"`

	// Until is when a parked or refused tenant is forgotten or tried again.
	Until *time.Time `json:"until,omitempty"`

	// Evaluators says how the entry points are evaluated.
	Evaluators []EvaluatorStatus `json:"evaluators,omitempty"`

	// MemoryBytes estimates what the tenant's policy and data take, OwnBytes
	// how much of that it shares with no other tenant.
	MemoryBytes int64 `json:"memory_bytes,omitempty"`
	OwnBytes    int64 `json:"own_bytes,omitempty"`

	// QuarantinedUntil is when the tenant, whose evaluations keep running past
	// their deadline, is tried again.
	QuarantinedUntil *time.Time `json:"quarantined_until,omitempty"`

	// Log is how the decision log does; nil: there is none.
	Log *LogStatus `json:"decision_log,omitempty"`

	// Checks counts what was decided, by outcome, since the tenant was loaded.
	Checks map[string]uint64 `json:"checks,omitempty"`
}

// EvaluatorStatus tells how one entry point is evaluated.
type EvaluatorStatus struct {
	Entry     string           `json:"entry"`
	Evaluator policy.Evaluator `json:"evaluator"`        // topdown or plan
	Reason    string           `json:"reason,omitempty"` // why it is topdown where it was to be plan
}

// LogStatus tells of a decision log: its books, which balance, and the last error
// of a sink that takes nothing.
type LogStatus struct {
	Recorded      uint64            `json:"recorded"`
	Delivered     uint64            `json:"delivered"`
	Dropped       map[string]uint64 `json:"dropped,omitempty"` // :: reason → events
	Buffered      uint64            `json:"buffered"`
	BufferedBytes int64             `json:"buffered_bytes"`
	Error         string            `json:"error,omitempty"`
}

// BundleStatus tells of one bundle of a tenant.
type BundleStatus struct {
	Name       string     `json:"name"`
	Revision   string     `json:"revision"`
	Checked    *time.Time `json:"checked,omitempty"` // when the source last confirmed it
	Error      string     `json:"error,omitempty"`
	StaleSince *time.Time `json:"stale_since,omitempty"`
}

// Tenants returns the status of all tenants that the pool knows, by name.
func (p *Pool) Tenants() []Status {
	p.mu.Lock()
	var all []*instance
	for _, in := range p.loading {
		all = append(all, in)
	}
	all = append(all, p.warm.Values()...)
	all = append(all, p.parked.Values()...)
	all = append(all, p.refused.Values()...)
	p.mu.Unlock()

	list := make([]Status, len(all))
	for i, in := range all {
		list[i] = p.statusOf(in)
	}
	slices.SortFunc(list, func(a, b Status) int { return cmp.Compare(a.Tenant, b.Tenant) })
	return list
}

// Tenant returns the status of one tenant, and false where the pool knows none
// of that name. It does not load it.
func (p *Pool) Tenant(id ID) (Status, bool) {
	p.mu.Lock()
	in := p.loading[id]
	for _, list := range []interface{ Peek(ID) (*instance, bool) }{p.warm, p.parked, p.refused} {
		if found, ok := list.Peek(id); in == nil && ok {
			in = found
		}
	}
	p.mu.Unlock()
	if in == nil {
		return Status{}, false
	}
	return p.statusOf(in), true
}

// Unready returns the required tenants that have not been loaded yet, with the
// reason, and the operator's policy under "guard".
func (p *Pool) Unready() map[ID]string {
	p.mu.Lock()
	unready := make(map[ID]string, len(p.unready))
	for id := range p.unready {
		unready[id] = "not loaded"
	}
	p.mu.Unlock()
	if p.guard != nil && p.guard.current.Load() == nil {
		unready["guard"] = "the operator's policy is not loaded"
		p.guard.mu.Lock()
		if err := p.guard.status.err; err != nil {
			unready["guard"] += ": " + err.Error()
		}
		p.guard.mu.Unlock()
	}
	for id := range unready {
		if s, ok := p.Tenant(id); ok && s.State != Warm {
			unready[id] = string(s.State)
			if s.Error != "" {
				unready[id] += ": " + s.Error
			}
		}
	}
	return unready
}

func (p *Pool) statusOf(in *instance) Status {
	p.mu.Lock()
	s := Status{Tenant: in.id, State: in.state}
	feeds := in.feeds
	if in.state == Parked || in.state == Refused {
		until := in.until
		s.Until = &until
	}
	s.MemoryBytes, s.OwnBytes = p.memory.size(in.current.Load())
	p.mu.Unlock()

	in.mu.Lock()
	st := in.status
	in.mu.Unlock()
	switch {
	case st.err != nil:
		s.Error = st.err.Error()
	case st.discovery != nil:
		s.Error = st.discovery.Error()
	}
	if !st.activated.IsZero() {
		s.Activated = &st.activated
	}
	if rev := in.current.Load(); rev != nil {
		for i, r := range rev.policy.Revisions() {
			b := BundleStatus{Name: r.Name, Revision: r.Revision}
			if i < len(feeds) {
				b.fill(feeds[i])
			}
			if b.StaleSince != nil && (s.StaleSince == nil || b.StaleSince.Before(*s.StaleSince)) {
				s.StaleSince = b.StaleSince
			}
			if s.Error == "" {
				s.Error = b.Error
			}
			s.Bundles = append(s.Bundles, b)
		}
		s.Revision = s.Bundles[0].Revision
		for _, e := range rev.policy.Evaluated(in.observes()) {
			es := EvaluatorStatus{Entry: e.Entry, Evaluator: e.By}
			if e.Why != nil {
				es.Reason = e.Why.Error()
			}
			s.Evaluators = append(s.Evaluators, es)
		}
	}
	if until := p.sched.quarantine(&in.slots); !until.IsZero() {
		s.QuarantinedUntil = &until
	}
	if l, ok := in.logStatus(); ok {
		s.Log = &LogStatus{l.Recorded, l.Delivered, l.Dropped, l.Buffered, l.BufferedBytes, l.Message}
	}
	s.Checks = in.counts.byOutcome()
	return s
}

func (b *BundleStatus) fill(f *feed) {
	stale, checked, err := f.state()
	if err != nil {
		b.Error = err.Error()
	}
	if !stale.IsZero() {
		b.StaleSince = &stale
	}
	if !checked.IsZero() {
		b.Checked = &checked
	}
}

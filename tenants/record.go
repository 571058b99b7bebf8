package tenants

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/version"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// record keeps one answer in the tenant's decision log, and among its last
// decisions. Its error, which wraps ErrNotLogged, says that the answer must not be
// given.
func (c *call) record(q *Question, a *Answer, r *result, took time.Duration) error {
	log, remembers := c.pool.logOf(c.in), c.in.remembers.Load()
	if log == nil && !remembers {
		return nil
	}
	e := decisionlog.Event{
		DecisionID: q.DecisionID, BatchDecisionID: q.BatchDecisionID, Batch: q.Batch,
		TraceID: q.TraceID, SpanID: q.SpanID, RequestedBy: q.RequestedBy, RequestID: q.RequestID,
		Timestamp:     time.Now(),
		Path:          q.Entry,
		Error:         a.Err,
		ServerHandler: took,
		QueryEval:     r.observed.Duration,
		RuleLabels:    labelsOfRules(r.observed.RuleLabels),
	}
	if s := c.in.settings; e.Path == "" || e.Path == s.Entry && !q.Own {
		e.Path = cmp.Or(s.Path, s.Entry)
	}
	if c.rev != nil {
		e.Bundles, e.Filter = c.rev.bundles, c.rev.filter
	}
	if a.Err == nil {
		e.Result = a.Decision.Value
		if c.in.settings.NDBuiltinCache {
			e.NDBuiltinCache = r.observed.Builtins
		}
	}
	e.Custom = c.customOf(a)
	e.Outcome = outcomeNames[outcomeOf(a)]
	err := keepInput(&e, q, r)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNotLogged, err)
	}
	if log != nil {
		if err = log.Record(c.deadline(c.start), e.Copy()); err != nil {
			err = fmt.Errorf("%w: %w", ErrNotLogged, err)
		}
	}
	if remembers {
		if err != nil {
			e.Error, e.Result, e.Outcome = err, nil, outcomeNames[outcomeNotLogged]
		}
		c.remember(q, a, r, &e)
	}
	return err
}

// The keys of what a decision log has beside what OPA's has.
var (
	keyGuard    = ast.StringTerm("guard")
	keyRevision = ast.StringTerm("revision")
	keyAnswered = ast.StringTerm("answered")
	keyDryRun   = ast.StringTerm("dry_run")
)

// customOf says what of an answer was not the tenant's policy: the operator's
// own policy, and whether a denial was let through. Nil: nothing.
func (c *call) customOf(a *Answer) ast.Object {
	guard := c.pool.guard
	if guard == nil && !a.DryRun {
		return nil
	}
	custom := ast.NewObject()
	if a.DryRun {
		custom.Insert(keyDryRun, ast.BooleanTerm(true))
	}
	if guard != nil {
		if rev := guard.current.Load(); rev != nil {
			custom.Insert(keyGuard, ast.ObjectTerm(
				ast.Item(keyRevision, ast.StringTerm(rev.policy.Revisions()[0].Revision)),
				ast.Item(keyAnswered, ast.BooleanTerm(a.Guard)),
			))
		}
	}
	return custom
}

// labelsOfRules are the labels of the rules that were evaluated, as values.
func labelsOfRules(labels []map[string]any) []ast.Value {
	var values []ast.Value
	for _, l := range labels {
		if v, err := ast.InterfaceToValue(l); err == nil { // it came from YAML
			values = append(values, v)
		}
	}
	return values
}

// loggedBundles are the bundles of a policy, as they are logged.
func loggedBundles(p *policy.Policy) []decisionlog.Bundle {
	var list []decisionlog.Bundle
	for _, r := range p.Revisions() {
		list = append(list, decisionlog.Bundle{Name: r.Name, Revision: r.Revision})
	}
	return list
}

// filter asks the drop and mask rules of a revision about an event.
type filter struct {
	policy     *policy.Policy
	env        *policy.Env
	drop, mask string // entry points; "": there is no such rule
}

// filters are the entry points of the drop and mask rules. Also a tenant without
// a decision log has them, for those who look at its last decisions.
func (s *Settings) filters() (drop, mask string) {
	if s.Log == nil {
		return control.DefaultDrop, control.DefaultMask
	}
	return s.Log.Drop, s.Log.Mask
}

// filterOf returns the filter of a revision; nil: it has neither rule.
func (in *instance) filterOf(p *policy.Policy) decisionlog.Filter {
	f := &filter{policy: p}
	drop, mask := in.settings.filters()
	if p.Has(drop) {
		f.drop = drop
	}
	if p.Has(mask) {
		f.mask = mask
	}
	if f.drop == "" && f.mask == "" {
		return nil
	}
	f.env = in.env()
	return f
}

// Drop reports whether the drop rule is true. Undefined is false.
func (f *filter) Drop(ctx context.Context, event ast.Value) (bool, error) {
	v, err := f.eval(ctx, f.drop, event)
	if v == nil || err != nil {
		return false, err
	}
	b, ok := v.(ast.Boolean)
	return ok && bool(b), nil
}

// Mask returns the value of the mask rule; nil: it has none.
func (f *filter) Mask(ctx context.Context, event ast.Value) (ast.Value, error) {
	return f.eval(ctx, f.mask, event)
}

// eval returns the value of a rule; nil: it has none.
func (f *filter) eval(ctx context.Context, entry string, event ast.Value) (ast.Value, error) {
	if entry == "" {
		return nil, nil
	}
	cancel := new(policy.Cancel)
	defer context.AfterFunc(ctx, cancel.Cancel)()
	v, err := f.policy.Eval(ctx, entry, event, f.env, cancel)
	if errors.Is(err, policy.ErrUndefined) {
		return nil, nil
	}
	return v, err
}

// maxFilterTime bounds one evaluation of a drop or mask rule.
const maxFilterTime = 100 * time.Millisecond

// filterTime bounds one of this tenant's.
func (in *instance) filterTime() time.Duration { return min(in.limits.EvaluationTime, maxFilterTime) }

// recordOf has the decisions of in, which is loading, kept as its settings say.
func (p *Pool) recordOf(in *instance) {
	in.remembers.Store(p.cfg.Logs != nil && p.cfg.Logs.Remembers())
	in.logs.Store(p.cfg.Logs != nil && in.settings.Log != nil)
}

// logOf returns the decision log of in; nil: it has none. It is opened for the
// first decision: most tenants are not asked for long, and a log takes a third of
// the memory of such a tenant.
func (p *Pool) logOf(in *instance) *decisionlog.Log {
	if !in.logs.Load() {
		return nil
	}
	if log := in.log.Load(); log != nil {
		return log
	}
	in.opening.Lock()
	defer in.opening.Unlock()
	if log := in.log.Load(); log != nil {
		return log
	}
	settings := in.settings.Log.Settings
	settings.Tenant = string(in.id)
	settings.Labels = p.labels(in)
	settings.FilterTime = in.filterTime()
	settings.Turned = in.reportSoon
	log := p.cfg.Logs.Open(settings)
	if in.retired {
		log.Retire() // a question that outlived its tenant
	}
	in.log.Store(log)
	return log
}

// retireLog retires the decision log of in, also one that is opened later.
func (in *instance) retireLog() {
	in.opening.Lock()
	defer in.opening.Unlock()
	in.retired = true
	if log := in.log.Load(); log != nil {
		log.Retire()
	}
}

// logStatus is how the decision log of in does. It is false where there is none.
func (in *instance) logStatus() (s decisionlog.Status, ok bool) {
	if log := in.log.Load(); log != nil {
		s = log.Status()
	}
	return s, in.logs.Load()
}

// labels are those of the decisions of in, which are made for the first.
func (p *Pool) labels(in *instance) map[string]string {
	labels := in.labels.Load()
	if labels == nil {
		own := p.labelsOf(in.id, in.settings)
		labels = &own
		in.labels.Store(labels)
	}
	return *labels
}

// labelsOf are the labels under which a tenant reports: its own, those that each
// OPA has, and its name.
func (p *Pool) labelsOf(id ID, s *Settings) map[string]string {
	labels := make(map[string]string, len(s.Labels)+3)
	maps.Copy(labels, s.Labels)
	labels["id"], labels["version"], labels["tenant"] = p.id, version.Version, string(id)
	return labels
}

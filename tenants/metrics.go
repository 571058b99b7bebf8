package tenants

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// outcome is what a question came to, as it is counted.
type outcome int

// The outcomes of a check.
const (
	outcomeAllowed     outcome = iota // the policy allowed
	outcomeDenied                     // the policy denied
	outcomeUndefined                  // the policy has no value
	outcomeResult                     // the policy's value is not a decision, or it has several
	outcomeError                      // evaluation failed, or panicked
	outcomeDeadline                   // no answer in time
	outcomeBusy                       // a bound on waiting work was met
	outcomeNotReady                   // the tenant has no policy yet
	outcomeInvalid                    // the request cannot be understood
	outcomeTooLarge                   // the request is over a bound
	outcomePartialBody                // a body that the policy reads is not whole
	outcomeNoEntry                    // the entry point is not listed
	outcomeNoTenant                   // no tenant is named, or an invalid one
	outcomeUnknown                    // there is no such tenant
	outcomeNotLogged                  // the answer was not given since it cannot be recorded
	outcomes           int     = iota
)

var outcomeNames = [outcomes]string{
	"allowed", "denied", "undefined", "bad_result", "error", "deadline", "busy",
	"not_ready", "invalid", "too_large", "partial_body", "no_entry", "no_tenant", "unknown_tenant", "not_logged",
}

// faultOutcomes is from error to outcome; what is not here is outcomeError.
var faultOutcomes = []struct {
	err     error
	outcome outcome
}{
	{ErrNotLogged, outcomeNotLogged},
	{policy.ErrUndefined, outcomeUndefined},
	{policy.ErrConflict, outcomeResult},
	{policy.ErrResult, outcomeResult},
	{policy.ErrCanceled, outcomeDeadline},
	{ErrDeadline, outcomeDeadline},
	{ErrBusy, outcomeBusy},
	{ErrNotReady, outcomeNotReady},
	{ErrInvalid, outcomeInvalid},
	{ErrTooLarge, outcomeTooLarge},
	{ErrPartialBody, outcomePartialBody},
	{ErrEntry, outcomeNoEntry},
	{ErrUnknown, outcomeUnknown},
}

func outcomeOf(a *Answer) outcome {
	switch {
	case a.Err == nil && a.Decision.Allowed:
		return outcomeAllowed
	case a.Err == nil:
		return outcomeDenied
	}
	for _, f := range faultOutcomes {
		if errors.Is(a.Err, f.err) {
			return f.outcome
		}
	}
	return outcomeError
}

// counts are the checks of one tenant by outcome.
type counts [outcomes]atomic.Uint64

func (c *counts) byOutcome() map[string]uint64 {
	var m map[string]uint64
	for o := range c {
		if n := c[o].Load(); n > 0 {
			if m == nil {
				m = map[string]uint64{}
			}
			m[outcomeNames[o]] = n
		}
	}
	return m
}

// unnamed is the tenant label of checks that have no known tenant: what a
// client makes up never becomes a label.
const unnamed = "_unknown"

// gone is the tenant label of the checks of tenants that are no longer known,
// beyond those that are remembered by name.
const gone = "_other"

// metrics are the pool's instruments. Those with a tenant label are read from
// the instances when asked for, so that a tenant costs no series of its own
// while nobody looks, and none once it is forgotten.
type metrics struct {
	pool     *Pool
	seconds  prometheus.Histogram
	failures *prometheus.CounterVec
	reports  *prometheus.CounterVec
	evicted  prometheus.Counter // tenants forgotten for the memory budget
	unknown  atomic.Uint64      // checks of unknown tenants
	refused  [outcomes]atomic.Uint64

	mu   sync.Mutex
	past map[ID]*[outcomes]uint64 // :: tenant → checks of its former lives; guarded by mu
	rest [outcomes]uint64         // those that past has no room for; guarded by mu

	checksDesc, tenantsDesc, ageDesc, waitingDesc, stuckDesc, policiesDesc, memoryDesc, quarantinedDesc *prometheus.Desc
}

func newMetrics(p *Pool, reg prometheus.Registerer) *metrics {
	m := &metrics{
		pool: p,
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "gatehouse_decision_seconds",
			Help:    "Time from a question to its answer, waiting included, in seconds.",
			Buckets: []float64{.00001, .000025, .00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
		}),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gatehouse_bundle_failures_total",
			Help: "Bundles that were not taken, by reason: not_found, refused (cannot be read), compile, fetch (the source cannot be asked), discovery (the configuration); and trouble with the store on disk: save, saved (cannot be used).",
		}, []string{"reason"}),
		reports: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gatehouse_status_reports_total",
			Help: "Reports of tenants' status to their services, by outcome: sent or failed.",
		}, []string{"outcome"}),
		evicted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "gatehouse_memory_evictions_total",
			Help: "Tenants forgotten to stay within the memory budget.",
		}),
		past: map[ID]*[outcomes]uint64{},
		memoryDesc: prometheus.NewDesc("gatehouse_memory_bytes",
			"Estimate of what policies and data of warm and parked tenants take, in bytes; what is shared counts once.", nil, nil),
		quarantinedDesc: prometheus.NewDesc("gatehouse_quarantined_tenants",
			"Warm tenants that are not evaluated for a while because they keep running past their deadline.", nil, nil),
		checksDesc: prometheus.NewDesc("gatehouse_checks_total",
			"Questions answered, by tenant and outcome. The tenant _unknown stands for all names that no tenant has, _other for tenants forgotten long ago.",
			[]string{"tenant", "outcome"}, nil),
		tenantsDesc: prometheus.NewDesc("gatehouse_tenants",
			"Tenants that are known, by state.", []string{"state"}, nil),
		ageDesc: prometheus.NewDesc("gatehouse_bundle_age_seconds",
			"Time since the source last confirmed a bundle of the tenant, in seconds; of the oldest where it has several.",
			[]string{"tenant"}, nil),
		waitingDesc: prometheus.NewDesc("gatehouse_waiting_questions",
			"Questions that wait for a slot of their tenant.", nil, nil),
		stuckDesc: prometheus.NewDesc("gatehouse_stuck_evaluations",
			"Evaluations that still run although their caller has been answered.", nil, nil),
		policiesDesc: prometheus.NewDesc("gatehouse_policies",
			"Compiled policies in memory; tenants with the same content share one.", nil, nil),
	}
	for _, reason := range []string{"not_found", "refused", "compile", "fetch", "discovery", "save", "saved"} {
		m.failures.WithLabelValues(reason)
	}
	if reg != nil {
		reg.MustRegister(m.seconds, m.failures, m.reports, m.evicted, m)
	}
	return m
}

// decided counts one answer.
func (m *metrics) decided(in *instance, a *Answer, took time.Duration) {
	in.counts[outcomeOf(a)].Add(1)
	m.seconds.Observe(took.Seconds())
}

// failed counts one bundle that was not taken.
func (m *metrics) failed(reason string) { m.failures.WithLabelValues(reason).Inc() }

// forget keeps the counts of an instance that is forgotten. Pool.mu may be held.
func (m *metrics) forget(in *instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	into := m.past[in.id]
	if into == nil {
		if in.counts.byOutcome() == nil {
			return
		}
		into = &m.rest
		if len(m.past) < m.pool.cfg.Capacity {
			into = new([outcomes]uint64)
			m.past[in.id] = into
		}
	}
	for o := range into {
		into[o] += in.counts[o].Load()
	}
}

// Refused counts a check that was refused before it reached the pool, under the
// tenant that stands for none: as one of the outcomes, or as an error.
func (p *Pool) Refused(outcome string) {
	o := slices.Index(outcomeNames[:], outcome)
	if o < 0 {
		o = int(outcomeError)
	}
	p.metrics.refused[o].Add(1)
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.checksDesc, m.tenantsDesc, m.ageDesc, m.waitingDesc, m.stuckDesc, m.policiesDesc, m.memoryDesc, m.quarantinedDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	p := m.pool
	p.mu.Lock()
	states := map[State]int{
		Loading: len(p.loading), Warm: p.warm.Len(), Parked: p.parked.Len(), Refused: p.refused.Len(),
	}
	known := append(p.warm.Values(), p.parked.Values()...)
	for _, in := range p.refused.Values() {
		if !errors.Is(in.refusal, ErrUnknown) {
			known = append(known, in)
		}
	}
	bytes := p.memory.bytes
	p.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(m.memoryDesc, prometheus.GaugeValue, float64(bytes))

	for state, n := range states {
		ch <- prometheus.MustNewConstMetric(m.tenantsDesc, prometheus.GaugeValue, float64(n), string(state))
	}
	m.collectChecks(ch, known)
	now := time.Now()
	for _, in := range known {
		if oldest := p.oldest(in); !oldest.IsZero() {
			ch <- prometheus.MustNewConstMetric(m.ageDesc, prometheus.GaugeValue, now.Sub(oldest).Seconds(), string(in.id))
		}
	}
	p.sched.mu.Lock()
	waiting, stuck, quarantined := p.sched.waiting, p.sched.stuck, 0
	for _, in := range known {
		if !in.slots.until.IsZero() {
			quarantined++
		}
	}
	p.sched.mu.Unlock()
	ch <- prometheus.MustNewConstMetric(m.quarantinedDesc, prometheus.GaugeValue, float64(quarantined))
	ch <- prometheus.MustNewConstMetric(m.waitingDesc, prometheus.GaugeValue, float64(waiting))
	ch <- prometheus.MustNewConstMetric(m.stuckDesc, prometheus.GaugeValue, float64(stuck))
	ch <- prometheus.MustNewConstMetric(m.policiesDesc, prometheus.GaugeValue, float64(p.library.policies.len()))
}

// collectChecks sends the counts of the known tenants, with those of their
// former lives, and of all others.
func (m *metrics) collectChecks(ch chan<- prometheus.Metric, known []*instance) {
	send := func(tenant string, o int, n uint64) {
		if n > 0 {
			ch <- prometheus.MustNewConstMetric(m.checksDesc, prometheus.CounterValue, float64(n), tenant, outcomeNames[o])
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	seen := make(map[ID]bool, len(known))
	for _, in := range known {
		if seen[in.id] {
			continue // moved between the lists while they were read
		}
		seen[in.id] = true
		past := m.past[in.id]
		for o := range outcomes {
			n := in.counts[o].Load()
			if past != nil {
				n += past[o]
			}
			send(string(in.id), o, n)
		}
	}
	for id, past := range m.past {
		if !seen[id] {
			for o, n := range past {
				send(string(id), o, n)
			}
		}
	}
	for o, n := range m.rest {
		send(gone, o, n)
	}
	for o := range outcomes {
		n := m.refused[o].Load()
		if outcome(o) == outcomeUnknown {
			n += m.unknown.Load()
		}
		send(unnamed, o, n)
	}
}

// oldest returns when the source last confirmed the bundle of in for which
// that is longest ago.
func (p *Pool) oldest(in *instance) time.Time {
	p.mu.Lock()
	feeds, seeds := in.feeds, in.seeds
	p.mu.Unlock()
	var oldest time.Time
	older := func(t time.Time) {
		if oldest.IsZero() || t.Before(oldest) {
			oldest = t
		}
	}
	for _, f := range feeds {
		if _, checked, _ := f.state(); !checked.IsZero() {
			older(checked)
		}
	}
	for _, s := range seeds {
		if s != nil && !s.checked.IsZero() {
			older(s.checked)
		}
	}
	return oldest
}

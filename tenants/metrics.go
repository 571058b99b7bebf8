package tenants

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
)

// unnamed is the tenant label of checks that have no known tenant: what a
// client makes up never becomes a label.
const unnamed = "_unknown"

// others is the tenant label of all those that have none of their own.
const others = "_other"

// metrics are the pool's instruments. Those with a tenant label are read from
// the instances when asked for, so that a tenant costs no series of its own
// while nobody looks.
//
// At most Config.Labels tenants have a label of their own: those that came first.
// One that is known no more leaves its label, with what was counted under it, to
// others when a tenant comes that wants it.
type metrics struct {
	pool        *Pool
	seconds     prometheus.Histogram
	failures    *prometheus.CounterVec
	fetches     *prometheus.CounterVec
	fetchTime   prometheus.Histogram
	activations *prometheus.CounterVec
	compileTime prometheus.Histogram
	loads       *prometheus.CounterVec
	loadTime    prometheus.Histogram
	moves       *prometheus.CounterVec
	reports     *prometheus.CounterVec
	evicted     prometheus.Counter // tenants forgotten for the memory budget
	unknown     atomic.Uint64      // checks of unknown tenants
	again       atomic.Int64       // evaluations by a plan, with an error, after which topdown was asked
	refused     [outcomes]atomic.Uint64

	mu     sync.Mutex
	labels map[ID]*label    // of those that have one of their own; guarded by mu
	left   []ID             // labels of which the last instance is gone, the first first; guarded by mu
	rest   [outcomes]uint64 // checks of past instances without a label; guarded by mu
}

// label is what is counted under a tenant's own label. Guarded by metrics.mu.
type label struct {
	past  [outcomes]uint64 // checks of instances that are gone
	users int              // instances that are not
	left  bool             // it is in metrics.left
}

// Buckets of durations, in seconds.
var (
	decisionBuckets = []float64{.00001, .000025, .00005, .0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1}
	controlBuckets  = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}
)

// The descriptions of what is read when asked for.
var (
	checksDesc = prometheus.NewDesc("gatehouse_checks_total",
		"Questions answered, by tenant and outcome. The tenant _unknown stands for all names that no tenant has, _other for the tenants that have no label of their own.",
		[]string{"tenant", "outcome"}, nil)
	tenantsDesc = prometheus.NewDesc("gatehouse_tenants",
		"Tenants that are known, by state.", []string{"state"}, nil)
	ageDesc = prometheus.NewDesc("gatehouse_bundle_age_seconds",
		"Time since the source last confirmed a bundle of the tenant, in seconds; of the oldest where it has several. The tenant _other is the oldest of those that have no label of their own.",
		[]string{"tenant"}, nil)
	waitingDesc = prometheus.NewDesc("gatehouse_waiting_questions",
		"Questions that wait for a slot of their tenant.", nil, nil)
	runningDesc = prometheus.NewDesc("gatehouse_running_evaluations",
		"Evaluations that run at this moment.", nil, nil)
	stuckDesc = prometheus.NewDesc("gatehouse_stuck_evaluations",
		"Evaluations that still run although their caller has been answered.", nil, nil)
	loadingDesc = prometheus.NewDesc("gatehouse_waiting_loads",
		"Tenants that wait for their turn to be loaded.", nil, nil)
	policiesDesc = prometheus.NewDesc("gatehouse_policies",
		"Compiled policies in memory; tenants with the same content share one.", nil, nil)
	memoryDesc = prometheus.NewDesc("gatehouse_memory_bytes",
		"Estimate of what policies and data of warm and parked tenants take, in bytes; what is shared counts once.", nil, nil)
	bodiesDesc = prometheus.NewDesc("gatehouse_body_bytes",
		"Request bodies that are being read, of all tenants, in bytes.", nil, nil)
	quarantinedDesc = prometheus.NewDesc("gatehouse_quarantined_tenants",
		"Warm tenants that are not evaluated for a while because they keep running past their deadline.", nil, nil)
	failingDesc = prometheus.NewDesc("gatehouse_failing_tenants",
		"Tenants that are warm or refused and whose newest bundle, discovery or settings do not decide.", nil, nil)

	evaluatorsDesc = prometheus.NewDesc("gatehouse_entry_points",
		"Entry points of warm and parked tenants, by what evaluates them: plan, topdown, or fallback, which is topdown where it was to be plan.", []string{"evaluator"}, nil)

	againDesc = prometheus.NewDesc("gatehouse_evaluations_again_total",
		"Evaluations by a plan that ended with an error, after which topdown was asked: it has the last word on errors.", nil, nil)

	descs = []*prometheus.Desc{evaluatorsDesc, againDesc, checksDesc, tenantsDesc, ageDesc, waitingDesc, runningDesc, stuckDesc, loadingDesc, policiesDesc, memoryDesc, bodiesDesc, quarantinedDesc, failingDesc}
)

func newMetrics(p *Pool, reg prometheus.Registerer) *metrics {
	counters := func(name, help, of string, values ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{of})
		for _, v := range values {
			c.WithLabelValues(v) // a rate of something that never was is 0, not unknown
		}
		return c
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	}
	m := &metrics{
		pool:   p,
		labels: map[ID]*label{},
		seconds: histogram("gatehouse_decision_seconds",
			"Time from a question to its answer, waiting included, in seconds.", decisionBuckets),
		failures: counters("gatehouse_bundle_failures_total",
			"Bundles that were not taken, by reason: not_found, refused (cannot be read), compile, fetch (the source cannot be asked), discovery (the configuration); and trouble with the store on disk: save, saved (cannot be used).",
			"reason", "not_found", "refused", "compile", "fetch", "discovery", "save", "saved"),
		fetches: counters("gatehouse_bundle_fetches_total",
			"Requests for bundles that were answered or failed, by result: new, not_modified, failed.",
			"result", "new", "not_modified", "failed"),
		fetchTime: histogram("gatehouse_bundle_fetch_seconds",
			"Time to fetch and read a bundle that was new, in seconds.", controlBuckets),
		activations: counters("gatehouse_bundle_activations_total",
			"Policies that were made of new bundles, by result: activated, refused.",
			"result", "activated", "refused"),
		compileTime: histogram("gatehouse_compile_seconds",
			"Time to make a policy of new bundles, or to find that there is one already, in seconds.", controlBuckets),
		loads: counters("gatehouse_tenant_loads_total",
			"Loads of tenants that ended, by result: loaded, refused, unknown (there is no such tenant).",
			"result", "loaded", "refused", "unknown"),
		loadTime: histogram("gatehouse_tenant_load_seconds",
			"Time from the first question for a tenant, or its preloading, until it was loaded or refused, waiting included, in seconds.", controlBuckets),
		moves: counters("gatehouse_tenant_moves_total",
			"Moves of tenants that were loaded: parked (pushed out), revived (asked for again in time), gone (forgotten, or ended by their source).",
			"to", "parked", "revived", "gone"),
		reports: counters("gatehouse_status_reports_total",
			"Reports of tenants' status to their services, by outcome: sent or failed.",
			"outcome", "sent", "failed"),
		evicted: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "gatehouse_memory_evictions_total",
			Help: "Tenants forgotten to stay within the memory budget.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m, m.seconds, m.failures, m.fetches, m.fetchTime, m.activations, m.compileTime, m.loads, m.loadTime, m.moves, m.reports, m.evicted)
	}
	return m
}

// decided counts one answer, whose span is an exemplar where it has one.
func (m *metrics) decided(in *instance, a *Answer, took time.Duration, span trace.Span) {
	o := outcomeOf(a)
	if in.fault != nil { // it is in no list, so nobody would find its counts
		m.refused[o].Add(1)
	} else {
		in.counts[o].Add(1)
	}
	if span != nil {
		m.seconds.(prometheus.ExemplarObserver).ObserveWithExemplar(took.Seconds(), exemplar(span))
		return
	}
	m.seconds.Observe(took.Seconds())
}

// failed counts one bundle that was not taken.
func (m *metrics) failed(reason string) { m.failures.WithLabelValues(reason).Inc() }

// activated counts a policy that was made, or not, of new bundles.
func (m *metrics) activated(took time.Duration, err error) {
	if err != nil {
		m.failed("compile")
		m.activations.WithLabelValues("refused").Inc()
		return
	}
	m.activations.WithLabelValues("activated").Inc()
	m.compileTime.Observe(took.Seconds())
}

// loaded counts the end of a load.
func (m *metrics) loaded(in *instance) {
	result := "loaded"
	switch {
	case errors.Is(in.refusal, ErrUnknown):
		result = "unknown"
	case in.refusal != nil:
		result = "refused"
	}
	m.loads.WithLabelValues(result).Inc()
	m.loadTime.Observe(time.Since(in.begun).Seconds())
}

// name gives the tenant of an instance, which is known from now on, a label of
// its own if there is one. Pool.mu may be held.
func (m *metrics) name(in *instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if in.labelled {
		return
	}
	l := m.labels[in.id]
	if l == nil {
		if len(m.labels) >= m.pool.cfg.Labels && !m.freeLabel() {
			return
		}
		l = new(label)
		m.labels[in.id] = l
	}
	l.users++
	in.labelled = true
}

// freeLabel takes the label of a tenant that is known no more. It reports false
// where all are. m.mu is held.
func (m *metrics) freeLabel() bool {
	for len(m.left) > 0 {
		id := m.left[0]
		m.left = m.left[1:]
		l := m.labels[id]
		if l.left = false; l.users > 0 {
			continue // it has come back
		}
		for o, n := range l.past {
			m.rest[o] += n
		}
		delete(m.labels, id)
		return true
	}
	return false
}

// forget keeps the counts of an instance that is forgotten. Pool.mu may be held.
func (m *metrics) forget(in *instance) {
	m.mu.Lock()
	defer m.mu.Unlock()
	into := &m.rest
	if l := m.labels[in.id]; in.labelled {
		into, in.labelled = &l.past, false
		if l.users--; l.users == 0 && !l.left {
			l.left = true
			m.left = append(m.left, in.id)
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
	for _, d := range descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	p := m.pool
	p.mu.Lock()
	states := map[State]int{
		Loading: len(p.loading), Warm: p.warm.Len(), Parked: p.parked.Len(), Refused: p.refused.Len(),
	}
	polled := p.warm.Values()
	known := append(polled[:len(polled):len(polled)], p.parked.Values()...)
	for _, in := range p.refused.Values() {
		if !errors.Is(in.refusal, ErrUnknown) {
			known = append(known, in)
			polled = append(polled, in)
		}
	}
	bytes, waitingLoads := p.memory.bytes, len(p.queue)
	p.mu.Unlock()

	for state, n := range states {
		gauge(tenantsDesc, float64(n), string(state))
	}
	m.collectEvaluators(ch, known)
	gauge(memoryDesc, float64(bytes))
	gauge(loadingDesc, float64(waitingLoads))
	gauge(policiesDesc, float64(p.library.policies.len()))
	failing := 0
	for _, in := range polled {
		in.mu.Lock()
		if in.status.err != nil || in.status.discovery != nil {
			failing++
		}
		in.mu.Unlock()
	}
	gauge(failingDesc, float64(failing))
	m.collectChecks(ch, known)
	for tenant, oldest := range m.ages(known) {
		gauge(ageDesc, time.Since(oldest).Seconds(), tenant)
	}

	p.sched.mu.Lock()
	waiting, running, stuck, bodies, quarantined := p.sched.waiting, p.sched.running.len, p.sched.stuck, p.sched.bytes, 0
	for _, in := range known {
		if !in.slots.until.IsZero() {
			quarantined++
		}
	}
	p.sched.mu.Unlock()
	gauge(quarantinedDesc, float64(quarantined))
	gauge(waitingDesc, float64(waiting))
	gauge(runningDesc, float64(running))
	gauge(stuckDesc, float64(stuck))
	gauge(bodiesDesc, float64(bodies))
}

// collectEvaluators sends how many entry points each evaluator has.
func (m *metrics) collectEvaluators(ch chan<- prometheus.Metric, known []*instance) {
	entries := map[string]int{"plan": 0, "topdown": 0, "fallback": 0}
	for _, in := range known {
		rev := in.current.Load()
		if rev == nil {
			continue
		}
		for _, e := range rev.policy.Evaluated(in.observes()) {
			if e.Why != nil {
				entries["fallback"]++
			} else {
				entries[string(e.By)]++
			}
		}
	}
	for by, n := range entries {
		ch <- prometheus.MustNewConstMetric(evaluatorsDesc, prometheus.GaugeValue, float64(n), by)
	}
	ch <- prometheus.MustNewConstMetric(againDesc, prometheus.CounterValue, float64(m.again.Load()))
}

// collectChecks sends the counts of the tenants that have a label, with those of
// their former lives, and of all others.
func (m *metrics) collectChecks(ch chan<- prometheus.Metric, known []*instance) {
	send := func(tenant string, counts *[outcomes]uint64) {
		for o, n := range counts {
			if n > 0 {
				ch <- prometheus.MustNewConstMetric(checksDesc, prometheus.CounterValue, float64(n), tenant, outcomeNames[o])
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	rest := m.rest
	sums := make(map[ID]*[outcomes]uint64, len(m.labels))
	for id, l := range m.labels {
		past := l.past
		sums[id] = &past
	}
	seen := make(map[*instance]bool, len(known))
	for _, in := range known {
		if seen[in] {
			continue // moved between the lists while they were read
		}
		seen[in] = true
		into := &rest
		if in.labelled {
			into = sums[in.id]
		}
		for o := range into {
			into[o] += in.counts[o].Load()
		}
	}
	for id, counts := range sums {
		send(string(id), counts)
	}
	send(others, &rest)
	var none [outcomes]uint64
	for o := range none {
		none[o] = m.refused[o].Load()
	}
	none[outcomeUnknown] += m.unknown.Load()
	send(unnamed, &none)
}

// ages returns when the sources last confirmed the bundles of the tenants, for the
// bundle for which that is longest ago, by label.
func (m *metrics) ages(known []*instance) map[string]time.Time {
	ages := make(map[string]time.Time, len(known))
	for _, in := range known {
		oldest := m.pool.oldest(in)
		if oldest.IsZero() {
			continue
		}
		m.mu.Lock()
		tenant := others
		if in.labelled {
			tenant = string(in.id)
		}
		m.mu.Unlock()
		if t, ok := ages[tenant]; !ok || oldest.Before(t) {
			ages[tenant] = oldest
		}
	}
	return ages
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

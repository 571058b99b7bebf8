package tenants

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// State is where a tenant is in its life.
type State string

// The life of a tenant: loading → warm → parked → gone, or
// loading → refused → gone. No status tells of a tenant that is gone.
const (
	Loading State = "loading"
	Warm    State = "warm"
	Parked  State = "parked"
	Refused State = "refused"
	Gone    State = "gone"
)

// instance is one tenant's virtual OPA.
type instance struct {
	id       ID
	base     *Settings                  // what the operator says
	settings *Settings                  // with what was discovered; as base until current is set
	limits   Limits                     // the settings', with defaults
	needs    Needs                      // without what a policy reads
	joined   joins                      // what the policies that were asked last read
	again    *atomic.Int64              // of metrics; nil: not counted
	ownEnv   atomic.Pointer[policy.Env] // nil before the first evaluation

	logs      atomic.Bool                       // its decisions are logged
	remembers atomic.Bool                       // they are remembered: it is a tenant, not a name that somebody made up
	labels    atomic.Pointer[map[string]string] // those of its decisions; nil before the first

	log     atomic.Pointer[decisionlog.Log] // nil before the first decision that is logged
	opening sync.Mutex                      // held while log is opened or retired
	retired bool                            // the log is, also where there is none yet; guarded by opening

	// current decides; nil before the first load. Always replaced, never
	// changed: who holds one may go on using it.
	current atomic.Pointer[revision]

	// confirmed is when the sources last confirmed what it decides by, in
	// nanoseconds since 1970; of the bundle for which that is longest ago.
	confirmed atomic.Int64

	ready   chan struct{} // closed when the first load has ended
	refusal error         // why it is refused; set before ready is closed
	fault   error         // set on an instance that stands for no tenant

	slots slots // the scheduler's

	// Guarded by Pool.mu.
	state  State
	until  time.Time   // when a parked or refused instance goes
	expiry *time.Timer // forgets a parked instance
	tries  int         // loads refused in a row

	generation int       // of the settings
	replaces   *instance // whose place it takes once it is loaded; nil: nobody's

	feeds []*feed     // :: bundle of the settings → its feed, while warm
	seeds []*feedSeed // :: bundle of the settings → what revives its feed, while parked

	known []*feed // as feeds, for reports: also after it failed to load

	discovery      *feed         // of the discovery bundle; nil: there is none
	discoverySeed  *feedSeed     // what revives that feed, while parked
	discoveredFrom content       // what the settings were discovered from
	outdated       bool          // something else was discovered, and is not in force
	renewing       chan struct{} // closed when the one that takes its place does, or cannot

	activation sync.Mutex // held while a revision is made

	mu       sync.Mutex
	status   status    // guarded by mu
	reporter *reporter // sends the status; nil: nobody wants it; guarded by mu

	begun    time.Time // when its load was asked for
	labelled bool      // it has a label of its own in metrics; guarded by metrics.mu
	counts   counts
	decided  atomic.Uint64 // questions, as they are counted for Verify
}

// revision is what decides for a tenant: a policy and the content it is of.
type revision struct {
	policy  *policy.Policy
	content []content // :: bundle of the settings → its content

	state   string               // a digest of all that its answers follow from, beside the question
	bundles []decisionlog.Bundle // as its decisions are logged
	filter  decisionlog.Filter   // its rules about what is logged; nil: it has none
	rules   *decisionlog.Rules   // lead to filter while this is in use
}

// status is what is told of an instance.
type status struct {
	err       error         // why the newest content does not decide; nil: it does
	discovery error         // why what was discovered last is not in force; nil: it is
	activated time.Time     // when the current revision began to decide
	compiled  time.Duration // what making its policy took, or finding it

	discovered time.Time // when what was discovered came into force
}

// newInstance makes the instance of a tenant, loading.
func newInstance(id ID, s *Settings, cpus int) *instance {
	limits := s.Limits.withDefaults(cpus)
	return &instance{
		id:       id,
		base:     s,
		settings: s,
		limits:   limits,
		needs: Needs{
			SkipBody:        s.SkipBody,
			ProtoDescriptor: s.ProtoDescriptor,
			BodyBytes:       limits.BodyBytes,
		},
		slots: slots{limit: limits.Concurrency, budget: limits.BodyMemory},
		ready: make(chan struct{}),
		begun: time.Now(),
		state: Loading,
	}
}

// env is what evaluations take from the tenant. It is made for the first, once the
// settings are known: most tenants are not asked for long.
func (in *instance) env() *policy.Env {
	if env := in.ownEnv.Load(); env != nil {
		return env
	}
	in.ownEnv.CompareAndSwap(nil, in.settings.env(in.again))
	return in.ownEnv.Load()
}

// entryOf returns the entry point to ask. Where the operator lists none beside
// the default, a name given with the request is not ours to read.
func (in *instance) entryOf(q *Question) (string, error) {
	name := q.Entry
	if q.Own {
		return name, nil
	}
	if name == "" || len(in.settings.Entries) == 0 || name == in.settings.Entry {
		return in.settings.Entry, nil
	}
	if !slices.Contains(in.settings.Entries, name) {
		return "", fmt.Errorf("%w: %q", ErrEntry, name)
	}
	return name, nil
}

// options are what the tenant's policies are compiled with.
func (in *instance) options() policy.Options {
	entries := append([]string{in.settings.Entry}, in.settings.Entries...)
	slices.Sort(entries)
	optional := in.settings.HTTP.Entries()
	drop, mask := in.settings.filters()
	optional = append(optional, drop, mask)
	slices.Sort(optional)
	return policy.Options{
		Entries: slices.Compact(entries), Optional: slices.Compact(optional), AllowHeaders: in.settings.AllowHeaders,
		Network: in.settings.Network != nil, Evaluator: in.settings.Evaluator,
	}
}

// activate makes a revision of the newest content of the instance's feeds and
// lets it decide. On an error the one that decided before goes on.
func (p *Pool) activate(in *instance, feeds []*feed) error {
	in.activation.Lock()
	defer in.activation.Unlock()

	contents := make([]content, len(feeds))
	for i, f := range feeds {
		c, ok := f.latest()
		if !ok {
			return fmt.Errorf("bundle %q: not loaded", in.settings.Bundles[i].Name)
		}
		contents[i] = c
	}
	old := in.current.Load()
	if old != nil && slices.EqualFunc(old.content, contents, content.equal) {
		in.report(nil, time.Time{})
		return nil
	}
	span := p.traceActivation(in, "bundle activation", feeds...)
	begun := time.Now()
	pol, err := p.library.compile(in, contents)
	took := time.Since(begun)
	span.activated(pol, old == nil, err)
	p.metrics.activated(took, err)
	if err != nil {
		in.report(err, time.Time{})
		p.log.Warn("policy refused", "tenant", in.id, "error", err, "serving", old != nil)
		return err
	}
	filter := in.filterOf(pol)
	p.swap(in, &revision{
		policy: pol, content: contents, state: in.stateOf(contents), bundles: loggedBundles(pol),
		filter: filter, rules: decisionlog.NewRules(filter),
	})
	p.sched.renew(&in.slots)
	in.mu.Lock()
	in.status.compiled = took
	in.mu.Unlock()
	in.report(nil, time.Now())
	p.log.Info("policy activated", "tenant", in.id, "bundles", revisionsAttr(pol.Revisions()), "first", old == nil)
	return nil
}

// stateOf hashes what the answers by these contents follow from, beside the
// question.
func (in *instance) stateOf(contents []content) string {
	h := sha256.New()
	for _, c := range contents {
		h.Write(c.digest[:])
	}
	s := in.settings
	for _, k := range slices.Sorted(maps.Keys(s.Labels)) {
		hashString(h, k)
		hashString(h, s.Labels[k])
	}
	hashString(h, fmt.Sprintf("%q %q %q %q %q %t %t %t", s.Entry, s.Entries, s.ProtoDescriptor, s.HTTP.Identity(), s.AllowHeaders,
		s.SkipBody, s.WholeBody, s.DryRun))
	return hex.EncodeToString(h.Sum(nil))
}

// report sets what is told of the instance; a zero activated keeps the old time.
func (in *instance) report(err error, activated time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.status.err = err
	if !activated.IsZero() {
		in.status.activated = activated
	}
	in.reporter.changed()
}

// observes reports whether what its evaluations do is recorded.
func (in *instance) observes() bool { return in.logs.Load() || in.remembers.Load() }

func revisionsAttr(revisions []policy.Revision) slog.Value {
	attrs := make([]slog.Attr, len(revisions))
	for i, r := range revisions {
		attrs[i] = slog.String(r.Name, r.Revision)
	}
	return slog.GroupValue(attrs...)
}

package tenants

import (
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

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
	settings *Settings
	limits   Limits // the settings', with defaults
	needs    Needs
	env      *policy.Env // set before ready is closed, unless it is refused

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

	activation sync.Mutex // held while a revision is made

	mu     sync.Mutex
	status status // guarded by mu

	counts counts
}

// revision is what decides for a tenant: a policy and the content it is of.
type revision struct {
	policy  *policy.Policy
	content []content // :: bundle of the settings → its content
}

// status is what is told of an instance.
type status struct {
	err       error     // why the newest content does not decide; nil: it does
	activated time.Time // when the current revision began to decide
}

// newInstance makes the instance of a tenant, loading.
func newInstance(id ID, s *Settings, cpus int) *instance {
	limits := s.Limits.withDefaults(cpus)
	return &instance{
		id:       id,
		settings: s,
		limits:   limits,
		needs: Needs{
			All:             true,
			SkipBody:        s.SkipBody,
			ProtoDescriptor: s.ProtoDescriptor,
			BodyBytes:       limits.BodyBytes,
		},
		slots: slots{limit: limits.Concurrency, budget: limits.BodyMemory},
		ready: make(chan struct{}),
		state: Loading,
	}
}

// entryOf returns the entry point to ask. Where the operator lists none beside
// the default, a name given with the request is not ours to read.
func (in *instance) entryOf(name string) (string, error) {
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
	return policy.Options{Entries: slices.Compact(entries), AllowHeaders: in.settings.AllowHeaders}
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
	pol, err := p.library.compile(in, contents)
	if err != nil {
		in.report(err, time.Time{})
		p.metrics.failed("compile")
		p.log.Warn("policy refused", "tenant", in.id, "error", err, "serving", old != nil)
		return err
	}
	p.swap(in, &revision{policy: pol, content: contents})
	p.sched.renew(&in.slots)
	in.report(nil, time.Now())
	p.log.Info("policy activated", "tenant", in.id, "bundles", revisionsAttr(pol.Revisions()), "first", old == nil)
	return nil
}

// report sets what is told of the instance; a zero activated keeps the old time.
func (in *instance) report(err error, activated time.Time) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.status.err = err
	if !activated.IsZero() {
		in.status.activated = activated
	}
}

func revisionsAttr(revisions []policy.Revision) slog.Value {
	attrs := make([]slog.Attr, len(revisions))
	for i, r := range revisions {
		attrs[i] = slog.String(r.Name, r.Revision)
	}
	return slog.GroupValue(attrs...)
}

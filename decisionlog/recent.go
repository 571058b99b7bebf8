package decisionlog

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Memory is a decision that is remembered. It has the true values: what is to
// leave the process is what Show makes of it.
type Memory struct {
	Event // without its Filter

	Tenant string

	// Labels are those of the event.
	Labels map[string]string

	// Rules are the drop and mask rules of the policy that decided. Nil: it has
	// neither.
	Rules *Rules

	// Asked says what was asked, for who asks it again.
	Asked Asked

	// Bare says that the decision was too large to be remembered with its
	// input, its result and what builtins gave.
	Bare bool
}

// Asked is a question as it was put to a policy.
type Asked struct {
	Entry string    // the entry point
	Value bool      // whatever its value is, is the answer
	At    time.Time // the time that the policy saw; zero: it was not asked
	State string    // names what decided: equal for what decides alike; "": nothing did
	Guard bool      // the answer is that of the operator's own policy
}

// Rules lead to the Filter of a policy for as long as it is in use, so that
// memories hold no policy that is not.
type Rules struct{ filter atomic.Pointer[Filter] }

// NewRules returns what leads to a filter; nil where that is nil.
func NewRules(f Filter) *Rules {
	if f == nil {
		return nil
	}
	r := new(Rules)
	r.filter.Store(&f)
	return r
}

// Forget says that the policy is out of use.
func (r *Rules) Forget() {
	if r != nil {
		r.filter.Store(nil)
	}
}

// withheld stands for rules that nobody has any more: what they would have
// hidden is not known, so that all that they could is.
type withheld struct{}

func (withheld) Drop(context.Context, ast.Value) (bool, error) { return false, nil }

func (withheld) Mask(context.Context, ast.Value) (ast.Value, error) {
	return ast.NewArray(ast.StringTerm("/input"), ast.StringTerm("/result"), ast.StringTerm("/nd_builtin_cache")), nil
}

// filter returns the filter of a memory, where now has the place of one that is
// gone.
func (m *Memory) filter(now Filter) Filter {
	if m.Rules == nil {
		return nil
	}
	if f := m.Rules.filter.Load(); f != nil {
		return *f
	}
	if now != nil {
		return now
	}
	return withheld{}
}

const (
	defaultRecentBytes = 16 << 20

	// sizeMemory is what a memory takes beside its event.
	sizeMemory = 400

	// largePart is of how much of the memory of all a single decision may take,
	// before it is remembered without its values.
	largePart = 16
)

// recent are the last decisions of all tenants. What is remembered is in two
// lists, that of all and that of its tenant, each with the newest first.
type recent struct {
	each  int   // of each tenant; 0: none
	limit int64 // bytes of all

	mu      sync.Mutex
	bytes   int64                   // guarded by mu
	tenants map[string]*recentOfOne // :: tenant → its decisions, where there are any; guarded by mu
	newest  *remembered             // of all; guarded by mu
	oldest  *remembered             // of all; guarded by mu

	showing chan struct{} // has room for one: who has decisions shown
}

// recentOfOne are the last decisions of one tenant.
type recentOfOne struct {
	n              int
	newest, oldest *remembered
}

// remembered is a Memory in its lists. It is used again for another once it is
// forgotten.
type remembered struct {
	Memory
	bytes        int64
	older, newer *remembered // of all
	below, above *remembered // of the tenant: the next older, the next newer
}

// Remembers reports whether decisions are remembered.
func (ls *Logs) Remembers() bool { return ls.recent.each > 0 }

// Remember keeps m, and not the pointer to it, among the last decisions of its
// tenant. It returns at once; who calls it shares the values with it, which never
// change.
func (ls *Logs) Remember(m *Memory) {
	r := &ls.recent
	if r.each <= 0 {
		return
	}
	size := sizeMemory + m.size()
	bare := size > r.limit/largePart
	if bare {
		size = sizeMemory + sizeEvent
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.tenants[m.Tenant]
	var d *remembered
	if one != nil && one.n >= r.each {
		d = r.forget(one.oldest)
	}
	for r.bytes+size > r.limit && r.oldest != nil {
		d = r.forget(r.oldest)
	}
	if r.bytes+size > r.limit {
		return
	}
	if d == nil {
		d = new(remembered)
	}
	if one = r.tenants[m.Tenant]; one == nil { // again: its last one may have been forgotten
		one = new(recentOfOne)
		r.tenants[m.Tenant] = one
	}
	d.Memory, d.bytes = *m, size
	d.Filter = nil
	if bare {
		d.Document = nil
		d.Input, d.Result, d.NDBuiltinCache, d.Headers, d.Bare = nil, nil, nil, nil, true
	}
	r.bytes += size
	if d.older = r.newest; d.older != nil {
		d.older.newer = d
	} else {
		r.oldest = d
	}
	r.newest = d
	if d.below = one.newest; d.below != nil {
		d.below.above = d
	} else {
		one.oldest = d
	}
	one.newest = d
	one.n++
}

// forget takes d out of its lists, and returns it. r.mu is held.
func (r *recent) forget(d *remembered) *remembered {
	one := r.tenants[d.Tenant]
	if one.n--; one.n == 0 {
		delete(r.tenants, d.Tenant)
	}
	if d.above != nil {
		d.above.below = d.below
	} else {
		one.newest = d.below
	}
	if d.below != nil {
		d.below.above = d.above
	} else {
		one.oldest = d.above
	}
	if d.newer != nil {
		d.newer.older = d.older
	} else {
		r.newest = d.older
	}
	if d.older != nil {
		d.older.newer = d.newer
	} else {
		r.oldest = d.newer
	}
	r.bytes -= d.bytes
	*d = remembered{}
	return d
}

// Recall returns the last decisions of a tenant that want reports true for, the
// newest first, and how many are remembered. want must return soon, and keep
// nothing.
func (ls *Logs) Recall(tenant string, want func(*Memory) bool) (found []*Memory, of int) {
	r := &ls.recent
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.tenants[tenant]
	if one == nil {
		return nil, 0
	}
	for d := one.newest; d != nil; d = d.below {
		if want(&d.Memory) {
			m := d.Memory
			found = append(found, &m)
		}
	}
	return found, one.n
}

// Shown is a decision as it would leave in a log.
type Shown struct {
	*Memory
	JSON []byte // the event
}

// ErrWithheld: the decision's rules do not let it be shown.
var ErrWithheld = errors.New("decision is withheld")

// Show makes of memories what would have left in a log: the tenant's own drop and
// mask rules say what, and secrets are hidden where Config.Redact says so. For
// rules that are out of use now are those in force; nil: there are none, and then
// input, result and nd_builtin_cache are erased. tell is called for each in order,
// until it returns false; its error wraps ErrWithheld where the decision is not to
// be shown. limit bounds one evaluation of a rule. One caller at a time is served;
// Show returns an error where ctx ends before.
func (ls *Logs) Show(ctx context.Context, list []*Memory, now Filter, limit time.Duration, tell func(Shown, error) bool) error {
	select {
	case ls.recent.showing <- struct{}{}:
		defer func() { <-ls.recent.showing }()
	case <-ctx.Done():
		return fmt.Errorf("waiting for others who look at decisions: %w", ctx.Err())
	}
	w := newWorker(ls)
	defer w.evaluator.stop()
	var l *Log
	for _, m := range list {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("masking decisions: %w", err)
		}
		if l == nil || !maps.Equal(l.set.Labels, m.Labels) {
			before := l
			l = newLog(ls, Settings{Tenant: m.Tenant, Labels: m.Labels, FilterTime: limit}.orDefault())
			l.wantsJSON = true
			if before != nil {
				l.filtering.stuck.Store(before.filtering.stuck.Load())
			}
		}
		e := m.Event
		e.Filter = m.filter(now)
		w.json.reset(false)
		why, err := w.encode(l, &e)
		shown := Shown{Memory: m}
		switch {
		case err != nil:
			err = fmt.Errorf("%w: %w", ErrWithheld, err)
		case why == dropPolicy:
			err = fmt.Errorf("%w: the tenant's drop rule keeps it out of logs", ErrWithheld)
		default:
			shown.JSON = slices.Clone(w.json.buf)
		}
		if !tell(shown, err) {
			return nil
		}
	}
	return nil
}

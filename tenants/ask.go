package tenants

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// What is left of the caller's own deadline for the way there and back, so that
// the answer is there before the caller gives up, also from a busy machine: a
// third of the time that there is, at least minMargin, at most maxMargin.
const (
	marginPart = 3
	minMargin  = 5 * time.Millisecond
	maxMargin  = 100 * time.Millisecond
)

// Decide asks the tenant's policy the questions and calls answer once for each
// that is needed, with its index, as the answers come: one call at a time, on the
// caller's goroutine. All answers come from one policy. Where the Twins of a
// question are asked too, answer is called once for each: see Answer.Of.
//
// Decide returns in time: each question is answered, with ErrDeadline if need
// be, within the tenant's evaluation time from when it was begun, and all of
// them before ctx ends, less a margin. At most as many questions as the tenant
// has slots are begun at once.
//
// The error wraps ErrUnknown when there is no such tenant; then answer is not
// called. What else goes wrong is in the answers.
func (p *Pool) Decide(ctx context.Context, id ID, questions []Question, answer func(i int, a Answer)) error {
	start := time.Now()
	in := p.instanceOf(id)
	c := p.newCall(ctx, in, start, answer)
	defer c.free()

	rev, err := c.revision(ctx)
	if errors.Is(err, ErrUnknown) {
		p.metrics.unknown.Add(uint64(len(questions)))
		return err
	}
	if err != nil {
		for i := range questions {
			c.answer(i, &questions[i], &result{err: err, cleared: p.guard == nil, span: c.span(&questions[i], start)})
		}
		return nil
	}
	c.rev, c.state = rev, p.stateOf(rev)
	c.ask(c.apart(questions))
	return nil
}

// call is one call of Decide.
type call struct {
	pool  *Pool
	in    *instance
	rev   *revision
	state string // of rev
	start time.Time
	limit time.Time // the caller's own deadline, less the margin; zero: none
	ctx   context.Context
	tell  func(int, Answer)
	done  chan *job
	timer *time.Timer
	open  []*job // begun and not answered
	turns turns
}

// newCall returns a call that may have been used before.
func (p *Pool) newCall(ctx context.Context, in *instance, start time.Time, tell func(int, Answer)) *call {
	c, _ := p.calls.Get().(*call)
	if c == nil {
		c = &call{timer: time.NewTimer(time.Hour), done: make(chan *job, 1), turns: turns{wake: make(chan struct{}, 1)}}
	}
	c.pool, c.in, c.start, c.ctx, c.tell = p, in, start, ctx, tell
	c.limit = time.Time{}
	if deadline, ok := ctx.Deadline(); ok {
		left := deadline.Sub(start)
		c.limit = deadline.Add(-min(max(left/marginPart, minMargin), maxMargin))
	}
	return c
}

func (c *call) free() {
	c.timer.Stop()
	if c.turns.left {
		return // a worker still has a job that looks at it
	}
	p := c.pool
	c.pool, c.in, c.rev, c.state, c.ctx, c.tell = nil, nil, nil, "", nil, nil
	clear(c.open)
	c.open = c.open[:0]
	c.turns.free()
	p.calls.Put(c)
}

// deadline is when a question begun at t must be answered.
func (c *call) deadline(t time.Time) time.Time {
	d := t.Add(c.in.limits.EvaluationTime)
	if !c.limit.IsZero() && c.limit.Before(d) {
		return c.limit
	}
	return d
}

// revision returns what decides for the tenant now. It waits for the first
// load, no longer than a question begun when the call was.
func (c *call) revision(ctx context.Context) (*revision, error) {
	if c.in.fault != nil {
		return nil, c.in.fault
	}
	if g := c.pool.guard; g != nil && g.current.Load() == nil {
		return nil, fmt.Errorf("%w: the operator's policy is not loaded", ErrNotReady)
	}
	if rev := c.in.current.Load(); rev != nil {
		return rev, c.stale()
	}
	c.timer.Reset(time.Until(c.deadline(c.start)))
	select {
	case <-c.in.ready:
		c.timer.Stop()
		if rev := c.in.current.Load(); rev != nil {
			return rev, c.stale()
		}
		return nil, c.in.refusal
	case <-c.timer.C:
		return nil, fmt.Errorf("%w: it is loading", ErrNotReady)
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: caller is gone while it is loading", ErrNotReady)
	}
}

// stale returns an error where what the tenant decides by is older than it may
// be.
func (c *call) stale() error {
	limit := c.pool.cfg.MaxStale
	if limit <= 0 {
		return nil
	}
	if confirmed := time.Unix(0, c.in.confirmed.Load()); c.start.Sub(confirmed) > limit {
		return fmt.Errorf("%w: its bundles were last confirmed at %s, limit %s ago", ErrNotReady, confirmed.UTC().Format(time.RFC3339), limit)
	}
	return nil
}

// ask puts the questions to the tenant's slots and answers each. Where there are
// several, a worker that has answered one goes on with the next that nobody has
// taken: see turns.
func (c *call) ask(questions []Question) {
	window := min(len(questions), c.in.limits.Concurrency)
	if p := c.pool.cfg.Parallel; p > 0 {
		window = min(window, p)
	}
	if cap(c.done) < window {
		c.done = make(chan *job, window)
	}
	c.turns.begin(questions, c.in.limits.BodyBytes)
	waited := false
	for answered := 0; answered < len(questions); {
		answered += c.collect(waited)
		waited = false
		for len(c.open) < window {
			i, ok := c.turns.take(len(c.open) > 0)
			if !ok {
				break
			}
			if q := &questions[i]; q.Needed != nil && !q.Needed() || !c.begin(i, q) {
				answered++
			}
		}
		if len(c.open) == 0 {
			continue
		}
		c.timer.Reset(time.Until(c.wakeAt()))
		select {
		case j := <-c.done:
			answered += c.collect(false) // what its worker has left behind comes first
			c.finish(j)
			answered++
		case <-c.turns.wake: // there is something to collect
		case <-c.timer.C:
			waited = true
			answered += c.giveUp(true, "deadline exceeded")
		case <-c.ctx.Done():
			answered += c.giveUp(false, "caller is gone")
		}
	}
}

// begin submits one question. It reports false when the question is already
// answered instead.
func (c *call) begin(i int, q *Question) bool {
	now := time.Now()
	begun := c.start
	if i > 0 {
		begun = now
	}
	span := c.span(q, begun)
	entry, err := c.in.entryOf(q)
	if err != nil {
		c.answer(i, q, &result{err: err, cleared: c.pool.guard == nil, span: span})
		return false
	}
	deadline := c.deadline(begun)
	if !now.Before(deadline) || c.ctx.Err() != nil {
		c.answer(i, q, &result{err: fmt.Errorf("%w: none is left", ErrDeadline), cleared: c.pool.guard == nil, span: span})
		return false
	}
	j, _ := c.pool.jobs.Get().(*job)
	if j == nil {
		j = new(job)
	}
	*j = job{
		tenant: c.in.id, guard: c.pool.guard, slots: &c.in.slots, policy: c.rev.policy, env: c.in.env(),
		bytes: min(q.BodyBytes, c.in.limits.BodyBytes), done: c.done,
	}
	if c.turns.shared {
		j.more, j.bytes = c, c.turns.bytes
	}
	c.put(j, i, q, entry, begun, deadline, span)
	if err := c.pool.sched.submit(j); err != nil {
		*j = job{}
		c.pool.jobs.Put(j)
		c.answer(i, q, &result{err: err, cleared: c.pool.guard == nil, span: span})
		return false
	}
	c.open = append(c.open, j)
	return true
}

// put puts a question into a job that has none.
func (c *call) put(j *job, i int, q *Question, entry string, begun, deadline time.Time, span trace.Span) {
	j.index, j.question, j.entry, j.deadline = i, q, entry, deadline
	if j.guard != nil {
		j.guarding = j.guard.current.Load()
	}
	j.needs = c.needs(q, entry, j.guarding)
	j.needs.Cancel = &j.cancel
	j.observes, j.observed.WantBuiltins = q.Timed || c.in.observes(), c.in.settings.NDBuiltinCache
	if span != nil {
		j.span, j.asked = span, begun
		j.observes, j.observed.WantPrints = true, c.pool.cfg.Tracing.Prints
	}
}

// finish answers the question of a job that a worker is done with.
func (c *call) finish(j *job) {
	for k, o := range c.open {
		if o == j {
			c.open = append(c.open[:k], c.open[k+1:]...)
			break
		}
	}
	i, q, r := j.index, j.question, c.resultOf(j)
	*j = job{}
	c.pool.jobs.Put(j)
	c.answer(i, q, &r)
}

// resultOf returns what became of the question of a job that a worker is done
// with.
func (c *call) resultOf(j *job) result {
	c.pool.verifier.offer(j, c.in, c.rev)
	r := result{
		input: j.input, needs: j.needs, decision: j.decision, err: j.err, cleared: j.cleared.Load(), observed: j.observed, span: j.span,
	}
	if r.span != nil {
		r.waited = max(0, j.begun.Sub(j.asked)) // it need not have waited, where its worker had another before
	}
	return r
}

// giveUp answers open jobs without their result: those whose time is over, or,
// when the caller goes of its own, all. It returns how many it answered.
func (c *call) giveUp(late bool, why string) int {
	kept := c.open[:0]
	var left []*job
	now := time.Now()
	c.turns.mu.Lock()
	for _, j := range c.open {
		if !late || !now.Before(j.deadline) {
			j.left = true
			left = append(left, j)
		} else {
			kept = append(kept, j)
		}
	}
	c.turns.mu.Unlock()
	clear(c.open[len(kept):])
	c.open = kept
	for _, j := range left {
		i, q, r := j.index, j.question, result{cleared: j.cleared.Load(), span: j.span}
		if j.made.Load() {
			r.input, r.needs = j.input, j.needs
		}
		switch c.pool.sched.leave(j, late) {
		case jobDone: // it was done in this very moment: its result counts
			c.finish(c.take(j))
			continue
		case jobIdle:
			*j = job{}
			c.pool.jobs.Put(j)
		default:
			c.turns.left = c.turns.left || j.more != nil
		}
		r.err = fmt.Errorf("%w: %s", ErrDeadline, why)
		c.answer(i, q, &r)
	}
	return len(left)
}

// take takes j, which is done, out of the channel.
func (c *call) take(j *job) *job {
	for {
		got := <-c.done
		if got == j {
			return j
		}
		c.done <- got // another's: it keeps its room in the channel
	}
}

// result is what became of a question. Cleared says whether the guard has
// allowed, or there is none: only then may the tenant soften what follows.
type result struct {
	input    ast.Value
	needs    Needs // of input
	decision policy.Decision
	err      error
	cleared  bool
	observed policy.Observed

	span   trace.Span    // of the question; nil: it is not recorded
	waited time.Duration // for a worker, where there is a span and a worker took it
}

// answer records one answer, and tells it.
func (c *call) answer(i int, q *Question, r *result) {
	settings := c.in.base
	if c.rev != nil {
		settings = c.in.settings
	}
	a := Answer{Decision: r.decision, Err: r.err, DryRun: settings.DryRun && r.cleared, Guard: !r.cleared && r.err == nil}
	if r.err != nil {
		a.Decision = policy.Decision{Value: r.decision.Value}
		if r.cleared && softened(r.err) {
			a.OnError = settings.OnError
		}
	}
	took := time.Since(c.start)
	logged := q
	if r.span != nil {
		logged = tracedAs(q, r.span)
	}
	if err := c.recordAll(logged, &a, r, took); err != nil {
		a = Answer{Err: err}
	}
	if settings.Naming.On() {
		a.Naming = &settings.Naming
	}
	if c.rev != nil {
		a.Bundles, a.State, a.Evaluation = c.rev.bundles, c.state, r.observed.Duration
	}
	for range 1 + len(q.Twins) {
		c.pool.metrics.decided(c.in, &a, took, r.span)
	}
	c.tell(i, a)
	c.endSpan(r.span, q, &a, r)
}

// softened reports whether a tenant's on_error covers this error. What the
// caller did wrong is always denied.
func softened(err error) bool {
	for _, hard := range []error{ErrInvalid, ErrTooLarge, ErrPartialBody, ErrEntry, ErrUnknown, ErrNotLogged} {
		if errors.Is(err, hard) {
			return false
		}
	}
	return true
}

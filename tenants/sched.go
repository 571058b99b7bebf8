package tenants

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// Bounds of the scheduler.
const (
	// tenantWaiting bounds the questions of one tenant that wait for a slot.
	tenantWaiting = 1000
	// totalWaiting bounds those of all tenants.
	totalWaiting = 10_000
	// longRun is how long an evaluation may run before a processor is lent for
	// it, and calmTime how long there must be none such before it is taken
	// back. They are looked at every lendInterval while anything runs.
	longRun      = 20 * time.Millisecond
	calmTime     = time.Second
	lendInterval = 5 * time.Millisecond
	// extraWorkers bounds the workers that stand in for stuck ones.
	extraWorkers = 64
	// lateInRow is after how many evaluations in a row that ran past their
	// deadline a tenant is quarantined: first for minQuarantine, and twice as
	// long each time up to maxQuarantine. Then one evaluation is let through
	// to see whether it ends in time.
	lateInRow     = 10
	minQuarantine = time.Second
	maxQuarantine = time.Minute
)

// scheduler runs evaluations on long-lived workers, never more of one tenant
// than it has slots.
//
// OPA's evaluator recurses deeply. On a fresh goroutine nearly half of its time
// goes into growing the stack again and again; a worker's stack stays grown.
//
// A caller waits for its job no longer than its deadline. A job that runs on
// keeps its worker and its tenant's slot until it ends, since a builtin cannot
// be interrupted; another worker stands in for the stuck one meanwhile, up to
// extraWorkers of them.
type scheduler struct {
	log *slog.Logger

	mu      sync.Mutex
	work    sync.Cond // signalled when run has jobs, or on stop
	run     jobList   // ready to run: their slots are taken
	waiting int       // jobs in the queues of all tenants
	bytes   int64     // of the bodies of all jobs that are not done
	budget  int64     // for bytes
	base    int       // workers there are when none is stuck
	workers int       // workers there are
	stuck   int       // workers whose caller has left
	stopped bool
	running jobList // on a worker

	stopping atomic.Bool // as stopped, for those who do not hold mu

	lend     func(n int)   // gives the runtime n processors more than it has by itself; nil: nobody can
	watching bool          // the lender looks at what runs
	watch    chan struct{} // has room for one: the lender is to look
	quit     chan struct{} // closed on stop

	wg sync.WaitGroup
}

// slots is a tenant's share of the scheduler. Its fields are the scheduler's.
type slots struct {
	limit  int
	active int
	queue  jobList

	bytes  int64 // of the bodies of its jobs that are not done
	budget int64 // for bytes

	late        int       // evaluations in a row that ran past their deadline
	quarantines int       // in a row
	until       time.Time // when its quarantine ends; zero: it is in none
	trial       bool      // the one evaluation after a quarantine is running
}

// job is one question on its way through the scheduler. It is used again for
// other questions unless its caller left it.
type job struct {
	// Set by the caller before submit.
	tenant   ID
	slots    *slots
	guard    *instance // asked first; nil: none
	guarding *revision // of guard
	policy   *policy.Policy
	env      *policy.Env
	entry    string
	question *Question
	needs    Needs
	bytes    int64     // of the question's body
	index    int       // the question's place in its batch
	deadline time.Time // the caller waits no longer
	done     chan<- *job

	span  trace.Span // of the question; nil: it is not recorded
	asked time.Time  // when the span begins, where there is one

	// more has further questions for the worker. Then what is of the question,
	// above and below, is guarded by its turns. Nil: there are none.
	more *call
	left bool // its caller has left it, or is about to

	// ended says that the worker has answered one of several questions in time;
	// the worker's, and the scheduler's once the job is left.
	ended bool

	observes bool // what the evaluation does is to be recorded
	cancel   policy.Cancel
	made     atomic.Bool // input is set
	cleared  atomic.Bool // the guard has allowed, or there is none

	// Set by the worker before the job is sent to done.
	input    ast.Value
	decision policy.Decision
	err      error
	observed policy.Observed

	// The scheduler's.
	state      jobState
	begun      time.Time // when a worker took it
	trial      bool      // lets see whether the tenant's quarantine may end
	next, prev *job
}

type jobState int

const (
	jobIdle    jobState = iota
	jobQueued           // waits for a slot of its tenant
	jobReady            // has a slot, waits for a worker
	jobRunning          // on a worker
	jobLeft             // on a worker, and its caller has left
	jobDone
)

func newScheduler(workers int, budget int64, lend func(int), log *slog.Logger) *scheduler {
	s := &scheduler{
		log: log, base: workers, budget: budget, lend: lend,
		watch: make(chan struct{}, 1), quit: make(chan struct{}),
	}
	s.work.L = &s.mu
	return s
}

// start starts the workers.
func (s *scheduler) start() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.workers < s.base {
		s.hire()
	}
	if s.lend != nil {
		s.wg.Go(s.lender)
	}
}

// hire starts a worker. s.mu is held.
func (s *scheduler) hire() {
	s.workers++
	s.wg.Add(1)
	go s.worker()
}

// stop cancels what runs and waits for the workers, at most for wait. It
// returns an error that counts those that still run.
func (s *scheduler) stop(wait time.Duration) error {
	s.mu.Lock()
	s.stopped = true
	s.stopping.Store(true)
	close(s.quit)
	for j := s.running.first; j != nil; j = j.next {
		j.cancel.Cancel()
	}
	s.work.Broadcast()
	s.mu.Unlock()

	ended := make(chan struct{})
	go func() { s.wg.Wait(); close(ended) }()
	select {
	case <-ended:
		return nil
	case <-time.After(wait):
		s.mu.Lock()
		defer s.mu.Unlock()
		return fmt.Errorf("%d evaluations still run after %s", s.running.len, wait)
	}
}

// submit queues j. It returns ErrBusy when too much waits already, and when the
// tenant is in quarantine.
func (s *scheduler) submit(j *job) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.admit(j); err != nil {
		return err
	}
	s.bytes += j.bytes
	j.slots.bytes += j.bytes
	if j.slots.active < j.slots.limit {
		j.slots.active++
		s.ready(j)
		return nil
	}
	s.waiting++
	j.state = jobQueued
	j.slots.queue.push(j)
	return nil
}

// admit returns why j cannot be taken. s.mu is held.
func (s *scheduler) admit(j *job) error {
	switch {
	case s.stopped:
		return fmt.Errorf("%w: stopping", ErrNotReady)
	case j.bytes > 0 && j.slots.bytes+j.bytes > j.slots.budget:
		return fmt.Errorf("%w: bodies of %d bytes are being read, limit %d", ErrBusy, j.slots.bytes, j.slots.budget)
	case j.bytes > 0 && s.bytes+j.bytes > s.budget:
		return fmt.Errorf("%w: bodies of %d bytes are being read for all tenants, limit %d", ErrBusy, s.bytes, s.budget)
	case !j.slots.until.IsZero():
		if wait := time.Until(j.slots.until); wait > 0 || j.slots.trial {
			return fmt.Errorf("%w: in quarantine, its evaluations run past their deadline", ErrBusy)
		}
		j.slots.trial, j.trial = true, true
		return nil
	case j.slots.active < j.slots.limit:
		return nil
	case j.slots.queue.len >= tenantWaiting:
		return fmt.Errorf("%w: %d questions wait for its %d slots", ErrBusy, j.slots.queue.len, j.slots.limit)
	case s.waiting >= totalWaiting:
		return fmt.Errorf("%w: %d questions of all tenants wait", ErrBusy, s.waiting)
	}
	return nil
}

// finished gives back what j took beside a slot.
func (s *scheduler) finished(j *job) {
	s.bytes -= j.bytes
	j.slots.bytes -= j.bytes
	if j.trial {
		j.slots.trial = false
	}
}

// late notes that an evaluation ran past its deadline. Those that had begun
// before a quarantine say nothing new.
func (s *scheduler) late(j *job) {
	sl := j.slots
	if !sl.until.IsZero() && !j.trial {
		return
	}
	if sl.late++; sl.late < lateInRow && !j.trial {
		return
	}
	wait := min(minQuarantine<<min(sl.quarantines, 10), maxQuarantine)
	sl.quarantines++
	sl.late = 0
	sl.until = time.Now().Add(wait)
}

// forgive ends a tenant's quarantine: an evaluation ended in time, or there is
// a new policy.
func (s *scheduler) forgive(sl *slots) {
	sl.late, sl.quarantines, sl.trial, sl.until = 0, 0, false, time.Time{}
}

// renew forgives a tenant whose policy is new.
func (s *scheduler) renew(sl *slots) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgive(sl)
}

// quarantine returns when a tenant's quarantine ends; zero: it is in none.
func (s *scheduler) quarantine(sl *slots) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sl.until
}

func (s *scheduler) ready(j *job) {
	j.state = jobReady
	s.run.push(j)
	s.work.Signal()
}

// leave is called by a caller that no longer waits for j. It returns jobLeft
// while a worker still has the job, jobDone when its result already is in the
// caller's channel, and jobIdle when the job is the caller's again. It is late
// when the time is over, not when the caller went of its own.
func (s *scheduler) leave(j *job, late bool) jobState {
	j.cancel.Cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch j.state {
	case jobQueued:
		j.slots.queue.remove(j)
		s.waiting--
		s.finished(j)
		j.state = jobIdle
	case jobReady:
		s.run.remove(j)
		s.release(j.slots)
		s.finished(j)
		j.state = jobIdle
	case jobRunning:
		j.state = jobLeft
		if late {
			if j.ended {
				s.forgive(j.slots)
			}
			s.late(j)
		}
		s.stuck++
		if !s.stopped && s.workers < s.base+min(s.stuck, extraWorkers) {
			s.hire()
		}
	}
	return j.state
}

// goOn reports whether the worker of j may go on with another question of the
// same call, since nobody waits for the worker or the slot.
func (s *scheduler) goOn(j *job, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped || s.run.len > 0 || j.slots.queue.len > 0 || j.state != jobRunning || s.workers > s.base+min(s.stuck, extraWorkers) {
		return false
	}
	s.running.remove(j) // they are in the order in which they began
	j.begun = now
	s.running.push(j)
	return true
}

// release gives a slot back, to the question that waited longest.
func (s *scheduler) release(sl *slots) {
	if j := sl.queue.pop(); j != nil {
		s.waiting--
		s.ready(j)
		return
	}
	sl.active--
}

// stackFloor is live in the frame of every worker, so that the collector, which
// halves a stack of which less than a quarter is in use, never does.
const stackFloor = 64 << 10

func (s *scheduler) worker() {
	defer s.wg.Done()
	var floor [stackFloor]byte
	s.loop(&floor)
}

//go:noinline
func (s *scheduler) loop(_ *[stackFloor]byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		for s.run.len == 0 && !s.stopped && s.workers <= s.base+min(s.stuck, extraWorkers) {
			s.work.Wait()
		}
		if s.workers > s.base+min(s.stuck, extraWorkers) || s.stopped && s.run.len == 0 {
			s.workers--
			return
		}
		j := s.run.pop()
		j.state, j.begun = jobRunning, time.Now()
		s.running.push(j)
		if s.lend != nil && !s.watching {
			s.watching = true
			select {
			case s.watch <- struct{}{}:
			default: // one is on its way
			}
		}
		s.mu.Unlock()

		s.evaluate(j)
		for j.more != nil && j.more.next(j) {
			s.evaluate(j)
		}

		s.mu.Lock()
		s.running.remove(j)
		s.finished(j)
		s.release(j.slots)
		if j.state == jobLeft {
			s.stuck--
			continue
		}
		if j.slots.late > 0 || j.slots.quarantines > 0 {
			s.forgive(j.slots)
		}
		j.state = jobDone
		j.done <- j // never blocks: the caller's channel has room for its jobs
	}
}

// evaluate answers the job's question. A panic is an error of this question.
func (s *scheduler) evaluate(j *job) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic while deciding", "panic", r, "tenant", j.tenant, j.question.Attrs(), "stack", string(debug.Stack()))
			j.decision, j.err = policy.Decision{}, ErrPanic
		}
	}()
	if j.cancel.Cancelled() {
		j.err = ErrDeadline
		return
	}
	if j.input, j.err = j.question.Input.Input(j.needs); j.err != nil {
		return
	}
	j.made.Store(true)
	ctx := context.Background()
	if j.span != nil {
		ctx = trace.ContextWithSpan(ctx, j.span)
	}
	if g := j.guard; g != nil {
		j.decision, j.err = j.guarding.policy.Decide(ctx, g.settings.Entry, j.input, g.env(), &j.cancel)
		if j.err != nil {
			j.err = fmt.Errorf("%w: %w", ErrGuard, j.err)
		}
		if j.err != nil || !j.decision.Allowed {
			return
		}
	}
	j.cleared.Store(true)
	var observed *policy.Observed
	if j.observes {
		observed = &j.observed
	}
	if j.question.Value {
		var v ast.Value
		if v, j.err = j.policy.EvalObserved(ctx, j.entry, j.input, j.env, &j.cancel, observed); j.err == nil {
			j.decision = valueDecision(v)
		}
		return
	}
	j.decision, j.err = j.policy.DecideObserved(ctx, j.entry, j.input, j.env, &j.cancel, observed)
}

// valueDecision is the Decision of a question for a value.
func valueDecision(v ast.Value) policy.Decision {
	d := policy.Decision{Value: v}
	if obj, ok := v.(ast.Object); ok {
		if allowed := obj.Get(keyAllowed); allowed != nil {
			v = allowed.Value
		}
	}
	d.Allowed = v.Compare(ast.Boolean(true)) == 0
	return d
}

var keyAllowed = ast.StringTerm("allowed")

// jobList is a list of jobs, linked through them.
type jobList struct {
	first, last *job
	len         int
}

func (l *jobList) push(j *job) {
	j.prev, j.next = l.last, nil
	if l.last != nil {
		l.last.next = j
	} else {
		l.first = j
	}
	l.last = j
	l.len++
}

func (l *jobList) pop() *job {
	j := l.first
	if j != nil {
		l.remove(j)
	}
	return j
}

func (l *jobList) remove(j *job) {
	if j.prev != nil {
		j.prev.next = j.next
	} else {
		l.first = j.next
	}
	if j.next != nil {
		j.next.prev = j.prev
	} else {
		l.last = j.prev
	}
	j.prev, j.next = nil, nil
	l.len--
}

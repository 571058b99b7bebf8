package tenants

import (
	"context"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// Bounds of the scheduler.
const (
	// tenantWaiting bounds the questions of one tenant that wait for a slot.
	tenantWaiting = 1000
	// totalWaiting bounds those of all tenants.
	totalWaiting = 10_000
	// extraWorkers bounds the workers that stand in for stuck ones.
	extraWorkers = 64
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
	base    int       // workers there are when none is stuck
	workers int       // workers there are
	stuck   int       // workers whose caller has left
	stopped bool
	running jobList // on a worker

	wg sync.WaitGroup
}

// slots is a tenant's share of the scheduler. Its fields are the scheduler's.
type slots struct {
	limit  int
	active int
	queue  jobList
}

// job is one question on its way through the scheduler. It is used again for
// other questions unless its caller left it.
type job struct {
	// Set by the caller before submit.
	slots    *slots
	policy   *policy.Policy
	env      *policy.Env
	entry    string
	question *Question
	needs    Needs
	index    int       // the question's place in its batch
	deadline time.Time // the caller waits no longer
	done     chan<- *job

	cancel policy.Cancel

	// Set by the worker before the job is sent to done.
	input    ast.Value
	decision policy.Decision
	err      error

	// The scheduler's.
	state      jobState
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

func newScheduler(workers int, log *slog.Logger) *scheduler {
	s := &scheduler{log: log, base: workers}
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

// submit queues j. It returns ErrBusy when too much waits already.
func (s *scheduler) submit(j *job) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopped:
		return fmt.Errorf("%w: stopping", ErrNotReady)
	case j.slots.active < j.slots.limit:
		j.slots.active++
		s.ready(j)
		return nil
	case j.slots.queue.len >= tenantWaiting:
		return fmt.Errorf("%w: %d questions wait for its %d slots", ErrBusy, j.slots.queue.len, j.slots.limit)
	case s.waiting >= totalWaiting:
		return fmt.Errorf("%w: %d questions of all tenants wait", ErrBusy, s.waiting)
	}
	s.waiting++
	j.state = jobQueued
	j.slots.queue.push(j)
	return nil
}

func (s *scheduler) ready(j *job) {
	j.state = jobReady
	s.run.push(j)
	s.work.Signal()
}

// leave is called by a caller that no longer waits for j. It returns jobLeft
// while a worker still has the job, jobDone when its result already is in the
// caller's channel, and jobIdle when the job is the caller's again.
func (s *scheduler) leave(j *job) jobState {
	j.cancel.Cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	switch j.state {
	case jobQueued:
		j.slots.queue.remove(j)
		s.waiting--
		j.state = jobIdle
	case jobReady:
		s.run.remove(j)
		s.release(j.slots)
		j.state = jobIdle
	case jobRunning:
		j.state = jobLeft
		s.stuck++
		if !s.stopped && s.workers < s.base+min(s.stuck, extraWorkers) {
			s.hire()
		}
	}
	return j.state
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
		j.state = jobRunning
		s.running.push(j)
		s.mu.Unlock()

		s.evaluate(j)

		s.mu.Lock()
		s.running.remove(j)
		s.release(j.slots)
		if j.state == jobLeft {
			s.stuck--
			continue
		}
		j.state = jobDone
		j.done <- j // never blocks: the caller's channel has room for its jobs
	}
}

// evaluate answers the job's question. A panic is an error of this question.
func (s *scheduler) evaluate(j *job) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic while deciding", "panic", r, "decision_id", j.question.DecisionID, "stack", string(debug.Stack()))
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
	j.decision, j.err = j.policy.Decide(context.Background(), j.entry, j.input, j.env, &j.cancel)
}

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

package tenants

import (
	"runtime"
	"sync"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// turns are the questions of one call, which are taken one after the other.
//
// A call with several questions begins as many jobs as it may have at once. The
// worker of each, when it has answered a question, takes the next one that nobody
// has taken, and the caller need not be woken for that: it collects the answers
// that are held for it. No question waits for another that takes long, since none
// is taken before its worker is free.
//
// A worker that has had its share lets those go first who wait for it or for the
// tenant's slot.
type turns struct {
	questions []Question
	shared    bool          // workers take questions by themselves
	bytes     int64         // of the largest body of a question
	wake      chan struct{} // has room for one: there are answers to collect
	left      bool          // a job that shares was left on its worker; the caller's own
	spare     []kept        // the caller's own: room for held

	mu    sync.Mutex
	next  int    // the first question that nobody has taken; guarded by mu
	held  []kept // answers that wait for the caller; guarded by mu
	size  int64  // of the bodies of their questions; guarded by mu
	eager bool   // the caller is to be woken for each; guarded by mu
}

// kept is the answer to a question, which its worker has left behind.
type kept struct {
	index int
	result
}

const (
	// share is how long a worker goes on with the questions of one call before it
	// looks who else waits.
	share = 500 * time.Microsecond
	// maxHeld bounds the answers that are held for one caller, and maxHeldBytes
	// the bodies of their questions.
	maxHeld      = 64
	maxHeldBytes = 1 << 20
	// collectTime is how long answers are held, where more come meanwhile: a
	// caller that is woken for each costs more than many a question.
	collectTime = time.Millisecond
)

// begin begins with the questions of a call. Where one may turn out not to be
// needed, each is taken by the caller, when those before it are answered.
func (t *turns) begin(questions []Question, bodyBytes int64) {
	t.questions, t.shared, t.bytes = questions, len(questions) > 1, 0
	for i := range questions {
		t.bytes = max(t.bytes, min(questions[i].BodyBytes, bodyBytes))
		t.shared = t.shared && questions[i].Needed == nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next, t.size, t.eager = 0, 0, false
}

// free forgets the questions. No job has any of them.
func (t *turns) free() {
	t.questions = nil
	select {
	case <-t.wake:
	default:
	}
}

// take takes the first question that nobody has taken; false: there is none, or
// one that may not be needed, while others are open.
func (t *turns) take(open bool) (i int, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.next == len(t.questions) || open && t.questions[t.next].Needed != nil {
		return 0, false
	}
	t.next++
	return t.next - 1, true
}

// next leaves behind what the worker of j has found out, and puts the next
// question into j. It reports false where j ends as it is: there is no other
// question, it is not j's worker's to take, or the caller is to collect first.
func (c *call) next(j *job) bool {
	now := time.Now()
	if now.Sub(j.begun) >= share {
		runtime.Gosched() // else nobody looks at the network on this processor
		now = time.Now()
		if !c.pool.sched.goOn(j, now) {
			return false
		}
	}
	t := &c.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	if j.left || j.trial || t.next == len(t.questions) || c.pool.sched.stopping.Load() ||
		len(t.held) == maxHeld || t.size >= maxHeldBytes {
		return false
	}
	q := &t.questions[t.next]
	entry, err := c.in.entryOf(q)
	deadline := c.deadline(now)
	if err != nil || c.ctx.Err() != nil || !now.Before(deadline) {
		return false // the caller says so
	}
	t.held = append(t.held, kept{j.index, c.resultOf(j)})
	t.size += j.question.BodyBytes
	if t.eager {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
	j.ended = true
	j.cancel.Reset()
	if c.pool.sched.stopping.Load() {
		j.cancel.Cancel()
	}
	j.made.Store(false)
	j.cleared.Store(false)
	j.input, j.decision, j.err, j.observed, j.span = nil, policy.Decision{}, nil, policy.Observed{}, nil
	i := t.next
	t.next++
	c.put(j, i, q, entry, now, deadline, c.span(q, now))
	return true
}

// collect answers what workers have left behind, and returns how much that was.
// Where there was nothing for a while, the next is told at once.
func (c *call) collect(waited bool) int {
	t := &c.turns
	if !t.shared {
		return 0
	}
	t.mu.Lock()
	got := t.held
	t.held, t.size = t.spare[:0], 0
	t.eager = len(got) == 0 && (t.eager || waited)
	t.mu.Unlock()
	for k := range got {
		c.answer(got[k].index, &t.questions[got[k].index], &got[k].result)
	}
	clear(got)
	t.spare = got[:0]
	return len(got)
}

// wakeAt is when the caller has to look after its jobs, if none ends before: when
// the first is due, or there may be answers to collect.
func (c *call) wakeAt() (at time.Time) {
	t := &c.turns
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, j := range c.open {
		if i == 0 || j.deadline.Before(at) {
			at = j.deadline
		}
	}
	if t.shared && !t.eager {
		if soon := time.Now().Add(collectTime); soon.Before(at) {
			return soon
		}
	}
	return at
}

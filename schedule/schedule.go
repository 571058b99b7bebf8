// Package schedule does what must be done again and again for thousands of
// tenants, at its time, on a few workers: polls of bundles, reports of status,
// uploads of decision logs.
//
// In the common case a task sleeps in a heap until it is due, is taken by a free
// worker, and says when it wants to be done next. A task that sleeps owns no
// goroutine.
//
// What others lean on: a task never runs twice at once. Tasks of one lane, which
// is those that lean on one service, take at most LaneWorkers of the workers;
// those that take long share SlowWorkers: a service that is slow or stalled holds
// up no other. Times are jittered by who sets them.
package schedule

import (
	"container/heap"
	"context"
	"sync"
	"time"
)

// Bounds of a Schedule.
const (
	// Workers is how many tasks are done at once, LaneWorkers how many of one
	// lane, SlowWorkers how many that take longer than Fast.
	Workers     = 64
	LaneWorkers = 16
	SlowWorkers = 16

	// Fast is how long a task may take that is not known to take long.
	Fast = time.Second
)

// Do does a task once. It returns how long to wait before it is done again;
// negative: until somebody calls At. A task that is not done patiently should
// end within Fast: if it needs more it returns slow, and is done again with
// patience when one of the SlowWorkers is free; so is one that was patient and
// took long, the next time. Do must return soon after ctx ends.
type Do func(ctx context.Context, patient bool) (wait time.Duration, slow bool)

// Schedule holds tasks and does them while it runs. Its methods may be called
// by any number of goroutines.
type Schedule struct {
	long int // tasks that may wait long at once

	mu      sync.Mutex
	queue   taskQueue
	lanes   map[string]*lane // those in which tasks run or wait, by name
	slow    lane
	ready   []turn // waited for their lane, and have a place there now
	waiting int    // long waits that go on

	wake  chan struct{} // has room for one: the queue changed
	waits sync.WaitGroup
}

// New returns a Schedule in which at most long tasks wait long at once (see
// Task.Long).
func New(long int) *Schedule {
	return &Schedule{
		long:  long,
		lanes: map[string]*lane{},
		slow:  lane{limit: SlowWorkers},
		wake:  make(chan struct{}, 1),
	}
}

// Task is one thing that is done again and again.
type Task struct {
	s    *Schedule
	lane string
	do   Do

	// Guarded by s.mu.
	due     time.Time
	again   time.Time // when At wanted it, while it was being done; zero: it did not
	index   int       // in the queue; -1: not there
	waits   bool      // in the list of its lane
	running bool
	slow    bool // took long the last time
	stopped bool
}

// NewTask returns a task that leans on what lane names. It is not done before
// At says so.
func (s *Schedule) NewTask(lane string, do Do) *Task {
	return &Task{s: s, lane: lane, do: do, index: -1}
}

// At has the task done at that time, or before.
func (t *Task) At(when time.Time) {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	t.at(when)
}

// at is At; s.mu is held.
func (t *Task) at(when time.Time) {
	switch {
	case t.stopped || t.waits:
		return
	case t.running:
		if t.again.IsZero() || when.Before(t.again) {
			t.again = when
		}
		return
	case t.index < 0:
		t.due = when
		heap.Push(&t.s.queue, t)
	case when.Before(t.due):
		t.due = when
		heap.Fix(&t.s.queue, t.index)
	default:
		return
	}
	t.s.rouse()
}

// Stop ends the task. Where it is being done, that is not waited for.
func (t *Task) Stop() {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	t.stopped = true
	if t.index >= 0 {
		heap.Remove(&t.s.queue, t.index)
	}
}

// Long runs wait apart from the workers, so that it may take minutes, and then
// has the task done at once. It reports false, and does not run it, where as many
// as may already wait long. It is called from within the task's Do, which then
// returns a negative wait.
func (t *Task) Long(ctx context.Context, wait func(context.Context)) bool {
	s := t.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting >= s.long || t.stopped || ctx.Err() != nil {
		return false
	}
	s.waiting++
	s.waits.Go(func() {
		wait(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		s.waiting--
		t.at(time.Now())
	})
	return true
}

// Stats are figures of a Schedule at one moment, in tasks.
type Stats struct {
	Sleeping int // until they are due
	Waiting  int // due, and waiting for a worker or for their lane
	Running  int
	Long     int // waiting long, apart from the workers
}

// Stats returns the figures of this moment.
func (s *Schedule) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{Running: s.slow.running, Waiting: len(s.slow.waiting), Long: s.waiting}
	now := time.Now()
	for _, t := range s.queue {
		if t.due.After(now) {
			st.Sleeping++
		} else {
			st.Waiting++
		}
	}
	for _, l := range s.lanes {
		st.Running += l.running
		st.Waiting += len(l.waiting)
	}
	return st
}

// rouse has Run look at the schedule.
func (s *Schedule) rouse() {
	select {
	case s.wake <- struct{}{}:
	default: // it will anyway
	}
}

// Run does the tasks until ctx ends, and then waits for those that are being
// done.
func (s *Schedule) Run(ctx context.Context) {
	work := make(chan turn)
	var wg sync.WaitGroup
	for range Workers {
		wg.Go(func() {
			for t := range work {
				s.do(ctx, t)
			}
		})
	}
	defer s.waits.Wait()
	defer wg.Wait()
	defer close(work)

	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		t, wait := s.next()
		if t.task == nil {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-s.wake:
			case <-ctx.Done():
				return
			}
			continue
		}
		select {
		case work <- t:
		case <-ctx.Done():
			return
		}
	}
}

// turn is a task that is to be done, and the lane in which it has a place.
type turn struct {
	task *Task
	lane *lane
}

// do does a task, in its turn.
func (s *Schedule) do(ctx context.Context, turn turn) {
	patient := turn.lane == &s.slow
	begun := time.Now()
	wait, slow := turn.task.do(ctx, patient)
	now := time.Now()

	s.mu.Lock()
	defer s.mu.Unlock()
	t := turn.task
	t.running = false
	t.slow = slow || patient && now.Sub(begun) > Fast
	next := now.Add(wait)
	switch {
	case slow && !patient:
		next = now
	case wait < 0:
		next = t.again
	case !t.again.IsZero() && t.again.Before(next):
		next = t.again
	}
	t.again = time.Time{}
	if !next.IsZero() {
		t.at(next)
	}
	s.leave(turn)
}

// next takes the task that is due and whose lane has room, or returns how long
// to wait for one.
func (s *Schedule) next() (turn, time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.ready) > 0 {
		t := s.ready[0]
		s.ready[0] = turn{}
		s.ready = s.ready[1:]
		if t.task.stopped {
			s.leave(t)
			continue
		}
		return t, 0
	}
	for len(s.queue) > 0 {
		if wait := time.Until(s.queue[0].due); wait > 0 {
			return turn{}, wait
		}
		t := heap.Pop(&s.queue).(*Task)
		l := s.laneOf(t)
		if l.running < l.limit {
			l.running++
			t.running = true
			return turn{t, l}, 0
		}
		t.waits = true
		l.waiting = append(l.waiting, t)
	}
	return turn{}, time.Hour
}

// lane is a share of the workers. What waits for it is no longer in the queue.
type lane struct {
	limit   int
	running int
	waiting []*Task
}

// laneOf returns the lane of a task: its own, or that of all tasks which take
// long. s.mu is held.
func (s *Schedule) laneOf(t *Task) *lane {
	if t.slow {
		return &s.slow
	}
	l := s.lanes[t.lane]
	if l == nil {
		l = &lane{limit: LaneWorkers}
		s.lanes[t.lane] = l
	}
	return l
}

// leave gives back a place in a lane, to the task that waited for it longest.
// That task has the place from now on: were it only due again, and stopped before
// its turn, nobody would wake those behind it. s.mu is held.
func (s *Schedule) leave(t turn) {
	l := t.lane
	l.running--
	for len(l.waiting) > 0 && l.running < l.limit {
		w := l.waiting[0]
		l.waiting[0] = nil
		l.waiting = l.waiting[1:]
		w.waits = false
		if !w.stopped {
			l.running++
			w.running = true
			s.ready = append(s.ready, turn{w, l})
		}
	}
	if l.running == 0 && l != &s.slow {
		delete(s.lanes, t.task.lane)
	}
	s.rouse()
}

// taskQueue is a heap of tasks by the time they are due.
type taskQueue []*Task

func (q taskQueue) Len() int { return len(q) }

func (q taskQueue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

func (q taskQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *taskQueue) Push(x any) {
	t := x.(*Task)
	t.index = len(*q)
	*q = append(*q, t)
}

func (q *taskQueue) Pop() any {
	last := len(*q) - 1
	t := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	t.index = -1
	return t
}

package decisionlog

import (
	"context"
	"sync"
	"time"
)

// queue are the logs that have work for a worker, in the order in which they asked.
type queue struct {
	mu   sync.Mutex
	logs ring[Log] // guarded by mu

	// Each has room for one: there is work, which may wait for more to gather,
	// or may not.
	wake, hurry chan struct{}
}

func newQueue() queue {
	return queue{wake: make(chan struct{}, 1), hurry: make(chan struct{}, 1)}
}

// put puts a log at the end, which must not be there.
func (q *queue) put(l *Log, hurry bool) {
	q.mu.Lock()
	q.logs.push(l)
	q.mu.Unlock()
	if hurry {
		q.rouse()
		return
	}
	select {
	case q.wake <- struct{}{}:
	default: // a worker comes anyway
	}
}

// rouse has a worker come at once.
func (q *queue) rouse() {
	select {
	case q.hurry <- struct{}{}:
	default:
	}
}

// take takes the first log, nil if there is none. Where there are more, it sees to
// it that another worker comes.
func (q *queue) take() *Log {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.logs.n == 0 {
		return nil
	}
	l := q.logs.pop()
	if q.logs.n > 0 {
		q.rouse()
	}
	return l
}

// gather is how long events may gather before a worker takes them. Request paths
// wake a worker no more often.
const gather = 10 * time.Millisecond

// wait waits until there is work, and then a little for more, or until ctx ends.
func (q *queue) wait(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-q.hurry:
		return
	case <-q.wake:
	}
	timer := time.NewTimer(gather)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-q.hurry:
	case <-timer.C:
	}
}

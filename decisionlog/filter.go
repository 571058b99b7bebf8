package decisionlog

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
)

const (
	// grace is how long a filter may take to notice that its time is over.
	grace = 50 * time.Millisecond

	// maxStuck is how many evaluations may go on that nobody waits for any
	// more. Where there are as many, no filter is asked.
	maxStuck = 32

	// After failuresInRow failures of one filter, one after the other, events
	// are dropped without asking it for pauseFactor times as long as the
	// failures took: a filter that always fails has that share of a worker.
	failuresInRow = 10
	pauseFactor   = 10
)

var (
	errStuck        = errors.New("an earlier evaluation does not end")
	errTooManyStuck = errors.New("too many evaluations of all tenants do not end")
	errPaused       = errors.New("evaluation failed many times in a row")
	errAbandoned    = errors.New("evaluation does not end in time")
)

// filtering is what a log knows of the filters of its events. It is owned by the
// worker whose turn it is, but for stuck.
type filtering struct {
	stuck atomic.Bool // an evaluation of this log's goes on that nobody waits for

	filter Filter        // failed last; nil: none has since another did not
	inRow  int           // its failures
	took   time.Duration // what these took, since it last was paused
	until  time.Time     // it is not asked before, where inRow is many
}

// evaluator asks filters for a worker, on a goroutine of its own: it stays the
// same as long as evaluations end in time, so that its stack is grown but once,
// and is left behind with one that does not.
type evaluator struct {
	stuck *atomic.Int64 // evaluations of all workers that nobody waits for
	jobs  chan *evaluation
}

// evaluation is one question to a filter.
type evaluation struct {
	ctx   context.Context
	ask   func(context.Context)
	err   error // the panic that ended it
	done  chan struct{}
	state atomic.Int32 // of the states below
	after func()       // called once it has ended, if it was left
}

const (
	evaluating int32 = iota
	evaluated
	abandoned
)

func (ev *evaluator) run(jobs <-chan *evaluation) {
	for j := range jobs {
		if j.run() {
			return // another goroutine is in the place of this one
		}
	}
}

// run asks the filter and reports whether nobody has waited for that.
func (j *evaluation) run() (left bool) {
	defer func() {
		if p := recover(); p != nil {
			j.err = fmt.Errorf("panic: %v", p)
		}
		if left = !j.state.CompareAndSwap(evaluating, evaluated); left {
			j.after()
		} else {
			close(j.done)
		}
	}()
	j.ask(j.ctx)
	return false
}

// ask runs f with a context that ends after limit. It returns an error where f
// panics, or does not return soon after that; whatever f writes must then not be
// read. From then on, and until f returns, l has a stuck evaluation.
func (ev *evaluator) ask(l *Log, limit time.Duration, f func(context.Context)) error {
	ctx, cancel := context.WithTimeout(l.logs.life, limit)
	defer cancel()
	if ev.jobs == nil {
		ev.jobs = make(chan *evaluation)
		go ev.run(ev.jobs)
	}
	j := &evaluation{ctx: ctx, ask: f, done: make(chan struct{}), after: func() {
		l.filtering.stuck.Store(false)
		ev.stuck.Add(-1)
	}}
	ev.jobs <- j
	timer := time.NewTimer(limit + grace)
	defer timer.Stop()
	select {
	case <-j.done:
		return j.err
	case <-timer.C:
	}
	ev.stuck.Add(1)
	l.filtering.stuck.Store(true)
	if !j.state.CompareAndSwap(evaluating, abandoned) {
		j.after()
		return j.err
	}
	ev.jobs = nil
	return errAbandoned
}

// stop ends the goroutine.
func (ev *evaluator) stop() {
	if ev.jobs != nil {
		close(ev.jobs)
		ev.jobs = nil
	}
}

// ask is evaluator.ask for an f that has a result.
func ask[T any](ev *evaluator, l *Log, f func(context.Context) (T, error)) (T, error) {
	var answer struct {
		value T
		err   error
	}
	a := &answer // f's own, in case nobody waits for it
	if err := ev.ask(l, l.set.FilterTime, func(ctx context.Context) { a.value, a.err = f(ctx) }); err != nil {
		var none T
		return none, err
	}
	return a.value, a.err
}

// filter asks the event's filter what is to be done with it: drop reports whether
// it is not to be delivered, rules are what is to be masked. After many failures
// in a row there are errors without asking, for a while.
func (w *worker) filter(l *Log, e *Event) (drop bool, rules []maskRule, err error) {
	fl := &l.filtering
	switch {
	case fl.stuck.Load():
		return false, nil, errStuck
	case w.evaluator.stuck.Load() >= maxStuck:
		return false, nil, errTooManyStuck
	case fl.filter == e.Filter && fl.inRow >= failuresInRow && time.Now().Before(fl.until):
		return false, nil, errPaused
	}
	begun := time.Now()
	drop, rules, err = w.evaluate(l, e)
	if fl.filter != e.Filter || err == nil {
		fl.filter, fl.inRow, fl.took = nil, 0, 0
	}
	if err == nil {
		return drop, rules, nil
	}
	now := time.Now()
	fl.filter = e.Filter
	fl.inRow++
	fl.took += now.Sub(begun)
	if fl.inRow >= failuresInRow {
		fl.until = now.Add(pauseFactor * fl.took)
		fl.took = 0
	}
	return false, nil, err
}

func (w *worker) evaluate(l *Log, e *Event) (drop bool, rules []maskRule, err error) {
	event, err := e.value(l.set.Labels, w.json)
	if err != nil {
		return false, nil, err
	}
	drop, err = ask(&w.evaluator, l, func(ctx context.Context) (bool, error) { return e.Filter.Drop(ctx, event) })
	if err != nil {
		return false, nil, fmt.Errorf("drop rule: %w", err)
	}
	if drop {
		return true, nil, nil
	}
	mask, err := ask(&w.evaluator, l, func(ctx context.Context) (ast.Value, error) { return e.Filter.Mask(ctx, event) })
	if err == nil && mask != nil {
		rules, err = maskRules(mask)
	}
	if err != nil {
		return false, nil, fmt.Errorf("mask rule: %w", err)
	}
	return false, rules, nil
}

package decisionlog

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/schedule"
)

const (
	minRetry   = 100 * time.Millisecond // after a failure, at least
	maxRetry   = time.Minute            // after many, and for a sink that says nothing else
	drainRetry = time.Second            // the same, when the process is to end

	// maxRefusals is how often a service may say that a chunk is no good, with
	// status 400 or 422, before it is believed and the chunk dropped. With any
	// other status the chunk is sent again, as OPA does.
	maxRefusals = 5

	// busyRetry is when a delivery is tried again for which its lane has no
	// room.
	busyRetry = time.Second

	// lineBytes is how much is written to a file or the console at once.
	lineBytes = 64 << 10
)

// outlet is what one log has for one of its sinks: events that gather, chunks of
// them in order, and the task that delivers these.
type outlet struct {
	log  *Log
	sink Sink
	kind kind

	// Guarded by log.mu.
	task    *schedule.Task
	stage   stage
	upTo    uint64 // pushed when stage became wantSeal: these events are waited for
	timed   bool   // the task is due after a delay
	sealing bool   // a worker makes a chunk of what gathered
	open    gathering
	chunks  []*chunk // oldest first; the first is delivered by flying
	bytes   int64    // that these hold
	flying  *attempt // nil: none goes on
	shape   shape
	fails   int       // attempts that failed, since one did not
	retryAt time.Time // where fails > 0
	err     error     // of the last attempt
}

// stage is what is to happen to the chunks of a sink that has them sent.
type stage uint8

const (
	resting  stage = iota // nothing, before the task is due
	wantSeal              // what gathers is to become a chunk, too; a worker is to come
	sending               // they are delivered, until none is left
)

// attempt is one delivery of a chunk.
type attempt struct {
	chunk *chunk
	done  chan struct{}

	// Guarded by log.mu.
	left    bool // the task does not wait for it
	settled bool // its chunk has been dropped
}

func newOutlet(l *Log, sink Sink) *outlet {
	r := &l.set.Reporting
	o := &outlet{log: l, sink: sink, kind: sink.kind(), shape: newShape(r.UploadBytes, r.BufferBytes)}
	if o.kind.direct() {
		o.shape.gather = min(lineBytes, o.shape.space)
	}
	o.task = l.logs.cfg.Schedule.NewTask(sink.lane(), o.do)
	return o
}

// texts are an event as sinks want it.
type texts struct {
	json   []byte // most of them
	line   []byte // the console
	record []byte // Records
}

// pick returns the text that goes to the sink.
func (o *outlet) pick(t texts) []byte {
	switch o.kind {
	case kindConsole:
		return t.line
	case kindRecords:
		return t.record
	}
	return t.json
}

// wantsSeal reports whether what gathers is to become a chunk at the end of a
// worker's turn. Lines do at once, unless others wait: then they gather. log.mu is
// held.
func (o *outlet) wantsSeal() bool {
	if o.kind.direct() {
		return len(o.chunks) == 0 && len(o.open.lens) > 0
	}
	return o.stage == wantSeal && o.log.pushed-uint64(o.log.ring.n) >= o.upTo
}

// seal makes chunks of what gathers. It is called by the worker whose turn it is.
func (o *outlet) seal() {
	l := o.log
	l.mu.Lock()
	g, limit, most := o.open, o.shape.limit, o.shape.most
	o.open = gathering{}
	l.mu.Unlock()

	var chunks []*chunk
	var lost []gathering
	if o.kind.direct() {
		if len(g.lens) > 0 {
			chunks = []*chunk{lines(g)}
		}
	} else {
		chunks, lost = pack(o.kind, g, limit, most)
	}
	if !o.kind.direct() || len(g.blocks) > 1 { // chunks have bytes of their own, and of what is lost only the number counts
		freeBlocks(g.blocks)
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	o.sealing = false
	body := 0
	for _, c := range chunks {
		body += len(c.body)
	}
	if !o.kind.direct() {
		o.shape.packed(g.size, body)
	}
	o.replace(len(o.chunks), g.held(), chunks, lost)
}

// replace puts chunks in the place of something that held so many bytes, and
// counts the events that were lost on the way. log.mu is held.
func (o *outlet) replace(at int, held int64, chunks []*chunk, lost []gathering) {
	for _, c := range chunks {
		held -= c.held()
	}
	o.chunks = slices.Insert(o.chunks, at, chunks...)
	o.bytes -= held
	o.log.give(held)
	for _, g := range lost {
		o.settle(len(g.lens), g.tickets, dropTooLarge)
	}
}

// settle counts events that the sink has, or will never have. log.mu is held.
func (o *outlet) settle(n int, tickets []*ticket, why reason) {
	l := o.log
	l.logs.metrics.settled(o.kind, n, why)
	if len(tickets) == 0 {
		l.count(n, why)
		return
	}
	for _, t := range tickets {
		if t.reason == notDropped {
			t.reason = why
		}
		if t.left--; t.left == 0 {
			l.count(1, t.reason)
		}
	}
}

// shift takes the first chunk away. log.mu is held.
func (o *outlet) shift(why reason) { o.remove(0, why) }

func (o *outlet) remove(i int, why reason) {
	c := o.take(i)
	o.settle(len(c.lens), c.tickets, why)
}

// shiftPartly takes the first chunk away, of which the sink has all events but the
// first so many. log.mu is held.
func (o *outlet) shiftPartly(refused int) {
	c := o.take(0)
	first, rest := c.tickets, c.tickets
	if len(c.tickets) > 0 {
		first, rest = c.tickets[:refused], c.tickets[refused:]
	}
	if refused > 0 {
		o.settle(refused, first, dropRejected)
	}
	if n := len(c.lens) - refused; n > 0 {
		o.settle(n, rest, notDropped)
	}
}

// take takes a chunk out, before its events are settled. log.mu is held.
func (o *outlet) take(i int) *chunk {
	c := o.chunks[i]
	o.chunks = slices.Delete(o.chunks, i, i+1)
	o.bytes -= c.held()
	o.log.give(c.held())
	return c
}

// waiting is the index of the first chunk that is not being delivered.
func (o *outlet) waiting() int {
	if o.flying != nil && !o.flying.settled {
		return 1
	}
	return 0
}

// droppable reports whether there is something to drop. log.mu is held.
func (o *outlet) droppable() bool {
	return len(o.chunks) > o.waiting() || len(o.open.lens) > 0
}

// dropOldest drops the first chunk that is not being delivered, or the first event
// of those that gather. There must be something droppable. log.mu is held.
func (o *outlet) dropOldest() {
	if i := o.waiting(); len(o.chunks) > i {
		o.remove(i, dropFull)
		return
	}
	o.dropOpen(1, dropFull)
}

// dropOpen drops the first n events of those that gather. log.mu is held.
func (o *outlet) dropOpen(n int, why reason) {
	held := o.open.held()
	first := o.open.cut(n)
	held -= o.open.held()
	o.bytes -= held
	o.log.give(held)
	o.settle(n, first.tickets, why)
}

// dropAll drops all that is not being delivered. log.mu is held.
func (o *outlet) dropAll(why reason) {
	for len(o.chunks) > o.waiting() {
		o.remove(o.waiting(), why)
	}
	if n := len(o.open.lens); n > 0 {
		o.dropOpen(n, why)
	}
}

// flush has all delivered soon. log.mu is held.
func (o *outlet) flush() {
	l := o.log
	o.retryAt = time.Time{}
	switch {
	case o.kind.direct():
		o.task.At(time.Now())
	case o.stage == wantSeal:
	case len(o.open.lens) > 0 || l.ring.n > 0 || l.queued:
		o.want()
	case len(o.chunks) > 0:
		o.stage = sending
		o.task.At(time.Now())
	}
}

// want has a worker seal what gathers, and then all delivered. log.mu is held.
func (o *outlet) want() {
	o.stage, o.upTo = wantSeal, o.log.pushed
	o.log.ask(true)
}

// plan sees to it that the task is due when it should be. It is called at the end
// of a worker's turn; log.mu is held.
func (o *outlet) plan() {
	now := time.Now()
	l := o.log
	switch {
	case l.closed || o.flying != nil || o.fails > 0 && now.Before(o.retryAt): // the task is due as it is
	case o.kind.direct():
		if o.bytes > 0 {
			o.task.At(now)
		}
	case o.stage == sending:
		o.task.At(now)
	case o.stage == resting && o.ready():
		o.stage = sending
		o.task.At(now)
	case o.stage == resting && !o.timed && o.bytes > 0 && l.delivers():
		o.timed = true
		o.task.At(now.Add(l.delay()))
	}
}

// ready reports whether the chunks are to be delivered before their time.
func (o *outlet) ready() bool {
	if len(o.chunks) == 0 {
		return false
	}
	l := o.log
	if l.hurried() || l.set.Reporting.Trigger == Immediate {
		return true
	}
	return l.set.Reporting.Trigger == Periodic &&
		(o.bytes >= l.set.Reporting.BufferBytes/4 || l.logs.used.Load() >= l.logs.cfg.Memory/2)
}

// hurried reports whether what is buffered is to be delivered as soon as it can
// be. mu is held.
func (l *Log) hurried() bool { return l.draining || !l.retired.IsZero() }

// delivers reports whether what is buffered is delivered without being asked for.
// mu is held.
func (l *Log) delivers() bool { return l.set.Reporting.Trigger != Manual || l.hurried() }

// delay is the time to the next delivery.
func (l *Log) delay() time.Duration {
	r := &l.set.Reporting
	if l.hurried() {
		return min(r.MinDelay, rand.N(time.Second))
	}
	return r.MinDelay + rand.N(r.MaxDelay-r.MinDelay+1)
}

// count counts events that are buffered no more. mu is held.
func (l *Log) count(n int, why reason) {
	if why == notDropped {
		l.books.delivered += uint64(n)
	} else {
		l.drop(why, n)
	}
}

// do is the task: it delivers chunks, one after the other, in order.
func (o *outlet) do(ctx context.Context, patient bool) (wait time.Duration, slow bool) {
	begun := time.Now()
	var late <-chan time.Time // when to leave the attempt that goes on
	if !patient || o.kind.direct() {
		timer := time.NewTimer(schedule.Fast)
		defer timer.Stop()
		late = timer.C
	}
	for time.Since(begun) < schedule.Fast {
		a, wait := o.next()
		if a == nil {
			return wait, false
		}
		select {
		case <-a.done:
		case <-ctx.Done():
			return -1, false
		case <-late:
			if !o.kind.direct() {
				return 0, true
			}
			if o.leave(a) {
				return -1, false
			}
		}
	}
	return 0, false
}

// leave says that the task does not wait for an attempt: its end will have the
// task done. It reports false where it has ended.
func (o *outlet) leave(a *attempt) bool {
	o.log.mu.Lock()
	defer o.log.mu.Unlock()
	a.left = o.flying == a
	return a.left
}

// next returns the attempt that goes on, or begins the next, or returns how long
// to wait for one.
func (o *outlet) next() (*attempt, time.Duration) {
	l := o.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if o.flying != nil {
		return o.flying, 0
	}
	if l.closed {
		return nil, -1
	}
	if wait := time.Until(o.retryAt); o.fails > 0 && wait > 0 {
		return nil, wait
	}
	if len(o.chunks) == 0 || o.stage != sending && !o.kind.direct() {
		if wait, ok := o.rest(); !ok {
			return nil, wait
		}
	}
	if !l.logs.shared.enter(o.sink.lane()) {
		return nil, busyRetry + rand.N(busyRetry)
	}
	a := &attempt{chunk: o.chunks[0], done: make(chan struct{})}
	o.flying = a
	l.logs.attempts.Go(func() { o.attempt(a) })
	return a, 0
}

// rest is called when no chunk is to be delivered. It reports whether there is one
// now, or returns how long to wait for one. log.mu is held.
func (o *outlet) rest() (wait time.Duration, ok bool) {
	l := o.log
	if o.kind.direct() {
		if len(o.open.lens) == 0 || o.sealing {
			return -1, false
		}
		g := o.open
		o.open = gathering{}
		o.replace(0, g.held(), []*chunk{lines(g)}, nil)
		return 0, true
	}
	o.timed = false // whatever the task was due for, it is being done
	pending := o.bytes > 0 || l.ring.n > 0 || l.queued
	switch {
	case o.sealing || o.stage == wantSeal: // the worker will have the task done
		return -1, false
	case o.stage == sending && pending && !l.hurried():
		o.stage = resting
		if o.timed = l.delivers(); o.timed {
			return l.delay(), false
		}
	case pending:
		o.want()
	default:
		o.stage = resting
	}
	return -1, false
}

// attempt delivers a chunk once.
func (o *outlet) attempt(a *attempt) {
	l := o.log
	ls := l.logs
	begun := time.Now()
	ctx, span := o.traced(ls.life, a.chunk)
	err := o.sink.deliver(ctx, &ls.shared, a.chunk)
	span.ended(err)
	ls.metrics.tried(o.kind, time.Since(begun), err)
	ls.shared.leave(o.sink.lane())

	var chunks []*chunk
	var lost []gathering
	status, _ := errors.AsType[*StatusError](err)
	if status != nil && status.Code == http.StatusRequestEntityTooLarge {
		var damaged error
		if chunks, lost, damaged = split(o.kind, a.chunk); damaged == nil {
			err = nil
		}
	}

	l.mu.Lock()
	o.flying = nil
	failing := o.err != nil
	partly, _ := errors.AsType[*rejectedError](err)
	switch {
	case a.settled: // nobody waited for it
	case err == nil && len(chunks)+len(lost) > 0:
		o.shape.tooLarge(len(a.chunk.body))
		o.chunks = o.chunks[1:]
		o.replace(0, a.chunk.held(), chunks, lost)
	case err == nil:
		o.delivered(0)
	case partly != nil:
		o.delivered(partly.events)
	default:
		o.failed(a.chunk, err, status)
	}
	if a.left {
		o.task.At(time.Now())
	}
	over := l.over()
	turned := failing != (o.err != nil)
	l.mu.Unlock()
	if turned && l.set.Turned != nil {
		l.set.Turned()
	}
	if partly != nil {
		l.complain(partly, nil)
	}
	if len(lost) > 0 {
		l.complain(fmt.Errorf("%d events are larger than the sink takes", len(lost)), nil)
	}
	close(a.done)
	if over {
		ls.forget(l)
	}
}

// delivered is called when the sink has the first chunk, but for so many of its
// events, which it refused. Which these are nobody knows: the first stand for them.
// log.mu is held.
func (o *outlet) delivered(refused int) {
	o.shiftPartly(refused)
	o.shape.taken()
	if o.err != nil {
		o.log.logs.cfg.Logger.Info("decision log is delivered again", "tenant", o.log.set.Tenant, "sink", kindNames[o.kind])
	}
	o.fails, o.err = 0, nil
}

// failed is called when the sink did not take the first chunk. log.mu is held.
func (o *outlet) failed(c *chunk, err error, status *StatusError) {
	l := o.log
	if o.err == nil && !l.closed {
		l.logs.cfg.Logger.Warn("decision log not delivered", "tenant", l.set.Tenant, "sink", kindNames[o.kind], "error", err)
	}
	o.err = err
	o.fails++
	limit := min(maxRetry, max(l.set.Reporting.MaxDelay, minRetry))
	if l.draining {
		limit = min(limit, drainRetry)
	}
	wait := minRetry + rand.N(min(limit, minRetry<<min(o.fails, 20)))
	if status != nil {
		wait = max(wait, status.RetryAfter)
		if status.Code == http.StatusBadRequest || status.Code == http.StatusUnprocessableEntity {
			c.refused++
		}
	}
	switch {
	case l.closed:
		o.shift(dropShutdown)
	case !l.retired.IsZero() && time.Since(l.retired) > retireTime:
		o.shift(dropRetired)
		o.dropAll(dropRetired)
	case c.refused >= maxRefusals:
		o.shift(dropRejected)
	}
	o.retryAt = time.Now().Add(wait)
}

package decisionlog

import (
	"errors"
	"sync"
	"time"

	"github.com/gatehouse-authz/gatehouse/schedule"
)

// ErrFull: there is no room for the event, and the tenant's choice is Deny.
var ErrFull = errors.New("decision log is full")

// retireTime is how long a retired log tries to deliver what it buffers.
const retireTime = 10 * time.Minute

// Log is the log of one tenant. Its methods may be called by any number of
// goroutines.
type Log struct {
	logs      *Logs
	set       Settings
	outlets   []*outlet
	wantsJSON bool // a sink takes events as JSON
	wantsLine bool // a sink takes them as lines of the console
	wantsRecs bool // a sink takes them as records

	// Owned by the worker whose turn it is.
	constants constants
	filtering filtering

	// Guarded by mu. Where both are held, Logs.mu is locked first.
	mu         sync.Mutex
	ring       ring[Event]
	pushed     uint64 // events that ever were in the ring
	raw        int64  // bytes of those that are
	bytes      int64  // that the log holds, in the ring, in a worker's hands, and in outlets
	books      books
	limiter    *limiter      // nil: no bound
	queued     bool          // in the queue, or in a worker's hands
	known      bool          // in Logs.logs
	draining   bool          // the process is to end
	closed     bool          // nothing is delivered any more
	retired    time.Time     // zero: it is not
	room       chan struct{} // closed when something is given back; nil: nobody waits for it
	complained time.Time     // when the last fault of an event was logged
}

func newLog(ls *Logs, set Settings) *Log {
	l := &Log{logs: ls, set: set, constants: newConstants(set.Labels)}
	if n := set.Reporting.DecisionsPerSecond; n > 0 {
		l.limiter = newLimiter(n)
	}
	for _, sink := range set.Sinks {
		l.wantsLine = l.wantsLine || sink.kind() == kindConsole
		l.wantsJSON = l.wantsJSON || sink.kind() != kindConsole
		l.wantsRecs = l.wantsRecs || sink.kind() == kindRecords
		l.outlets = append(l.outlets, newOutlet(l, sink))
	}
	return l
}

// Record keeps the event until it is delivered or dropped. It returns at once,
// unless the tenant's choice for a full buffer is Wait: then before deadline,
// where that is not zero. The only error is ErrFull, and only where the tenant's
// choice is Deny.
func (l *Log) Record(deadline time.Time, e *Event) error {
	if len(l.outlets) == 0 {
		return nil
	}
	e.held = e.size()
	l.mu.Lock()
	if !l.known {
		l.mu.Unlock()
		l.logs.remember(l)
		if !l.retired.IsZero() {
			l.retired = time.Now()
		}
	}
	defer l.mu.Unlock()
	if l.limiter != nil && !l.limiter.allow(time.Now()) {
		l.refuse(e, dropRate)
		return nil
	}
	fits := l.hold(e.held, 1)
	if !fits && !l.closed {
		switch l.set.OnFull {
		case DropOldest:
			fits = l.makeRoom(e.held, 1)
		case Wait:
			fits = l.awaitRoom(deadline, e.held)
		}
	}
	if l.closed {
		if fits {
			l.give(e.held)
		}
		l.refuse(e, dropShutdown)
		return nil
	}
	if !fits {
		l.refuse(e, dropFull)
		if l.set.OnFull == Deny {
			return ErrFull
		}
		return nil
	}
	l.books.recorded++
	l.ring.push(e)
	l.pushed++
	l.raw += e.held
	l.ask(l.draining)
	if l.raw > l.set.Reporting.BufferBytes/8 {
		l.logs.queue.rouse() // encoded and compressed, events take less
	}
	return nil
}

// refuse drops an event as it comes. l.mu is held.
func (l *Log) refuse(e *Event, why reason) {
	l.books.recorded++
	l.drop(why, 1)
	e.free()
}

// drop counts events that were not delivered. l.mu is held.
func (l *Log) drop(why reason, n int) { l.books.dropped[why] += uint64(n) }

// buffered is how many events are neither delivered nor dropped. l.mu is held.
func (l *Log) buffered() int64 {
	return int64(l.books.recorded - l.books.delivered - l.books.allDropped())
}

// hold takes n bytes for so many new events and reports whether there was room: in
// the bounds of the log, and in what is free of the memory of all, of which a log
// may have as much as it leaves. l.mu is held.
func (l *Log) hold(n int64, events int64) bool {
	r := &l.set.Reporting
	if l.bytes+n > r.BufferBytes || r.BufferEvents > 0 && events > 0 && l.buffered()+events > r.BufferEvents {
		return false
	}
	if used := l.logs.used.Add(n); l.bytes+n > l.logs.cfg.Memory-(used-n) {
		l.logs.free(n)
		return false
	}
	l.bytes += n
	return true
}

// give gives back n bytes. l.mu is held.
func (l *Log) give(n int64) {
	l.bytes -= n
	l.logs.free(n)
	if l.room != nil {
		close(l.room)
		l.room = nil
	}
}

// makeRoom drops what is buffered longest until hold reports that there is room.
// It reports false where there is none even so. l.mu is held.
func (l *Log) makeRoom(n int64, events int64) bool {
	others := l.logs.used.Load() - l.bytes
	if n > min(l.set.Reporting.BufferBytes, l.logs.cfg.Memory-others) {
		return false // an empty log would not have it
	}
	for l.dropOldest() {
		if l.hold(n, events) {
			return true
		}
	}
	return false
}

// dropOldest drops of what is buffered longest: a chunk of the outlet that holds
// most, or an event. What is being delivered or encoded stays. It reports false
// where there is nothing else. l.mu is held.
func (l *Log) dropOldest() bool {
	var most *outlet
	for _, o := range l.outlets {
		if o.droppable() && (most == nil || o.bytes > most.bytes) {
			most = o
		}
	}
	switch {
	case most != nil:
		most.dropOldest()
	case l.ring.n > 0:
		l.discard(dropFull)
	default:
		return false
	}
	return true
}

// recheck is how often somebody who waits for room looks whether other logs have
// given back what they held.
const recheck = 10 * time.Millisecond

// awaitRoom waits until hold reports that there is room. It reports false where
// there is none in time. l.mu is held, but not while it waits.
func (l *Log) awaitRoom(deadline time.Time, n int64) bool {
	limit := time.Now().Add(l.set.MaxWait)
	if !deadline.IsZero() && deadline.Before(limit) {
		limit = deadline
	}
	for !l.closed {
		wait := time.Until(limit)
		if wait <= 0 {
			return false
		}
		if l.room == nil {
			l.room = make(chan struct{})
		}
		room := l.room
		l.mu.Unlock()
		timer := time.NewTimer(min(wait, recheck))
		select {
		case <-room:
		case <-timer.C:
		}
		timer.Stop()
		l.mu.Lock()
		if l.hold(n, 1) {
			return true
		}
	}
	return false
}

// ask has a worker come, if none is to come yet. l.mu is held.
func (l *Log) ask(hurry bool) {
	if !l.queued {
		l.queued = true
		l.logs.queue.put(l, hurry)
	}
}

// take appends up to limit of the events that were recorded first to out, and
// takes them out of the ring.
func (l *Log) take(out []*Event, limit int) []*Event {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.ring.n > 0 && len(out) < limit {
		out = append(out, l.pop())
	}
	return out
}

// pop takes the event that was recorded first out of the ring. l.mu is held.
func (l *Log) pop() *Event {
	e := l.ring.pop()
	l.raw -= e.held
	return e
}

// discard drops the event that was recorded first. l.mu is held.
func (l *Log) discard(why reason) {
	e := l.pop()
	l.give(e.held)
	l.drop(why, 1)
	e.free()
}

// gathered adds events that were encoded to what each outlet gathers, or drops
// them, one after the other, until an outlet has gathered enough. It returns how
// many events are done with, and the outlets that have gathered enough.
func (l *Log) gathered(batch []encoded) (n int, full []*outlet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for n < len(batch) && len(full) == 0 {
		full = l.gather(&batch[n])
		n++
	}
	return n, full
}

// gather adds an event to what each outlet gathers, or drops it. It returns the
// outlets that have gathered enough. l.mu is held.
func (l *Log) gather(b *encoded) (full []*outlet) {
	why, held := b.why, b.event.held
	if l.closed {
		why = dropShutdown
	}
	need := int64(0)
	if why == notDropped {
		for _, o := range l.outlets {
			need += o.open.more(o.pick(b.texts))
		}
	}
	if need <= held { // most often: encoded, an event takes less
		l.give(held - need)
	} else {
		l.give(held)
		if !l.hold(need, 0) && (l.set.OnFull != DropOldest || !l.makeRoom(need, 0)) {
			why = dropFull
		}
	}
	if why != notDropped {
		l.drop(why, 1)
		return nil
	}
	var all *ticket
	if len(l.outlets) > 1 {
		all = &ticket{left: len(l.outlets)}
	}
	for _, o := range l.outlets {
		text := o.pick(b.texts)
		o.bytes += o.open.more(text)
		o.open.add(text, o.kind.separator(), all)
		if int64(o.open.size) >= o.shape.gather {
			o.sealing = true
			full = append(full, o)
		}
	}
	return full
}

// endTurn is called when a worker ends its turn: it sees to it that what has
// gathered is delivered in time, and that a worker comes again if need be.
func (l *Log) endTurn() {
	for _, o := range l.due() {
		o.seal()
	}
	l.mu.Lock()
	if l.closed {
		l.dropBuffered(dropShutdown)
	}
	for _, o := range l.outlets {
		o.plan()
	}
	again := l.ring.n > 0
	for _, o := range l.outlets {
		again = again || o.stage == wantSeal
	}
	if l.queued = again; again {
		l.logs.queue.put(l, true)
	}
	over := l.over()
	l.mu.Unlock()
	if over {
		l.logs.forget(l)
	}
}

// due returns the outlets that are to seal what they have gathered.
func (l *Log) due() (due []*outlet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.outlets {
		if o.wantsSeal() {
			o.sealing = true
			if o.stage == wantSeal {
				o.stage = sending
			}
			due = append(due, o)
		}
	}
	return due
}

// Flush has what is buffered delivered soon, also where a sink is left alone for a
// while after a failure.
func (l *Log) Flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flush()
}

// flush is Flush; l.mu is held.
func (l *Log) flush() {
	for _, o := range l.outlets {
		o.flush()
	}
}

// Retire says that few events or none are to come: the tenant is parked or gone,
// or has another log. What is buffered is delivered soon, or dropped if that does
// not succeed within ten minutes; then the log holds nothing. An event that is
// recorded even so is treated in the same way.
func (l *Log) Retire() {
	l.mu.Lock()
	if l.retired.IsZero() {
		l.retired = time.Now()
		l.flush()
	}
	over := l.over()
	l.mu.Unlock()
	if over {
		l.logs.forget(l)
	}
}

// over reports whether the log is retired and buffers nothing. l.mu is held.
func (l *Log) over() bool { return !l.retired.IsZero() && l.bytes == 0 && !l.queued }

// drain has what is buffered delivered as soon as possible, on another schedule:
// that of the log may have ended. l.mu is held.
func (l *Log) drain(s *schedule.Schedule) {
	l.draining = true
	for _, o := range l.outlets {
		o.task.Stop()
		o.task = s.NewTask(o.sink.lane(), o.do)
	}
	l.flush()
	for _, o := range l.outlets {
		o.task.At(time.Now()) // for a delivery that goes on, and is waited for by nobody
	}
	l.logs.queue.rouse()
}

// close ends delivery: what is neither being delivered nor in a worker's hands is
// dropped.
func (l *Log) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.dropBuffered(dropShutdown)
	for _, o := range l.outlets {
		o.task.Stop()
	}
}

// abandon drops also what is being delivered: its sink does not answer.
func (l *Log) abandon() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.outlets {
		if o.flying != nil && len(o.chunks) > 0 {
			o.shift(dropShutdown)
			o.flying.settled = true
		}
	}
}

// dropBuffered drops all that is neither being delivered nor in a worker's hands.
// l.mu is held.
func (l *Log) dropBuffered(why reason) {
	for l.ring.n > 0 {
		l.discard(why)
	}
	for _, o := range l.outlets {
		o.dropAll(why)
	}
}

// complaints is how often faults of events are logged for one log, at most.
const complaints = time.Minute

// complain logs why an event was dropped; nil: several were.
func (l *Log) complain(err error, e *Event) {
	l.mu.Lock()
	now := time.Now()
	quiet := now.Sub(l.complained) < complaints
	if !quiet {
		l.complained = now
	}
	l.mu.Unlock()
	if quiet {
		return
	}
	log := l.logs.cfg.Logger.With("tenant", l.set.Tenant)
	if e != nil {
		log = log.With("decision_id", e.DecisionID)
		if e.TraceID != "" {
			log = log.With("trace_id", e.TraceID)
		}
	}
	log.Warn("decision not logged", "error", err)
}

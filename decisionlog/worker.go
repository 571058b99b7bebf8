package decisionlog

import (
	"context"
	"fmt"
	"time"
)

const (
	// turnTime is how long a worker stays with one log while others wait.
	turnTime = 2 * time.Millisecond

	// turnEvents is how many events a worker takes from a log at once.
	turnEvents = 32
)

// worker makes what is recorded into what is delivered, for the log whose turn it
// is.
type worker struct {
	evaluator  evaluator
	json, line *encoder // an event as it goes to most sinks, and to the console
	record     []byte   // and to Records
	events     []*Event // taken from the log
}

// work works on the logs that are in the queue until ctx ends.
func (ls *Logs) work(ctx context.Context) {
	w := &worker{evaluator: evaluator{stuck: &ls.stuck}, json: newEncoder(), line: newEncoder()}
	defer w.evaluator.stop()
	for ctx.Err() == nil {
		l := ls.queue.take()
		if l == nil {
			ls.queue.wait(ctx)
			continue
		}
		w.turn(ctx, l)
	}
}

// turn works on a log for a while.
func (w *worker) turn(ctx context.Context, l *Log) {
	for begun := time.Now(); ctx.Err() == nil && time.Since(begun) < turnTime; {
		w.events = l.take(w.events[:0], turnEvents)
		if len(w.events) == 0 {
			break
		}
		for i, e := range w.events {
			w.handle(l, e)
			w.events[i] = nil
		}
	}
	l.endTurn()
}

// maxScratch is how much memory an encoder keeps for the next event.
const maxScratch = 256 << 10

// handle brings one event to the sinks' chunks, or drops it.
func (w *worker) handle(l *Log, e *Event) {
	reason, err := w.encode(l, e)
	if err != nil {
		l.complain(err, e)
	}
	for _, o := range l.gathered(e, reason, texts{w.json.buf, w.line.buf, w.record}) {
		o.seal()
	}
	for _, enc := range [...]*encoder{w.json, w.line} {
		if cap(enc.buf) > maxScratch {
			enc.buf = nil
		}
	}
	if cap(w.record) > maxScratch {
		w.record = nil
	}
}

// encode writes the event as its sinks want it, or says why it is dropped. The
// error is for the operator.
func (w *worker) encode(l *Log, e *Event) (reason, error) {
	p := parts{document: e.Document, input: e.Input, result: e.Result}
	if e.Filter != nil && e.Document != nil { // its rules need the value
		v, err := e.Document.Value()
		if err != nil {
			return dropEncoding, fmt.Errorf("input: %w", err)
		}
		e.Input, e.Document = v, nil
		p.input, p.document = v, nil
	}
	if e.NDBuiltinCache != nil {
		p.ndCache = e.NDBuiltinCache
	}
	if e.Filter != nil {
		drop, rules, err := w.filter(l, e)
		if err != nil {
			return dropFilter, err
		}
		if drop {
			return dropPolicy, nil
		}
		p.apply(rules, w.json)
	}
	w.json.reset(l.logs.cfg.Redact)
	w.line.reset(l.logs.cfg.Redact)
	if l.wantsJSON {
		w.json.event(e, &p, &l.constants)
	}
	if l.wantsLine {
		w.line.consoleLine(e, &p, &l.constants, time.Now())
	}
	for _, enc := range [...]*encoder{w.json, w.line} {
		if enc.err != nil {
			return dropEncoding, enc.err
		}
	}
	if l.wantsRecs {
		w.record = appendRecord(w.record[:0], e.Outcome, w.json.buf)
	}
	return notDropped, nil
}

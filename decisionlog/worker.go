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
	json, line *encoder // events as they go to most sinks, and to the console
	record     []byte   // and to Records
	events     []*Event // taken from the log
	batch      []encoded
}

// encoded is an event whose texts are there, or one that is to be dropped.
type encoded struct {
	event *Event
	why   reason
	texts texts
}

func newWorker(ls *Logs) *worker {
	return &worker{evaluator: evaluator{stuck: &ls.stuck}, json: newEncoder(), line: newEncoder()}
}

// work works on the logs that are in the queue until ctx ends.
func (ls *Logs) work(ctx context.Context) {
	w := newWorker(ls)
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
		w.hand(l)
	}
	l.endTurn()
}

const (
	// batchBytes is how much text of events a worker gathers before it hands it
	// over to the log.
	batchBytes = 64 << 10

	// maxScratch is how much memory an encoder keeps for the next events.
	maxScratch = 256 << 10
)

// handle makes one event ready for the sinks' chunks.
func (w *worker) handle(l *Log, e *Event) {
	why, err := w.encode(l, e)
	if err != nil {
		l.complain(err, e)
	}
	if why != notDropped {
		w.json.undo()
		w.line.undo()
		w.batch = append(w.batch, encoded{event: e, why: why})
		return
	}
	w.batch = append(w.batch, encoded{event: e, texts: w.texts(l, e)})
	if len(w.json.buf)+len(w.line.buf)+len(w.record) >= batchBytes {
		w.hand(l)
	}
}

// texts returns what was written of an event. It stays as it is also when the
// encoders need more memory.
func (w *worker) texts(l *Log, e *Event) (t texts) {
	t.json, t.line = w.json.buf[w.json.start:], w.line.buf[w.line.start:]
	if l.wantsRecs {
		start := len(w.record)
		w.record = appendRecord(w.record, e.Outcome, t.json)
		t.record = w.record[start:]
	}
	return t
}

// hand brings the events that are ready to the sinks' chunks, or drops them.
func (w *worker) hand(l *Log) {
	for rest := w.batch; len(rest) > 0; {
		n, full := l.gathered(rest)
		rest = rest[n:]
		for _, o := range full {
			o.seal()
		}
	}
	for i := range w.batch {
		w.batch[i].event.free()
		w.batch[i] = encoded{}
	}
	w.batch = w.batch[:0]
	for _, buf := range [...]*[]byte{&w.json.buf, &w.line.buf, &w.record} {
		if *buf = (*buf)[:0]; cap(*buf) > maxScratch {
			*buf = nil
		}
	}
}

// encode writes the event as its sinks want it, behind what the encoders have
// written, or says why it is dropped. The error is for the operator.
func (w *worker) encode(l *Log, e *Event) (why reason, err error) {
	defer func() {
		if r := recover(); r != nil {
			why, err = dropEncoding, fmt.Errorf("panic: %v", r)
		}
	}()
	w.json.next(l.logs.cfg.Redact)
	w.line.next(l.logs.cfg.Redact)
	p := parts{document: e.Document, input: e.Input, result: e.Result}
	if e.NDBuiltinCache != nil {
		p.ndCache = e.NDBuiltinCache
	}
	if e.Filter != nil {
		if e.Document != nil { // the rules need the value
			if e.Input, err = e.Document.Value(); err != nil {
				return dropEncoding, fmt.Errorf("input: %w", err)
			}
			e.Document = nil
			p.input, p.document = e.Input, nil
		}
		drop, rules, err := w.filter(l, e)
		if err != nil {
			return dropFilter, err
		}
		if drop {
			return dropPolicy, nil
		}
		p.apply(rules, w.json)
		w.json.err = nil // of what only the rules have seen
	}
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
	return notDropped, nil
}

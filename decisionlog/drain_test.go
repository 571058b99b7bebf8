package decisionlog_test

import (
	"os"
	"runtime/pprof"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

func TestDrain(t *testing.T) {
	t.Parallel()
	for _, running := range []bool{true, false} {
		rec := newRecorder(t)
		console := new(lockedBuffer)
		h := newHouse(t, decisionlog.Config{Console: console})
		set := never(rec.service(), decisionlog.Console{})
		set.Reporting.MinDelay, set.Reporting.MaxDelay = time.Hour, time.Hour
		var logs []*decisionlog.Log
		for range 20 {
			logs = append(logs, h.Open(set))
		}
		if !running {
			h.stop()
		}
		for i, log := range logs {
			record(t, log, string(rune('a'+i)), 200)
		}
		drain(h, time.Minute) // none of them is due for an hour
		if b := h.check(); b.Delivered != 4000 {
			t.Errorf("running %v: got %+v", running, b)
		}
		ids, _, _ := rec.received()
		once(t, ids, 4000)
		once(t, idsOf(t, console.String()), 4000)
		record(t, logs[0], "late", 1)
		record(t, h.Open(set), "new", 1)
		if b := h.check(); b.Dropped["shutdown"] != 2 || b.Buffered != 0 {
			t.Errorf("running %v: got %+v", running, b)
		}
	}
}

// A log that is opened during the drain is drained.
func TestOpenedInDrain(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	release := rec.hang(t)
	h := newHouse(t, decisionlog.Config{})
	set := never(rec.service())
	record(t, h.Open(set), "first", 1)
	drained := make(chan struct{})
	go func() { defer close(drained); drain(h, time.Minute) }()
	await(t, "the drain has begun", func() bool { rec.mu.Lock(); defer rec.mu.Unlock(); return rec.requests > 0 })
	record(t, h.Open(set), "second", 1)
	release()
	<-drained
	if b := h.check(); b.Delivered != 2 {
		t.Errorf("got %+v", b)
	}
}

// What cannot be delivered in time is counted.
func TestDrainInTime(t *testing.T) {
	t.Parallel()
	ill, well, dead := newRecorder(t), newRecorder(t), newRecorder(t)
	ill.hang(t)
	dead.breaks(status(503))
	h := newHouse(t, decisionlog.Config{})
	for range 30 {
		for _, rec := range []*recorder{ill, well, dead} {
			record(t, h.Open(never(rec.service())), "e", 10)
		}
	}
	begun := time.Now()
	drain(h, 2*time.Second)
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	if b := h.check(); b.Delivered != 300 || b.Dropped["shutdown"] != 600 || b.Buffered != 0 {
		t.Errorf("got %+v", b)
	}
}

// A console whose reader stalls holds up nothing but itself.
func TestStalledConsole(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{Console: w})
	for range 100 {
		set := soon(decisionlog.Console{})
		set.Reporting.BufferBytes = 64 << 10
		record(t, h.Open(set), "c", 200)
	}
	fine := h.Open(soon(rec.service()))
	record(t, fine, "e", 100)
	await(t, "the service has its events", func() bool { return fine.Status().Delivered == 100 })
	h.check()
	begun := time.Now()
	drain(h, 200*time.Millisecond)
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	if b := h.check(); b.Buffered != 0 || b.Dropped["shutdown"] == 0 {
		t.Errorf("got %+v", b)
	}
}

// Nothing runs after the end.
func TestNothingIsLeft(t *testing.T) {
	rec := newRecorder(t)
	rec.breaks(status(503))
	h := newHouse(t, decisionlog.Config{Console: new(lockedBuffer)})
	set := soon(rec.service(), decisionlog.Console{})
	log := h.Open(set)
	e := event("f")
	e.Filter = &filter{}
	log.Record(time.Time{}, e)
	record(t, log, "e", 100)
	drain(h, 300*time.Millisecond)
	h.stop()
	await(t, "no goroutine of the package is left", func() bool {
		var b strings.Builder
		pprof.Lookup("goroutine").WriteTo(&b, 2)
		for _, g := range strings.Split(b.String(), "\n\n") {
			if strings.Contains(g, "decisionlog.(*Log") || strings.Contains(g, "decisionlog.(*evaluator)") || strings.Contains(g, "schedule.(*") {
				return false
			}
		}
		return true
	})
}

package decisionlog_test

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

func TestService(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{Redact: true})
	log := h.Open(soon(decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{
		URL: rec.URL + "/v1/", Header: http.Header{"x-key": {"k"}},
		Authorize: func(r *http.Request) error { r.Header.Set("Authorization", "Bearer b"); return nil },
	}, Partition: "a b"})))
	record(t, log, "e", 500)
	if b := h.settled(); b.Delivered != 500 {
		t.Errorf("got %+v", b)
	}
	ids, order, chunks := rec.received()
	once(t, ids, 500)
	if !slices.IsSortedFunc(order, func(a, b string) int { return len(a) - len(b) }) || order[0] != "e0" || order[499] != "e499" {
		t.Errorf("events came out of order")
	}
	for _, c := range chunks {
		if c.method != "POST" || c.path != "/v1/logs/a b" || c.header.Get("Content-Type") != "application/json" || c.header.Get("Content-Encoding") != "gzip" ||
			c.header.Get("X-Key") != "k" || c.header.Get("Authorization") != "Bearer b" {
			t.Errorf("got %+v", c)
		}
	}
	if s := log.Status(); s.Code != "" || s.BufferedBytes != 0 || s.Delivered != 500 {
		t.Errorf("got %+v", s)
	}
}

func TestPeriodic(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := soon(rec.service())
	set.Reporting.Trigger = decisionlog.Periodic
	set.Reporting.MinDelay, set.Reporting.MaxDelay = 300*time.Millisecond, 301*time.Millisecond
	log := h.Open(set)
	begun := time.Now()
	record(t, log, "e", 10)
	h.settled()
	if took := time.Since(begun); took < 300*time.Millisecond {
		t.Errorf("delivered after %v", took)
	}
	if _, _, chunks := rec.received(); len(chunks) != 1 {
		t.Errorf("got %d chunks, want 1", len(chunks))
	}
	record(t, log, "f", 10)
	if b := h.settled(); b.Delivered != 20 {
		t.Errorf("got %+v", b)
	}
}

// What is ready does not wait for its time where the buffer fills.
func TestPeriodicBeforeTime(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := soon(rec.service())
	set.Reporting = decisionlog.Reporting{BufferBytes: 512 << 10, UploadBytes: 4 << 10}
	log := h.Open(set)
	for i := range 5000 {
		record(t, log, fmt.Sprint("e", i, "-"), 1)
		if i%10 == 0 {
			await(t, "there is room", func() bool { return log.Status().BufferedBytes < 256<<10 })
		}
	}
	if b := h.check(); b.Delivered == 0 || dropped(b) > 0 {
		t.Errorf("got %+v", b)
	}
}

// What comes after a delivery before its time has a time of its own again.
func TestPeriodicAfterFlush(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := soon(rec.service())
	set.Reporting = decisionlog.Reporting{MinDelay: 300 * time.Millisecond, MaxDelay: 300 * time.Millisecond}
	log := h.Open(set)
	for i := range 3 {
		record(t, log, fmt.Sprint("first-", i), 1)
		time.Sleep(50 * time.Millisecond) // so that it has its time
		log.Flush()
		h.settled()
		record(t, log, fmt.Sprint("second-", i), 1)
		if b := h.settled(); dropped(b) > 0 {
			t.Errorf("got %+v", b)
		}
	}
}

func TestManual(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	log := h.Open(never(rec.service()))
	record(t, log, "e", 500)
	time.Sleep(50 * time.Millisecond)
	if ids, _, _ := rec.received(); len(ids) > 0 {
		t.Errorf("%d events were delivered without being asked for", len(ids))
	}
	log.Flush()
	if b := h.settled(); b.Delivered != 500 {
		t.Errorf("got %+v", b)
	}
}

// A service that fails in some way is sent everything, once and in order, when it
// is well again; meanwhile Record does not wait, and what is buffered is bounded.
func TestFaults(t *testing.T) {
	for name, fault := range map[string]func(int, http.ResponseWriter, *http.Request, []byte) bool{
		"503": status(503),
		"404": status(404),
		"429": status(429, "Retry-After", "1"),
		"302": status(302, "Location", "/elsewhere"),
		"first words": func(_ int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			panic(http.ErrAbortHandler)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rec := newRecorder(t)
			rec.breaks(fault)
			h := newHouse(t, decisionlog.Config{})
			log := h.Open(soon(rec.service()))
			begun := time.Now()
			record(t, log, "e", 300)
			if took := time.Since(begun); took > time.Second {
				t.Errorf("Record took %v", took)
			}
			await(t, "the fault is noted", func() bool { return log.Status().Code == "decision_log_error" })
			h.check()
			s := log.Status()
			if code := name; code < "a" && (s.HTTPCode != code || !strings.HasPrefix(s.Message, "log upload failed, server replied with HTTP "+code)) {
				t.Errorf("got %+v", s)
			}
			rec.breaks(nil)
			if b := h.settled(); b.Delivered != 300 {
				t.Errorf("got %+v", b)
			}
			ids, order, _ := rec.received()
			once(t, ids, 300)
			if order[0] != "e0" || order[299] != "e299" {
				t.Error("events came out of order")
			}
			if s := log.Status(); s.Code != "" || s.Message != "" || s.HTTPCode != "" {
				t.Errorf("got %+v", s)
			}
		})
	}
}

// A refused connection, and a URL that is none.
func TestUnreachable(t *testing.T) {
	t.Parallel()
	gone := httptest.NewServer(nil)
	gone.Close()
	h := newHouse(t, decisionlog.Config{})
	for url, want := range map[string]string{
		gone.URL + "?key=SECRET":       "connection refused",
		"ftp://user:SECRET@host/":      "not an http or https URL",
		"http://user:SECRET@%zz/":      "URL of the service",
		"http://user:SECRET@[::1]:1/x": "connection refused",
	} {
		log := h.Open(soon(decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{URL: url}})))
		record(t, log, "e", 1)
		await(t, "the fault is noted", func() bool { return log.Status().Message != "" })
		if got := log.Status().Message; !strings.Contains(got, want) || strings.Contains(got, "SECRET") {
			t.Errorf("%s: got %q, want %q", url, got, want)
		}
	}
}

// Credentials and events go to the configured host alone.
func TestRedirects(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	other := newRecorder(t)
	var to atomic.Pointer[string]
	rec.breaks(func(_ int, w http.ResponseWriter, r *http.Request, _ []byte) bool {
		if r.URL.Path != "/logs" {
			return false
		}
		http.Redirect(w, r, *to.Load(), http.StatusTemporaryRedirect)
		return true
	})
	h := newHouse(t, decisionlog.Config{})
	elsewhere, within := other.URL+"/x", "/moved"
	to.Store(&elsewhere)
	log := h.Open(soon(rec.service()))
	record(t, log, "e", 1)
	await(t, "the redirect is noted", func() bool { return log.Status().HTTPCode == "307" })
	to.Store(&within)
	h.settled()
	if ids, _, _ := other.received(); len(ids) > 0 {
		t.Error("events went to another host")
	}
	ids, _, _ := rec.received()
	once(t, ids, 1)
}

// A service that takes a request and does not answer holds up neither Record nor
// other tenants, and the bytes that are buffered stay within their bound.
func TestHangingService(t *testing.T) {
	t.Parallel()
	ill, well := newRecorder(t), newRecorder(t)
	release := ill.hang(t)
	const limit = 64 << 10
	h := newHouse(t, decisionlog.Config{})
	set := soon(ill.service())
	set.Reporting.BufferBytes = limit
	stuck, fine := h.Open(set), h.Open(soon(well.service()))
	for i := range 3000 {
		record(t, stuck, fmt.Sprint("s", i, "-"), 1)
		record(t, fine, fmt.Sprint("f", i, "-"), 1)
		paced(t, fine)
		if got := stuck.Status().BufferedBytes; got > limit {
			t.Fatalf("%d bytes are buffered, limit %d", got, limit)
		}
		h.check()
	}
	await(t, "the other tenant's events are delivered", func() bool { return fine.Status().Delivered == 3000 })
	s := stuck.Status()
	if s.Dropped["buffer_full"] == 0 || s.Delivered > 0 || s.Recorded != 3000 {
		t.Errorf("got %+v", s)
	}
	release()
	b := h.settled()
	ids, _, _ := ill.received()
	once(t, ids, int(3000-b.Dropped["buffer_full"]))
	if ids["s2999-0"] != 1 {
		t.Error("the newest event is not among those left")
	}
}

// A chunk that the service finds too large is sent in parts; an event that it
// finds too large alone loses its nd_builtin_cache, and then is dropped.
func TestTooLargeForService(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	const limit = 1500
	rec.breaks(func(_ int, w http.ResponseWriter, _ *http.Request, body []byte) bool {
		if len(body) > limit {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
		}
		return len(body) > limit
	})
	h := newHouse(t, decisionlog.Config{})
	log := h.Open(never(rec.service()))
	record(t, log, "e", 200)
	big := event("cache")
	big.NDBuiltinCache = randomObject(4000)
	log.Record(time.Time{}, big)
	lost := event("lost")
	lost.Input = randomObject(4000)
	log.Record(time.Time{}, lost)
	record(t, log, "f", 200)
	log.Flush()
	b := h.settled()
	if b.Delivered != 401 || b.Dropped["too_large"] != 1 {
		t.Errorf("got %+v", b)
	}
	ids, order, _ := rec.received()
	once(t, ids, 401)
	if order[0] != "e0" || order[200] != "cache" || order[400] != "f199" {
		t.Error("events came out of order")
	}
	if strings.Contains(string(rec.raw), "nd_builtin_cache") {
		t.Error("the cache was sent")
	}
}

// A chunk that is no good does not stop those behind it for ever.
func TestRefusedChunk(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	rec.breaks(func(_ int, w http.ResponseWriter, _ *http.Request, body []byte) bool {
		_, ids, _ := unpack(body)
		if slices.Contains(ids, "bad0") {
			w.WriteHeader(http.StatusBadRequest)
			return true
		}
		return false
	})
	h := newHouse(t, decisionlog.Config{})
	log := h.Open(never(rec.service()))
	record(t, log, "bad", 1)
	log.Flush()
	await(t, "it is refused", func() bool { return log.Status().HTTPCode == "400" })
	record(t, log, "good", 5)
	log.Flush()
	if b := h.settled(); b.Delivered != 5 || b.Dropped["rejected"] != 1 {
		t.Errorf("got %+v", b)
	}
}

// Chunks are at most as large as they may be, and soon not much smaller.
func TestChunkSizes(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{Redact: true})
	set := soon(rec.service())
	const limit = 8 << 10
	set.Reporting.UploadBytes = limit
	set.Reporting.MinDelay, set.Reporting.MaxDelay = time.Hour, time.Hour
	log := h.Open(set)
	for i := range 20000 {
		e := event(fmt.Sprintf("%x-%x", i*7919, i*104729))
		if err := log.Record(time.Time{}, e); err != nil {
			t.Fatal(err)
		}
		paced(t, log)
	}
	log.Flush()
	h.settled()
	_, _, chunks := rec.received()
	sum := 0
	for _, c := range chunks {
		if c.size > limit {
			t.Errorf("a chunk has %d bytes, limit %d", c.size, limit)
		}
		sum += c.size
	}
	if mean := sum / len(chunks); mean < limit*8/10 {
		t.Errorf("%d chunks have %d bytes on average, limit %d", len(chunks), mean, limit)
	}
}

// Several sinks: an event is delivered when all have it.
func TestSeveralSinks(t *testing.T) {
	t.Parallel()
	a, b := newRecorder(t), newRecorder(t)
	b.breaks(status(500))
	console := new(lockedBuffer)
	h := newHouse(t, decisionlog.Config{Console: console})
	log := h.Open(soon(a.service(), b.service(), decisionlog.Console{}))
	record(t, log, "e", 50)
	await(t, "one service has them", func() bool { ids, _, _ := a.received(); return len(ids) == 50 })
	if books := h.check(); books.Delivered != 0 || books.Buffered != 50 {
		t.Errorf("got %+v", books)
	}
	b.breaks(nil)
	if books := h.settled(); books.Delivered != 50 {
		t.Errorf("got %+v", books)
	}
	ids, _, _ := b.received()
	once(t, ids, 50)
	once(t, idsOf(t, console.String()), 50)
}

// What is full: each choice.
func TestOnFull(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := never(rec.service())
	set.Reporting.BufferEvents = 10
	set.MaxWait = 50 * time.Millisecond
	for _, test := range []struct {
		choice decisionlog.OnFull
		last   string // delivered
		first  string
		err    error
	}{
		{decisionlog.DropOldest, "14", "5", nil},
		{decisionlog.DropNewest, "9", "0", nil},
		{decisionlog.Wait, "9", "0", nil},
		{decisionlog.Deny, "9", "0", decisionlog.ErrFull},
	} {
		set.OnFull = test.choice
		log := h.Open(set)
		prefix := fmt.Sprint("c", test.choice, "-")
		for i := range 15 {
			begun := time.Now()
			err := log.Record(begun.Add(time.Minute), event(fmt.Sprint(prefix, i)))
			if i < 10 && err != nil || i >= 10 && !errors.Is(err, test.err) {
				t.Errorf("choice %d, event %d: got %v", test.choice, i, err)
			}
			waited := time.Since(begun) >= set.MaxWait
			if want := test.choice == decisionlog.Wait && i >= 10; waited != want {
				t.Errorf("choice %d, event %d: waited %v, want %v", test.choice, i, waited, want)
			}
		}
		log.Flush()
		await(t, "nothing is buffered", func() bool { return log.Status().Buffered == 0 })
		s := log.Status()
		if s.Recorded != 15 || s.Delivered != 10 || s.Dropped["buffer_full"] != 5 {
			t.Errorf("choice %d: got %+v", test.choice, s)
		}
		ids, _, _ := rec.received()
		if ids[prefix+test.first] != 1 || ids[prefix+test.last] != 1 {
			t.Errorf("choice %d: %v are left", test.choice, ids)
		}
	}
	h.check()
}

// Somebody who waits for room goes on when there is some.
func TestWaitForRoom(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := never(rec.service())
	set.Reporting.BufferEvents = 1
	set.OnFull, set.MaxWait = decisionlog.Wait, time.Minute
	log := h.Open(set)
	record(t, log, "a", 1)
	go func() {
		time.Sleep(20 * time.Millisecond)
		log.Flush()
	}()
	record(t, log, "b", 1)
	log.Flush()
	if b := h.settled(); b.Delivered != 2 {
		t.Errorf("got %+v", b)
	}
	begun := time.Now()
	record(t, log, "c", 1)
	log.Record(begun.Add(30*time.Millisecond), event("d"))
	if took := time.Since(begun); took < 30*time.Millisecond || took > 5*time.Second {
		t.Errorf("waited %v, deadline was 30ms", took)
	}
}

// All logs together stay within their memory, and one that hoards leaves room to
// others.
func TestMemoryOfAll(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	const memory = 1 << 20
	h := newHouse(t, decisionlog.Config{Memory: memory})
	hoarder := h.Open(never(rec.service()))
	record(t, hoarder, "h", 20000)
	late := h.Open(never(rec.service()))
	record(t, late, "l", 10)
	if s := late.Status(); dropped(s.Books) > 0 {
		t.Errorf("the other tenant lost events: %+v", s)
	}
	if got := hoarder.Status().BufferedBytes + late.Status().BufferedBytes; got > memory {
		t.Errorf("%d bytes are buffered, limit %d", got, memory)
	}
	hoarder.Flush()
	late.Flush()
	b := h.settled()
	ids, _, _ := rec.received()
	once(t, ids, int(b.Recorded-dropped(b)))
}

func TestRateLimit(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := soon(rec.service())
	set.Reporting.DecisionsPerSecond = 5
	log := h.Open(set)
	record(t, log, "e", 100)
	if b := h.settled(); b.Delivered < 5 || b.Delivered > 20 || b.Dropped["rate_limit"] != 100-b.Delivered {
		t.Errorf("got %+v", b)
	}
}

// Retired logs deliver what they have, are forgotten but for their books, and can
// be used again.
func TestRetire(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	h := newHouse(t, decisionlog.Config{})
	set := never(rec.service())
	set.Reporting.MinDelay, set.Reporting.MaxDelay = time.Hour, time.Hour
	log := h.Open(set)
	record(t, log, "a", 10)
	log.Retire()
	h.settled()
	for range 3 {
		record(t, log, "b", 1)
		h.check()
		h.settled()
	}
	if b := h.check(); b.Recorded != 13 || b.Delivered != 13 || log.Status().Recorded != 13 {
		t.Errorf("got %+v", b)
	}
}

// With a sink that fails now and then, and each choice for a full buffer, each event
// is delivered once or dropped.
func TestBalance(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	rec.breaks(func(n int, w http.ResponseWriter, r *http.Request, body []byte) bool {
		switch n % 20 {
		case 1, 2:
			w.WriteHeader(503)
			return true
		case 3:
			panic(http.ErrAbortHandler)
		case 7:
			if len(body) > 2000 {
				w.WriteHeader(http.StatusRequestEntityTooLarge)
				return true
			}
		}
		return false
	})
	h := newHouse(t, decisionlog.Config{Memory: 4 << 20, Workers: 3})
	var logs []*decisionlog.Log
	for i := range 8 {
		set := soon(decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{URL: rec.URL, Timeout: time.Minute}})) // one that is late would be sent again
		set.Reporting.BufferBytes = 200 << 10
		set.Reporting.UploadBytes = 4 << 10
		set.OnFull = decisionlog.OnFull(i % 4)
		set.MaxWait = time.Millisecond
		logs = append(logs, h.Open(set))
	}
	var denied atomic.Int64
	stop := make(chan struct{})
	var wg, watch sync.WaitGroup
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				h.check()
			}
		}
	})
	const each = 1500
	for i, log := range logs {
		wg.Go(func() {
			for j := range each {
				if err := log.Record(time.Time{}, event(fmt.Sprintf("%d-%d", i, j))); err != nil {
					denied.Add(1)
				}
				if j%100 == 0 {
					log.Flush()
				}
			}
			if i%2 == 0 {
				log.Retire()
			}
		})
	}
	wg.Wait()
	drain(h, 20*time.Second)
	close(stop)
	watch.Wait()
	b := h.settled()
	if b.Recorded != uint64(len(logs)*each) {
		t.Errorf("recorded %d, want %d", b.Recorded, len(logs)*each)
	}
	if int64(b.Dropped["buffer_full"]) < denied.Load() {
		t.Errorf("%d were denied, %d dropped", denied.Load(), b.Dropped["buffer_full"])
	}
	ids, _, _ := rec.received() // no answer was lost
	once(t, ids, int(b.Delivered))
	if b.Delivered == 0 || len(b.Dropped) > 1 {
		t.Errorf("got %+v", b)
	}
}

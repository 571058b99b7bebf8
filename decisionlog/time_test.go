package decisionlog_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// clock is a service without a network, which notes when it was asked, and runs
// Logs in a bubble of time.
type clock struct {
	mu     sync.Mutex
	asked  []time.Duration
	begun  time.Time
	answer func(n int) (code int, retryAfter time.Duration)
}

func (c *clock) RoundTrip(r *http.Request) (*http.Response, error) {
	io.Copy(io.Discard, r.Body)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = append(c.asked, time.Since(c.begun))
	code, after := c.answer(len(c.asked))
	return &http.Response{StatusCode: code, Body: http.NoBody, Request: r, Header: http.Header{"Retry-After": {strconv.Itoa(int(after.Seconds()))}}}, nil
}

// times returns when the service was asked.
func (c *clock) times() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]time.Duration(nil), c.asked...)
}

// inBubble runs f with a service that answers so, and a log with these settings.
func inBubble(t *testing.T, r decisionlog.Reporting, answer func(n int) (int, time.Duration), f func(c *clock, h *decisionlog.Logs, l *decisionlog.Log)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := &clock{begun: time.Now(), answer: answer}
		s := schedule.New(0)
		logs := decisionlog.New(decisionlog.Config{Schedule: s, Logger: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { s.Run(ctx) })
		wg.Go(func() { logs.Run(ctx) })
		sink := decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{URL: "http://clock", Client: &http.Client{Transport: c}}})
		f(c, logs, logs.Open(decisionlog.Settings{Tenant: "orders", Sinks: []decisionlog.Sink{sink}, Reporting: r}))
		drained, stop := context.WithTimeout(context.Background(), time.Second)
		logs.Drain(drained)
		stop()
		cancel()
		wg.Wait()
	})
}

// By default what is recorded is delivered within five to ten minutes.
func TestDelays(t *testing.T) {
	inBubble(t, decisionlog.Reporting{}, func(int) (int, time.Duration) { return 200, 0 }, func(c *clock, h *decisionlog.Logs, l *decisionlog.Log) {
		for range 2 {
			record(t, l, "e", 3)
			time.Sleep(11 * time.Minute)
		}
		got := c.times()
		if len(got) != 2 || got[0] < 5*time.Minute || got[0] > 10*time.Minute+time.Second || got[1] < 16*time.Minute {
			t.Errorf("delivered at %v", got)
		}
		if b := h.Books(); b.Delivered != 6 {
			t.Errorf("got %+v", b)
		}
	})
}

// A service that fails is asked less and less, but at least once a minute or so.
func TestBackoff(t *testing.T) {
	inBubble(t, decisionlog.Reporting{Trigger: decisionlog.Immediate}, func(int) (int, time.Duration) { return 503, 0 }, func(c *clock, h *decisionlog.Logs, l *decisionlog.Log) {
		record(t, l, "e", 1)
		l.Flush()
		time.Sleep(2 * time.Hour)
		got := c.times()
		if len(got) < 120 || len(got) > 480 {
			t.Errorf("asked %d times in two hours", len(got))
		}
		for i := 1; i < len(got); i++ {
			if wait := got[i] - got[i-1]; wait < 100*time.Millisecond || wait > time.Minute+time.Second {
				t.Errorf("attempt %d came after %v", i, wait)
			}
		}
		if b := h.Books(); b.Buffered != 1 {
			t.Errorf("got %+v", b)
		}
	})
}

// Retry-After is honoured up to ten minutes, also by what is recorded meanwhile,
// but not by a flush.
func TestRetryAfter(t *testing.T) {
	answer := func(n int) (int, time.Duration) {
		switch n {
		case 1:
			return 429, 2 * time.Minute
		case 2:
			return 503, 24 * time.Hour
		}
		return 200, 0
	}
	inBubble(t, decisionlog.Reporting{Trigger: decisionlog.Immediate}, answer, func(c *clock, h *decisionlog.Logs, l *decisionlog.Log) {
		record(t, l, "e", 1)
		l.Flush()
		for range 13 {
			time.Sleep(time.Minute)
			record(t, l, "f", 1)
		}
		got := c.times()
		if len(got) < 3 || got[1]-got[0] < 2*time.Minute || got[1]-got[0] > 3*time.Minute || got[2]-got[1] < 10*time.Minute || got[2]-got[1] > 11*time.Minute {
			t.Errorf("asked at %v", got)
		}
	})
	inBubble(t, decisionlog.Reporting{}, answer, func(c *clock, h *decisionlog.Logs, l *decisionlog.Log) {
		record(t, l, "e", 1)
		for range 3 {
			l.Flush()
			time.Sleep(time.Second)
		}
		if b := h.Books(); b.Delivered != 1 {
			t.Errorf("asked at %v, got %+v", c.times(), b)
		}
	})
}

// What a retired log cannot deliver is dropped, so that it holds nothing.
func TestRetiredInVain(t *testing.T) {
	inBubble(t, decisionlog.Reporting{}, func(int) (int, time.Duration) { return 503, 0 }, func(c *clock, h *decisionlog.Logs, l *decisionlog.Log) {
		record(t, l, "e", 3)
		l.Retire()
		time.Sleep(5 * time.Minute)
		if b := h.Books(); b.Buffered != 3 {
			t.Errorf("got %+v", b)
		}
		time.Sleep(7 * time.Minute)
		if b := h.Books(); b.Buffered != 0 || b.Dropped["retired"] != 3 {
			t.Errorf("got %+v", b)
		}
	})
}

// A log that has nothing to do takes little memory and no goroutine.
func TestIdleLogs(t *testing.T) {
	rec := newRecorder(t)
	sink := rec.service()
	logs := decisionlog.New(decisionlog.Config{Schedule: schedule.New(0)})
	const n = 10000
	var before, after runtime.MemStats
	goroutines := runtime.NumGoroutine()
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range n {
		logs.Open(decisionlog.Settings{Tenant: "orders", Labels: map[string]string{"tenant": fmt.Sprint(i)}, Sinks: []decisionlog.Sink{sink}})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if each := (after.HeapAlloc - before.HeapAlloc) / n; each > 2500 {
		t.Errorf("an idle log takes %d bytes", each)
	}
	if more := runtime.NumGoroutine() - goroutines; more > 0 {
		t.Errorf("there are %d more goroutines", more)
	}
	runtime.KeepAlive(logs)
}

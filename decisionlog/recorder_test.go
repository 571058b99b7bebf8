package decisionlog_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// recorder is a service that takes decision logs as OPA's do, and S3 objects.
type recorder struct {
	*httptest.Server

	mu       sync.Mutex
	fault    func(n int, w http.ResponseWriter, r *http.Request, body []byte) bool // reports whether it has answered
	requests int
	chunks   []chunk
	ids      map[string]int // :: decision ID → how often it came
	order    []string       // decision IDs as they came
	raw      []byte         // all bodies, unpacked
}

// chunk is what one request brought.
type chunk struct {
	method, path string
	header       http.Header
	size         int // of the body, compressed
	ids          []string
}

func newRecorder(t testing.TB) *recorder {
	r := &recorder{ids: map[string]int{}}
	r.Server = httptest.NewServer(r)
	t.Cleanup(r.Close)
	return r
}

func (rec *recorder) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	rec.mu.Lock()
	fault := rec.fault
	rec.requests++
	n := rec.requests
	rec.mu.Unlock()
	if fault != nil && fault(n, w, r, body) {
		return
	}
	text, ids, err := unpack(body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.chunks = append(rec.chunks, chunk{r.Method, r.URL.Path, r.Header, len(body), ids})
	rec.raw = append(rec.raw, text...)
	for _, id := range ids {
		rec.ids[id]++
		rec.order = append(rec.order, id)
	}
}

// unpack reads a body: an array, or lines, compressed.
func unpack(body []byte) (text []byte, ids []string, err error) {
	z, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	if text, err = io.ReadAll(z); err != nil {
		return nil, nil, err
	}
	events, err := eventsIn(text)
	for _, e := range events {
		ids = append(ids, e["decision_id"].(string))
	}
	return text, ids, err
}

// eventsIn reads an array of events, or lines of them.
func eventsIn(text []byte) (events []map[string]any, err error) {
	if bytes.HasPrefix(text, []byte("[")) {
		return events, json.Unmarshal(text, &events)
	}
	for line := range bytes.Lines(text) {
		var e map[string]any
		if err := json.Unmarshal(line, &e); err != nil {
			return nil, fmt.Errorf("%w: %q", err, line)
		}
		events = append(events, e)
	}
	return events, nil
}

// breaks has each request answered by f, or not; nil heals it.
func (rec *recorder) breaks(f func(n int, w http.ResponseWriter, r *http.Request, body []byte) bool) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	rec.fault = f
}

// status answers with a status.
func status(code int, header ...string) func(int, http.ResponseWriter, *http.Request, []byte) bool {
	return func(_ int, w http.ResponseWriter, _ *http.Request, _ []byte) bool {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		return true
	}
}

// hang has requests not answered until the caller gives up, or release is called.
func (rec *recorder) hang(t testing.TB) (release func()) {
	hung := make(chan struct{})
	release = sync.OnceFunc(func() { close(hung) })
	t.Cleanup(release)
	rec.breaks(func(_ int, _ http.ResponseWriter, r *http.Request, _ []byte) bool {
		select {
		case <-hung:
			return false
		case <-r.Context().Done():
			return true
		}
	})
	return release
}

func (rec *recorder) received() (ids map[string]int, order []string, chunks []chunk) {
	rec.mu.Lock()
	defer rec.mu.Unlock()
	ids = map[string]int{}
	for id, n := range rec.ids {
		ids[id] = n
	}
	return ids, append([]string(nil), rec.order...), append([]chunk(nil), rec.chunks...)
}

func (rec *recorder) service() *decisionlog.Service {
	return decisionlog.NewService(decisionlog.ServiceConfig{HTTP: decisionlog.HTTPConfig{URL: rec.URL, Timeout: 5 * time.Second}})
}

// house runs Logs until the test ends.
type house struct {
	*decisionlog.Logs
	t    testing.TB
	stop func()
}

func newHouse(t testing.TB, cfg decisionlog.Config) *house {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cfg.Schedule = schedule.New(0)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	h := &house{Logs: decisionlog.New(cfg), t: t}
	var wg sync.WaitGroup
	wg.Go(func() { cfg.Schedule.Run(ctx) })
	wg.Go(func() { h.Run(ctx) })
	h.stop = sync.OnceFunc(func() { cancel(); wg.Wait() })
	t.Cleanup(h.stop)
	return h
}

// soon are settings of a tenant whose events are delivered at once.
func soon(sinks ...decisionlog.Sink) decisionlog.Settings {
	return decisionlog.Settings{
		Tenant: "orders", Labels: map[string]string{"tenant": "orders"}, Sinks: sinks,
		Reporting: decisionlog.Reporting{Trigger: decisionlog.Immediate, MinDelay: time.Millisecond, MaxDelay: 5 * time.Millisecond},
	}
}

// never are settings of a tenant whose events are delivered when asked for.
func never(sinks ...decisionlog.Sink) decisionlog.Settings {
	s := soon(sinks...)
	s.Reporting.Trigger = decisionlog.Manual
	return s
}

var input = ast.MustParseTerm(`{"attributes": {"request": {"http": {
	"headers": {":authority": "example.com", ":method": "GET", ":path": "/orders/7?x=1", ":scheme": "https", "accept": "*/*", "accept-encoding": "gzip",
		"authorization": "Bearer CANARY", "cookie": "session=CANARY", "content-type": "application/json", "user-agent": "curl/8.0",
		"x-envoy-internal": "true", "x-forwarded-for": "10.0.0.1", "x-forwarded-proto": "https", "x-request-id": "3b1a2f0c-1f8c-4c5c-9d2d-7f1c1f9e2a11"},
	"host": "example.com", "id": "1234567890", "method": "GET", "path": "/orders/7?x=1", "protocol": "HTTP/1.1", "scheme": "https", "size": "0"},
	"time": "2026-02-03T04:05:06Z"},
	"source": {"address": {"socketAddress": {"address": "10.0.0.1", "portValue": 4711}}, "certificate": "CANARY"},
	"destination": {"address": {"socketAddress": {"address": "10.0.0.2", "portValue": 8080}}}, "contextExtensions": {"tenant": "orders"}},
	"parsed_path": ["orders", "7"], "parsed_query": {"x": ["1"]}, "truncated_body": false, "version": {"encoding": "protojson", "ext_authz": "v3"}}`).Value

var result = ast.MustParseTerm(`{"allowed": true, "headers": {"x-user": "alice"}}`).Value

var bundles = []decisionlog.Bundle{{Name: "policy", Revision: "r1"}}

func event(id string) *decisionlog.Event {
	return &decisionlog.Event{
		DecisionID: id, Path: "envoy/authz/allow", Timestamp: time.Now(), Bundles: bundles,
		Input: input, Result: result, ServerHandler: 1000, QueryEval: 500,
	}
}

func record(t testing.TB, l *decisionlog.Log, prefix string, n int) {
	t.Helper()
	for i := range n {
		if err := l.Record(time.Time{}, event(fmt.Sprintf("%s%d", prefix, i))); err != nil {
			t.Fatal(err)
		}
	}
}

// paced waits where much is buffered, so that the workers keep up.
func paced(t testing.TB, l *decisionlog.Log) {
	t.Helper()
	if l.Status().Buffered > 100 {
		await(t, "the workers keep up", func() bool { return l.Status().BufferedBytes < 1<<20 })
	}
}

// await waits until f is true.
func await(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

// settled waits until nothing is buffered, and returns the books.
func (h *house) settled() decisionlog.Books {
	h.t.Helper()
	await(h.t, "nothing is buffered", func() bool { return h.Books().Buffered == 0 })
	return h.check()
}

// check checks that the books balance.
func (h *house) check() decisionlog.Books {
	h.t.Helper()
	b := h.Books()
	if sum := b.Delivered + b.Buffered + dropped(b); b.Recorded != sum {
		h.t.Errorf("the books do not balance: %+v", b)
	}
	return b
}

func dropped(b decisionlog.Books) (all uint64) {
	for _, n := range b.Dropped {
		all += n
	}
	return all
}

// once checks that each ID came exactly once, and how many there are.
func once(t testing.TB, ids map[string]int, want int) {
	t.Helper()
	for id, n := range ids {
		if n != 1 {
			t.Errorf("%s came %d times", id, n)
		}
	}
	if len(ids) != want {
		t.Errorf("got %d events, want %d", len(ids), want)
	}
}

func drain(h *house, limit time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	h.Drain(ctx)
}

// lockedBuffer is a console.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func idsOf(t testing.TB, text string) map[string]int {
	t.Helper()
	events, err := eventsIn([]byte(strings.TrimSpace(text)))
	if err != nil {
		t.Fatal(err)
	}
	ids := map[string]int{}
	for _, e := range events {
		ids[e["decision_id"].(string)]++
	}
	return ids
}

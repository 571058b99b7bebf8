package decisionlog_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// randomObject is an object that cannot be compressed to less than about so many
// bytes.
func randomObject(n int) ast.Object {
	var b strings.Builder
	for b.Len() < n*2 {
		fmt.Fprintf(&b, "%016x", rand.Uint64())
	}
	return ast.NewObject(ast.Item(ast.StringTerm("x"), ast.StringTerm(b.String())))
}

func TestConsoleSink(t *testing.T) {
	t.Parallel()
	console := new(lockedBuffer)
	h := newHouse(t, decisionlog.Config{Console: console, Redact: true})
	for i := range 10 {
		record(t, h.Open(soon(decisionlog.Console{})), fmt.Sprint(i, "-"), 100)
	}
	h.settled()
	once(t, idsOf(t, console.String()), 1000)
	line, _, _ := strings.Cut(console.String(), "\n")
	for _, want := range []string{`"level":"info"`, `"msg":"Decision Log"`, `"type":"openpolicyagent.org/decision_logs"`, `"labels":{"tenant":"orders"}`} {
		if !strings.Contains(line, want) {
			t.Errorf("%s is missing in %s", want, line)
		}
	}
}

// tornWriter fails now and then after a part of what is written.
type tornWriter struct {
	lockedBuffer
	n int
}

func (w *tornWriter) Write(p []byte) (int, error) {
	if w.n++; w.n%3 != 0 {
		n, _ := w.lockedBuffer.Write(p[:len(p)/3])
		return n, io.ErrShortWrite
	}
	return w.lockedBuffer.Write(p)
}

// What was cut off is a line that nobody can read; each event has a whole one.
func TestTornConsole(t *testing.T) {
	t.Parallel()
	w := new(tornWriter)
	h := newHouse(t, decisionlog.Config{Console: w})
	record(t, h.Open(soon(decisionlog.Console{})), "e", 200)
	h.settled()
	ids := map[string]int{}
	for line := range strings.Lines(w.String()) {
		var e struct {
			ID string `json:"decision_id"`
		}
		if json.Unmarshal([]byte(line), &e) == nil {
			ids[e.ID]++
		}
	}
	once(t, ids, 200)
}

func TestFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "decisions.jsonl")
	if err := os.WriteFile(path, []byte("{\"decision_id\":\"cut o"), 0o600); err != nil {
		t.Fatal(err)
	}
	sink := decisionlog.NewFile(decisionlog.FileConfig{Path: path, MaxBytes: 20 << 10, MaxFiles: 3})
	h := newHouse(t, decisionlog.Config{})
	a, b := h.Open(soon(sink)), h.Open(soon(sink))
	for i := range 20 {
		record(t, a, fmt.Sprint("a", i, "-"), 10)
		record(t, b, fmt.Sprint("b", i, "-"), 10)
		time.Sleep(2 * time.Millisecond)
	}
	if books := h.settled(); books.Delivered != 400 {
		t.Errorf("got %+v", books)
	}
	all, err := filepath.Glob(path + "*")
	if err != nil || len(all) != 3 {
		t.Fatalf("got %v, %v, want three files", all, err)
	}
	found := 0
	for _, name := range all {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > 20<<10 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has %d bytes and mode %v", name, info.Size(), info.Mode())
		}
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		ids := idsOf(t, string(text))
		once(t, ids, len(ids))
		found += len(ids)
	}
	if found < 20 {
		t.Errorf("found %d events", found)
	}
}

// A full disk: what cannot be written waits, within its bound, and is there once
// it can be.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/dev/full"); err != nil {
		t.Skip("there is no /dev/full")
	}
	path := filepath.Join(t.TempDir(), "decisions.jsonl")
	if err := os.Symlink("/dev/full", path); err != nil {
		t.Fatal(err)
	}
	h := newHouse(t, decisionlog.Config{})
	set := soon(decisionlog.NewFile(decisionlog.FileConfig{Path: path}))
	set.Reporting.BufferBytes = 50 << 10
	set.Reporting.MaxDelay = 100 * time.Millisecond
	log := h.Open(set)
	for i := range 100 {
		record(t, log, fmt.Sprint("e", i, "-"), 10)
		if got := log.Status().BufferedBytes; got > 50<<10 {
			t.Fatalf("%d bytes are buffered", got)
		}
	}
	await(t, "the fault is noted", func() bool { return strings.Contains(log.Status().Message, "no space left") })
	if s := log.Status(); s.Dropped["buffer_full"] == 0 {
		t.Errorf("got %+v", s)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	b := h.settled()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	once(t, idsOf(t, string(text)), int(b.Delivered))
	if b.Delivered == 0 || b.Delivered+b.Dropped["buffer_full"] != 1000 {
		t.Errorf("got %+v", b)
	}
}

func TestS3(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	var keys []string
	rec.breaks(func(n int, w http.ResponseWriter, r *http.Request, _ []byte) bool {
		keys = append(keys, r.URL.EscapedPath())
		if n == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
		return n == 1
	})
	h := newHouse(t, decisionlog.Config{})
	log := h.Open(never(decisionlog.NewS3(decisionlog.S3Config{
		HTTP: decisionlog.HTTPConfig{URL: rec.URL + "/bucket", Authorize: func(r *http.Request) error {
			if _, err := io.Copy(io.Discard, r.Body); err != nil { // as who signs it
				return err
			}
			body, err := r.GetBody()
			if err != nil {
				return err
			}
			text, err := io.ReadAll(body)
			r.Header.Set("X-Signed", fmt.Sprint(len(text)))
			return err
		}},
		Prefix: "a b/c+d/",
	})))
	record(t, log, "e", 10)
	log.Flush()
	if b := h.settled(); b.Delivered != 10 {
		t.Errorf("got %+v", b)
	}
	_, _, chunks := rec.received()
	if len(chunks) != 1 || len(keys) != 2 || keys[0] != keys[1] {
		t.Fatalf("got %d objects at %v", len(chunks), keys)
	}
	if pattern := `^/bucket/a%20b/c%2Bd/\d{4}/\d\d/\d\d/\d\d/\d{8}T\d{6}\.\d{6}Z-[0-9a-z]+\.jsonl\.gz$`; !regexp.MustCompile(pattern).MatchString(keys[0]) {
		t.Errorf("key is %s", keys[0])
	}
	c := chunks[0]
	if c.method != "PUT" || c.header.Get("X-Signed") != fmt.Sprint(c.size) || c.header.Get("Content-Encoding") != "" || bytes.Count(rec.raw, []byte("\n")) != 10 {
		t.Errorf("got %+v", c)
	}
}

// No secret of an event is in what any sink is given.
func TestNoSecretLeaves(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	console := new(lockedBuffer)
	path := filepath.Join(t.TempDir(), "decisions.jsonl")
	h := newHouse(t, decisionlog.Config{Console: console, Redact: true})
	log := h.Open(soon(rec.service(), decisionlog.Console{}, decisionlog.NewFile(decisionlog.FileConfig{Path: path}),
		decisionlog.NewS3(decisionlog.S3Config{HTTP: decisionlog.HTTPConfig{URL: rec.URL}})))
	e := event("e")
	e.Result = ast.MustParseTerm(`{"allowed": true, "headers": {"authorization": "CANARY"}, "response_headers_to_add": [{"Set-Cookie": "CANARY"}]}`).Value
	e.NDBuiltinCache = ast.MustParseTerm(`{"http.send": {[{"url": "http://u:CANARY@h/?k=CANARY", "headers": {"X-Api-Key": "CANARY"}}]: {"raw_body": "CANARY"}},
		"io.jwt.decode_verify": {["CANARY", {"secret": "CANARY"}]: [true, {}, {}]}, "opa.runtime": {[]: {"env": {"A": "CANARY"}}}}`).Value.(ast.Object)
	e.Headers = map[string][]string{"Authorization": {"CANARY"}}
	log.Record(time.Time{}, e)
	if b := h.settled(); b.Delivered != 1 {
		t.Fatalf("got %+v", b)
	}
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"HTTP": string(rec.raw), "console": console.String(), "file": string(file)} {
		if !strings.Contains(text, `"decision_id":"e"`) || !strings.Contains(text, decisionlog.Redacted) || strings.Contains(text, "CANARY") {
			t.Errorf("%s: got %s", name, text)
		}
	}
}

// Identities tell sinks apart that do not deliver alike, and say nothing secret.
func TestIdentity(t *testing.T) {
	t.Parallel()
	web := decisionlog.HTTPConfig{URL: "https://u:SECRET@h/", Header: http.Header{"Authorization": {"SECRET"}}}
	other := web
	other.Header = http.Header{"Authorization": {"other"}}
	service := func(c decisionlog.ServiceConfig) decisionlog.Sink { return decisionlog.NewService(c) }
	sinks := []decisionlog.Sink{
		decisionlog.Console{},
		service(decisionlog.ServiceConfig{HTTP: web}), service(decisionlog.ServiceConfig{HTTP: other}),
		service(decisionlog.ServiceConfig{HTTP: web, Partition: "p"}), service(decisionlog.ServiceConfig{HTTP: web, Resource: "/r"}),
		decisionlog.NewS3(decisionlog.S3Config{HTTP: web}), decisionlog.NewS3(decisionlog.S3Config{HTTP: web, Prefix: "p"}),
		decisionlog.NewFile(decisionlog.FileConfig{Path: "a"}), decisionlog.NewFile(decisionlog.FileConfig{Path: "a", MaxFiles: 2}),
	}
	seen := map[string]bool{}
	for _, s := range sinks {
		if seen[s.Identity()] || strings.Contains(s.Identity(), "SECRET") {
			t.Errorf("identity %s", s.Identity())
		}
		seen[s.Identity()] = true
	}
	if a, b := service(decisionlog.ServiceConfig{HTTP: web}), service(decisionlog.ServiceConfig{HTTP: web, Resource: "/logs"}); a.Identity() != b.Identity() {
		t.Error("equal sinks have different identities")
	}
}

// In each scrape the metrics balance.
func TestMetrics(t *testing.T) {
	t.Parallel()
	rec := newRecorder(t)
	registry := prometheus.NewPedanticRegistry()
	h := newHouse(t, decisionlog.Config{Registerer: registry})
	log := h.Open(soon(rec.service()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 2000 {
			log.Record(time.Time{}, event(fmt.Sprint(i)))
			paced(t, log)
		}
	}()
	scrape := func() map[string]float64 {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.Metric {
				name := f.GetName()
				for _, l := range m.Label {
					name += " " + l.GetValue()
				}
				got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		const events = "gatehouse_decision_log_events_total"
		if got[events+" recorded"] != got[events+" delivered"]+got[events+" dropped"]+got["gatehouse_decision_log_buffered_events"] {
			t.Errorf("a scrape does not balance: %v", got)
		}
		return got
	}
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		scrape()
	}
	h.settled()
	got := scrape()
	for name, want := range map[string]float64{
		"gatehouse_decision_log_events_total delivered":              2000,
		"gatehouse_decision_log_buffered_bytes":                      0,
		"gatehouse_decision_log_sink_events_total service delivered": 2000,
		"gatehouse_decision_log_dropped_total buffer_full":           0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v, want %v", name, v, want)
		}
	}
}

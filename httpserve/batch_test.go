package httpserve_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// answer is the answer to a batch.
type answer struct {
	ID        string `json:"batch_decision_id"`
	Responses map[string]struct {
		ID         string          `json:"decision_id"`
		Status     string          `json:"http_status_code"`
		Code       string          `json:"code"`
		Result     json.RawMessage `json:"result"`
		Provenance struct {
			Bundles map[string]struct{ Revision string }
		}
	}
}

func post(h http.Handler, path, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest("POST", "http://localhost"+path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func batch(t testing.TB, h http.Handler, query, body string, header ...string) (int, *answer) {
	t.Helper()
	w := post(h, "/t/orders/v1/batch/data/app/x"+query, body, header...)
	a := new(answer)
	if err := json.Unmarshal(w.Body.Bytes(), a); err != nil {
		t.Fatalf("%v in %s", err, w.Body)
	}
	return w.Code, a
}

// inputs makes the body of a batch.
func inputs(n int, text func(i int) string) string {
	var b strings.Builder
	b.WriteString(`{"inputs":{`)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"k%d":%s`, i, text(i))
	}
	b.WriteString("}}")
	return b.String()
}

const offersX = "{data: [app/x]}"

// Equal items are asked once, where asking again gives the same; each is a decision
// of its own in the log.
func TestBatchLog(t *testing.T) {
	for _, c := range []struct {
		name, policy string
		same         bool // equal items have equal answers
	}{
		{"the answer follows from the question", "x := sprintf(\"%s of %d\", [input.n, input.c])", true},
		{"it does not", "x := uuid.rfc4122(input.n)", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			logs, console := authztest.Logs(t)
			p, _ := poolOf(t, tenants.Config{Logs: logs}, "package app\n\n"+c.policy, offersX, func(s *tenants.Settings) { s.Log = authztest.Logged() })
			h := server(t, httpserve.Config{Pool: p, Local: true})

			status, a := batch(t, h, "", `{"common_input":{"c":1},"inputs":{"a":{"n":"1"},"b":{"n":"2"},"again":{"n":"1"},"more":{"n":"1"}}}`)
			if status != 200 || len(a.Responses) != 4 {
				t.Fatalf("got %d, %+v", status, a)
			}
			first := string(a.Responses["a"].Result)
			for _, key := range []string{"again", "more"} {
				if got := string(a.Responses[key].Result); (got == first) != c.same {
					t.Errorf("got %s for %q and %s for its equal", got, key, first)
				}
			}
			if string(a.Responses["b"].Result) == first {
				t.Errorf("got %s for two different items", first)
			}
			events := console.Events(4)
			if len(events) != 4 {
				t.Fatalf("got %d events, want 4", len(events))
			}
			seen := map[string]bool{}
			for _, e := range events {
				place := e["custom"].(map[string]any)["batch"].(map[string]any)
				key := place["key"].(string)
				seen[key] = true
				item := a.Responses[key]
				input := e["input"].(map[string]any)
				wantIndex := map[string]float64{"a": 0, "b": 1, "again": 2, "more": 3}[key]
				if e["decision_id"] != item.ID || e["batch_decision_id"] != a.ID || place["index"] != wantIndex || place["size"] != 4.0 ||
					fmt.Sprintf("%q", e["result"]) != string(item.Result) || input["c"] != 1.0 || e["path"] != "app/x" {
					t.Errorf("event %v\nof item %q: %+v of batch %s", e, key, item, a.ID)
				}
			}
			if len(seen) != 4 {
				t.Errorf("got events of %v, want one for each item", seen)
			}
		})
	}
}

const versioned = `package app

x := {"version": data.version, "n": input.n}
-- .manifest --
{"revision": "%[1]d"}
-- data.json --
{"version": %[1]d}
`

// Every answer of a batch is that of the one revision which it names, whatever is
// activated meanwhile, and that is never older than what decided when it came.
func TestBatchRevision(t *testing.T) {
	p, source := pool(t, fmt.Sprintf(versioned, 0), offersX, nil)
	h := server(t, httpserve.Config{Pool: p, Local: true})
	body := inputs(50, func(i int) string { return fmt.Sprintf(`{"n":%d}`, i) })
	batch(t, h, "", body) // it is loaded

	ctx, stop := context.WithTimeout(t.Context(), 2*time.Second)
	defer stop()
	var newest atomic.Int64
	var work sync.WaitGroup
	work.Go(func() {
		for version := int64(1); ctx.Err() == nil; version++ {
			source.Set("orders", fmt.Sprintf(versioned, version))
			if err := p.Refresh(context.Background(), "orders"); err != nil {
				t.Errorf("refresh: %v", err)
			}
			newest.Store(version)
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	versions := make([]map[string]bool, 2)
	for g := range versions {
		versions[g] = map[string]bool{}
		work.Go(func() {
			for ctx.Err() == nil {
				before := newest.Load()
				status, a := batch(t, h, "?provenance", body)
				if status != 200 || len(a.Responses) != 50 {
					t.Errorf("got %d with %d items", status, len(a.Responses))
					return
				}
				revision := a.Responses["k0"].Provenance.Bundles["policy"].Revision
				versions[g][revision] = true
				for i := range 50 {
					item := a.Responses[fmt.Sprintf("k%d", i)]
					want := fmt.Sprintf(`{"n":%d,"version":%s}`, i, revision)
					if string(item.Result) != want || item.Provenance.Bundles["policy"].Revision != revision {
						t.Errorf("item %d: got %s of revision %s, want %s", i, item.Result, item.Provenance.Bundles["policy"].Revision, want)
						return
					}
				}
				var got int64
				if _, err := fmt.Sscan(revision, &got); err != nil || got < before {
					t.Errorf("got revision %s after %d had been activated", revision, before)
					return
				}
			}
		})
	}
	work.Wait()
	if n := newest.Load(); n < 10 || len(versions[0]) < 5 {
		t.Errorf("got %d revisions, and %d in answers: too few to tell", n, len(versions[0]))
	}
}

// Batches and updates never wait for each other: many at once, each larger than
// the slots, all end.
func TestBatchNoDeadlock(t *testing.T) {
	p, source := poolOf(t, tenants.Config{Workers: 1}, fmt.Sprintf(versioned, 0), offersX, func(s *tenants.Settings) {
		s.Limits.Concurrency, s.Limits.EvaluationTime = 1, 20*time.Second
	})
	h := server(t, httpserve.Config{Pool: p, Local: true})
	body := inputs(300, func(i int) string { return fmt.Sprintf(`{"n":%d}`, i) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		var work sync.WaitGroup
		for range 8 {
			work.Go(func() {
				if status, a := batch(t, h, "", body); status != 200 || len(a.Responses) != 300 {
					t.Errorf("got %d with %d items", status, len(a.Responses))
				}
			})
		}
		for version := range 20 {
			source.Set("orders", fmt.Sprintf(versioned, version+1))
			if err := p.Refresh(context.Background(), "orders"); err != nil {
				t.Errorf("refresh: %v", err)
			}
		}
		work.Wait()
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("they wait for each other")
	}
}

func TestBatchOfThousand(t *testing.T) {
	p, _ := pool(t, fmt.Sprintf(versioned, 7), offersX, nil)
	h := server(t, httpserve.Config{Pool: p, Local: true})
	status, a := batch(t, h, "", inputs(1000, func(i int) string { return fmt.Sprintf(`{"n":%d}`, i) }))
	if status != 200 || len(a.Responses) != 1000 {
		t.Fatalf("got %d with %d items", status, len(a.Responses))
	}
	ids := map[string]bool{a.ID: true}
	for i := range 1000 {
		item := a.Responses[fmt.Sprintf("k%d", i)]
		if want := fmt.Sprintf(`{"n":%d,"version":7}`, i); string(item.Result) != want || item.ID == "" || ids[item.ID] {
			t.Fatalf("item %d: got %+v, want %s and an ID of its own", i, item, want)
		}
		ids[item.ID] = true
	}
	if w := post(h, "/t/orders/v1/batch/data/app/x", inputs(1001, func(int) string { return "1" })); w.Code != 413 {
		t.Errorf("got %d for an item too many", w.Code)
	}
}

// slow takes long where the input says so.
const slow = `package app

x := input.n if not input.slow

x := count([1 | some i in numbers.range(1, 20000); some j in numbers.range(1, 20000); i < j]) if input.slow
`

// What is ready when the time is over is answered, and the rest says why not.
func TestBatchDeadline(t *testing.T) {
	p, _ := pool(t, slow, "{data: [app/x], batch: {seconds: 0.3}}", func(s *tenants.Settings) {
		s.Limits.Concurrency, s.Limits.EvaluationTime = 2, 10*time.Second
	})
	h := server(t, httpserve.Config{Pool: p, Local: true})
	for _, header := range [][]string{nil, {"X-Request-Timeout", "200ms"}, {"X-Request-Timeout", "0.2"}} {
		start := time.Now()
		status, a := batch(t, h, "", `{"inputs":{"a":{"n":1},"slow":{"slow":true},"b":{"n":2},"slower":{"slow":1},"late":{"n":3}}}`, header...)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("took %s", took)
		}
		if status != 207 || string(a.Responses["a"].Result) != "1" || a.Responses["a"].Status != "200" || string(a.Responses["b"].Result) != "2" {
			t.Errorf("%v: got %d, %+v, want those that are ready", header, status, a)
		}
		for _, key := range []string{"slow", "slower"} {
			if r := a.Responses[key]; r.Status != "500" || r.Code != "deadline_exceeded" || r.ID == "" {
				t.Errorf("%v: %s: got %+v", header, key, r)
			}
		}
	}
}

// Lines are sent as items are answered, not when all are.
func TestBatchLines(t *testing.T) {
	p, _ := pool(t, slow, "{data: [app/x], batch: {seconds: 3}}", func(s *tenants.Settings) {
		s.Limits.Concurrency, s.Limits.EvaluationTime = 2, 10*time.Second
	})
	web := httptest.NewServer(server(t, httpserve.Config{Pool: p, Local: true}))
	defer web.Close()
	req, err := http.NewRequestWithContext(t.Context(), "POST", web.URL+"/t/orders/v1/batch/data/app/x",
		strings.NewReader(`{"inputs":{"slow":{"slow":true},"a":{"n":1},"b":{"n":2}}}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/x-ndjson")
	start := time.Now()
	resp, err := http.DefaultClient.Do(req) // which asks for gzip by itself
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for n, want := range []string{`"key":"a"`, `"key":"b"`, `"key":"slow"`, `"size":3,"failed":1}`} {
		if !lines.Scan() || !strings.Contains(lines.Text(), want) {
			t.Fatalf("line %d: got %s %v, want %s in it", n, lines.Text(), lines.Err(), want)
		}
		if took := time.Since(start); n < 2 && took > 2*time.Second {
			t.Errorf("line %d came after %s", n, took)
		}
	}
	if lines.Scan() {
		t.Errorf("got another line %s", lines.Text())
	}
}

// When the client goes, nothing more of its batch is begun.
func TestBatchClientGone(t *testing.T) {
	p, _ := pool(t, slow, "{data: [app/x], batch: {seconds: 60}}", func(s *tenants.Settings) {
		s.Limits.Concurrency, s.Limits.EvaluationTime = 2, 30*time.Second
	})
	h := server(t, httpserve.Config{Pool: p, Local: true})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	r := httptest.NewRequest("POST", "http://localhost/t/orders/v1/batch/data/app/x",
		strings.NewReader(inputs(500, func(i int) string { return fmt.Sprintf(`{"slow":%d}`, i+1) }))).WithContext(ctx)
	start := time.Now()
	h.ServeHTTP(httptest.NewRecorder(), r)
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

func zipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(text)) // to memory
	_ = w.Close()
	return b.String()
}

// Bodies are bounded as they are sent and as they are expanded, before anything is
// evaluated.
func TestBodies(t *testing.T) {
	logs, console := authztest.Logs(t)
	p, _ := poolOf(t, tenants.Config{Logs: logs}, "package app\n\nx := input.n", "{data: [app/x], batch: {bytes: 10000}}", func(s *tenants.Settings) {
		s.Log = authztest.Logged()
		s.Limits.BodyBytes = 10000
	})
	web := httptest.NewServer(server(t, httpserve.Config{Pool: p, Local: true}))
	defer web.Close()
	fits := `{"inputs":{"a":{"n":1,"x":"` + strings.Repeat("x", 9900) + `"}},"input":{"n":1}}`
	large := `{"inputs":{"a":{"n":1,"x":"` + strings.Repeat("x", 10000) + `"}},"input":{"n":1}}`
	for _, c := range []struct {
		name, body, encoding string
		chunked              bool
		want                 int
	}{
		{"fits", fits, "", false, 200},
		{"fits, of unknown size", fits, "", true, 200},
		{"too large", large, "", false, 413},
		{"too large, of unknown size", large, "", true, 413},
		{"zipped", zipped(fits), "gzip", false, 200},
		{"zipped, and too large", zipped(large), "gzip", false, 413},
		{"a bomb", zipped(strings.Repeat("x", 5<<20)), "gzip", true, 413},
		{"not zipped", fits, "gzip", false, 400},
		{"cut", zipped(fits)[:60], "gzip", false, 400},
		{"a wrong sum", func() string { z := []byte(zipped(fits)); z[len(z)-5] ^= 1; return string(z) }(), "gzip", false, 400},
		{"zipped twice", zipped(zipped(fits)), "gzip", false, 400},
		{"another encoding", fits, "deflate", false, 415},
	} {
		for _, path := range []string{"/t/orders/v1/batch/data/app/x", "/t/orders/v1/data/app/x"} {
			var body io.Reader = strings.NewReader(c.body)
			if c.chunked {
				body = io.MultiReader(body)
			}
			req, err := http.NewRequestWithContext(t.Context(), "POST", web.URL+path, body)
			if err != nil {
				t.Fatal(err)
			}
			if c.encoding != "" {
				req.Header.Set("Content-Encoding", c.encoding)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode != c.want {
				t.Errorf("%s, %s: got %d %s, want %d", c.name, path, resp.StatusCode, text, c.want)
			}
			if c.want == 413 && !strings.Contains(string(text), "body is larger than 10000 bytes") {
				t.Errorf("%s: got %s, want the bound in it", c.name, text)
			}
		}
	}
	if got := console.Events(6); len(got) != 6 {
		t.Errorf("got %d decisions, want those 6 of bodies that fit", len(got))
	}
}

// Bodies that the server has no room for are refused, and room is given back.
func TestMemory(t *testing.T) {
	p, _ := pool(t, "package app\n\nx := input.n", offersX, nil)
	h := server(t, httpserve.Config{Pool: p, Local: true, Memory: 200 << 10})
	large := `{"input":{"n":1,"x":"` + strings.Repeat("x", 300<<10) + `"}}`
	small := `{"input":{"n":1,"x":"` + strings.Repeat("x", 50<<10) + `"}}`
	for range 20 {
		if w := post(h, "/t/orders/v1/data/app/x", large); w.Code != 503 || w.Header().Get("Retry-After") == "" {
			t.Fatalf("got %d, Retry-After %q", w.Code, w.Header().Get("Retry-After"))
		}
		if w := post(h, "/t/orders/v1/data/app/x", small); w.Code != 200 {
			t.Fatalf("got %d %s", w.Code, w.Body)
		}
	}
}

// Answers are zipped for those who take that.
func TestZippedAnswer(t *testing.T) {
	p, _ := pool(t, "package app\n\nx := input", offersX, nil)
	h := server(t, httpserve.Config{Pool: p, Local: true})
	body := `{"inputs":{"a":"` + strings.Repeat("x", 5000) + `"}}`
	for accept, want := range map[string]string{"gzip": "gzip", "br, gzip;q=0.5": "gzip", "gzip;q=0": "", "": "", "br": ""} {
		w := post(h, "/t/orders/v1/batch/data/app/x", body, "Accept-Encoding", accept)
		if got := w.Header().Get("Content-Encoding"); got != want {
			t.Errorf("%q: got %q", accept, got)
		}
		var from io.Reader = w.Body
		if want != "" {
			zr, err := gzip.NewReader(w.Body)
			if err != nil {
				t.Fatal(err)
			}
			from = zr
		}
		if text, err := io.ReadAll(from); err != nil || !json.Valid(text) {
			t.Errorf("%q: got %.100s, %v", accept, text, err)
		}
	}
}

// The operator's own policy must allow each question, and says nothing of itself.
func TestGuard(t *testing.T) {
	source := new(authztest.Memory)
	source.Set("guard", "package envoy.authz\n\nallow if input.n == 1")
	guard, err := authztest.Settings(source, nil)("guard")
	if err != nil {
		t.Fatal(err)
	}
	p, _ := poolOf(t, tenants.Config{Guard: guard}, "package app\n\nx := input.n", offersX, nil)
	h := server(t, httpserve.Config{Pool: p, Local: true})
	for w := post(h, "/t/orders/v1/data/app/x", `{"input":{"n":1}}`); w.Code == 503; {
		w = post(h, "/t/orders/v1/data/app/x", `{"input":{"n":1}}`) // it loads
	}
	status, a := batch(t, h, "", `{"inputs":{"yes":{"n":1},"no":{"n":2}}}`)
	if status != 207 || string(a.Responses["yes"].Result) != "1" || a.Responses["no"].Code != "unauthorized" || a.Responses["no"].Result != nil {
		t.Errorf("got %d, %+v", status, a)
	}
	if w := post(h, "/t/orders/v1/data/app/x", `{"input":{"n":2}}`); w.Code != 403 || !strings.Contains(w.Body.String(), "administrative policy") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

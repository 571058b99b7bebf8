package stage

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

func startRecorder(t *testing.T) *Recorder {
	t.Helper()
	r, err := StartRecorder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func get(t *testing.T, url string, headers ...string) (status int, body string, h http.Header) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data), resp.Header
}

func post(t *testing.T, url, text string) (*http.Response, error) {
	t.Helper()
	var b bytes.Buffer
	zip := gzip.NewWriter(&b)
	_, _ = zip.Write([]byte(text)) // to memory
	_ = zip.Close()
	req, err := http.NewRequest(http.MethodPost, url, &b)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Encoding", "gzip")
	resp, err := (&http.Client{Timeout: time.Second}).Do(req)
	if err == nil {
		resp.Body.Close()
	}
	return resp, err
}

func TestRecorderBundles(t *testing.T) {
	r := startRecorder(t)
	url := r.URL + "/bundles/a.tar.gz"
	if status, _, _ := get(t, url); status != 404 {
		t.Errorf("nothing there: got %d, want 404", status)
	}
	r.Put("/bundles/a.tar.gz", []byte("one"))
	status, body, h := get(t, url)
	first := h.Get("Etag")
	if status != 200 || body != "one" || first == "" {
		t.Errorf("got %d %q with ETag %q", status, body, first)
	}
	if status, _, _ := get(t, url, "If-None-Match", first, "Prefer", "modes=snapshot,delta;wait=10"); status != 304 {
		t.Errorf("unchanged, without long polls: got %d, want 304", status)
	}

	r.LongPolls(true)
	if status, _, _ := get(t, url, "If-None-Match", first, "Prefer", "modes=snapshot,delta;wait=0"); status != 304 {
		t.Errorf("a long poll that ends: got %d, want 304", status)
	}
	go func() {
		for r.Waiting() == 0 {
			time.Sleep(time.Millisecond)
		}
		r.PutDelta("/bundles/a.tar.gz", []byte("two"), []byte("one to two"))
	}()
	status, body, h = get(t, url, "If-None-Match", first, "Prefer", "modes=snapshot,delta;wait=10")
	if status != 200 || body != "one to two" || h.Get("Etag") == first || h.Get("Content-Type") != bundleType {
		t.Errorf("a long poll that sees a change: got %d %q", status, body)
	}
	if _, body, _ := get(t, url, "If-None-Match", first, "Prefer", "modes=snapshot"); body != "two" {
		t.Errorf("without a preference for deltas: got %q, want the snapshot", body)
	}
	if _, body, _ := get(t, url, "If-None-Match", `"other"`, "Prefer", "modes=snapshot,delta"); body != "two" {
		t.Errorf("from another revision: got %q, want the snapshot", body)
	}
}

func TestRecorderFaults(t *testing.T) {
	r := startRecorder(t)
	logs := r.URL + "/logs/shop"
	const chunk = `[{"decision_id":"1"},{"decision_id":"2"}]`
	if resp, err := post(t, logs, chunk); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	for _, f := range []struct {
		fault  Fault
		status int // 0: no answer
	}{
		{Fault{Reset: true}, 0},
		{Fault{Hang: true}, 0},
		{Fault{Partial: true}, 0},
		{Fault{Status: 429, RetryAfter: "7"}, 429},
		{Fault{MaxBytes: 10}, 413},
	} {
		r.Ail("/logs", f.fault)
		resp, err := post(t, logs, chunk)
		switch {
		case f.status == 0 && err == nil:
			t.Errorf("%+v: got %d, want no answer", f.fault, resp.StatusCode)
		case f.status != 0 && (err != nil || resp.StatusCode != f.status || resp.Header.Get("Retry-After") != f.fault.RetryAfter):
			t.Errorf("%+v: got %v, %v", f.fault, resp, err)
		}
	}
	r.Ail("/logs", Fault{Status: 503, Times: 1})
	for _, want := range []int{503, 200} {
		if resp, err := post(t, logs, chunk); err != nil || resp.StatusCode != want {
			t.Errorf("once: got %v, %v, want %d", resp, err, want)
		}
	}
	r.Ail("/bundles", Fault{BytesPerSecond: 100})
	r.Put("/bundles/slow", []byte(strings.Repeat("x", 20)))
	begun := time.Now()
	if _, body, _ := get(t, r.URL+"/bundles/slow"); len(body) != 20 || time.Since(begun) < 150*time.Millisecond {
		t.Errorf("slow: got %d bytes after %s", len(body), time.Since(begun))
	}
	events, err := r.Events("/logs")
	if err != nil || len(events) != 4 {
		t.Errorf("events that were accepted: got %s, %v, want 4", events, err)
	}
	if got := r.Count("/logs"); got != 8 {
		t.Errorf("requests: got %d, want 8", got)
	}
}

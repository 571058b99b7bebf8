package tenants_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
)

// waiting is a service that answers when there is something new, and gives
// deltas to whom takes them.
type waiting struct {
	*httptest.Server
	mu       sync.Mutex
	version  int
	archive  []byte        // of the version
	delta    []byte        // from the version before; nil: there is none
	changed  chan struct{} // closed at the next version
	requests atomic.Int32
	deltas   atomic.Int32 // that were asked for and given
}

func newWaiting(t *testing.T) *waiting {
	s := &waiting{changed: make(chan struct{})}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	t.Cleanup(s.CloseClientConnections)
	return s
}

func (s *waiting) set(text string, delta []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.archive, s.delta = authztest.Tarball(authztest.Files(text)), delta
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *waiting) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.requests.Add(1)
	prefer := r.Header.Get("Prefer")
	etag := func() string { return fmt.Sprintf(`"%d"`, s.version) }
	w.Header().Set("Content-Type", "application/vnd.openpolicyagent.bundles")
	s.mu.Lock()
	if i := strings.Index(prefer, "wait="); i >= 0 && r.Header.Get("If-None-Match") == etag() {
		var seconds int
		_, _ = fmt.Sscanf(prefer[i:], "wait=%d", &seconds)
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-time.After(time.Duration(seconds) * time.Second):
		case <-r.Context().Done():
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	w.Header().Set("ETag", etag())
	known := r.Header.Get("If-None-Match")
	switch {
	case known == etag():
		w.WriteHeader(http.StatusNotModified)
	case s.delta != nil && strings.Contains(prefer, "delta") && known == fmt.Sprintf(`"%d"`, s.version-1):
		s.deltas.Add(1)
		_, _ = w.Write(s.delta)
	default:
		_, _ = w.Write(s.archive)
	}
}

// deltaOf is a delta bundle with one operation.
func deltaOf(op, path string, value any) []byte {
	patch, err := json.Marshal(map[string]any{"data": []any{map[string]any{"op": op, "path": path, "value": value}}})
	if err != nil {
		panic(err)
	}
	return authztest.Tarball(map[string]string{"/patch.json": string(patch), "/.manifest": `{"revision": "delta", "roots": [""]}`})
}

const waitingConfig = `
services: {s: {url: "URL"}}
bundles: {p: {service: s, resource: b, polling: {min_delay_seconds: 1000, max_delay_seconds: 1000, long_polling_timeout_seconds: 30}}}
`

const counting = "package envoy.authz\ndefault allow := false\nallow if data.n == %d\n-- data.json --\n{\"n\": %d, \"other\": [1, 2]}"

// A change decides as soon as the service says so, without polls in between.
func TestLongPolling(t *testing.T) {
	s := newWaiting(t)
	s.set("package envoy.authz\nallow := false", nil)
	p := (&service{Server: s.Server}).configured(t, waitingConfig)
	if got := allowed(p, "orders"); got != "false" {
		t.Fatal(got)
	}
	eventually(t, "waited for", func() bool { return s.requests.Load() == 2 })
	time.Sleep(1500 * time.Millisecond) // longer than what counts as an answer at once
	for i, text := range []string{"true", "false", "true"} {
		s.set("package envoy.authz\nallow := "+text, nil)
		eventually(t, "change "+text, func() bool { return allowed(p, "orders") == text })
		eventually(t, "waited for again", func() bool { return s.requests.Load() == int32(3+i) })
	}
	begun := time.Now()
	if err := p.Refresh(t.Context(), "orders"); err != nil || time.Since(begun) > 5*time.Second {
		t.Errorf("a refresh while the source is waited for: %v after %s, want it at once", err, time.Since(begun))
	}
}

// A source that says it waits, and answers at once, is polled as any other.
func TestLongPollingThatDoesNotWait(t *testing.T) {
	s := newWaiting(t)
	s.set("package envoy.authz\nallow := true", nil)
	hasty := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Del("Prefer")
		s.ServeHTTP(w, r)
	}))
	defer hasty.Close()
	p := (&service{Server: hasty}).configured(t, waitingConfig)
	if got := allowed(p, "orders"); got != "true" {
		t.Fatal(got)
	}
	time.Sleep(2 * time.Second)
	if n := s.requests.Load(); n > 3 {
		t.Errorf("%d requests in two seconds, want the polling delay between them", n)
	}
}

func TestDelta(t *testing.T) {
	s := newWaiting(t)
	s.set(fmt.Sprintf(counting, 2, 1), nil)
	p := (&service{Server: s.Server}).configured(t, strings.Replace(waitingConfig, ", long_polling_timeout_seconds: 30", "", 1))
	refresh := func() {
		t.Helper()
		if err := p.Refresh(t.Context(), "orders"); err != nil {
			t.Fatal(err)
		}
	}
	if got := allowed(p, "orders"); got != "false" {
		t.Fatal(got)
	}
	s.set(fmt.Sprintf(counting, 2, 2), deltaOf("replace", "/n", 2))
	refresh()
	if got := allowed(p, "orders"); got != "true" || s.deltas.Load() != 1 {
		t.Fatalf("after a delta: allowed %s by %d deltas, want true by 1", got, s.deltas.Load())
	}
	if st, _ := p.Tenant("orders"); st.Revision != "delta" {
		t.Errorf("got revision %q, want that of the delta", st.Revision)
	}
	// One that does not fit is refused, and then the whole is asked for.
	s.set(fmt.Sprintf(counting, 2, 3), deltaOf("replace", "/nowhere/n", 3))
	if err := p.Refresh(t.Context(), "orders"); err == nil || !strings.Contains(err.Error(), "patching") {
		t.Errorf("a delta to what is not there: got %v", err)
	}
	if got := allowed(p, "orders"); got != "true" {
		t.Errorf("after a refused delta: got %s, want the last good one", got)
	}
	refresh()
	if got := allowed(p, "orders"); got != "false" || s.deltas.Load() != 2 {
		t.Errorf("after the whole: allowed %s by %d deltas, want false by 2", got, s.deltas.Load())
	}
}

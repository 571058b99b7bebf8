package stage

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// bundleType is how a server of bundles says that it takes long polls.
const bundleType = "application/vnd.openpolicyagent.bundles"

// maxBody bounds what is kept of a request, as it came and unpacked.
const maxBody = 64 << 20

// Recorder is all that an OPA is managed by, in one HTTP server: bundles and
// discovery bundles are got from it, decision logs and status messages are
// posted to it, at whatever paths. It keeps what was asked and posted, and is
// as ill as it is told to be.
//
// A GET is answered with what was put at its path: with an ETag and 304, and
// where LongPolls says so, held until it changes for as long as "Prefer: wait=N"
// asks. An OPA that prefers deltas and has the revision that a delta is from
// gets the delta.
type Recorder struct {
	URL string

	server *http.Server
	closed chan struct{}

	mu        sync.Mutex
	held      map[string]resource // :: path → what it is answered with; guarded by mu
	longPolls bool                // guarded by mu
	changed   chan struct{}       // closed and made anew with each change of held; guarded by mu
	faults    []*routeFault       // guarded by mu
	requests  []Recorded          // in order of their end; guarded by mu
	counts    map[string]int      // :: path → requests that came; guarded by mu
	waiting   int                 // long polls that are held; guarded by mu
}

// resource is what a path is answered with.
type resource struct {
	data, delta  []byte
	etag, before string // before: the ETag that the delta is from
}

// Recorded is one request, as it came.
type Recorded struct {
	At     time.Time // of its end
	Method string
	Path   string // without the query
	Header http.Header
	Body   []byte // unpacked
	Wire   int    // bytes of the body as it came
	Status int    // that it was answered with; 0: it was not
	Err    error  // of its body
}

// Accepted reports whether it was answered as done.
func (r *Recorded) Accepted() bool { return r.Status/100 == 2 }

// Fault is how a route is ill. Where several parts are set, the first counts.
type Fault struct {
	Reset          bool   // the connection is reset before anything is read
	MaxBytes       int    // a body that is larger as it comes is answered with 413
	Status         int    // instead of the answer
	RetryAfter     string // header of such an answer
	Hang           bool   // the request is read, and never answered
	Partial        bool   // half of the body is read or answered, then the connection is reset
	BytesPerSecond int    // of the body that is read, or answered
	Times          int    // so many requests; 0: until it is healed
}

type routeFault struct {
	prefix string
	fault  Fault
	left   int // of Times
}

// StartRecorder starts a server that has nothing and is well.
func StartRecorder() (*Recorder, error) {
	l, err := listenLoopback()
	if err != nil {
		return nil, err
	}
	r := &Recorder{
		URL:     "http://" + l.Addr().String(),
		closed:  make(chan struct{}),
		held:    map[string]resource{},
		changed: make(chan struct{}),
		counts:  map[string]int{},
	}
	r.server = &http.Server{Handler: http.HandlerFunc(r.serve), ErrorLog: log.New(io.Discard, "", 0)}
	go r.server.Serve(l) //nolint:errcheck // it ends with Close
	return r, nil
}

// Addr is the address of the server.
func (r *Recorder) Addr() string { return strings.TrimPrefix(r.URL, "http://") }

// Close stops the server.
func (r *Recorder) Close() {
	close(r.closed)
	_ = r.server.Close()
}

// Put has a path, such as "/bundles/orders.tar.gz", answered with these bytes.
func (r *Recorder) Put(path string, data []byte) { r.put(path, resource{data: data}) }

// PutDelta is Put, with the bytes for those who have what was there before and
// prefer a delta.
func (r *Recorder) PutDelta(path string, data, delta []byte) {
	r.put(path, resource{data: data, delta: delta})
}

// Remove has a path answered with 404.
func (r *Recorder) Remove(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.held, path)
	r.change()
}

func (r *Recorder) put(path string, next resource) {
	r.mu.Lock()
	defer r.mu.Unlock()
	next.etag = fmt.Sprintf(`"%x"`, sha256.Sum256(next.data))
	next.before = r.held[path].etag
	r.held[path] = next
	r.change()
}

// change wakes the long polls. r.mu is held.
func (r *Recorder) change() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// LongPolls says whether long polls are taken.
func (r *Recorder) LongPolls(on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.longPolls = on
	r.change()
}

// Ail makes the paths with a prefix ill. Of several prefixes that fit the
// longest counts.
func (r *Recorder) Ail(prefix string, f Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heal(prefix)
	r.faults = append(r.faults, &routeFault{prefix, f, f.Times})
	slices.SortFunc(r.faults, func(a, b *routeFault) int { return len(b.prefix) - len(a.prefix) })
}

// Heal ends Ail of a prefix. Requests that hang go on to do so.
func (r *Recorder) Heal(prefix string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.heal(prefix)
}

func (r *Recorder) heal(prefix string) {
	r.faults = slices.DeleteFunc(r.faults, func(f *routeFault) bool { return f.prefix == prefix })
}

// Requests returns what came at the paths with a prefix and was read, in order.
func (r *Recorder) Requests(prefix string) []Recorded {
	r.mu.Lock()
	defer r.mu.Unlock()
	var some []Recorded
	for _, req := range r.requests {
		if strings.HasPrefix(req.Path, prefix) {
			some = append(some, req)
		}
	}
	return some
}

// Count returns how many requests came at the paths with a prefix, those that
// were not read or not answered included.
func (r *Recorder) Count(prefix string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for path, count := range r.counts {
		if strings.HasPrefix(path, prefix) {
			n += count
		}
	}
	return n
}

// Waiting returns how many long polls are held.
func (r *Recorder) Waiting() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting
}

// Forget forgets all requests.
func (r *Recorder) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests, r.counts = nil, map[string]int{}
}

// Events returns the events of decision logs that were accepted at the paths
// with a prefix, in order. It fails where something else was posted there.
func (r *Recorder) Events(prefix string) ([]json.RawMessage, error) {
	var all []json.RawMessage
	for _, req := range r.Requests(prefix) {
		if req.Method != http.MethodPost || !req.Accepted() {
			continue
		}
		if got := req.Header.Get("Content-Encoding"); got != "gzip" {
			return nil, fmt.Errorf("POST %s: content encoding is %q, want gzip", req.Path, got)
		}
		var chunk []json.RawMessage
		if err := json.Unmarshal(req.Body, &chunk); err != nil {
			return nil, fmt.Errorf("POST %s: %w", req.Path, err)
		}
		all = append(all, chunk...)
	}
	return all, nil
}

// Statuses returns the status messages that were accepted at the paths with a
// prefix, in order.
func (r *Recorder) Statuses(prefix string) ([]json.RawMessage, error) {
	var all []json.RawMessage
	for _, req := range r.Requests(prefix) {
		if req.Method != http.MethodPost || !req.Accepted() {
			continue
		}
		if !json.Valid(req.Body) {
			return nil, fmt.Errorf("POST %s: body is not JSON", req.Path)
		}
		all = append(all, req.Body)
	}
	return all, nil
}

// fault returns how a path is ill at this request.
func (r *Recorder) fault(path string) Fault {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.counts[path]++
	for i, f := range r.faults {
		if !strings.HasPrefix(path, f.prefix) {
			continue
		}
		if f.fault.Times > 0 {
			if f.left--; f.left == 0 {
				r.faults = slices.Delete(r.faults, i, i+1)
			}
		}
		return f.fault
	}
	return Fault{}
}

func (r *Recorder) serve(w http.ResponseWriter, req *http.Request) {
	f := r.fault(req.URL.Path)
	if f.Reset {
		reset(w)
		return
	}
	rec := Recorded{Method: req.Method, Path: req.URL.Path, Header: req.Header.Clone()}
	defer func() {
		rec.At = time.Now()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.requests = append(r.requests, rec)
	}()

	posted := req.Method == http.MethodPost || req.Method == http.MethodPut
	if posted {
		rec.Body, rec.Wire, rec.Err = r.read(req, f)
	}
	answer := func(status int) {
		rec.Status = status
		w.WriteHeader(status)
	}
	switch {
	case f.MaxBytes > 0 && rec.Wire > f.MaxBytes:
		answer(http.StatusRequestEntityTooLarge)
	case f.Status != 0:
		if f.RetryAfter != "" {
			w.Header().Set("Retry-After", f.RetryAfter)
		}
		answer(f.Status)
	case f.Hang:
		r.wait(req.Context(), nil, time.Hour)
	case posted && f.Partial:
		reset(w)
	case posted && rec.Err != nil:
		answer(http.StatusBadRequest)
	case posted:
		answer(http.StatusOK)
	case req.Method == http.MethodGet:
		rec.Status = r.get(w, req, f)
	default:
		answer(http.StatusMethodNotAllowed)
	}
}

// read reads a body, as far and as fast as the fault has it.
func (r *Recorder) read(req *http.Request, f Fault) (body []byte, wire int, err error) {
	var from io.Reader = io.LimitReader(req.Body, maxBody)
	if f.Partial && req.ContentLength > 0 {
		from = io.LimitReader(from, req.ContentLength/2)
	}
	if f.BytesPerSecond > 0 {
		from = &slow{from: from, perSecond: f.BytesPerSecond, closed: r.closed}
	}
	data, err := io.ReadAll(from)
	if err != nil || req.Header.Get("Content-Encoding") != "gzip" {
		return data, len(data), err
	}
	zip, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return data, len(data), err
	}
	plain, err := io.ReadAll(io.LimitReader(zip, maxBody))
	return plain, len(data), err
}

// get answers with what is held at the path, and returns the status.
func (r *Recorder) get(w http.ResponseWriter, req *http.Request, f Fault) int {
	prefer := preferencesOf(req.Header)
	has := req.Header.Get("If-None-Match")
	deadline := time.Now().Add(prefer.wait)
	for {
		r.mu.Lock()
		res, ok := r.held[req.URL.Path]
		longPolls, changed := r.longPolls, r.changed
		r.mu.Unlock()
		if longPolls {
			w.Header().Set("Content-Type", bundleType)
		}
		switch left := time.Until(deadline); {
		case !ok:
			w.WriteHeader(http.StatusNotFound)
			return http.StatusNotFound
		case res.etag != has:
			data := res.data
			if res.delta != nil && prefer.delta && res.before == has {
				data = res.delta
			}
			w.Header().Set("Etag", res.etag)
			r.write(w, data, f)
			return http.StatusOK
		case !longPolls || left <= 0:
			w.Header().Set("Etag", res.etag)
			w.WriteHeader(http.StatusNotModified)
			return http.StatusNotModified
		default:
			r.hold(1)
			r.wait(req.Context(), changed, left)
			r.hold(-1)
			if req.Context().Err() != nil {
				return 0
			}
		}
	}
}

// hold counts long polls that are held.
func (r *Recorder) hold(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.waiting += n
}

// wait waits for the change, or the end of the request, of the server or of the
// time.
func (r *Recorder) wait(ctx context.Context, changed <-chan struct{}, atMost time.Duration) {
	timer := time.NewTimer(atMost)
	defer timer.Stop()
	select {
	case <-changed:
	case <-ctx.Done():
	case <-r.closed:
	case <-timer.C:
	}
}

// write answers with a body, as far and as fast as the fault has it.
func (r *Recorder) write(w http.ResponseWriter, data []byte, f Fault) {
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	switch {
	case f.Partial:
		_, _ = w.Write(data[:len(data)/2]) // the connection is reset
		_ = http.NewResponseController(w).Flush()
		reset(w)
	case f.BytesPerSecond > 0:
		from := &slow{from: bytes.NewReader(data), perSecond: f.BytesPerSecond, closed: r.closed}
		_, _ = io.Copy(flushing{w}, from) // the client is gone
	default:
		_, _ = w.Write(data) // the client is gone
	}
}

// reset resets the connection.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// preferences are what an OPA prefers of an answer.
type preferences struct {
	delta bool
	wait  time.Duration
}

// preferencesOf reads "modes=snapshot,delta;wait=10".
func preferencesOf(h http.Header) (p preferences) {
	for part := range strings.SplitSeq(h.Get("Prefer"), ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		switch name {
		case "modes":
			p.delta = slices.Contains(strings.Split(value, ","), "delta")
		case "wait":
			if n, err := strconv.Atoi(value); err == nil {
				p.wait = min(time.Duration(n)*time.Second, time.Hour)
			}
		}
	}
	return p
}

// slow is a reader that takes its time, ten times a second.
type slow struct {
	from      io.Reader
	perSecond int
	closed    <-chan struct{}
}

func (s *slow) Read(p []byte) (int, error) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-s.closed:
		return 0, errors.New("server is closed")
	}
	return s.from.Read(p[:min(len(p), max(1, s.perSecond/10))])
}

// flushing is a writer that keeps nothing back.
type flushing struct{ http.ResponseWriter }

func (f flushing) Write(p []byte) (int, error) {
	n, err := f.ResponseWriter.Write(p)
	return n, errors.Join(err, http.NewResponseController(f.ResponseWriter).Flush())
}

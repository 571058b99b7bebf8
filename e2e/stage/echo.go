package stage

import (
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
)

// TagHeader tells the requests of Client apart at the backend.
const TagHeader = "X-Stage-Tag"

// Seen is a request as the backend got it.
type Seen struct {
	Method  string              `json:"method"`
	Path    string              `json:"path"` // with the query, as it was sent
	Host    string              `json:"host"`
	Headers map[string][]string `json:"headers"` // :: name in lower case → values in order
	Body    string              `json:"body"`    // at most its first 64 KiB
	Bytes   int64               `json:"bytes"`   // of the body
}

// Echo is a backend that answers each request with what it saw of it.
type Echo struct {
	Addr string

	server *http.Server
	mu     sync.Mutex
	tags   map[string]int // :: tag → requests; guarded by mu
	total  int            // guarded by mu
}

// StartEcho starts a backend.
func StartEcho() (*Echo, error) { return StartEchoAt("127.0.0.1:0") }

// StartEchoAt starts a backend that listens on an address.
func StartEchoAt(addr string) (*Echo, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, err
	}
	e := &Echo{Addr: l.Addr().String(), tags: map[string]int{}}
	e.server = &http.Server{Handler: http.HandlerFunc(e.serve), ErrorLog: log.New(io.Discard, "", 0)}
	go e.server.Serve(l) //nolint:errcheck // it ends with Close
	return e, nil
}

// Close stops the backend.
func (e *Echo) Close() { _ = e.server.Close() }

// Hits returns how many requests with this tag came.
func (e *Echo) Hits(tag string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.tags[tag]
}

// Total returns how many requests came.
func (e *Echo) Total() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.total
}

func (e *Echo) serve(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	e.tags[r.Header.Get(TagHeader)]++
	e.total++
	e.mu.Unlock()

	head, _ := io.ReadAll(io.LimitReader(r.Body, 64<<10)) // a body that breaks off is short
	rest, _ := io.Copy(io.Discard, r.Body)
	seen := Seen{
		Method: r.Method, Path: r.RequestURI, Host: r.Host,
		Headers: map[string][]string{},
		Body:    string(head), Bytes: int64(len(head)) + rest,
	}
	for name, values := range r.Header {
		seen.Headers[lower(name)] = values
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Set-Cookie", "upstream=1")
	_ = json.NewEncoder(w).Encode(seen) // the client is gone
}

package stage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
)

// Bundle packs files, by path, as "opa build" does.
func Bundle(files map[string]string) []byte {
	var b bytes.Buffer
	zip := gzip.NewWriter(&b)
	t := tar.NewWriter(zip)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		text := files[name]
		// Writing to memory fails only for a header that is no header.
		if err := t.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
			panic(err)
		}
		if _, err := t.Write([]byte(text)); err != nil {
			panic(err)
		}
	}
	if err := t.Close(); err != nil {
		panic(err)
	}
	if err := zip.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// BundleServer is a small HTTP service of bundles: bundle NAME is at
// /NAME.tar.gz, with its ETag.
type BundleServer struct {
	URL string

	server  *http.Server
	mu      sync.Mutex
	held    map[string]bundle           // guarded by mu
	gets    map[string]map[int]int      // :: name → status → answers; guarded by mu
	hangs   map[string]bool             // guarded by mu
	custom  map[string]http.HandlerFunc // :: name → what answers instead; guarded by mu
	lookups int                         // requests; guarded by mu
	closed  chan struct{}
}

type bundle struct {
	data   []byte
	status int // instead of data
}

// StartBundleServer starts a service without bundles.
func StartBundleServer() (*BundleServer, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	s := &BundleServer{
		URL:    "http://" + l.Addr().String(),
		held:   map[string]bundle{},
		gets:   map[string]map[int]int{},
		hangs:  map[string]bool{},
		custom: map[string]http.HandlerFunc{},
		closed: make(chan struct{}),
	}
	s.server = &http.Server{Handler: http.HandlerFunc(s.serve)}
	go s.server.Serve(l) //nolint:errcheck // it ends with Close
	return s, nil
}

// Close stops the service.
func (s *BundleServer) Close() {
	close(s.closed)
	_ = s.server.Close()
}

// Put sets the bytes of a bundle.
func (s *BundleServer) Put(name string, data []byte) { s.put(name, bundle{data: data}) }

// Fail has a bundle answered with a status.
func (s *BundleServer) Fail(name string, status int) { s.put(name, bundle{status: status}) }

// Hang has requests for a bundle wait.
func (s *BundleServer) Hang(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hangs[name] = true
}

// Answer has requests for a bundle answered by a function, until the next Put.
func (s *BundleServer) Answer(name string, by http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.custom[name] = by
}

// Lookups returns how many requests there were, for whatever bundle.
func (s *BundleServer) Lookups() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lookups
}

// Answers returns how often requests for a bundle were answered with a status.
func (s *BundleServer) Answers(name string, status int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.gets[name][status]
}

func (s *BundleServer) put(name string, b bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held[name] = b
	delete(s.custom, name)
}

func (s *BundleServer) serve(w http.ResponseWriter, r *http.Request) {
	name := strings.TrimSuffix(strings.TrimPrefix(r.URL.Path, "/"), ".tar.gz")
	s.mu.Lock()
	b, ok := s.held[name]
	hangs, custom := s.hangs[name], s.custom[name]
	s.lookups++
	s.mu.Unlock()
	if custom != nil {
		custom(w, r)
		return
	}
	if hangs {
		select {
		case <-r.Context().Done():
		case <-s.closed:
		}
		return
	}
	etag := fmt.Sprintf(`"%x"`, sha256.Sum256(b.data))
	status := http.StatusOK
	switch {
	case !ok:
		status = http.StatusNotFound
	case b.status != 0:
		status = b.status
	case r.Header.Get("If-None-Match") == etag:
		status = http.StatusNotModified
	}
	s.mu.Lock()
	if s.gets[name] == nil {
		s.gets[name] = map[int]int{}
	}
	s.gets[name][status]++
	s.mu.Unlock()
	if status == http.StatusOK {
		w.Header().Set("Etag", etag)
	}
	w.WriteHeader(status)
	if status == http.StatusOK {
		_, _ = w.Write(b.data) // the client is gone
	}
}

package bundles_test

import (
	"context"
	"errors"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// The service has something new after 20 s, and says so to who waits for it.
func TestWait(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	synctest.Test(t, func(t *testing.T) {
		var prefer atomic.Value // of the last request
		service := serveInMemory(t, func(w http.ResponseWriter, r *http.Request) {
			prefer.Store(r.Header.Get("Prefer"))
			if r.URL.Path != "/other" {
				w.Header().Set("Content-Type", "application/vnd.openpolicyagent.bundles")
			}
			w.Header().Set("ETag", `"1"`)
			if r.Header.Get("If-None-Match") == `"1"` {
				select {
				case <-time.After(20 * time.Second):
					w.Header().Set("ETag", `"2"`)
				case <-r.Context().Done():
					return
				}
			}
			w.Write(archive)
		})
		transport := bundles.NewTransport(nil, 5*time.Second)
		transport.DialContext = service.dial
		h := bundles.NewHTTP(bundles.HTTPConfig{URL: "http://service", Client: &http.Client{Transport: transport}, Timeout: 8 * time.Second})

		first, err := h.Next(t.Context(), "orders", bundles.Have{})
		if err != nil || !first.Waits || prefer.Load() != "modes=snapshot" {
			t.Fatalf("got %+v, %v, asked for %q, want a bundle whose service waits", first, err, prefer.Load())
		}
		start := time.Now()
		have := bundles.Have{ETag: first.ETag, Digest: first.Digest, Wait: 30 * time.Second}
		b, err := h.Next(t.Context(), "orders", have)
		if err != nil || b.ETag != `"2"` || time.Since(start) != 20*time.Second {
			t.Errorf("got %v after %v, want the change after 20 s", err, time.Since(start))
		}
		if prefer.Load() != "modes=snapshot,delta;wait=30" {
			t.Errorf("asked for %q", prefer.Load())
		}

		have.Wait = 10 * time.Second
		start = time.Now()
		_, err = h.Next(t.Context(), "orders", have)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "not finished within 18s") || time.Since(start) != 18*time.Second {
			t.Errorf("got %v after %v, want it not finished within 18 s", err, time.Since(start))
		}
		start = time.Now()
		_, err = h.Fetch(t.Context(), "orders", first.ETag)
		if err == nil || !strings.Contains(err.Error(), "timeout awaiting response headers") || time.Since(start) != 5*time.Second {
			t.Errorf("no wait: got %v after %v, want a timeout after 5 s", err, time.Since(start))
		}
		if other, err := h.Next(t.Context(), "other", bundles.Have{}); err != nil || other.Waits {
			t.Errorf("another type: got %v, want a service that does not wait", err)
		}
	})
}

// memoryService is an HTTP server without a network: its time can be a test's.
type memoryService struct {
	conns chan net.Conn
	done  chan struct{}
}

func serveInMemory(t *testing.T, handler http.HandlerFunc) *memoryService {
	s := &memoryService{conns: make(chan net.Conn), done: make(chan struct{})}
	server := &http.Server{Handler: handler}
	go server.Serve(s)
	t.Cleanup(func() { server.Close() })
	return s
}

func (s *memoryService) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case s.conns <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (s *memoryService) Accept() (net.Conn, error) {
	select {
	case c := <-s.conns:
		return c, nil
	case <-s.done:
		return nil, net.ErrClosed
	}
}

func (s *memoryService) Close() error {
	close(s.done)
	return nil
}

func (s *memoryService) Addr() net.Addr { return &net.UnixAddr{Name: "memory"} }

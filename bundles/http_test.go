package bundles_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

// serve answers with an archive, or 304.
func serve(w http.ResponseWriter, r *http.Request, archive []byte) {
	etag := fmt.Sprintf(`W/"%x"`, sha256.Sum256(archive))
	w.Header().Set("ETag", etag)
	if r.Header.Get("If-None-Match") == etag {
		w.WriteHeader(http.StatusNotModified)
		return
	}
	w.Write(archive)
}

func newServer(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s.URL
}

func TestHTTPRequest(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	var got *http.Request
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		got = r
		w.Header().Set("ETag", `W/"v1"`)
		w.Header().Set("Content-Encoding", "gzip") // as object stores say of such a file
		w.Write(archive)
	})
	for _, test := range []struct{ url, name, want string }{
		{"", "orders", "/orders"},
		{"/", "/orders", "/orders"},
		{"/v1//", "//a/orders.tar.gz", "/v1/a/orders.tar.gz"},
		{"/v1", "a%2Fb/x%20y.tar.gz?version=2&x=%2F", "/v1/a%2Fb/x%20y.tar.gz?version=2&x=%2F"},
		{"/v1?token=t", "orders", "/v1/orders?token=t"},
		{"/v1?token=t", "orders?v=2", "/v1/orders?token=t&v=2"},
	} {
		h := bundles.NewHTTP(bundles.HTTPConfig{
			URL:       server + test.url,
			Header:    http.Header{"X-Key": {"k1", "k2"}},
			Authorize: func(r *http.Request) error { r.Header.Set("Authorization", "Bearer b"); return nil },
			UserAgent: "test/1",
		})
		b, err := h.Fetch(t.Context(), test.name, `"v0"`)
		if err != nil {
			t.Fatal(err)
		}
		if b.ETag != `W/"v1"` || b.Name != test.name {
			t.Errorf("got name %q, ETag %q, want %q, W/\"v1\"", b.Name, b.ETag, test.name)
		}
		if got.URL.String() != test.want {
			t.Errorf("%s and %s: got %s, want %s", test.url, test.name, got.URL, test.want)
		}
		for key, want := range map[string]string{
			"X-Key": "k1,k2", "Authorization": "Bearer b", "User-Agent": "test/1",
			"If-None-Match": `"v0"`, "Prefer": "modes=snapshot", "Accept-Encoding": "identity",
		} {
			if v := strings.Join(got.Header[key], ","); v != want {
				t.Errorf("%s: got %q, want %q", key, v, want)
			}
		}
	}
}

func TestHTTPErrors(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	for name, test := range map[string]struct {
		handler http.HandlerFunc
		want    string
		refused bool
	}{
		"304 without an ETag": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(304) }, "status 304 to a request that was not conditional", false},
		"HTML": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "<html>Sign in</html>")
		}, "not a gzip archive: it looks like HTML", true},
		"nothing": {func(w http.ResponseWriter, r *http.Request) {}, "it is empty", true},
		"status": {func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(500)
			io.WriteString(w, "secret of the service")
		}, "status 500 Internal Server Error", false},
		"no content": {func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(204) }, "status 204 No Content", false},
		"cut short": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(archive)+100))
			w.Write(archive)
		}, "the connection ended before the body", false},
		"cut chunks": {func(w http.ResponseWriter, r *http.Request) {
			w.Write(archive[:100])
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, "the connection ended before the body", false},
		"cut archive": {func(w http.ResponseWriter, r *http.Request) { w.Write(archive[:100]) }, "archive is cut short", true},
		"declared too large": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(2<<20))
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}, "archive is 2097152 bytes compressed, limit 1 MiB", true},
		"too large": {func(w http.ResponseWriter, r *http.Request) {
			w.Write(archive[:30])
			http.NewResponseController(w).Flush()
			io.CopyN(w, zeros{}, 2<<20)
		}, "archive is", true},
		"redirects": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/again?secret=s", http.StatusFound) }, "more than 10 redirects", false},
		"scheme": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "file:///etc/passwd", http.StatusFound)
		}, "unsupported protocol scheme", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := bundles.NewHTTP(bundles.HTTPConfig{
				URL:    strings.Replace(newServer(t, test.handler), "http://", "http://user:secret@", 1) + "?sig=secret",
				Limits: bundles.Limits{Bytes: 1 << 20},
			})
			_, err := h.Fetch(t.Context(), "orders?key=secret", "")
			if err == nil || !strings.Contains(err.Error(), test.want) || !strings.HasPrefix(err.Error(), `fetching bundle "orders": http://127.0.0.1:`) {
				t.Fatalf("got %v, want %q", err, test.want)
			}
			if errors.Is(err, bundles.ErrRefused) != test.refused {
				t.Errorf("got %v, want a refusal: %v", err, test.refused)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("got %v, with a secret in it", err)
			}
		})
	}
}

func TestHTTPStatus(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]time.Duration{
		"":            0,
		"3":           3 * time.Second,
		"-3":          0,
		"99999999999": 10 * time.Minute,
		"soon":        0,
		time.Now().Add(time.Hour).UTC().Format(http.TimeFormat):  10 * time.Minute,
		time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat): 0,
	} {
		server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Retry-After", value)
			w.WriteHeader(http.StatusServiceUnavailable)
		})
		_, err := bundles.NewHTTP(bundles.HTTPConfig{URL: server}).Fetch(t.Context(), "orders", "")
		var status *bundles.StatusError
		if !errors.As(err, &status) || status.Code != 503 || status.RetryAfter != want {
			t.Errorf("Retry-After %q: got %v, %+v, want %v", value, err, status, want)
		}
	}
}

func TestHTTPConfigErrors(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"":                       "not an http or https URL",
		"ftp://example.com":      "not an http or https URL",
		"http://":                "not an http or https URL",
		"http://s3cret:x%zz@a/b": "URL of the service",
	} {
		_, err := bundles.NewHTTP(bundles.HTTPConfig{URL: url}).Fetch(t.Context(), "orders", "")
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: got %v, want %q", url, err, want)
		}
	}
	h := bundles.NewHTTP(bundles.HTTPConfig{URL: "http://127.0.0.1:1", Authorize: func(*http.Request) error { return errors.New("no token") }})
	if _, err := h.Fetch(t.Context(), "orders", ""); err == nil || !strings.Contains(err.Error(), "authorizing the request: no token") {
		t.Errorf("got %v, want the error of Authorize", err)
	}
	for _, name := range []string{"a/%2e%2e/b", `a\..\b`, "a#b", "%zz", "/", "?a=b"} {
		if _, err := bundles.NewHTTP(bundles.HTTPConfig{URL: "http://127.0.0.1:1"}).Fetch(t.Context(), name, ""); err == nil || !strings.Contains(err.Error(), "name ") {
			t.Errorf("name %q: got %v, want it to be no name", name, err)
		}
	}
}

func TestHTTPStall(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	stalled := make(chan struct{}, 2)
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(archive)))
		w.Write(archive[:len(archive)/2])
		http.NewResponseController(w).Flush()
		stalled <- struct{}{}
		<-r.Context().Done()
	})
	t.Run("timeout", func(t *testing.T) {
		h := bundles.NewHTTP(bundles.HTTPConfig{URL: server, Timeout: 100 * time.Millisecond})
		_, err := h.Fetch(t.Context(), "orders", "")
		if !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, bundles.ErrRefused) || !strings.Contains(err.Error(), "not finished within 100ms") {
			t.Errorf("got %v, want it not finished within 100ms", err)
		}
		<-stalled
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			<-stalled
			cancel()
		}()
		_, err := bundles.NewHTTP(bundles.HTTPConfig{URL: server}).Fetch(ctx, "orders", "")
		if !errors.Is(err, context.Canceled) || errors.Is(err, bundles.ErrRefused) {
			t.Errorf("got %v, want context.Canceled", err)
		}
	})
}

func TestHTTPRedirect(t *testing.T) {
	t.Parallel()
	archive := orders.tarball(t)
	var got http.Header
	other := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Header
		serve(w, r, archive)
	})
	here := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/away":
			http.Redirect(w, r, other+"/orders", http.StatusFound)
		case "/within":
			http.Redirect(w, r, "/orders", http.StatusFound)
		default:
			got = r.Header
			serve(w, r, archive)
		}
	})
	calls := 0
	h := bundles.NewHTTP(bundles.HTTPConfig{
		URL:    strings.Replace(here, "http://", "http://user:secret@", 1),
		Header: http.Header{"X-Key": {"secret"}},
		Authorize: func(r *http.Request) error {
			calls++
			r.Header.Set("X-Signature", "secret of "+r.URL.Path)
			return nil
		},
	})

	if _, err := h.Fetch(t.Context(), "within?q=secret", `"v0"`); err != nil {
		t.Fatal(err)
	}
	if got.Get("X-Key") != "secret" || got.Get("X-Signature") != "secret of /orders" || got.Get("Authorization") == "" || calls != 2 {
		t.Errorf("same host: got %v, and %d calls of Authorize", got, calls)
	}
	b, err := h.Fetch(t.Context(), "away?q=secret", `"v0"`)
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprint(got); strings.Contains(text, "secret") || got.Get("Authorization") != "" || got.Get("Referer") != "" {
		t.Errorf("another host: got %v, with credentials", got)
	}
	if got.Get("If-None-Match") != `"v0"` || got.Get("Prefer") == "" || got.Get("Accept-Encoding") != "identity" {
		t.Errorf("another host: got %v, without what the request needs", got)
	}
	if _, err := h.Fetch(t.Context(), "away", b.ETag); err != bundles.ErrNotModified {
		t.Errorf("another host, not modified: got %v", err)
	}
}

func TestHTTPRedirectDowngrade(t *testing.T) {
	t.Parallel()
	plain := newServer(t, func(w http.ResponseWriter, r *http.Request) { t.Error("got a request over http") })
	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain+"/orders?secret=s", http.StatusFound)
	}))
	t.Cleanup(secure.Close)
	_, err := bundles.NewHTTP(bundles.HTTPConfig{URL: secure.URL, Client: secure.Client()}).Fetch(t.Context(), "orders", "")
	if err == nil || !strings.Contains(err.Error(), "redirect from https to another scheme is refused") || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v, want the redirect refused", err)
	}
}

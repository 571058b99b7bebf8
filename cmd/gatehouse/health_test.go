package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// The health check tells readiness by its exit code, and asks nobody but whom it
// is told to.
func TestHealth(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/ready", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ready") })
	mux.HandleFunc("/unready", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, "not ready")
	})
	mux.HandleFunc("/long", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, strings.Repeat("x", 2*maxHealthBody)) })
	mux.HandleFunc("/elsewhere", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ready", http.StatusFound) })
	mux.HandleFunc("/never", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	server := httptest.NewServer(mux)
	defer server.Close()

	// Nobody listens where somebody did.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := "http://" + l.Addr().String()
	l.Close()

	for _, c := range []struct {
		args []string
		env  string // GATEHOUSE_HEALTH_URL
		code int
		out  string // a part of what is printed, or of the error
	}{
		{[]string{"-url", server.URL + "/ready"}, "", 0, "ready\n"},
		{nil, server.URL + "/ready", 0, "ready\n"},
		{[]string{"-url", server.URL + "/ready"}, gone, 0, "ready\n"},
		{[]string{"-url", server.URL + "/unready"}, "", 1, "/unready: status 503: not ready"},
		{[]string{"-url", server.URL + "/long"}, "", 0, "xxx"},
		{[]string{"-url", server.URL + "/elsewhere"}, "", 1, "status 302"},
		{[]string{"-url", server.URL + "/never", "-timeout", "50ms"}, "", 1, "deadline exceeded"},
		{[]string{"-url", gone}, "", 1, "refused"},
		{[]string{"-url", "https://localhost/readyz"}, "", 2, "wants a URL"},
		{[]string{"-url", "http://user:password@localhost/readyz"}, "", 2, "wants a URL"},
		{[]string{"-url", ":"}, "", 2, "wants a URL"},
		{[]string{"-timeout", "0s"}, "", 2, "timeout"},
		{[]string{"-timeout", "2m"}, "", 2, "at most 1m0s"},
		{[]string{"now"}, "", 2, `no argument, got "now"`},
		{[]string{"-nonsense"}, "", 2, "nonsense"},
		{[]string{"-h"}, "", 0, ""},
	} {
		getenv := func(name string) string {
			if name == "GATEHOUSE_HEALTH_URL" {
				return c.env
			}
			return ""
		}
		var stdout bytes.Buffer
		err := run(context.Background(), append([]string{"health"}, c.args...), getenv, &stdout, io.Discard)
		said := stdout.String()
		if err != nil {
			said += err.Error()
		}
		if got := exitCode(err); got != c.code || !strings.Contains(said, c.out) || len(said) > maxHealthBody+1 {
			t.Errorf("%q: got exit code %d and %q, want %d and %q", c.args, got, said, c.code, c.out)
		}
		if strings.Contains(said, "password") {
			t.Errorf("%q: a password is shown: %s", c.args, said)
		}
	}
}

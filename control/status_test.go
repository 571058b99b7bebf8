package control_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

func TestStatusIsSent(t *testing.T) {
	var got *http.Request
	var body []byte
	answer := http.StatusOK
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		body, _ = io.ReadAll(r.Body) // compared below
		w.Header().Set("Retry-After", "7")
		if answer/100 == 3 {
			w.Header().Set("Location", "/elsewhere")
		}
		w.WriteHeader(answer)
	}))
	defer server.Close()
	s := mustTenant(t, `
services: {s: {url: "`+server.URL+`/v1?key=secret", credentials: {bearer: {token: t}}}}
bundles: {b: {}}
status: {service: s, partition_name: "a b"}
`, "orders").Status
	if err := s.Send(t.Context(), []byte(`{"labels":{}}`)); err != nil {
		t.Fatal(err)
	}
	if got.Method != "POST" || got.URL.EscapedPath() != "/v1/status/a%20b" || got.Header.Get("Authorization") != "Bearer t" ||
		got.Header.Get("Content-Type") != "application/json" || string(body) != `{"labels":{}}` {
		t.Errorf("got %s %s, %v, %q", got.Method, got.URL, got.Header, body)
	}
	for _, answer = range []int{http.StatusServiceUnavailable, http.StatusTemporaryRedirect} {
		err := s.Send(t.Context(), []byte("{}"))
		var status *bundles.StatusError
		if !errors.As(err, &status) || status.Code != answer || status.RetryAfter != 7*time.Second {
			t.Errorf("status %d: got %v, want it with its Retry-After", answer, err)
		}
		if got.URL.Path == "/elsewhere" {
			t.Errorf("status %d: a redirect was followed", answer)
		}
	}
}

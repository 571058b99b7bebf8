package bundles_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/bundles"
)

func TestS3Errors(t *testing.T) {
	t.Parallel()
	page := func(code string) string {
		return `<?xml version="1.0" encoding="UTF-8"?>` + "\n<Error><Code>" + code + "</Code><Message>secret</Message><Key>secret</Key></Error>"
	}
	for _, test := range []struct {
		status   int
		body     string
		want     string
		notFound bool
	}{
		{404, page("NoSuchKey"), "no such bundle", true},
		{404, page("NoSuchBucket"), "no such bundle", true},
		{404, "", "no such bundle", true},
		{403, page("AccessDenied"), "no such bundle, or no permission to read it: status 403 Forbidden (AccessDenied)", true},
		{403, "", "no such bundle, or no permission to read it: status 403 Forbidden", true},
		{403, page("InvalidAccessKeyId"), "status 403 Forbidden (InvalidAccessKeyId)", false},
		{403, page("SignatureDoesNotMatch"), "(SignatureDoesNotMatch)", false},
		{403, page("RequestTimeTooSkewed"), "(RequestTimeTooSkewed)", false},
		{403, page("ExpiredToken"), "(ExpiredToken)", false},
		{400, page("ExpiredToken"), "status 400 Bad Request (ExpiredToken)", false},
		{403, "<html>Sign in</html>", "status 403 Forbidden (unknown)", false},
		{403, page("AccessDenied\n<b>"), "(unknown)", false},
		{403, strings.Repeat(" ", 5000) + page("AccessDenied"), "(unknown)", false},
		{503, page("SlowDown"), "status 503 Service Unavailable (SlowDown)", false},
		{301, page("PermanentRedirect"), "status 301 Moved Permanently (PermanentRedirect)", false},
	} {
		server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(test.status)
			io.WriteString(w, test.body)
		})
		_, err := bundles.NewHTTP(bundles.HTTPConfig{URL: server, S3: true}).Fetch(t.Context(), "orders", "")
		if err == nil || !strings.Contains(err.Error(), test.want) || errors.Is(err, bundles.ErrNotFound) != test.notFound {
			t.Errorf("%d %s: got %v, want %q, not found: %v", test.status, test.body, err, test.want, test.notFound)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("got %v, with what the body says", err)
		}
	}
	// Elsewhere, 403 says nothing about the bundle.
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(403)
		io.WriteString(w, page("AccessDenied"))
	})
	if _, err := bundles.NewHTTP(bundles.HTTPConfig{URL: server}).Fetch(t.Context(), "orders", ""); errors.Is(err, bundles.ErrNotFound) {
		t.Errorf("not S3: got %v", err)
	}
	// A cut answer is no answer.
	server = newServer(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000")
		w.WriteHeader(403)
	})
	if _, err := bundles.NewHTTP(bundles.HTTPConfig{URL: server, S3: true}).Fetch(t.Context(), "orders", ""); err == nil || errors.Is(err, bundles.ErrNotFound) {
		t.Errorf("cut: got %v", err)
	}
}

// A URL goes out as S3 spells it when it checks the signature.
func TestS3URL(t *testing.T) {
	t.Parallel()
	var got string
	server := newServer(t, func(w http.ResponseWriter, r *http.Request) { got = r.RequestURI })
	for name, want := range map[string]string{
		"a/orders.tar.gz":     "/b/a/orders.tar.gz",
		"a+b=c@d:e!f'(g)*.gz": "/b/a%2Bb%3Dc%40d%3Ae%21f%27%28g%29%2A.gz",
		"a%20b~c%2Fd":         "/b/a%20b~c/d",
		"o?versionId=x+y&a":   "/b/o?a=&versionId=x%20y",
		"ä":                   "/b/%C3%A4",
	} {
		var signed string
		h := bundles.NewHTTP(bundles.HTTPConfig{URL: server + "/b", S3: true, Authorize: func(r *http.Request) error {
			signed = r.URL.RequestURI()
			return nil
		}})
		h.Fetch(t.Context(), name, "") // the answer is empty
		if got != want || signed != want {
			t.Errorf("%s: got %s, and %s to sign, want %s", name, got, signed, want)
		}
	}
}

package httpserve_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// fake is a pool that does as it is told.
type fake struct {
	view   error
	decide func(questions []tenants.Question, answer func(int, tenants.Answer)) error
}

func (f fake) View(context.Context, tenants.ID) (*tenants.View, error) {
	if f.view != nil {
		return nil, f.view
	}
	return &tenants.View{Settings: &tenants.Settings{Tenant: &control.Tenant{HTTP: &control.HTTP{
		Data: []string{"app/x"}, Batch: control.Batch{Items: 10, Bytes: 1000, Time: time.Second},
	}}}}, nil
}

func (f fake) Decide(_ context.Context, _ tenants.ID, questions []tenants.Question, answer func(int, tenants.Answer)) error {
	return f.decide(questions, answer)
}

func fails(err error) fake {
	return fake{decide: func(_ []tenants.Question, answer func(int, tenants.Answer)) error {
		answer(0, tenants.Answer{Err: err})
		return nil
	}}
}

func TestErrors(t *testing.T) {
	secret := errors.New("secret detail")
	for _, c := range []struct {
		pool  fake
		want  int
		code  string
		retry bool
	}{
		{fails(fmt.Errorf("%w: %w", tenants.ErrInvalid, secret)), 400, "invalid_parameter", false},
		{fails(fmt.Errorf("%w: %w", tenants.ErrTooLarge, secret)), 413, "request_too_large", false},
		{fails(fmt.Errorf("%w: %w", tenants.ErrBusy, secret)), 429, "busy", true},
		{fails(fmt.Errorf("%w: %w", tenants.ErrNotReady, secret)), 503, "unavailable", true},
		{fails(fmt.Errorf("%w: %w", tenants.ErrDeadline, secret)), 503, "deadline_exceeded", true},
		{fails(fmt.Errorf("%w: %w", policy.ErrCanceled, secret)), 503, "deadline_exceeded", true},
		{fails(fmt.Errorf("%w: %w", tenants.ErrNotLogged, secret)), 503, "unavailable", true},
		{fails(fmt.Errorf("%w: %w", policy.ErrConflict, secret)), 500, "internal_error", false},
		{fails(fmt.Errorf("%w: %w", policy.ErrEval, secret)), 500, "internal_error", false},
		{fails(tenants.ErrPanic), 500, "internal_error", false},
		{fails(secret), 500, "internal_error", false},
		{fails(fmt.Errorf("%w: %w", tenants.ErrGuard, policy.ErrUndefined)), 403, "unauthorized", false},
		{fails(fmt.Errorf("%w: %w", tenants.ErrGuard, policy.ErrEval)), 500, "internal_error", false},
		{fake{decide: func([]tenants.Question, func(int, tenants.Answer)) error { return nil }}, 500, "internal_error", false},
		{fake{decide: func([]tenants.Question, func(int, tenants.Answer)) error { panic(secret) }}, 500, "internal_error", false},
		{fake{decide: func([]tenants.Question, func(int, tenants.Answer)) error { return tenants.ErrUnknown }}, 404, "resource_not_found", false},
		{fake{view: fmt.Errorf("%w: %w", tenants.ErrUnknown, secret)}, 404, "resource_not_found", false},
		{fake{view: fmt.Errorf("%w: %w", tenants.ErrNotReady, secret)}, 503, "unavailable", true},
		{fake{view: fmt.Errorf("%w: %w", tenants.ErrBusy, secret)}, 429, "busy", true},
	} {
		status := 0
		h := server(t, httpserve.Config{Pool: c.pool, Local: true, Answered: func(_ string, got int) { status = got }})
		w := post(h, "/t/orders/v1/data/app/x", `{"input":1}`)
		if w.Code != c.want || status != c.want || !strings.Contains(w.Body.String(), `"`+c.code+`"`) || (w.Header().Get("Retry-After") != "") != c.retry {
			t.Errorf("got %d (counted as %d), Retry-After %q, %s, want %d %s", w.Code, status, w.Header().Get("Retry-After"), w.Body, c.want, c.code)
		}
		if strings.Contains(w.Body.String(), "secret") {
			t.Errorf("got %s, which says what is for the log", w.Body)
		}
	}
}

// Half an answer never looks like a whole one.
func TestPanicAmidAnAnswer(t *testing.T) {
	pool := fake{decide: func(_ []tenants.Question, answer func(int, tenants.Answer)) error {
		answer(0, tenants.Answer{Decision: policy.Decision{Value: ast.String(strings.Repeat("x", 20<<10))}})
		panic("amid")
	}}
	web := httptest.NewServer(server(t, httpserve.Config{Pool: pool, Local: true}))
	defer web.Close()
	req, err := http.NewRequestWithContext(t.Context(), "POST", web.URL+"/t/orders/v1/batch/data/app/x", strings.NewReader(`{"inputs":{"a":1,"b":2}}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/x-ndjson")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err == nil {
		t.Errorf("got %.100s without an error, want a connection that breaks", text)
	}
}

// The questions of a batch have what the log wants of them, equal ones once.
func TestQuestions(t *testing.T) {
	var got []tenants.Question
	pool := fake{decide: func(questions []tenants.Question, answer func(int, tenants.Answer)) error {
		got = slices.Clone(questions)
		for i := range questions {
			answer(i, tenants.Answer{Decision: policy.Decision{Value: ast.Boolean(true)}})
		}
		return nil
	}}
	h := server(t, httpserve.Config{Pool: pool, Local: true})
	w := post(h, "/t/orders/v1/batch/data/app/x", `{"inputs":{"a":{"n":1},"b":{"n":2},"c":{"n":1}}}`,
		"Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	if w.Code != 200 || strings.Count(w.Body.String(), `"result":true`) != 3 {
		t.Fatalf("got %d %s", w.Code, w.Body)
	}
	if len(got) != 2 || len(got[0].Twins) != 1 || len(got[1].Twins) != 0 {
		t.Fatalf("got %+v, want two questions, the first with a twin", got)
	}
	for i, q := range got {
		if !q.Own || !q.Value || q.Entry != "app/x" || q.BatchDecisionID == "" || q.Batch.Size != 3 || q.Batch.Index != i || q.Timed ||
			q.TraceID != "4bf92f3577b34da6a3ce929d0e0e4736" || q.SpanID != "00f067aa0ba902b7" || q.RequestedBy == "" || q.BodyBytes != 7 {
			t.Errorf("got %+v", q)
		}
	}
	if twin := got[0].Twins[0]; twin.Batch.Key != "c" || twin.Batch.Index != 2 || twin.DecisionID == got[0].DecisionID {
		t.Errorf("got %+v", twin)
	}
}

// Whatever the body of a batch is, the answer is one that clients know: each item
// that was asked is answered, with an ID of its own.
func FuzzBatch(f *testing.F) {
	f.Add(`{"inputs": {"a": {"n": 1}, "b": [1, 2]}, "common_input": {"n": {"x": 1}}}`)
	f.Add(`{"inputs": {"a": {"n": 1, "n": 2}}}`)
	f.Add(`{"inputs": {"a": 1, "a": 2}}`)
	f.Add(`{"inputs":{"":null}}`)
	pool := fake{decide: func(questions []tenants.Question, answer func(int, tenants.Answer)) error {
		for i, q := range questions {
			v, err := q.Input.Input(tenants.Needs{All: true})
			answer(i, tenants.Answer{Decision: policy.Decision{Value: v}, Err: err})
		}
		return nil
	}}
	s, err := httpserve.New(httpserve.Config{Pool: pool, Local: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		w := post(s, "/t/orders/v1/batch/data/app/x", text)
		if !slices.Contains([]int{200, 207, 400, 413, 500}, w.Code) {
			t.Fatalf("got %d", w.Code)
		}
		a := new(answer)
		if err := json.Unmarshal(w.Body.Bytes(), a); err != nil {
			t.Fatalf("%v in %s", err, w.Body)
		}
		if w.Code != 400 && w.Code != 413 && a.ID == "" {
			t.Errorf("got %d without an ID: %s", w.Code, w.Body)
		}
		failed := 0
		for key, item := range a.Responses {
			if item.ID == "" || (item.Status != "") != (w.Code == 207) || (item.Code == "") != (item.Result != nil) {
				t.Errorf("item %q: got %+v in %s", key, item, w.Body)
			}
			if item.Code != "" {
				failed++
			}
		}
		want := 200
		switch n := len(a.Responses); {
		case n == 0:
			return
		case failed == n:
			want = 500
		case failed > 0:
			want = 207
		}
		if w.Code != want {
			t.Errorf("got %d with %d failed of %d", w.Code, failed, len(a.Responses))
		}
	})
}

// A body that does not come is not waited for for ever.
func TestSlowBody(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 15 s")
	}
	t.Parallel()
	web := httptest.NewServer(server(t, httpserve.Config{Pool: fails(errors.New("asked")), Local: true}))
	defer web.Close()
	conn, err := net.Dial("tcp", web.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /t/orders/v1/data/app/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
	if err := conn.SetReadDeadline(time.Now().Add(25 * time.Second)); err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(conn)
	if err != nil || !strings.HasPrefix(string(text), "HTTP/1.1 400 ") {
		t.Errorf("got %q, %v", text, err)
	}
}

func TestReload(t *testing.T) {
	s := server(t, httpserve.Config{Pool: fails(nil)})
	for _, c := range []httpserve.Config{{URL: "x"}, {URL: "https://x/y"}, {TrustedPeers: []string{"10.0.0.0/33"}}} {
		if err := s.Reload(c); err == nil {
			t.Errorf("%+v: got no error", c)
		}
	}
	if err := s.Reload(httpserve.Config{URL: "https://x:8443/", TrustedPeers: []string{"10.0.0.0/8", "::1", "unix", "spiffe://x/*"}}); err != nil {
		t.Error(err)
	}
}

package httpserve_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// answers is a pool that gives one answer to all questions of forward-auth.
type answers struct {
	answer tenants.Answer
	view   error
}

func (p answers) View(context.Context, tenants.ID) (*tenants.View, error) {
	return &tenants.View{Settings: &tenants.Settings{Tenant: &control.Tenant{HTTP: &control.HTTP{Check: "envoy/authz/allow"}}}}, p.view
}

func (p answers) Decide(ctx context.Context, _ tenants.ID, questions []tenants.Question, answer func(int, tenants.Answer)) error {
	if p.view != nil && ctx.Err() == nil {
		return errors.New("it was waited for twice")
	}
	answer(0, p.answer)
	return nil
}

// forwarded asks a server about GET / as a peer at an address.
func forwarded(t *testing.T, cfg httpserve.Config, peer string, change func(*http.Request)) *httptest.ResponseRecorder {
	t.Helper()
	cfg.Inputs = realInputs(t)
	r := httptest.NewRequest("GET", "/t/orders/check/", nil)
	r.RemoteAddr = peer
	if change != nil {
		change(r)
	}
	w := httptest.NewRecorder()
	server(t, cfg).ServeHTTP(w, r)
	return w
}

// What goes wrong is a denial, and a tenant's own faults are answered as its
// on_error says. Nothing but a permission is 200.
func TestCheckFaults(t *testing.T) {
	secret := errors.New("secret detail")
	for _, c := range []struct {
		err                   error
		deny, allow, upstream int
	}{
		{policy.ErrUndefined, 403, 200, 500},
		{policy.ErrConflict, 403, 200, 500},
		{policy.ErrResult, 403, 200, 500},
		{policy.ErrEval, 403, 200, 500},
		{policy.ErrEntry, 403, 200, 500},
		{tenants.ErrPanic, 403, 200, 500},
		{tenants.ErrNotReady, 403, 200, 503},
		{tenants.ErrBusy, 403, 200, 503},
		{tenants.ErrDeadline, 403, 200, 503},
		{policy.ErrCanceled, 403, 200, 503},
		{secret, 403, 200, 500},

		// of these the pool says that they are always denied
		{tenants.ErrInvalid, 400, 0, 0},
		{tenants.ErrTooLarge, 413, 0, 0},
		{tenants.ErrPartialBody, 403, 0, 0},
		{tenants.ErrEntry, 403, 0, 0},
		{tenants.ErrNotLogged, 403, 0, 0},
	} {
		for onError, want := range map[tenants.OnError]int{tenants.OnErrorDeny: c.deny, tenants.OnErrorAllow: c.allow, tenants.OnErrorUpstream: c.upstream} {
			if want == 0 {
				continue
			}
			a := tenants.Answer{Err: fmt.Errorf("%w: %w", c.err, secret), OnError: onError}
			w := forwarded(t, httpserve.Config{Pool: answers{answer: a}, TrustedPeers: []string{"10.0.0.0/8"}}, "10.1.2.3:4", nil)
			if w.Code != want {
				t.Errorf("%v, on_error %d: got %d, want %d", c.err, onError, w.Code, want)
			}
			if strings.Contains(w.Body.String(), "secret") || w.Header().Get("X-Decision-Id") == "" || want == 200 && w.Body.Len() > 0 {
				t.Errorf("%v, on_error %d: got %v %s", c.err, onError, w.Header(), w.Body)
			}
		}
	}
}

// A tenant that is not ready, and was waited for, is answered as its on_error
// says.
func TestCheckOfATenantThatIsNotReady(t *testing.T) {
	for onError, want := range map[tenants.OnError]int{tenants.OnErrorDeny: 403, tenants.OnErrorAllow: 200} {
		p := answers{answer: tenants.Answer{Err: tenants.ErrNotReady, OnError: onError}, view: tenants.ErrNotReady}
		w := forwarded(t, httpserve.Config{Pool: p, TrustedPeers: []string{"10.0.0.0/8"}}, "10.1.2.3:4", nil)
		if w.Code != want {
			t.Errorf("on_error %d: got %d, want %d", onError, w.Code, want)
		}
	}
}

// Dry-run lets denials of the tenant's policy through, and nothing else.
func TestCheckDryRun(t *testing.T) {
	denied := policy.Decision{Object: true, Status: 401, Headers: []policy.Header{{Name: "x-a", Value: "1"}}}
	for _, c := range []struct {
		answer tenants.Answer
		want   int
	}{
		{tenants.Answer{Decision: denied, DryRun: true}, 200},
		{tenants.Answer{Decision: denied}, 401},
		{tenants.Answer{Decision: denied, Guard: true}, 401},
		{tenants.Answer{Err: policy.ErrUndefined, DryRun: true}, 403},
	} {
		w := forwarded(t, httpserve.Config{Pool: answers{answer: c.answer}, TrustedPeers: []string{"10.0.0.0/8"}}, "10.1.2.3:4", nil)
		if w.Code != c.want || w.Code == 200 && w.Header().Get("X-A") != "" {
			t.Errorf("%+v: got %d %v, want %d", c.answer, w.Code, w.Header(), c.want)
		}
	}
}

// Only the peers that the operator trusts are answered, and those with a name only
// for their tenants.
func TestCheckPeers(t *testing.T) {
	yes := answers{answer: tenants.Answer{Decision: policy.Decision{Allowed: true}}}
	certified := func(id string, verified bool) func(*http.Request) {
		return func(r *http.Request) { withPeer(r, id, verified) }
	}
	ids := httpserve.Config{Pool: yes, TrustedPeers: []string{"spiffe://example.org/*"}}
	bound := ids
	bound.Peers = map[string][]string{"spiffe://example.org/edge": {"orders", "shop-*"}, "spiffe://example.org/other": {"other"}}
	addressBound := bound
	addressBound.TrustedPeers = []string{"10.0.0.0/8"}
	for name, c := range map[string]struct {
		cfg    httpserve.Config
		peer   string
		change func(*http.Request)
		want   int
	}{
		"trusted address":         {httpserve.Config{Pool: yes, TrustedPeers: []string{"10.0.0.0/8"}}, "10.1.2.3:4", nil, 200},
		"IPv4 in IPv6":            {httpserve.Config{Pool: yes, TrustedPeers: []string{"10.0.0.0/8"}}, "[::ffff:10.1.2.3]:4", nil, 200},
		"another address":         {httpserve.Config{Pool: yes, TrustedPeers: []string{"10.0.0.0/8"}}, "11.1.2.3:4", nil, 403},
		"nobody is trusted":       {httpserve.Config{Pool: yes}, "10.1.2.3:4", nil, 403},
		"not even this machine":   {httpserve.Config{Pool: yes, Local: true}, "127.0.0.1:4", nil, 403},
		"it says so itself":       {httpserve.Config{Pool: yes, TrustedPeers: []string{"10.0.0.0/8"}}, "11.1.2.3:4", func(r *http.Request) { r.Header.Set("X-Forwarded-For", "10.1.2.3") }, 403},
		"trusted ID":              {ids, "11.1.2.3:4", certified("spiffe://example.org/edge", true), 200},
		"another ID":              {ids, "11.1.2.3:4", certified("spiffe://example.com/edge", true), 403},
		"not verified":            {ids, "11.1.2.3:4", certified("spiffe://example.org/edge", false), 403},
		"for its tenant":          {bound, "11.1.2.3:4", certified("spiffe://example.org/edge", true), 200},
		"for another's":           {bound, "11.1.2.3:4", certified("spiffe://example.org/other", true), 403},
		"an address has no ID":    {addressBound, "10.1.2.3:4", nil, 403},
		"a socket":                {httpserve.Config{Pool: yes, TrustedPeers: []string{"unix"}}, "@", nil, 200},
		"a socket is not trusted": {httpserve.Config{Pool: yes, TrustedPeers: []string{"10.0.0.0/8"}}, "@", nil, 403},
	} {
		if w := forwarded(t, c.cfg, c.peer, c.change); w.Code != c.want {
			t.Errorf("%s: got %d %s, want %d", name, w.Code, w.Body, c.want)
		}
	}
}

// A check over HTTP is logged as one over gRPC is.
func TestCheckLog(t *testing.T) {
	logs, console := authztest.Logs(t)
	p, _ := poolOf(t, tenants.Config{Logs: logs}, "package envoy.authz\n\nallow := {\"allowed\": true, \"headers\": {\"x-user\": \"alice\"}}", "check: {}",
		func(s *tenants.Settings) { s.Log = authztest.Logged() })
	w := forwarded(t, httpserve.Config{Pool: p, TrustedPeers: []string{"10.0.0.0/8"}}, "10.1.2.3:4", func(r *http.Request) {
		r.Header.Set("Authorization", "Bearer secret")
	})
	if w.Code != 200 || w.Header().Get("X-User") != "alice" {
		t.Fatalf("got %d %v", w.Code, w.Header())
	}
	events := console.Events(1)
	if len(events) != 1 {
		t.Fatalf("got %d events, want 1", len(events))
	}
	e := events[0]
	if e["decision_id"] != w.Header().Get("X-Decision-Id") || e["path"] != "envoy/authz/allow" || e["requested_by"] != nil ||
		!reflect.DeepEqual(e["result"], map[string]any{"allowed": true, "headers": map[string]any{"x-user": "alice"}}) {
		t.Errorf("got event %v", e)
	}
	text, err := json.Marshal(e["input"])
	if err != nil || !strings.Contains(string(text), `"path":"/"`) || !strings.Contains(string(text), `"ext_authz":"v3"`) {
		t.Errorf("got input %s %v", text, err)
	}
}

// Each of AuthZEN's evaluations is a decision of its own, and those that are not
// needed are none.
func TestEvaluationsAreRecorded(t *testing.T) {
	logs, console := authztest.Logs(t)
	p, _ := poolOf(t, tenants.Config{Logs: logs}, "package authzen\n\ndefault allow := false\n\nallow if input.action.name == \"read\"", "authzen: {package: authzen}",
		func(s *tenants.Settings) { s.Log = authztest.Logged() })
	h := server(t, httpserve.Config{Pool: p, Local: true})
	ask := func(body string) {
		t.Helper()
		r := httptest.NewRequest("POST", "http://localhost/t/orders/access/v1/evaluations", strings.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != 200 {
			t.Fatalf("got %d %s", w.Code, w.Body)
		}
	}
	const common = `"subject": {"type": "user", "id": "alice"}, "action": {"name": "read"}, "resource": {"type": "doc", "id": "1"}`
	ask(`{` + common + `, "evaluations": [{}, {}, {}]}`)
	ask(`{` + common + `, "options": {"evaluations_semantic": "deny_on_first_deny"}, "evaluations": [{}, {"action": {"name": "write"}}, {}, {}]}`)
	ask(`{` + common + `, "options": {"evaluations_semantic": "permit_on_first_permit"}, "evaluations": [{}, {}, {}, {}]}`)
	events := console.Events(6)
	if len(events) != 6 {
		t.Fatalf("got %d events, want 3, 2 and 1", len(events))
	}
	ids, batches := map[any]bool{}, map[any]int{}
	for _, e := range events {
		ids[e["decision_id"]] = true
		batches[e["batch_decision_id"]]++
		if e["path"] != "authzen/allow" {
			t.Errorf("got path %v", e["path"])
		}
	}
	sizes := map[int]bool{}
	for _, n := range batches {
		sizes[n] = true
	}
	if len(ids) != 6 || len(batches) != 3 || !sizes[1] || !sizes[2] || !sizes[3] {
		t.Errorf("got %d decisions in batches %v", len(ids), batches)
	}
}

// What is too large is refused before anything is evaluated, whether its size is
// known or not.
func TestLargeOriginals(t *testing.T) {
	logs, console := authztest.Logs(t)
	p, _ := poolOf(t, tenants.Config{Logs: logs}, "package envoy.authz\n\nallow := true", "{check: {}, serve: {path: envoy/authz/allow}}",
		func(s *tenants.Settings) { s.Log, s.Limits.BodyBytes = authztest.Logged(), 1000 })
	web := httptest.NewServer(server(t, httpserve.Config{Pool: p, Inputs: realInputs(t), Local: true, TrustedPeers: []string{"127.0.0.1"}}))
	defer web.Close()
	for _, path := range []string{"/t/orders/check/a", "/t/orders/serve/a"} {
		for size, want := range map[int]int{1000: 200, 1001: 413, 1 << 20: 413} {
			for _, chunked := range []bool{false, true} {
				var body io.Reader = strings.NewReader(strings.Repeat("x", size))
				if chunked {
					body = io.MultiReader(body)
				}
				resp, err := http.Post(web.URL+path, "text/plain", body)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if resp.StatusCode != want {
					t.Errorf("%s with %d bytes, chunked %t: got %d, want %d", path, size, chunked, resp.StatusCode, want)
				}
			}
		}
	}
	if events := console.Events(4); len(events) != 4 {
		t.Errorf("got %d events, want those of the 4 that fit", len(events))
	}
}

// A header names the decision where the tenant says so, whatever the policy says
// in a header of this name.
func TestCheckNaming(t *testing.T) {
	const remove = "X-Envoy-Auth-Headers-To-Remove"
	allowed := policy.Decision{Object: true, Allowed: true, Headers: []policy.Header{{Name: "x-id", Value: "forged"}}, RemoveHeaders: []string{"x-id", "x-old"}}
	denied := policy.Decision{Object: true, Status: 401, Headers: []policy.Header{{Name: "x-id", Value: "forged"}}}
	for _, c := range []struct {
		answer           tenants.Answer
		upstream, client bool
		status           int
		named            bool
		removed          string
	}{
		{tenants.Answer{Decision: allowed}, true, false, 200, true, "x-old"},
		{tenants.Answer{Decision: allowed}, false, true, 200, true, "x-old,x-id"},
		{tenants.Answer{Decision: denied}, false, true, 401, true, ""},
		{tenants.Answer{Decision: denied}, true, false, 401, false, ""},
		{tenants.Answer{Err: policy.ErrUndefined}, false, true, 403, true, ""},
		{tenants.Answer{Err: policy.ErrUndefined}, true, false, 403, false, ""},
		{tenants.Answer{Err: tenants.ErrBusy, OnError: tenants.OnErrorAllow}, true, true, 200, true, ""},
	} {
		c.answer.Naming = &tenants.Naming{Header: "x-id", Upstream: c.upstream, Client: c.client}
		w := forwarded(t, httpserve.Config{Pool: answers{answer: c.answer}, TrustedPeers: []string{"10.0.0.0/8"}}, "10.1.2.3:4", nil)
		id := w.Header().Get("X-Decision-Id")
		want := ""
		if c.named {
			want = id
		}
		if got := strings.Join(w.Header().Values("X-Id"), ","); w.Code != c.status || got != want || id == "" || w.Header().Get(remove) != c.removed {
			t.Errorf("%+v: got %d, x-id %q, remove %q, want %d, %q, %q", c.answer, w.Code, got, w.Header().Get(remove), c.status, want, c.removed)
		}
	}
}

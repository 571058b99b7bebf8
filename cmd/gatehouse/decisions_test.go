package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// send sends a request to the admin listener.
func (s *server) send(method, path, body string, header ...string) (int, string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.admin+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// From a denial to the line that it comes from: the header names the decision,
// /decisions has it, and /explain says why.
func TestWhyDenied(t *testing.T) {
	s := start(t, "tenants: {required: [orders], decision_id: {client: true}}\n", map[string]string{"orders": `
default allow := false

allow if {
	input.attributes.request.http.method == "GET"
	input.attributes.request.http.headers["x-user"] == "alice"
}
`})
	resp, err := authv3.NewAuthorizationClient(s.conn).Check(t.Context(), &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		ContextExtensions: map[string]string{"tenant": "orders"},
		Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Method: "GET", Path: "/a", Headers: map[string]string{"x-user": "bob", "authorization": "Bearer s3cret"},
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	id := resp.GetDeniedResponse().GetHeaders()[0].GetHeader().GetValue()
	if name := resp.GetDeniedResponse().GetHeaders()[0].GetHeader().GetKey(); name != "x-gatehouse-decision-id" || id != resp.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue() {
		t.Fatalf("got header %s: %s, metadata %v", name, id, resp.GetDynamicMetadata())
	}

	code, text := s.get("/tenants/orders/decisions?id=" + id)
	var found tenants.Decisions
	if err := json.Unmarshal([]byte(text), &found); err != nil || code != 200 || len(found.Decisions) != 1 || found.Decisions[0].Outcome != "denied" {
		t.Fatalf("decisions: got %d %s", code, text)
	}
	if strings.Contains(text, "s3cret") || !strings.Contains(text, "**REDACTED**") {
		t.Errorf("decisions: got a secret in %s", text)
	}

	code, text = s.send("POST", "/tenants/orders/explain", fmt.Sprintf(`{"decision_id": %q}`, id))
	var x tenants.Explanation
	if err := json.Unmarshal([]byte(text), &x); err != nil || code != 200 {
		t.Fatalf("explain: got %d %s", code, text)
	}
	named := false
	for _, step := range x.Trace {
		named = named || step.Op == "fail" && step.File == "p.rego" && step.Line == 7 && strings.Contains(step.Text, `== "alice"`)
	}
	if !named || x.Outcome != "denied" || !x.Then.Same {
		t.Errorf("explain: got %s, want line 7 named", text)
	}
	code, text = s.send("POST", "/tenants/orders/explain", fmt.Sprintf(`{"decision_id": %q}`, id), "Accept: text/plain")
	for _, want := range []string{"decision " + id + " of tenant orders\n", "then: denied at ", ", by what decides now\n", "\nnow: denied, by bundle policy, asked for envoy/authz/allow of the tenant's policy\n", "p.rego:7  fail  input.attributes"} {
		if code != 200 || !strings.Contains(text, want) {
			t.Errorf("explain as text: got %d\n%s\nwant %q", code, text, want)
		}
	}
	if code, text = s.send("POST", "/tenants/orders/explain?mode=full", `{"input": {}, "path": "envoy/authz/allow"}`); code != 200 || !strings.Contains(text, `"op": "eval"`) {
		t.Errorf("explain an input: got %d %s", code, text)
	}

	for _, c := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/tenants/orders/decisions?outcome=denied,allowed&outcome=error&limit=5", "", 200, `"outcome": "denied"`},
		{"GET", "/tenants/orders/decisions?outcome=allowed", "", 200, `"decisions": []`},
		{"GET", "/tenants/orders/decisions?outcome=refused", "", 400, "allowed, denied, undefined, bad_result"},
		{"GET", "/tenants/orders/decisions?limit=0", "", 400, "limit"},
		{"GET", "/tenants/orders/decisions?colour=red", "", 400, "colour"},
		{"GET", "/tenants/orders/decisions?id=none", "", 404, "not among the last 1"},
		{"GET", "/tenants/nobody/decisions", "", 404, "not known"},
		{"GET", "/tenants/NO/decisions", "", 400, "error"},
		{"POST", "/tenants/orders/explain", `{"decision_id": "none"}`, 404, "not among the last 1"},
		{"POST", "/tenants/orders/explain", `{}`, 400, "neither decision_id nor input"},
		{"POST", "/tenants/orders/explain", `{"decision_id": "x", "input": {}}`, 400, "decision_id"},
		{"POST", "/tenants/orders/explain", `{"colour": "red"}`, 400, "body is not"},
		{"POST", "/tenants/orders/explain", `{"input": {}, "path": "other"}`, 400, "other"},
		{"POST", "/tenants/orders/explain?mode=loud", `{"input": {}}`, 400, "rules fails notes full"},
		{"POST", "/tenants/orders/explain", `{"input": "` + strings.Repeat("x", maxExplain) + `"}`, 413, "larger than"},
		{"POST", "/tenants/nobody/explain", `{"input": {}}`, 404, "nobody"},
	} {
		if code, text := s.send(c.method, c.path, c.body); code != c.code || !strings.Contains(text, c.want) {
			t.Errorf("%s %s %.60s: got %d %s, want %d, %q", c.method, c.path, c.body, code, text, c.code, c.want)
		}
	}
}

// The level changes while the server runs, for a while or by the file.
func TestLogLevel(t *testing.T) {
	const text = "tenants: {required: [orders]}\nlog: {level: LEVEL}\n"
	s := start(t, strings.Replace(text, "LEVEL", "warn", 1), map[string]string{"orders": "allow if input.never"})
	denied := func() { s.allowed("orders") }
	denied()
	if strings.Contains(s.log.String(), "check has no decision") || strings.Contains(s.log.String(), `"msg":"serving"`) {
		t.Errorf("at warn: got\n%s", s.log.String())
	}
	if code, text := s.get("/log"); code != 200 || !strings.Contains(text, `"level": "warn"`) || strings.Contains(text, "until") {
		t.Errorf("got %d %s", code, text)
	}
	for _, path := range []string{"/log", "/log?level=loud", "/log?level=debug&for=soon", "/log?level=debug&for=48h", "/log?level=debug&for=-1s", "/log?colour=red"} {
		if code, text := s.send("PUT", path, ""); code != 400 || !strings.Contains(text, "error") {
			t.Errorf("%s: got %d %s", path, code, text)
		}
	}
	if code, text := s.send("PUT", "/log?level=debug&for=10m", ""); code != 200 || !strings.Contains(text, `"level": "debug"`) || !strings.Contains(text, `"configured": "warn"`) || !strings.Contains(text, "until") {
		t.Errorf("got %d %s", code, text)
	}
	denied()
	if log := s.log.String(); !strings.Contains(log, `"msg":"check has no decision","tenant":"orders","decision_id":"`) {
		t.Errorf("at debug: got\n%s", log)
	}
	if code, text := s.send("DELETE", "/log", ""); code != 200 || !strings.Contains(text, `"level": "warn"`) {
		t.Errorf("got %d %s", code, text)
	}
	s.configure(strings.Replace(text, "LEVEL", "info", 1))
	s.eventually("logging at info", func() bool { _, text := s.get("/log"); return strings.Contains(text, `"level": "info"`) })
	s.eventually("reloaded", func() bool { return strings.Contains(s.log.String(), "configuration applied") })
}

// A level that was asked for holds before the configured one, as long as it was to,
// and the command line's before that of the file.
func TestLevels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l logLevel
		l.configure(slog.LevelWarn)
		l.ask(slog.LevelDebug, time.Minute)
		l.configure(slog.LevelError)
		if l.Level() != slog.LevelDebug {
			t.Errorf("asked for: got %v", l.Level())
		}
		time.Sleep(30 * time.Second)
		l.ask(slog.LevelInfo, time.Minute)
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if l.Level() != slog.LevelInfo {
			t.Errorf("asked for last: got %v", l.Level())
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if l.Level() != slog.LevelError || l.status().Until != nil {
			t.Errorf("over: got %v", l.Level())
		}
		l.fixed = true
		l.configure(slog.LevelDebug)
		if l.Level() != slog.LevelError {
			t.Errorf("the file's, where the command line says another: got %v", l.Level())
		}
		l.ask(slog.LevelDebug, 0)
		time.Sleep(48 * time.Hour)
		if l.Level() != slog.LevelDebug {
			t.Errorf("until another is asked for: got %v", l.Level())
		}
		l.stop()
	})
}

package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// whyHeader names decisions by default.
const whyHeader = "X-Gatehouse-Decision-Id"

// whyPolicy has its condition on a line that is told.
const whyPolicy = `# who may what
default allow := false

# managers, and nobody else
allow if {
	input.attributes.request.http.method == "DELETE"
	"manager" in data.roles[input.attributes.request.http.headers["x-user"]]
}
`

// admin asks the admin listener.
func admin(t *testing.T, g *stage.Gatehouse, method, path, body string, header ...string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://"+g.Admin+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range header {
		name, value, _ := strings.Cut(h, ": ")
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// From what a client was answered to the line of Rego that denied it.
func TestWhy(t *testing.T) {
	ten := tenants{"orders": map[string]string{
		"policy.rego": "package envoy.authz\n\n" + whyPolicy,
		"data.json":   `{"roles": {"alice": ["manager"], "bob": ["clerk"]}}`,
		"log.rego":    "package system.log\n\nmask contains \"/input/attributes/request/http/headers/x-pin\"\n",
	}}
	g, _ := startGatehouse(t, "tenants: {decision_id: {client: true, upstream: true}}\n", ten)
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})
		ask := func(user string) *stage.Response {
			return n.do(t, "main", stage.Request{Method: "DELETE", Path: "/orders/42", Headers: []string{
				"x-user: " + user, "x-pin: p1n-code", "authorization: Bearer s3cret-token", "x-gatehouse-decision-id: forged",
			}})
		}

		resp := ask("bob")
		n.denied(t, resp, 403)
		id := resp.Header.Get(whyHeader)
		equal(t, "the decision that the client is told", id, n.logged(t, resp)["decision_id"].(string))

		code, text := admin(t, g, "GET", "/tenants/orders/decisions?outcome=denied&id="+id, "")
		var found struct {
			Decisions []struct {
				Outcome string
				Event   object
			}
		}
		if err := json.Unmarshal([]byte(text), &found); err != nil || code != 200 || len(found.Decisions) != 1 {
			t.Fatalf("decisions: got %d %s, want one", code, text)
		}
		equal(t, "the decision that is remembered", found.Decisions[0].Event["decision_id"], any(id))
		for _, secret := range []string{"p1n-code", "s3cret-token"} {
			if strings.Contains(text, secret) {
				t.Errorf("decisions: got %s in %s", secret, text)
			}
		}

		code, text = admin(t, g, "POST", "/tenants/orders/explain", fmt.Sprintf(`{"decision_id": %q}`, id), "Accept: text/plain")
		want := "policy.rego:9  fail  \"manager\" in data.roles[input.attributes.request.http.headers[\"x-user\"]]\n"
		if code != 200 || !strings.Contains(text, want) || !strings.Contains(text, "then: denied at ") || !strings.Contains(text, "now: denied, by bundle policy, asked for") {
			t.Errorf("explain: got %d\n%s\nwant %s", code, text, want)
		}

		resp = ask("alice")
		seen := n.allowed(t, resp)
		id = n.logged(t, resp)["decision_id"].(string)
		equal(t, "the decision that the backend is told", seen.Headers["x-gatehouse-decision-id"], []string{id})
		equal(t, "the decision that the client is told", resp.Header[whyHeader], []string{id})
		if code, text = admin(t, g, "POST", "/tenants/orders/explain", fmt.Sprintf(`{"decision_id": %q}`, id)); code != 200 || !strings.Contains(text, `"outcome": "allowed"`) {
			t.Errorf("explain: got %d %s", code, text)
		}
	})
}

// Where the header is for the client alone, a client cannot have it reach the
// backend, and where it is off nothing is changed.
func TestDecisionHeader(t *testing.T) {
	ten := tenants{"client": "default allow := true", "off": "default allow := true"}
	g, _ := startGatehouse(t, "overrides: {client: {decision_id: {client: true, header: x-why}}}\n", ten)
	n := startEnvoy(t, envoyBinary(t, versions[0]), g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})
	resp := n.get(t, "main", "/client/a", "x-why: forged")
	equal(t, "header at the backend", n.allowed(t, resp).Headers["x-why"], nil)
	equal(t, "header at the client", resp.Header.Get("X-Why"), n.logged(t, resp)["decision_id"].(string))
	resp = n.get(t, "main", "/off/a", "x-gatehouse-decision-id: mine")
	equal(t, "header at the backend, where it is off", n.allowed(t, resp).Headers["x-gatehouse-decision-id"], []string{"mine"})
	equal(t, "header at the client, where it is off", resp.Header.Get(whyHeader), "")
}

// Each command of the page is typed as it stands there.
func TestWhyDeniedPage(t *testing.T) { typed(t, "why-denied.md", 6) }

package e2e

import (
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
)

// slack is the timeout of calls where time is not what is tested.
const slack = 10 * time.Second

// What a policy decides is what the client gets and the backend sees.
func TestDecisions(t *testing.T) {
	ten := tenants{
		"yes": `default allow := true`,
		"no":  `default allow := false`,
		"teapot": `allow := {
			"allowed": false,
			"http_status": 418,
			"body": "short and stout",
			"headers": {"content-type": "text/x-song", "set-cookie": ["a=1", "b=2"], "www-authenticate": "Tea"},
		}`,
		"bare":     `allow := {"allowed": false}`,
		"redirect": `allow := {"allowed": false, "http_status": 302, "headers": {"location": "https://login.example/?next=x"}}`,
		"identity": `allow := {"allowed": true, "headers": {"x-user": "alice"}}`,
		"lists": `allow := {"allowed": true, "headers": [
			{"x-role": ["admin", "dev"]},
			{"x-one": "1", "x-role": "guest"},
		]}`,
		"remove": `allow := {"allowed": true, "request_headers_to_remove": ["x-secret", "authorization"]}`,
		"cookies": `allow := {"allowed": true, "response_headers_to_add": {
			"set-cookie": ["session=1", "theme=dark"], "x-frame-options": "DENY",
		}}`,
		"query": `allow := {"allowed": true,
			"query_parameters_to_set": {"page": "2", "added": "yes"},
			"query_parameters_to_remove": ["token"],
		}`,
		"metadata": `allow := {"allowed": input.attributes.request.http.method == "GET",
			"dynamic_metadata": {"team": "orders", "scores": [1, 2.5], "decision_id": "forged"}}`,
		"seen": `allow := {"allowed": true, "headers": {
			"x-path": concat("|", input.parsed_path),
			"x-query": json.marshal(input.parsed_query),
			"x-accept": input.attributes.request.http.headers.accept,
			"x-id": input.attributes.metadataContext.filterMetadata.open_policy_agent.decision_id,
		}}`,
	}
	g, _ := startGatehouse(t, "", ten)
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})

		t.Run("allow", func(t *testing.T) {
			seen := n.allowed(t, n.get(t, "main", "/yes/a?b=c", "x-user: mallory"))
			equal(t, "path", seen.Path, "/yes/a?b=c")
			equal(t, "header that no policy touches", seen.Headers["x-user"], []string{"mallory"})
		})
		t.Run("deny", func(t *testing.T) {
			n.denied(t, n.get(t, "main", "/no/a"), 403)
			n.denied(t, n.get(t, "main", "/bare/a"), 403)
		})
		t.Run("deny with status, body and headers", func(t *testing.T) {
			resp := n.get(t, "main", "/teapot/a")
			n.denied(t, resp, 418)
			equal(t, "body", resp.Body, "short and stout")
			equal(t, "content-type", resp.Header["Content-Type"], []string{"text/x-song"})
			equal(t, "set-cookie", resp.Header["Set-Cookie"], []string{"a=1", "b=2"})
			equal(t, "www-authenticate", resp.Header["Www-Authenticate"], []string{"Tea"})
		})
		t.Run("redirect", func(t *testing.T) {
			resp := n.get(t, "main", "/redirect/a")
			if resp.Status != http.StatusFound || n.echo.Hits(resp.Tag) != 0 {
				t.Errorf("got status %d and %d requests at the backend, want 302 and none", resp.Status, n.echo.Hits(resp.Tag))
			}
			equal(t, "location", resp.Header.Get("Location"), "https://login.example/?next=x")
		})
		t.Run("a header overwrites what the client sent", func(t *testing.T) {
			for _, headers := range [][]string{nil, {"x-user: mallory"}, {"x-user: mallory", "X-User: root"}} {
				seen := n.allowed(t, n.get(t, "main", "/identity/a", headers...))
				equal(t, "x-user", seen.Headers["x-user"], []string{"alice"})
			}
		})
		t.Run("all values of a header arrive", func(t *testing.T) {
			seen := n.allowed(t, n.get(t, "main", "/lists/a", "x-role: root"))
			equal(t, "x-role", strings.Join(seen.Headers["x-role"], ","), "admin,dev,guest")
			equal(t, "x-one", seen.Headers["x-one"], []string{"1"})
		})
		t.Run("request_headers_to_remove", func(t *testing.T) {
			seen := n.allowed(t, n.get(t, "main", "/remove/a", "x-secret: 1", "X-Secret: 2", "authorization: Bearer x", "x-kept: 3"))
			equal(t, "x-secret", seen.Headers["x-secret"], nil)
			equal(t, "authorization", seen.Headers["authorization"], nil)
			equal(t, "x-kept", seen.Headers["x-kept"], []string{"3"})
		})
		t.Run("response_headers_to_add", func(t *testing.T) {
			resp := n.get(t, "main", "/cookies/a")
			n.allowed(t, resp)
			equal(t, "set-cookie", resp.Header["Set-Cookie"], []string{"upstream=1", "session=1", "theme=dark"})
			equal(t, "x-frame-options", resp.Header["X-Frame-Options"], []string{"DENY"})
		})
		t.Run("query_parameters", func(t *testing.T) {
			seen := n.allowed(t, n.get(t, "main", "/query/a?token=s&page=1&kept=k"))
			u, err := url.Parse(seen.Path)
			if err != nil {
				t.Fatal(err)
			}
			equal(t, "query", u.Query(), url.Values{"page": {"2"}, "added": {"yes"}, "kept": {"k"}})
		})
		t.Run("dynamic metadata in the access log", func(t *testing.T) {
			for _, method := range []string{"GET", "DELETE"} { // allowed and denied
				req := request("/metadata/a")
				req.Method = method
				entry := n.logged(t, n.do(t, "main", req))
				if id, _ := entry["decision_id"].(string); !uuid.MatchString(id) {
					t.Errorf("%s: decision_id: got %q, want a UUID", method, id)
				}
				authz, _ := entry["authz"].(object)
				equal(t, "team", authz["team"], any("orders"))
				equal(t, "scores", authz["scores"], any([]any{1.0, 2.5}))
			}
			for _, path := range []string{"/yes/a", "/no/a"} { // booleans have an ID, too
				entry := n.logged(t, n.get(t, "main", path))
				if id, _ := entry["decision_id"].(string); !uuid.MatchString(id) {
					t.Errorf("%s: decision_id: got %q, want a UUID", path, id)
				}
			}
		})
		t.Run("what the policy sees", func(t *testing.T) {
			resp := n.get(t, "main", "/seen/a%20b/?x=1&x=2", "accept: text/html")
			seen := n.allowed(t, resp)
			equal(t, "parsed_path", seen.Headers["x-path"], []string{"seen|a b|"})
			equal(t, "parsed_query", seen.Headers["x-query"], []string{`{"x":["1","2"]}`})
			equal(t, "header", seen.Headers["x-accept"], []string{"text/html"})
			equal(t, "decision_id", seen.Headers["x-id"], []string{n.logged(t, resp)["decision_id"].(string)})
		})
	})
}

var uuid = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)

// With dry-run a denied request goes through, and its metadata tell of it.
func TestDryRun(t *testing.T) {
	ten := tenants{
		"dry":   `allow := {"allowed": false, "http_status": 401, "dynamic_metadata": {"would": "deny"}}`,
		"fault": `allow := true if input.absent`,
	}
	g, _ := startGatehouse(t, `
opa: {plugins: {envoy_ext_authz_grpc: {path: envoy/authz/allow, dry-run: true}}}
`, ten)
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})
		resp := n.get(t, "main", "/dry/a")
		n.allowed(t, resp)
		entry := n.logged(t, resp)
		equal(t, "metadata", entry["authz"].(object)["would"], any("deny"))
		if id, _ := entry["decision_id"].(string); !uuid.MatchString(id) {
			t.Errorf("decision_id: got %q, want a UUID", id)
		}
		n.denied(t, n.get(t, "main", "/fault/a"), 403) // it softens decisions, never faults
	})
}

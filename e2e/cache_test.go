package e2e

import (
	"encoding/json"
	"fmt"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

const cacheConfig = `
opa:
  plugins:
    gatehouse_http:
      permissions: {package: permissions}
      auth: {tokens: [{subject: alice, token: "the-long-token-of-alice"}, {subject: bob, token: "the-long-token-of-bob"}]}
`

// A proxy that caches gives nobody the list of another: not one that keeps to
// the rules, and not one that stores what is private.
func TestCachingProxy(t *testing.T) {
	g, _ := startGatehouse(t, cacheConfig, tenants{"orders": map[string]string{"policy.rego": `package permissions
catalog := {"order": ["read", "ship"]}
allow if input.action.name == "read"
allow if input.subject.id == "alice"`}})
	for _, c := range []struct{ name, directive, again string }{
		{"by the rules", "", "MISS"},
		{"careless", "proxy_ignore_headers Cache-Control Expires;", "HIT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			p, err := stage.StartNginx(dir, fmt.Sprintf(`
	proxy_cache_path %s/cache keys_zone=lists:1m;
	server {
		listen LISTEN;
		location / {
			proxy_pass http://%s;
			proxy_set_header Host $http_host;
			proxy_cache lists;
			proxy_cache_valid 200 1m;
			%s
			add_header X-Cache $upstream_cache_status always;
		}
	}`, dir, g.HTTP, c.directive))
			addr := keep(t, p, err)
			ask := func(headers ...string) *stage.Response {
				t.Helper()
				resp, err := stage.Do(addr, stage.Request{Path: "/t/orders/v1/me/permissions", Headers: headers})
				if err != nil {
					t.Fatal(err)
				}
				return resp
			}
			for round := range 3 {
				for user, want := range map[string][]string{"alice": {"read", "ship"}, "bob": {"read"}} {
					resp := ask("authorization: Bearer the-long-token-of-" + user)
					var list struct {
						Subject     struct{ ID string }
						Permissions map[string][]string
					}
					if err := json.Unmarshal([]byte(resp.Body), &list); err != nil {
						t.Fatalf("%s: status %d, body %q: %v", user, resp.Status, resp.Body, err)
					}
					equal(t, "subject", list.Subject.ID, user)
					equal(t, "permissions of "+user, list.Permissions["order"], want)
					if round > 0 {
						equal(t, "cache", resp.Header.Get("X-Cache"), c.again)
					}
				}
				equal(t, "status for nobody", ask().Status, 401)
			}
		})
	}
}

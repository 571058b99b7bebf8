package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// forwardPolicy lets alice read what is public, and says to the backend who she
// is.
const forwardPolicy = `http := input.attributes.request.http

default allow := {"allowed": false, "http_status": 403, "headers": {"x-denied": "yes"}, "body": "not for you"}

allow := {"allowed": false, "http_status": 401, "headers": {"www-authenticate": "Bearer realm=\"orders\""}} if not http.headers.authorization

allow := {"allowed": true, "headers": {"x-user": "alice"}, "response_headers_to_add": {"x-policy": "seen"}} if {
	http.headers.authorization == "Bearer alice"
	http.method == "GET"
	input.parsed_path[0] == "public"
	http.host == "shop.example.com"
}

# the body, where the proxy sends it
allow := {"allowed": true, "headers": {"x-user": "alice"}} if {
	http.headers.authorization == "Bearer alice"
	http.method == "POST"
	input.parsed_path[0] == "orders"
	input.parsed_body.owner == "alice"
}
`

const forwardConfig = `
http: {listen: "127.0.0.1:0", trusted_peers: [127.0.0.1]}
grpc: {listen: "127.0.0.1:0"}
admin: {listen: "127.0.0.1:0"}
drain: {delay: 0s}
opa:
  plugins: {gatehouse_http: {check: {}}}
`

// forwarding are a gatehouse, a proxy that asks it, and a backend behind.
type forwarding struct {
	addr string
	echo *stage.Echo
}

func startEcho(t *testing.T) *stage.Echo {
	t.Helper()
	echo, err := stage.StartEcho()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(echo.Close)
	return echo
}

func keep(t *testing.T, p *stage.Proxy, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("output of %s:\n%s", p.Name, tail(p.Output(), 8<<10))
		}
	})
	return p.Addr
}

// do sends a request for shop.example.com as alice.
func (f *forwarding) do(t *testing.T, req stage.Request) *stage.Response {
	t.Helper()
	req.Host = "shop.example.com"
	resp, err := stage.Do(f.addr, req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func (f *forwarding) asAlice(t *testing.T, method, path string, headers ...string) *stage.Response {
	t.Helper()
	return f.do(t, stage.Request{Method: method, Path: path, Headers: append([]string{"authorization: Bearer alice"}, headers...)})
}

func (f *forwarding) allowed(t *testing.T, what string, resp *stage.Response) *stage.Seen {
	t.Helper()
	if resp.Status != 200 || resp.Seen == nil {
		t.Fatalf("%s: got status %d, body %q, want 200 from the backend", what, resp.Status, tail(resp.Body, 500))
	}
	return resp.Seen
}

func (f *forwarding) denied(t *testing.T, what string, resp *stage.Response, status ...int) {
	t.Helper()
	if resp.Status < 400 || len(status) > 0 && resp.Status != status[0] {
		t.Errorf("%s: got status %d, want %d", what, resp.Status, status)
	}
	if hits := f.echo.Hits(resp.Tag); hits != 0 {
		t.Errorf("%s: the backend was reached %d times", what, hits)
	}
}

// enforces checks what every proxy must do. Challenges says that the proxy gives
// the client the headers of a denial.
func (f *forwarding) enforces(t *testing.T, challenges bool) {
	seen := f.allowed(t, "what alice may", f.asAlice(t, "GET", "/public/a%2Fb?x=1", "x-user: mallory"))
	equal(t, "user at the backend", seen.Headers["x-user"], []string{"alice"})
	f.denied(t, "what alice may not", f.asAlice(t, "GET", "/private"), 403)
	f.denied(t, "a method that she may not", f.asAlice(t, "DELETE", "/public/a"), 403)
	resp := f.do(t, stage.Request{Path: "/public/a"})
	f.denied(t, "nobody", resp, 401)
	if challenges {
		equal(t, "challenge", resp.Header.Get("www-authenticate"), `Bearer realm="orders"`)
	}

	// A client says what the proxy should.
	for _, header := range []string{
		"x-forwarded-uri: /public/a", "x-original-uri: /public/a", "X_Forwarded_Uri: /public/a", "x-forwarded-uri : /public/a",
		"x-original-url: http://shop.example.com/public/a", "x-rewrite-url: /public/a", "x-forwarded-path: /public/a", "x-forwarded-prefix: /public",
	} {
		f.denied(t, header, f.asAlice(t, "GET", "/private", header))
	}
	for _, header := range []string{"x-forwarded-method: GET", "x-original-method: GET", "x-http-method-override: GET", "x_forwarded_method: GET"} {
		f.denied(t, header, f.asAlice(t, "DELETE", "/public/a", header))
	}
	resp = f.do(t, stage.Request{Path: "/private", Headers: []string{"authorization: Bearer mallory", "authorization: Bearer alice"}})
	f.denied(t, "two credentials", resp)

	// Nothing leads from what she may to what she may not.
	for _, path := range []string{
		"/public/../private", "/public/%2e%2e/private", "/public/..%2fprivate", "/public%2f..%2fprivate", "/public/%2E%2E%2Fprivate",
		"//private", "/./private", "/private?/public/", "/private#/public/", "/private%23/public", "/%70rivate", "/private;/public", "/public/a%00",
	} {
		resp := f.asAlice(t, "GET", path)
		if resp.Seen != nil && strings.Contains(resp.Seen.Path, "private") && !strings.HasPrefix(resp.Seen.Path, "/public") {
			t.Errorf("%s: the backend was asked for %s", path, resp.Seen.Path)
		}
	}
}

// nginx asks with auth_request. It knows 200, 401 and 403, and says 500 to all
// else.
func TestNginx(t *testing.T) {
	g, _ := startGatehouse(t, forwardConfig, tenants{"orders": forwardPolicy})
	echo := startEcho(t)
	dir := t.TempDir()
	p, err := stage.StartNginx(dir, fmt.Sprintf(`
	server {
		listen LISTEN;
		location / {
			auth_request /authorize;
			auth_request_set $user $upstream_http_x_user;
			proxy_set_header Host $http_host;
			proxy_set_header X-User $user;
			proxy_pass http://%s;
		}
		location = /authorize {
			internal;
			proxy_pass http://%s/t/orders/check;
			proxy_pass_request_body off;
			proxy_set_header Content-Length "";
			proxy_set_header X-Forwarded-Method $request_method;
			proxy_set_header X-Forwarded-Uri $request_uri;
			proxy_set_header X-Forwarded-Host $http_host;
			proxy_set_header X-Forwarded-Proto $scheme;
			proxy_set_header X-Forwarded-For $remote_addr;
			proxy_set_header X-Original-Method "";
			proxy_set_header X-Original-Uri "";
		}
	}`, echo.Addr, g.HTTP))
	f := &forwarding{keep(t, p, err), echo}
	f.enforces(t, true)
	f.denied(t, "a body that the policy does not see", f.do(t, stage.Request{
		Path: "/orders", Body: `{"owner": "alice"}`, Headers: []string{"authorization: Bearer alice", "content-type: application/json"},
	}), 403)
}

// nginx can name the request in the path, too.
func TestNginxPath(t *testing.T) {
	g, _ := startGatehouse(t, forwardConfig, tenants{"orders": forwardPolicy})
	echo := startEcho(t)
	p, err := stage.StartNginx(t.TempDir(), fmt.Sprintf(`
	server {
		listen LISTEN;
		location / {
			auth_request /authorize;
			auth_request_set $user $upstream_http_x_user;
			proxy_set_header X-User $user;
			proxy_pass http://%s;
		}
		location = /authorize {
			internal;
			proxy_method $request_method;
			proxy_pass http://%s/t/orders/check$request_uri;
			proxy_pass_request_body off;
			proxy_set_header Content-Length "";
			proxy_set_header Host $http_host;
		}
	}`, echo.Addr, g.HTTP))
	f := &forwarding{keep(t, p, err), echo}
	f.enforces(t, true)
}

// Caddy asks with forward_auth, and gives the client the answer that the policy
// wrote.
func TestCaddy(t *testing.T) {
	g, _ := startGatehouse(t, forwardConfig, tenants{"orders": forwardPolicy})
	echo := startEcho(t)
	p, err := stage.StartCaddy(t.TempDir(), fmt.Sprintf(`{
	admin off
	auto_https off
}
http://:LISTEN {
	bind 127.0.0.1
	forward_auth %s {
		uri /t/orders/check
		copy_headers X-User
	}
	reverse_proxy %s
}
`, g.HTTP, echo.Addr))
	f := &forwarding{keep(t, p, err), echo}
	f.enforces(t, true)
	resp := f.asAlice(t, "GET", "/private")
	equal(t, "body of a denial", resp.Body, "not for you")
	equal(t, "header of a denial", resp.Header.Get("x-denied"), "yes")
}

// Envoy asks over HTTP as well as over gRPC, here with the body.
func TestEnvoyHTTP(t *testing.T) {
	g, _ := startGatehouse(t, forwardConfig, tenants{"orders": forwardPolicy})
	eachEnvoy(t, func(t *testing.T, envoy string) {
		patterns := func(names ...string) object {
			var list []object
			for _, name := range names {
				list = append(list, object{"exact": name})
			}
			return object{"patterns": list}
		}
		n := startEnvoy(t, envoy, g.HTTP, options{}, listener{Name: "main", Routes: []route{{Prefix: "/"}}, Filter: object{
			"http_service": object{
				"server_uri":  object{"uri": "http://gatehouse", "cluster": "gatehouse", "timeout": "5s"},
				"path_prefix": "/t/orders/check",
				"authorization_response": object{
					"allowed_upstream_headers":          patterns("x-user"),
					"allowed_client_headers":            patterns("www-authenticate", "x-denied"),
					"allowed_client_headers_on_success": patterns("x-policy"),
				},
			},
			"allowed_headers":   patterns("content-type", "x-forwarded-proto", "x-forwarded-for", "x-envoy-auth-partial-body"),
			"with_request_body": object{"max_request_bytes": 4096},
		}})
		f := &forwarding{n.Listeners["main"], n.echo}
		challenges := !strings.Contains(t.Name(), "envoy-1.37") // which gives a client the body of a denial alone
		f.enforces(t, challenges)
		resp := f.asAlice(t, "GET", "/private")
		equal(t, "body of a denial", resp.Body, "not for you")
		if challenges {
			equal(t, "header of a denial", resp.Header.Get("x-denied"), "yes")
		}
		resp = f.asAlice(t, "GET", "/public/a")
		equal(t, "header for the client", resp.Header.Get("x-policy"), "seen")

		post := func(owner string) *stage.Response {
			return f.do(t, stage.Request{
				Path: "/orders", Body: `{"owner": "` + owner + `"}`, Headers: []string{"authorization: Bearer alice", "content-type: application/json"},
			})
		}
		seen := f.allowed(t, "a body", post("alice"))
		equal(t, "body at the backend", seen.Body, `{"owner": "alice"}`)
		f.denied(t, "another body", post("mallory"), 403)
	})
}

// Whoever is not trusted is told nothing.
func TestForwardAuthOfStrangers(t *testing.T) {
	g, _ := startGatehouse(t, strings.Replace(forwardConfig, "trusted_peers: [127.0.0.1]", "trusted_peers: [10.0.0.0/8]", 1), tenants{"orders": forwardPolicy})
	resp, err := stage.Do(g.HTTP, stage.Request{
		Path: "/t/orders/check/public/a", Host: "shop.example.com",
		Headers: []string{"authorization: Bearer alice", "x-forwarded-for: 10.0.0.1"},
	})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "status", resp.Status, 403)
	equal(t, "user", resp.Header.Get("x-user"), "")
}

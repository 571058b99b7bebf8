package e2e

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// looping never ends on its own, and can be interrupted.
const looping = `allow if {
	some i in numbers.range(1, 100000)
	some j in numbers.range(1, 100000)
	i * j == -1
}`

// stuck keeps single builtins busy for seconds, which nothing can interrupt.
const stuck = `
text := concat("", [sprintf("%0999999d", [i]) | some i in numbers.range(1, 30)])
allow if regex.match("(0+)*([0-9]+x)+$", text)
default allow := true`

// failOpen is Envoy at its most trusting: what it takes for a failure of the
// authorization service lets the request in. The calls have Envoy's own
// default timeout, 200 ms.
func failOpen(name string, ten []route) listener {
	return listener{Name: name, RawPath: true, Routes: ten, Filter: object{
		"failure_mode_allow": true,
		"with_request_body":  object{"max_request_bytes": 24 << 20},
	}}
}

// Whatever goes wrong, nothing gets in, even where Envoy is told to let requests
// in when authorization fails. Other tenants do not notice.
func TestFaultsLetNothingIn(t *testing.T) {
	const no = "default allow := false"
	ten := tenants{
		"undefined":     `allow := true if input.absent`,
		"conflict":      "allow := true if true\nallow := false if true",
		"text":          `allow := "yes"`,
		"number":        `allow := 1`,
		"unsure":        `allow := {"body": "who knows"}`,
		"allowed-text":  `allow := {"allowed": "true"}`,
		"header-number": `allow := {"allowed": true, "headers": {"x-a": 1}}`,
		"header-path":   `allow := {"allowed": true, "headers": {":path": "/admin"}}`,
		"header-host":   `allow := {"allowed": true, "headers": {"host": "admin"}}`,
		"header-envoy":  `allow := {"allowed": true, "headers": {"x-envoy-original-path": "/admin"}}`,
		"header-lines":  `allow := {"allowed": true, "headers": {"x-a": "1\r\nx-b: 2"}}`,
		"strange":       `allow := {"allowed": false, "http_status": 999}`,
		"dividing":      `allow := true if 1 / (input.attributes.request.http.size * 0) == 1`,
		"function":      "allow := f(1)\nf(x) := true if x > 0\nf(x) := false if x < 2",
		"elsewhere":     map[string]string{"p.rego": "package other\n\nallow := true"},
		"empty":         map[string]string{"data.json": "{}"},
		"broken":        broken,
		"sends":         `allow := http.send({"method": "GET", "url": "http://127.0.0.1/"}).status_code == 200`,
		"yes":           `default allow := true`,
		"no":            no,
		"bodies":        `default allow := true`,
		"body":          no,
		"big-body":      no,
		"looping":       looping,
		"stuck":         stuck,
	}
	bundles, err := stage.StartBundleServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bundles.Close)
	for name, content := range ten {
		bundles.Put(name, stage.Bundle(files(content)))
	}
	bundles.Put("garbage", []byte("this is no archive"))
	bundles.Fail("failing", http.StatusInternalServerError)
	bundles.Hang("hanging")

	const config = `
overrides:
  big-body: {limits: {body_bytes: 16MiB}}
`
	routes := byTenant(ten)
	for _, name := range []string{"garbage", "failing", "hanging", "unknown", "Not_A_Name", "..", "a/b"} {
		routes = append(routes, route{Prefix: "/" + name + "/", Context: map[string]string{"tenant": name}})
	}
	routes = append(routes, route{Prefix: "/nobody/"})

	eachEnvoy(t, func(t *testing.T, envoy string) {
		g := serve(t, bundleConfig(bundles)+config)
		n := startEnvoy(t, envoy, g.GRPC, options{},
			failOpen("open", routes),
			listener{Name: "strict", Timeout: slack, Routes: routes, Filter: object{"with_request_body": object{"max_request_bytes": 24 << 20}}},
		)
		others := watchOthers(t, n)

		// Without this, nothing that follows would prove anything.
		n.allowed(t, n.get(t, "strict", "/yes/a"))
		n.allowed(t, n.get(t, "open", "/yes/a"))

		t.Run("policies", func(t *testing.T) {
			for name, status := range map[string]int{
				"undefined": 403, "conflict": 403, "function": 403, "dividing": 403, "elsewhere": 403, "empty": 403,
				"text": 403, "number": 403, "unsure": 403, "allowed-text": 403, "strange": 403,
				"header-number": 403, "header-path": 403, "header-host": 403, "header-envoy": 403, "header-lines": 403,
			} {
				t.Run(name, func(t *testing.T) {
					n.get(t, "strict", "/"+name+"/a") // loads it, for which a busy machine may need longer than the other listener gives
					n.denied(t, n.get(t, "open", "/"+name+"/a"), status)
				})
			}
		})
		t.Run("tenants", func(t *testing.T) {
			for name, status := range map[string]int{
				"unknown": 403, "Not_A_Name": 403, "..": 403, "a/b": 403, "nobody": 403,
				"broken": 503, "sends": 503, "garbage": 503, "failing": 503,
			} {
				t.Run(name, func(t *testing.T) {
					path := "/" + name + "/a"
					n.denied(t, n.get(t, "open", path), status)
					n.denied(t, n.get(t, "open", path), status) // not only the first time
				})
			}
		})
		t.Run("requests", func(t *testing.T) {
			for name, req := range map[string]stage.Request{
				"bad JSON":            post("/bodies/a", "application/json", `{"a":`),
				"two JSON values":     post("/bodies/a", "application/json", `{} {}`),
				"duplicate keys":      post("/bodies/a", "application/json", `{"a": 1, "a": 2}`),
				"duplicate keys deep": post("/bodies/a", "application/vnd.x+JSON", `[{"a": {"b": 1, "c": 2, "b": 3}}]`),
				"nested too deep":     post("/bodies/a", "application/json", strings.Repeat("[", 100_000)),
				"bad form":            post("/bodies/a", "application/x-www-form-urlencoded", "a=%zz"),
				"bad multipart":       post("/bodies/a", "multipart/form-data; boundary=b", "--b\r\nno end"),
				"dots":                request("/bodies/../no/a"),
				"encoded dots":        request("/bodies/%2e%2e/no/a"),
				"dots at the end":     request("/bodies/.."),
				"dots behind a slash": request("/bodies/x%2f..%2fa"),
				"NUL":                 request("/bodies/a%00b"),
				"bad escape":          request("/bodies/a%zz"),
				"bad query":           request("/bodies/a?b=%zz"),
				"semicolon in query":  request("/bodies/a?b=1;c=2"),
			} {
				t.Run(name, func(t *testing.T) { n.denied(t, n.do(t, "open", req), 400) })
			}
			n.allowed(t, n.do(t, "open", post("/bodies/a", "application/json", `{"a": {"a": 1}}`)))
			// What is not UTF-8 cannot be in a message as it is.
			n.keptOut(t, n.do(t, "open", stage.Request{Path: "/no/a", Headers: []string{"x-bytes: \xff\xfe\x80"}}))
			n.keptOut(t, n.do(t, "open", post("/no/a", "text/plain", "\xff\xfe\x80")))
			n.keptOut(t, n.do(t, "open", post("/no/a?q=\xff", "application/json", "\"\xff\"")))
		})
		t.Run("5 MiB body", func(t *testing.T) {
			large := `{"text": "` + strings.Repeat("x", 5<<20) + `"}`
			values := `[` + strings.Repeat(`{"k": [1, 2, 3, "four"]},`, 5<<20/25) + `0]`
			for name, body := range map[string]string{"one value": large, "many values": values} {
				t.Run(name, func(t *testing.T) {
					n.denied(t, n.do(t, "open", post("/body/a", "application/json", body)), 413)
					for range 3 {
						n.keptOut(t, n.do(t, "open", post("/big-body/a", "application/json", body)))
					}
				})
			}
		})
		t.Run("slow load", func(t *testing.T) {
			var clients sync.WaitGroup
			for range 8 {
				clients.Go(func() { n.denied(t, n.get(t, "open", "/hanging/a"), 503) })
			}
			clients.Wait()
		})
		t.Run("looping policy", func(t *testing.T) {
			var clients sync.WaitGroup
			for range 8 {
				clients.Go(func() {
					for range 4 {
						n.denied(t, n.get(t, "open", "/looping/a"), 503)
					}
				})
			}
			clients.Wait()
		})
		t.Run("policy that cannot be interrupted", func(t *testing.T) {
			var clients sync.WaitGroup
			for range 4 {
				clients.Go(func() {
					for range 2 {
						n.denied(t, n.get(t, "open", "/stuck/a"), 503)
					}
				})
			}
			clients.Wait()
		})
		others(t)

		t.Run("without gatehouse Envoy lets in", func(t *testing.T) {
			g.Kill()
			n.allowed(t, n.get(t, "open", "/no/a"))
			n.keptOut(t, n.get(t, "strict", "/no/a"))
		})
	})
}

// watchOthers asks for two healthy tenants all the while. The function that it
// returns ends this and fails the test when one answer was not as it should be.
func watchOthers(t *testing.T, n *network) (end func(*testing.T)) {
	ctx, cancel := context.WithCancel(t.Context())
	var watch sync.WaitGroup
	var faults []string
	asked, slowest := 0, time.Duration(0)
	watch.Go(func() {
		for ctx.Err() == nil {
			for path, want := range map[string]int{"/yes/watch": 200, "/no/watch": 403} {
				begun := time.Now()
				resp, err := stage.Do(n.Listeners["strict"], request(path))
				slowest = max(slowest, time.Since(begun))
				asked++
				if err != nil {
					faults = append(faults, err.Error())
				} else if resp.Status != want {
					faults = append(faults, fmt.Sprintf("%s: got status %d, want %d", path, resp.Status, want))
				}
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	end = func(t *testing.T) {
		t.Helper()
		cancel()
		watch.Wait()
		t.Logf("%d requests of other tenants meanwhile, the slowest took %s", asked, slowest)
		if len(faults) > 0 {
			t.Errorf("%d of %d requests of other tenants were answered wrongly, the first: %s", len(faults), asked, faults[0])
		}
	}
	t.Cleanup(func() { cancel(); watch.Wait() })
	return end
}

func post(path, contentType, body string) stage.Request {
	return stage.Request{Path: path, Body: body, Headers: []string{"content-type: " + contentType}}
}

// A check that is larger than a message may be is denied, not failed.
func TestMessageTooLarge(t *testing.T) {
	ten := tenants{"yes": "default allow := true"}
	g, _ := startGatehouse(t, `
grpc:  {listen: "127.0.0.1:0", max_message_bytes: 1MiB}
admin: {listen: "127.0.0.1:0"}
`, ten)
	eachEnvoy(t, func(t *testing.T, envoy string) {
		open := failOpen("open", byTenant(ten))
		open.Timeout = slack // for Envoy to send so much
		n := startEnvoy(t, envoy, g.GRPC, options{}, open)
		n.allowed(t, n.get(t, "open", "/yes/a"))
		for _, size := range []int{2 << 20, 20 << 20} {
			n.denied(t, n.do(t, "open", post("/yes/a", "text/plain", strings.Repeat("x", size))), 413)
		}
		n.allowed(t, n.get(t, "open", "/yes/a"))
	})
}

// on_error says what a fault of a tenant is answered with. What a client does
// wrong is always denied.
func TestOnError(t *testing.T) {
	undefined := `allow := true if input.absent`
	ten := tenants{"upstream": undefined, "allow": undefined, "deny": undefined}
	g, _ := startGatehouse(t, `
overrides:
  upstream: {on_error: upstream}
  allow:    {on_error: allow}
  deny:     {on_error: deny}
  unknown:  {on_error: allow}
`, ten)
	routes := append(byTenant(ten), route{Prefix: "/unknown/", Context: map[string]string{"tenant": "unknown"}})
	body := object{"max_request_bytes": 2 << 20}
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{},
			listener{Name: "open", Timeout: slack, Routes: routes, RawPath: true,
				Filter: object{"failure_mode_allow": true, "with_request_body": body}},
			listener{Name: "closed", Timeout: slack, Routes: routes, RawPath: true,
				Filter: object{"with_request_body": body, "status_on_error": object{"code": "BadGateway"}}},
		)
		n.allowed(t, n.get(t, "open", "/upstream/a"))
		n.denied(t, n.get(t, "closed", "/upstream/a"), 502)
		n.allowed(t, n.get(t, "open", "/allow/a"))
		n.allowed(t, n.get(t, "closed", "/allow/a"))
		n.denied(t, n.get(t, "open", "/deny/a"), 403)
		n.denied(t, n.get(t, "closed", "/deny/a"), 403)

		for _, tenant := range []string{"upstream", "allow"} {
			n.denied(t, n.do(t, "open", post("/"+tenant+"/a", "application/json", "{")), 400)
			n.denied(t, n.get(t, "open", "/"+tenant+"/../a"), 400)
			n.denied(t, n.do(t, "open", post("/"+tenant+"/a", "text/plain", strings.Repeat("x", 1<<20+1))), 413)
		}
		n.denied(t, n.get(t, "open", "/unknown/a"), 403)
	})
}

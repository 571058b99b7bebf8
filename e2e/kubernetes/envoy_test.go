package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	kyaml "sigs.k8s.io/yaml"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// rego are the policies of the tenants. The answers tell them apart: x-tenant says
// who decided.
var rego = map[string]string{
	"orders": `package envoy.authz

default allow := false

allow := {"allowed": true, "headers": {"x-tenant": "orders"}} if input.attributes.request.http.headers["x-user"] == "alice"
`,
	"payments": `package envoy.authz

default allow := false

allow := {"allowed": true, "headers": {"x-tenant": "payments"}} if input.attributes.request.http.headers["x-user"] == "bob"
`,
}

// network is an Envoy before a backend.
type network struct {
	*stage.Envoy
	echo *stage.Echo
}

// startGatehouse starts a gatehouse with the configuration of a rendered chart,
// where listeners, and what needs a server of bundles, are the test's: they are on
// loopback and bundles in a folder. Whoever asks from there is trusted for
// forward-auth.
func startGatehouse(t *testing.T, manifests []byte) *stage.Gatehouse {
	t.Helper()
	var config object
	if err := kyaml.Unmarshal([]byte(podOf(t, manifests).configs["gatehouse"]["gatehouse.yaml"]), &config); err != nil {
		t.Fatal(err)
	}
	for _, listener := range []string{"grpc", "http", "admin"} {
		config[listener].(object)["listen"] = "127.0.0.1:0"
	}
	if peers, ok := config["http"].(object)["trusted_peers"]; !ok || len(peers.([]any)) == 0 {
		t.Fatal("the chart's configuration trusts no peers")
	}
	config["http"].(object)["trusted_peers"] = []string{"127.0.0.1"}
	config["drain"] = object{"delay": "0s"}
	delete(config, "persist")
	delete(config["opa"].(object), "services")
	delete(config["opa"].(object), "bundles")
	return serve(t, config)
}

// serve starts a gatehouse with the tenants of rego.
func serve(t *testing.T, config object) *stage.Gatehouse {
	t.Helper()
	text, err := kyaml.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "gatehouse.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	tenants := filepath.Join(dir, "tenants")
	for name, policy := range rego {
		if err := os.MkdirAll(filepath.Join(tenants, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tenants, name, "policy.rego"), []byte(policy), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	g, err := stage.StartGatehouse(gatehouse(t), "-c", file, tenants)
	if err != nil {
		t.Fatal(err)
	}
	stopped(t, g.Process)
	return g
}

// startEnvoy starts an Envoy with a configuration whose backend is echo.
func startEnvoy(t *testing.T, echo *stage.Echo, dir string, config []byte) *network {
	t.Helper()
	e, err := stage.StartEnvoy(tool(t, "envoy"), dir, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.Kill() // a drain would wait, and the Envoy is no subject of the test
		if out := e.Output(); t.Failed() {
			t.Logf("output of Envoy:\n%s", out[max(0, len(out)-8<<10):])
		}
	})
	return &network{Envoy: e, echo: echo}
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

// startStatic starts an Envoy with the static configuration, with these addresses
// beside those of its listeners and of the backend.
func startStatic(t *testing.T, config []byte, to map[string]string) *network {
	t.Helper()
	echo := startEcho(t)
	to["127.0.0.1:9901"], to["127.0.0.1:10000"], to["127.0.0.1:8080"] = "127.0.0.1:0", "127.0.0.1:0", echo.Addr
	config, err := stage.Readdress(config, to)
	if err != nil {
		t.Fatal(err)
	}
	return startEnvoy(t, echo, t.TempDir(), config)
}

func (n *network) get(t *testing.T, listener, path string, headers ...string) *stage.Response {
	t.Helper()
	return n.do(t, listener, stage.Request{Path: path, Headers: headers})
}

func (n *network) do(t *testing.T, listener string, req stage.Request) *stage.Response {
	t.Helper()
	addr, ok := n.Listeners[listener]
	if !ok {
		t.Fatalf("Envoy has listeners %v, not %q", n.Listeners, listener)
	}
	resp, err := stage.Do(addr, req)
	if err != nil {
		t.Fatalf("listener %q: %v", listener, err)
	}
	return resp
}

// allowed checks that a request came to the backend, and returns it as it was
// seen there.
func (n *network) allowed(t *testing.T, resp *stage.Response) *stage.Seen {
	t.Helper()
	if resp.Status != http.StatusOK || resp.Seen == nil {
		t.Fatalf("got status %d, want 200 from the backend; body %q", resp.Status, resp.Body[max(0, len(resp.Body)-500):])
	}
	return resp.Seen
}

// denied checks that a request was answered with the status and never came to
// the backend.
func (n *network) denied(t *testing.T, resp *stage.Response, status int) {
	t.Helper()
	if resp.Status != status {
		t.Errorf("got status %d, want %d; body %q", resp.Status, status, resp.Body[max(0, len(resp.Body)-500):])
	}
	if hits := n.echo.Hits(resp.Tag); hits != 0 {
		t.Errorf("the backend was reached %d times, want never", hits)
	}
}

// isolated checks that the requests that go to one tenant are decided by its
// policy, those to the other by the other's, and that what a client sends changes
// neither.
func isolated(t *testing.T, n *network, orders, payments func(headers ...string) *stage.Response) {
	t.Helper()
	forged := []string{"tenant: payments", "x-tenant: payments", "x-mesh-workload: payments"}
	for _, more := range [][]string{nil, forged} {
		if seen := n.allowed(t, orders(append(more, "x-user: alice")...)); strings.Join(seen.Headers["x-tenant"], ",") != "orders" {
			t.Errorf("x-tenant: got %q, want orders", seen.Headers["x-tenant"])
		}
		n.denied(t, orders(append(more, "x-user: bob")...), http.StatusForbidden)
		n.denied(t, orders(more...), http.StatusForbidden)
	}
	if seen := n.allowed(t, payments("x-user: bob", "x-tenant: orders")); strings.Join(seen.Headers["x-tenant"], ",") != "payments" {
		t.Errorf("x-tenant: got %q, want payments", seen.Headers["x-tenant"])
	}
	n.denied(t, payments("x-user: alice"), http.StatusForbidden)
}

// plain is a configuration of gatehouse for the Envoys of deploy/envoy.
func plain() object {
	return object{
		"grpc": object{"listen": "127.0.0.1:0"}, "http": object{"listen": ""}, "admin": object{"listen": "127.0.0.1:0"},
		"drain": object{"delay": "0s"},
	}
}

func TestEnvoyStatic(t *testing.T) {
	g := serve(t, plain())
	config, err := os.ReadFile(deploy + "/envoy/envoy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	n := startStatic(t, config, map[string]string{"127.0.0.1:9191": g.GRPC})
	isolated(t, n,
		func(h ...string) *stage.Response { return n.get(t, "main", "/orders/1", h...) },
		func(h ...string) *stage.Response { return n.get(t, "main", "/payments/1", h...) })
	n.denied(t, n.get(t, "main", "/unknown", "x-user: alice"), http.StatusNotFound)
}

// The resources of deploy/envoy/xds as files; addresses and the folder are the
// test's. A route that comes is served without a restart.
func TestEnvoyXDS(t *testing.T) {
	g, echo := serve(t, plain()), startEcho(t)
	dir := t.TempDir()
	read := func(name string, to map[string]string) []byte {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(deploy, "envoy", "xds", name))
		if err != nil {
			t.Fatal(err)
		}
		text = bytes.ReplaceAll(text, []byte("{path: .}"), []byte("{path: "+dir+"}"))
		for _, f := range []string{"lds.yaml", "cds.yaml", "rds.yaml"} {
			text = bytes.ReplaceAll(text, []byte("path: "+f+","), []byte("path: "+filepath.Join(dir, f)+","))
		}
		if text, err = stage.Readdress(text, to); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return text
	}
	put := func(name string, text []byte) {
		t.Helper()
		next := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(next, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	put("lds.yaml", read("lds.yaml", map[string]string{"127.0.0.1:10000": "127.0.0.1:0"}))
	put("cds.yaml", read("cds.yaml", map[string]string{"127.0.0.1:9191": g.GRPC, "127.0.0.1:8080": echo.Addr}))
	rds := read("rds.yaml", nil)
	put("rds.yaml", rds)
	n := startEnvoy(t, echo, t.TempDir(), read("bootstrap.yaml", map[string]string{"127.0.0.1:9901": "127.0.0.1:0"}))
	isolated(t, n,
		func(h ...string) *stage.Response { return n.get(t, "main", "/orders/1", h...) },
		func(h ...string) *stage.Response { return n.get(t, "main", "/payments/1", h...) })

	n.denied(t, n.get(t, "main", "/shop/1", "x-user: alice"), http.StatusNotFound)
	more := bytes.Replace(rds, []byte("path_separated_prefix: /orders"), []byte("path_separated_prefix: /shop"), 1)
	if bytes.Equal(rds, more) {
		t.Fatal("rds.yaml has no route /orders")
	}
	put("rds.yaml", more)
	eventually(t, "the new route is served", func() bool {
		return n.get(t, "main", "/shop/1", "x-user: alice").Status == http.StatusOK
	})
	n.denied(t, n.get(t, "main", "/shop/1", "x-user: bob"), http.StatusForbidden)
}

// address is that of a socket in Envoy's JSON.
func address(addr string) object {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		panic(fmt.Sprintf("address %q: %v", addr, err)) // of a process that runs
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		panic(fmt.Sprintf("address %q: %v", addr, err))
	}
	return object{"socket_address": object{"address": host, "port_value": n}}
}

// cluster is one with a single endpoint.
func cluster(name, addr string, http2 bool) object {
	c := object{
		"name": name, "type": "STATIC", "connect_timeout": "1s",
		"load_assignment": object{"cluster_name": name, "endpoints": []any{object{"lb_endpoints": []any{object{"endpoint": object{"address": address(addr)}}}}}},
	}
	if http2 {
		c["typed_extension_protocol_options"] = object{"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
			"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
			"explicit_http_config": object{"http2_protocol_options": object{}},
		}}
	}
	return c
}

// httpListener is one with these filters before the backend.
func httpListener(name string, filters ...any) object {
	return object{"name": name, "address": address("127.0.0.1:0"), "filter_chains": []any{object{"filters": []any{object{
		"name": "envoy.filters.network.http_connection_manager",
		"typed_config": object{
			"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
			"stat_prefix": name, "use_remote_address": true, "normalize_path": true, "merge_slashes": true,
			"http_filters": append(filters, object{"name": "envoy.filters.http.router", "typed_config": object{
				"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
			}}),
			"route_config": object{"virtual_hosts": []any{object{"name": "all", "domains": []any{"*"}, "routes": []any{object{
				"match": object{"prefix": "/"}, "route": object{"cluster": "backend"},
			}}}}},
		},
	}}}}}
}

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

package e2e

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"text/template"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// versions of Envoy that are tested.
var versions = []string{"1.40", "1.37"}

// envoyBinary returns the binary of a version, and fails without one.
func envoyBinary(t *testing.T, version string) string {
	t.Helper()
	env := "GATEHOUSE_E2E_ENVOY_" + strings.ReplaceAll(version, ".", "_")
	path := os.Getenv(env)
	if path == "" {
		path = filepath.Join("..", ".cache", "envoy-"+version+".0")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no Envoy %s (%v): run e2e/fetch-envoy, or set %s", version, err, env)
	}
	return path
}

// eachEnvoy runs a test with each version of Envoy.
func eachEnvoy(t *testing.T, test func(t *testing.T, envoy string)) {
	t.Helper()
	for _, v := range versions {
		t.Run("envoy-"+v, func(t *testing.T) { test(t, envoyBinary(t, v)) })
	}
}

// built is the gatehouse to test.
var built struct {
	path string
	err  error
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "gatehouse-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built.path = os.Getenv("GATEHOUSE_BIN")
	if built.path == "" {
		built.path, built.err = stage.Build(context.Background(), dir, "../cmd/gatehouse")
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// tenants are policies by tenant: rules of package envoy.authz, or files by
// path.
type tenants map[string]any

// files returns the files of a tenant's bundle.
func files(content any) map[string]string {
	if rules, ok := content.(string); ok {
		return map[string]string{"policy.rego": "package envoy.authz\n\n" + rules}
	}
	return content.(map[string]string)
}

// writeTenant puts a tenant into a directory of tenants, at once and whole.
func writeTenant(t *testing.T, dir, name string, content any) {
	t.Helper()
	next := filepath.Join(t.TempDir(), name+".tar.gz")
	if err := os.WriteFile(next, stage.Bundle(files(content)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, filepath.Join(dir, name+".tar.gz")); err != nil {
		t.Fatal(err)
	}
}

// startGatehouse starts gatehouse with tenants from a directory and a
// configuration that leaves the listeners to it.
func startGatehouse(t *testing.T, config string, ten tenants) (g *stage.Gatehouse, dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, content := range ten {
		writeTenant(t, dir, name, content)
	}
	return serve(t, config, dir), dir
}

// serve starts gatehouse and waits until it is ready.
func serve(t *testing.T, config string, args ...string) *stage.Gatehouse {
	t.Helper()
	return start(t, stage.StartGatehouse, config, args...)
}

func start(t *testing.T, how func(string, ...string) (*stage.Gatehouse, error), config string, args ...string) *stage.Gatehouse {
	t.Helper()
	if built.err != nil {
		t.Fatal(built.err)
	}
	if !strings.Contains(config, "grpc:") {
		config = stage.Listen + config
	}
	file := filepath.Join(t.TempDir(), "gatehouse.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	g, err := how(built.path, append([]string{"-c", file}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end(t, g.Process) })
	return g
}

func end(t *testing.T, p *stage.Process) {
	p.Stop()
	if t.Failed() {
		t.Logf("output of %s:\n%s", p.Name, tail(p.Output(), 8<<10))
	}
	if strings.Contains(p.Output(), "panic") {
		t.Errorf("%s printed a panic:\n%s", p.Name, tail(p.Output(), 8<<10))
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// object is JSON that ends up in the configuration of Envoy.
type object = map[string]any

// listener is one listener of Envoy.
type listener struct {
	Name      string
	Authority string        // of the calls; default: the name of the cluster
	Timeout   time.Duration // of the calls; 0: Envoy's own default, 200 ms
	Filter    object        // more fields of ext_authz
	RawPath   bool          // paths are left as they are
	Routes    []route       // default: /TENANT/ for each tenant
}

// route leads what has the prefix to the backend.
type route struct {
	Prefix   string
	Context  map[string]string // context extensions
	Metadata object
}

// ExtAuthz is the configuration of the filter.
func (l listener) ExtAuthz() object {
	envoyGRPC := object{"cluster_name": "gatehouse"}
	if l.Authority != "" {
		envoyGRPC["authority"] = l.Authority
	}
	service := object{"envoy_grpc": envoyGRPC}
	if l.Timeout != 0 {
		service["timeout"] = fmt.Sprintf("%.3fs", l.Timeout.Seconds())
	}
	filter := object{
		"@type":                 "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
		"transport_api_version": "V3",
		"grpc_service":          service,
	}
	for key, value := range l.Filter {
		filter[key] = value
	}
	if filter["http_service"] != nil {
		delete(filter, "grpc_service")
	}
	return filter
}

// byTenant returns a route /TENANT/ for each tenant.
func byTenant[V any](ten map[string]V) []route {
	var routes []route
	for name := range ten {
		routes = append(routes, route{Prefix: "/" + name + "/", Context: map[string]string{"tenant": name}})
	}
	return routes
}

// network is an Envoy with its backend.
type network struct {
	*stage.Envoy
	echo      *stage.Echo
	accessLog string
}

//go:embed testdata/envoy.yaml.tmpl
var envoyText string

var envoyTemplate = template.Must(template.New("envoy.yaml").Funcs(template.FuncMap{
	"json": func(v any) (string, error) {
		text, err := json.Marshal(v)
		return string(text), err
	},
	"address": func(addr string) (string, error) {
		host, port, err := net.SplitHostPort(addr)
		return fmt.Sprintf("{address: %s, port_value: %s}", host, port), err
	},
}).Parse(envoyText))

// options of the Envoy as a whole.
type options struct {
	HealthCheck bool
	Collector   string // where its own spans go, over gRPC; "": it records none
}

// startEnvoy starts an Envoy that asks the gatehouse at an address.
func startEnvoy(t *testing.T, binary, gatehouse string, opts options, listeners ...listener) *network {
	t.Helper()
	echo, err := stage.StartEcho()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(echo.Close)
	dir := t.TempDir()
	n := &network{echo: echo, accessLog: filepath.Join(dir, "access.log")}
	var config bytes.Buffer
	if err := envoyTemplate.Execute(&config, struct {
		options
		Listeners                     []listener
		Gatehouse, Backend, AccessLog string
	}{opts, listeners, gatehouse, echo.Addr, n.accessLog}); err != nil {
		t.Fatal(err)
	}
	if n.Envoy, err = stage.StartEnvoy(binary, dir, config.Bytes()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.Kill() // a drain would wait, and the Envoy is no subject of the test
		if t.Failed() {
			t.Logf("output of Envoy:\n%s", tail(n.Output(), 8<<10))
		}
	})
	return n
}

// get sends a request to a listener.
func (n *network) get(t *testing.T, listener, path string, headers ...string) *stage.Response {
	t.Helper()
	return n.do(t, listener, stage.Request{Path: path, Headers: headers})
}

// do sends a request to a listener, from any goroutine.
func (n *network) do(t *testing.T, listener string, req stage.Request) *stage.Response {
	t.Helper()
	resp, err := stage.Do(n.Listeners[listener], req)
	if err != nil {
		t.Errorf("listener %q: %v", listener, err)
		return &stage.Response{}
	}
	return resp
}

// allowed checks that a request came to the backend, and returns it as it was
// seen there.
func (n *network) allowed(t *testing.T, resp *stage.Response) *stage.Seen {
	t.Helper()
	if resp.Status != http.StatusOK || resp.Seen == nil {
		t.Fatalf("got status %d, want 200 from the backend; body %q", resp.Status, tail(resp.Body, 500))
	}
	return resp.Seen
}

// denied checks that a request was answered with the status and never came to
// the backend.
func (n *network) denied(t *testing.T, resp *stage.Response, status int) {
	t.Helper()
	if resp.Status != status {
		t.Errorf("got status %d, want %d; body %q", resp.Status, status, tail(resp.Body, 500))
	}
	n.keptOut(t, resp)
}

// keptOut checks that a request was refused, with whatever status, and never
// came to the backend.
func (n *network) keptOut(t *testing.T, resp *stage.Response) {
	t.Helper()
	if resp.Status < 400 {
		t.Errorf("got status %d, want one of at least 400", resp.Status)
	}
	if hits := n.echo.Hits(resp.Tag); hits != 0 {
		t.Errorf("the backend was reached %d times, want never", hits)
	}
}

// logged returns the line of the access log for a request.
func (n *network) logged(t *testing.T, resp *stage.Response) object {
	t.Helper()
	var found object
	eventually(t, "the access log has the request", func() bool {
		data, err := os.ReadFile(n.accessLog)
		if err != nil {
			return false
		}
		for line := range bytes.Lines(data) {
			var entry object
			if json.Unmarshal(line, &entry) == nil && entry["tag"] == resp.Tag {
				found = entry
				return true
			}
		}
		return false
	})
	return found
}

// tenantStatus is what the admin listener says of a tenant.
type tenantStatus struct {
	State, Revision, Error string
	StaleSince             *time.Time `json:"stale_since"`
}

func statusOf(t *testing.T, g *stage.Gatehouse, tenant string) (s tenantStatus) {
	t.Helper()
	resp, err := http.Get("http://" + g.Admin + "/tenants/" + tenant)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&s); err != nil {
		t.Fatalf("status of tenant %q: %v", tenant, err)
	}
	return s
}

// eventually waits for something that another process does in its own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	g, w := fmt.Sprintf("%q", any(got)), fmt.Sprintf("%q", any(want))
	if g != w {
		t.Errorf("%s: got %s, want %s", what, g, w)
	}
}

func request(path string, headers ...string) stage.Request {
	return stage.Request{Path: path, Headers: headers}
}

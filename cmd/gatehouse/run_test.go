package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

func none(string) string { return "" }

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		args []string
		code int
		out  string
	}{
		{nil, 2, ""},
		{[]string{"nonsense"}, 2, ""},
		{[]string{"serve"}, 2, ""},
		{[]string{"serve", "a", "b"}, 2, ""},
		{[]string{"serve", "-nonsense"}, 2, ""},
		{[]string{"serve", "-log-level", "loud", dir}, 2, ""},
		{[]string{"serve", "-log-format", "xml", dir}, 2, ""},
		{[]string{"validate"}, 2, ""},
		{[]string{"serve", "-c", filepath.Join(dir, "none.yaml")}, 1, ""},
		{[]string{"serve", filepath.Join(dir, "none")}, 1, ""},
		{[]string{"version"}, 0, "gatehouse"},
		{[]string{"help"}, 0, "usage"},
		{[]string{"serve", "-h"}, 0, ""},
	} {
		var stdout bytes.Buffer
		err := run(context.Background(), c.args, none, &stdout, io.Discard)
		if got := exitCode(err); got != c.code || !strings.Contains(stdout.String(), c.out) {
			t.Errorf("%q: got exit code %d (%v) and %q, want %d", c.args, got, err, stdout.String(), c.code)
		}
	}
}

func TestValidate(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	write("good/p.rego", "package envoy.authz\nallow := true")
	write("bad/p.rego", "package envoy.authz\n\nallow if x")
	write("broken.tar.gz", "<html>")
	config := write("g.yaml", service)
	dirConfig := write("d.yaml", "tenants: {preload: [\"*\"]}\nopa: {labels: {app: x}}")
	badConfig := write("b.yaml", "colour: red"+service)
	for _, c := range []struct {
		args []string
		code int
		want string // in the output, or else in the error
	}{
		{[]string{dir + "/good"}, 0, "good: ok"},
		{[]string{"-c", config}, 0, "g.yaml: ok"},
		{[]string{"-c", dirConfig, dir + "/good"}, 0, "good: ok"},
		{[]string{dir + "/good", "-c", config}, 0, "good: ok"},
		{[]string{dir + "/bad", dir + "/good"}, 1, "p.rego:3: rego_unsafe_var_error"},
		{[]string{dir + "/broken.tar.gz"}, 1, "broken.tar.gz: "},
		{[]string{dir + "/none"}, 1, "no such file"},
		{[]string{"-c", badConfig}, 1, `b.yaml:1: unknown key "colour"`},
	} {
		var stdout bytes.Buffer
		err := run(context.Background(), append([]string{"validate"}, c.args...), none, &stdout, io.Discard)
		if got := exitCode(err); got != c.code || !strings.Contains(stdout.String()+fmt.Sprint(err), c.want) {
			t.Errorf("validate %q: got exit code %d, %q, error %v, want %d and %q", c.args, got, stdout.String(), err, c.code, c.want)
		}
	}
}

// server is a command that serves, until the test ends.
type server struct {
	t           *testing.T
	dir         string // its files; its tenants are below tenants
	config      string // its file
	grpc, admin string // addresses
	log         syncBuffer
	stop        context.CancelFunc
	ended       chan error
	conn        *grpc.ClientConn
}

// start serves by a file that begins with the listeners, and waits until it is
// ready.
func start(t *testing.T, text string, tenants map[string]string) *server {
	t.Helper()
	s := newServer(t)
	for name, rego := range tenants {
		s.tenant(name, rego)
	}
	s.serve(text, filepath.Join(s.dir, "tenants"))
	return s
}

// startConfigured serves by a file alone.
func startConfigured(t *testing.T, text string) *server {
	t.Helper()
	s := newServer(t)
	s.serve(text)
	return s
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{t: t, dir: t.TempDir(), grpc: freePort(t), admin: freePort(t), ended: make(chan error, 1)}
	s.config = filepath.Join(s.dir, "gatehouse.yaml")
	if err := os.Mkdir(filepath.Join(s.dir, "tenants"), 0o755); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *server) serve(text string, args ...string) {
	t := s.t
	t.Helper()
	s.configure(text)
	ctx, stop := context.WithCancel(t.Context())
	s.stop = stop
	go func() {
		s.ended <- run(ctx, append([]string{"serve", "-c", s.config}, args...), none, io.Discard, &s.log)
	}()
	t.Cleanup(func() {
		s.stop()
		if err := <-s.ended; err != nil {
			t.Errorf("serve: %v\n%s", err, s.log.String())
		}
		if !strings.Contains(s.log.String(), `"msg":"stopped"`) {
			t.Errorf("got no clean stop in the log:\n%s", s.log.String())
		}
	})
	var err error
	if s.conn, err = grpc.NewClient(s.grpc, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.conn.Close() })
	s.eventually("ready", func() bool { code, _ := s.get("/readyz?verbose"); return code == http.StatusOK })
}

func (s *server) configure(text string) {
	s.t.Helper()
	if !strings.Contains(text, "drain:") {
		text = "drain: {delay: 0s}\n" + text
	}
	if !strings.Contains(text, "grpc:") {
		text = fmt.Sprintf("grpc: {listen: %q}\n", s.grpc) + text
	}
	text = fmt.Sprintf("admin: {listen: %q}\n", s.admin) + text
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// tenant writes the policy of a tenant.
func (s *server) tenant(name, rego string) {
	s.t.Helper()
	dir := filepath.Join(s.dir, "tenants", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "p.rego"), []byte("package envoy.authz\n"+rego), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// eventually waits until f is true.
func (s *server) eventually(what string, f func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !f(); {
		if time.Now().After(deadline) {
			s.t.Fatalf("not %s after 20 s\n%s", what, s.log.String())
		}
		time.Sleep(10 * time.Millisecond) // what is waited for happens to the files of another process, as it were
	}
}

func (s *server) get(path string) (int, string) { return s.request(http.MethodGet, path) }

func (s *server) request(method, path string) (int, string) {
	req, err := http.NewRequestWithContext(s.t.Context(), method, "http://"+s.admin+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}

// check asks with these context extensions.
func (s *server) check(extensions map[string]string) *authv3.CheckResponse {
	s.t.Helper()
	resp, err := authv3.NewAuthorizationClient(s.conn).Check(s.t.Context(), &authv3.CheckRequest{
		Attributes: &authv3.AttributeContext{ContextExtensions: extensions},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return resp
}

func (s *server) allowed(tenant string) bool {
	s.t.Helper()
	return s.check(map[string]string{"tenant": tenant}).GetStatus().GetCode() == 0
}

// TestServe runs the whole command: check, admin, health, drain.
func TestServe(t *testing.T) {
	s := start(t, "tenants: {required: [orders]}\n", map[string]string{"orders": "default allow := true"})
	if !s.allowed("orders") {
		t.Error("orders: got a denial, want it allowed")
	}
	if got := s.check(map[string]string{"tenant": "nobody"}); got.GetStatus().GetCode() != 7 || got.GetDeniedResponse().GetStatus().GetCode() != 403 {
		t.Errorf("nobody: got %v, want denied with 403", got)
	}
	health, err := healthpb.NewHealthClient(s.conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: authv3.Authorization_ServiceDesc.ServiceName})
	if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got health %v, %v", health, err)
	}

	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ready", "/metrics": `gatehouse_checks_total{outcome="allowed",tenant="orders"} 1`,
		"/tenants": `"orders"`, "/tenants/orders": `"warm"`,
	} {
		if code, body := s.get(path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: got %d %s, want %q", path, code, body, want)
		}
	}
	for path, want := range map[string]int{"/tenants/never-seen": 404, "/tenants/NO": 400, "/nothing": 404} {
		if code, body := s.get(path); code != want {
			t.Errorf("%s: got %d %s, want %d", path, code, body, want)
		}
	}
	_, body := s.get("/tenants/orders")
	var status tenants.Status
	if err := json.Unmarshal([]byte(body), &status); err != nil || status.Tenant != "orders" {
		t.Errorf("got status %s, %v", body, err)
	}
	s.tenant("orders", "default allow := false")
	if code, body := s.request(http.MethodPost, "/tenants/orders/refresh"); code != http.StatusOK || s.allowed("orders") {
		t.Errorf("refresh: got %d %s, want the new policy to decide", code, body)
	}
	s.tenant("orders", "allow if x")
	if code, body := s.request(http.MethodPost, "/tenants/orders/refresh"); code != http.StatusBadGateway || !strings.Contains(body, "x is unsafe") {
		t.Errorf("refresh with a bad policy: got %d %s", code, body)
	}
	for path, want := range map[string]int{"/tenants/nobody/refresh": 404, "/tenants/NO/refresh": 400} {
		if code, body := s.request(http.MethodPost, path); code != want {
			t.Errorf("%s: got %d %s, want %d", path, code, body, want)
		}
	}
}

// TestAdminInABrowser: a page of another origin gets nothing, under whatever
// name it reaches the listener.
func TestAdminInABrowser(t *testing.T) {
	s := start(t, "", map[string]string{"orders": "allow := true"})
	request := func(method, path, host string, header http.Header) int {
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+s.admin+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		if host != "" {
			req.Host = host
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for _, c := range []struct {
		method, host string
		header       http.Header
		want         int
	}{
		{"GET", "", http.Header{}, 200},
		{"GET", "localhost:8282", http.Header{}, 200},
		{"GET", "[::1]:8282", http.Header{}, 200},
		{"GET", "evil.example.com:8282", http.Header{}, 421},
		{"POST", "", http.Header{}, 404}, // no such tenant
		{"POST", "", http.Header{"Origin": {"https://evil.example.com"}}, 403},
		{"POST", "", http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403},
	} {
		path := "/tenants"
		if c.method == "POST" {
			path = "/tenants/nobody/refresh"
		}
		if got := request(c.method, path, c.host, c.header); got != c.want {
			t.Errorf("%s for %q with %v: got %d, want %d", c.method, c.host, c.header, got, c.want)
		}
	}
}

// TestReload changes the file while the server runs: by itself, and on SIGHUP.
func TestReload(t *testing.T) {
	s := start(t, "", map[string]string{"orders": "allow := opa.runtime().config.labels.color == \"red\"", "payments": "allow := true"})
	if s.allowed("orders") || !s.allowed("payments") {
		t.Fatal("got the wrong decisions at the start")
	}
	s.configure("opa: {labels: {color: red}}\ntenants: {resolve: [{context_extension: team}]}\n")
	s.eventually("reloaded", func() bool { return strings.Contains(s.log.String(), "configuration applied") })
	s.eventually("moved", func() bool { return s.check(map[string]string{"team": "orders"}).GetStatus().GetCode() == 0 })

	s.configure("colour: red\n")
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	s.eventually("refused", func() bool { return strings.Contains(s.log.String(), `unknown key \"colour\"`) })
	if s.check(map[string]string{"team": "orders"}).GetStatus().GetCode() != 0 {
		t.Error("a bad file: got a denial, want the old configuration in force")
	}
	if _, body := s.get("/metrics"); !strings.Contains(body, `gatehouse_config_reloads_total{outcome="applied"} 1`) ||
		!strings.Contains(body, `gatehouse_config_reloads_total{outcome="refused"}`) {
		t.Error("got no count of the reloads")
	}
	s.configure("admin: {}\n") // twice: a fault
	s.eventually("refused again", func() bool { return strings.Contains(s.log.String(), "already defined") })
	s.configure("opa: {labels: {color: blue}}\n")
	s.eventually("applied again", func() bool { return strings.Count(s.log.String(), "configuration applied") == 2 })
	s.eventually("moved again", func() bool { return !s.allowed("orders") && s.allowed("payments") })
}

func TestGuard(t *testing.T) {
	guard := filepath.Join(t.TempDir(), "guard")
	write := func(rego string) {
		if err := os.MkdirAll(guard, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(guard, "g.rego"), []byte("package guard\n"+rego), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("allow := true")
	s := start(t, "guard: {bundle: "+guard+", path: guard/allow}\n", map[string]string{"orders": "allow := true"})
	if !s.allowed("orders") {
		t.Error("got a denial, want both to allow")
	}
	write("allow := false")
	s.eventually("denied by the guard", func() bool { return !s.allowed("orders") })
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	first, err := listen("unix://"+path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen("unix://"+path, 0o600); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second listener: got %v, want it refused", err)
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	first.Close()
	again, err := listen("unix://"+path, 0o600)
	if err != nil {
		t.Errorf("stale socket: got %v", err)
	} else {
		again.Close()
	}
	abstract, err := listen("unix://@gatehouse-test", 0)
	if err != nil {
		t.Errorf("abstract socket: got %v", err)
	} else {
		if _, err := os.Stat("@gatehouse-test"); err == nil {
			t.Error("abstract socket: got a file")
		}
		abstract.Close()
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen("unix://"+file, 0o600); err == nil {
		t.Error("a file that is no socket: got no error")
	}
	for s, want := range map[string]bool{
		"127.0.0.1:1": true, "[::1]:1": true, "localhost:1": true, "unix:///x": true,
		":1": false, "0.0.0.0:1": false, "10.0.0.1:1": false, "example.com:1": false, "nonsense": false,
	} {
		if got := loopback(s); got != want {
			t.Errorf("loopback(%q): got %t, want %t", s, got, want)
		}
	}
}

func TestBudgets(t *testing.T) {
	old := debug.SetMemoryLimit(-1)
	defer debug.SetMemoryLimit(old)
	debug.SetMemoryLimit(math.MaxInt64)
	if got := newBudgets(&Tenants{}); got != (budgets{0, 512 << 20, 256 << 20, 256 << 20, 16 << 20}) {
		t.Errorf("without a limit: got %+v", got)
	}
	debug.SetMemoryLimit(256 << 20)
	if got := newBudgets(&Tenants{}); got != (budgets{128 << 20, 32 << 20, 16 << 20, 32 << 20, 4 << 20}) {
		t.Errorf("with 256 MiB: got %+v", got)
	}
	if got := newBudgets(&Tenants{Memory: 1, BodyMemory: 2, LogMemory: 3, RecentMemory: 4}); got != (budgets{1, 32 << 20, 2, 3, 4}) {
		t.Errorf("as set: got %+v", got)
	}
}

func TestGCPercent(t *testing.T) {
	for _, c := range []struct{ live, floor, want int64 }{
		{0, 512 << 20, 10_000}, {32 << 20, 512 << 20, 1500}, {256 << 20, 512 << 20, 100}, {4 << 30, 512 << 20, 100},
	} {
		if got := gcPercent(c.live, c.floor); int64(got) != c.want {
			t.Errorf("gcPercent(%d, %d): got %d, want %d", c.live, c.floor, got, c.want)
		}
	}
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// syncBuffer is a buffer that may be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestPersist restarts while the bundle service is away.
func TestPersist(t *testing.T) {
	var archive bytes.Buffer
	zw := gzip.NewWriter(&archive)
	tw := tar.NewWriter(zw)
	const rego = "package envoy.authz\ndefault allow := true"
	if err := errors.Join(tw.WriteHeader(&tar.Header{Name: "p.rego", Mode: 0o600, Size: int64(len(rego))})); err != nil {
		t.Fatal(err)
	}
	_, err := tw.Write([]byte(rego))
	if err := errors.Join(err, tw.Close(), zw.Close()); err != nil {
		t.Fatal(err)
	}
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(archive.Bytes()) }))
	defer service.Close()
	text := "persist: {directory: " + filepath.Join(t.TempDir(), "saved") + "}\nopa:\n  services: {s: {url: \"" + service.URL + "\"}}\n  bundles: {b: {}}\n"
	t.Run("first", func(t *testing.T) {
		if s := startConfigured(t, text); !s.allowed("orders") {
			t.Error("got a denial")
		}
	})
	service.Close()
	t.Run("again", func(t *testing.T) {
		s := startConfigured(t, text)
		if !s.allowed("orders") {
			t.Error("got a denial, want the saved bundle to decide")
		}
		if _, body := s.get("/tenants/orders"); !strings.Contains(body, `"stale_since": "20`) {
			t.Errorf("got status %s, want since when it is stale", body)
		}
	})
}

// Regression: a file that changed while the server was starting, after it had been
// read, was not read again.
func TestReloadOfAChangeAtTheStart(t *testing.T) {
	dir := t.TempDir()
	file := writeFile(t, "tenants: {default: orders}\n")
	cfg, err := load(file, dir, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("tenants: {default: payments}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	log := new(syncBuffer)
	s, err := newGatehouse(&options{config: file, level: new(logLevel), log: slog.New(slog.NewTextHandler(log, nil))}, dir, cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); s.reloads.run(ctx) }()
	for !strings.Contains(log.String(), "configuration applied") && ctx.Err() == nil {
		<-time.After(10 * time.Millisecond)
	}
	if ctx.Err() != nil {
		t.Errorf("the change was not noticed: %s", log)
	}
	cancel()
	<-done
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
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

// TestServe runs the whole command: check, admin, health, drain.
func TestServe(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "tenants", "orders"), 0o755); err != nil {
		t.Fatal(err)
	}
	rule := filepath.Join(dir, "tenants", "orders", "p.rego")
	if err := os.WriteFile(rule, []byte("package envoy.authz\ndefault allow := true"), 0o600); err != nil {
		t.Fatal(err)
	}
	grpcAddress, adminAddress := freePort(t), freePort(t)
	config := filepath.Join(dir, "gatehouse.yaml")
	text := fmt.Sprintf("grpc: {listen: %q}\nadmin: {listen: %q}\ntenants: {required: [orders]}\n", grpcAddress, adminAddress)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var log syncBuffer
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"serve", "-c", config, filepath.Join(dir, "tenants")}, none, io.Discard, &log)
	}()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v\n%s", err, log.String())
		}
		if !strings.Contains(log.String(), `"msg":"stopped"`) {
			t.Errorf("got no clean stop in the log:\n%s", log.String())
		}
	}()
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + adminAddress + path)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}
	for deadline := time.Now().Add(20 * time.Second); ; {
		code, body := get("/readyz?verbose")
		if code == http.StatusOK {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not ready: %d %s\n%s", code, body, log.String())
		}
		time.Sleep(10 * time.Millisecond) // another process's state, as it were
	}

	conn, err := grpc.NewClient(grpcAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	check := func(tenant string) *authv3.CheckResponse {
		t.Helper()
		resp, err := authv3.NewAuthorizationClient(conn).Check(t.Context(), &authv3.CheckRequest{
			Attributes: &authv3.AttributeContext{ContextExtensions: map[string]string{"tenant": tenant}},
		})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	if got := check("orders").GetStatus().GetCode(); got != 0 {
		t.Errorf("orders: got status %d, want allowed", got)
	}
	if got := check("nobody"); got.GetStatus().GetCode() != 7 || got.GetDeniedResponse().GetStatus().GetCode() != 403 {
		t.Errorf("nobody: got %v, want denied with 403", got)
	}
	health, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: authv3.Authorization_ServiceDesc.ServiceName})
	if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got health %v, %v", health, err)
	}

	for path, want := range map[string]string{
		"/healthz": "ok", "/readyz": "ready", "/metrics": `gatehouse_checks_total{outcome="allowed",tenant="orders"} 1`,
		"/tenants": `"orders"`, "/tenants/orders": `"warm"`,
	} {
		if code, body := get(path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: got %d %s, want %q", path, code, body, want)
		}
	}
	for path, want := range map[string]int{"/tenants/never-seen": 404, "/tenants/NO": 400, "/nothing": 404} {
		if code, body := get(path); code != want {
			t.Errorf("%s: got %d %s, want %d", path, code, body, want)
		}
	}
	_, body := get("/tenants/orders")
	var status tenants.Status
	if err := json.Unmarshal([]byte(body), &status); err != nil || status.Tenant != "orders" {
		t.Errorf("got status %s, %v", body, err)
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	first, err := listen("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen("unix://" + path); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second listener: got %v, want it refused", err)
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false)
	first.Close()
	again, err := listen("unix://" + path)
	if err != nil {
		t.Errorf("stale socket: got %v", err)
	} else {
		again.Close()
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen("unix://" + file); err == nil {
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

package e2e

import (
	"context"
	"encoding/json"
	"net/http"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

func dial(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Envoy's health checks see when gatehouse can answer.
func TestHealth(t *testing.T) {
	ten := tenants{"orders": who("orders")}
	ready, _ := startGatehouse(t, "", ten)
	dir := t.TempDir()
	waiting := start(t, stage.StartUnready, "tenants: {required: [late]}\n", dir)

	serving := func(g *stage.Gatehouse, service string) bool {
		resp, err := healthpb.NewHealthClient(dial(t, g.GRPC)).Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetStatus() == healthpb.HealthCheckResponse_SERVING
	}
	for _, service := range []string{"", "envoy.service.auth.v3.Authorization"} {
		equal(t, "health of service "+service, serving(ready, service), true)
		equal(t, "health of service "+service+" before it is ready", serving(waiting, service), false)
	}
	eachEnvoy(t, func(t *testing.T, envoy string) {
		unhealthy := func(n *network) bool {
			text, err := n.Get("/clusters")
			return err == nil && strings.Contains(text, "::health_flags::/failed_active_hc")
		}
		main := listener{Name: "main", Timeout: slack, Routes: byTenant(ten)}
		n := startEnvoy(t, envoy, ready.GRPC, options{HealthCheck: true}, main)
		eventually(t, "Envoy finds gatehouse healthy", func() bool { return !unhealthy(n) })
		n.allowed(t, n.get(t, "main", "/orders/a"))

		n = startEnvoy(t, envoy, waiting.GRPC, options{HealthCheck: true}, main)
		eventually(t, "Envoy finds a gatehouse that is not ready unhealthy", func() bool { return unhealthy(n) })
	})
	writeTenant(t, dir, "late", who("late"))
	eventually(t, "gatehouse serves once the required tenant is there", func() bool { return serving(waiting, "") })
}

// Reflection is off unless asked for.
func TestReflection(t *testing.T) {
	ten := tenants{"orders": who("orders")}
	off, dir := startGatehouse(t, "", ten)
	on := serve(t, `
grpc:  {listen: "127.0.0.1:0", reflection: true}
admin: {listen: "127.0.0.1:0"}
`, dir)
	list := func(g *stage.Gatehouse) error {
		stream, err := reflectionpb.NewServerReflectionClient(dial(t, g.GRPC)).ServerReflectionInfo(t.Context())
		if err != nil {
			return err
		}
		// Where the server has ended the stream already, only Recv says why.
		_ = stream.Send(&reflectionpb.ServerReflectionRequest{
			MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{},
		})
		_, err = stream.Recv()
		return err
	}
	if err := list(off); status.Code(err) != codes.Unimplemented {
		t.Errorf("reflection by default: got %v, want Unimplemented", err)
	}
	if err := list(on); err != nil {
		t.Errorf("reflection that is on: %v", err)
	}
}

// On SIGTERM the checks that were begun are answered, and the exit is clean.
func TestDrain(t *testing.T) {
	// A check takes a while, so that some are in flight at any time.
	ten := tenants{"orders": `default allow := false
		allow if count([i | some i in numbers.range(1, 30000); i % 2 == count(input.parsed_path) - 2]) == 15000`}
	eachEnvoy(t, func(t *testing.T, envoy string) {
		g, _ := startGatehouse(t, "tenants: {limits: {evaluation_time: 8s}}\n", ten)
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})
		n.allowed(t, n.get(t, "main", "/orders/a"))

		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		type outcome struct {
			begun, ended time.Time
			status       int
		}
		outcomes := make(chan outcome, 10_000)
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for ctx.Err() == nil {
					begun := time.Now()
					resp, err := stage.Do(n.Listeners["main"], request("/orders/a"))
					if err != nil {
						t.Error(err)
						return
					}
					outcomes <- outcome{begun, time.Now(), resp.Status}
					if resp.Status != http.StatusOK {
						return // gatehouse is gone, as it should be
					}
				}
			})
		}
		eventually(t, "there is load", func() bool { return len(outcomes) > 20 })
		stopped := time.Now()
		if err := g.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		code, err := g.Wait(15 * time.Second)
		if err != nil || code != 0 {
			t.Errorf("exit: got %d, %v, want 0", code, err)
		}
		cancel()
		clients.Wait()

		close(outcomes)
		flight, failed := 0, 0
		for o := range outcomes {
			// What was sent a moment before may have reached Envoy a moment after.
			if o.begun.Before(stopped.Add(-10*time.Millisecond)) && o.ended.After(stopped) {
				flight++
				if o.status != http.StatusOK {
					failed++
				}
			}
		}
		if flight == 0 || failed > 0 {
			t.Errorf("%d of the %d requests in flight failed, want none of at least one", failed, flight)
		}
	})
}

// The example of an Envoy configuration is one that Envoy takes.
func TestExample(t *testing.T) {
	eachEnvoy(t, func(t *testing.T, envoy string) {
		out, err := exec.Command(envoy, "--mode", "validate", "--config-path", "../deploy/envoy/envoy.yaml").CombinedOutput()
		if err != nil {
			t.Errorf("envoy --mode validate: %v\n%s", err, out)
		}
	})
}

// activated is since when a tenant has had its policy.
func activated(t *testing.T, g *stage.Gatehouse, tenant string) (at string) {
	t.Helper()
	text, err := g.Get("/tenants/" + tenant)
	if err != nil {
		t.Fatal(err)
	}
	var status struct{ Activated string }
	if err := json.Unmarshal([]byte(text), &status); err != nil {
		t.Fatal(err)
	}
	return status.Activated
}

// metric returns the value of a series, or 0 where there is none.
func metric(t *testing.T, g *stage.Gatehouse, series string) float64 {
	t.Helper()
	value, err := g.Metric(series)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

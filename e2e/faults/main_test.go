package faults

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// built is the gatehouse to test.
var built struct {
	path string
	err  error
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "gatehouse-faults-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if built.path = os.Getenv("GATEHOUSE_BIN"); built.path == "" {
		built.path, built.err = stage.Build(context.Background(), dir, "../cmd/gatehouse")
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

func tool(t *testing.T, name string) string {
	t.Helper()
	path, err := stage.Tool(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// serve starts gatehouse and waits until it is ready.
func serve(t *testing.T, config string, args ...string) *stage.Gatehouse {
	t.Helper()
	file := filepath.Join(t.TempDir(), "gatehouse.yaml")
	write(t, file, config)
	return serveFile(t, file, args...)
}

// serveFile is serve with a configuration that stays the caller's.
func serveFile(t *testing.T, file string, args ...string) *stage.Gatehouse {
	t.Helper()
	return serveFileIn(t, nil, file, args...)
}

// serveFileIn is serveFile with variables, each NAME=VALUE, of the environment.
func serveFileIn(t *testing.T, env []string, file string, args ...string) *stage.Gatehouse {
	t.Helper()
	if built.err != nil {
		t.Fatal(built.err)
	}
	g, err := stage.StartGatehouseIn(env, built.path, append([]string{"-c", file}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.Kill()
		out := g.Output()
		if t.Failed() {
			t.Logf("output of gatehouse:\n%s", out[max(0, len(out)-6<<10):])
		}
		if strings.Contains(out, "panic") || strings.Contains(out, "fatal error") {
			t.Errorf("gatehouse printed a panic:\n%s", out[max(0, len(out)-6<<10):])
		}
	})
	return g
}

// write puts a file in its place, at once and whole.
func write(t *testing.T, path, text string) {
	t.Helper()
	next := filepath.Join(filepath.Dir(path), ".next")
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, path); err != nil {
		t.Fatal(err)
	}
}

// shelf is a bundle server, and a judge that knows what is on it.
type shelf struct {
	*stage.BundleServer
	judge *judge
}

func newShelf(t *testing.T) *shelf {
	t.Helper()
	server, err := stage.StartBundleServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	return &shelf{server, newJudge(t)}
}

// publish puts revision n of a tenant on the shelf.
func (s *shelf) publish(tenant string, n int) { s.publishWith(tenant, n, nil) }

func (s *shelf) publishWith(tenant string, n int, more map[string]string) {
	data := stage.Bundle(bundleOf(tenant, n, more))
	s.judge.publish(tenant, n)
	s.Put(tenant, data)
}

// from is the part of a configuration that has bundles come from an address.
func from(url string) string {
	return stage.Listen + fmt.Sprintf(`
opa:
  services: {bundles: {url: %q}}
  bundles:
    policy:
      service: bundles
      resource: "{{ .tenant }}.tar.gz"
      polling: {min_delay_seconds: 0.2, max_delay_seconds: 0.4}
`, url)
}

// pollDelay is the longer of the delays that from sets.
const pollDelay = 400 * time.Millisecond

// client asks a gatehouse as an Envoy does.
type client struct {
	authv3.AuthorizationClient
	conn *grpc.ClientConn
}

func dial(t *testing.T, addr string) *client {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{authv3.NewAuthorizationClient(conn), conn}
}

// checkTime is how long a check may take: more than gatehouse gives itself.
const checkTime = 2 * time.Second

func (c *client) ask(tenant string, q int) answer {
	ctx, cancel := context.WithTimeout(context.Background(), checkTime)
	defer cancel()
	return answerOf(c.Check(ctx, questions[q].check(tenant)))
}

// asks has questions asked at a constant rate until the returned function is
// called, which returns what came of them. A question that is due while all
// askers wait counts from when it was due.
func asks(t *testing.T, j *judge, rate int, tenants []string, ask func(tenant string, q int) answer) (stop func(t *testing.T) report) {
	t.Helper()
	mine := &judge{says: j.says, published: map[string]int{}, faults: map[string]int{}}
	const askers = 32
	done := make(chan struct{})
	var next atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range askers {
		wg.Go(func() {
			for {
				due := start.Add(time.Duration(next.Add(1)) * time.Second / time.Duration(rate))
				select {
				case <-done:
					return
				case <-time.After(time.Until(due)):
				}
				tenant, q := tenants[rand.N(len(tenants))], rand.N(len(questions))
				a := ask(tenant, q)
				took := time.Since(due)
				j.mu.Lock() // after the answer, so that what it may say is known
				newest, ok := j.published[tenant]
				j.mu.Unlock()
				if ok {
					mine.publish(tenant, newest)
				}
				mine.hear(tenant, q, a, took)
			}
		})
	}
	var once sync.Once
	end := func() { once.Do(func() { close(done); wg.Wait() }) }
	t.Cleanup(end)
	return func(t *testing.T) report {
		t.Helper()
		end()
		return mine.sentence(t)
	}
}

// revisionOf asks until there is an answer of a policy, and returns its revision.
func (c *client) revisionOf(tenant string) string { return c.ask(tenant, 0).revision }

// becomes waits until revision n of a tenant decides, and returns how long that
// took.
func (c *client) becomes(t *testing.T, tenant string, n int, atMost time.Duration) time.Duration {
	t.Helper()
	begun := time.Now()
	want := fmt.Sprintf("v%d", n)
	for {
		got := c.revisionOf(tenant)
		if got == want {
			return time.Since(begun).Round(10 * time.Millisecond)
		}
		if time.Since(begun) > atMost {
			t.Errorf("tenant %s: revision %q decides after %s, want %s", tenant, got, atMost, want)
			return time.Since(begun)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func eventually(t *testing.T, what string, ok func() bool) time.Duration {
	t.Helper()
	begun := time.Now()
	for !ok() {
		if time.Since(begun) > 30*time.Second {
			t.Fatalf("waited in vain until %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(begun).Round(10 * time.Millisecond)
}

type tenantStatus struct {
	State, Revision, Error, Activated string
	StaleSince                        *time.Time `json:"stale_since"`
}

func statusOf(t *testing.T, g *stage.Gatehouse, tenant string) (s tenantStatus) {
	t.Helper()
	text, err := g.Get("/tenants/" + tenant)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

func metric(t *testing.T, g *stage.Gatehouse, series string) float64 {
	t.Helper()
	value, err := g.Metric(series)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// watchMemory returns a function that ends the watch and returns the resident
// memory of a process at the start and at its highest, in bytes.
func watchMemory(t *testing.T, pid int) (end func() (before, peak int64)) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("needs Linux")
	}
	before, err := traffic.RSS(pid)
	if err != nil {
		t.Fatal(err)
	}
	peak := before
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			if rss, err := traffic.RSS(pid); err == nil {
				peak = max(peak, rss)
			}
			select {
			case <-done:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	})
	var once sync.Once
	end = func() (int64, int64) {
		once.Do(func() { close(done); wg.Wait() })
		return before, peak
	}
	t.Cleanup(func() { end() })
	return end
}

func mib(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }

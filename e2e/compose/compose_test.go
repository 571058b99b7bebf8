package compose

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// Where the stack is published, and nowhere else.
const (
	api        = "http://127.0.0.1:10000"
	desk       = "http://127.0.0.1:10080"
	jaeger     = "http://127.0.0.1:16686"
	prometheus = "http://127.0.0.1:9090"
)

// arrival bounds how long something may take to be seen elsewhere: a policy by the
// replicas, a span by Jaeger, a figure by Prometheus.
const arrival = 30 * time.Second

var replicas = []string{"gatehouse-1", "gatehouse-2"}

// What the file says of each container: no root, nothing writable, no more than it
// needs, and published on loopback alone.
func TestFile(t *testing.T) {
	text, err := compose(commandTime, "config", "--format", "json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Services map[string]struct {
			Image       string
			User        string
			ReadOnly    bool     `json:"read_only"`
			CapDrop     []string `json:"cap_drop"`
			SecurityOpt []string `json:"security_opt"`
			MemLimit    string   `json:"mem_limit"`
			CPUs        float64  `json:"cpus"`
			PIDs        int      `json:"pids_limit"`
			Privileged  bool
			NetworkMode string `json:"network_mode"`
			Networks    map[string]any
			Ports       []struct {
				HostIP    string `json:"host_ip"`
				Published string
			}
		}
		Networks map[string]struct{ Internal bool }
	}
	if err := json.Unmarshal([]byte(text), &file); err != nil {
		t.Fatal(err)
	}
	published := map[string][]string{}
	for name, s := range file.Services {
		switch {
		case s.User != "65532:65532", !s.ReadOnly, !slices.Contains(s.CapDrop, "ALL"), s.Privileged, s.NetworkMode != "",
			!slices.Contains(s.SecurityOpt, "no-new-privileges:true"):
			t.Errorf("%s is not locked up: %+v", name, s)
		case s.MemLimit == "", s.CPUs == 0, s.PIDs == 0:
			t.Errorf("%s is not bounded: %+v", name, s)
		case !strings.Contains(s.Image, ":") || strings.HasSuffix(s.Image, ":latest"):
			t.Errorf("%s: version of image %s is not pinned", name, s.Image)
		}
		for _, p := range s.Ports {
			if p.HostIP != "127.0.0.1" {
				t.Errorf("%s: port %s is published on %q, want 127.0.0.1", name, p.Published, p.HostIP)
			}
			published[name] = append(published[name], p.Published)
		}
		if _, edge := file.Services[name].Networks["edge"]; edge && name != "envoy" {
			t.Errorf("%s is at the edge", name)
		}
	}
	want := map[string][]string{"envoy": {"10000", "10080"}, "jaeger": {"16686"}, "prometheus": {"9090"}}
	if fmt.Sprint(published) != fmt.Sprint(want) {
		t.Errorf("published are %v, want %v", published, want)
	}
	for name, n := range file.Networks {
		if outer := name == "edge" || name == "ui"; n.Internal == outer {
			t.Errorf("network %s: internal is %v", name, n.Internal)
		}
	}
}

// What the kernel says of each process: no root, no capability, and no file that it
// could change.
func TestContainers(t *testing.T) {
	for name, c := range containers(t) {
		if !c.State.Running {
			if name != "bundles" {
				t.Errorf("%s does not run: %+v", name, c.State)
			}
			continue
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.State.Pid))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, line := range []string{"Uid:\t65532\t65532\t65532\t65532", "Gid:\t65532\t65532\t65532\t65532", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"} {
			if !strings.Contains(string(status), line+"\n") {
				t.Errorf("%s: its process does not have %q:\n%s", name, line, status)
			}
		}
		// Root of the machine, who may write everywhere, may not write there.
		err = os.WriteFile(fmt.Sprintf("/proc/%d/root/written", c.State.Pid), nil, 0o600)
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: writing to its root: got %v, want %v", name, err, syscall.EROFS)
		}
	}
}

// The image asks itself for its health, and says so.
func TestHealth(t *testing.T) {
	for name, c := range containers(t) {
		if slices.Contains(replicas, name) && c.State.Health.Status != "healthy" {
			t.Errorf("%s is %q, want healthy: %+v", name, c.State.Health.Status, c.State.Health)
		}
	}
	if out, err := compose(commandTime, "exec", "-T", "gatehouse-1", "/gatehouse", "health"); err != nil || out != "ready\n" {
		t.Errorf("health: got %q, %v", out, err)
	}
	if out, err := compose(commandTime, "exec", "-T", "gatehouse-1", "/gatehouse", "health", "-url", "http://127.0.0.1:9/readyz"); err == nil {
		t.Errorf("health where nobody listens: got %q, want an error", out)
	}
	var version struct{ OPA, OS string }
	out, err := compose(commandTime, "exec", "-T", "gatehouse-1", "/gatehouse", "version", "-json")
	if err := errors.Join(err, json.Unmarshal([]byte(out), &version)); err != nil || version.OPA == "" || version.OS != "linux" {
		t.Errorf("version: got %s, %v", out, err)
	}
}

// Three teams, each with its policy.
func TestDecisions(t *testing.T) {
	carol := "Bearer " + token(map[string]any{"sub": "carol", "limit": 500, "aud": "payments", "exp": time.Now().Add(time.Hour).Unix()})
	for _, c := range []struct {
		method, path, header, value, body string
		status                            int
		says                              string
	}{
		{"GET", "/orders/42", "X-User", "alice", "", 200, `"x-roles":["clerk,manager"]`},
		{"DELETE", "/orders/42", "X-User", "alice", "", 200, ""},
		{"DELETE", "/orders/42", "X-User", "bob", "", 403, "your roles do not cover this"},
		{"GET", "/orders/42", "", "", "", 403, "your roles do not cover this"},
		{"GET", "/payments/7", "", "", "", 401, "a valid token is needed"},
		{"GET", "/payments/7", "Authorization", "Bearer nonsense", "", 401, "a valid token is needed"},
		{"POST", "/payments/7", "Authorization", carol, `{"amount": 900}`, 403, "carol may pay at most 500"},
		{"POST", "/payments/7", "Authorization", carol, `{"amount": 100}`, 200, `"x-user":["carol"]`},
		{"GET", "/storefront/", "Accept-Language", "de", "", 200, `"x-segment":["german"]`},
		{"DELETE", "/storefront/", "", "", "", 405, ""},
		{"GET", "/elsewhere", "", "", "", 404, ""},
	} {
		status, body, err := ask(c.method, api+c.path, c.body, c.header, c.value)
		if err != nil || status != c.status || !strings.Contains(body, c.says) {
			t.Errorf("%s %s with %s %s: got %d %s (%v), want %d with %q", c.method, c.path, c.header, c.value, status, body, err, c.status, c.says)
		}
	}
}

// The order desk: its page, the session of a user, the permission list of the
// session, and what a change of a role on the stage does to both.
func TestDesk(t *testing.T) {
	for path, says := range map[string]string{"/": "<title>Order desk</title>", "/desk.js": "/permissions.js", "/permissions.js": "createPermissions", "/desk.css": "{"} {
		if status, body, err := ask("GET", desk+path, "", "", ""); err != nil || status != 200 || !strings.Contains(body, says) {
			t.Errorf("GET %s: got %d, %v, want a page with %q", path, status, err, says)
		}
	}
	if status, _, err := ask("GET", desk+"/orders", "", "X-User", "alice"); err != nil || status != 403 {
		t.Errorf("orders without a session: got %d, %v, want 403", status, err)
	}
	if status, _, err := ask("GET", desk+"/t/orders/v1/me/permissions", "", "", ""); err != nil || status != 401 {
		t.Errorf("permissions without a session: got %d, %v, want 401", status, err)
	}
	session := login(t, "bob")
	list := func(want string) func() error {
		return func() error {
			status, body, err := ask("GET", desk+"/t/orders/v1/me/permissions", "", "Cookie", session)
			if err == nil && (status != 200 || !strings.Contains(body, `"permissions":`+want)) {
				err = fmt.Errorf("permissions of bob: got %d %s, want %s", status, body, want)
			}
			return err
		}
	}
	const clerk, manager = `{"order":["create","list","ship"]}`, `{"order":["cancel","create","list","refund","ship"]}`
	if err := list(clerk)(); err != nil {
		t.Error(err)
	}
	if status, _, err := ask("DELETE", desk+"/orders/1004", "", "Cookie", session); err != nil || status != 403 {
		t.Errorf("bob, a clerk, cancels an order: got %d, %v, want 403", status, err)
	}
	grant := func(granted bool) {
		t.Helper()
		if status, body, err := ask("PUT", desk+"/stage/roles/orders/bob/manager", fmt.Sprintf(`{"granted": %v}`, granted), "", ""); err != nil || status != 204 {
			t.Fatalf("changing the role of bob: got %d %s, %v", status, body, err)
		}
	}
	grant(true)
	if err := until(arrival, list(manager)); err != nil {
		t.Error(err)
	}
	err := until(arrival, func() error {
		status, body, err := ask("DELETE", desk+"/orders/1004", "", "Cookie", session)
		if err == nil && status != 200 {
			err = fmt.Errorf("bob, a manager, cancels an order: got %d %s, want 200", status, body)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	grant(false)
	if err := until(arrival, list(clerk)); err != nil {
		t.Error(err)
	}
}

// A bundle that is uploaded to the bucket decides, at both replicas; one that cannot
// be used does not, and the last good one goes on.
func TestUpdate(t *testing.T) {
	root := filepath.Dir(filepath.Dir(docker.compose))
	files := map[string]string{}
	folder := os.DirFS(filepath.Join(root, "deploy", "demo", "storefront"))
	err := fs.WalkDir(folder, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := fs.ReadFile(folder, path)
		files[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s3 := &stage.S3{URL: "http://" + containers(t)["s3"].address(t, "storage") + ":7070", Root: stage.S3User{Access: "root-of-the-demo", Secret: "a-writer-of-the-demo"}}
	upload := func(policy string) {
		t.Helper()
		next := map[string]string{}
		for name, text := range files {
			next[name] = text
		}
		next["policy.rego"] = policy
		if err := s3.Put("bundles", "storefront.tar.gz", stage.Bundle(next)); err != nil {
			t.Fatal(err)
		}
	}
	// decides waits until each of many requests in a row, which both replicas get,
	// is answered so.
	decides := func(want int) {
		t.Helper()
		err := until(arrival, func() error {
			for range 20 {
				status, _, err := ask("GET", api+"/storefront/", "", "", "")
				if err == nil && status != want {
					err = fmt.Errorf("got %d, want %d", status, want)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	decides(200)
	upload("package envoy.authz\n\nallow := {\"allowed\": false, \"http_status\": 451}\n")
	decides(451)
	upload("package envoy.authz\n\nallow if nonsense(\n")
	for _, name := range replicas {
		err := until(arrival, func() error {
			n, err := query(fmt.Sprintf(`sum(gatehouse_bundle_failures_total{instance="%s:8282"})`, name))
			if err == nil && n == 0 {
				err = fmt.Errorf("%s has not seen the broken bundle", name)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
	decides(451)
	upload(files["policy.rego"])
	decides(200)
	// Who reads the bucket may not write there.
	reader := &stage.S3{URL: s3.URL, Root: stage.S3User{Access: "gatehouse", Secret: "a-reader-of-the-demo"}}
	if err := reader.Put("bundles", "storefront.tar.gz", nil); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("uploading as the reader: got %v, want status 403", err)
	}
}

// The spans of a request are one trace: Envoy's, and below it the decision of each
// replica.
func TestTraces(t *testing.T) {
	for _, name := range replicas {
		err := until(arrival, func() error {
			for range 10 { // both replicas get some
				if status, _, err := ask("GET", api+"/orders/42", "", "X-User", "alice"); err != nil || status != 200 {
					return fmt.Errorf("got %d, %v", status, err)
				}
			}
			return decisionOf(name)
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// trace is what Jaeger's API says of one.
type trace struct {
	TraceID string
	Spans   []struct {
		SpanID        string
		OperationName string
		ProcessID     string
		References    []struct{ RefType, SpanID string }
		Tags          []tag
	}
	Processes map[string]struct {
		ServiceName string
		Tags        []tag
	}
}

type tag struct {
	Key   string
	Value any
}

// decisionOf looks for a decision of a replica that is a child of a span of Envoy's,
// and reports what there is instead.
func decisionOf(replica string) error {
	var answer struct{ Data []trace }
	if err := get(jaeger+"/api/traces?limit=200&lookback=1h&service=gatehouse", &answer); err != nil {
		return err
	}
	spans := 0
	for _, tr := range answer.Data {
		service := map[string]string{} // :: span → its service
		for _, s := range tr.Spans {
			service[s.SpanID] = tr.Processes[s.ProcessID].ServiceName
		}
		for _, s := range tr.Spans {
			process := tr.Processes[s.ProcessID]
			if process.ServiceName != "gatehouse" || !slices.Contains(s.Tags, tag{"gatehouse.label.replica", replica}) {
				continue
			}
			spans++
			for _, r := range s.References {
				if r.RefType == "CHILD_OF" && service[r.SpanID] == "envoy" {
					return nil
				}
			}
		}
	}
	return fmt.Errorf("jaeger has %d traces with gatehouse, %d spans of %s, and none is a child of a span of Envoy's", len(answer.Data), spans, replica)
}

// Figures of both replicas are in Prometheus, asked of themselves and through the
// collector, and those of Envoy.
func TestMetrics(t *testing.T) {
	queries := []string{
		`sum({__name__=~"envoy_.*ext_authz_ok"})`,
		// Each process is an instance; there are two, and what is over is counted.
		`count(count by (service_instance_id) (gatehouse_checks_total{job="otlp",tenant="orders",outcome="allowed"})) - 1`,
	}
	for _, name := range replicas {
		queries = append(queries,
			fmt.Sprintf(`sum(gatehouse_checks_total{job="gatehouse",instance="%s:8282",tenant="orders",outcome="allowed"})`, name),
			fmt.Sprintf(`up{job="gatehouse",instance="%s:8282"}`, name))
	}
	for _, q := range queries {
		err := until(arrival, func() error {
			for range 10 {
				if status, _, err := ask("GET", api+"/orders/42", "", "X-User", "alice"); err != nil || status != 200 {
					return fmt.Errorf("got %d, %v", status, err)
				}
			}
			n, err := query(q)
			if err == nil && n == 0 {
				err = fmt.Errorf("%s is 0", q)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// The alerts of deploy/prometheus are loaded, all of them, and none has a fault.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(filepath.Dir(docker.compose), "prometheus", "rules.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	type rule struct{ Alert, Record, Name, Health, LastError string }
	var file struct {
		Groups []struct{ Rules []rule }
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	want := map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			want[r.Alert+r.Record] = true
		}
	}
	if len(want) == 0 {
		t.Fatal("deploy/prometheus/rules.yaml has no rule")
	}
	err = until(arrival, func() error {
		var answer struct {
			Data struct {
				Groups []struct{ Rules []rule }
			}
		}
		if err := get(prometheus+"/api/v1/rules", &answer); err != nil {
			return err
		}
		got := map[string]bool{}
		for _, g := range answer.Data.Groups {
			for _, r := range g.Rules {
				if r.Health != "ok" {
					return fmt.Errorf("rule %s is %s: %s", r.Name, r.Health, r.LastError)
				}
				got[r.Name] = true
			}
		}
		for name := range want {
			if !got[name] {
				return fmt.Errorf("rule %s is not loaded", name)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Decisions come to the collector as records, without what is secret.
func TestRecords(t *testing.T) {
	if status, _, err := ask("GET", api+"/payments/7", "", "Authorization", "Bearer a-secret-of-a-client"); err != nil || status != 401 {
		t.Fatalf("got %d, %v, want 401", status, err)
	}
	err := until(arrival, func() error {
		out, err := compose(commandTime, "logs", "--no-color", "--no-log-prefix", "otel-collector")
		if err == nil && !strings.Contains(out, "payments") {
			err = errors.New("the collector has no record of payments")
		}
		if strings.Contains(out, "a-secret-of-a-client") {
			t.Error("the collector has a token of a client")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// deploy/image/Dockerfile makes the same image as "make image".
func TestDockerfile(t *testing.T) {
	dir := os.Getenv("GATEHOUSE_IMAGES")
	file := filepath.Join(filepath.Dir(docker.compose), "image", "Dockerfile")
	if _, err := command(commandTime, nil, "docker", "build", "--quiet", "--file", file, "--tag", "gatehouse:dockerfile", dir); err != nil {
		t.Fatal(err)
	}
	type image struct {
		Config struct {
			User, WorkingDir, StopSignal string
			ExposedPorts                 map[string]struct{}
			Env, Entrypoint, Cmd         []string
			Healthcheck                  any
			Labels                       map[string]string
		}
		Architecture, Os string
	}
	inspect := func(name string) string {
		t.Helper()
		out, err := command(commandTime, nil, "docker", "image", "inspect", name)
		if err != nil {
			t.Fatal(err)
		}
		var images []image
		if err := json.Unmarshal([]byte(out), &images); err != nil || len(images) != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		// Which commit it is of, only the binary knows.
		delete(images[0].Config.Labels, "org.opencontainers.image.version")
		delete(images[0].Config.Labels, "org.opencontainers.image.revision")
		text, err := json.MarshalIndent(images[0], "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	if got, want := inspect("gatehouse:dockerfile"), inspect("gatehouse:dev"); got != want {
		t.Errorf("deploy/image/Dockerfile makes\n%s\nwant, as make image,\n%s", got, want)
	}
	files := func(name string) string {
		t.Helper()
		id, err := command(commandTime, nil, "docker", "create", name)
		if err != nil {
			t.Fatal(err)
		}
		id = strings.TrimSpace(id)
		defer command(commandTime, nil, "docker", "rm", id) //nolint:errcheck // the engine ends anyway
		out, err := command(commandTime, nil, "docker", "export", id)
		if err != nil {
			t.Fatal(err)
		}
		return contents(t, out)
	}
	if got, want := files("gatehouse:dockerfile"), files("gatehouse:dev"); got != want {
		t.Errorf("files of the image of deploy/image/Dockerfile are\n%s\nwant, as make image,\n%s", got, want)
	}
}

// A replica is killed while requests come, and no request knows. It is started again
// and takes its part.
func TestReplicaDies(t *testing.T) {
	const (
		rate     = 200 // requests a second
		duration = 20 * time.Second
		clients  = 64
	)
	ctx, cancel := context.WithTimeout(t.Context(), duration+30*time.Second)
	defer cancel()
	due := make(chan int)
	var mu sync.Mutex
	answers := map[string]int{} // :: status, or error → requests; guarded by mu
	var failed []string         // when, and how; guarded by mu
	begun := time.Now()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}, Timeout: 5 * time.Second}
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for range due {
				got := ""
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, api+"/orders/42", nil)
				if err == nil {
					req.Header.Set("X-User", "alice")
					var resp *http.Response
					if resp, err = client.Do(req); err == nil {
						var body []byte
						body, err = io.ReadAll(resp.Body)
						resp.Body.Close()
						if got = fmt.Sprint(resp.StatusCode); resp.StatusCode != http.StatusOK {
							got += " " + string(body[:min(len(body), 200)])
						}
					}
				}
				if err != nil {
					got = err.Error()
				}
				mu.Lock()
				if answers[got]++; got != "200" {
					failed = append(failed, fmt.Sprintf("after %.3f s: %s", time.Since(begun).Seconds(), got))
				}
				mu.Unlock()
			}
		})
	}
	began := containers(t)["gatehouse-1"].State
	killed, started := make(chan error, 1), make(chan error, 1)
	tick := time.NewTicker(time.Second / rate)
	defer tick.Stop()
	var events sync.WaitGroup
	for i := range int(duration.Seconds()) * rate {
		switch i {
		case 5 * rate:
			events.Go(func() {
				_, err := compose(commandTime, "kill", "--signal", "SIGKILL", "gatehouse-1")
				killed <- err
			})
		case 12 * rate:
			events.Go(func() {
				if err := <-killed; err != nil {
					started <- err
					return
				}
				_, err := compose(commandTime, "start", "gatehouse-1")
				started <- err
			})
		}
		<-tick.C
		due <- i
	}
	close(due)
	wg.Wait()
	events.Wait()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	total := 0
	for _, n := range answers {
		total += n
	}
	t.Logf("%d requests: %v", total, answers)
	if answers["200"] != total || total != int(duration.Seconds())*rate {
		status, text, err := ask("GET", "http://"+containers(t)["envoy"].address(t, "telemetry")+":9902/stats/prometheus", "", "", "")
		t.Errorf("got %v, want %d times 200\n%s\nstatistics of Envoy: %d, %v\n%s", answers, int(duration.Seconds())*rate,
			strings.Join(failed, "\n"), status, err, statistics(text))
	}

	// It was killed indeed, is back, and is asked again.
	now := containers(t)["gatehouse-1"]
	if now.State.Pid == began.Pid || now.State.StartedAt == began.StartedAt {
		t.Errorf("gatehouse-1 runs as it did before: %+v", now.State)
	}
	err := until(arrival, func() error {
		for range 10 {
			if status, body, err := ask("GET", api+"/orders/42", "", "X-User", "alice"); err != nil || status != 200 {
				return fmt.Errorf("got %d %s, %v", status, body, err)
			}
		}
		status, text, err := ask("GET", "http://"+containers(t)["gatehouse-1"].address(t, "telemetry")+":8282/metrics", "", "", "")
		if err == nil && (status != 200 || !strings.Contains(text, `gatehouse_checks_total{outcome="allowed",tenant="orders"}`)) {
			err = fmt.Errorf("gatehouse-1 is not asked: its metrics answer with %d", status)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// statistics are those of the cluster that Envoy asks.
func statistics(text string) string {
	var of []string
	for line := range strings.Lines(text) {
		if strings.Contains(line, `envoy_cluster_name="gatehouse"`) && !strings.Contains(line, "_bucket") && !strings.HasSuffix(line, " 0\n") {
			of = append(of, line)
		}
	}
	return strings.Join(of, "")
}

// ---- What the tests ask with.

// container is what the engine says of one.
type container struct {
	State struct {
		Running   bool
		Pid       int
		StartedAt string
		Health    struct{ Status string }
	}
	Config          struct{ Labels map[string]string }
	NetworkSettings struct {
		Networks map[string]struct{ IPAddress string }
	}
}

// address is that of the container in a network of the stack. The test shares the
// engine's network, so it reaches what nobody outside does.
func (c container) address(t *testing.T, network string) string {
	t.Helper()
	addr := c.NetworkSettings.Networks["gatehouse_"+network].IPAddress
	if addr == "" {
		t.Fatalf("no address in network %s: %+v", network, c)
	}
	return addr
}

// containers returns those of the stack, by service.
func containers(t *testing.T) map[string]container {
	t.Helper()
	ids, err := compose(commandTime, "ps", "--all", "--quiet")
	if err != nil {
		t.Fatal(err)
	}
	out, err := command(commandTime, nil, "docker", append([]string{"inspect"}, strings.Fields(ids)...)...)
	if err != nil {
		t.Fatal(err)
	}
	var list []container
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatal(err)
	}
	all := map[string]container{}
	for _, c := range list {
		all[c.Config.Labels["com.docker.compose.service"]] = c
	}
	return all
}

var client = &http.Client{
	Timeout:       10 * time.Second,
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// ask sends a request, with a header unless it is "", and a body of JSON unless it
// is "".
func ask(method, url, body, header, value string) (status int, text string, err error) {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	if header != "" {
		req.Header.Set(header, value)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 64<<20))
	return resp.StatusCode, string(data), errors.Join(err, resp.Body.Close())
}

// get reads JSON.
func get(url string, v any) error {
	status, text, err := ask("GET", url, "", "", "")
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("GET %s: status %d: %s", url, status, text)
	}
	return json.NewDecoder(bytes.NewReader([]byte(text))).Decode(v)
}

// query asks Prometheus for one figure; 0 where there is none.
func query(q string) (float64, error) {
	var answer struct {
		Data struct {
			Result []struct{ Value [2]any }
		}
	}
	if err := get(prometheus+"/api/v1/query?query="+url.QueryEscape(q), &answer); err != nil || len(answer.Data.Result) == 0 {
		return 0, err
	}
	var n float64
	_, err := fmt.Sscan(fmt.Sprint(answer.Data.Result[0].Value[1]), &n)
	return n, err
}

// login returns the cookie of a session at the order desk.
func login(t *testing.T, user string) string {
	t.Helper()
	resp, err := client.Post(desk+"/session", "application/json", strings.NewReader(fmt.Sprintf(`{"user": %q}`, user)))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	cookie, _, _ := strings.Cut(resp.Header.Get("Set-Cookie"), ";")
	if resp.StatusCode != http.StatusOK || cookie == "" {
		t.Fatalf("login of %s: got %d", user, resp.StatusCode)
	}
	return cookie
}

// token returns a token of the demo's teams.
func token(claims map[string]any) string {
	body, err := json.Marshal(claims)
	if err != nil {
		panic(err) // claims of ours that are no JSON
	}
	encode := base64.RawURLEncoding.EncodeToString
	text := encode([]byte(`{"alg":"HS256","typ":"JWT"}`)) + "." + encode(body)
	mac := hmac.New(sha256.New, []byte("a secret of the demo: use a key of your own, or a JWKS"))
	mac.Write([]byte(text))
	return text + "." + encode(mac.Sum(nil))
}

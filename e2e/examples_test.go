package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// exampleEnvoy starts an Envoy with a configuration of docs/examples/envoy, whose
// addresses are those of this machine. It changes nothing else.
func exampleEnvoy(t *testing.T, binary, name string, to map[string]string) *network {
	t.Helper()
	echo, err := stage.StartEcho()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(echo.Close)
	text, err := os.ReadFile(filepath.Join("..", "docs", "examples", "envoy", name))
	if err != nil {
		t.Fatal(err)
	}
	to["127.0.0.1:9901"], to["127.0.0.1:10000"], to["127.0.0.1:8080"] = "127.0.0.1:0", "127.0.0.1:0", echo.Addr
	config, err := stage.Readdress(text, to)
	if err != nil {
		t.Fatal(err)
	}
	envoy, err := stage.StartEnvoy(binary, t.TempDir(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		envoy.Kill() // a drain would wait, and the Envoy is no subject of the test
		if t.Failed() {
			t.Logf("output of Envoy:\n%s", tail(envoy.Output(), 8<<10))
		}
	})
	return &network{Envoy: envoy, echo: echo}
}

// Two replicas behind an Envoy that hashes tenants: each tenant is loaded by one
// of them. Which one follows from their addresses, so one may have them all.
func TestShard(t *testing.T) {
	ten := tenants{}
	for _, name := range []string{"orders", "payments", "storefront", "billing", "search", "profile"} {
		ten[name] = who(name)
	}
	const config = `tenants: {resolve: [{route_metadata: {namespace: gatehouse, key: tenant}}]}` + "\n"
	eachEnvoy(t, func(t *testing.T, envoy string) {
		one, dir := startGatehouse(t, config, ten)
		two := serve(t, stage.Listen+config, dir)
		n := exampleEnvoy(t, envoy, "shard.yaml", map[string]string{"127.0.0.1:9191": one.GRPC, "127.0.0.1:9192": two.GRPC})
		eventually(t, "Envoy finds both replicas healthy", func() bool {
			text, err := n.Get("/clusters")
			return err == nil && !strings.Contains(text, "failed_active_hc") && strings.Count(text, "health_flags::healthy") == 3
		})
		for range 8 {
			for name := range ten {
				if seen := n.allowed(t, n.get(t, "main", "/"+name+"/a")); len(seen.Headers["x-tenant"]) != 1 || seen.Headers["x-tenant"][0] != name {
					t.Errorf("%s: got x-tenant %q", name, seen.Headers["x-tenant"])
				}
			}
		}
		const warm = `gatehouse_tenants{state="warm"}`
		a, b := metric(t, one, warm), metric(t, two, warm)
		if a+b != float64(len(ten)) {
			t.Errorf("got %v and %v warm tenants, want %d together", a, b, len(ten))
		}
	})
}

// An Envoy asks Gatehouse beside the authorizer that it obeys: the access log has
// what Gatehouse would have said, and only the other's word counts.
func TestShadow(t *testing.T) {
	const denies = "default allow := false\nallow if input.parsed_path[1] == \"open\""
	gatehouse, _ := startGatehouse(t, "", tenants{"orders": denies})
	current, _ := startGatehouse(t, "tenants: {default: all}\n", tenants{"all": "default allow := false\nallow if input.parsed_path[1] != \"shut\""})
	n := exampleEnvoy(t, envoyBinary(t, "1.40"), "shadow.yaml", map[string]string{"127.0.0.1:9191": gatehouse.GRPC, "127.0.0.1:9192": current.GRPC})
	n.allowed(t, n.get(t, "main", "/orders/open"))
	n.allowed(t, n.get(t, "main", "/orders/other")) // Gatehouse says no
	n.denied(t, n.get(t, "main", "/orders/shut"), 403)

	want := map[string]string{
		"/orders/open":  `200 {"check_result":"OK","status_code":200}`,
		"/orders/other": `200 {"check_result":"DENIED","status_code":403}`,
		"/orders/shut":  `403 {"check_result":"DENIED","status_code":403}`,
	}
	said := map[string]string{}
	eventually(t, "the access log has the three requests", func() bool {
		for line := range strings.Lines(n.Output()) {
			var entry struct {
				Path, Gatehouse string
				Status          int
			}
			if json.Unmarshal([]byte(line), &entry) == nil && entry.Path != "" {
				said[entry.Path] = fmt.Sprint(entry.Status, " ", entry.Gatehouse)
			}
		}
		return len(said) == len(want)
	})
	for path, text := range want {
		equal(t, "what the access log says of "+path, said[path], text)
	}
}

// examples is the folder with what the documentation quotes.
var examples = filepath.Join("..", "docs", "examples")

// recordedDecisions is a file of decisions as they were logged, for opa test.
type recordedDecisions struct {
	Recorded []object `json:"recorded"`
}

// The examples of docs/policies.md decide behind a real Envoy as it says, and
// what is logged is what tests/orders/recorded.json has, but for what differs
// from run to run; -update writes it anew. opa test agrees with all of it.
func TestPolicyExamples(t *testing.T) {
	config, err := os.ReadFile(filepath.Join(examples, "gatehouse.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	config = regexp.MustCompile(`"127\.0\.0\.1:\d+"`).ReplaceAll(config, []byte(`"127.0.0.1:0"`))
	g := serve(t, string(config), filepath.Join(examples, "policies"))
	n := startEnvoy(t, envoyBinary(t, "1.40"), g.GRPC, options{}, listener{
		Name: "main", Timeout: slack, Filter: object{"with_request_body": object{"max_request_bytes": 8192}},
		Routes: []route{{Prefix: "/", Context: map[string]string{"tenant": "orders"}}},
	})
	seen := n.allowed(t, n.get(t, "main", "/orders/7?expand=items", "x-user: alice", "x-debug: on", "authorization: Bearer s3cr3t"))
	equal(t, "x-roles", seen.Headers["x-roles"], []string{"clerk,manager"})
	equal(t, "x-debug", len(seen.Headers["x-debug"]), 0)
	n.denied(t, n.do(t, "main", stage.Request{Method: "DELETE", Path: "/orders/7", Headers: []string{"x-user: bob"}}), 403)
	n.denied(t, n.get(t, "main", "/orders/7"), 401)
	n.allowed(t, n.do(t, "main", stage.Request{
		Method: "POST", Path: "/orders", Headers: []string{"x-user: bob", "content-type: application/json"},
		Body: `{"amount": 99, "card": "4111111111111111"}`,
	}))

	var got recordedDecisions
	eventually(t, "four decisions are logged", func() bool {
		got.Recorded = nil
		for line := range strings.Lines(g.Output()) {
			var event object
			if json.Unmarshal([]byte(line), &event) == nil && event["decision_id"] != nil && event["path"] != nil {
				got.Recorded = append(got.Recorded, event)
			}
		}
		return len(got.Recorded) == 4
	})
	file := filepath.Join(examples, "tests", "orders", "recorded.json")
	if *peerUpdate {
		for _, event := range got.Recorded {
			headers := event["input"].(object)["attributes"].(object)["request"].(object)["http"].(object)["headers"].(object)
			delete(headers, "x-stage-tag")
		}
		text, err := json.MarshalIndent(got, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, append(text, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var want recordedDecisions
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	if len(want.Recorded) != len(got.Recorded) {
		t.Fatalf("got %d decisions, and %s has %d", len(got.Recorded), file, len(want.Recorded))
	}
	for i := range want.Recorded {
		g, err1 := json.Marshal(steady("", got.Recorded[i]))
		w, err2 := json.Marshal(steady("", want.Recorded[i]))
		if err1 != nil || err2 != nil || string(g) != string(w) {
			t.Errorf("decision %d: got\n%s\nwant\n%s", i, g, w)
		}
	}

	ask := func(user, method, path, bodyFile string) (answer object) {
		t.Helper()
		var body []byte
		if bodyFile != "" {
			if body, err = os.ReadFile(filepath.Join(examples, bodyFile)); err != nil {
				t.Fatal(err)
			}
		}
		req, err := http.NewRequestWithContext(t.Context(), method, "http://"+g.HTTP+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-User", user)
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s: got %d, %v: %v", path, resp.StatusCode, err, answer)
		}
		return answer
	}
	var shows any
	text, err = os.ReadFile(filepath.Join(examples, "permissions.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &shows); err != nil {
		t.Fatal(err)
	}
	equal(t, "what alice's page shows", ask("alice", "GET", "/t/orders/v1/me/permissions", "")["permissions"], shows)
	equal(t, "what bob's page shows", fmt.Sprint(ask("bob", "GET", "/t/orders/v1/me/permissions", "")["permissions"]), "map[order:[read]]")
	equal(t, "AuthZEN", ask("a-service", "POST", "/t/orders/access/v1/evaluation", "evaluation.json")["decision"], any(true))
	answers := ask("a-service", "POST", "/t/orders/v1/batch/data/envoy/authz/allow", "batch.json")["responses"].(object)
	for user, allowed := range map[string]bool{"alice": true, "bob": false} {
		equal(t, "the batch for "+user, answers[user].(object)["result"].(object)["allowed"], any(allowed))
	}

	opa, err := stage.Tool("opa")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"test", filepath.Join(examples, "policies", "orders"), filepath.Join(examples, "tests", "orders")},
		{"fmt", "--fail", "--list", examples},
		{"check", "--strict", filepath.Join(examples, "policies", "orders")},
	} {
		if out, err := exec.Command(opa, args...).CombinedOutput(); err != nil {
			t.Errorf("opa %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// varies are the names of what differs from one run to the next.
var varies = map[string]bool{
	"timestamp": true, "decision_id": true, "metrics": true, "time": true, "id": true, "x-request-id": true, "portValue": true,
	":authority": true, "host": true, "version": true, "revision": true, "bundles": true,
}

// steady returns a value without what varies, but with a word that it was there.
func steady(name string, v any) any {
	if varies[name] {
		return "(varies)"
	}
	switch v := v.(type) {
	case object:
		out := object{}
		for key, value := range v {
			if key != "x-stage-tag" { // of the test's own
				out[key] = steady(key, value)
			}
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = steady("", v[i])
		}
		return out
	}
	return v
}

// The commands of docs/quickstart.md that a laptop can run print what it says, each
// after the other in one shell. They use the ports that they name.
func TestQuickstart(t *testing.T) { typed(t, "quickstart.md", 5) }

// typed types the commands of a page of docs/, of which there are at least so many
// blocks, and holds what they print against what stands there.
func typed(t *testing.T, page string, least int) {
	t.Helper()
	if built.err != nil {
		t.Fatal(built.err)
	}
	for _, port := range []string{"8080", "8181", "8282", "9191", "9901", "10000"} {
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatalf("docs/%s needs the port: %v", page, err)
		}
		l.Close()
	}
	doc, err := os.ReadFile(filepath.Join("..", "docs", page))
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?s)<!-- run -->\n```sh\n(.*?)```\n```text\n(.*?)```").FindAllStringSubmatch(string(doc), -1)
	if n := strings.Count(string(doc), "<!-- run -->"); n < least || len(blocks) != n {
		t.Fatalf("got %d blocks to run, and %d with what they print", n, len(blocks))
	}
	const mark = "--- block ---"
	script := "set -euo pipefail\ntrap 'kill $(jobs -p)' EXIT\n"
	for _, b := range blocks {
		script += b[1] + "echo; echo '" + mark + "'\n"
	}

	dir, root := t.TempDir(), must(filepath.Abs(".."))(t)
	gatehouse := must(filepath.Abs(built.path))(t)
	if err := os.Mkdir(filepath.Join(dir, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{
		"bin/gatehouse": gatehouse, "deploy": filepath.Join(root, "deploy"), ".cache": filepath.Dir(must(filepath.Abs(envoyBinary(t, "1.40")))(t)),
	} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	bash := exec.CommandContext(ctx, "bash", "-c", script)
	bash.Dir = dir
	bash.WaitDelay = 10 * time.Second
	var stderr bytes.Buffer
	bash.Stderr = &stderr
	out, err := bash.Output()
	if err != nil {
		logs := ""
		for _, name := range []string{"gatehouse.log", "envoy.log", "backend.log"} {
			text, _ := os.ReadFile(filepath.Join(dir, name)) // it may not have come so far
			logs += fmt.Sprintf("%s:\n%s\n", name, tail(string(text), 4<<10))
		}
		t.Errorf("%v\n%s\n%s\n%s", err, out, stderr.String(), logs)
	}
	printed := strings.Split(string(out), mark+"\n")
	if len(printed) != len(blocks)+1 {
		t.Fatalf("got output of %d blocks, want %d", len(printed)-1, len(blocks))
	}
	for i, b := range blocks {
		want := "^" + strings.ReplaceAll(regexp.QuoteMeta(strings.TrimSpace(b[2])), "…", ".*") + "$"
		got := regexp.MustCompile(`\n+`).ReplaceAllString(strings.TrimSpace(printed[i]), "\n")
		if !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("after\n%sgot\n%s\nwant\n%s", b[1], got, b[2])
		}
	}
}

// must returns what a call gave, or fails the test.
func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

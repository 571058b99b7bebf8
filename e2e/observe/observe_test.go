// Package observe holds dashboards and alerts to what they look at: a Prometheus
// scrapes a gatehouse that has work of each kind, and is asked every query. It
// needs what "e2e/fetch-tools prometheus promtool" builds.
package observe

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

const deploy = "../../deploy"

const policy = `package envoy.authz
default allow := false
allow if input.user == "alice"
`

const lists = `package permissions
catalog := {"order": ["read", "ship"]}
allow if input.action.name == "read"
`

// config is that of the gatehouse: what it has to do makes a series of each kind.
const config = `
grpc:  {listen: "127.0.0.1:0", tls: {cert: %[2]q, key: %[3]q}}
http:  {listen: "127.0.0.1:0"}
admin: {listen: "127.0.0.1:0"}
drain: {delay: 0s}
tenants: {capacity: 2, limits: {evaluation_time: 2s}}
telemetry: {otlp: {endpoint: %[1]q, protocol: http}} # which is no collector: spans are counted all the same
opa:
  services: {control: {url: %[1]q}}
  bundles: {policy: {service: control, resource: "bundles/{{ .tenant }}.tar.gz", polling: {min_delay_seconds: 1, max_delay_seconds: 1}}}
  decision_logs: {service: control, reporting: {min_delay_seconds: 1, max_delay_seconds: 1}}
  status: {service: control}
  plugins:
    gatehouse_http:
      data: [envoy/authz/allow, envoy/authz/nothing]
      permissions: {package: permissions}
      auth: {tokens: [{subject: alice, type: user, token: "a-token-of-alice"}]}
`

// start starts what is observed, and returns the address of its admin listener.
func start(t *testing.T) string {
	t.Helper()
	control, err := stage.StartRecorder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(control.Close)
	for _, name := range []string{"orders", "payments", "storefront"} {
		control.Put("/bundles/"+name+".tar.gz", stage.Bundle(map[string]string{"p.rego": policy, "l.rego": lists, ".manifest": `{"revision": "` + name + `"}`}))
	}
	control.Put("/bundles/broken.tar.gz", stage.Bundle(map[string]string{"p.rego": "package x\nallow if y"}))
	control.Ail("/logs", stage.Fault{Status: http.StatusServiceUnavailable, Times: 2})
	dir := t.TempDir()
	cert, key := certificate(t, dir)
	file := filepath.Join(dir, "gatehouse.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, config, control.URL, cert, key), 0o600); err != nil {
		t.Fatal(err)
	}
	binary := os.Getenv("GATEHOUSE_BIN")
	if binary == "" {
		t.Fatal("GATEHOUSE_BIN is not set: run make observe")
	}
	g, err := stage.StartGatehouseIn([]string{"GOMEMLIMIT=1GiB"}, binary, "-c", file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Stop)

	conn, err := grpc.NewClient(g.GRPC, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}))) // it is the test's own
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	checks := authv3.NewAuthorizationClient(conn)
	if _, err := checks.Check(t.Context(), &authv3.CheckRequest{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() { // bounded: one round in 50 ms, until the test ends
		defer close(done)
		for i := 0; ctx.Err() == nil; i++ {
			tenant := []string{"orders", "orders", "payments", "storefront", "broken", "nobody"}[i%6]
			base := "http://" + g.HTTP + "/t/" + tenant + "/v1"
			call(ctx, "POST", base+"/data/envoy/authz/allow", `{"input": {"user": "alice"}}`)
			call(ctx, "POST", base+"/data/envoy/authz/allow", `{"input": {"user": "bob"}}`)
			call(ctx, "POST", base+"/data/envoy/authz/nothing", `{"input": {}}`)
			call(ctx, "GET", base+"/me/permissions", "")
			_, _ = checks.Check(ctx, &authv3.CheckRequest{}) // which names no tenant
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	return g.Admin
}

// call asks, whatever the answer.
func call(ctx context.Context, method, url, body string) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return
	}
	req.Header.Set("Authorization", "Bearer a-token-of-alice")
	req.Header.Set("Content-Type", "application/json")
	if resp, err := http.DefaultClient.Do(req); err == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

func certificate(t *testing.T, dir string) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "gatehouse"}, NotAfter: time.Now().Add(30 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// prometheus is a running one.
type prometheus struct{ url string }

// scrape starts a Prometheus with the configuration of deploy/prometheus, but for
// its target and its intervals.
func scrape(t *testing.T, target string) *prometheus {
	t.Helper()
	binary, err := stage.Tool("prometheus")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(deploy + "/prometheus/prometheus.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("127.0.0.1:8282", target, "15s", "1s").Replace(string(data))
	if !strings.Contains(text, target) || strings.Contains(text, "15s") {
		t.Fatalf("the configuration has another form than the test knows:\n%s", text)
	}
	rules, err := os.ReadFile(deploy + "/prometheus/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{"prometheus.yaml": text, "rules.yaml": string(rules)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	addr, err := stage.FreeAddr()
	if err != nil {
		t.Fatal(err)
	}
	p, err := stage.Start("prometheus", exec.Command(binary, "--config.file="+filepath.Join(dir, "prometheus.yaml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr, "--enable-feature=exemplar-storage"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	prom := &prometheus{"http://" + addr}
	eventually(t, "Prometheus is ready\n"+p.Output(), func() bool {
		resp, err := http.Get(prom.url + "/-/ready")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return prom
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
		<-time.After(100 * time.Millisecond)
	}
}

// get asks Prometheus' API.
func (p *prometheus) get(path string, out any) error {
	resp, err := http.Get(p.url + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s", answer.Error)
	}
	return json.Unmarshal(answer.Data, out)
}

// query returns how many series an expression has at this moment.
func (p *prometheus) query(expr string) (int, error) {
	var data struct{ Result []json.RawMessage }
	err := p.get("/api/v1/query?query="+url.QueryEscape(expr), &data)
	return len(data.Result), err
}

// dashboard is what is looked at of a dashboard.
type dashboard struct {
	UID, Title string
	Panels     []panel
	Templating struct {
		List []struct {
			Name  string
			Query any
		}
	}
}

type panel struct {
	ID      int
	Type    string
	Title   string
	GridPos struct{ H, W, X, Y int }
	Targets []struct{ Expr string }
}

func dashboards(t *testing.T) map[string]dashboard {
	t.Helper()
	paths, err := filepath.Glob(deploy + "/grafana/*.json")
	if err != nil || len(paths) != 4 {
		t.Fatalf("got the dashboards %v, %v, want 4", paths, err)
	}
	all := map[string]dashboard{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var d dashboard
		if err := json.Unmarshal(data, &d); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		all[filepath.Base(path)] = d
	}
	return all
}

// untold are metrics that the machine of a test may not have: a control group with
// a quota.
var untold = regexp.MustCompile(`gatehouse_cgroup_cpu_`)

// Every query of the dashboards and of the alerts is one that Prometheus
// understands and that finds what it asks for, in a gatehouse at work.
func TestQueries(t *testing.T) {
	admin := start(t)
	prom := scrape(t, admin)

	queries := map[string][]string{} // :: expression → where it stands
	for name, d := range dashboards(t) {
		for _, p := range d.Panels {
			for _, target := range p.Targets {
				queries[target.Expr] = append(queries[target.Expr], name+" "+p.Title)
			}
		}
	}
	for _, r := range rules(t) {
		// What is compared is to be there; whether it is too much is not asked.
		for _, side := range comparison.Split(r.Expr, -1) {
			if strings.Contains(side, "{") {
				queries[side] = append(queries[side], "alert "+r.Alert)
			}
		}
	}
	if len(queries) < 80 {
		t.Fatalf("got %d queries, and there are more", len(queries))
	}
	// Nobody is kept busy here: who asks for that outcome asks for another.
	variables := strings.NewReplacer(`outcome="busy"`, `outcome="denied"`, "$instance", ".*", "$tenant", "orders", "$__rate_interval", "10s")
	missing := map[string]string{} // :: expression → where it stands
	t.Cleanup(func() {
		for expr, at := range missing {
			t.Errorf("%s: nothing found by %s", at, expr)
		}
	})
	eventually(t, "all queries find something", func() bool {
		clear(missing)
		for expr, at := range queries {
			n, err := prom.query(variables.Replace(expr))
			switch {
			case err != nil:
				t.Fatalf("%s: %s: %v", at, expr, err)
			case n == 0 && !untold.MatchString(expr) && !strings.Contains(expr, "> 0"):
				missing[expr] = strings.Join(at, ", ")
			}
		}
		return len(missing) == 0
	})

	var loaded struct {
		Groups []struct {
			Rules []struct{ Name, Health, LastError string }
		}
	}
	if err := prom.get("/api/v1/rules", &loaded); err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, g := range loaded.Groups {
		for _, r := range g.Rules {
			n++
			if r.Health != "ok" {
				t.Errorf("alert %s: %s: %s", r.Name, r.Health, r.LastError)
			}
		}
	}
	if n != len(rules(t)) {
		t.Errorf("Prometheus has %d alerts, want %d", n, len(rules(t)))
	}

	// The types in docs/metrics.md are those that were scraped.
	docs, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	var scraped map[string][]struct{ Type string }
	if err := prom.get("/api/v1/metadata", &scraped); err != nil {
		t.Fatal(err)
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `(gatehouse_[a-z_]+)` \\| ([a-z]+) \\|").FindAllStringSubmatch(string(docs), -1) {
		name, kind := row[1], row[2]
		types := append(scraped[name], scraped[strings.TrimSuffix(name, "_total")]...) // OpenMetrics names a counter without its end
		if len(types) == 0 && !untold.MatchString(name) {
			t.Errorf("%s: not scraped", name)
		}
		if len(types) > 0 && types[0].Type != kind {
			t.Errorf("%s: scraped as a %s, documented as a %s", name, types[0].Type, kind)
		}
	}
}

// comparison is where the two sides of a condition meet.
var comparison = regexp.MustCompile(`\s(?:[<>]|[!=]=|and)\s`)

type rule struct{ Alert, Expr, For string }

func rules(t *testing.T) (all []rule) {
	t.Helper()
	data, err := os.ReadFile(deploy + "/prometheus/rules.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Groups []struct{ Rules []rule } }
	if err := yaml.Unmarshal(data, &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		all = append(all, g.Rules...)
	}
	return all
}

// promtool runs the unit tests of the alerts; each alert fires in one of them, and
// each has a row in docs/metrics.md.
func TestAlerts(t *testing.T) {
	tool, err := stage.Tool("promtool")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "config", "--lint=all", "prometheus.yaml"}, {"check", "rules", "--lint=all", "rules.yaml"}, {"test", "rules", "rules_test.yaml"}} {
		cmd := exec.CommandContext(t.Context(), tool, args...)
		cmd.Dir = deploy + "/prometheus"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	tests, err := os.ReadFile(deploy + "/prometheus/rules_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	docs, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules(t) {
		if !strings.Contains(string(tests), `{alertname="`+r.Alert+`"}`) && !strings.Contains(string(tests), "alertname: "+r.Alert+"\n") && !strings.Contains(string(tests), `{alertname="`+r.Alert+`",`) {
			t.Errorf("no test has %s fire", r.Alert)
		}
		if !strings.Contains(string(docs), "`"+r.Alert+"`") {
			t.Errorf("docs/metrics.md does not say what to do about %s", r.Alert)
		}
	}
}

// A dashboard can be imported: its IDs are its own, its panels lie beside each
// other, and its queries use the variables that it has.
func TestDashboards(t *testing.T) {
	uids := map[string]string{}
	for name, d := range dashboards(t) {
		if d.Title == "" || d.UID == "" || uids[d.UID] != "" {
			t.Errorf("%s: title %q, uid %q, which %q has too", name, d.Title, d.UID, uids[d.UID])
		}
		uids[d.UID] = name
		var variables []string
		for _, v := range d.Templating.List {
			variables = append(variables, "$"+v.Name)
		}
		ids, cells := map[int]bool{}, map[[2]int]string{}
		for _, p := range d.Panels {
			if ids[p.ID] {
				t.Errorf("%s: panel %d is there twice", name, p.ID)
			}
			ids[p.ID] = true
			if p.Type != "row" && len(p.Targets) == 0 {
				t.Errorf("%s: panel %q asks nothing", name, p.Title)
			}
			for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
				for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
					if other := cells[[2]int{x, y}]; other != "" || x >= 24 {
						t.Fatalf("%s: panel %q lies over %q, or beside the page", name, p.Title, other)
					}
					cells[[2]int{x, y}] = p.Title
				}
			}
			for _, target := range p.Targets {
				for _, v := range regexp.MustCompile(`\$[a-z]+`).FindAllString(target.Expr, -1) {
					if !slices.Contains(variables, v) {
						t.Errorf("%s: panel %q uses %s, which is no variable", name, p.Title, v)
					}
				}
			}
		}
	}
}

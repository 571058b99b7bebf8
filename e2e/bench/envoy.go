package main

import (
	"context"
	_ "embed"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"text/template"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

//go:embed envoy.yaml.tmpl
var envoyText string

var envoyTemplate = template.Must(template.New("envoy.yaml").Funcs(template.FuncMap{
	"host": func(addr string) (string, error) { host, _, err := net.SplitHostPort(addr); return host, err },
	"port": func(addr string) (string, error) { _, port, err := net.SplitHostPort(addr); return port, err },
}).Parse(envoyText))

// authorizer is who decides for one listener of the Envoy.
type authorizer struct {
	Name string // of the listener, and of the cluster
	GRPC string // address; "": nobody decides

	server *server
}

// envoy measures requests through a real Envoy, which answers them itself, so that
// all that differs is who decides.
func (b *bench) envoy(ctx context.Context) ([]table, error) {
	if _, err := os.Stat(b.envoyBinary); err != nil {
		return nil, fmt.Errorf("no Envoy (%w): run e2e/fetch-envoy, or name one with -envoy", err)
	}
	c := roles(users)
	c.ask(tenantOf(0))
	allowing, err := b.alwaysAllow(ctx)
	if err != nil {
		return nil, err
	}
	authorizers := []authorizer{{Name: "no authorization", server: allowing}, {Name: alwaysAllowName, GRPC: allowing.grpc, server: allowing}}
	for _, evaluator := range b.evaluators {
		for _, binary := range b.binaries() {
			s, err := b.gatehouse(setting{binary: binary.path, evaluator: evaluator, tenants: map[string]map[string]string{tenantOf(0): c.files}})
			if err != nil {
				return nil, err
			}
			authorizers = append(authorizers, authorizer{binary.name + ", " + evaluator, s.grpc, s})
		}
	}
	if b.peerBinary != "" {
		s, err := b.peer(c.files, "")
		if err != nil {
			return nil, err
		}
		authorizers = append(authorizers, authorizer{"peer", s.grpc, s})
	}
	dir, err := b.folder("envoy")
	if err != nil {
		return nil, err
	}
	var config strings.Builder
	if err := envoyTemplate.Execute(&config, map[string]any{"Authorizers": authorizers, "Tenant": tenantOf(0)}); err != nil {
		return nil, err
	}
	e, err := stage.StartEnvoy(b.envoyBinary, dir, []byte(config.String()))
	if err != nil {
		return nil, err
	}
	proxy := &server{Process: e.Process}
	b.running = append(b.running, e.Process)

	client := b.httpClient()
	var tables []table
	for _, rate := range []float64{0, b.perSecond} {
		var contenders []*contender
		for _, a := range authorizers {
			requests, err := throughEnvoy("http://"+e.Listeners[a.Name], client, c)
			if err != nil {
				return nil, err
			}
			if err := requests.send(ctx, 0, requests.verify); err != nil {
				return nil, fmt.Errorf("%s: %w", a.Name, err)
			}
			load := traffic.Load{Concurrency: concurrency, Duration: b.roundTime, Rate: rate}
			contenders = append(contenders, &contender{
				names: []string{a.Name}, server: a.server, beside: proxy,
				load: func(ctx context.Context) *traffic.Report { return requests.drive(ctx, load) },
			})
		}
		if err := b.rounds(ctx, contenders); err != nil {
			return nil, err
		}
		title := fmt.Sprintf("requests through Envoy %s with one worker, role-based, log off; %d in flight, one after the other", b.machine.Envoy, concurrency)
		if rate > 0 {
			title = fmt.Sprintf("the same at a constant rate of %.0f requests a second, each measured from when it was due", rate)
		}
		t := table{Part: "envoy", Title: title, Columns: columns("authorization, load, CPU µs of Envoy/request:1, CPU µs of the server/request:1, requests/s:0, p50 µs:0, p99 µs:0, p99.9 µs:0")}
		for _, c := range contenders {
			l := &c.report.Latency
			own, how := c.cost(), "closed"
			if rate > 0 {
				how = "constant rate"
			}
			if c.names[0] == authorizers[0].Name {
				own = 0
			}
			t.Rows = append(t.Rows, row{c.names[0], how, median(c.more), own, c.report.PerSecond(),
				micros(l.Quantile(0.5)), micros(l.Quantile(0.99)), micros(l.Quantile(0.999))})
		}
		tables = append(tables, t)
	}
	return tables, nil
}

// throughEnvoy are the requests that the checks of a policy are about.
func throughEnvoy(base string, client *http.Client, c policyCase) (*httpCase, error) {
	out := &httpCase{name: base, items: 1, client: client, verify: func(status int, body []byte) error {
		return want(status, body, http.StatusOK, "served", 1)
	}}
	for _, req := range c.requests {
		r := req.GetAttributes().GetRequest().GetHttp()
		var headers []string
		for name, value := range r.GetHeaders() {
			if !strings.HasPrefix(name, ":") {
				headers = append(headers, name, value)
			}
		}
		if err := out.add(r.GetMethod(), base+r.GetPath(), nil, headers...); err != nil {
			return nil, err
		}
	}
	return out, nil
}

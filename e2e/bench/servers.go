package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// server is a process that is measured.
type server struct {
	*stage.Process
	grpc      string       // address
	http      string       // address of a gatehouse's API
	metrics   string       // URL; "": it tells nothing
	delivered func() error // returns once the decisions of a round are delivered; nil: none are

	scrapes int           // of metrics so far
	scrape  float64       // allocations of one
	asking  time.Duration // CPU time of one
}

// mallocs returns what the server has allocated so far, NaN where it does not tell.
func (s *server) mallocs() (float64, error) {
	if s.metrics == "" {
		return unknown, nil
	}
	return s.metric("go_memstats_mallocs_total")
}

// metric returns a figure of the server, 0 where it has none of that name.
func (s *server) metric(series string) (float64, error) {
	s.scrapes++
	resp, err := http.Get(s.metrics)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), series+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, nil
}

// calibrate learns what asking for metrics costs, with all the series that there
// are by now.
func (s *server) calibrate() error {
	const times = 5
	var mallocs [2]float64
	var cpu [2]time.Duration
	for i := range times + 2 { // the very first makes what later ones use again
		n, err := s.mallocs()
		if err != nil {
			return err
		}
		used, err := traffic.CPUTime(s.Pid())
		if err != nil {
			return err
		}
		if i == 1 {
			mallocs[0], cpu[0] = n, used
		}
		mallocs[1], cpu[1] = n, used
	}
	s.scrape, s.asking = (mallocs[1]-mallocs[0])/times, (cpu[1]-cpu[0])/times
	return nil
}

// begin has the bench end the process with the part.
func (b *bench) begin(s *server) *server {
	b.running = append(b.running, s.Process)
	return s
}

// end ends the processes of a part, and the service that takes decisions.
func (b *bench) end() {
	for _, closes := range b.closing {
		closes()
	}
	for _, p := range b.running {
		p.Stop()
	}
	b.running, b.closing = nil, nil
}

// sink starts the service that takes decisions, looks at none, and lives as long
// as the part.
func (b *bench) sink() (url string) {
	logs := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // a body that breaks off is the server's trouble
	}))
	b.closing = append(b.closing, logs.Close)
	return logs.URL
}

// folder makes a folder for one use.
func (b *bench) folder(name string) (string, error) { return os.MkdirTemp(b.dir, name+"-") }

// alwaysAllow starts what the others are measured by.
func (b *bench) alwaysAllow(ctx context.Context) (*server, error) {
	dir, err := b.folder("alwaysallow")
	if err != nil {
		return nil, err
	}
	binary, err := stage.Build(ctx, dir, "alwaysallow")
	if err != nil {
		return nil, err
	}
	p, err := stage.Start("alwaysallow", exec.Command(binary))
	if err != nil {
		return nil, err
	}
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		var addr, admin string
		if _, err := fmt.Sscanln(p.Output(), &addr, &admin); err == nil {
			return b.begin(&server{Process: p, grpc: addr, metrics: "http://" + admin}), nil
		}
		if time.Since(begun) > 10*time.Second {
			p.Kill()
			return nil, fmt.Errorf("always-allow server does not start: %s", p.Output())
		}
	}
}

// setting is a gatehouse to start.
type setting struct {
	binary    string // default: that of the bench
	evaluator string
	logged    string                       // URL of the service that takes decisions; "": they are not logged
	tenants   map[string]map[string]string // :: tenant → path → file of its bundle
	config    string                       // beside that
	opa       string                       // beside that, in the block opa
	listen    string                       // instead of stage.Listen
	env       []string
}

// logging is the configuration of a server that logs its decisions.
const logging = `
  services: {logs: {url: "%s"}}
  decision_logs: {service: logs, reporting: {min_delay_seconds: 1, max_delay_seconds: 1, upload_size_limit_bytes: 1048576, buffer_size_limit_bytes: 268435456}}
`

// gatehouse starts one, with its tenants in a folder.
func (b *bench) gatehouse(s setting) (*server, error) {
	dir, err := b.folder("gatehouse")
	if err != nil {
		return nil, err
	}
	shelf := filepath.Join(dir, "tenants")
	if err := os.Mkdir(shelf, 0o700); err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(s.tenants))
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(shelf, name+".tar.gz"), stage.Bundle(s.tenants[name]), 0o600); err != nil {
			return nil, err
		}
	}
	config, text := filepath.Join(dir, "gatehouse.yaml"), stage.Listen
	if s.listen != "" {
		text = s.listen
	}
	text += "\ntenants: {evaluator: " + s.evaluator + ", required: [" + strings.Join(names, ", ") + "]}\n" + s.config
	opa := s.opa
	if s.logged != "" {
		opa += fmt.Sprintf(logging, s.logged)
	}
	if opa != "" {
		text += "\nopa:\n" + opa
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	if s.binary == "" {
		s.binary = b.binary
	}
	g, err := stage.StartGatehouseIn(s.env, s.binary, "-c", config, shelf)
	if err != nil {
		return nil, err
	}
	started := &server{Process: g.Process, grpc: g.GRPC, http: g.HTTP, metrics: "http://" + g.Admin + "/metrics"}
	if s.logged != "" {
		started.delivered = started.whenDelivered
	}
	return b.begin(started), nil
}

// settled returns once nothing is left to deliver.
func (s *server) settled() error {
	if s.delivered == nil {
		return nil
	}
	return s.delivered()
}

// Waiting for decisions to be delivered is bounded, and asks seldom.
const (
	maxDelivery   = 30 * time.Second
	deliveryDelay = 200 * time.Millisecond
)

// whenDelivered returns once gatehouse has delivered all decisions. None may be
// dropped: it would have cost less.
func (s *server) whenDelivered() error {
	for begun := time.Now(); ; time.Sleep(deliveryDelay) {
		buffered, err := s.metric("gatehouse_decision_log_buffered_events")
		if err != nil {
			return err
		}
		if buffered == 0 {
			break
		}
		if time.Since(begun) > maxDelivery {
			return fmt.Errorf("%.0f decisions are not delivered after %s", buffered, maxDelivery)
		}
	}
	dropped, err := s.metric(`gatehouse_decision_log_events_total{state="dropped"}`)
	if err == nil && dropped > 0 {
		err = fmt.Errorf("%.0f decisions were dropped", dropped)
	}
	return err
}

// peerDelivery is how long a peer has to deliver its decisions: it does not tell.
const peerDelivery = 3 * time.Second

// peer starts one opa-envoy-plugin, which has one tenant.
func (b *bench) peer(files map[string]string, logs string) (*server, error) {
	dir, err := b.folder("peer")
	if err != nil {
		return nil, err
	}
	config, text := filepath.Join(dir, "opa.yaml"), "{}"
	if logs != "" {
		text = strings.ReplaceAll(fmt.Sprintf(logging, logs), "\n  ", "\n")
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	bundle := filepath.Join(dir, "bundle.tar.gz")
	if err := os.WriteFile(bundle, stage.Bundle(files), 0o600); err != nil {
		return nil, err
	}
	addrs, err := free(2) // it cannot say which ports it chose
	if err != nil {
		return nil, err
	}
	p, err := stage.Start("peer", exec.Command(b.peerBinary, "run", "--server", "--addr="+addrs[1], "--disable-telemetry", "--log-level=error",
		"--set=plugins.envoy_ext_authz_grpc.addr="+addrs[0], "--set=plugins.envoy_ext_authz_grpc.path=envoy/authz/allow",
		"--config-file", config, "--bundle", bundle))
	if err != nil {
		return nil, err
	}
	for _, addr := range addrs {
		for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				conn.Close()
				break
			}
			if time.Since(begun) > 10*time.Second {
				p.Kill()
				return nil, fmt.Errorf("peer does not start: %s", p.Output())
			}
		}
	}
	s := &server{Process: p, grpc: addrs[0], metrics: "http://" + addrs[1] + "/metrics"}
	if logs != "" {
		s.delivered = func() error { time.Sleep(peerDelivery); return nil }
	}
	return b.begin(s), nil
}

// free returns addresses that nobody listens on.
func free(n int) (addrs []string, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close() // each is kept until all are chosen
		addrs = append(addrs, l.Addr().String())
	}
	return addrs, nil
}

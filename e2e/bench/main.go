// Command bench measures what a check costs: the CPU time of the server process
// per check, beside that of a server that allows everything without looking, in
// one run under the same load.
//
//	go run ./bench [-gatehouse PATH] [-rounds 4] [-round 2s]
//
// The load is 16 checks in flight on one connection, each with 14 headers or
// more. The servers take turns, round by round, so that a disturbance of the
// machine hits all. What each policy answers is verified before it is measured.
// Servers with a decision log send it to a service of the bench; what delivering
// takes after a round counts too.
//
// Batches and permission lists over HTTP follow, each kind of request in turn.
//
// With -tenants it measures what idle tenants take instead.
//
// With PEER naming a binary of opa-envoy-plugin, that is measured too: one process
// for each policy, since it has one tenant.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Args[1:], os.Getenv("PEER"), os.Stdout)
	stop()
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

const concurrency = 16

// contender is a server with one kind of request.
type contender struct {
	server, policy string
	logged         bool
	delivered      func() error // returns once the decisions of a round are delivered; nil: none are
	pid            int
	client         *traffic.Client
	report         traffic.Report
	cpu            time.Duration
	rss            int64 // at the end of the last round
}

// cost is the CPU time of a check.
func (c *contender) cost() time.Duration { return c.cpu / time.Duration(c.report.Checks) }

func run(ctx context.Context, args []string, peer string, stdout io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	gatehouse := flags.String("gatehouse", os.Getenv("GATEHOUSE_BIN"), "`path` of the binary; empty: it is built")
	rounds := flags.Int("rounds", 4, "rounds of each server")
	round := flags.Duration("round", 2*time.Second, "how long one is")
	tenants := flags.Int("tenants", 0, "how many idle `tenants` to measure instead")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "gatehouse-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	b := &bench{dir: dir, round: *round}
	defer b.stop()
	if *gatehouse == "" {
		if *gatehouse, err = stage.Build(ctx, dir, "../cmd/gatehouse"); err != nil {
			return err
		}
	}
	if *tenants > 0 {
		return b.density(*gatehouse, *tenants, stdout)
	}
	b.sink()
	if err := b.alwaysAllow(ctx); err != nil {
		return err
	}
	for _, logged := range []bool{false, true} {
		for _, evaluator := range []string{"topdown", "plan"} {
			if err := b.gatehouse(*gatehouse, evaluator, logged); err != nil {
				return err
			}
		}
		if peer != "" {
			if err := b.peer(peer, logged); err != nil {
				return err
			}
		}
	}
	for range *rounds {
		for _, c := range b.contenders {
			if err := b.measure(ctx, c); err != nil {
				return err
			}
		}
	}
	b.print(stdout, *rounds)
	return b.http(ctx, *gatehouse, *rounds, stdout)
}

type bench struct {
	dir        string
	round      time.Duration
	contenders []*contender
	processes  []*stage.Process
	logs       *httptest.Server // takes decisions
}

// sink starts the service that takes decisions, and looks at none.
func (b *bench) sink() {
	b.logs = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // a body that breaks off is the server's trouble
	}))
}

func (b *bench) stop() {
	for _, c := range b.contenders {
		c.client.Close()
	}
	for _, p := range b.processes {
		p.Stop()
	}
	if b.logs != nil {
		b.logs.Close()
	}
}

// alwaysAllow starts what the others are measured by.
func (b *bench) alwaysAllow(ctx context.Context) error {
	binary, err := stage.Build(ctx, b.dir, "alwaysallow")
	if err != nil {
		return err
	}
	p, err := stage.Start("alwaysallow", exec.Command(binary))
	if err != nil {
		return err
	}
	b.processes = append(b.processes, p)
	addr := ""
	for begun := time.Now(); addr == ""; time.Sleep(5 * time.Millisecond) {
		if line, ok := strings.CutSuffix(p.Output(), "\n"); ok {
			addr = line
		}
		if time.Since(begun) > 10*time.Second {
			return fmt.Errorf("always-allow server does not start: %s", p.Output())
		}
	}
	return b.enter(&contender{server: "always-allow"}, p, addr, trivial())
}

// gatehouse starts one gatehouse with a tenant for each policy.
func (b *bench) gatehouse(binary, evaluator string, logged bool) error {
	tenants := filepath.Join(b.dir, fmt.Sprintf("tenants-%s-%t", evaluator, logged))
	if err := os.Mkdir(tenants, 0o700); err != nil {
		return err
	}
	for i, c := range cases() {
		if err := os.WriteFile(filepath.Join(tenants, tenantOf(i)+".tar.gz"), stage.Bundle(c.files), 0o600); err != nil {
			return err
		}
	}
	config, text := tenants+".yaml", stage.Listen+"\ntenants: {evaluator: "+evaluator+"}\n"
	if logged {
		text += fmt.Sprintf(logging, b.logs.URL)
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	g, err := stage.StartGatehouse(binary, "-c", config, tenants)
	if err != nil {
		return err
	}
	b.processes = append(b.processes, g.Process)
	for i, c := range cases() {
		for _, req := range c.requests {
			traffic.Name(req, tenantOf(i))
		}
		if c.denied != nil {
			traffic.Name(c.denied, tenantOf(i))
		}
		contender := &contender{server: "gatehouse, " + evaluator, logged: logged}
		if logged {
			contender.delivered = func() error { return delivered(g) }
		}
		if err := b.enter(contender, g.Process, g.GRPC, c); err != nil {
			return err
		}
	}
	return nil
}

// logging is the configuration of a server that logs its decisions.
const logging = `
opa:
  services: {logs: {url: "%s"}}
  decision_logs: {service: logs, reporting: {min_delay_seconds: 1, max_delay_seconds: 1, upload_size_limit_bytes: 1048576, buffer_size_limit_bytes: 268435456}}
`

// maxDelivery bounds the wait for decisions to be delivered.
const maxDelivery = 30 * time.Second

// delivered returns once gatehouse has delivered all decisions. None may be
// dropped: it would have cost less.
func delivered(g *stage.Gatehouse) error {
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		buffered, err := g.Metric("gatehouse_decision_log_buffered_events")
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
	dropped, err := g.Metric(`gatehouse_decision_log_events_total{state="dropped"}`)
	if err == nil && dropped > 0 {
		err = fmt.Errorf("%.0f decisions were dropped", dropped)
	}
	return err
}

func tenantOf(i int) string { return fmt.Sprintf("tenant-%d", i) }

// peer starts one opa-envoy-plugin for each policy.
func (b *bench) peer(binary string, logged bool) error {
	config, text := filepath.Join(b.dir, fmt.Sprintf("peer-%t.yaml", logged)), "{}"
	if logged {
		text = strings.ReplaceAll(fmt.Sprintf(strings.Replace(logging, "opa:\n", "", 1), b.logs.URL), "\n  ", "\n")
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	for i, c := range cases() {
		bundle := filepath.Join(b.dir, tenantOf(i)+"-peer.tar.gz")
		if err := os.WriteFile(bundle, stage.Bundle(c.files), 0o600); err != nil {
			return err
		}
		l, err := net.Listen("tcp", "127.0.0.1:0") // it cannot say which port it chose
		if err != nil {
			return err
		}
		addr := l.Addr().String()
		l.Close()
		p, err := stage.Start("peer", exec.Command(binary, "run", "--server", "--addr=127.0.0.1:0", "--disable-telemetry", "--log-level=error",
			"--set=plugins.envoy_ext_authz_grpc.addr="+addr, "--set=plugins.envoy_ext_authz_grpc.path=envoy/authz/allow",
			"--config-file", config, "--bundle", bundle))
		if err != nil {
			return err
		}
		b.processes = append(b.processes, p)
		for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
			conn, err := net.Dial("tcp", addr)
			if err == nil {
				conn.Close()
				break
			}
			if time.Since(begun) > 10*time.Second {
				return fmt.Errorf("peer does not start: %s", p.Output())
			}
		}
		contender := &contender{server: "peer", logged: logged}
		if logged {
			contender.delivered = func() error { time.Sleep(3 * time.Second); return nil } // it does not tell
		}
		if err := b.enter(contender, p, addr, c); err != nil {
			return err
		}
	}
	return nil
}

// enter verifies what a server answers, and has it measured.
func (b *bench) enter(entry *contender, p *stage.Process, addr string, c policyCase) error {
	server := entry.server
	client, err := traffic.New(traffic.Config{Target: addr, Requests: c.requests, Concurrency: concurrency, Duration: b.round})
	if err != nil {
		return err
	}
	entry.policy, entry.pid, entry.client = c.name, p.Pid(), client
	b.contenders = append(b.contenders, entry)

	verify := func(req *authv3.CheckRequest, want bool) error {
		resp, err := client.Check(context.Background(), req)
		if got := traffic.OutcomeOf(resp, err); (got == "allowed") != want || err != nil {
			return fmt.Errorf("%s, %s: %s, want allowed to be %v: %v", server, c.name, got, want, err)
		}
		return nil
	}
	for _, req := range c.requests {
		if err := verify(req, true); err != nil {
			return err
		}
	}
	if c.denied == nil || server == "always-allow" {
		return nil
	}
	return verify(c.denied, false)
}

// measure runs one round.
func (b *bench) measure(ctx context.Context, c *contender) error {
	before, err := traffic.CPUTime(c.pid)
	if err != nil {
		return err
	}
	report := c.client.Run(ctx)
	if c.delivered != nil {
		if err := c.delivered(); err != nil {
			return fmt.Errorf("%s, %s: %w", c.server, c.policy, err)
		}
	}
	after, err := traffic.CPUTime(c.pid)
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if report.Checks == 0 || report.Outcomes["allowed"] != report.Checks {
		return fmt.Errorf("%s, %s: outcomes %v, want all allowed", c.server, c.policy, report.Outcomes)
	}
	c.cpu += after - before
	c.report.Add(report)
	c.rss, err = traffic.RSS(c.pid)
	return err
}

func (b *bench) print(stdout io.Writer, rounds int) {
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "server\tpolicy\tlog\tCPU µs/check\t× always-allow\tchecks/s\tp50 µs\tp99 µs\tRSS MiB\t")
	base := b.contenders[0].cost()
	for _, c := range b.contenders {
		l := &c.report.Latency
		fmt.Fprintf(w, "%s\t%s\t%s\t%.1f\t%.2f\t%.0f\t%d\t%d\t%.0f\t\n", c.server, c.policy, map[bool]string{true: "on", false: "off"}[c.logged],
			float64(c.cost().Nanoseconds())/1e3, float64(c.cost())/float64(base), c.report.PerSecond(),
			l.Quantile(0.5).Microseconds(), l.Quantile(0.99).Microseconds(), float64(c.rss)/(1<<20))
	}
	w.Flush()
	sample := trivial().requests[0]
	fmt.Fprintf(stdout, "%d rounds of %s each, in turn; %d checks in flight; %d headers, %d bytes a check; %d CPUs, %s\n\n%s",
		rounds, b.round, concurrency, len(sample.GetAttributes().GetRequest().GetHttp().GetHeaders()), proto.Size(sample),
		runtime.NumCPU(), runtime.Version(), text.String())
}

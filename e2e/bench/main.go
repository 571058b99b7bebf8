// Command bench measures what a check costs: the CPU time of the server process
// per check, beside that of a server that allows everything without looking, in
// one run under the same load.
//
//	go run ./bench [-gatehouse PATH] [-rounds 4] [-round 2s]
//
// The load is 16 checks in flight on one connection, each with 14 headers or
// more. The servers take turns, round by round, so that a disturbance of the
// machine hits all. What each policy answers is verified before it is measured.
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
	if err := b.alwaysAllow(ctx); err != nil {
		return err
	}
	if err := b.gatehouse(ctx, *gatehouse); err != nil {
		return err
	}
	if peer != "" {
		if err := b.peer(peer); err != nil {
			return err
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
	return nil
}

type bench struct {
	dir        string
	round      time.Duration
	contenders []*contender
	processes  []*stage.Process
}

func (b *bench) stop() {
	for _, c := range b.contenders {
		c.client.Close()
	}
	for _, p := range b.processes {
		p.Stop()
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
	return b.enter("always-allow", p, addr, trivial())
}

// gatehouse starts one gatehouse with a tenant for each policy.
func (b *bench) gatehouse(ctx context.Context, binary string) error {
	var err error
	if binary == "" {
		if binary, err = stage.Build(ctx, b.dir, "../cmd/gatehouse"); err != nil {
			return err
		}
	}
	tenants := filepath.Join(b.dir, "tenants")
	if err := os.Mkdir(tenants, 0o700); err != nil {
		return err
	}
	for i, c := range cases() {
		if err := os.WriteFile(filepath.Join(tenants, tenantOf(i)+".tar.gz"), stage.Bundle(c.files), 0o600); err != nil {
			return err
		}
	}
	config := filepath.Join(b.dir, "gatehouse.yaml")
	if err := os.WriteFile(config, []byte(stage.Listen), 0o600); err != nil {
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
		if err := b.enter("gatehouse", g.Process, g.GRPC, c); err != nil {
			return err
		}
	}
	return nil
}

func tenantOf(i int) string { return fmt.Sprintf("tenant-%d", i) }

// peer starts one opa-envoy-plugin for each policy.
func (b *bench) peer(binary string) error {
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
			"--bundle", bundle))
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
		if err := b.enter("peer", p, addr, c); err != nil {
			return err
		}
	}
	return nil
}

// enter verifies what a server answers, and has it measured.
func (b *bench) enter(server string, p *stage.Process, addr string, c policyCase) error {
	client, err := traffic.New(traffic.Config{Target: addr, Requests: c.requests, Concurrency: concurrency, Duration: b.round})
	if err != nil {
		return err
	}
	b.contenders = append(b.contenders, &contender{server: server, policy: c.name, pid: p.Pid(), client: client})

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
	fmt.Fprintln(w, "server\tpolicy\tCPU µs/check\t× always-allow\tchecks/s\tp50 µs\tp99 µs\tRSS MiB\t")
	base := b.contenders[0].cost()
	for _, c := range b.contenders {
		l := &c.report.Latency
		fmt.Fprintf(w, "%s\t%s\t%.1f\t%.2f\t%.0f\t%d\t%d\t%.0f\t\n", c.server, c.policy,
			float64(c.cost().Nanoseconds())/1e3, float64(c.cost())/float64(base), c.report.PerSecond(),
			l.Quantile(0.5).Microseconds(), l.Quantile(0.99).Microseconds(), float64(c.rss)/(1<<20))
	}
	w.Flush()
	sample := trivial().requests[0]
	fmt.Fprintf(stdout, "%d rounds of %s each, in turn; %d checks in flight; %d headers, %d bytes a check; %d CPUs, %s\n\n%s",
		rounds, b.round, concurrency, len(sample.GetAttributes().GetRequest().GetHttp().GetHeaders()), proto.Size(sample),
		runtime.NumCPU(), runtime.Version(), text.String())
}

// Command load drives checks at a server of ext_authz and prints what it takes.
//
//	go run ./load -target 127.0.0.1:9191 -tenant orders
//	go run ./load -target 127.0.0.1:9191 -tenant orders -requests requests.json -rate 2000 -duration 30s
//	go run ./load -tenant orders -pid $(pidof gatehouse)
//
// Without -rate, -concurrency clients ask one check after the other. With it,
// checks are due at a constant rate, and each is measured from when it was due.
//
// A file of requests is a JSON array of CheckRequests, as protobuf has them in
// JSON; they are sent in turn:
//
//	[{"attributes": {"request": {"http": {"method": "GET", "path": "/a", "headers": {"x-user": "alice"}}}}}]
//
// Exit status: 0; 1 when a check was answered with an error of gRPC, or none was
// answered; 2 on bad usage.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	var c traffic.Config
	flags := flag.NewFlagSet("load", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.Target, "target", "127.0.0.1:9191", "`address` of the server: host:port, or unix:///path")
	flags.IntVar(&c.Concurrency, "concurrency", 16, "checks in flight at most")
	flags.IntVar(&c.Connections, "connections", 1, "connections they are spread over")
	flags.DurationVar(&c.Duration, "duration", 10*time.Second, "how long")
	flags.DurationVar(&c.Timeout, "timeout", 10*time.Second, "of one check")
	flags.Float64Var(&c.Rate, "rate", 0, "checks a second, constant; 0: one after the other")
	tenant := flags.String("tenant", "", "`name` that goes with each check as context extension tenant; empty: the requests' own")
	requests := flags.String("requests", traffic.BuiltIn, "JSON `file` of requests, or built-in")
	pid := flags.Int("pid", 0, "`process` of the server, to print its CPU time per check")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil || flags.NArg() > 0 || c.Concurrency < 1 || c.Connections < 1 || c.Duration <= 0 || c.Rate < 0 {
		if err == nil {
			fmt.Fprintln(stderr, "load: unknown argument, or a number that makes no sense")
		}
		return 2
	}
	var err error
	if c.Requests, err = traffic.Read(*requests); err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 2
	}
	if *tenant != "" {
		for _, req := range c.Requests {
			traffic.Name(req, *tenant)
		}
	}
	client, err := traffic.New(c)
	if err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 2
	}
	defer client.Close()

	before, err := cpuTime(*pid)
	if err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 2
	}
	report := client.Run(ctx)
	after, err := cpuTime(*pid)
	if err != nil {
		fmt.Fprintln(stderr, "load:", err)
		return 1
	}

	fmt.Fprintf(stdout, "%d checks in %s, %.0f a second\n", report.Checks, report.Elapsed.Round(time.Millisecond), report.PerSecond())
	l := &report.Latency
	fmt.Fprintf(stdout, "latency: 50 %% %s, 90 %% %s, 99 %% %s, 99.9 %% %s, longest %s\n",
		round(l.Quantile(0.5)), round(l.Quantile(0.9)), round(l.Quantile(0.99)), round(l.Quantile(0.999)), round(l.Max()))
	for _, name := range slices.Sorted(maps.Keys(report.Outcomes)) {
		fmt.Fprintf(stdout, "%s: %d\n", name, report.Outcomes[name])
	}
	if *pid != 0 && report.Checks > 0 {
		fmt.Fprintf(stdout, "CPU time of process %d: %s per check\n", *pid, round((after-before)/time.Duration(report.Checks)))
	}
	if report.Errors > 0 || report.Checks == 0 {
		fmt.Fprintf(stderr, "load: %d of %d checks failed\n", report.Errors, report.Checks)
		return 1
	}
	return 0
}

// cpuTime is that of a process, 0 where none was named.
func cpuTime(pid int) (time.Duration, error) {
	if pid == 0 {
		return 0, nil
	}
	return traffic.CPUTime(pid)
}

func round(d time.Duration) time.Duration { return d.Round(100 * time.Nanosecond) }

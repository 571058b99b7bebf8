// Package traffic drives checks at a server of ext_authz and measures what comes
// back.
//
// In a closed loop, a number of clients ask one check after the other. At a
// constant rate, checks are due at fixed times: a check that could not be sent
// when it was due, because all clients still waited, is measured from then on.
// A server that stalls thus shows with all the checks that it kept waiting.
package traffic

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
)

// Config says what is asked, and how.
type Config struct {
	Target      string // host:port, or unix:///path
	Requests    []*authv3.CheckRequest
	Concurrency int           // checks in flight at most; default 16
	Connections int           // they are spread over; default 1
	Duration    time.Duration // default 10 s
	Rate        float64       // checks a second; 0: a closed loop
	Timeout     time.Duration // of a check; default 10 s
}

// Report is what was measured.
type Report struct {
	Elapsed  time.Duration
	Checks   int            // that were answered, an error of gRPC included
	Errors   int            // of gRPC
	Outcomes map[string]int // :: "allowed", "denied 403", "error Unavailable" → checks
	Latency  Histogram
}

// Add adds what another run measured.
func (r *Report) Add(other *Report) {
	r.Elapsed += other.Elapsed
	r.Checks += other.Checks
	r.Errors += other.Errors
	if r.Outcomes == nil {
		r.Outcomes = map[string]int{}
	}
	for k, n := range other.Outcomes {
		r.Outcomes[k] += n
	}
	r.Latency.Add(&other.Latency)
}

// PerSecond returns the checks per second.
func (r *Report) PerSecond() float64 { return float64(r.Checks) / r.Elapsed.Seconds() }

// Client holds the connections to a server.
type Client struct {
	config Config
	stubs  []authv3.AuthorizationClient
	conns  []*grpc.ClientConn
}

// New returns a client. It connects when it asks for the first time.
func New(c Config) (*Client, error) {
	if len(c.Requests) == 0 {
		return nil, errors.New("there are no requests to send")
	}
	def(&c.Concurrency, 16)
	def(&c.Connections, 1)
	def(&c.Duration, 10*time.Second)
	def(&c.Timeout, 10*time.Second)
	client := &Client{config: c}
	for range c.Connections {
		conn, err := grpc.NewClient(c.Target, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			client.Close()
			return nil, err
		}
		client.conns = append(client.conns, conn)
		client.stubs = append(client.stubs, authv3.NewAuthorizationClient(conn))
	}
	return client, nil
}

func def[T comparable](v *T, d T) {
	var zero T
	if *v == zero {
		*v = d
	}
}

// Close closes the connections.
func (c *Client) Close() {
	for _, conn := range c.conns {
		_ = conn.Close() // they are of no more use either way
	}
}

// Check asks once.
func (c *Client) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	return c.stubs[0].Check(ctx, req)
}

// Run drives the load until its time is over or ctx ends.
func (c *Client) Run(ctx context.Context) *Report {
	load := Load{Concurrency: c.config.Concurrency, Duration: c.config.Duration, Rate: c.config.Rate}
	return Drive(ctx, load, func(ctx context.Context, worker, n int) (string, error) {
		call, cancel := context.WithTimeout(ctx, c.config.Timeout)
		defer cancel()
		resp, err := c.stubs[worker%len(c.stubs)].Check(call, c.config.Requests[n%len(c.config.Requests)])
		return OutcomeOf(resp, err), err
	})
}

// Load says for how long something is done, by how many at once, and how often.
type Load struct {
	Concurrency int
	Duration    time.Duration
	Rate        float64 // a second; 0: a closed loop
}

// Drive does something again and again until its time is over or ctx ends: do is
// called with the number of the worker and of the turn, and names what came of it.
func Drive(ctx context.Context, load Load, do func(ctx context.Context, worker, n int) (outcome string, err error)) *Report {
	var next atomic.Int64
	clients := make([]Report, load.Concurrency)
	start := time.Now()
	stop := start.Add(load.Duration)
	var wg sync.WaitGroup
	for i := range clients {
		wg.Go(func() {
			r := &clients[i]
			r.Outcomes = map[string]int{}
			for ctx.Err() == nil {
				n := next.Add(1) - 1
				due := time.Now()
				if load.Rate > 0 {
					due = start.Add(time.Duration(float64(n) / load.Rate * float64(time.Second)))
				}
				if !due.Before(stop) || !sleepUntil(ctx, due) {
					return
				}
				outcome, err := do(ctx, i, int(n))
				if err != nil && ctx.Err() != nil {
					return // we were stopped, not the server
				}
				r.Latency.Record(time.Since(due))
				r.Checks++
				if err != nil {
					r.Errors++
				}
				r.Outcomes[outcome]++
			}
		})
	}
	wg.Wait()

	report := &Report{}
	for i := range clients {
		report.Add(&clients[i])
	}
	report.Elapsed = time.Since(start)
	return report
}

// sleepUntil reports false when ctx ended before.
func sleepUntil(ctx context.Context, t time.Time) bool {
	wait := time.Until(t)
	if wait <= 0 {
		return true
	}
	select {
	case <-time.After(wait):
		return true
	case <-ctx.Done():
		return false
	}
}

// OutcomeOf names an answer.
func OutcomeOf(resp *authv3.CheckResponse, err error) string {
	switch {
	case err != nil:
		return "error " + status.Code(err).String()
	case resp.GetStatus().GetCode() == 0:
		return "allowed"
	case resp.GetDeniedResponse() == nil:
		return "denied"
	}
	return fmt.Sprintf("denied %d", resp.GetDeniedResponse().GetStatus().GetCode())
}

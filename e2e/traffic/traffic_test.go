package traffic

import (
	"context"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
)

func TestHistogram(t *testing.T) {
	var h Histogram
	var all []time.Duration
	for range 100_000 {
		d := time.Duration(rand.Int64N(1 << rand.IntN(34)))
		all = append(all, d)
		h.Record(d)
	}
	slices.Sort(all)
	for _, q := range []float64{0, 0.1, 0.5, 0.9, 0.99, 0.999} {
		want := all[int(q*float64(len(all)))]
		if got := h.Quantile(q); got < want || float64(got) > float64(want)*(1+1.0/subBuckets)+1 {
			t.Errorf("quantile %v: got %d, want %d or at most 1/64 more", q, got, want)
		}
	}
	if got, want := h.Quantile(1), all[len(all)-1]; got != want || h.Max() != want {
		t.Errorf("quantile 1 and maximum: got %d and %d, want %d", got, h.Max(), want)
	}
}

// stalling allows, but stalls once.
type stalling struct{ once chan time.Duration }

func (s stalling) Check(context.Context, *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	select {
	case d := <-s.once:
		time.Sleep(d)
	default:
	}
	return &authv3.CheckResponse{Status: &rpcstatus.Status{}}, nil
}

// Checks that a stall kept from being sent in time count with their wait.
func TestRateCountsWaiting(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := stalling{make(chan time.Duration, 1)}
	s.once <- 200 * time.Millisecond
	server := grpc.NewServer()
	authv3.RegisterAuthorizationServer(server, s)
	go server.Serve(l) //nolint:errcheck // it ends with Stop
	t.Cleanup(server.Stop)

	c, err := New(Config{
		Target: l.Addr().String(), Requests: []*authv3.CheckRequest{{}},
		Concurrency: 1, Rate: 100, Duration: 500 * time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	r := c.Run(t.Context())
	if r.Checks != 50 || r.Outcomes["allowed"] != 50 || r.Errors != 0 {
		t.Errorf("got %d checks with outcomes %v, want 50 allowed", r.Checks, r.Outcomes)
	}
	// 20 checks were due while the server stalled: a tenth of all waited at
	// least half of that.
	if got := r.Latency.Quantile(0.9); got < 100*time.Millisecond {
		t.Errorf("90 %%: got %s, want at least 100ms", got)
	}
}

// The CPU time of a process is what the process itself finds. No process has the
// ID that is asked for last: IDs are less than 1<<22.
func TestCPUTime(t *testing.T) {
	var own [2]unix.Timespec
	clock := func(i int) {
		if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &own[i]); err != nil {
			t.Fatal(err)
		}
	}
	clock(0)
	got, err := CPUTime(os.Getpid())
	clock(1)
	if err != nil || got.Nanoseconds() < own[0].Nano() || got.Nanoseconds() > own[1].Nano() {
		t.Errorf("got %s, %v, want between %d and %d ns", got, err, own[0].Nano(), own[1].Nano())
	}
	if got, err := CPUTime(1 << 22); err == nil {
		t.Errorf("got %s of no process, want an error", got)
	}
}

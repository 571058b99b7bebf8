package faults

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// Faults at random, for as long as GATEHOUSE_FAULTS_SOAK says. The seed is logged,
// and taken from GATEHOUSE_FAULTS_SEED where that is set. At the end, and at the
// end of each round, everything is well again, and as it was.
func TestSoak(t *testing.T) {
	text := os.Getenv("GATEHOUSE_FAULTS_SOAK")
	if text == "" {
		t.Skip("GATEHOUSE_FAULTS_SOAK is not set: for how long faults come at random")
	}
	duration, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("GATEHOUSE_FAULTS_SOAK: %v", err)
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("GATEHOUSE_FAULTS_SEED"); text != "" {
		if _, err := fmt.Sscan(text, &seed); err != nil {
			t.Fatalf("GATEHOUSE_FAULTS_SEED: %v", err)
		}
	}
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	s := newShelf(t)
	toxiproxy, err := stage.StartToxiproxy(tool(t, "toxiproxy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(toxiproxy.Kill)
	link, err := toxiproxy.Link("bundles", strings.TrimPrefix(s.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	const count = 50
	all := make([]string, count)
	revisions := make([]int, count)
	for i := range all {
		all[i] = fmt.Sprintf("tenant-%d", i)
		revisions[i] = 1
		s.publish(all[i], 1)
	}
	// Not all fit, so that tenants come and go all the time.
	config := from("http://"+link.Addr) + fmt.Sprintf("tenants: {capacity: 30, parked: 5, grace_period: 2s}\npersist: {directory: %q}\n", t.TempDir())
	g := serve(t, config)
	c := dial(t, g.GRPC)
	well := func() {
		load(t, all, func(tenant string) {
			var i int
			_, _ = fmt.Sscanf(tenant, "tenant-%d", &i)
			c.becomes(t, tenant, revisions[i], 60*time.Second)
		})
	}
	well()

	bad := stage.Bundle(map[string]string{"bad.rego": "package bad\n\nallow if {"})
	type fault struct {
		name       string
		begin, end func() error
	}
	network := []fault{
		{"bandwidth", toxin(link, "bandwidth", map[string]any{"rate": 4}), cure(link, "bandwidth")},
		{"timeout", toxin(link, "timeout", map[string]any{"timeout": 0}), cure(link, "timeout")},
		{"limit_data", toxin(link, "limit_data", map[string]any{"bytes": 600}), cure(link, "limit_data")},
		{"reset_peer", toxin(link, "reset_peer", map[string]any{"timeout": 0}), cure(link, "reset_peer")},
		{"latency", toxin(link, "latency", map[string]any{"latency": 800, "jitter": 400}), cure(link, "latency")},
		{"slicer", toxin(link, "slicer", map[string]any{"average_size": 64, "size_variation": 32, "delay": 100}), cure(link, "slicer")},
		{"down", link.Down, link.Up},
	}
	begun := time.Now()
	var total report
	var goroutines, open float64
	var first, rss int64
	for round := 1; time.Since(begun) < duration && !t.Failed(); round++ {
		stop := asks(t, s.judge, 200, all, c.ask)
		ill := network[random.IntN(len(network))]
		if err := ill.begin(); err != nil {
			t.Fatal(err)
		}
		killed := random.IntN(5) == 0
		for end := time.Now().Add(time.Duration(2+random.IntN(6)) * time.Second); time.Now().Before(end); {
			i := random.IntN(count)
			switch random.IntN(8) {
			case 0:
				s.Put(all[i], bad)
			case 1:
				s.Answer(all[i], func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) })
			case 2:
				s.Answer(all[i], func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>") })
			default:
				revisions[i]++
				s.publish(all[i], revisions[i])
			}
			time.Sleep(20 * time.Millisecond)
		}
		if killed {
			g.Kill()
			g = serve(t, config)
			c2 := dial(t, g.GRPC)
			r := stop(t)
			total.answers += r.answers
			c = c2
			stop = asks(t, s.judge, 200, all, c.ask)
			time.Sleep(2 * time.Second)
			goroutines = 0
		}
		if err := ill.end(); err != nil {
			t.Fatal(err)
		}
		for i := range all {
			revisions[i]++
			s.publish(all[i], revisions[i])
		}
		well()
		r := stop(t)
		total.answers += r.answers
		total.failed += r.failed
		now, files := metric(t, g, "go_goroutines"), metric(t, g, "process_open_fds")
		if rss, err = traffic.RSS(g.Pid()); err != nil {
			t.Fatal(err)
		}
		if goroutines == 0 {
			goroutines, open, first = now, files, rss
		}
		if now > goroutines+100 || files > open+50 || rss > 2*first+256<<20 {
			t.Errorf("round %d: goroutines %v → %v, files %v → %v, memory %s → %s", round, goroutines, now, open, files, mib(first), mib(rss))
		}
		t.Logf("round %d, %s, killed %v: %s; goroutines %v, files %v, memory %s", round, ill.name, killed, r, now, files, mib(rss))
	}
	t.Logf("PASS: %s of faults: %d answers compared with opa eval, wrong 0; %d were denied for a fault", time.Since(begun).Round(time.Second), total.answers, total.failed)
}

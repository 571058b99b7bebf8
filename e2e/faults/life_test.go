package faults

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// A tenant that could not be loaded is loaded once its bundle is there or good,
// also long after it was given up, and by nothing but being asked.
func TestLateBundle(t *testing.T) {
	s := newShelf(t)
	g := serve(t, from(s.URL))
	c := dial(t, g.GRPC)
	s.Put("broken", stage.Bundle(map[string]string{"bad.rego": "package bad\n\nallow if {"}))
	s.Fail("failing", 500)
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for tenant, status := range map[string]int{"late": 403, "broken": 503, "failing": 503} {
			if a := c.ask(tenant, 0); a.status != status {
				t.Fatalf("tenant %s: got %+v, want a denial with %d", tenant, a, status)
			}
		}
	}
	var took []string
	for _, tenant := range []string{"late", "broken", "failing"} {
		s.publish(tenant, 1)
		took = append(took, fmt.Sprintf("%s %s", tenant, c.becomes(t, tenant, 1, 12*time.Second)))
	}
	t.Logf("PASS: decide after the good bundle is there: %s", strings.Join(took, ", "))
}

// Tenants that cannot be loaded keep neither the server from starting nor others
// from being loaded.
func TestManyBroken(t *testing.T) {
	s := newShelf(t)
	var preload []string
	for i := range 60 {
		name := fmt.Sprintf("broken-%d", i)
		preload = append(preload, name)
		if i%2 == 0 {
			s.Hang(name)
		} else {
			s.Put(name, stage.Bundle(map[string]string{"bad.rego": "package bad\n\nallow if nothing.like.this(1)"}))
		}
	}
	s.publish("orders", 1)
	s.publish("payments", 1)
	begun := time.Now()
	g := serve(t, from(s.URL)+fmt.Sprintf("tenants: {preload: [%s, orders]}\n", strings.Join(preload, ", ")))
	started := time.Since(begun)
	c := dial(t, g.GRPC)
	orders := c.becomes(t, "orders", 1, 2*time.Second)
	payments := c.becomes(t, "payments", 1, 2*time.Second)
	s.publish("orders", 2)
	updated := c.becomes(t, "orders", 2, pollDelay+2*time.Second)
	t.Logf("PASS: with 30 tenants that hang and 30 that do not compile: serving after %s, a preloaded tenant decides after %s more, another after %s, an update after %s",
		started.Round(time.Millisecond), orders, payments, updated)
}

// SIGTERM while the first load hangs ends the server in time.
func TestStopDuringLoad(t *testing.T) {
	s := newShelf(t)
	s.Hang("hanging")
	file := t.TempDir() + "/gatehouse.yaml"
	write(t, file, from(s.URL)+"tenants: {required: [hanging]}\n")
	if built.err != nil {
		t.Fatal(built.err)
	}
	g, err := stage.StartUnready(built.path, "-c", file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Kill)
	c := dial(t, g.GRPC)
	if a := c.ask("hanging", 0); a.status != 503 {
		t.Errorf("tenant that hangs: got %+v, want 503", a)
	}
	begun := time.Now()
	if err := g.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	code, err := g.Wait(5 * time.Second)
	if err != nil || code != 0 {
		t.Errorf("exit: got %d, %v, want 0", code, err)
	}
	t.Logf("PASS: ended %s after SIGTERM", time.Since(begun).Round(time.Millisecond))
}

// Tenants that come and go leave no series of metrics behind.
func TestSeries(t *testing.T) {
	s := newShelf(t)
	all := make([]string, 40)
	for i := range all {
		all[i] = fmt.Sprintf("tenant-%d", i)
		s.publish(all[i], 1)
	}
	g := serve(t, from(s.URL)+"tenants: {capacity: 10, parked: 0}\n")
	c := dial(t, g.GRPC)
	var counts []int
	for range 4 {
		load(t, all, func(tenant string) { c.becomes(t, tenant, 1, 10*time.Second) })
		text, err := g.Get("/metrics")
		if err != nil {
			t.Fatal(err)
		}
		counts = append(counts, strings.Count(text, "\n"))
	}
	if counts[3] > counts[0]+10 {
		t.Errorf("lines of /metrics: %v, want as many each time", counts)
	}
	t.Logf("PASS: lines of /metrics after 1 to 4 rounds of 40 tenants in a room for 10: %v", counts)
}

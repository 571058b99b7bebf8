package main

import (
	"flag"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "put what is printed into docs/scale.md")

// docs/scale.md quotes what make simulate prints.
func TestReport(t *testing.T) {
	const path = "../../docs/scale.md"
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	report(&b, newSimulation(defaults))
	const begin, end = "<!-- make simulate -->\n```\n", "```\n<!-- end -->"
	before, rest, ok := strings.Cut(string(doc), begin)
	quoted, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for what is printed", path)
	}
	if quoted == b.String() {
		return
	}
	if *update {
		if err := os.WriteFile(path, []byte(before+begin+b.String()+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Errorf("docs/scale.md does not quote what is printed: make docs\ngot\n%s\nwant\n%s", quoted, b.String())
}

// An LRU finds what a simple one finds.
func TestLRU(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	pick := draw(popularity(5000, 0.9), rng)
	l := newLRU(5000, 100)
	var warm, away []int32 // the latest last
	for range 50_000 {
		tenant := pick()
		want := slices.Contains(warm, tenant) || slices.Contains(away, tenant)
		same := func(o int32) bool { return o == tenant }
		warm = append(slices.DeleteFunc(warm, same), tenant)
		away = slices.DeleteFunc(away, same)
		if len(warm) > 100 {
			away = append(away, warm[0])
			warm = warm[1:]
		}
		if len(away) > parked {
			away = away[1:]
		}
		if got := l.ask(tenant); got != want {
			t.Fatalf("tenant %d: got %v, want %v", tenant, got, want)
		}
	}
	if l.warm != len(warm) || l.parked != len(away) {
		t.Errorf("got %d warm and %d parked, want %d and %d", l.warm, l.parked, len(warm), len(away))
	}
}

// Tenants are drawn by their shares.
func TestDraw(t *testing.T) {
	p := popularity(100, 1)
	pick := draw(p, rand.New(rand.NewPCG(7, 7)))
	drawn := make([]float64, len(p))
	const n = 1_000_000
	for range n {
		drawn[pick()]++
	}
	for i, share := range p {
		if off := math.Abs(drawn[i]/n - share); off > 5*math.Sqrt(share/n) {
			t.Errorf("tenant %d: got a share of %.4f, want %.4f", i, drawn[i]/n, share)
		}
	}
}

// Where a replica goes, only its tenants move; and replicas have equal parts.
func TestOrder(t *testing.T) {
	const tenants, replicas = 20_000, 10
	parts := make([]int, replicas)
	for tenant := range tenants {
		with, without := order(tenant, replicas+1), order(tenant, replicas)
		if with[0] != replicas && with[0] != without[0] {
			t.Fatalf("tenant %d moved from %d to %d, and neither is new", tenant, without[0], with[0])
		}
		parts[without[0]]++
	}
	for r, n := range parts {
		if n < tenants/replicas*9/10 || n > tenants/replicas*11/10 {
			t.Errorf("replica %d has %d tenants of %d", r, n, tenants)
		}
	}
}

// A storm is as long as its loads take, one batch after the other.
func TestStorm(t *testing.T) {
	sim := newSimulation(config{seed: 1, tenants: 10, replicas: 2, checks: 1, latency: 50 * time.Millisecond})
	rates := slices.Repeat([]float64{1e6}, 160) // all are asked for at once
	s := sim.run(rand.New(rand.NewPCG(7, 7)), rates, 160e6, time.Minute)
	if len(s.loads) != 160 {
		t.Fatalf("got %d loads of 160 tenants", len(s.loads))
	}
	want := 10 * 50 * time.Millisecond // sixteen at once
	if s.longest < want-time.Millisecond || s.longest > want+time.Millisecond || s.warm < want-51*time.Millisecond || s.warm > want+time.Millisecond {
		t.Errorf("got a wait of %v and warm after %v, want %v", s.longest, s.warm, want)
	}
	// The last two batches are later than the deadline of 400 ms: by 50 and 100 ms.
	if want := 16*1e6*0.05 + 16*1e6*0.1; math.Abs(s.denied-want) > want/100 {
		t.Errorf("got %.0f checks denied, want %.0f", s.denied, want)
	}
	// Of each tenant's checks those wait that come before its load ends.
	if want := 16 * 1e6 * 0.05 * (10 * 11 / 2); math.Abs(s.waited-want) > want/100 {
		t.Errorf("got %.0f checks that wait, want %.0f", s.waited, want)
	}
	if p := s.p99(); p < 0.4 || p > 0.51 {
		t.Errorf("got a p99 of %v", p)
	}
}

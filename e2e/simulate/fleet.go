package main

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
)

// popularity is the share of the checks that each tenant has: the n-th has one in
// proportion to 1/n^s. Their sum is 1.
func popularity(n int, s float64) []float64 {
	p, sum := make([]float64, n), 0.0
	for i := range p {
		p[i] = math.Pow(float64(i+1), -s)
		sum += p[i]
	}
	for i := range p {
		p[i] /= sum
	}
	return p
}

// draw returns a function that draws tenants by their shares, each in the same
// time (the alias method of Walker and Vose).
func draw(p []float64, rng *rand.Rand) func() int32 {
	n := len(p)
	keep, alias := make([]float64, n), make([]int32, n)
	scaled := make([]float64, n)
	var small, large []int32
	for i, share := range p {
		scaled[i] = share * float64(n)
		if scaled[i] < 1 {
			small = append(small, int32(i))
		} else {
			large = append(large, int32(i))
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		keep[s], alias[s] = scaled[s], l
		if scaled[l] -= 1 - scaled[s]; scaled[l] < 1 {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	for _, rest := range [][]int32{small, large} {
		for _, i := range rest {
			keep[i], alias[i] = 1, i
		}
	}
	return func() int32 {
		i := rng.IntN(n)
		if rng.Float64() < keep[i] {
			return int32(i)
		}
		return alias[i]
	}
}

// mix spreads a number over all bits (splitmix64).
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// order returns the replicas in the order in which a tenant prefers them
// (rendezvous hashing, which moves as few tenants as Maglev does).
func order(tenant, replicas int) []int16 {
	type weighed struct {
		weight  uint64
		replica int16
	}
	all := make([]weighed, replicas)
	for r := range all {
		all[r] = weighed{mix(mix(uint64(tenant)) ^ uint64(r)<<32), int16(r)}
	}
	slices.SortFunc(all, func(a, b weighed) int {
		if a.weight > b.weight {
			return -1
		}
		return 1
	})
	out := make([]int16, replicas)
	for i, w := range all {
		out[i] = w.replica
	}
	return out
}

// lru is the warm tenants of one replica, and those that are parked. The list is
// in two arrays, so that a check costs a few reads.
type lru struct {
	capacity, warm int
	prev, next     []int32 // of the list; -1: not in it
	head, tail     int32

	queue  []int32 // of those that were parked, in that order; some have come back
	times  []int32 // :: tenant → how often it stands in queue
	parked int     // that have not come back
	away   []bool  // :: tenant → it is parked
}

func newLRU(tenants, capacity int) *lru {
	l := &lru{capacity: capacity, prev: make([]int32, tenants), next: make([]int32, tenants), head: -1, tail: -1, times: make([]int32, tenants), away: make([]bool, tenants)}
	for i := range l.prev {
		l.prev[i], l.next[i] = -2, -2
	}
	return l
}

// ask reports whether a check finds the tenant without a load.
func (l *lru) ask(t int32) bool {
	found := l.prev[t] != -2
	if found {
		if l.head == t {
			return true
		}
		l.unlink(t)
	} else if l.away[t] {
		found = true
		l.away[t] = false
		l.parked--
	}
	l.prev[t], l.next[t] = -1, l.head
	if l.head >= 0 {
		l.prev[l.head] = t
	}
	if l.head = t; l.tail < 0 {
		l.tail = t
	}
	if l.warm++; l.warm > l.capacity {
		out := l.tail
		l.unlink(out)
		l.away[out] = true
		l.times[out]++
		l.queue = append(l.queue, out)
		for l.parked++; l.parked > parked; {
			first := l.queue[0]
			l.queue = l.queue[1:]
			if l.times[first]--; l.times[first] == 0 && l.away[first] { // else it stands further back
				l.away[first] = false
				l.parked--
			}
		}
	}
	return found
}

func (l *lru) unlink(t int32) {
	if l.prev[t] >= 0 {
		l.next[l.prev[t]] = l.next[t]
	} else {
		l.head = l.next[t]
	}
	if l.next[t] >= 0 {
		l.prev[l.next[t]] = l.prev[t]
	} else {
		l.tail = l.prev[t]
	}
	l.prev[t], l.next[t] = -2, -2
	l.warm--
}

// balancing is how Envoys choose among replicas.
type balancing struct {
	name   string
	homes  int // replicas that a tenant is asked at; 0: all
	choose func(f *fleet, t int32) int
}

// fleet is what a balancing chooses from.
type fleet struct {
	rng      *rand.Rand
	replicas int
	order    [][]int16 // :: tenant → replicas
	recent   []float64 // :: replica → checks of late
	sum      float64
}

// overload is Envoy's hash_balance_factor: no replica has more than so many
// times the mean.
const overload = 1.25

var balancings = []balancing{
	{"random", 0, func(f *fleet, _ int32) int { return f.rng.IntN(f.replicas) }},
	{"by tenant", 1, func(f *fleet, t int32) int { return int(f.order[t][0]) }},
	{"by tenant, at most 1.25 x", 1, func(f *fleet, t int32) int {
		for _, r := range f.order[t] {
			if f.recent[r] <= overload*(f.sum/float64(f.replicas))+1 {
				return int(r)
			}
		}
		return int(f.order[t][0])
	}},
	{"by tenant, one of 3", 3, func(f *fleet, t int32) int { return int(f.order[t][f.rng.IntN(min(3, f.replicas))]) }},
}

// steady prints how often a check finds its tenant warm, once a fleet has run for
// a while.
func steady(w io.Writer, sim *simulation) {
	fmt.Fprintf(w, "Running: the shares of tenants follow Zipf's law\n\n  exponent  balancing                  capacity  found warm  loads wanted a second  warm, mean  MiB, mean  busiest replica\n")
	for _, s := range []float64{1, 0.8} {
		for _, b := range balancings {
			for _, capacity := range []int{sim.tenants / 5, sim.tenants} {
				if b.homes == 0 || capacity < sim.tenants { // where tenants have homes, there is room anyway
					sim.steady(w, s, b, capacity)
				}
			}
		}
	}
	fmt.Fprintf(w, "  loads that the fleet can do in a second: %.0f\n\n", sim.loadsPerSecond()*float64(sim.replicas))
}

func (sim *simulation) steady(w io.Writer, exponent float64, b balancing, capacity int) {
	rng := rand.New(rand.NewPCG(sim.seed, 1))
	f := &fleet{rng: rng, replicas: sim.replicas, order: sim.orders, recent: make([]float64, sim.replicas)}
	pick := draw(popularity(sim.tenants, exponent), rng)

	// What would be there after hours: the most popular, at their homes.
	lrus := make([]*lru, sim.replicas)
	for r := range lrus {
		lrus[r] = newLRU(sim.tenants, capacity)
	}
	for t := sim.tenants - 1; t >= 0; t-- {
		homes := sim.orders[t]
		if b.homes > 0 {
			homes = homes[:min(b.homes, len(homes))]
		} else if t >= capacity {
			continue
		}
		for _, r := range homes {
			lrus[r].ask(int32(t))
		}
	}

	found, counted := 0, 0
	per := make([]int, sim.replicas)
	for i, checks := 0, 40*sim.tenants; i < checks; i++ {
		t := pick()
		r := b.choose(f, t)
		f.recent[r]++
		f.sum++
		if i%1000 == 999 { // of late
			for j := range f.recent {
				f.recent[j] *= 0.9
			}
			f.sum *= 0.9
		}
		ok := lrus[r].ask(t)
		if i < checks/2 {
			continue
		}
		counted++
		per[r]++
		if ok {
			found++
		}
	}
	warm := 0
	for _, l := range lrus {
		warm += l.warm
	}
	n := float64(sim.replicas)
	mean := float64(warm) / n
	fmt.Fprintf(w, "  %8.1f  %-25s  %8d  %9.2f%%  %21.0f  %10.0f  %9.0f  %14.2fx\n", exponent, b.name, capacity,
		100*float64(found)/float64(counted), sim.checks*float64(counted-found)/float64(counted), mean, mean*tenantKB/1024,
		float64(slices.Max(per))*n/float64(counted))
}

// topShare is the share of the checks that the n most popular of some tenants
// have.
func topShare(shares []float64, n int) float64 {
	s := slices.Clone(shares)
	sort.Sort(sort.Reverse(sort.Float64Slice(s)))
	sum := 0.0
	for _, v := range s[:min(n, len(s))] {
		sum += v
	}
	return sum
}

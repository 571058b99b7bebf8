package main

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"time"
)

// storm is what happens at one replica from the moment at which checks arrive for
// tenants that it has not. Only those that are not there are simulated: the first
// check for a tenant comes after a time that is exponential in its rate, begins a
// load, and those that come meanwhile wait for the same load.
type storm struct {
	loads   []time.Duration // when each load began, from the start
	checks  float64         // that came for the tenants in the time
	waited  float64         // checks
	denied  float64         // checks that waited longer than their deadline, or found no place
	longest time.Duration   // wait for a load
	waits   []float64       // :: hundredths of a second → checks that waited so long, less those of the one before
	warm    time.Duration   // when 99.9 % of the checks find their tenant
}

// event is the first check of a tenant, or the end of its load.
type event struct {
	at     float64 // seconds
	tenant int
	ended  bool
}

// events is a heap of them, the earliest first. It is container/heap without its
// interface, which takes most of the time here.
type events []event

func (e *events) push(ev event) {
	*e = append(*e, ev)
	h := *e
	for i := len(h) - 1; i > 0; {
		parent := (i - 1) / 2
		if h[parent].at <= h[i].at {
			return
		}
		h[i], h[parent] = h[parent], h[i]
		i = parent
	}
}

func (e *events) pop() event {
	h := *e
	first, last := h[0], len(h)-1
	h[0] = h[last]
	h = h[:last]
	*e = h
	for i := 0; ; {
		child := 2*i + 1
		if child >= last {
			return first
		}
		if child+1 < last && h[child+1].at < h[child].at {
			child++
		}
		if h[i].at <= h[child].at {
			return first
		}
		h[i], h[child] = h[child], h[i]
		i = child
	}
}

// loadTime is how long a load takes: the bucket, or the share of the CPU that one
// of those that run at once has.
func (sim *simulation) loadTime() float64 {
	return max(sim.latency.Seconds(), loadsAtOnce/loadRate)
}

// run simulates a replica for a time, given the checks per second of each tenant
// that it has not.
func (sim *simulation) run(rng *rand.Rand, rates []float64, total float64, lasts time.Duration) storm {
	var s storm
	end := lasts.Seconds()
	var queue events
	for t, rate := range rates {
		queue.push(event{at: rng.ExpFloat64() / rate, tenant: t})
	}
	first := make([]float64, len(rates)) // of the checks that wait
	var waiting []int
	loading, missing := 0, 0.0
	for _, rate := range rates {
		missing += rate
	}
	s.checks = total * end
	s.waits = make([]float64, hundredths)
	begin := func(t int, at float64) {
		loading++
		s.loads = append(s.loads, time.Duration(at*float64(time.Second)))
		queue.push(event{at: at + sim.loadTime(), tenant: t, ended: true})
	}
	for len(queue) > 0 && queue[0].at <= end {
		e := queue.pop()
		t, rate := e.tenant, rates[e.tenant]
		if !e.ended {
			first[t] = e.at
			switch {
			case loading < loadsAtOnce:
				begin(t, e.at)
			case len(waiting) < loadsWaiting:
				waiting = append(waiting, t)
			default:
				s.denied++
				queue.push(event{at: e.at + rng.ExpFloat64()/rate, tenant: t})
			}
			continue
		}
		loading--
		wait := e.at - first[t]
		s.longest = max(s.longest, time.Duration(wait*float64(time.Second)))
		s.waited += 1 + rate*wait
		last := int(wait * 100)
		s.waits[last]++ // the first
		s.waits[last+1]--
		s.waits[0] += rate * wait / float64(last+1) // the others came evenly
		s.waits[last+1] -= rate * wait / float64(last+1)
		if late := wait - deadline.Seconds(); late > 0 {
			s.denied += 1 + rate*late
		}
		if missing -= rate; missing > total/1000 {
			s.warm = time.Duration(e.at * float64(time.Second))
		}
		if len(waiting) > 0 {
			next := waiting[0]
			waiting = waiting[1:]
			begin(next, e.at)
		}
	}
	if missing > total/1000 {
		s.warm = never
	}
	return s
}

// peak is the most loads that began within one second.
func peak(loads []time.Duration) int {
	slices.Sort(loads)
	most, from := 0, 0
	for i, at := range loads {
		for at-loads[from] >= time.Second {
			from++
		}
		most = max(most, i-from+1)
	}
	return most
}

// ratesOf are the checks per second of tenants.
func ratesOf(p []float64, checks float64, has func(t int) bool) (rates []float64, total float64) {
	for t, share := range p {
		if has(t) {
			rates = append(rates, share*checks)
			total += share * checks
		}
	}
	return rates, total
}

// A minute is how long the storms are looked at.
const lasts = time.Minute

const stormHead = "fetches  most in 1 s  99.9% warm after  p99 of waits  longest wait  checks that wait  checks denied (503)\n"

func (s storm) row() string {
	after := fmt.Sprintf("%.1fs", s.warm.Seconds())
	if s.warm == never {
		after = "later"
	}
	return fmt.Sprintf("%7d  %11d  %16s  %11.2fs  %11.2fs  %15.4f%%  %18.4f%%", len(s.loads), peak(s.loads), after, s.p99(), s.longest.Seconds(),
		100*s.waited/s.checks, 100*s.denied/s.checks)
}

// never is after the time that is looked at.
const never = lasts + 1

// hundredths of a second are more than a wait can have.
const hundredths = int(2*lasts/time.Second) * 100

// p99 is what 99 of 100 checks that wait wait at most, in seconds.
func (s storm) p99() float64 {
	sum, at := 0.0, 0.0
	for _, d := range s.waits {
		at += d
		sum += at
	}
	below := 0.0
	at = 0
	for i, d := range s.waits {
		at += d
		if below += at; below > 0 && below >= 0.99*sum {
			return float64(i+1) / 100
		}
	}
	return 0
}

// add puts what happened at another replica to it.
func (s *storm) add(other storm) {
	s.loads = append(s.loads, other.loads...)
	s.checks += other.checks
	s.waited += other.waited
	s.denied += other.denied
	s.longest = max(s.longest, other.longest)
	s.warm = max(s.warm, other.warm)
	if s.waits == nil {
		s.waits = make([]float64, hundredths)
	}
	for i, n := range other.waits {
		s.waits[i] += n
	}
}

// cold prints what a replica that has nothing does when it gets its part of the
// checks at once.
func cold(w io.Writer, sim *simulation) {
	fmt.Fprintf(w, "A replica starts cold and gets its part at once; the first minute of its checks\n\n  balancing    %s", stormHead)
	rng := rand.New(rand.NewPCG(sim.seed, 2))
	rates, total := ratesOf(sim.shares, sim.checks/float64(sim.replicas), func(int) bool { return true })
	fmt.Fprintf(w, "  random       %s\n", sim.run(rng, rates, total, lasts).row())
	mine, total := sim.mine(0)
	fmt.Fprintf(w, "  by tenant    %s\n\n", sim.run(rng, mine, total, lasts).row())

	perSecond := sim.loadsPerSecond()
	fmt.Fprintf(w, "The same, with tenants in tenants.required, before it says that it is ready: %.0f loads a second\n\n", perSecond)
	fmt.Fprintf(w, "  balancing    required  ready after  share of its checks  ")
	fmt.Fprint(w, stormHead)
	for _, b := range []struct {
		name  string
		rates []float64
		n     int
	}{
		{"random", rates, 1000}, {"random", rates, 10_000}, {"random", rates, len(rates)},
		{"by tenant", mine, len(mine)},
	} {
		n := min(b.n, len(b.rates))
		sum := 0.0
		for _, r := range b.rates {
			sum += r
		}
		s := sim.run(rng, b.rates[n:], sum, lasts) // rates fall with the tenant's number
		fmt.Fprintf(w, "  %-11s  %8d  %10.1fs  %18.2f%%  %s\n", b.name, n, float64(n)/perSecond, 100*topShare(b.rates, n)/sum, s.row())
	}
	fmt.Fprintln(w)
}

// rollout prints what it costs to restart all replicas, one a minute.
func rollout(w io.Writer, sim *simulation) {
	fmt.Fprintf(w, "A rollout: each replica stops and starts once, one a minute\n\n  balancing                     fetches  most in 1 s  p99 of waits  longest wait  checks that wait  checks denied (503)\n")
	rng := rand.New(rand.NewPCG(sim.seed, 3))
	minutes := float64(sim.replicas)
	show := func(name string, all []storm, extra int) {
		var sum storm
		most := 0
		if extra > 0 { // before they are ready
			most = int(sim.loadsPerSecond())
		}
		for _, s := range all {
			sum.add(s)
			most = max(most, peak(s.loads))
		}
		checks := sim.checks * minutes * lasts.Seconds()
		fmt.Fprintf(w, "  %-28s  %7d  %11d  %11.2fs  %11.2fs  %15.4f%%  %18.4f%%\n", name, extra+len(sum.loads), most, sum.p99(), sum.longest.Seconds(),
			100*sum.waited/checks, 100*sum.denied/checks)
	}

	rates, total := ratesOf(sim.shares, sim.checks/float64(sim.replicas), func(int) bool { return true })
	var one []storm
	for range sim.replicas {
		one = append(one, sim.run(rng, rates, total, lasts))
	}
	show("random, nothing required", one, 0)

	show("random, all required", nil, sim.replicas*sim.tenants)

	var away, back []storm
	shares := 0
	for gone := range sim.replicas {
		// Its tenants go to their second choice, and come back cold.
		for r := range sim.replicas {
			if r == gone {
				continue
			}
			moved, total := ratesOf(sim.shares, sim.checks, func(t int) bool { return int(sim.orders[t][0]) == gone && int(sim.orders[t][1]) == r })
			away = append(away, sim.run(rng, moved, total, lasts/2))
		}
		mine, total := sim.mine(gone)
		back = append(back, sim.run(rng, mine, total, lasts/2))
		shares += len(mine)
	}
	show("by tenant, nothing required", append(slices.Clone(away), back...), 0)
	show("by tenant, its part required", away, shares)
	fmt.Fprintln(w)
}

// region prints what happens where a region takes over the tenants of another,
// which it has never been asked for.
func region(w io.Writer, sim *simulation) {
	rng := rand.New(rand.NewPCG(sim.seed, 4))
	fmt.Fprintf(w, "A region takes over the %d tenants of another at once; the first minute of these checks\n\n  balancing    %s", sim.tenants, stormHead)
	for _, name := range []string{"random", "by tenant"} {
		var sum storm
		for r := range sim.replicas {
			rates, total := ratesOf(sim.shares, sim.checks/float64(sim.replicas), func(int) bool { return true })
			if name == "by tenant" {
				rates, total = sim.mine(r)
			}
			s := sim.run(rng, rates, total, lasts)
			sum.add(s)
		}
		fmt.Fprintf(w, "  %-11s  %s\n", name, sum.row())
	}
	fmt.Fprintln(w)
}

// polls prints what polling asks of the bucket.
func polls(w io.Writer, sim *simulation) {
	fmt.Fprintf(w, "Polling, with delays of 60 to 120 s\n\n  balancing    warm of a replica  its polls a second  it can  a bundle is asked for every  requests to the bucket a second\n")
	can := pollsAtOnce / sim.latency.Seconds()
	for _, b := range []struct {
		name string
		warm float64
	}{
		{"random", float64(sim.tenants)}, {"one of 3", 3 * float64(sim.tenants) / float64(sim.replicas)}, {"by tenant", float64(sim.tenants) / float64(sim.replicas)},
	} {
		wants := b.warm / pollDelay
		does := math.Min(wants, can)
		fmt.Fprintf(w, "  %-11s  %17.0f  %18.0f  %6.0f  %26.0fs  %31.0f\n", b.name, b.warm, wants, can, b.warm/does, does*float64(sim.replicas))
	}
}

package main

import (
	"log/slog"
	"math"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// The collector's pace. Left at its default it would collect a small heap all
// the time: a server with 20 MiB of live data would do so for each 20 MiB it
// allocates. The heap is let grow to heapFloor instead, or to a quarter of the
// memory limit where that is less; a heap with more live data than half of that
// is paced by GOGC=100, as usual.
const (
	memoryRatio   = 0.9       // of the container's memory is the limit
	heapFloor     = 128 << 20 // bytes
	heapFraction  = 4
	paceInterval  = time.Second
	maxGCPercent  = 10_000
	paceTolerance = 0.1 // a change of the pace that is less is not worth a pause
)

// fitContainer fits memory and CPU to the container, logs what was chosen, and
// returns the pacer of the collector, which stop ends. GOMEMLIMIT and GOGC, where
// set, are kept. GOMAXPROCS follows the CPU quota by itself.
func fitContainer(log *slog.Logger) (p *pacer, stop func()) {
	limitFrom := "GOMEMLIMIT"
	if os.Getenv("GOMEMLIMIT") == "" {
		limitFrom = "cgroup"
		if _, err := memlimit.Set(
			memlimit.WithRatio(memoryRatio), memlimit.WithProvider(memlimit.FromCgroup)); err != nil {
			limitFrom = "none"
		}
	}
	limit := debug.SetMemoryLimit(-1)
	if limit == math.MaxInt64 {
		limitFrom = "none"
	}
	floor := int64(heapFloor)
	if limit != math.MaxInt64 {
		floor = min(floor, limit/heapFraction)
	}
	attrs := []any{
		"gomaxprocs", runtime.GOMAXPROCS(0), "cpus", runtime.NumCPU(),
		"memory_limit_from", limitFrom,
	}
	if limitFrom != "none" {
		attrs = append(attrs, "memory_limit_bytes", limit)
	}
	if os.Getenv("GOGC") != "" {
		log.Info("fitted to the container", append(attrs, "gc", "GOGC")...)
		return p, func() {}
	}
	log.Info("fitted to the container", append(attrs, "gc", "heap floor", "heap_floor_bytes", floor)...)

	p = &pacer{floor: floor, percent: 100, burst: make(chan struct{}, 1)}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(paceInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.adjust()
				p.relax()
			case <-p.burst:
				p.pace(100)
			case <-done:
				return
			}
		}
	})
	return p, func() {
		close(done)
		wg.Wait()
		debug.SetGCPercent(100)
	}
}

// budgets are the bounds of memory that follow from the limit.
type budgets struct {
	tenants  int64 // policies and data; 0: none
	messages int64 // checks being answered
	bodies   int64 // bodies being read, of all tenants
	logs     int64 // decisions that are not delivered
	recent   int64 // decisions that are remembered
}

// Shares of the memory limit, and what they are at most.
const (
	tenantsShare  = 2
	messagesShare = 8
	bodiesShare   = 16
	logsShare     = 8
	recentShare   = 64
	maxLogs       = 256 << 20
	maxRecent     = 16 << 20
	maxMessages   = 512 << 20
	maxBodies     = 256 << 20
)

// newBudgets returns the budgets that the file sets, or those that follow from
// the memory limit.
func newBudgets(cfg *Tenants) budgets {
	b := budgets{tenants: int64(cfg.Memory), messages: maxMessages, bodies: int64(cfg.BodyMemory), logs: int64(cfg.LogMemory), recent: int64(cfg.RecentMemory)}
	limit := debug.SetMemoryLimit(-1)
	if b.bodies == 0 {
		b.bodies = min(maxBodies, limit/bodiesShare)
	}
	if b.logs == 0 {
		b.logs = min(maxLogs, limit/logsShare)
	}
	if b.recent == 0 {
		b.recent = min(maxRecent, limit/recentShare)
	}
	b.messages = min(b.messages, limit/messagesShare)
	if limit != math.MaxInt64 && b.tenants == 0 {
		b.tenants = limit / tenantsShare
	}
	return b
}

// lender returns what gives the Go runtime n processors more than it has by
// itself: more threads for the same CPUs, so that what waits for the network is
// not behind what evaluates.
func lender() func(n int) {
	base, fixed := runtime.GOMAXPROCS(0), os.Getenv("GOMAXPROCS") != ""
	return func(n int) {
		if n == 0 && !fixed {
			runtime.SetDefaultGOMAXPROCS() // follows the CPU quota again
			return
		}
		runtime.GOMAXPROCS(base + n)
	}
}

// pacer keeps the size at which the heap is collected at a floor or above, and
// gives memory back when little happens.
type pacer struct {
	floor   int64
	percent int

	loads atomic.Int64  // tenants that began to decide since the last tick
	burst chan struct{} // has room for one: there are burstLoads of them

	allocated uint64 // bytes, ever, at the last tick
	freed     uint64 // at the last time that memory was given back
	quiet     int    // ticks in a row in which little was allocated
}

// What was allocated since memory was last given back is given back when there
// has been little to do for a while: what loading a thousand tenants took is not
// kept until there is as much work again.
const (
	quietBytes = 2 << 20  // allocated within a tick, at most: some hundred checks
	quietTicks = 5        // in a row
	worthBytes = 32 << 20 // to give back, at least
)

// burstLoads is how many tenants that begin to decide within a tick are a burst.
// During one the collector runs as often as usual: what stays would otherwise lie
// scattered over a heap of the floor's size, which could not be given back.
const burstLoads = 8

// loaded notes that a tenant began to decide. It does not block. A nil pacer
// paces nothing.
func (p *pacer) loaded() {
	if p == nil {
		return
	}
	if p.loads.Add(1) == burstLoads {
		select {
		case p.burst <- struct{}{}:
		default: // it is noticed already
		}
	}
}

// relax gives memory back when that is due.
func (p *pacer) relax() {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	now := sample[0].Value.Uint64()
	if now-p.allocated > quietBytes {
		p.quiet = 0
	} else {
		p.quiet++
	}
	p.allocated = now
	if p.quiet >= quietTicks && now-p.freed > worthBytes {
		p.freed = now
		debug.FreeOSMemory()
	}
}

func (p *pacer) adjust() {
	if p.loads.Swap(0) >= burstLoads {
		p.pace(100)
		return
	}
	sample := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	metrics.Read(sample)
	percent := gcPercent(int64(sample[0].Value.Uint64()), p.floor)
	if d := math.Abs(float64(percent-p.percent)) / float64(p.percent); d > paceTolerance {
		p.pace(percent)
	}
}

func (p *pacer) pace(percent int) {
	if p.percent != percent {
		p.percent = percent
		debug.SetGCPercent(percent)
	}
}

// gcPercent returns the percentage by which live bytes may grow to reach the
// floor, at least 100.
func gcPercent(live, floor int64) int {
	live = max(live, 1<<20)
	return int(min(max((floor-live)*100/live, 100), maxGCPercent))
}

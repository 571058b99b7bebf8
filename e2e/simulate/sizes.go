package main

import (
	"fmt"
	"io"
	"math"
)

// Of the measured figures, those of a role-based policy with the decision log on:
// README, "Figures", and the memory of the process under that load.
const (
	checkMicros = 58.6 // of CPU, a check
	loadedMiB   = 210  // of memory, the process under load, with one tenant

	busy  = 0.6 // of the CPUs, at most, so that there is room for a peak
	cores = 8   // of a replica
)

// size is what somebody has.
type size struct {
	name    string
	tenants int
	checks  float64 // per second, of all regions
	regions int
}

var sizeTable = []size{
	{"a team", 1, 100, 1},
	{"a department", 20, 2000, 1},
	{"a company", 200, 20_000, 1},
	{"a large company", 1000, 100_000, 2},
	{"a platform", 10_000, 500_000, 3},
	{"a fleet", 50_000, 2_000_000, 4},
}

// sizes prints what sizes of installations need. All regions serve all tenants,
// one region may be lost, and one replica of each.
func sizes(w io.Writer) {
	fmt.Fprintf(w, "\nSizes: replicas of up to %d cores, role-based policies, decision log on, %.0f %% busy when a region is lost\n\n", cores, busy*100)
	fmt.Fprintf(w, "                                                     of a region                                    MiB of a replica       polls a second\n")
	fmt.Fprintf(w, "  who              tenants  checks a second  regions  checks a second  cores  replicas  of cores   random  by tenant      random  by tenant\n")
	for _, s := range sizeTable {
		checks := s.checks / float64(s.regions)
		if s.regions > 1 {
			checks = s.checks / float64(s.regions-1)
		}
		wanted := checks * checkMicros / 1e6 / busy
		of := min(cores, max(2, math.Ceil(wanted/2)))
		replicas := max(2, math.Ceil(wanted/of)) + 1
		fmt.Fprintf(w, "  %-15s  %7d  %15.0f  %7d  %15.0f  %5.1f  %8.0f  %8.0f  %7.0f  %9.0f  %10.0f  %9.0f\n", s.name, s.tenants, s.checks, s.regions, checks, wanted, replicas, of,
			limitMiB(float64(s.tenants)), limitMiB(float64(s.tenants)/(replicas-1)),
			float64(s.tenants)*replicas/pollDelay, float64(s.tenants)/pollDelay)
	}
}

// limitMiB is the memory limit that a replica needs for its warm tenants: what the
// process takes under load, and twice what the tenants take, since the collector
// lets the heap double; of the limit, a tenth is left, an eighth is for decision
// logs and a sixteenth for bodies.
func limitMiB(warm float64) float64 {
	return (loadedMiB + 2*warm*tenantKB/1024) / (0.9 * (1 - 1.0/8 - 1.0/16))
}

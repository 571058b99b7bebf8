// Command simulate shows what a fleet of Gatehouse replicas would do with many
// tenants: how often a check finds its tenant warm, what a cold replica, a rollout
// and the loss of a region cost, and what polling asks of a bucket.
//
//	go run ./simulate [-seed N] [-tenants N] [-replicas N] [-checks N] [-latency D]
//
// It is arithmetic with a seed, and no Gatehouse runs: what it says is as good as
// the figures that it begins with, which are measured and named in figures.go. The
// same flags print the same lines, on every machine. docs/scale.md quotes them.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"time"
)

func main() {
	c := defaults
	flag.Uint64Var(&c.seed, "seed", c.seed, "of all that is random")
	flag.IntVar(&c.tenants, "tenants", c.tenants, "tenants of a region")
	flag.IntVar(&c.replicas, "replicas", c.replicas, "replicas of a region")
	flag.Float64Var(&c.checks, "checks", c.checks, "checks per second of a region")
	flag.DurationVar(&c.latency, "latency", c.latency, "of a request to the bucket")
	flag.Parse()
	if c.tenants < 1 || c.replicas < 2 || c.checks <= 0 || c.latency < time.Millisecond {
		fmt.Fprintln(os.Stderr, "simulate: at least one tenant, two replicas, a check per second and 1ms are needed")
		os.Exit(2)
	}
	report(os.Stdout, newSimulation(c))
}

// config is what is simulated: one region.
type config struct {
	seed     uint64
	tenants  int
	replicas int
	checks   float64       // per second
	latency  time.Duration // of a request to the bucket
}

var defaults = config{seed: 1, tenants: 50_000, replicas: 24, checks: 500_000, latency: 50 * time.Millisecond}

// simulation is a config and what follows from it.
type simulation struct {
	config
	orders [][]int16 // :: tenant → replicas, that which it prefers first
	shares []float64 // :: tenant → share of the checks, by Zipf's law with exponent 1
}

func newSimulation(c config) *simulation {
	sim := &simulation{config: c, orders: make([][]int16, c.tenants), shares: popularity(c.tenants, 1)}
	for t := range sim.orders {
		sim.orders[t] = order(t, c.replicas)
	}
	return sim
}

// mine returns the checks per second of the tenants that prefer a replica.
func (sim *simulation) mine(replica int) (rates []float64, total float64) {
	return ratesOf(sim.shares, sim.checks, func(t int) bool { return int(sim.orders[t][0]) == replica })
}

// loadsPerSecond are those that a replica can finish.
func (sim *simulation) loadsPerSecond() float64 { return loadsAtOnce / sim.loadTime() }

// report prints all scenarios.
func report(w io.Writer, c *simulation) {
	fmt.Fprintf(w, "%d tenants, %d replicas, %.0f checks a second, a bucket that answers after %v: a replica loads %.0f tenants a second\n\n", c.tenants, c.replicas, c.checks, c.latency, c.loadsPerSecond())
	steady(w, c)
	cold(w, c)
	rollout(w, c)
	region(w, c)
	polls(w, c)
	sizes(w)
}

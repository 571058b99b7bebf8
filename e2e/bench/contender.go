package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// contender is one kind of load on one server. Contenders take turns.
type contender struct {
	names  []string // cells of its row
	server *server
	beside *server // whose CPU time counts by itself: an Envoy; nil: none
	load   func(context.Context) *traffic.Report
	items  int // questions in one request; 0: one

	report    traffic.Report
	cpu, more []float64 // µs of a check in each round: of the server, and of what is beside it
	mallocs   float64   // NaN: the server does not tell
	rss       int64     // of the server, at the end of the last round
}

// round runs one round.
func (c *contender) round(ctx context.Context) error {
	before, err := c.sample()
	if err != nil {
		return err
	}
	report := c.load(ctx)
	if err := c.server.settled(); err != nil {
		return fmt.Errorf("%q: %w", c.names, err)
	}
	after, err := c.sample()
	if err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if report.Checks == 0 || report.Outcomes["allowed"] != report.Checks {
		return fmt.Errorf("%q: outcomes %v, want all allowed", c.names, report.Outcomes)
	}
	// Asking for figures costs, too: the one that ends the round, and those of
	// delivered.
	asked := after.scrapes - before.scrapes
	n := float64(report.Checks)
	c.cpu = append(c.cpu, micros(after.cpu-before.cpu-time.Duration(asked)*c.server.asking)/n)
	c.more = append(c.more, micros(after.more-before.more)/n)
	c.mallocs += after.mallocs - before.mallocs - float64(asked)*c.server.scrape
	c.report.Add(report)
	c.rss, err = traffic.RSS(c.server.Pid())
	return err
}

// sample is what a server has used so far.
type sample struct {
	cpu, more time.Duration
	mallocs   float64
	scrapes   int
}

func (c *contender) sample() (s sample, err error) {
	if s.mallocs, err = c.server.mallocs(); err != nil {
		return s, err
	}
	s.scrapes = c.server.scrapes
	if s.cpu, err = traffic.CPUTime(c.server.Pid()); err == nil && c.beside != nil {
		s.more, err = traffic.CPUTime(c.beside.Pid())
	}
	return s, err
}

// cost is the CPU time of one check, in µs: that of the round in the middle, since
// what else the machine does makes some rounds worse, and none better.
func (c *contender) cost() float64 { return median(c.cpu) }

func median(of []float64) float64 {
	sorted := slices.Sorted(slices.Values(of))
	n := len(sorted)
	if n == 0 {
		return unknown
	}
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

// warmUp is for how long a contender runs before it counts.
const warmUp = 300 * time.Millisecond

// rounds has all contenders run, round by round, so that a disturbance of the
// machine hits all.
func (b *bench) rounds(ctx context.Context, contenders []*contender) error {
	for _, c := range contenders {
		warm, cancel := context.WithTimeout(ctx, warmUp)
		c.load(warm)
		cancel()
		if err := c.server.settled(); err != nil {
			return err
		}
		if err := c.server.calibrate(); err != nil {
			return err
		}
	}
	for i := range b.roundCount {
		for _, c := range contenders {
			if err := c.round(ctx); err != nil {
				return err
			}
		}
		b.say("round %d of %d", i+1, b.roundCount)
	}
	return nil
}

// figures are the columns that follow the names of a contender, and their cells.
const figures = "CPU µs/check:1, " + ratioColumn + ":2, checks/s:0, p50 µs:0, p99 µs:0, p99.9 µs:0, allocations:0, RSS MiB:0"

// cells has base for the costs of an always-allow server; 0: there is none.
func (c *contender) cells(base float64) []any {
	ratio := unknown
	if base > 0 {
		ratio = c.cost() / base
	}
	l, n := &c.report.Latency, float64(c.report.Checks)
	return []any{
		c.cost(), ratio, c.report.PerSecond(), micros(l.Quantile(0.5)), micros(l.Quantile(0.99)), micros(l.Quantile(0.999)),
		c.mallocs / n, float64(c.rss) / (1 << 20),
	}
}

// tableOf has a row for each contender; the first is that by which the others are
// measured.
func tableOf(part, title, names string, contenders []*contender) table {
	t := table{Part: part, Title: title, Columns: columns(names + ", " + figures)}
	for _, c := range contenders {
		r := row{}
		for _, name := range c.names {
			r = append(r, name)
		}
		t.Rows = append(t.Rows, append(r, c.cells(contenders[0].cost())...))
	}
	return t
}

// allWell is the error of a report in which not everything was allowed.
func allWell(r *traffic.Report) error {
	if r.Checks > 0 && r.Outcomes["allowed"] == r.Checks {
		return nil
	}
	var parts []error
	for _, name := range slices.Sorted(maps.Keys(r.Outcomes)) {
		parts = append(parts, fmt.Errorf("%d %s", r.Outcomes[name], name))
	}
	return errors.Join(append(parts, fmt.Errorf("%d answers in all", r.Checks))...)
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

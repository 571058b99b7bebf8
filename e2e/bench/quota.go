package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/traffic"
)

// What is measured of CPU quotas: those that the machine has CPUs for, each with
// what Gatehouse picks by itself and with GOMAXPROCS set, under loads that need so
// much of the quota on average.
const quotaSizes = "0.5,1,2,4"

const (
	quotaProcs       = 4  // GOMAXPROCS at most
	quotaConcurrency = 64 // in flight, at most
)

// quotaCell is one load under one quota with one GOMAXPROCS.
type quotaCell struct {
	quota     float64
	procs     int // 0: what Gatehouse picks
	load      string
	p50, p99  float64 // ms
	throttled float64 // share of the periods
	stopped   float64 // ms that the group was stopped, of each second of the load
}

// quotas measures what a CPU quota does to latency.
func (b *bench) quotas(ctx context.Context) ([]table, error) {
	group, err := newGroup("gatehouse-bench")
	if err != nil {
		return nil, err
	}
	defer group.remove()
	defer b.end() // before that
	var loads []*quotaLoad
	var cells []quotaCell
	left := ""
	for _, size := range strings.Split(b.quotaSizes, ",") {
		quota, err := strconv.ParseFloat(size, 64)
		if err != nil || quota <= 0 {
			return nil, fmt.Errorf("%q is no quota", size)
		}
		if quota > float64(runtime.NumCPU()) {
			left = fmt.Sprintf("; quotas of more than the %d CPUs of the machine limit nothing", runtime.NumCPU())
			continue
		}
		for procs := range quotaProcs + 1 {
			inside, err := b.startInside(group, quota, procs)
			if err != nil {
				return nil, err
			}
			if loads == nil { // what each load costs is learned once, without a quota
				if loads, err = b.quotaLoads(ctx, group, inside); err != nil {
					return nil, err
				}
			}
			for _, l := range loads {
				c, err := b.quotaCell(ctx, group, inside, l, quota)
				if err != nil {
					return nil, fmt.Errorf("quota %g, GOMAXPROCS %d, %s: %w", quota, procs, l.name, err)
				}
				c.quota, c.procs, c.load = quota, procs, l.name
				cells = append(cells, c)
			}
			b.end()
			b.say("cpu: quota %g, GOMAXPROCS %s", quota, procsName(procs))
		}
	}
	t := table{Part: "cpu", Title: fmt.Sprintf("role-based, log off, at a constant rate that needs %.0f %% of the quota; periods of 100 ms%s", b.quotaBusy*100, left),
		Columns: columns("quota:1, GOMAXPROCS, load, p50 ms:1, p99 ms:1, throttled periods %:0, stopped ms/s:0")}
	for _, c := range cells {
		t.Rows = append(t.Rows, row{c.quota, procsName(c.procs), c.load, c.p50, c.p99, c.throttled * 100, c.stopped})
	}
	if b.plot != "" {
		if err := os.WriteFile(b.plot, []byte(drawQuotas(cells)), 0o644); err != nil {
			return nil, err
		}
	}
	return []table{t}, nil
}

func procsName(n int) string {
	if n == 0 {
		return "own choice"
	}
	return strconv.Itoa(n)
}

// insider is a gatehouse in the group, and how each load reaches it.
type insider struct {
	*server
	drive map[string]func(context.Context, traffic.Load) *traffic.Report
}

// startInside starts a gatehouse in the group under a quota.
func (b *bench) startInside(group *group, quota float64, procs int) (*insider, error) {
	if err := group.limit(quota); err != nil {
		return nil, err
	}
	dir, err := b.folder("quota")
	if err != nil {
		return nil, err
	}
	wrapper := filepath.Join(dir, "gatehouse")
	script := fmt.Sprintf("#!/bin/sh\necho $$ >%s/cgroup.procs || exit 1\nexec %s \"$@\"\n", group.dir, b.binary)
	if err := os.WriteFile(wrapper, []byte(script), 0o700); err != nil {
		return nil, err
	}
	set := httpSetting(wrapper, "auto")
	c := roles(users)
	set.tenants[tenantOf(0)] = c.files
	c.ask(tenantOf(0))
	if procs > 0 {
		set.env = []string{fmt.Sprint("GOMAXPROCS=", procs)}
	}
	s, err := b.gatehouse(set)
	if err != nil {
		return nil, err
	}
	in := &insider{s, map[string]func(context.Context, traffic.Load) *traffic.Report{}}
	in.drive[quotaChecks] = func(ctx context.Context, l traffic.Load) *traffic.Report {
		client, err := traffic.New(traffic.Config{Target: s.grpc, Requests: c.requests, Concurrency: l.Concurrency, Duration: l.Duration, Rate: l.Rate})
		if err != nil {
			panic(err) // there are requests
		}
		defer client.Close()
		return client.Run(ctx)
	}
	for _, size := range []int{10, 100, 1000} {
		batch, err := batchCase("http://"+s.http+"/t/", b.httpClient(), size)
		if err != nil {
			return nil, err
		}
		in.drive[batch.name] = batch.drive
	}
	in.drive[quotaMixed] = func(ctx context.Context, l traffic.Load) *traffic.Report {
		beside := traffic.Load{Concurrency: httpConcurrency, Duration: l.Duration, Rate: l.Rate / quotaMix}
		done := make(chan struct{})
		go func() { in.drive[quotaBatch](ctx, beside); close(done) }()
		defer func() { <-done }()
		return in.drive[quotaChecks](ctx, l)
	}
	return in, nil
}

// The loads that one is made of: checks, of which the latency counts, with a batch
// for each quotaMix of them, which is as many questions.
const (
	quotaChecks = "checks"
	quotaBatch  = "batch of 100"
	quotaMixed  = "checks beside batches of 100"
	quotaMix    = 100
)

// quotaLoad is a load with what one request of it costs.
type quotaLoad struct {
	name string
	cost time.Duration // of CPU
}

// quotaLoads learns what the loads cost.
func (b *bench) quotaLoads(ctx context.Context, group *group, in *insider) (loads []*quotaLoad, err error) {
	if err := group.limit(0); err != nil {
		return nil, err
	}
	for _, name := range []string{quotaChecks, "batch of 10", quotaBatch, "batch of 1000"} {
		l := &quotaLoad{name: name}
		var report *traffic.Report
		var before, after time.Duration
		for range 2 { // the first warms up
			if before, err = traffic.CPUTime(in.Pid()); err != nil {
				return nil, err
			}
			report = in.drive[name](ctx, traffic.Load{Concurrency: httpConcurrency, Duration: time.Second})
			if after, err = traffic.CPUTime(in.Pid()); err != nil {
				return nil, err
			}
			if err := allWell(report); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
		l.cost = (after - before) / time.Duration(report.Checks)
		loads = append(loads, l)
	}
	return append(loads, &quotaLoad{quotaMixed, loads[0].cost + loads[2].cost/quotaMix}), nil
}

// quotaCell measures one load.
func (b *bench) quotaCell(ctx context.Context, group *group, in *insider, l *quotaLoad, quota float64) (c quotaCell, err error) {
	if err := group.limit(quota); err != nil {
		return c, err
	}
	in.drive[l.name](ctx, traffic.Load{Concurrency: httpConcurrency, Duration: 300 * time.Millisecond}) // connects, and fills what is filled once
	load := traffic.Load{
		Concurrency: quotaConcurrency, Duration: time.Duration(b.roundCount) * b.roundTime,
		Rate: b.quotaBusy * quota * float64(time.Second) / float64(l.cost),
	}
	before, err := group.stat()
	if err != nil {
		return c, err
	}
	report := in.drive[l.name](ctx, load)
	after, err := group.stat()
	if err != nil {
		return c, err
	}
	if report.Checks == 0 { // what is denied since it came too late is what a quota does
		return c, fmt.Errorf("nothing was answered")
	}
	c.p50, c.p99 = micros(report.Latency.Quantile(0.5))/1e3, micros(report.Latency.Quantile(0.99))/1e3
	c.throttled = float64(after.throttled-before.throttled) / math.Max(1, float64(after.periods-before.periods))
	c.stopped = float64((after.stopped - before.stopped).Milliseconds()) / report.Elapsed.Seconds()
	return c, ctx.Err()
}

// group is the control group of the server, of version 2 or 1. It lies in one that
// has more weight than all else on the machine, beside one of the bench itself, so
// that what else runs matters less.
type group struct {
	root, parent, dir, client string
	v2                        bool
}

const (
	cgroupV2 = "/sys/fs/cgroup"
	cgroupV1 = "/sys/fs/cgroup/cpu"
	period   = 100_000 // µs
)

// newGroup makes the groups below the root, and enters that of the bench. It needs
// root.
func newGroup(name string) (*group, error) {
	g := &group{root: cgroupV1}
	if strings.Contains(read(cgroupV2+"/cgroup.controllers"), "cpu") {
		g = &group{root: cgroupV2, v2: true}
	}
	g.parent = filepath.Join(g.root, name)
	g.dir, g.client = filepath.Join(g.parent, "server"), filepath.Join(g.parent, "client")
	for _, dir := range []string{g.parent, g.dir, g.client} {
		if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
			return nil, fmt.Errorf("making a control group (as root, where the machine has one of the controller cpu): %w", err)
		}
		if g.v2 && dir != g.client { // of the next one
			if err := os.WriteFile(filepath.Join(filepath.Dir(dir), "cgroup.subtree_control"), []byte("+cpu"), 0); err != nil {
				return nil, err
			}
		}
	}
	weight, file := "10000", "cpu.weight"
	if !g.v2 {
		weight, file = "262144", "cpu.shares"
	}
	if err := os.WriteFile(filepath.Join(g.parent, file), []byte(weight), 0); err != nil {
		return nil, err
	}
	return g, enter(g.client)
}

// enter moves the bench to a group.
func enter(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0)
}

// limit sets the quota of the server, in CPUs; 0: none.
func (g *group) limit(cpus float64) error {
	quota := strconv.Itoa(int(cpus * period))
	if g.v2 {
		if cpus == 0 {
			quota = "max"
		}
		return os.WriteFile(g.dir+"/cpu.max", fmt.Appendf(nil, "%s %d", quota, period), 0)
	}
	if cpus == 0 {
		quota = "-1"
	}
	if err := os.WriteFile(g.dir+"/cpu.cfs_period_us", []byte(strconv.Itoa(period)), 0); err != nil {
		return err
	}
	return os.WriteFile(g.dir+"/cpu.cfs_quota_us", []byte(quota), 0)
}

// groupStat is what the kernel counts of a group.
type groupStat struct {
	periods, throttled int
	stopped            time.Duration // of all CPUs
}

func (g *group) stat() (s groupStat, err error) {
	text, err := os.ReadFile(g.dir + "/cpu.stat")
	if err != nil {
		return s, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.Atoi(value)
		if err != nil {
			return s, fmt.Errorf("cpu.stat: %w", err)
		}
		switch name {
		case "nr_periods":
			s.periods = n
		case "nr_throttled":
			s.throttled = n
		case "throttled_usec": // version 2
			s.stopped = time.Duration(n) * time.Microsecond
		case "throttled_time": // version 1
			s.stopped = time.Duration(n)
		}
	}
	return s, nil
}

// remove leaves the groups, and removes them once nothing is in them.
func (g *group) remove() {
	if enter(g.root) != nil {
		return
	}
	for _, dir := range []string{g.client, g.dir, g.parent} {
		for range 100 {
			if os.Remove(dir) == nil {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

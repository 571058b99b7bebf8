package main

import (
	"math"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// newRegistry returns a registry with the figures of the process: those of the Go
// runtime with its collector and scheduler, of the operating system, of the control
// group, and what this binary is.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	b := thisBuild()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "gatehouse_build_info",
		Help:        "1, with what this binary is.",
		ConstLabels: prometheus.Labels{"version": b.Version, "commit": b.Commit, "go": b.Go, "opa": b.OPA},
	})
	info.Set(1)
	registry.MustRegister(
		collectors.NewGoCollector(collectors.WithGoCollectorRuntimeMetrics(
			collectors.MetricsGC, collectors.MetricsScheduler,
			collectors.GoRuntimeMetricsRule{Matcher: regexp.MustCompile(`^/cpu/classes/`)},
		)),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		info, newGroup("/"),
	)
	return registry
}

// figures are those that the rooms give of themselves, read when asked for.
type figures struct {
	checks *extauthz.Server
	web    *httpserve.Server
	work   *schedule.Schedule
	certs  []*certificates // of the listeners that have some; nil ones have none
}

var (
	messagesDesc = prometheus.NewDesc("gatehouse_message_bytes",
		"Checks that are being answered, in bytes as they came.", nil, nil)
	httpBodiesDesc = prometheus.NewDesc("gatehouse_http_body_bytes",
		"Bodies of requests of the HTTP API that are being answered, in bytes.", nil, nil)
	listsDesc = prometheus.NewDesc("gatehouse_permission_lists_total",
		"Permission lists that were asked for, by how they were answered: remembered, or computed (or waited for).", []string{"answered"}, nil)
	listBytesDesc = prometheus.NewDesc("gatehouse_permission_list_bytes",
		"Estimate of what remembered permission lists take, in bytes.", nil, nil)
	streamsDesc = prometheus.NewDesc("gatehouse_permission_streams",
		"Streams of events about permission lists that are open.", nil, nil)
	tasksDesc = prometheus.NewDesc("gatehouse_scheduled_tasks",
		"Polls, reports and uploads by state: sleeping until they are due, waiting for a worker, running, long (waiting for a service that answers when there is something new).", []string{"state"}, nil)
	expiryDesc = prometheus.NewDesc("gatehouse_certificate_expiry_timestamp_seconds",
		"When the certificate in use of a listener expires, in seconds since 1970.", []string{"listener"}, nil)

	figuresDescs = []*prometheus.Desc{messagesDesc, httpBodiesDesc, listsDesc, listBytesDesc, streamsDesc, tasksDesc, expiryDesc}
)

// Describe implements prometheus.Collector.
func (f *figures) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range figuresDescs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (f *figures) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(messagesDesc, float64(f.checks.MessageBytes()))
	web := f.web.Stats()
	gauge(httpBodiesDesc, float64(web.BodyBytes))
	counter(listsDesc, web.Remembered, "remembered")
	counter(listsDesc, web.Computed, "computed")
	gauge(listBytesDesc, float64(web.ListBytes))
	gauge(streamsDesc, float64(web.Streams))
	work := f.work.Stats()
	gauge(tasksDesc, float64(work.Sleeping), "sleeping")
	gauge(tasksDesc, float64(work.Waiting), "waiting")
	gauge(tasksDesc, float64(work.Running), "running")
	gauge(tasksDesc, float64(work.Long), "long")
	for _, c := range f.certs {
		if c != nil {
			gauge(expiryDesc, float64(c.expiry().Unix()), c.name)
		}
	}
}

// group gives the figures of the control group (version 1 or 2) that the process
// is in. What the machine does not tell is left out.
type group struct {
	root string // of the file system: "/"
}

func newGroup(root string) *group { return &group{root} }

var (
	limitDesc = prometheus.NewDesc("gatehouse_memory_limit_bytes",
		"Memory limit of the process, in bytes; left out where there is none.", nil, nil)
	periodsDesc = prometheus.NewDesc("gatehouse_cgroup_cpu_periods_total",
		"Periods of the CPU quota in which the control group had work to do.", nil, nil)
	throttledDesc = prometheus.NewDesc("gatehouse_cgroup_cpu_throttled_periods_total",
		"Periods of the CPU quota in which the control group was stopped since it had used it up.", nil, nil)
	throttledTimeDesc = prometheus.NewDesc("gatehouse_cgroup_cpu_throttled_seconds_total",
		"Time for which the control group was stopped since it had used up its CPU quota, in seconds of all CPUs.", nil, nil)
	quotaDesc = prometheus.NewDesc("gatehouse_cgroup_cpu_quota",
		"CPU quota of the control group, or of the one above it that has the least, in CPUs; left out where there is none.", nil, nil)

	groupDescs = []*prometheus.Desc{limitDesc, periodsDesc, throttledDesc, throttledTimeDesc, quotaDesc}
)

// Describe implements prometheus.Collector.
func (g *group) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range groupDescs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (g *group) Collect(ch chan<- prometheus.Metric) {
	if limit := debug.SetMemoryLimit(-1); limit != math.MaxInt64 {
		ch <- prometheus.MustNewConstMetric(limitDesc, prometheus.GaugeValue, float64(limit))
	}
	if quota := cpuQuota(g.root); quota > 0 {
		ch <- prometheus.MustNewConstMetric(quotaDesc, prometheus.GaugeValue, quota)
	}
	stat := cpuStat(g.root)
	send := func(d *prometheus.Desc, key string, scale float64) {
		if n, ok := stat[key]; ok {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, n*scale)
		}
	}
	send(periodsDesc, "nr_periods", 1)
	send(throttledDesc, "nr_throttled", 1)
	send(throttledTimeDesc, "throttled_usec", 1e-6) // version 2
	send(throttledTimeDesc, "throttled_time", 1e-9) // version 1
}

// cpuStat reads the cpu.stat of the process's own group.
func cpuStat(root string) map[string]float64 {
	for dir := range groups(root) {
		data, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
		if err != nil {
			continue // in a container the group's own name may not be visible
		}
		stat := map[string]float64{}
		for line := range strings.Lines(string(data)) {
			if key, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
				if n, err := strconv.ParseUint(value, 10, 64); err == nil {
					stat[key] = float64(n)
				}
			}
		}
		return stat
	}
	return nil
}

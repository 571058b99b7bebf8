package decisionlog

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the instruments of all logs. Those that count events are read from
// the logs when asked for, so that they balance in each scrape.
type metrics struct {
	logs    *Logs
	seconds *prometheus.HistogramVec
	sinks   [kinds]sinkCounts

	eventsDesc, droppedDesc, bufferedDesc, bytesDesc, stuckDesc, sinkDesc *prometheus.Desc
}

// sinkCounts count the events of sinks of one kind: one that goes to two sinks
// counts twice.
type sinkCounts struct {
	delivered, dropped atomic.Uint64
}

func newMetrics(ls *Logs) *metrics {
	m := &metrics{
		logs: ls,
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "gatehouse_decision_log_delivery_seconds",
			Help:    "Time of one attempt to deliver a chunk of decisions, in seconds, by kind of sink and result: ok, error.",
			Buckets: []float64{.0001, .001, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"sink", "result"}),
		eventsDesc: prometheus.NewDesc("gatehouse_decision_log_events_total",
			"Decisions by state: recorded, delivered (to all sinks of the tenant), dropped. Those recorded are those delivered, dropped and buffered.",
			[]string{"state"}, nil),
		bufferedDesc: prometheus.NewDesc("gatehouse_decision_log_buffered_events",
			"Decisions that are neither delivered nor dropped.", nil, nil),
		droppedDesc: prometheus.NewDesc("gatehouse_decision_log_dropped_total",
			"Decisions dropped, by reason.", []string{"reason"}, nil),
		bytesDesc: prometheus.NewDesc("gatehouse_decision_log_buffered_bytes",
			"Estimate of what buffered decisions take in memory, in bytes.", nil, nil),
		stuckDesc: prometheus.NewDesc("gatehouse_decision_log_stuck_filters",
			"Evaluations of drop and mask rules that still run although their time is over.", nil, nil),
		sinkDesc: prometheus.NewDesc("gatehouse_decision_log_sink_events_total",
			"Decisions by kind of sink and state: delivered, dropped. One that goes to several sinks counts for each.",
			[]string{"sink", "state"}, nil),
	}
	if reg := ls.cfg.Registerer; reg != nil {
		reg.MustRegister(m, m.seconds)
	}
	return m
}

// settled counts events that a sink has, or will never have.
func (m *metrics) settled(k kind, n int, why reason) {
	if why == notDropped {
		m.sinks[k].delivered.Add(uint64(n))
	} else {
		m.sinks[k].dropped.Add(uint64(n))
	}
}

// tried notes an attempt.
func (m *metrics) tried(k kind, took time.Duration, err error) {
	result := "ok"
	if err != nil {
		result = "error"
	}
	m.seconds.WithLabelValues(kindNames[k], result).Observe(took.Seconds())
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.eventsDesc, m.droppedDesc, m.bufferedDesc, m.bytesDesc, m.stuckDesc, m.sinkDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, n uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(n), labels...)
	}
	gauge := func(d *prometheus.Desc, n int64) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(n))
	}
	b, bytes := m.logs.snapshot()
	dropped := b.allDropped()
	counter(m.eventsDesc, b.recorded, "recorded")
	counter(m.eventsDesc, b.delivered, "delivered")
	counter(m.eventsDesc, dropped, "dropped")
	gauge(m.bufferedDesc, int64(b.recorded-b.delivered-dropped))
	for why, n := range b.dropped {
		if reason(why) != notDropped {
			counter(m.droppedDesc, n, reasonNames[why])
		}
	}
	gauge(m.bytesDesc, bytes)
	gauge(m.stuckDesc, m.logs.stuck.Load())
	for k := range m.sinks {
		counter(m.sinkDesc, m.sinks[k].delivered.Load(), kindNames[k], "delivered")
		counter(m.sinkDesc, m.sinks[k].dropped.Load(), kindNames[k], "dropped")
	}
}

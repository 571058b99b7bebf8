package telemetry

import (
	"context"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
)

// Regression: The bridge gave the IDs of exemplars as text, and collectors refused
// all metrics with them.
func TestExemplars(t *testing.T) {
	registry := prometheus.NewRegistry()
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "h", Buckets: []float64{1, 2}})
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "c_total"})
	registry.MustRegister(h, c)
	ids := prometheus.Labels{"trace_id": "4bf92f3577b34da6a3ce929d0e0e4736", "span_id": "00f067aa0ba902b7"}
	h.(prometheus.ExemplarObserver).ObserveWithExemplar(0.5, ids)
	h.(prometheus.ExemplarObserver).ObserveWithExemplar(1.5, prometheus.Labels{"trace_id": "x", "span_id": "y"})
	c.(prometheus.ExemplarAdder).AddWithExemplar(1, ids)
	scopes, err := newProducer(registry).Produce(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	check := func(list []metricdata.Exemplar[float64]) {
		for _, e := range list {
			got++
			if len(e.TraceID) != 16 || len(e.SpanID) != 8 || e.TraceID[0] != 0x4b || e.SpanID[7] != 0xb7 {
				t.Errorf("got %x, %x", e.TraceID, e.SpanID)
			}
		}
	}
	for _, s := range scopes {
		for _, m := range s.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Histogram[float64]:
				check(d.DataPoints[0].Exemplars)
			case metricdata.Sum[float64]:
				check(d.DataPoints[0].Exemplars)
			}
		}
	}
	if got != 2 {
		t.Errorf("got %d exemplars, want 2", got)
	}
}

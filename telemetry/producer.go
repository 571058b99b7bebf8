package telemetry

import (
	"context"

	promexporter "go.opentelemetry.io/contrib/bridges/prometheus"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/trace"
)

// producer gives what a gatherer gathers to OpenTelemetry. The bridge has the IDs
// of exemplars as text, 32 and 16 bytes, and a collector refuses all metrics for
// one of them: they are 16 and 8 bytes (v0.72.0, convertExemplar).
type producer struct{ metric.Producer }

func newProducer(g prometheus.Gatherer) *producer {
	return &producer{promexporter.NewMetricProducer(promexporter.WithGatherer(g))}
}

// Produce implements metric.Producer.
func (p *producer) Produce(ctx context.Context) ([]metricdata.ScopeMetrics, error) {
	scopes, err := p.Producer.Produce(ctx)
	for _, s := range scopes {
		for _, m := range s.Metrics {
			switch data := m.Data.(type) {
			case metricdata.Histogram[float64]:
				for i := range data.DataPoints {
					data.DataPoints[i].Exemplars = identified(data.DataPoints[i].Exemplars)
				}
			case metricdata.Sum[float64]:
				for i := range data.DataPoints {
					data.DataPoints[i].Exemplars = identified(data.DataPoints[i].Exemplars)
				}
			}
		}
	}
	return scopes, err
}

// identified has the IDs of exemplars as they are, and leaves out those that have
// others.
func identified(list []metricdata.Exemplar[float64]) []metricdata.Exemplar[float64] {
	kept := list[:0]
	for _, e := range list {
		if len(e.TraceID) != 16 || len(e.SpanID) != 8 {
			traceID, err := trace.TraceIDFromHex(string(e.TraceID))
			if err != nil {
				continue
			}
			spanID, err := trace.SpanIDFromHex(string(e.SpanID))
			if err != nil {
				continue
			}
			e.TraceID, e.SpanID = traceID[:], spanID[:]
		}
		kept = append(kept, e)
	}
	return kept
}

package telemetry

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// counted counts the spans that an exporter sends.
type counted struct {
	sdktrace.SpanExporter
	recorded, sent, failed prometheus.Counter
}

func newCounted(e sdktrace.SpanExporter, reg prometheus.Registerer) *counted {
	spans := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "gatehouse_telemetry_spans_total",
		Help: "Spans by state: recorded, sent (to the collector), failed (not sent, and lost). Those recorded that are neither sent nor failed wait, or found no room.",
	}, []string{"state"})
	if reg != nil {
		reg.MustRegister(spans)
	}
	return &counted{e, spans.WithLabelValues("recorded"), spans.WithLabelValues("sent"), spans.WithLabelValues("failed")}
}

// ExportSpans implements sdktrace.SpanExporter.
func (c *counted) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := c.SpanExporter.ExportSpans(ctx, spans)
	if err != nil {
		c.failed.Add(float64(len(spans)))
		return err
	}
	c.sent.Add(float64(len(spans)))
	return nil
}

// counting counts the spans that a processor is given.
func (c *counted) counting(p sdktrace.SpanProcessor) sdktrace.SpanProcessor {
	return &countingProcessor{p, c.recorded}
}

type countingProcessor struct {
	sdktrace.SpanProcessor
	recorded prometheus.Counter
}

// OnEnd implements sdktrace.SpanProcessor.
func (p *countingProcessor) OnEnd(s sdktrace.ReadOnlySpan) {
	p.recorded.Inc()
	p.SpanProcessor.OnEnd(s)
}

// Package telemetry sends: spans and metrics, over OTLP, to an OpenTelemetry
// collector.
//
// In the common case a Telemetry is made of the operator's file, its tracers are
// given to those that make spans, and Shutdown sends at the end what is left.
// Only this package knows OpenTelemetry's SDK: the others make spans by its API
// alone, and none where they have no tracer.
//
// What the others lean on:
//
//   - Ending a span never waits. What is to be sent waits in a queue of QueueSpans
//     spans, and what it has no room for is dropped and counted.
//   - A collector that is away, refuses, or says nothing costs two goroutines and
//     what the queue holds, and no more however long it lasts.
//   - Nothing of the process's own is set, but for the handler of the SDK's
//     errors, which has none other.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// The bounds of what waits to be sent.
const (
	QueueSpans = 4096            // that wait; what comes beside is dropped
	BatchSpans = 512             // in one request
	BatchTime  = 2 * time.Second // that a span waits for others, at most

	maxSpanAttributes = 128
	maxSpanEvents     = 64
	maxSpanLinks      = 64
	maxAttributeBytes = 4 << 10
)

// Config says what is sent, and where. The zero fields of it, but for OTLP, are
// good.
type Config struct {
	// OTLP is where it goes.
	OTLP OTLP

	// Traces has spans sent. Sampling is which part of the traces that begin
	// here is recorded, from 0 to 1, ControlSampling the same of those of the
	// control plane. What a caller's trace says is always heeded.
	Traces          bool
	Sampling        float64
	ControlSampling float64

	// Metrics has what Gatherer gathers sent every Interval, which is 60 s
	// unless it is positive.
	Metrics  bool
	Interval time.Duration
	Gatherer prometheus.Gatherer

	// Version and Instance name what sends: the version of the service, and this
	// one of those that run. Attributes are those of the resource beside, and win.
	Version, Instance string
	Attributes        map[string]string

	// Registerer takes the metrics of what is sent. Optional.
	Registerer prometheus.Registerer

	// Logger takes what goes wrong, at most one line in 10 s. Optional.
	Logger *slog.Logger
}

// Telemetry sends. A nil one is off: it has no tracers, and nothing to shut down.
type Telemetry struct {
	resource *resource.Resource
	tracers  *sdktrace.TracerProvider // nil: no spans are sent
	meters   *metric.MeterProvider    // nil: no metrics are sent
	sampling struct{ decisions, control float64 }
	closers  []func(context.Context) error
}

// New returns what sends as c says. It asks nobody: a collector that is away is
// tried again when there is something to send.
func New(c Config) (*Telemetry, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	target, err := c.OTLP.target()
	if err != nil {
		return nil, err
	}
	t := &Telemetry{}
	t.sampling.decisions, t.sampling.control = c.Sampling, c.ControlSampling
	if t.resource, err = c.resource(); err != nil {
		return nil, fmt.Errorf("telemetry resource: %w", err)
	}
	otel.SetErrorHandler(newErrorLog(c.Logger, c.OTLP.secrets()))
	if c.Traces {
		if err := t.trace(&c, target); err != nil {
			return nil, err
		}
	}
	if c.Metrics {
		if err := t.measure(&c, target); err != nil {
			return nil, errors.Join(err, t.Shutdown(context.Background()))
		}
	}
	return t, nil
}

// resource is what the telemetry is of.
func (c *Config) resource() (*resource.Resource, error) {
	attrs := []attribute.KeyValue{
		semconv.ServiceName("gatehouse"),
		semconv.ServiceVersion(c.Version),
		semconv.ServiceInstanceID(c.Instance),
	}
	for k, v := range c.Attributes {
		attrs = append(attrs, attribute.String(k, v))
	}
	r, err := resource.New(context.Background(), resource.WithFromEnv(), resource.WithTelemetrySDK(), resource.WithAttributes(attrs...))
	if errors.Is(err, resource.ErrPartialResource) { // what the environment says beside is no reason to fail
		c.Logger.Warn("OTEL_RESOURCE_ATTRIBUTES cannot be read", "error", err)
		err = nil
	}
	return r, err
}

// Resource is what the telemetry is of.
func (t *Telemetry) Resource() *resource.Resource { return t.resource }

func (t *Telemetry) trace(c *Config, target target) error {
	exporter, err := target.spans()
	if err != nil {
		return fmt.Errorf("exporter of spans: %w", err)
	}
	counted := newCounted(exporter, c.Registerer)
	batches := sdktrace.NewBatchSpanProcessor(counted,
		sdktrace.WithMaxQueueSize(QueueSpans),
		sdktrace.WithMaxExportBatchSize(BatchSpans),
		sdktrace.WithBatchTimeout(BatchTime),
		sdktrace.WithExportTimeout(target.timeout),
	)
	t.tracers = sdktrace.NewTracerProvider(
		sdktrace.WithResource(t.resource),
		// Which traces begin is decided before it comes to that: see Decisions.
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.AlwaysSample())),
		sdktrace.WithRawSpanLimits(sdktrace.SpanLimits{
			AttributeValueLengthLimit: maxAttributeBytes, AttributeCountLimit: maxSpanAttributes,
			EventCountLimit: maxSpanEvents, LinkCountLimit: maxSpanLinks,
			AttributePerEventCountLimit: 8, AttributePerLinkCountLimit: 8,
		}),
		sdktrace.WithSpanProcessor(counted.counting(batches)),
	)
	t.closers = append(t.closers, t.tracers.Shutdown, exporter.Shutdown)
	return nil
}

func (t *Telemetry) measure(c *Config, target target) error {
	exporter, err := target.metrics()
	if err != nil {
		return fmt.Errorf("exporter of metrics: %w", err)
	}
	interval := c.Interval
	if interval <= 0 {
		interval = time.Minute
	}
	reader := metric.NewPeriodicReader(exporter,
		metric.WithInterval(interval),
		metric.WithTimeout(target.timeout),
		metric.WithProducer(newProducer(c.Gatherer)),
	)
	t.meters = metric.NewMeterProvider(metric.WithResource(t.resource), metric.WithReader(reader))
	t.closers = append(t.closers, t.meters.Shutdown)
	return nil
}

// scope names who makes the spans.
const scope = "github.com/gatehouse-authz/gatehouse"

// Decisions makes the spans of decisions; nil: there are none.
func (t *Telemetry) Decisions() trace.Tracer {
	if t == nil || t.tracers == nil {
		return nil
	}
	return &tracer{Tracer: t.tracers.Tracer(scope), share: t.sampling.decisions}
}

// Control makes the spans of the control plane; nil: there are none.
func (t *Telemetry) Control() trace.Tracer {
	if t == nil || t.tracers == nil || t.sampling.control <= 0 {
		return nil
	}
	return &tracer{Tracer: t.tracers.Tracer(scope), share: t.sampling.control}
}

// tracer begins no more than a share of the traces that are its own. Those that
// are not begun cost a random number: the SDK would make up IDs first.
type tracer struct {
	trace.Tracer
	share float64
}

var noSpan = func() trace.Span {
	_, span := noop.NewTracerProvider().Tracer("").Start(context.Background(), "")
	return span
}()

// Start implements trace.Tracer.
func (t *tracer) Start(ctx context.Context, name string, opts ...trace.SpanStartOption) (context.Context, trace.Span) {
	if t.share < 1 && !trace.SpanContextFromContext(ctx).IsValid() && rand.Float64() >= t.share {
		return ctx, noSpan
	}
	return t.Tracer.Start(ctx, name, opts...)
}

// Shutdown sends what is left, no longer than ctx lasts, and ends. What was not
// sent by then is lost. It returns an error that says so.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	if t == nil {
		return nil
	}
	errs := make([]error, len(t.closers))
	var closing sync.WaitGroup
	for i, shut := range t.closers {
		closing.Go(func() { errs[i] = shut(ctx) })
		if i == 0 && t.tracers != nil {
			closing.Wait() // the exporter after what exports by it, or when ctx has ended
		}
	}
	closing.Wait()
	return errors.Join(errs...)
}

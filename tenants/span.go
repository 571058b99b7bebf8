package tenants

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Tracing says where spans go. The zero Tracing makes none, and costs nothing.
type Tracing struct {
	// Decisions makes one span for each decision that is to be recorded: its
	// caller's trace is, or it has no caller's trace and the tracer samples it.
	// Nil: there are none.
	Decisions trace.Tracer

	// Control makes one span for each round trip of the control plane: a request
	// for a bundle, an activation, a report. Nil: there are none.
	Control trace.Tracer

	// Prints makes an event of the span of what a policy prints. What a policy
	// prints may be secret. Without it, print does nothing.
	Prints bool
}

// The attributes of spans, beside those of the semantic conventions of
// OpenTelemetry. What a tenant's bundle says is bounded: at most maxAttributes of
// a kind, each of at most maxAttribute bytes.
const (
	attrTenant      = attribute.Key("gatehouse.tenant")
	attrDecisionID  = attribute.Key("gatehouse.decision.id")
	attrBatchID     = attribute.Key("gatehouse.decision.batch_id")
	attrOutcome     = attribute.Key("gatehouse.decision.outcome")
	attrDryRun      = attribute.Key("gatehouse.decision.dry_run")
	attrGuard       = attribute.Key("gatehouse.decision.guard")
	attrEntry       = attribute.Key("gatehouse.entry_point")
	attrWait        = attribute.Key("gatehouse.wait.duration")       // seconds before a worker took it
	attrEvaluation  = attribute.Key("gatehouse.evaluation.duration") // seconds
	attrBundles     = attribute.Key("gatehouse.bundle.names")
	attrRevisions   = attribute.Key("gatehouse.bundle.revisions")
	attrLabel       = "gatehouse.label."
	attrSource      = attribute.Key("gatehouse.bundle.source") // http, s3 or directory
	attrResource    = attribute.Key("gatehouse.bundle.resource")
	attrResult      = attribute.Key("gatehouse.bundle.result")
	attrBundleBytes = attribute.Key("gatehouse.bundle.size") // bytes
	attrFirst       = attribute.Key("gatehouse.bundle.first")
	attrPrint       = attribute.Key("gatehouse.print")

	maxAttributes = 32
	maxAttribute  = 256
)

// shorten cuts what is longer than an attribute may be.
func shorten(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxAttribute)], "\ufffd") // anything else cannot be sent
}

// span begins the span of a question. Nil: it is not recorded.
func (c *call) span(q *Question, begun time.Time) trace.Span {
	tracer := c.pool.cfg.Tracing.Decisions
	if tracer == nil || q.Unsampled {
		return nil
	}
	ctx := context.Background()
	if parent := q.Trace.context(); parent.IsValid() {
		ctx = trace.ContextWithRemoteSpanContext(ctx, parent)
	}
	kind := trace.SpanKindServer
	if q.Batch != nil {
		kind = trace.SpanKindInternal
	}
	_, span := tracer.Start(ctx, "decision", trace.WithTimestamp(begun), trace.WithSpanKind(kind))
	if !span.IsRecording() {
		return nil
	}
	return span
}

// tracedAs returns q with the IDs of its span, under which the decision is
// logged.
func tracedAs(q *Question, span trace.Span) *Question {
	own := *q
	id := span.SpanContext()
	own.TraceID, own.SpanID = id.TraceID().String(), id.SpanID().String()
	return &own
}

// recordTraced records the answer to a twin, which has a span of its own where its
// question has one.
func (c *call) recordTraced(q *Question, a *Answer, r *result, took time.Duration) error {
	if r.span == nil {
		return c.record(q, a, r, took)
	}
	own := trace.ContextWithSpanContext(context.Background(), r.span.SpanContext())
	_, span := c.pool.cfg.Tracing.Decisions.Start(own, "decision", trace.WithSpanKind(trace.SpanKindInternal))
	if !span.IsRecording() {
		return c.record(q, a, r, took)
	}
	defer c.endSpan(span, q, a, r)
	return c.record(tracedAs(q, span), a, r, took)
}

// endSpan says what became of the question, and ends its span.
func (c *call) endSpan(span trace.Span, q *Question, a *Answer, r *result) {
	if span == nil {
		return
	}
	name := outcomeNames[outcomeOf(a)]
	attrs := make([]attribute.KeyValue, 0, 16)
	attrs = append(attrs,
		attrTenant.String(string(c.in.id)), attrDecisionID.String(q.DecisionID), attrOutcome.String(name),
		attrEntry.String(shorten(c.shownEntry(q))))
	if q.BatchDecisionID != "" {
		attrs = append(attrs, attrBatchID.String(q.BatchDecisionID))
	}
	if a.DryRun {
		attrs = append(attrs, attrDryRun.Bool(true))
	}
	if a.Guard {
		attrs = append(attrs, attrGuard.Bool(true))
	}
	if r.waited > 0 {
		attrs = append(attrs, attrWait.Float64(r.waited.Seconds()))
	}
	if d := r.observed.Duration; d > 0 {
		attrs = append(attrs, attrEvaluation.Float64(d.Seconds()))
	}
	if c.rev != nil {
		attrs = append(attrs, revisionAttrs(c.rev.policy.Revisions())...)
		attrs = append(attrs, c.pool.labelAttrs(c.in)...)
	}
	if a.Err != nil {
		span.SetStatus(codes.Error, faultText(a.Err))
		attrs = append(attrs, semconv.ErrorTypeKey.String(name))
	}
	span.SetAttributes(attrs...)
	for _, p := range r.observed.Prints {
		span.AddEvent("print", trace.WithTimestamp(p.At), trace.WithAttributes(
			attrPrint.String(p.Text), semconv.CodeFilePath(shorten(p.File)), semconv.CodeLineNumber(p.Line)))
	}
	span.End()
}

// exemplar names the trace of what was observed.
func exemplar(span trace.Span) prometheus.Labels {
	id := span.SpanContext()
	return prometheus.Labels{"trace_id": id.TraceID().String(), "span_id": id.SpanID().String()}
}

// shownEntry is the entry point that a question is for.
func (c *call) shownEntry(q *Question) string {
	if q.Entry == "" {
		return c.in.settings.Entry
	}
	return q.Entry
}

// revisionAttrs name the bundles that decide.
func revisionAttrs(revisions []policy.Revision) []attribute.KeyValue {
	revisions = revisions[:min(len(revisions), maxAttributes)]
	names, which := make([]string, len(revisions)), make([]string, len(revisions))
	for i, r := range revisions {
		names[i], which[i] = shorten(r.Name), shorten(r.Revision)
	}
	return []attribute.KeyValue{attrBundles.StringSlice(names), attrRevisions.StringSlice(which)}
}

// labelAttrs are the labels of a tenant, without those that its resource and its
// name say already.
func (p *Pool) labelAttrs(in *instance) []attribute.KeyValue {
	labels := in.settings.Labels
	attrs := make([]attribute.KeyValue, 0, len(labels))
	for k, v := range labels {
		if len(attrs) == maxAttributes {
			break
		}
		attrs = append(attrs, attribute.String(attrLabel+shorten(k), shorten(v)))
	}
	return attrs
}

// faultText says what kind of fault it is, and where in the policy: what an error
// itself says may quote the input.
func faultText(err error) string {
	text := "decision failed"
	for _, f := range faults {
		if errors.Is(err, f) {
			text = f.Error()
			break
		}
	}
	if place := policy.PlaceOf(err); place != "" {
		text += " at " + shorten(place)
	}
	if errors.Is(err, ErrGuard) {
		text = ErrGuard.Error() + ": " + text
	}
	return text
}

// faults are all that an Answer's error may be.
var faults = []error{
	ErrNotLogged, ErrPanic, policy.ErrUndefined, policy.ErrConflict, policy.ErrResult, policy.ErrCanceled, policy.ErrEval,
	policy.ErrEntry, ErrDeadline, ErrBusy, ErrNotReady, ErrInvalid, ErrTooLarge, ErrPartialBody, ErrEntry, ErrUnknown,
}

// roundTrip is the span of one round trip of the control plane. Nil: there is
// none.
type roundTrip struct{ span trace.Span }

// roundTrip begins one.
func (t *Tracing) roundTrip(ctx context.Context, name string, kind trace.SpanKind, opts ...trace.SpanStartOption) (context.Context, *roundTrip) {
	if t.Control == nil {
		return ctx, nil
	}
	ctx, span := t.Control.Start(ctx, name, append(opts, trace.WithSpanKind(kind), trace.WithNewRoot())...)
	if !span.IsRecording() {
		return ctx, nil
	}
	return ctx, &roundTrip{span}
}

func (r *roundTrip) set(attrs ...attribute.KeyValue) {
	if r != nil {
		r.span.SetAttributes(attrs...)
	}
}

// end ends it; an error says why it came to nothing.
func (r *roundTrip) end(err error) {
	if r == nil {
		return
	}
	if err != nil {
		r.span.SetStatus(codes.Error, shorten(err.Error()))
	}
	r.span.End()
}

// context is what others link to.
func (r *roundTrip) context() trace.SpanContext {
	if r == nil {
		return trace.SpanContext{}
	}
	return r.span.SpanContext()
}

// traceFetch begins the span of a request for a bundle. That of a folder of which
// nothing has changed is a few calls of stat: it has none.
func (fs *feeds) traceFetch(ctx context.Context, f *feed) (context.Context, *roundTrip) {
	source, ok := f.source.(*bundles.HTTP)
	if !ok || fs.tracing.Control == nil {
		return ctx, nil
	}
	ctx, r := fs.tracing.roundTrip(ctx, "bundle fetch", trace.SpanKindClient)
	r.set(attrSource.String(source.Kind()), attrResource.String(shorten(shownName(f.name))))
	return ctx, r
}

// shownName is the name of a bundle without its query, which may be secret.
func shownName(name string) string {
	name, _, _ = strings.Cut(name, "?")
	return name
}

// fetched ends the span of a request. Begun is when it was sent.
func (fs *feeds) fetched(r *roundTrip, f *feed, b *bundles.Bundle, err error, begun time.Time) trace.SpanContext {
	if fs.tracing.Control == nil || r == nil && errors.Is(err, bundles.ErrNotModified) {
		return trace.SpanContext{}
	}
	if r == nil {
		if _, r = fs.tracing.roundTrip(context.Background(), "bundle fetch", trace.SpanKindInternal, trace.WithTimestamp(begun)); r == nil {
			return trace.SpanContext{}
		}
		r.set(attrSource.String("directory"), attrResource.String(shorten(f.name)))
	}
	result := "failed"
	switch {
	case err == nil && b.Delta:
		result = "delta"
	case err == nil:
		result = "new"
	case errors.Is(err, bundles.ErrNotModified):
		result, err = "not_modified", nil
	case errors.Is(err, bundles.ErrNotFound):
		result = "not_found"
	case errors.Is(err, bundles.ErrRefused):
		result = "refused"
	case errors.Is(err, errInterrupted), errors.Is(err, errSlow):
		result, err = "interrupted", nil
	}
	r.set(attrResult.String(result))
	if b != nil {
		r.set(attrBundleBytes.Int64(b.Size))
	}
	if err != nil {
		r.set(semconv.ErrorTypeKey.String(result))
	}
	r.end(err)
	return r.context()
}

// traceActivation begins the span of making a policy of what these feeds have. It
// is linked to the requests that gave it.
func (p *Pool) traceActivation(in *instance, name string, feeds ...*feed) *roundTrip {
	if p.cfg.Tracing.Control == nil {
		return nil
	}
	var links []trace.Link
	for _, f := range feeds[:min(len(feeds), maxAttributes)] {
		f.mu.Lock()
		if f.traced.IsValid() {
			links = append(links, trace.Link{SpanContext: f.traced})
		}
		f.mu.Unlock()
	}
	_, r := p.cfg.Tracing.roundTrip(context.Background(), name, trace.SpanKindInternal, trace.WithLinks(links...))
	r.set(attrTenant.String(string(in.id)))
	return r
}

// activated ends the span of an activation.
func (r *roundTrip) activated(pol *policy.Policy, first bool, err error) {
	if r == nil {
		return
	}
	if pol != nil {
		r.set(revisionAttrs(slices.Clone(pol.Revisions()))...)
		r.set(attrFirst.Bool(first))
	}
	if err != nil {
		r.set(semconv.ErrorTypeKey.String("compile"))
	}
	r.end(err)
}

package decisionlog

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// uploadSpan is the span of one request that delivers a chunk. Nil: there is none.
type uploadSpan struct{ span trace.Span }

const (
	// maxLinks bounds the decisions that the span of a chunk is linked to: the
	// first that it has. maxLinkBytes bounds what is read of the chunk for them.
	maxLinks     = 8
	maxLinkBytes = 1 << 20

	maxSpanText = 256 // bytes of an error's text
)

// traced begins the span of a chunk that goes to a service or to S3. It names the
// tenant, how much there is, and some of the decisions.
func (o *outlet) traced(ctx context.Context, c *chunk) (context.Context, *uploadSpan) {
	tracer := o.log.logs.cfg.Tracer
	if tracer == nil || o.kind != kindService && o.kind != kindS3 {
		return ctx, nil
	}
	ctx, span := tracer.Start(ctx, "decision log upload", trace.WithSpanKind(trace.SpanKindClient), trace.WithNewRoot())
	if !span.IsRecording() {
		return ctx, nil
	}
	ids, links := linksOf(o.kind, c)
	for _, l := range links {
		span.AddLink(trace.Link{SpanContext: l})
	}
	span.SetAttributes(
		attribute.String("gatehouse.tenant", o.log.set.Tenant),
		attribute.String("gatehouse.decision_log.sink", kindNames[o.kind]),
		attribute.Int("gatehouse.decision_log.events", len(c.lens)),
		attribute.Int("gatehouse.decision_log.size", len(c.body)), // bytes
		attribute.StringSlice("gatehouse.decision.ids", ids),
	)
	return ctx, &uploadSpan{span}
}

// linksOf reads the IDs of the first decisions of a chunk, and those of their
// spans.
func linksOf(k kind, c *chunk) (ids []string, links []trace.SpanContext) {
	zr, err := gzip.NewReader(bytes.NewReader(c.body))
	if err != nil {
		return nil, nil
	}
	dec := json.NewDecoder(io.LimitReader(zr, maxLinkBytes))
	if k == kindService {
		if _, err := dec.Token(); err != nil { // the bracket of the array
			return nil, nil
		}
	}
	for len(ids) < min(maxLinks, len(c.lens)) {
		var event struct {
			DecisionID string `json:"decision_id"`
			TraceID    string `json:"trace_id"`
			SpanID     string `json:"span_id"`
		}
		if dec.Decode(&event) != nil {
			break
		}
		ids = append(ids, event.DecisionID)
		traceID, err := trace.TraceIDFromHex(event.TraceID)
		if err != nil {
			continue
		}
		if spanID, err := trace.SpanIDFromHex(event.SpanID); err == nil {
			links = append(links, trace.NewSpanContext(trace.SpanContextConfig{TraceID: traceID, SpanID: spanID}))
		}
	}
	return ids, links
}

// ended ends the span.
func (u *uploadSpan) ended(err error) {
	if u == nil {
		return
	}
	if err != nil {
		text := err.Error()
		u.span.SetStatus(codes.Error, strings.ToValidUTF8(text[:min(len(text), maxSpanText)], "\ufffd"))
	}
	u.span.End()
}

// propagate names the span of a request's context, if that has one, to who is
// asked, and tells the span who that is. Of the URL the span has the host, the port
// and the path: a query may be secret. It is called before the request is signed.
func propagate(req *http.Request) {
	span := trace.SpanFromContext(req.Context())
	if !span.IsRecording() {
		return
	}
	propagation.TraceContext{}.Inject(req.Context(), propagation.HeaderCarrier(req.Header))
	path := req.URL.Path
	span.SetAttributes(
		semconv.HTTPRequestMethodKey.String(req.Method),
		semconv.URLScheme(req.URL.Scheme),
		semconv.ServerAddress(req.URL.Hostname()),
		semconv.URLPath(strings.ToValidUTF8(path[:min(len(path), maxSpanText)], "\ufffd")),
	)
	if port, err := strconv.Atoi(req.URL.Port()); err == nil {
		span.SetAttributes(semconv.ServerPort(port))
	}
}

// answered tells the span of a request what it was answered with.
func answered(ctx context.Context, resp *http.Response) {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(semconv.HTTPResponseStatusCode(resp.StatusCode))
	}
}

package bundles

import (
	"context"
	"net/http"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// Trace names the span of a request's context, if that has one, to who is asked,
// and tells the span who that is. Of the URL the span has the host, the port and the
// path: a query may be secret. It is called before the request is signed.
func Trace(req *http.Request) {
	span := trace.SpanFromContext(req.Context())
	if !span.IsRecording() {
		return
	}
	propagation.TraceContext{}.Inject(req.Context(), propagation.HeaderCarrier(req.Header))
	span.SetAttributes(
		semconv.HTTPRequestMethodKey.String(req.Method),
		semconv.URLScheme(req.URL.Scheme),
		semconv.ServerAddress(req.URL.Hostname()),
		semconv.URLPath(strings.ToValidUTF8(brief(req.URL.Path), "\ufffd")),
	)
	if port, err := strconv.Atoi(req.URL.Port()); err == nil {
		span.SetAttributes(semconv.ServerPort(port))
	}
}

// Traced tells the span of a request's context, if that has one, what it was
// answered with.
func Traced(ctx context.Context, resp *http.Response) {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(semconv.HTTPResponseStatusCode(resp.StatusCode))
	}
}

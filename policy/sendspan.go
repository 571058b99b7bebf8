package policy

import (
	"net/http"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// sendSpan is the span of one request of http.send. Nil: there is none.
type sendSpan struct{ span trace.Span }

// traced begins a span of a request whose evaluation has one that is recorded, and
// names it to who is asked. Of the URL the span has the host, the port and the
// path: a query may be secret.
func traced(req *http.Request) (*http.Request, *sendSpan) {
	parent := trace.SpanFromContext(req.Context())
	if !parent.IsRecording() {
		return req, nil
	}
	method := req.Method
	if !isMethod(method) {
		method = "_OTHER"
	}
	ctx, span := parent.TracerProvider().Tracer("github.com/gatehouse-authz/gatehouse/policy").Start(req.Context(), method,
		trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(
			semconv.HTTPRequestMethodKey.String(method),
			semconv.URLScheme(req.URL.Scheme),
			semconv.ServerAddress(req.URL.Hostname()),
			semconv.URLPath(shortened(req.URL.Path)),
		))
	if port, err := strconv.Atoi(req.URL.Port()); err == nil {
		span.SetAttributes(semconv.ServerPort(port))
	}
	own := req.Clone(ctx) // a RoundTripper must not change what it is given
	propagation.TraceContext{}.Inject(ctx, propagation.HeaderCarrier(own.Header))
	return own, &sendSpan{span}
}

// maxSpanText bounds a text that a span has, in bytes.
const maxSpanText = 256

func shortened(s string) string {
	return strings.ToValidUTF8(s[:min(len(s), maxSpanText)], "\ufffd")
}

// isMethod reports whether a method is one that the semantic conventions know.
func isMethod(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete,
		http.MethodConnect, http.MethodOptions, http.MethodTrace, "QUERY":
		return true
	}
	return false
}

// ended ends the span when the headers of the answer are there, or an error.
func (s *sendSpan) ended(status int, err error) {
	if s == nil {
		return
	}
	switch {
	case err != nil:
		s.span.SetStatus(codes.Error, shortened(err.Error()))
		s.span.SetAttributes(semconv.ErrorTypeOther)
	default:
		s.span.SetAttributes(semconv.HTTPResponseStatusCode(status))
		if status >= 400 {
			s.span.SetStatus(codes.Error, "")
			s.span.SetAttributes(semconv.ErrorTypeKey.String(strconv.Itoa(status)))
		}
	}
	s.span.End()
}

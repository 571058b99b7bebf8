package extauthz

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
)

// traceParent is the header in which a caller names its trace
// (https://www.w3.org/TR/trace-context/#traceparent-header).
const traceParent = "traceparent"

// traceOf returns the IDs of the trace and the span that a check belongs to: those
// of the call itself, else those of the checked request. They are empty where
// neither names a valid one.
func traceOf(ctx context.Context, req *authv3.CheckRequest) (trace, span string) {
	if values := metadata.ValueFromIncomingContext(ctx, traceParent); len(values) == 1 {
		if trace, span := parseTrace(values[0]); trace != "" {
			return trace, span
		}
	}
	http := req.GetAttributes().GetRequest().GetHttp()
	if headers := http.GetHeaders(); len(headers) > 0 {
		return parseTrace(headers[traceParent])
	}
	var value string
	for _, h := range http.GetHeaderMap().GetHeaders() {
		if !strings.EqualFold(h.GetKey(), traceParent) {
			continue
		}
		if value != "" {
			return "", "" // no telling which
		}
		if value = h.GetValue(); value == "" {
			value = string(h.GetRawValue())
		}
	}
	return parseTrace(value)
}

// parseTrace reads VERSION-TRACE-SPAN-FLAGS, in lower case. A version that is not
// known may have more after it.
func parseTrace(value string) (trace, span string) {
	const length = len("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	if len(value) < length || value[2] != '-' || value[35] != '-' || value[52] != '-' {
		return "", ""
	}
	version, flags := value[:2], value[53:length]
	trace, span = value[3:35], value[36:52]
	switch {
	case !isHex(version) || !isHex(trace) || !isHex(span) || !isHex(flags),
		version == "ff",
		version == "00" && len(value) > length,
		len(value) > length && value[length] != '-',
		strings.Trim(trace, "0") == "" || strings.Trim(span, "0") == "":
		return "", ""
	}
	return trace, span
}

// isHex reports whether s has only digits of hexadecimal numbers, in lower case.
func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

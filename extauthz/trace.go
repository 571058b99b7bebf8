package extauthz

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// traceParent is the header in which a caller names its trace.
const traceParent = "traceparent"

// traceOf returns the IDs of the trace and the span that a check belongs to: those
// of the call itself, else those of the checked request. They are empty where
// neither names a valid one.
func traceOf(ctx context.Context, req *authv3.CheckRequest) (trace, span string) {
	if values := metadata.ValueFromIncomingContext(ctx, traceParent); len(values) == 1 {
		if trace, span := tenants.ParseTrace(values[0]); trace != "" {
			return trace, span
		}
	}
	http := req.GetAttributes().GetRequest().GetHttp()
	if headers := http.GetHeaders(); len(headers) > 0 {
		return tenants.ParseTrace(headers[traceParent])
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
	return tenants.ParseTrace(value)
}

package extauthz

import (
	"context"
	"strings"

	"google.golang.org/grpc/metadata"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// traceOf returns the trace that a check belongs to: that of the call itself, else
// that of the checked request.
func traceOf(ctx context.Context, req *authv3.CheckRequest, propagators tenants.Propagators) tenants.Trace {
	t := propagators.Read(func(name string) string {
		if values := metadata.ValueFromIncomingContext(ctx, name); len(values) == 1 {
			return values[0]
		}
		return ""
	})
	if t.TraceID != "" || t.Unsampled {
		return t
	}
	http := req.GetAttributes().GetRequest().GetHttp()
	return propagators.Read(func(name string) string {
		if headers := http.GetHeaders(); len(headers) > 0 {
			return headers[name]
		}
		var value string
		for _, h := range http.GetHeaderMap().GetHeaders() {
			if !strings.EqualFold(h.GetKey(), name) {
				continue
			}
			if value != "" {
				return "" // no telling which
			}
			if value = h.GetValue(); value == "" {
				value = string(h.GetRawValue())
			}
		}
		return value
	})
}

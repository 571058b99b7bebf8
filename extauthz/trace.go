package extauthz

import (
	"context"
	"strings"

	"github.com/gatehouse-authz/gatehouse/tenants"
	"google.golang.org/grpc/metadata"
)

// traceOf returns the trace that a check belongs to: that of the call itself, else
// that of the checked request.
func traceOf(ctx context.Context, a *asked, propagators tenants.Propagators) tenants.Trace {
	t := propagators.Read(func(name string) string {
		if values := metadata.ValueFromIncomingContext(ctx, name); len(values) == 1 {
			return values[0]
		}
		return ""
	})
	if t.TraceID != "" || t.Unsampled {
		return t
	}
	return propagators.Read(func(name string) string {
		if len(a.http.headers) > 0 {
			return a.http.headers.value(name)
		}
		var value string
		for _, h := range a.http.headerMap.GetHeaders() {
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

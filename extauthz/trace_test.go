package extauthz

import (
	"context"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/grpc/metadata"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

const (
	traceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	spanID  = "00f067aa0ba902b7"
	parent  = "00-" + traceID + "-" + spanID + "-01"
)

func TestReadTraceParent(t *testing.T) {
	valid := []string{
		parent,
		"00-" + traceID + "-" + spanID + "-00",
		"cc-" + traceID + "-" + spanID + "-01",
		"cc-" + traceID + "-" + spanID + "-01-what the future will be like",
	}
	for _, value := range valid {
		if got := traceParent(value); got.TraceID != traceID || got.SpanID != spanID {
			t.Errorf("%q: got %+v", value, got)
		}
	}
	invalid := []string{
		"",
		"00",
		parent[:len(parent)-1],
		parent + "-",
		parent + ",",
		parent + "," + parent,
		" " + parent,
		"ff-" + traceID + "-" + spanID + "-01",
		"0g-" + traceID + "-" + spanID + "-01",
		"cc-" + traceID + "-" + spanID + "-01.more",
		"00-" + strings.ToUpper(traceID) + "-" + spanID + "-01",
		"00-" + traceID + "-" + strings.ToUpper(spanID) + "-01",
		"00-" + traceID + "-" + spanID + "-0A",
		"00-" + strings.Repeat("0", 32) + "-" + spanID + "-01",
		"00-" + traceID + "-" + strings.Repeat("0", 16) + "-01",
		"00_" + traceID + "_" + spanID + "_01",
		"00-" + traceID[1:] + "-0" + spanID + "-01",
		strings.Repeat("-", len(parent)),
	}
	for _, value := range invalid {
		if got := traceParent(value); got != (tenants.Trace{}) {
			t.Errorf("%q: got %+v, want nothing", value, got)
		}
	}
}

// traceParent is what is read of a traceparent header.
func traceParent(value string) tenants.Trace {
	return tenants.Propagators(nil).Read(func(name string) string {
		if name == "traceparent" {
			return value
		}
		return ""
	})
}

// The trace of a check is that of the call, else that of the checked request.
func TestTraceOf(t *testing.T) {
	const other = "00-11111111111111111111111111111111-2222222222222222-00"
	headers := func(h map[string]string, raw ...*corev3.HeaderValue) *authv3.CheckRequest {
		http := &authv3.AttributeContext_HttpRequest{Headers: h}
		if len(raw) > 0 {
			http.HeaderMap = &corev3.HeaderMap{Headers: raw}
		}
		return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: http}}}
	}
	raw := &corev3.HeaderValue{Key: "Traceparent", RawValue: []byte(parent)}
	plain := &corev3.HeaderValue{Key: "traceparent", Value: parent}
	for name, c := range map[string]struct {
		call []string
		req  *authv3.CheckRequest
		want string // the ID of the trace
	}{
		"nothing":                 {nil, &authv3.CheckRequest{}, ""},
		"of the call":             {[]string{parent}, &authv3.CheckRequest{}, traceID},
		"of the request":          {nil, headers(map[string]string{"traceparent": parent}), traceID},
		"of both":                 {[]string{parent}, headers(map[string]string{"traceparent": other}), traceID},
		"the call's is not valid": {[]string{"00-zz"}, headers(map[string]string{"traceparent": parent}), traceID},
		"the call has two":        {[]string{other, other}, headers(map[string]string{"traceparent": parent}), traceID},
		"the request has two":     {nil, headers(map[string]string{"traceparent": parent + "," + other}), ""},
		"header map":              {nil, headers(nil, plain), traceID},
		"header map, raw":         {nil, headers(nil, &corev3.HeaderValue{Key: "x", Value: parent}, raw), traceID},
		"header map with two":     {nil, headers(nil, plain, raw), ""},
		"header map beside":       {nil, headers(map[string]string{"x": "y"}, raw), ""},
	} {
		ctx := context.Background()
		if c.call != nil {
			ctx = metadata.NewIncomingContext(ctx, metadata.MD{"traceparent": c.call})
		}
		var got tenants.Question
		s, err := New(Config{Default: "orders", Pool: poolFunc(func(_ context.Context, _ tenants.ID, q tenants.Question) (tenants.Answer, error) {
			got = q
			return tenants.Answer{Decision: policy.Decision{Allowed: true}}, nil
		})})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Check(ctx, c.req); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got.TraceID != c.want || (got.SpanID != "") != (c.want != "") {
			t.Errorf("%s: got %q, %q, want %q", name, got.TraceID, got.SpanID, c.want)
		}
	}
}

// A check without a trace costs no memory for it.
func TestTraceAllocations(t *testing.T) {
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("user-agent", "envoy", ":authority", "gatehouse"))
	req := &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{
		Http: &authv3.AttributeContext_HttpRequest{Headers: map[string]string{"accept": "*/*", "traceparent": parent}},
	}}}
	a := askedOf(req)
	if n := testing.AllocsPerRun(100, func() { traceOf(ctx, a, nil) }); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

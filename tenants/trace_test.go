package tenants_test

import (
	"context"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

const (
	idOfTrace = "4bf92f3577b34da6a3ce929d0e0e4736"
	idOfSpan  = "00f067aa0ba902b7"
)

// readTrace reads headers that are given as a text: name: value, lines.
func readTrace(headers string, propagators ...tenants.Propagator) tenants.Trace {
	all := map[string]string{}
	for line := range strings.Lines(headers) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		all[name] = value
	}
	return tenants.Propagators(propagators).Read(func(name string) string { return all[name] })
}

func TestPropagators(t *testing.T) {
	sampled := tenants.Trace{TraceID: idOfTrace, SpanID: idOfSpan}
	unsampled := tenants.Trace{TraceID: idOfTrace, SpanID: idOfSpan, Unsampled: true}
	short := tenants.Trace{TraceID: "0000000000000000a3ce929d0e0e4736", SpanID: idOfSpan}
	none, no := tenants.Trace{}, tenants.Trace{Unsampled: true}
	const ids = idOfTrace + "-" + idOfSpan
	const multi = "x-b3-traceid: " + idOfTrace + "\nx-b3-spanid: " + idOfSpan + "\n"
	both := []tenants.Propagator{tenants.TraceContext, tenants.B3, tenants.B3Multi}
	for _, c := range []struct {
		headers     string
		propagators []tenants.Propagator
		want        tenants.Trace
	}{
		{"traceparent: 00-" + ids + "-01", nil, sampled},
		{"traceparent: 00-" + ids + "-00", nil, unsampled},
		{"traceparent: 00-" + ids + "-02", nil, unsampled},
		{"traceparent: 00-" + ids + "-03", nil, sampled},
		{"traceparent: 00-" + ids + "-0b", nil, sampled},
		{"traceparent: 00-" + ids + "-0c", nil, unsampled},
		{"traceparent: 00-" + ids + "-01\ntracestate: a=b", nil, tenants.Trace{TraceID: idOfTrace, SpanID: idOfSpan, State: "a=b"}},
		{"tracestate: a=b", nil, none},
		{"b3: " + ids + "-1", nil, none}, // nobody asked for it
		{"b3: " + ids + "-1", both, sampled},
		{"b3: " + ids + "-d", both, sampled},
		{"b3: " + ids + "-0", both, unsampled},
		{"b3: " + ids, both, unsampled}, // it leaves that to others
		{"b3: " + ids + "-1-05e3ac9a4f6e3b90", both, sampled},
		{"b3: " + ids + "-1-05e3", both, none},
		{"b3: " + ids + "-x", both, none},
		{"b3: " + ids + "-", both, none},
		{"b3: a3ce929d0e0e4736-" + idOfSpan + "-1", both, short},
		{"b3: 0", both, no},
		{"b3: 1", both, none},
		{"b3: d", both, none},
		{"b3: " + strings.ToUpper(ids) + "-1", both, none},
		{"b3: 00000000000000000000000000000000-" + idOfSpan + "-1", both, none},
		{multi + "x-b3-sampled: 1", both, sampled},
		{multi + "x-b3-sampled: true", both, sampled},
		{multi + "x-b3-sampled: 0", both, unsampled},
		{multi + "x-b3-sampled: false", both, unsampled},
		{multi + "x-b3-flags: 1", both, sampled},
		{multi, both, unsampled},
		{"x-b3-sampled: 0", both, no},
		{"x-b3-sampled: 1", both, none},
		{"x-b3-traceid: " + idOfTrace + "\nx-b3-sampled: 1", both, none},
		{"traceparent: 00-" + ids + "-00\nb3: " + strings.Repeat("1", 32) + "-" + idOfSpan + "-1", both, unsampled}, // the first wins
		{"traceparent: zz\nb3: " + ids + "-1", both, sampled},
	} {
		if got := readTrace(c.headers, c.propagators...); got != c.want {
			t.Errorf("%q: got %+v, want %+v", c.headers, got, c.want)
		}
	}
}

// What is read of a traceparent is what OpenTelemetry reads, and nothing read is
// what it cannot carry on.
func FuzzTraceParent(f *testing.F) {
	for _, seed := range []string{"00-" + idOfTrace + "-" + idOfSpan + "-01", "cc-" + idOfTrace + "-" + idOfSpan + "-00-more", "", "00-"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		got := tenants.Propagators{tenants.TraceContext}.Read(func(name string) string {
			if name == "traceparent" {
				return value
			}
			return ""
		})
		ctx := propagation.TraceContext{}.Extract(context.Background(), propagation.MapCarrier{"traceparent": value})
		want := trace.SpanContextFromContext(ctx)
		if !want.IsValid() {
			return // it refuses more, such as flags of a later version
		}
		if got.TraceID != want.TraceID().String() || got.SpanID != want.SpanID().String() || got.Unsampled == want.IsSampled() {
			t.Errorf("%q: got %+v, OpenTelemetry %+v", value, got, want)
		}
	})
}

// Whatever headers say, what is read has IDs that are, or none.
func FuzzB3(f *testing.F) {
	f.Add(idOfTrace+"-"+idOfSpan+"-1", "", "", "")
	f.Add("", idOfTrace, idOfSpan, "1")
	f.Fuzz(func(t *testing.T, single, traceID, spanID, sampled string) {
		headers := map[string]string{"b3": single, "x-b3-traceid": traceID, "x-b3-spanid": spanID, "x-b3-sampled": sampled}
		got := tenants.Propagators{tenants.B3, tenants.B3Multi}.Read(func(name string) string { return headers[name] })
		_, err := trace.TraceIDFromHex(got.TraceID)
		_, err2 := trace.SpanIDFromHex(got.SpanID)
		if got.TraceID+got.SpanID != "" && (err != nil || err2 != nil) {
			t.Errorf("%v: got %+v", headers, got)
		}
	})
}

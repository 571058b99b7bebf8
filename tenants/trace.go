package tenants

import (
	"fmt"
	"strings"

	"go.opentelemetry.io/otel/trace"
)

// Trace is what the caller of a question says of the trace that the question is
// a part of. The zero Trace says nothing.
type Trace struct {
	// TraceID and SpanID are those of the caller's span, 32 and 16 lower-case
	// digits of a hexadecimal number. Both are empty where it names none.
	TraceID, SpanID string

	// Unsampled says that the trace is not to be recorded. Then no decision of
	// this question has a span.
	Unsampled bool

	// State is the caller's tracestate header.
	State string
}

// context returns the span that t names; it is not valid where it names none.
func (t *Trace) context() trace.SpanContext {
	traceID, err := trace.TraceIDFromHex(t.TraceID)
	if err != nil {
		return trace.SpanContext{}
	}
	spanID, err := trace.SpanIDFromHex(t.SpanID)
	if err != nil {
		return trace.SpanContext{}
	}
	c := trace.SpanContextConfig{TraceID: traceID, SpanID: spanID, Remote: true}
	if !t.Unsampled {
		c.TraceFlags = trace.FlagsSampled
	}
	if t.State != "" {
		c.TraceState, _ = trace.ParseTraceState(t.State) // one that is none is left out, as W3C has it
	}
	return trace.NewSpanContext(c)
}

// Propagator is a way in which callers name their traces in headers, by its name
// in OTEL_PROPAGATORS.
type Propagator string

// The propagators.
const (
	// TraceContext is traceparent and tracestate
	// (https://www.w3.org/TR/trace-context/).
	TraceContext Propagator = "tracecontext"

	// B3 is the one header b3, B3Multi the headers x-b3-traceid, x-b3-spanid,
	// x-b3-sampled and x-b3-flags (https://github.com/openzipkin/b3-propagation).
	B3      Propagator = "b3"
	B3Multi Propagator = "b3multi"
)

// ParsePropagator returns the propagator of that name.
func ParsePropagator(name string) (Propagator, error) {
	switch p := Propagator(name); p {
	case TraceContext, B3, B3Multi:
		return p, nil
	}
	return "", fmt.Errorf("%q is not tracecontext, b3 or b3multi", name)
}

// Propagators are those that are looked for, the first that says something wins.
// None at all is TraceContext.
type Propagators []Propagator

var standard = Propagators{TraceContext}

// Read returns what the headers say. Get returns the value of a header by its
// name in lower case; "" where there is none, or no telling which.
func (ps Propagators) Read(get func(header string) string) Trace {
	if len(ps) == 0 {
		ps = standard
	}
	for _, p := range ps {
		var t Trace
		switch p {
		case TraceContext:
			if t = readTraceParent(get("traceparent")); t.TraceID != "" {
				t.State = get("tracestate")
			}
		case B3:
			t = readB3(get("b3"))
		case B3Multi:
			t = readB3Multi(get)
		}
		if t.TraceID != "" || t.Unsampled {
			return t
		}
	}
	return Trace{}
}

// readTraceParent reads a traceparent header
// (https://www.w3.org/TR/trace-context/#traceparent-header):
// VERSION-TRACE-SPAN-FLAGS, in lower case. A version that is not known may have
// more after it. The Trace is the zero one where the value is not valid.
func readTraceParent(value string) Trace {
	const length = len("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	if len(value) < length || value[2] != '-' || value[35] != '-' || value[52] != '-' {
		return Trace{}
	}
	version, flags := value[:2], value[53:length]
	t := Trace{TraceID: value[3:35], SpanID: value[36:52]}
	switch {
	case !isHex(version) || !isHex(flags) || !t.valid(),
		version == "ff",
		version == "00" && len(value) > length,
		len(value) > length && value[length] != '-':
		return Trace{}
	}
	t.Unsampled = !strings.Contains("13579bdf", flags[1:])
	return t
}

// readB3 reads a b3 header: {TRACE}-{SPAN}[-{SAMPLED}[-{PARENT}]], or SAMPLED
// alone.
func readB3(value string) Trace {
	if len(value) == 1 {
		return Trace{Unsampled: value == "0"}
	}
	traceID, rest, ok := strings.Cut(value, "-")
	spanID, rest, more := strings.Cut(rest, "-")
	sampled, parent, whole := strings.Cut(rest, "-")
	if !ok || more && !isSampled(sampled) || whole && (len(parent) != 16 || !isHex(parent)) {
		return Trace{}
	}
	return traceOfB3(traceID, spanID, sampled)
}

// readB3Multi reads the headers of B3 that stand alone.
func readB3Multi(get func(string) string) Trace {
	traceID, spanID := get("x-b3-traceid"), get("x-b3-spanid")
	sampled := get("x-b3-sampled")
	switch {
	case get("x-b3-flags") == "1":
		sampled = "d"
	case sampled == "true": // of early tracers
		sampled = "1"
	case sampled == "false":
		sampled = "0"
	}
	if traceID == "" && spanID == "" {
		return Trace{Unsampled: sampled == "0"}
	}
	return traceOfB3(traceID, spanID, sampled)
}

// isSampled reports whether it is one of B3's states of sampling: no, yes, debug.
func isSampled(s string) bool { return s == "0" || s == "1" || s == "d" }

// traceOfB3 returns the trace of these IDs, of which that of the trace may be half
// as long. A caller that leaves the sampling to others records nothing itself, and
// so is not sampled.
func traceOfB3(traceID, spanID, sampled string) Trace {
	if len(traceID) == 16 {
		traceID = "0000000000000000" + traceID
	}
	t := Trace{TraceID: traceID, SpanID: spanID, Unsampled: sampled != "1" && sampled != "d"}
	if !t.valid() {
		return Trace{}
	}
	return t
}

// valid reports whether the IDs are.
func (t *Trace) valid() bool {
	return len(t.TraceID) == 32 && isHex(t.TraceID) && strings.Trim(t.TraceID, "0") != "" &&
		len(t.SpanID) == 16 && isHex(t.SpanID) && strings.Trim(t.SpanID, "0") != ""
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

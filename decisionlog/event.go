package decisionlog

import (
	"context"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
)

// Event is one decision, as the request path hands it over: a Log that has
// recorded it owns it. Values are shared and never change. A field that is zero
// or nil is absent from the event that is delivered, unless it says otherwise.
type Event struct {
	// Filter asks the drop and mask rules of the policy that decided. Nil: it
	// has neither.
	Filter Filter

	DecisionID      string // always there
	BatchDecisionID string
	TraceID         string
	SpanID          string
	Path            string
	Query           string
	RequestedBy     string
	RequestID       uint64
	Timestamp       time.Time // always there

	// Bundles are those that decided. Events of one revision should share one
	// slice: it is encoded once as long as it stays the same.
	Bundles []Bundle

	// Document makes the input when it is needed. Nil: it is Input.
	Document Document

	Input          ast.Value
	Result         ast.Value
	NDBuiltinCache ast.Object // :: builtin → arguments → value
	RuleLabels     []ast.Value

	// Error is why there is no result. Where it is, or wraps, an error that is
	// a JSON object with a message, as those of OPA's evaluator are, it is
	// delivered as that object; any other as {"message": ...}.
	Error error

	// Headers of the request, as OPA's request_context.http.headers.
	Headers map[string][]string

	// The metrics timer_server_handler_ns and timer_rego_query_eval_ns, and
	// any others.
	ServerHandler time.Duration
	QueryEval     time.Duration
	Metrics       []Metric

	// Batch is what is delivered as custom.batch, Custom the other members of
	// custom.
	Batch  *Batch
	Custom ast.Object

	// Outcome is what the decision came to, in a word. It is delivered as an
	// attribute of a record of OpenTelemetry, and not in the event.
	Outcome string

	// Size estimates what Input or Document, Result and NDBuiltinCache take in
	// memory, in bytes, whether shared or not. Zero: Record walks them to find out,
	// but not the Document. What is made of a Document does not count: it is there
	// only while a worker has the event.
	Size int64

	held   int64 // bytes that its log counts for it while it is buffered
	pooled bool  // it is of events
}

// events are events that are not in use.
var events = sync.Pool{New: func() any { return &Event{pooled: true} }}

// Copy returns a copy for a Log. It is used again for another event once the Log
// is done with it.
func (e *Event) Copy() *Event {
	own := events.Get().(*Event)
	*own = *e
	own.pooled = true
	return own
}

// free is called when nobody needs the event any more.
func (e *Event) free() {
	if e.pooled {
		*e = Event{pooled: true}
		events.Put(e)
	}
}

// Bundle names a bundle that took part in a decision.
type Bundle struct{ Name, Revision string }

// Metric is a number about a decision. Its name should not be that of another.
type Metric struct {
	Name  string
	Value int64
}

// Batch says which item of a batch a decision answers.
type Batch struct {
	Key   string // of the item
	Index int    // of the item, from 0
	Size  int    // items in the batch
}

// Filter asks the drop and mask rules of a policy about an event. The event is an
// object with the members that OPA gives these rules: secrets are not hidden in
// it, since it does not leave the process. The methods must return soon after ctx
// ends. They are called by one goroutine at a time for each log, by many for all.
// Filters are compared with ==, to know whether one has failed before.
type Filter interface {
	// Drop reports whether the event is to be dropped.
	Drop(ctx context.Context, event ast.Value) (bool, error)

	// Mask returns the value of the mask rule, a set of pointers and
	// operations. Nil: it is undefined, so that nothing is masked.
	Mask(ctx context.Context, event ast.Value) (ast.Value, error)
}

// Estimates, in bytes, of what events and values take in memory on a 64-bit
// machine, for the bounds: TestSize keeps them within a factor of two.
const (
	sizeEvent  = 512 // an Event with its strings, but for its values
	sizeTerm   = 24  // a term in its slice or slab
	sizeScalar = 16  // the header of a boxed string or number
	sizeMember = 76  // of an object: its element, its key's slot and its place in the map
	sizeElem   = 24  // of an array: its pointer and its hash
	sizeObject = 180 // an object or set without members
	sizeArray  = 96  // an array without elements
)

// SizeOf estimates what values take in memory together, for Event.Size. Nil takes
// nothing.
func SizeOf(input, result ast.Value, builtins ast.Object) int64 {
	return sizeOf(input, result, builtins)
}

// size estimates what the event takes while it is buffered.
func (e *Event) size() int64 {
	n := sizeEvent + e.Size
	if e.Size <= 0 {
		n = sizeEvent + sizeOf(e.Input, e.Result, e.NDBuiltinCache)
	}
	for name, values := range e.Headers {
		n += sizeMember + int64(len(name))
		for _, v := range values {
			n += sizeScalar + int64(len(v))
		}
	}
	return n
}

// sizer sums up what values take.
type sizer struct {
	sum     int64
	member  func(k, v *ast.Term) // is addMember: made once, as closures cost
	element func(*ast.Term)      // is addElement
}

var sizers = sync.Pool{New: func() any {
	s := new(sizer)
	s.member, s.element = s.addMember, s.addElement
	return s
}}

// sizeOf estimates what values take together; nil takes nothing.
func sizeOf(values ...ast.Value) int64 {
	s := sizers.Get().(*sizer)
	defer sizers.Put(s)
	s.sum = 0
	for _, v := range values {
		if v != nil {
			s.add(v)
		}
	}
	return s.sum
}

func (s *sizer) add(v ast.Value) {
	s.sum += sizeTerm
	switch v := v.(type) {
	case ast.String:
		s.sum += sizeScalar + int64(len(v))
	case ast.Number:
		s.sum += sizeScalar + int64(len(v))
	case *ast.Array:
		s.sum += sizeArray + sizeElem*int64(v.Len())
		for i := range v.Len() {
			s.add(v.Elem(i).Value)
		}
	case ast.Object:
		s.sum += sizeObject
		v.Foreach(s.member)
	case ast.Set:
		s.sum += sizeObject
		v.Foreach(s.element)
	}
}

func (s *sizer) addMember(k, v *ast.Term) {
	s.sum += sizeMember
	s.add(k.Value)
	s.add(v.Value)
}

func (s *sizer) addElement(t *ast.Term) {
	s.sum += sizeMember
	s.add(t.Value)
}

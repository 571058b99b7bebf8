package policy

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/lineage"
	"github.com/open-policy-agent/opa/v1/topdown/print"
)

// Bounds of an explanation.
const (
	maxTraceEvents = 50_000    // kept while it evaluates
	maxSteps       = 10_000    // told
	maxStepsBytes  = 512 << 10 // of their texts, together
	maxStepText    = 300       // of one, in bytes
	maxPrints      = 1000
	maxPrintBytes  = 64 << 10 // of what print gave, together
)

// TraceMode says which steps of an evaluation an explanation has. Those of opa
// eval --explain have their names, and say what they say there.
type TraceMode string

// The modes.
const (
	TraceRules TraceMode = "rules" // rules that were tried, which held, and what failed in the others; the default
	TraceFails TraceMode = "fails" // each expression that failed, with the way to it
	TraceNotes TraceMode = "notes" // each note of trace, with the way to it
	TraceFull  TraceMode = "full"  // all
)

// TraceModes are all modes.
var TraceModes = []TraceMode{TraceRules, TraceFails, TraceNotes, TraceFull}

// ExplainOptions say what is evaluated again.
type ExplainOptions struct {
	Mode TraceMode // default TraceRules

	// At is the time that the policy sees. Zero: now.
	At time.Time

	// Builtins are results that are taken, as Observed.Builtins. Optional.
	Builtins ast.Object

	// Decision reads the value as a decision, as Decide does.
	Decision bool
}

// Explanation says how a policy comes to its value.
type Explanation struct {
	Value    ast.Value // nil where there is none
	Decision Decision  // where that was asked for, and there is no error
	Err      error     // as that of Eval, or of Decide

	Steps     []Step
	Truncated bool // a bound of the steps was met: there were more

	// Prints are what the policy printed. They may hold values.
	Prints []Print

	// Anew are builtins whose results depend on more than their arguments, and
	// that were asked again, since no result was given for them.
	Anew []string

	// Refused are builtins that were not called: they would have reached
	// somebody.
	Refused []string
}

// Step is one step of an evaluation. It has no values of variables.
type Step struct {
	Op    string `json:"op"`              // enter and exit (of a rule that holds), fail, and in other modes eval, redo, index, note
	Text  string `json:"text"`            // of the rule, or of the expression as it stands in the file
	File  string `json:"file"`            // its path in the bundle
	Line  int    `json:"line"`            // from 1; 0: it stands in no file
	Depth int    `json:"depth"`           // from 0
	Times int    `json:"times,omitempty"` // how often it failed in one try of the rule; 0: once
}

// Print is one line that the policy printed.
type Print struct {
	Text string `json:"text"`
	File string `json:"file"`
	Line int    `json:"line"`
}

// Explain asks the entry point, as Eval does, and tells each step. All rules are
// tried in turn, also those that an index of their conditions would have passed
// over, so that what failed in them is told. Nothing leaves the process and
// nothing of the tenant's is changed: http.send is not called, and what builtins
// remember between questions is neither read nor written.
//
// print is only told by a policy that was compiled with Options.Print.
func (p *Policy) Explain(ctx context.Context, entry string, input ast.Value, env *Env, cancel *Cancel, opts ExplainOptions) *Explanation {
	e, ok := p.entries[entry]
	if !ok {
		return &Explanation{Err: fmt.Errorf("%w %q", ErrEntry, entry)}
	}
	t := &tracer{mode: opts.Mode}
	if t.mode == "" {
		t.mode = TraceRules
	}
	x := &Explanation{}
	q, err := p.queryOf(e)
	if err != nil {
		x.Err = err
		return x
	}
	if input != nil {
		q.WithInput(ast.NewTerm(input))
	}
	if cancel != nil {
		q.WithCancel(cancel)
	}
	runtime := noRuntime
	if env != nil {
		runtime = env.runtime(e)
	}
	if opts.At.IsZero() {
		opts.At = time.Now()
	}
	known := resultsOf(opts.Builtins)
	results := resultsOf(opts.Builtins)
	q.WithRuntime(runtime).
		WithInterQueryBuiltinValueCache(newValueCaches(Caching{})).
		WithTime(opts.At).
		WithNDBuiltinCache(results).
		WithIndexing(false).
		WithQueryTracer(t).
		WithPrintHook((*printed)(x))
	if x.Value, x.Err = run(ctx, &q); x.Err == nil && opts.Decision {
		x.Decision, x.Err = decisionOf(x.Value, &p.headers)
	}
	x.Steps, x.Truncated = t.steps()
	for name, calls := range results {
		if known[name] == nil || known[name].Len() < calls.Len() {
			x.Anew = append(x.Anew, name)
		}
	}
	slices.Sort(x.Anew)
	if calls := results[ast.HTTPSend.Name]; t.sends > 0 && (calls == nil || calls.Len() < t.sends) {
		x.Refused = append(x.Refused, ast.HTTPSend.Name)
	}
	return x
}

// printed is the hook of print.
type printed Explanation

var _ print.Hook = (*printed)(nil)

// Print keeps a line.
func (x *printed) Print(c print.Context, text string) error {
	size := 0
	for _, p := range x.Prints {
		size += len(p.Text)
	}
	if len(x.Prints) >= maxPrints || size+len(text) > maxPrintBytes {
		x.Truncated = true
		return nil
	}
	p := Print{Text: text}
	if c.Location != nil {
		p.File, p.Line = fileOf(c.Location), c.Location.Row
	}
	x.Prints = append(x.Prints, p)
	return nil
}

// tracer keeps the events of an evaluation that its mode tells.
type tracer struct {
	mode   TraceMode
	events []*topdown.Event
	over   bool // there were more
	sends  int  // places that call http.send, and were reached
	sent   map[*ast.Expr]bool
	failed map[failure]*topdown.Event // :: what failed → its first event, where that is told once
	times  map[*topdown.Event]int
}

// failure is an expression that failed in a query.
type failure struct {
	query uint64
	expr  *ast.Expr
}

// Enabled reports that the evaluation is told.
func (t *tracer) Enabled() bool { return true }

// Config asks for no values of variables.
func (t *tracer) Config() topdown.TraceConfig { return topdown.TraceConfig{} }

// TraceEvent keeps an event.
func (t *tracer) TraceEvent(e topdown.Event) {
	expr, _ := e.Node.(*ast.Expr)
	if e.Op == topdown.EvalOp && expr != nil && expr.IsCall() && expr.Operator().String() == ast.HTTPSend.Name && !t.sent[expr] {
		if t.sent == nil {
			t.sent = map[*ast.Expr]bool{}
		}
		t.sent[expr] = true
		t.sends++
	}
	if !t.wants(&e) {
		return
	}
	if t.mode == TraceRules && e.Op == topdown.FailOp {
		f := failure{e.QueryID, expr}
		if first := t.failed[f]; first != nil {
			t.times[first]++
			return
		}
		if t.failed == nil {
			t.failed, t.times = map[failure]*topdown.Event{}, map[*topdown.Event]int{}
		}
		t.failed[f], t.times[&e] = &e, 1
	}
	if len(t.events) >= maxTraceEvents {
		t.over = true
		return
	}
	t.events = append(t.events, &e)
}

// wants reports whether the mode may tell an event.
func (t *tracer) wants(e *topdown.Event) bool {
	switch e.Op {
	case topdown.UnifyOp:
		return false
	case topdown.EnterOp:
		return true // of a query: how deep the others are
	case topdown.ExitOp:
		return t.mode == TraceFull || t.mode == TraceRules && e.HasRule()
	case topdown.FailOp:
		return t.mode != TraceNotes
	case topdown.NoteOp:
		return t.mode != TraceFails
	case topdown.RedoOp:
		return t.mode != TraceRules
	}
	return t.mode == TraceFull
}

// steps returns what the mode tells.
func (t *tracer) steps() (steps []Step, truncated bool) {
	depths := map[uint64]int{} // :: query → depth, from 1
	negated := map[uint64]bool{}
	for _, e := range t.events {
		if depths[e.QueryID] == 0 {
			depths[e.QueryID] = depths[e.ParentID] + 1
		}
		if body, ok := e.Node.(ast.Body); ok && e.Op == topdown.EnterOp && isNot(body) {
			negated[e.QueryID] = true
		}
	}
	events := t.events
	switch t.mode {
	case TraceFails:
		events = lineage.Fails(events)
	case TraceNotes:
		events = lineage.Notes(events)
	}
	bytes := 0
	for _, e := range events {
		if t.mode == TraceRules && (e.HasBody() || e.Op == topdown.FailOp && (negated[e.QueryID] || line(e) == 0)) {
			continue // that the body of a not fails is what it wants
		}
		s := Step{Op: strings.ToLower(string(e.Op)), Text: textOf(e, negated[e.QueryID]), Depth: depths[e.QueryID] - 1, Line: line(e)}
		if t.mode == TraceRules {
			s.Depth = max(s.Depth-1, 0) // the question itself is not told
		}
		if s.Line > 0 {
			s.File = fileOf(e.Location)
		}
		if n := t.times[e]; n > 1 {
			s.Times = n
		}
		if bytes += len(s.Text) + len(s.File) + 64; len(steps) >= maxSteps || bytes > maxStepsBytes {
			return steps, true
		}
		steps = append(steps, s)
	}
	return steps, t.over
}

// fileOf is the path of a file in its bundle.
func fileOf(l *ast.Location) string { return strings.TrimPrefix(l.File, "/") }

// line is where an event's node stands in its file; 0: in none.
func line(e *topdown.Event) int {
	if e.Location == nil {
		return 0
	}
	return e.Location.Row
}

// isNot reports whether a body is that of a not: it is the negated expression
// alone, without the not, which is still in its text.
func isNot(body ast.Body) bool {
	return len(body) == 1 && !body[0].Negated && body[0].Location != nil &&
		strings.HasPrefix(string(body[0].Location.Text), "not ")
}

// textOf is the text of an event's node: of a rule its reference, of anything
// else what stands in the file.
func textOf(e *topdown.Event, negated bool) string {
	if e.Op == topdown.NoteOp {
		return shorten(e.Message)
	}
	if rule, ok := e.Node.(*ast.Rule); ok {
		text := rule.Ref().GroundPrefix().String()
		if rule.Default {
			text = "default " + text
		}
		return text
	}
	text := ""
	if e.Location != nil && !negated {
		text = string(e.Location.Text)
	}
	if text == "" {
		text = e.Node.String()
	}
	return shorten(text)
}

// shorten puts a text on one line, within the bound.
func shorten(text string) string {
	text = strings.Join(strings.Fields(text), " ")
	if len(text) > maxStepText {
		text = strings.ToValidUTF8(text[:maxStepText], "") + "…"
	}
	return text
}

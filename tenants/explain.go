package tenants

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Bounds of an explanation.
const (
	// explainFactor is how many of the tenant's evaluation times it may take, and
	// maxExplainTime what it may take at most.
	explainFactor  = 10
	maxExplainTime = 10 * time.Second

	// explainWait is how long somebody waits for the explanation before theirs:
	// one is made at a time.
	explainWait = 2 * time.Second

	// explainEnd is how long an evaluation may take to notice that its time is
	// over, so that its steps can be told nevertheless.
	explainEnd = time.Second
)

// ExplainQuery says what is to be explained: a decision that is remembered, or an
// input.
type ExplainQuery struct {
	DecisionID string // of one that is remembered; "": what follows says what is asked

	Input []byte // JSON
	Path  string // the entry point, one of the policy's; "": the tenant's default

	Mode policy.TraceMode // "": policy.TraceRules
}

// Explanation says how a tenant's policy comes to an answer. It has no values of
// variables; the values that it has are masked as a decision log's are.
type Explanation struct {
	Tenant     ID               `json:"tenant"`
	DecisionID string           `json:"decision_id,omitempty"`
	Path       string           `json:"path"`      // the entry point that was asked
	Policy     string           `json:"policy"`    // whose policy gave the answer: tenant, or guard, the operator's
	Evaluator  string           `json:"evaluator"` // topdown
	Mode       policy.TraceMode `json:"mode"`

	// Bundles are those by which it was evaluated now, with their revisions.
	Bundles map[string]string `json:"bundles"`

	// Then is the decision that is explained, where one was named.
	Then *Then `json:"then,omitempty"`

	Outcome string          `json:"outcome,omitempty"` // of now; one of Outcomes, absent where nothing was evaluated
	Result  json.RawMessage `json:"result,omitempty"`  // masked
	Error   json.RawMessage `json:"error,omitempty"`   // as in a decision log

	Trace     []policy.Step  `json:"trace"`
	Truncated bool           `json:"truncated,omitempty"` // there were more steps, or lines printed
	Prints    []policy.Print `json:"prints,omitempty"`    // what is hidden in the input is hidden here
	Notes     []string       `json:"notes,omitempty"`     // what a reader should know
}

// Then is a decision that is explained, as it was.
type Then struct {
	Outcome string            `json:"outcome"`
	Time    time.Time         `json:"time"`
	Bundles map[string]string `json:"bundles,omitempty"`

	// Same reports whether what decided then is what has evaluated now: the same
	// bundles, under the same settings, and the same policy of the operator's.
	Same bool `json:"same"`
}

// Explain evaluates a question again, by what decides for the tenant now, and
// tells each step. Nothing is logged or counted as a check, and nothing is sent:
// http.send gives what is recorded with the decision, or nothing. It loads a
// tenant as a check does.
//
// One explanation is made at a time, and none takes longer than ten of the
// tenant's evaluation times, or 10 s. The error wraps ErrNotRemembered, ErrUnknown,
// ErrNotReady, ErrInvalid, ErrEntry, ErrBusy, ErrDeadline, ErrPanic or
// decisionlog.ErrWithheld.
func (p *Pool) Explain(ctx context.Context, id ID, q ExplainQuery) (*Explanation, error) {
	m, err := p.recall(id, &q)
	if err != nil {
		return nil, err
	}
	in := p.instanceOf(id)
	c := p.newCall(ctx, in, time.Now(), nil)
	defer c.free()
	rev, err := c.revision(ctx)
	if err != nil {
		return nil, err
	}
	x := &Explanation{
		Tenant: id, DecisionID: q.DecisionID, Policy: "tenant", Evaluator: "topdown", Mode: q.Mode,
		Bundles: revisionsOf(rev.bundles), Trace: []policy.Step{},
	}
	if x.Mode == "" {
		x.Mode = policy.TraceRules
	}
	if q.DecisionID != "" {
		x.Then = &Then{Outcome: m.Outcome, Time: m.Timestamp, Bundles: revisionsOf(m.Bundles), Same: m.Asked.State == p.stateOf(rev)}
	} else {
		m.Labels = p.labelsOf(id, in.settings)
		m.Rules = rev.rules
		m.Bundles = rev.bundles
	}
	if err := in.asks(rev, m, &q); err != nil {
		return nil, err
	}
	x.Path = m.Asked.Entry
	if m.Input == nil || errors.Is(m.Error, ErrInvalid) {
		x.Notes = append(x.Notes, "no policy was asked then: there is no input to evaluate again")
		return x, p.show(ctx, x, m, nil, rev, in)
	}
	now, err := p.explain(ctx, in, rev, m, x)
	if err != nil {
		return nil, err
	}
	return x, p.show(ctx, x, m, now, rev, in)
}

// recall returns the decision that is to be explained, or makes one of the input.
func (p *Pool) recall(id ID, q *ExplainQuery) (*decisionlog.Memory, error) {
	if q.DecisionID == "" {
		input, err := policy.ParseJSON(q.Input, nil)
		if err != nil {
			return nil, fmt.Errorf("%w: input: %w", ErrInvalid, err)
		}
		return &decisionlog.Memory{
			Tenant: string(id),
			Event:  decisionlog.Event{DecisionID: "explain", Timestamp: time.Now(), Input: input},
		}, nil
	}
	if p.cfg.Logs == nil {
		return nil, fmt.Errorf("%w: no decisions are, by the settings", ErrNotRemembered)
	}
	found, of := p.cfg.Logs.Recall(string(id), func(m *decisionlog.Memory) bool { return m.DecisionID == q.DecisionID })
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("%w: %q is not among the last %d of tenant %q", ErrNotRemembered, q.DecisionID, of, id)
	case found[0].Bare:
		return nil, fmt.Errorf("%w: %q was too large to be remembered with its input", ErrNotRemembered, q.DecisionID)
	}
	m := found[0]
	var err error
	m.Input, err = inputOf(m)
	m.Document = nil
	return m, err
}

// asks sees to it that m says which entry point is asked, and how.
func (in *instance) asks(rev *revision, m *decisionlog.Memory, q *ExplainQuery) error {
	if q.DecisionID == "" {
		m.Asked.Entry = in.settings.Entry
		if q.Path != "" {
			entry, err := policy.ParseEntry(q.Path)
			if err != nil {
				return fmt.Errorf("%w: %w", ErrEntry, err)
			}
			m.Asked.Entry = entry
		}
		m.Path = m.Asked.Entry
		_, err := in.entryOf(&Question{Entry: m.Asked.Entry})
		m.Asked.Value = err != nil || m.Asked.Entry != in.settings.Entry && len(in.settings.Entries) == 0
	}
	if !rev.policy.Has(m.Asked.Entry) {
		return fmt.Errorf("%w: %q is none of the tenant's entry points", ErrEntry, m.Asked.Entry)
	}
	return nil
}

// answered is what an evaluation came to.
type answered struct {
	*policy.Explanation
	outcome string
	guard   bool
}

// explain evaluates, for as long as it may, in its turn. It fills in what x says
// of the steps.
func (p *Pool) explain(ctx context.Context, in *instance, rev *revision, m *decisionlog.Memory, x *Explanation) (*answered, error) {
	wait := time.NewTimer(explainWait)
	defer wait.Stop()
	select {
	case p.explaining <- struct{}{}:
	case <-wait.C:
		return nil, fmt.Errorf("%w: another explanation is being made", ErrBusy)
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: caller is gone", ErrBusy)
	}
	limit := min(explainFactor*in.limits.EvaluationTime, maxExplainTime)
	cancel := new(policy.Cancel)
	defer context.AfterFunc(p.ctx, cancel.Cancel)()
	timer := time.AfterFunc(limit, cancel.Cancel)
	defer timer.Stop()
	type ended struct {
		answered *answered
		err      error
	}
	done := make(chan ended, 1)
	go func() {
		var e ended
		defer func() {
			if r := recover(); r != nil {
				e = ended{err: fmt.Errorf("%w: %v", ErrPanic, r)}
			}
			done <- e
			<-p.explaining
		}()
		e.answered, e.err = p.evaluate(in, rev, m, x.Mode, cancel)
	}()
	end := time.NewTimer(limit + explainEnd)
	defer end.Stop()
	select {
	case e := <-done:
		return e.answered, e.err
	case <-end.C:
	case <-ctx.Done():
	}
	cancel.Cancel()
	return nil, fmt.Errorf("%w: the explanation takes longer than %s", ErrDeadline, limit)
}

// evaluate asks the operator's policy, where there is one, and then the tenant's.
func (p *Pool) evaluate(in *instance, rev *revision, m *decisionlog.Memory, mode policy.TraceMode, cancel *policy.Cancel) (*answered, error) {
	opts := policy.ExplainOptions{Mode: mode, At: m.Asked.At, Builtins: m.NDBuiltinCache, Decision: true}
	if g := p.guard; g != nil {
		pol, err := p.library.explainable(g, g.current.Load())
		if err != nil {
			return nil, err
		}
		opts := opts
		opts.Builtins = nil // the event's are the tenant's
		a := &answered{pol.Explain(context.Background(), g.settings.Entry, m.Input, g.env(), cancel, opts), "", true}
		if a.Err != nil || !a.Decision.Allowed {
			a.outcome = outcomeNames[outcomeOf(&Answer{Decision: a.Decision, Err: a.Err})]
			return a, nil
		}
	}
	pol, err := p.library.explainable(in, rev)
	if err != nil {
		return nil, err
	}
	opts.Decision = !m.Asked.Value
	a := &answered{Explanation: pol.Explain(context.Background(), m.Asked.Entry, m.Input, in.env(), cancel, opts)}
	if m.Asked.Value && a.Err == nil {
		a.Decision = valueDecision(a.Value)
	}
	a.outcome = outcomeNames[outcomeOf(&Answer{Decision: a.Decision, Err: a.Err})]
	return a, nil
}

// show fills in what x says, as far as it may leave the process. A nil now says
// that nothing was evaluated.
func (p *Pool) show(ctx context.Context, x *Explanation, m *decisionlog.Memory, now *answered, rev *revision, in *instance) error {
	own := *m
	own.NDBuiltinCache = nil
	if now != nil {
		own.Result, own.Error = now.Value, now.Err
		x.Outcome, x.Trace, x.Truncated, x.Prints = now.outcome, append(x.Trace, now.Steps...), now.Truncated, now.Prints
		x.notes(now, m.Asked.State != "")
		if now.guard {
			x.Policy = "guard"
			x.Bundles, x.Path = revisionsOf(p.guard.current.Load().bundles), p.guard.settings.Entry
		}
	}
	var text []byte
	var withheld error
	if p.cfg.Logs == nil {
		return fmt.Errorf("%w: there is nothing that masks", decisionlog.ErrWithheld)
	}
	err := p.cfg.Logs.Show(ctx, []*decisionlog.Memory{&own}, rev.filter, in.filterTime(), func(s decisionlog.Shown, err error) bool {
		text, withheld = s.JSON, err
		return true
	})
	if err != nil || withheld != nil {
		return errors.Join(err, withheld)
	}
	var event struct {
		Input  any             `json:"input"`
		Result json.RawMessage `json:"result"`
		Error  json.RawMessage `json:"error"`
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	if err := d.Decode(&event); err != nil {
		return fmt.Errorf("masking: %w", err)
	}
	x.Result, x.Error = event.Result, event.Error
	h := hiddenOf(m.Input, event.Input)
	for i := range x.Prints {
		x.Prints[i].Text = h.hide(x.Prints[i].Text)
	}
	for i := range x.Trace {
		if x.Trace[i].Op == "note" {
			x.Trace[i].Text = h.hide(x.Trace[i].Text)
		}
	}
	if len(x.Error) > 0 && h.in(string(x.Error)) {
		x.Error, _ = json.Marshal(map[string]string{"message": h.hide(own.Error.Error())}) // strings
	}
	return nil
}

// notes says what a reader should know of an evaluation.
func (x *Explanation) notes(now *answered, decided bool) {
	if len(now.Refused) > 0 {
		x.Notes = append(x.Notes, fmt.Sprintf("%s was not called: an explanation sends nothing, and what it gave then is not recorded (nd_builtin_cache: true records it)", strings.Join(now.Refused, ", ")))
	}
	if len(now.Anew) > 0 && x.Then != nil {
		x.Notes = append(x.Notes, fmt.Sprintf("asked again, since what they gave then is not recorded: %s", strings.Join(now.Anew, ", ")))
	}
	if x.Then != nil && decided && !x.Then.Same {
		x.Notes = append(x.Notes, "what decided then is not in force any more: this is what decides now")
	}
	if errors.Is(now.Err, policy.ErrCanceled) {
		x.Notes = append(x.Notes, "the evaluation did not end in time: the trace is what was seen until then")
	}
	if x.Truncated {
		x.Notes = append(x.Notes, "the trace met a bound: there were more steps")
	}
}

func revisionsOf(list []decisionlog.Bundle) map[string]string {
	m := make(map[string]string, len(list))
	for _, b := range list {
		m[b.Name] = b.Revision
	}
	return m
}

// explainable returns the policy of a revision that tells what it prints.
func (l *library) explainable(in *instance, rev *revision) (*policy.Policy, error) {
	opts := in.options()
	named := make([]policy.Named, len(rev.content))
	prints := false
	for i, c := range rev.content {
		named[i] = policy.Named{Name: in.settings.Bundles[i].Name, Part: c.part}
		prints = prints || c.part.Prints()
	}
	if opts.Print || !prints {
		return rev.policy, nil
	}
	defer l.turn()()
	opts.Print = true
	return policy.Compile(named, opts)
}

// hidden are texts of an input that are not in what is shown of it: secrets, and
// what the tenant's mask hides.
type hidden struct {
	long  []string        // hidden wherever they are
	short map[string]bool // hidden where they are a word
}

// shortText is the length, in bytes, below which a text is one that others have in
// them by chance.
const shortText = 4

// hiddenOf returns what is in an input and not in what is shown of it.
func hiddenOf(input ast.Value, shown any) *hidden {
	seen := map[string]bool{}
	var see func(any)
	see = func(v any) {
		switch v := v.(type) {
		case string:
			seen[v] = true
		case json.Number:
			seen[v.String()] = true
		case []any:
			for _, e := range v {
				see(e)
			}
		case map[string]any:
			for _, e := range v {
				see(e)
			}
		}
	}
	see(shown)
	h := &hidden{short: map[string]bool{}}
	add := func(text string, number bool) {
		switch {
		case text == "" || seen[text]:
		case len(text) < shortText || number:
			h.short[text] = true
		default:
			h.long = append(h.long, text)
			for _, word := range strings.Fields(text) { // the token of "Bearer token"
				if len(word) >= 2*shortText && word != text && !seen[word] {
					h.long = append(h.long, word)
				}
			}
		}
	}
	eachText(input, add)
	return h
}

// eachText calls f for each text and number that is a value; the names of members
// are none.
func eachText(v ast.Value, f func(text string, number bool)) {
	switch v := v.(type) {
	case ast.String:
		f(string(v), false)
	case ast.Number:
		f(string(v), true)
	case *ast.Array:
		v.Foreach(func(t *ast.Term) { eachText(t.Value, f) })
	case ast.Set:
		v.Foreach(func(t *ast.Term) { eachText(t.Value, f) })
	case ast.Object:
		v.Foreach(func(_, t *ast.Term) { eachText(t.Value, f) })
	}
}

// in reports whether a text has something that is hidden.
func (h *hidden) in(text string) bool { return h.hide(text) != text }

// hide hides it.
func (h *hidden) hide(text string) string {
	for _, s := range h.long {
		text = strings.ReplaceAll(text, s, decisionlog.Redacted)
	}
	if len(h.short) == 0 {
		return text
	}
	words := strings.FieldsFunc(text, notWord)
	for _, w := range words {
		if h.short[w] {
			text = strings.ReplaceAll(text, w, decisionlog.Redacted)
		}
	}
	return text
}

// notWord reports whether a character ends a word.
func notWord(r rune) bool {
	return !(r == '.' || r == '-' || r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || r > 0x7f)
}

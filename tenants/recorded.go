package tenants

import (
	"errors"
	"fmt"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// Writer takes an input document as JSON, in its parts.
type Writer = decisionlog.Writer

// Recorded is an Input that a decision log keeps as it is, and of which it makes
// the document itself, when it delivers the decision: at any time, also while it
// is asked for the policy, and any number of times.
type Recorded interface {
	Input

	// Weight estimates what the Input keeps in memory, in bytes, once the question
	// is answered.
	Weight() int64

	// WriteInput writes the document that Input makes with these needs to w. It
	// reports false where it cannot: then Input is asked.
	WriteInput(w Writer, needs Needs) bool
}

// document is the input of a question as its record keeps it.
type document struct {
	input Recorded
	needs Needs // of the whole document
}

// Value makes the whole document.
func (d *document) Value() (ast.Value, error) { return d.input.Input(d.needs) }

// Write writes it.
func (d *document) Write(w decisionlog.Writer) bool { return d.input.WriteInput(w, d.needs) }

// keepInput puts the input of a question into its event, and what the values of
// the event weigh.
func keepInput(e *decisionlog.Event, q *Question, r *result) (err error) {
	input, recorded := q.Input.(Recorded)
	weight := int64(0)
	switch {
	case errors.Is(e.Error, ErrInvalid):
		e.Input = ast.Null{} // as opa-envoy-plugin has it
	case recorded && r.input != nil:
		e.Document, weight = &document{input, r.needs.whole()}, input.Weight()
	default:
		e.Input, err = wholeInput(q.Input, r.input, r.needs)
	}
	e.Size = weight + decisionlog.SizeOf(e.Input, e.Result, e.NDBuiltinCache)
	return err
}

// inputOf returns the input of a decision that is remembered, which is made again
// if need be; nil: it has none.
func inputOf(m *decisionlog.Memory) (ast.Value, error) {
	v, err := m.InputValue()
	if err != nil {
		return nil, fmt.Errorf("%w: input of %q: %w", ErrNotRemembered, m.DecisionID, err)
	}
	return v, nil
}

package httpserve

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// data answers one question about one of the paths that the tenant names, as
// OPA's data API does: GET with ?input=, or POST with {"input": ...}. A path that
// the policy says nothing about has no result.
func (s *Server) data(w http.ResponseWriter, r *request) error {
	start := time.Now()
	entry, ok := entryOf(r.Rest)
	if !ok || !slices.Contains(r.Offers.Data, entry) {
		return errRoute
	}
	opts, err := optionsOf(r)
	if err != nil {
		return err
	}
	var text []byte
	if r.Method == http.MethodGet {
		if inputs := opts.query["input"]; len(inputs) > 0 {
			text = []byte(inputs[len(inputs)-1])
		}
	} else {
		body, err := s.bodyOf(r, bodyBytes(r.View.Settings))
		if err != nil {
			return err
		}
		defer body.release()
		m, err := membersOf(body.text, "input")
		if err != nil {
			return err
		}
		text = m["input"]
	}
	parsed := time.Since(start)

	q := r.question(entry, jsonInput(text))
	q.Timed = opts.metrics
	q.BodyBytes = int64(len(text))
	a, err := s.ask(r, &q)
	if err != nil {
		return err
	}
	out := newOutput()
	out.begin('{')
	out.string("decision_id", q.DecisionID)
	if opts.provenance {
		out.provenance(a.Bundles)
	}
	if opts.metrics {
		out.metrics("timer_rego_input_parse_ns", parsed, "timer_rego_query_eval_ns", a.Evaluation, "timer_server_handler_ns", time.Since(start))
	}
	if a.Decision.Value != nil {
		if err := out.value("result", a.Decision.Value); err != nil {
			return err
		}
	}
	if text == nil && r.Method != http.MethodGet {
		out.warning("'input' key missing from the request")
	}
	out.end('}')
	return out.send(w, r, http.StatusOK, opts.pretty)
}

// question returns a question about an entry point of the tenant's own settings.
func (r *request) question(entry string, input tenants.Input) tenants.Question {
	q := r.asked()
	q.DecisionID, q.Entry, q.Own, q.Value, q.Input = tenants.NewDecisionID(), entry, true, true, input
	return q
}

// asked is what the questions of a request have in common: what is recorded of who
// asks.
func (r *request) asked() tenants.Question {
	q := tenants.Question{RequestID: r.id, RequestedBy: r.RemoteAddr}
	if r.Caller != nil && r.Caller.Subject != "" {
		q.RequestedBy = r.Caller.Subject
	}
	q.Trace = r.server.propagators.Read(func(name string) string { return r.Header.Get(traceHeaders[name]) })
	return q
}

// traceHeaders are the headers of propagators, as net/http writes them.
var traceHeaders = map[string]string{ // :: in lower case → as a key of http.Header
	"traceparent": "Traceparent", "tracestate": "Tracestate", "b3": "B3",
	"x-b3-traceid": "X-B3-Traceid", "x-b3-spanid": "X-B3-Spanid", "x-b3-sampled": "X-B3-Sampled", "x-b3-flags": "X-B3-Flags",
}

// ask asks one question. An answer without a value is one that the policy has
// not; what else goes wrong is the error, and so is a denial of the operator's
// own policy.
func (s *Server) ask(r *request, q *tenants.Question) (tenants.Answer, error) {
	a := tenants.Answer{Err: errNoAnswer}
	ctx, cancel := r.bounded(0)
	defer cancel()
	if err := s.pool.Decide(ctx, r.Tenant, []tenants.Question{*q}, func(_ int, got tenants.Answer) { a = got }); err != nil {
		return a, err
	}
	return a, errorIn(&a)
}

// errNoAnswer is an error of ours.
var errNoAnswer = errors.New("no answer")

// errGuard: the operator's own policy says no, whatever the tenant's says.
var errGuard = faultf(http.StatusForbidden, codeUnauthorized, "request rejected by administrative policy")

// errorIn returns why an answer has no value. That the policy says nothing is no
// error.
func errorIn(a *tenants.Answer) error {
	switch {
	case a.Guard, errors.Is(a.Err, tenants.ErrGuard) && errors.Is(a.Err, policy.ErrUndefined):
		return errGuard
	case errors.Is(a.Err, tenants.ErrGuard):
		return a.Err
	case errors.Is(a.Err, policy.ErrUndefined), errors.Is(a.Err, policy.ErrEntry):
		a.Decision = policy.Decision{}
		return nil
	}
	return a.Err
}

// defaultBody bounds a body where the tenant's settings do not, in bytes.
const defaultBody = 1 << 20

// bodyBytes bounds the body of a request to a tenant.
func bodyBytes(s *tenants.Settings) int64 {
	if s.Limits.BodyBytes > 0 {
		return s.Limits.BodyBytes
	}
	return defaultBody
}

// jsonInput is an input that is a JSON text; nil: there is none.
type jsonInput []byte

// Input parses the text.
func (t jsonInput) Input(needs tenants.Needs) (ast.Value, error) {
	if t == nil {
		return nil, nil
	}
	return parseInput(t, needs)
}

// errInput: an input is no JSON, or has an object with one key twice.
var errInput = invalidf("input is not JSON whose objects have each key once")

func parseInput(text []byte, needs tenants.Needs) (ast.Value, error) {
	v, err := policy.ParseJSON(text, needs.Cancel)
	if errors.Is(err, policy.ErrCanceled) {
		return nil, err
	}
	if err != nil {
		return nil, errors.Join(tenants.ErrInvalid, errInput)
	}
	return v, nil
}

// bounded returns the context of a request: within limit (0: none) and what the
// client gives it, and no longer than the client stays.
func (r *request) bounded(limit time.Duration) (context.Context, context.CancelFunc) {
	if own := timeoutOf(r.Header); own > 0 && (limit <= 0 || own < limit) {
		limit = own
	}
	if limit <= 0 {
		return r.Context(), func() {}
	}
	return context.WithTimeout(r.Context(), limit)
}

package tenants

import (
	"errors"
	"log/slog"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Question is one question to a tenant's policy.
type Question struct {
	// DecisionID names the decision in the answer, the log and the input.
	DecisionID string

	// Entry is the entry point to ask, like "envoy/authz/allow". Empty asks
	// the tenant's default one. One that the operator has not listed for the
	// tenant is answered with ErrEntry.
	Entry string

	// Own says that Entry was taken from the tenant's own settings, as View gives
	// them, and not from a request. Then it need not be one of those that a
	// request may name.
	Own bool

	// Value asks for the entry point's value as it is: it need not be a
	// decision. Then a Decision has the Value, and is Allowed if that is true or
	// an object whose "allowed" is.
	Value bool

	// What is recorded of the question beside, each of them optional: the batch
	// that it is an item of, the caller's trace and request, and who asks.
	BatchDecisionID string
	Batch           *decisionlog.Batch
	Trace
	RequestID   uint64
	RequestedBy string

	// Twins are questions with the same input, which are not asked: each is
	// recorded as a decision of its own, with the answer to this one. Where the
	// entry point can answer one question in two ways, because of the time or of
	// what else no policy says, each is asked: see Answer.Of.
	Twins []Twin

	// Needed reports whether the question is still to be asked. It is called in
	// its turn, when all questions before it have been answered; where it is not
	// needed, the question is neither asked nor answered nor recorded. Nil: it
	// is needed.
	Needed func() bool

	// Timed asks for Answer.Evaluation.
	Timed bool

	// BodyBytes is the size of the body that Input reads. It counts against
	// the budgets for bodies until the question is done.
	BodyBytes int64

	// Input makes the input document. It runs on one of the pool's workers,
	// within the deadline, and may still run after Decide has returned: it
	// must not use what its maker reuses. It may be asked again for the whole
	// document, at any time, also while it is making one.
	Input Input
}

// Attrs name the question in the logs of the server: its decision, and the trace
// of its caller where there is one.
func (q *Question) Attrs() slog.Attr {
	if q.TraceID == "" {
		return slog.Group("", "decision_id", q.DecisionID)
	}
	return slog.Group("", "decision_id", q.DecisionID, "trace_id", q.TraceID)
}

// Input makes the input document of a question, when it is asked for.
type Input interface {
	// Input returns the input, or an error that wraps ErrInvalid or
	// ErrTooLarge when the request cannot be made into one.
	Input(needs Needs) (ast.Value, error)
}

// Answer is the answer to one question.
type Answer struct {
	// Decision is what the tenant's policy decided. Where Err is set it is
	// the zero Decision, a denial.
	Decision policy.Decision

	// Err is why there is no decision: it wraps one of the errors of this
	// package or of package policy. Not knowing is not allowing.
	Err error

	// Of says for whom the answer is: 0 for the question and all of its Twins, 1
	// for the question alone, 2 for the first of its Twins, and so on.
	Of int

	// OnError says how the tenant wants its own faults answered. It is
	// OnErrorDeny for an Err that no setting may soften: ErrInvalid,
	// ErrTooLarge, ErrPartialBody, ErrEntry, ErrUnknown, ErrNotLogged, and any before the
	// operator's own policy has allowed.
	OnError OnError

	// DryRun reports whether the tenant only wants denials to be seen, not
	// enforced. It softens decisions of the tenant's policy: no faults, and no
	// denial of the operator's own.
	DryRun bool

	// Guard reports whether the operator's own policy gave this answer, and
	// the tenant's was not asked.
	Guard bool

	// Bundles are those that the tenant decides by, with their revisions: the
	// same for all answers of one call. Nil before there are any. They must not
	// be changed.
	Bundles []decisionlog.Bundle

	// State is that of a View of what has answered, or of what was there just
	// before. "": nothing was there.
	State string

	// Naming says where a header is to name the decision. Nil: nowhere.
	Naming *Naming

	// Evaluation is how long the evaluation took, where that was asked for.
	Evaluation time.Duration
}

// OnError is what a fault of ours, or of the tenant's policy, is answered with.
type OnError int

const (
	OnErrorDeny     OnError = iota // an explicit denial
	OnErrorAllow                   // an explicit permission
	OnErrorUpstream                // an error of the protocol, so that the caller's own failure mode decides
)

// The errors of Decide and of an Answer, beside those of package policy.
var (
	// ErrUnknown: no such tenant.
	ErrUnknown = errors.New("unknown tenant")
	// ErrNotReady: the tenant has no policy yet.
	ErrNotReady = errors.New("tenant is not ready")
	// ErrBusy: a bound on waiting work is met.
	ErrBusy = errors.New("tenant is busy")
	// ErrDeadline: no decision within the time there was.
	ErrDeadline = errors.New("deadline exceeded")
	// ErrInvalid: the request cannot be understood.
	ErrInvalid = errors.New("request cannot be parsed")
	// ErrTooLarge: the request is over a bound.
	ErrTooLarge = errors.New("request is too large")
	// ErrPartialBody: a body that the policy reads is not whole, or cannot be
	// parsed.
	ErrPartialBody = errors.New("request body is partial")
	// ErrEntry: the operator has not listed this entry point for the tenant.
	ErrEntry = errors.New("entry point is not listed")
	// ErrNotLogged: the answer is not given since it cannot be recorded.
	ErrNotLogged = errors.New("decision cannot be logged")
	// ErrGuard: the operator's own policy has no decision. It comes with the
	// reason.
	ErrGuard = errors.New("operator's policy")
	// ErrPanic: a panic of ours or of a builtin, caught.
	ErrPanic = errors.New("panic while deciding")
)

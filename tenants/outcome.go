package tenants

import (
	"errors"
	"sync/atomic"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// outcome is what a question came to, as it is counted.
type outcome int

// The outcomes of a check.
const (
	outcomeAllowed     outcome = iota // the policy allowed
	outcomeDenied                     // the policy denied
	outcomeUndefined                  // the policy has no value
	outcomeResult                     // the policy's value is not a decision, or it has several
	outcomeError                      // evaluation failed, or panicked
	outcomeDeadline                   // no answer in time
	outcomeBusy                       // a bound on waiting work was met
	outcomeNotReady                   // the tenant has no policy yet
	outcomeInvalid                    // the request cannot be understood
	outcomeTooLarge                   // the request is over a bound
	outcomePartialBody                // a body that the policy reads is not whole
	outcomeNoEntry                    // the entry point is not listed
	outcomeNoTenant                   // no tenant is named, or an invalid one
	outcomeUnknown                    // there is no such tenant
	outcomeNotLogged                  // the answer was not given since it cannot be recorded
	outcomes           int     = iota
)

var outcomeNames = [outcomes]string{
	"allowed", "denied", "undefined", "bad_result", "error", "deadline", "busy",
	"not_ready", "invalid", "too_large", "partial_body", "no_entry", "no_tenant", "unknown_tenant", "not_logged",
}

// faultOutcomes is from error to outcome; what is not here is outcomeError.
var faultOutcomes = []struct {
	err     error
	outcome outcome
}{
	{ErrNotLogged, outcomeNotLogged},
	{policy.ErrUndefined, outcomeUndefined},
	{policy.ErrConflict, outcomeResult},
	{policy.ErrResult, outcomeResult},
	{policy.ErrCanceled, outcomeDeadline},
	{ErrDeadline, outcomeDeadline},
	{ErrBusy, outcomeBusy},
	{ErrNotReady, outcomeNotReady},
	{ErrInvalid, outcomeInvalid},
	{ErrTooLarge, outcomeTooLarge},
	{ErrPartialBody, outcomePartialBody},
	{ErrEntry, outcomeNoEntry},
	{ErrUnknown, outcomeUnknown},
}

func outcomeOf(a *Answer) outcome {
	switch {
	case a.Err == nil && a.Decision.Allowed:
		return outcomeAllowed
	case a.Err == nil:
		return outcomeDenied
	}
	for _, f := range faultOutcomes {
		if errors.Is(a.Err, f.err) {
			return f.outcome
		}
	}
	return outcomeError
}

// counts are the checks of one tenant by outcome.
type counts [outcomes]atomic.Uint64

func (c *counts) byOutcome() map[string]uint64 {
	var m map[string]uint64
	for o := range c {
		if n := c[o].Load(); n > 0 {
			if m == nil {
				m = map[string]uint64{}
			}
			m[outcomeNames[o]] = n
		}
	}
	return m
}

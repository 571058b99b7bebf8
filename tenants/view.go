package tenants

import (
	"context"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// View is what a tenant is at one moment, for those who ask it more than single
// questions.
type View struct {
	// Settings are those in force, with what was discovered.
	Settings *Settings

	// Revision names the bundle's revision, or that of the first by name.
	Revision string

	// State is equal for two views if, and only if, the same policies, the
	// tenant's and the operator's, decide under the same settings in both:
	// answers that depend on the question alone are then the same too.
	State string

	policy, guard *policy.Policy // guard: the operator's; nil: there is none
	guardEntry    string
}

// Has reports whether the tenant's policy says anything about an entry point of
// its settings.
func (v *View) Has(entry string) bool { return v.policy != nil && v.policy.Has(entry) }

// Varies reports whether an entry point of its settings can answer one question
// in two ways under one State: because of the time, or of anything else that no
// policy says.
func (v *View) Varies(entry string) bool {
	return v.policy.Varies(entry) || v.guard != nil && v.guard.Varies(v.guardEntry)
}

// ReadsTokenClaims reports whether the answers of an entry point of its settings
// can follow from one of policy.TokenClaims.
func (v *View) ReadsTokenClaims(entry string) bool {
	return v.policy.ReadsTokenClaims(entry) || v.guard != nil && v.guard.ReadsTokenClaims(v.guardEntry)
}

// View returns what a tenant is. It waits for its first load as Decide does, no
// longer than the tenant's evaluation time. The error is that of Decide or wraps
// ErrNotReady or ErrBusy; with these there is a View nevertheless, where it is
// known what the operator says of the tenant, without a policy.
func (p *Pool) View(ctx context.Context, id ID) (*View, error) {
	in := p.instanceOf(id)
	c := p.newCall(ctx, in, time.Now(), nil)
	defer c.free()
	rev, err := c.revision(ctx)
	if err != nil {
		return nil, err
	}
	v := &View{
		Settings: in.settings,
		Revision: rev.policy.Revisions()[0].Revision,
		State:    p.stateOf(rev),
		policy:   rev.policy,
	}
	if p.guard != nil {
		v.guard, v.guardEntry = p.guard.current.Load().policy, p.guard.settings.Entry
	}
	return v, nil
}

// stateOf is the State of what decides: a tenant's revision, and that of the
// operator's policy, which is loaded.
func (p *Pool) stateOf(rev *revision) string {
	if p.guard == nil {
		return rev.state
	}
	return rev.state + "." + p.guard.current.Load().state
}

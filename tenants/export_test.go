package tenants

import "github.com/gatehouse-authz/gatehouse/policy"

// TellDifference logs a difference as if a verified decision of the tenant had it.
func (p *Pool) TellDifference(id ID, decisionID string, d *policy.Difference) {
	in := p.known(id)
	rev := in.current.Load()
	p.verifier.tell(verification{in: in, rules: rev.rules, policy: rev.policy, entry: d.Entry, input: d.Input, decisionID: decisionID}, d)
}

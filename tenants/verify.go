package tenants

import (
	"context"
	"strconv"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// maxVerifications bounds the decisions that wait to be verified, over all
// tenants. One that finds no room is not verified.
const maxVerifications = 16

// verifier has decisions made again by both evaluators, beside those of questions
// and one after the other.
type verifier struct {
	pool    *Pool
	waiting chan verification
	counts  *prometheus.CounterVec
}

// verification is a decision to be made again.
type verification struct {
	in     *instance
	policy *policy.Policy
	entry  string
	input  ast.Value
}

func newVerifier(p *Pool, reg prometheus.Registerer) *verifier {
	v := &verifier{
		pool:    p,
		waiting: make(chan verification, maxVerifications),
		counts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "gatehouse_verified_decisions_total",
			Help: "Decisions that were made again by both evaluators, by outcome: equal; different, after which topdown evaluates that policy; dropped, since too many waited.",
		}, []string{"outcome"}),
	}
	for _, outcome := range []string{"equal", "different", "dropped"} {
		v.counts.WithLabelValues(outcome)
	}
	if reg != nil {
		reg.MustRegister(v.counts)
	}
	return v
}

// offer has a decision verified if it is the turn of one of its tenant. It never
// waits.
func (v *verifier) offer(j *job, in *instance) {
	n := in.settings.Verify
	if n <= 0 || j.input == nil || !j.cleared.Load() || in.decided.Add(1)%uint64(n) != 0 {
		return
	}
	select {
	case v.waiting <- verification{in, j.policy, j.entry, j.input}:
	default:
		v.counts.WithLabelValues("dropped").Inc()
	}
}

// run verifies what is offered until ctx ends.
func (v *verifier) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case next := <-v.waiting:
			v.verify(next)
		}
	}
}

func (v *verifier) verify(next verification) {
	err := v.pool.aside(2*next.in.limits.EvaluationTime, func(cancel *policy.Cancel) error {
		d, verified := next.policy.Verify(context.Background(), next.entry, next.input, next.in.env, cancel)
		if !verified {
			return nil
		}
		if d == nil {
			v.counts.WithLabelValues("equal").Inc()
			return nil
		}
		v.counts.WithLabelValues("different").Inc()
		v.pool.log.Error("evaluators differ: topdown evaluates the policy from now on",
			"tenant", next.in.id, "entry", next.entry, "bundles", revisionsAttr(next.policy.Revisions()), "difference", d.String())
		return nil
	})
	if err != nil {
		v.pool.log.Warn("verifying a decision", "tenant", next.in.id, "error", err)
	}
}

// ParseShare returns n of a share written as 1/n; "" is 0, which is none.
func ParseShare(text string) (int, bool) {
	if text == "" {
		return 0, true
	}
	rest, ok := strings.CutPrefix(text, "1/")
	n, err := strconv.Atoi(rest)
	return n, ok && err == nil && n > 0
}

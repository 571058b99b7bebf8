package tenants

import (
	"context"
	"encoding/json"
	"strconv"
	"strings"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
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
	in         *instance
	rules      *decisionlog.Rules // what its decision is masked by
	policy     *policy.Policy
	entry      string
	input      ast.Value
	decisionID string
	needs      Needs // of input
	whole      Input
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
func (v *verifier) offer(j *job, in *instance, rev *revision) {
	n := in.settings.Verify
	if n <= 0 || j.input == nil || !j.cleared.Load() || in.decided.Add(1)%uint64(n) != 0 {
		return
	}
	select {
	case v.waiting <- verification{in, rev.rules, j.policy, j.entry, j.input, j.question.DecisionID, j.needs, j.question.Input}:
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
		d, verified := next.policy.Verify(context.Background(), next.entry, next.input, next.in.env(), cancel)
		switch {
		case d != nil:
			// Here, where a panic is caught, and though the time may be over: the
			// policy has gone back to topdown, and somebody is to know.
			v.counts.WithLabelValues("different").Inc()
			v.tell(next, d)
		case verified:
			v.counts.WithLabelValues("equal").Inc()
		}
		return nil
	})
	if err != nil {
		v.pool.log.Warn("verifying a decision", "tenant", next.in.id, "error", err)
	}
}

// maxToldAnswer bounds each answer in the log of a difference, in bytes.
const maxToldAnswer = 4 << 10

// tell logs where two answers differ, and both as they would be in the tenant's
// decision log: masked by its rules, with secrets hidden. Where these rules keep
// a decision out of logs, the answers are not told.
func (v *verifier) tell(next verification, d *policy.Difference) {
	attrs := []any{
		"tenant", next.in.id, "entry", next.entry, "decision_id", next.decisionID,
		"bundles", revisionsAttr(next.policy.Revisions()), "difference", d.String(),
	}
	logs := v.pool.cfg.Logs
	if logs == nil {
		v.pool.log.Error(evaluatorsDiffer, attrs...)
		return
	}
	answers := [2]string{"undefined", "undefined"}
	if d.Err != nil {
		answers[1] = "an error"
	}
	input, err := wholeInput(next.whole, d.Input, next.needs) // rules about what is logged see all of it
	if err != nil {
		v.pool.log.Error(evaluatorsDiffer, append(attrs, "withheld", err)...)
		return
	}
	var memories []*decisionlog.Memory
	var of []int // :: memory → its answer
	for i, value := range []ast.Value{d.Plan, d.Topdown} {
		if value != nil {
			m := &decisionlog.Memory{Tenant: string(next.in.id), Labels: next.in.settings.Labels, Rules: next.rules}
			m.DecisionID, m.Path, m.Timestamp, m.Input, m.Result = next.decisionID, next.entry, time.Now(), input, value
			memories, of = append(memories, m), append(of, i)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*maxFilterTime)
	defer cancel()
	shown := 0
	err = logs.Show(ctx, memories, nil, next.in.filterTime(), func(s decisionlog.Shown, err error) bool {
		answers[of[shown]] = resultText(s.JSON, err)
		shown++
		return true
	})
	if err != nil {
		attrs = append(attrs, "withheld", err)
	}
	v.pool.log.Error(evaluatorsDiffer, append(attrs, "plan", answers[0], "topdown", answers[1])...)
}

const evaluatorsDiffer = "evaluators differ: topdown evaluates the policy from now on"

// resultText is the result in an event, or why there is none.
func resultText(event []byte, err error) string {
	if err != nil {
		return err.Error()
	}
	var of struct {
		Result json.RawMessage `json:"result"`
	}
	if err := json.Unmarshal(event, &of); err != nil {
		return err.Error()
	}
	switch text := of.Result; {
	case len(text) == 0:
		return "erased by the tenant's mask rule"
	case len(text) > maxToldAnswer:
		return strings.ToValidUTF8(string(text[:maxToldAnswer]), "") + "…"
	default:
		return string(text)
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

package tenants

import (
	"fmt"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// Settings are what the operator's file says of one tenant, its overrides
// merged in. They are never changed; a reload makes new ones.
type Settings struct {
	// Tenant is the tenant's OPA configuration: bundles, labels, entry points.
	*control.Tenant

	Limits Limits

	// OnError is what a fault is answered with.
	OnError OnError

	// WholeBody refuses requests whose body the policy reads, and that is not
	// whole or cannot be parsed.
	WholeBody bool

	// Network is what http.send of the tenant's policy may reach. Nil: there is
	// no http.send.
	Network *policy.Network

	// AllowHeaders are reserved headers that the tenant's policy may change.
	AllowHeaders []string

	// Evaluator says how the tenant's policies are evaluated; "" is policy.Auto.
	Evaluator policy.Evaluator

	// Verify has one in so many decisions made again by both evaluators, beside
	// the tenant's questions. 0: none.
	Verify int

	// Naming says where a header names the decision.
	Naming Naming
}

// Naming says where a header names the decision. The zero Naming: nowhere.
type Naming struct {
	Header   string // in lower case
	Upstream bool   // on the requests that are allowed
	Client   bool   // on answers to the client
}

// headerName is what the header may be called: no header that means something to
// others.
var headerName = regexp.MustCompile(`^x-[a-z0-9]+(-[a-z0-9]+)*$`)

// CheckHeader returns an error where no decision may be named in a header of this
// name, in any case.
func CheckHeader(name string) error {
	name = strings.ToLower(name)
	if !headerName.MatchString(name) || len(name) > 64 {
		return fmt.Errorf("%q is not a name like x-gatehouse-decision-id, of at most 64 bytes", name)
	}
	for _, prefix := range []string{"x-envoy-", "x-forwarded-", "x-amz-", "x-request-id"} {
		if strings.HasPrefix(name, prefix) {
			return fmt.Errorf("%q means something else to proxies", name)
		}
	}
	return nil
}

// On reports whether there is such a header. Then no client can set it.
func (n *Naming) On() bool { return n != nil && n.Header != "" && (n.Upstream || n.Client) }

// Limits bound what one tenant may use. A zero field means its default.
type Limits struct {
	// EvaluationTime bounds the time to an answer, waiting for the tenant to
	// load and for a slot included; default 500 ms.
	EvaluationTime time.Duration

	// Concurrency is how many evaluations of the tenant run at once; default
	// the number of CPUs that the process may use, at least 2.
	Concurrency int

	// BodyBytes bounds the body of a request; default 1 MiB.
	BodyBytes int64

	// BodyMemory bounds the bodies of the tenant that are being read at once,
	// waiting ones included; default 64 MiB, at least BodyBytes. What is over
	// it is answered with ErrBusy.
	BodyMemory int64
}

const (
	defaultEvaluationTime = 500 * time.Millisecond
	defaultBodyBytes      = 1 << 20
	defaultBodyMemory     = 64 << 20
)

func (l Limits) withDefaults(cpus int) Limits {
	if l.EvaluationTime <= 0 {
		l.EvaluationTime = defaultEvaluationTime
	}
	if l.Concurrency <= 0 {
		l.Concurrency = max(2, cpus)
	}
	if l.BodyBytes <= 0 {
		l.BodyBytes = defaultBodyBytes
	}
	if l.BodyMemory <= 0 {
		l.BodyMemory = defaultBodyMemory
	}
	l.BodyMemory = max(l.BodyMemory, l.BodyBytes)
	return l
}

// env is what evaluations take from a tenant of these settings.
func (s *Settings) env(again *atomic.Int64) *policy.Env {
	return policy.NewEnvWith(policy.EnvOptions{Labels: s.Labels, Caching: s.Caching, Network: s.Network, Again: again})
}

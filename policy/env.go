package policy

import (
	"context"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/version"
)

// Env is what an evaluation takes from the tenant it answers for. It lives as
// long as the tenant and is used by any number of evaluations at once.
type Env struct {
	labels  map[string]string
	shown   atomic.Pointer[ast.Term] // what opa.runtime gives; nil: it was not asked for
	values  *valueCaches
	answers *sendCache                    // nil: no network
	network topdown.CustomizeRoundTripper // nil: no network
	again   *atomic.Int64                 // nil: not counted
}

// EnvOptions are what an Env is made of. The zero EnvOptions are good.
type EnvOptions struct {
	// Labels are all that opa.runtime shows, at config.labels, beside OPA's
	// version. They must not be changed.
	Labels map[string]string

	// Caching says what is remembered between questions.
	Caching Caching

	// Network is what http.send may reach. Nil: nothing.
	Network *Network

	// Again counts the evaluations by a plan that ended with an error, after
	// which topdown was asked. Nil: they are not counted.
	Again *atomic.Int64
}

// Caching is the caching block of OPA's configuration, beside which there are
// bounds that hold whatever it says. No cache is unlimited: a number that is not
// positive means the default.
type Caching struct {
	// Bytes is max_size_bytes of inter_query_builtin_cache, which holds answers
	// to http.send. Default 4 MiB, at most 64 MiB; that counts their keys too.
	Bytes int64

	// ForcedEviction is forced_eviction_threshold_percentage: of how much of
	// Bytes the oldest are forgotten. Default 100.
	ForcedEviction int

	// StaleEviction is stale_entry_eviction_period_seconds: what is stale is
	// forgotten so often, when something new comes. Default: only for lack of
	// room.
	StaleEviction time.Duration

	// Values is max_num_entries of inter_query_builtin_value_cache, which holds
	// patterns and schemas. Default 1,000, at most 100,000; their keys together
	// have at most 4 MiB, in this cache and in each named one.
	Values int

	// Named are the named ones, such as io_jwt, which holds verified tokens and
	// is disabled unless it is here. // :: name → cache
	Named map[string]NamedCaching
}

// NamedCaching says what one named cache holds.
type NamedCaching struct {
	Values   int  // max_num_entries; default 100, at most 100,000
	Disabled bool // it holds nothing
}

// NewEnv returns the Env of a tenant with these labels, and no network.
func NewEnv(labels map[string]string) *Env {
	return NewEnvWith(EnvOptions{Labels: labels})
}

// NewEnvWith returns the Env of a tenant. It takes little memory until there is
// something to remember, and owns no goroutine.
func NewEnvWith(opts EnvOptions) *Env {
	env := &Env{labels: opts.Labels, values: newValueCaches(opts.Caching), again: opts.Again}
	if opts.Network != nil {
		env.answers = newSendCache(opts.Caching)
		env.network = opts.Network.tenant()
	}
	return env
}

// lend gives an evaluation what is the tenant's.
func (env *Env) lend(q *topdown.Query, e *entry) {
	q.WithRuntime(env.runtime(e)).WithInterQueryBuiltinValueCache(env.values)
	if env.network != nil {
		q.WithInterQueryBuiltinCache(env.answers).WithHTTPRoundTripper(env.network)
	}
}

// runtime returns what opa.runtime shows to an entry point, which is made when
// the first asks for it.
func (env *Env) runtime(e *entry) *ast.Term {
	if !e.reads.runtime {
		return noRuntime
	}
	t := env.shown.Load()
	if t == nil {
		t = runtimeOf(env.labels)
		env.shown.Store(t)
	}
	return t
}

var noRuntime = runtimeOf(nil)

func runtimeOf(labels map[string]string) *ast.Term {
	shown := ast.NewObject()
	for k, v := range labels {
		shown.Insert(ast.StringTerm(k), ast.StringTerm(v))
	}
	return ast.ObjectTerm(
		ast.Item(ast.StringTerm("config"), ast.ObjectTerm(ast.Item(ast.StringTerm("labels"), ast.NewTerm(shown)))),
		ast.Item(ast.StringTerm("env"), ast.ObjectTerm()),
		ast.Item(ast.StringTerm("version"), ast.StringTerm(version.Version)),
		ast.Item(ast.StringTerm("commit"), ast.StringTerm("")),
	)
}

// Cancel stops an evaluation. The zero Cancel is ready to use.
type Cancel struct {
	set   atomic.Bool
	stop  atomic.Pointer[context.CancelFunc] // stops what the evaluation waits for
	steps int                                // counted by the evaluation alone
}

// yieldSteps is after how many steps an evaluation lets other goroutines run: a
// fraction of a millisecond. The Go runtime by itself would let it run for ten,
// and for as long nobody would look at the network on that processor.
const yieldSteps = 1024

// Cancel asks the evaluation to stop. Any goroutine may call it.
func (c *Cancel) Cancel() {
	c.set.Store(true)
	if stop := c.stop.Load(); stop != nil {
		(*stop)()
	}
}

// Reset makes c as it was before Cancel. Nothing that c was given to may run.
func (c *Cancel) Reset() {
	c.set.Store(false)
	c.stop.Store(nil)
	c.steps = 0
}

// stops has Cancel call stop too, until the caller calls end. It is for the one
// goroutine that evaluates.
func (c *Cancel) stops(stop context.CancelFunc) (end func()) {
	before := c.stop.Swap(&stop)
	if c.set.Load() {
		stop()
	}
	return func() { c.stop.Store(before) }
}

// Cancelled reports whether Cancel was called. It is for the one goroutine that
// evaluates, which calls it at each step.
func (c *Cancel) Cancelled() bool {
	if c.steps++; c.steps%yieldSteps == 0 {
		runtime.Gosched()
	}
	return c.set.Load()
}

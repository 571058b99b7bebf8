package policy

import (
	"context"
	"runtime"
	"slices"
	"sync/atomic"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown/cache"
	"github.com/open-policy-agent/opa/v1/version"
)

// valueEntries bounds what one tenant's builtins remember between questions:
// compiled patterns, parsed keys, verified tokens.
const valueEntries = 1000

// Env is what an evaluation takes from the tenant it answers for. It lives as
// long as the tenant and is used by any number of evaluations at once.
type Env struct {
	runtime *ast.Term
	values  cache.InterQueryValueCache
}

// NewEnv returns the Env of a tenant with these labels. Labels are all that
// opa.runtime shows, at config.labels, beside OPA's version.
func NewEnv(labels map[string]string) *Env {
	entries := valueEntries
	return &Env{
		runtime: runtimeOf(labels),
		values: cache.NewInterQueryValueCache(context.Background(), &cache.Config{
			InterQueryBuiltinValueCache: cache.InterQueryBuiltinValueCacheConfig{MaxNumEntries: &entries},
		}),
	}
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
	steps int // counted by the evaluation alone
}

// yieldSteps is after how many steps an evaluation lets other goroutines run: a
// fraction of a millisecond. The Go runtime by itself would let it run for ten,
// and for as long nobody would look at the network on that processor.
const yieldSteps = 1024

// Cancel asks the evaluation to stop. Any goroutine may call it.
func (c *Cancel) Cancel() { c.set.Store(true) }

// Cancelled reports whether Cancel was called. It is for the one goroutine that
// evaluates, which calls it at each step.
func (c *Cancel) Cancelled() bool {
	if c.steps++; c.steps%yieldSteps == 0 {
		runtime.Gosched()
	}
	return c.set.Load()
}

// forbidden are the builtins that reach the network.
var forbidden = []string{
	ast.HTTPSend.Name,
	ast.NetLookupIPAddr.Name,
}

// capabilities are what policies are compiled with: all of this OPA but for
// the builtins that reach the network, and no host for schemas to refer to.
var capabilities = func() *ast.Capabilities {
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(slices.Clone(c.Builtins), func(b *ast.Builtin) bool {
		return slices.Contains(forbidden, b.Name)
	})
	c.AllowNet = []string{}
	return c
}()

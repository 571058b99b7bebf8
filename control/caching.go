package control

import (
	"maps"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/policy"
)

// caching reads what a tenant's builtins remember between questions.
func (r *reader) caching(o object, t *Tenant) {
	c := o.object("caching")
	answers := c.object("inter_query_builtin_cache")
	t.Caching = policy.Caching{
		Bytes:          answers.count("max_size_bytes", 0, 0, 1<<40),
		ForcedEviction: int(answers.count("forced_eviction_threshold_percentage", 0, 0, 100)),
		StaleEviction:  time.Duration(answers.count("stale_entry_eviction_period_seconds", 0, 0, 1<<30)) * time.Second,
	}
	answers.end()
	values := c.object("inter_query_builtin_value_cache")
	t.Caching.Values = int(values.count("max_num_entries", 0, 0, 1<<30))
	named := values.object("named")
	for _, name := range slices.Sorted(maps.Keys(named.m)) {
		n := named.object(name)
		if t.Caching.Named == nil {
			t.Caching.Named = map[string]policy.NamedCaching{}
		}
		t.Caching.Named[name] = policy.NamedCaching{Values: int(n.count("max_num_entries", 0, 0, 1<<30)), Disabled: n.bool("disabled")}
		n.end()
	}
	values.end()
	c.end()
}

package policy

import (
	"context"
	"strings"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown/cache"
	"github.com/open-policy-agent/opa/v1/util"
)

// The bounds of a cache of values.
const (
	valueEntries    = 1000    // entries, where no number is configured
	namedEntries    = 100     // of a cache with a name
	maxValueEntries = 100_000 // whatever is configured
	maxValueBytes   = 4 << 20 // of its keys together; one has at most a quarter
)

// valueCaches are what one tenant's builtins remember between questions, under
// OPA's interface: compiled patterns, parsed keys, verified tokens. Memory is
// taken when there is something to remember.
type valueCaches struct {
	valueCache
	config Caching

	naming sync.RWMutex
	named  map[string]*valueCache // :: name → its cache; nil: it is disabled
}

var _ cache.InterQueryValueCache = (*valueCaches)(nil)

func newValueCaches(config Caching) *valueCaches {
	return &valueCaches{valueCache: valueCache{most: entriesOf(config.Values, valueEntries)}, config: config}
}

func entriesOf(configured, none int) int {
	if configured <= 0 {
		configured = none
	}
	return min(configured, maxValueEntries)
}

// GetCache returns the cache of that name, or nil if it is disabled.
func (cs *valueCaches) GetCache(name string) cache.InterQueryValueCacheBucket {
	cs.naming.RLock()
	c, ok := cs.named[name]
	cs.naming.RUnlock()
	if !ok {
		c = cs.open(name)
	}
	if c == nil {
		return nil // not an interface that holds a nil pointer
	}
	return c
}

func (cs *valueCaches) open(name string) *valueCache {
	cs.naming.Lock()
	defer cs.naming.Unlock()
	if c, ok := cs.named[name]; ok {
		return c
	}
	if cs.named == nil {
		cs.named = make(map[string]*valueCache)
	}
	var c *valueCache
	if own, ok := cs.config.Named[name]; ok {
		if !own.Disabled {
			c = &valueCache{most: entriesOf(own.Values, namedEntries)}
		}
	} else if enabledByOPA(name) {
		c = &valueCache{most: namedEntries}
	}
	cs.named[name] = c
	return c
}

// UpdateConfig does nothing: another configuration is another Env.
func (cs *valueCaches) UpdateConfig(*cache.Config) {}

// enabledByOPA reports whether OPA has the named cache where nobody configures
// it.
func enabledByOPA(name string) bool {
	caches := cache.NewInterQueryValueCache(context.Background(), new(cache.Config))
	return caches.GetCache(name) != nil
}

// valueCache is one cache. What it has to forget it chooses at random.
type valueCache struct {
	most int

	mu    sync.RWMutex
	items *util.HasherMap[ast.Value, kept]
	bytes int64 // of the keys
}

type kept struct {
	value any
	bytes int64 // of its key
}

func (c *valueCache) Get(k ast.Value) (any, bool) {
	c.mu.RLock()
	defer c.mu.RUnlock()
	if c.items == nil {
		return nil, false
	}
	item, ok := c.items.Get(k)
	return item.value, ok
}

func (c *valueCache) Insert(k ast.Value, v any) (dropped int) {
	size := sizeOf(k)
	if size > maxValueBytes/4 {
		return 1
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.items == nil {
		c.items = util.NewHasherMap[ast.Value, kept](ast.ValueEqual)
	}
	c.remove(k)
	k = ownKey(k)
	for c.items.Len() > 0 && (c.items.Len() >= c.most || c.bytes+size > maxValueBytes) {
		var any ast.Value
		c.items.Iter(func(k ast.Value, _ kept) bool {
			any = k
			return true
		})
		c.remove(any)
		dropped++
	}
	c.items.Put(k, kept{v, size})
	c.bytes += size
	return dropped
}

// ownKey returns a key whose strings are no parts of others, such as of an input.
func ownKey(k ast.Value) ast.Value {
	switch k := k.(type) {
	case ast.String:
		return ast.String(strings.Clone(string(k)))
	case *ast.Array:
		terms := make([]*ast.Term, k.Len())
		for i := range terms {
			terms[i] = ast.NewTerm(ownKey(k.Elem(i).Value))
		}
		return ast.NewArray(terms...)
	}
	return k
}

func (c *valueCache) Delete(k ast.Value) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.items != nil {
		c.remove(k)
	}
}

// remove forgets k. The caller has the lock.
func (c *valueCache) remove(k ast.Value) {
	if old, ok := c.items.Get(k); ok {
		c.bytes -= old.bytes
		c.items.Delete(k)
	}
}

package policy

import (
	"container/list"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/topdown/cache"
)

// The bounds of a cache of answers.
const (
	sendCacheBytes    = 4 << 20  // where no size is configured
	maxSendCacheBytes = 64 << 20 // whatever is configured
	sizeAnswer        = 512      // of an entry beside its key and its value
)

// sendCache is what one tenant's http.send remembers of answers, under OPA's
// interface. It forgets the oldest first, and what is stale when it takes
// something new: no goroutine looks after it.
type sendCache struct {
	most  int64         // bytes
	sweep time.Duration // between two looks for what is stale; 0: none

	mu    sync.Mutex
	items map[string]*list.Element // :: text of the key → its answer
	order *list.List               // of *answer, the oldest first
	bytes int64
	swept time.Time
}

type answer struct {
	key     string
	value   cache.InterQueryCacheValue
	bytes   int64
	expires time.Time // zero: never
}

var _ cache.InterQueryCache = (*sendCache)(nil)

func newSendCache(config Caching) *sendCache {
	most := config.Bytes
	if most <= 0 {
		most = sendCacheBytes
	}
	most = min(most, maxSendCacheBytes)
	if p := config.ForcedEviction; p > 0 && p < 100 {
		most = most / 100 * int64(p)
	}
	return &sendCache{most: most, sweep: config.StaleEviction}
}

func (c *sendCache) Get(k ast.Value) (cache.InterQueryCacheValue, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.items[k.String()]; ok {
		return e.Value.(*answer).value, true
	}
	return nil, false
}

func (c *sendCache) Insert(k ast.Value, v cache.InterQueryCacheValue) int {
	return c.InsertWithExpiry(k, v, time.Time{})
}

func (c *sendCache) InsertWithExpiry(k ast.Value, v cache.InterQueryCacheValue, expires time.Time) (dropped int) {
	a := &answer{key: k.String(), value: v, expires: expires}
	a.bytes = sizeAnswer + int64(len(a.key)) + v.SizeInBytes()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.items == nil {
		c.items, c.order = make(map[string]*list.Element), list.New()
	}
	if e, ok := c.items[a.key]; ok {
		c.drop(e)
	}
	if a.bytes > c.most {
		return 1
	}
	if now := time.Now(); c.sweep > 0 && now.Sub(c.swept) >= c.sweep {
		c.swept = now
		for e := c.order.Front(); e != nil; {
			next := e.Next()
			if at := e.Value.(*answer).expires; !at.IsZero() && at.Before(now) {
				c.drop(e)
				dropped++
			}
			e = next
		}
	}
	for c.bytes+a.bytes > c.most {
		c.drop(c.order.Front())
		dropped++
	}
	c.items[a.key] = c.order.PushBack(a)
	c.bytes += a.bytes
	return dropped
}

func (c *sendCache) Delete(k ast.Value) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.items[k.String()]; ok {
		c.drop(e)
	}
}

// drop forgets an answer. The caller has the lock.
func (c *sendCache) drop(e *list.Element) {
	a := c.order.Remove(e).(*answer)
	delete(c.items, a.key)
	c.bytes -= a.bytes
}

// UpdateConfig does nothing: another configuration is another Env.
func (c *sendCache) UpdateConfig(*cache.Config) {}

// Clone returns a copy that its caller may change.
func (c *sendCache) Clone(v cache.InterQueryCacheValue) (cache.InterQueryCacheValue, error) {
	return v.Clone()
}

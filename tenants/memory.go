package tenants

import (
	"github.com/gatehouse-authz/gatehouse/policy"
)

// memory estimates what the revisions in use take. What tenants share counts
// once. Pool.mu guards it.
type memory struct {
	bytes int64
	uses  map[any]*use // :: *policy.Policy or *policy.Part → its use
}

// use is what revisions hold.
type use struct {
	revisions int
	bytes     int64 // that it took when it was last looked at
}

func newMemory() *memory { return &memory{uses: map[any]*use{}} }

// sized is what a revision holds: a policy or a part.
type sized interface{ Size() int64 }

func (rev *revision) held(f func(sized)) {
	if rev == nil {
		return
	}
	f(rev.policy)
	for _, c := range rev.content {
		f(c.part)
	}
}

// forget says that a revision decides no more: what is remembered of its decisions
// holds it no longer.
func (rev *revision) forget() {
	if rev != nil {
		rev.rules.Forget()
	}
}

// hold counts a revision that came into use.
func (m *memory) hold(rev *revision) {
	rev.held(func(s sized) {
		u := m.uses[s]
		if u == nil {
			u = &use{bytes: s.Size()}
			m.uses[s] = u
			m.bytes += u.bytes
		}
		u.revisions++
	})
}

// measure looks again at what a revision takes, which grows with what is asked of
// its data.
func (m *memory) measure(rev *revision) {
	rev.held(func(s sized) {
		if u := m.uses[s]; u != nil {
			was := u.bytes
			u.bytes = s.Size()
			m.bytes += u.bytes - was
		}
	})
}

// release ends the count of a revision that is out of use.
func (m *memory) release(rev *revision) {
	rev.held(func(s sized) {
		u := m.uses[s]
		if u.revisions--; u.revisions == 0 {
			m.bytes -= u.bytes
			delete(m.uses, s)
		}
	})
}

// size estimates what a revision takes, and how much of that it shares with
// none other.
func (m *memory) size(rev *revision) (all, own int64) {
	rev.held(func(s sized) {
		all += s.Size()
		if u := m.uses[s]; u != nil && u.revisions == 1 {
			own += s.Size()
		}
	})
	return all, own
}

var _ = []sized{(*policy.Policy)(nil), (*policy.Part)(nil)}

// swap makes rev decide for in, and counts what it takes. An instance that is
// gone by now is left alone.
func (p *Pool) swap(in *instance, rev *revision) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := in.current.Load()
	in.current.Store(rev)
	old.forget()
	if in.state == Gone {
		rev.forget()
		return
	}
	p.memory.hold(rev)
	p.memory.release(old)
	p.shrink(in)
	if told := p.cfg.Activated; told != nil {
		told(in.id)
	}
}

// shrink forgets tenants until the estimate is within the budget: the parked
// first, then the warm that were not asked for longest. The last one asked, and
// keep, stay whatever they take: one bundle's own bounds bound them. p.mu is held.
func (p *Pool) shrink(keep *instance) {
	for p.memory.bytes > p.cfg.Memory {
		if _, in, ok := p.parked.GetOldest(); ok {
			p.log.Warn("memory budget met: parked tenant forgotten", "tenant", in.id, "bytes", p.memory.bytes, "limit", p.cfg.Memory)
			p.metrics.evicted.Inc()
			p.forget(in)
			continue
		}
		if p.warm.Len() <= 1 {
			return
		}
		_, in, _ := p.warm.GetOldest()
		if in == keep {
			return
		}
		p.log.Warn("memory budget met: warm tenant forgotten", "tenant", in.id, "bytes", p.memory.bytes, "limit", p.cfg.Memory)
		p.metrics.evicted.Inc()
		p.warm.Remove(in.id)
		p.park(in)
		p.forget(in)
	}
}

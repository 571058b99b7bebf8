package tenants

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"time"

	"github.com/gatehouse-authz/gatehouse/control"
)

// Live are the parts of a Config that may change while the pool runs. As there,
// a zero field means its default.
type Live struct {
	Settings func(ID) (*Settings, error) // required
	Capacity int
	Parked   int
	Grace    time.Duration
}

// Reload makes the pool run by new settings. Only tenants whose settings differ
// move: a warm one is loaded anew beside the one that answers, which goes on
// answering until the new one can, or for good where it cannot. It returns how
// many warm tenants move.
func (p *Pool) Reload(live Live) (moving int) {
	cfg := Config{Settings: live.Settings, Capacity: live.Capacity, Parked: live.Parked, Grace: live.Grace}.withDefaults()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return 0
	}
	p.generation++
	p.cfg.Settings, p.cfg.Capacity, p.cfg.Parked, p.cfg.Grace = cfg.Settings, cfg.Capacity, cfg.Parked, cfg.Grace

	for _, in := range p.refused.Values() {
		p.refused.Remove(in.id) // asked again, it is loaded by what is so now
		p.bury(in)
	}
	for _, in := range p.parked.Values() {
		if s, err := p.cfg.Settings(in.id); err != nil || !in.base.equal(s) {
			p.forget(in)
		}
	}
	for _, in := range p.warm.Values() {
		if p.renew(in) {
			moving++
		}
	}
	p.warm.Resize(max(p.cfg.Capacity, p.warm.Len()) + 1)
	p.makeRoom()
	p.parked.Resize(max(p.cfg.Parked, p.parked.Len()) + 1)
	return moving
}

// renewRetry is how long after it failed a tenant is loaded by its new settings
// again.
const renewRetry = 5 * time.Second

// renew has a warm tenant loaded anew if its settings have changed. It reports
// whether they have. p.mu is held.
func (p *Pool) renew(in *instance) bool {
	s, err := p.cfg.Settings(in.id)
	if err != nil {
		in.report(fmt.Errorf("new settings: %w", err), time.Time{})
		return true
	}
	if in.base.equal(s) && !in.outdated {
		return false
	}
	if in.renewing == nil {
		in.renewing = make(chan struct{})
	}
	fresh := newInstance(in.id, s, p.cpus)
	fresh.generation = p.generation
	fresh.replaces = in
	p.start(fresh)
	return true
}

// replace ends the loading of an instance that takes the place of another.
// p.mu is held.
func (p *Pool) replace(fresh *instance, feeds []*feed, err error) {
	old := fresh.replaces
	fresh.replaces = nil
	current, ok := p.warm.Peek(fresh.id)
	if !ok || current != old || fresh.generation != p.generation {
		// It was pushed out meanwhile, or there are newer settings.
		fresh.feeds = feeds
		p.leave(fresh)
		p.bury(fresh)
		return
	}
	if old.renewing != nil {
		close(old.renewing)
		old.renewing = nil
	}
	if err != nil {
		p.leave(fresh)
		p.bury(fresh)
		if old.outdated {
			old.reportDiscovery(fmt.Errorf("discovered settings: %w", err))
		} else {
			old.report(fmt.Errorf("new settings: %w", err), time.Time{})
		}
		p.log.Warn("new settings of the tenant do not work, the old ones stay", "tenant", old.id, "error", err)
		generation := fresh.generation
		time.AfterFunc(renewRetry+rand.N(renewRetry), func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if in, ok := p.warm.Peek(old.id); ok && in == old && generation == p.generation && !p.closed {
				p.renew(old)
			}
		})
		return
	}
	p.leave(old)
	fresh.feeds, fresh.state = feeds, Warm
	p.warm.Add(fresh.id, fresh)
	p.metrics.name(fresh)
	p.metrics.loaded(fresh)
	close(fresh.ready)
	p.bury(old)
	if told := p.cfg.Activated; told != nil {
		told(fresh.id)
	}
	p.update(fresh)
	p.log.Info("tenant runs by its new settings", "tenant", fresh.id)
}

// equal reports whether two settings mean the same.
func (s *Settings) equal(t *Settings) bool {
	return s.Discovery.Equal(t.Discovery) && s.Network == t.Network && reflect.DeepEqual(s.Caching, t.Caching) && s.Status.Equal(t.Status) && s.Log.Equal(t.Log) && s.HTTP.Identity() == t.HTTP.Identity() && s.NDBuiltinCache == t.NDBuiltinCache &&
		s.Limits == t.Limits && s.OnError == t.OnError && s.WholeBody == t.WholeBody && s.Evaluator == t.Evaluator && s.Verify == t.Verify &&
		slices.Equal(s.AllowHeaders, t.AllowHeaders) && s.Naming == t.Naming &&
		maps.Equal(s.Labels, t.Labels) &&
		slices.EqualFunc(s.Bundles, t.Bundles, sameBundle) &&
		s.Entry == t.Entry && s.Path == t.Path && slices.Equal(s.Entries, t.Entries) &&
		s.DryRun == t.DryRun && s.SkipBody == t.SkipBody && s.ProtoDescriptor == t.ProtoDescriptor
}

func sameBundle(a, b control.Bundle) bool {
	return a.Name == b.Name && a.Service == b.Service && a.Resource == b.Resource &&
		a.MinDelay == b.MinDelay && a.MaxDelay == b.MaxDelay && a.LongPoll == b.LongPoll && a.Manual == b.Manual
}

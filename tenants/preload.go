package tenants

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// preload loads the tenants that are wanted at start, and tries again for those
// that are refused until each has been warm once. Nobody has to ask for them.
func (p *Pool) preload(ctx context.Context) {
	wanted := append(slices.Clone(p.cfg.Required), p.cfg.Preload...)
	slots := make(chan struct{}, 2*p.cfg.Loads)
	var wg sync.WaitGroup
	defer wg.Wait()
	for len(wanted) > 0 {
		var mu sync.Mutex
		var again []ID
		for _, id := range wanted {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			wg.Go(func() {
				defer func() { <-slots }()
				if p.await(ctx, id) != nil {
					mu.Lock()
					defer mu.Unlock()
					again = append(again, id)
				}
			})
		}
		wg.Wait()
		if wanted = again; len(wanted) == 0 {
			return
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// await loads a tenant and returns why it cannot be.
func (p *Pool) await(ctx context.Context, id ID) error {
	in := p.instanceOf(id)
	if in.fault != nil {
		return in.fault
	}
	select {
	case <-in.ready:
		return in.refusal
	case <-ctx.Done():
		return ctx.Err()
	}
}

// loadGuard loads the operator's policy, and tries again until it is there.
func (p *Pool) loadGuard(ctx context.Context) {
	for {
		feeds, err := p.fill(p.guard)
		p.mu.Lock()
		if err == nil {
			p.guard.state, p.guard.feeds = Warm, feeds
			close(p.guard.ready)
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
		p.guard.report(err, time.Time{})
		p.log.Error("the operator's policy is not loaded: nothing is allowed", "error", err)
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// Refresh asks the sources of a tenant for what is new, and returns when what
// they have decides, or with the reason why it does not. A tenant that is not
// warm becomes so.
func (p *Pool) Refresh(ctx context.Context, id ID) error {
	p.mu.Lock()
	if in, ok := p.refused.Peek(id); ok {
		p.refused.Remove(id)
		p.bury(in)
	}
	_, warm := p.warm.Peek(id)
	_, parked := p.parked.Peek(id)
	p.mu.Unlock()
	if err := p.await(ctx, id); err != nil || !warm && !parked {
		return err
	}
	in, err := p.refreshDiscovery(ctx, p.instanceOf(id))
	if err != nil {
		return err
	}
	p.mu.Lock()
	feeds := in.feeds
	p.mu.Unlock()
	for _, f := range feeds {
		if err := p.feeds.check(ctx, f, true); err != nil {
			return err
		}
	}
	// A poll may have fetched it first, and be compiling it still.
	err = p.activate(in, feeds)
	in.reportNow()
	if log := in.log.Load(); log != nil {
		log.Flush()
	}
	return err
}

// refreshDiscovery asks for the newest discovery bundle of in, which is warm, and
// returns the instance that runs by it.
func (p *Pool) refreshDiscovery(ctx context.Context, in *instance) (*instance, error) {
	p.mu.Lock()
	f := in.discovery
	p.mu.Unlock()
	if f == nil {
		return in, nil
	}
	if err := p.feeds.check(ctx, f, true); err != nil {
		return nil, fmt.Errorf("discovery: %w", err)
	}
	p.mu.Lock()
	renewing := in.renewing
	p.mu.Unlock()
	if renewing != nil {
		select {
		case <-renewing:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	in = p.instanceOf(in.id)
	in.mu.Lock()
	defer in.mu.Unlock()
	return in, in.status.discovery
}

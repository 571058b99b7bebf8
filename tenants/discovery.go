package tenants

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// discover gives in, which is loading, the settings that its discovery bundle
// says, where it has one.
func (p *Pool) discover(ctx context.Context, in *instance) error {
	d := in.base.Discovery
	if d == nil {
		return nil
	}
	p.mu.Lock()
	in.discovery = p.feeds.join(in, d.Bundle, nil)
	p.mu.Unlock()
	if err := p.feeds.load(ctx, in.discovery); err != nil {
		return fmt.Errorf("discovery: %w", err)
	}
	settings, from, err := p.discovered(in, in.discovery)
	p.feeds.settle(in.discovery, err == nil)
	in.reportDiscovery(err)
	if err != nil {
		return fmt.Errorf("discovery: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	in.adopt(settings, from)
	return nil
}

// discovered returns the settings that the newest discovery bundle of in says,
// and which content that is.
func (p *Pool) discovered(in *instance, f *feed) (*Settings, content, error) {
	from, ok := f.latest()
	if !ok {
		return nil, from, errors.New("not loaded")
	}
	tenant, err := p.discoveredTenant(in, f, from)
	if err != nil {
		return nil, from, err
	}
	settings := *in.base
	settings.Tenant = tenant
	return &settings, from, nil
}

// discoveredTenant returns what the discovery bundle says of its tenant.
func (p *Pool) discoveredTenant(in *instance, f *feed, from content) (tenant *control.Tenant, err error) {
	span := p.traceActivation(in, "discovery activation", f)
	defer func() { span.activated(nil, false, err) }()
	doc, err := p.document(in, from)
	if err != nil {
		return nil, err
	}
	return in.base.Discovery.Tenant(doc)
}

// documentSize bounds a discovered configuration, as JSON, in bytes.
const documentSize = 1 << 20

// document evaluates a discovery bundle, under the capabilities and within the
// evaluation time of its tenant.
func (p *Pool) document(in *instance, c content) (any, error) {
	pol, err := p.library.document(c, in.base.Discovery.Decision, in.base.Network != nil)
	if err != nil {
		return nil, err
	}
	var value ast.Value
	err = p.aside(in.limits.EvaluationTime, func(cancel *policy.Cancel) (err error) {
		value, err = pol.Document(context.Background(), in.base.Discovery.Decision, in.base.env(nil), cancel)
		return err
	})
	switch {
	case errors.Is(err, policy.ErrUndefined):
		return nil, errors.New("undefined configuration")
	case err != nil:
		return nil, err
	}
	plain, err := ast.JSON(value)
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(plain)
	if err != nil {
		return nil, err
	}
	if len(text) > documentSize {
		return nil, fmt.Errorf("the configuration has %d bytes, limit %d", len(text), documentSize)
	}
	var doc any
	err = json.Unmarshal(text, &doc)
	return doc, err
}

// asides bounds the evaluations that answer no question and run at once.
const asides = 16

// aside runs f, an evaluation that answers no question, and returns when it has
// ended or its time is over: then f runs on, cancelled, until its builtin heeds
// that.
func (p *Pool) aside(limit time.Duration, f func(*policy.Cancel) error) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case p.asides <- struct{}{}:
	case <-timer.C:
		return fmt.Errorf("%w: %d evaluations beside those of questions run", ErrBusy, asides)
	}
	cancel := new(policy.Cancel)
	ended := make(chan error, 1)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				ended <- fmt.Errorf("%w: %v", ErrPanic, r)
			}
			<-p.asides
		}()
		ended <- f(cancel)
	}()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
		cancel.Cancel()
		return fmt.Errorf("%w: evaluation takes longer than %s", ErrDeadline, limit)
	}
}

// rediscover has in, which is warm, run by what its discovery bundle, that of f,
// says now. Until that works, and where it does not, it runs by what it had.
func (p *Pool) rediscover(in *instance, f *feed) {
	settings, from, err := p.discovered(in, f)
	p.feeds.settle(f, err == nil)
	in.reportDiscovery(err)
	if err != nil {
		p.metrics.failed("discovery")
		p.log.Warn("discovered configuration refused", "tenant", in.id, "error", err)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if in.settings.equal(settings) {
		in.discoveredFrom, in.outdated = from, false
		return
	}
	if current, ok := p.warm.Peek(in.id); ok && current == in && !p.closed {
		in.outdated = true
		p.renew(in)
	}
}

// adopt has an instance that is loading run by settings that were discovered.
// Pool.mu is held.
func (in *instance) adopt(s *Settings, from content) {
	in.settings, in.discoveredFrom = s, from
	in.mu.Lock()
	in.status.discovered = time.Now()
	in.mu.Unlock()
	in.needs.SkipBody, in.needs.ProtoDescriptor = s.SkipBody, s.ProtoDescriptor
}

// behind reports whether there is a newer discovery bundle than that by which in
// runs.
func (in *instance) behind() bool {
	if in.discovery == nil {
		return false
	}
	newest, ok := in.discovery.latest()
	return ok && !newest.equal(in.discoveredFrom)
}

// reportDiscovery sets what is told of the discovery of an instance.
func (in *instance) reportDiscovery(err error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.status.discovery = err
	in.reporter.changed()
}

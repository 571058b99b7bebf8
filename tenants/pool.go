// Package tenants runs the virtual OPAs: one for each tenant in use, warm,
// within its limits.
//
// In the common case a tenant is warm: Decide finds it, takes one of its slots,
// has a worker evaluate its policy, and hands over the answer. The first
// question to a tenant loads it: its bundles are fetched and compiled while the
// question waits, once however many wait.
//
// The life of a tenant is loading → warm → parked → gone, or
// loading → refused → gone, with one function for each arrow in this file:
//
//   - loading: its bundles are fetched for the first time. It is not among the
//     warm ones yet, so that a flood of invented names pushes nobody out.
//   - warm: it answers, and its bundles are polled.
//   - parked: a newer tenant has pushed it out. Polling has stopped, its policy
//     stays for the grace period. Asked again, it answers at once with what it
//     has and asks its source at once.
//   - refused: its source knows no such tenant, or gave nothing that can be
//     used. That is remembered for a while, in a bounded list.
//   - gone: forgotten. Questions that are being answered hold their policy.
//
// What the package promises: an answer in time, whatever a policy does; no
// tenant without bounds, and none that takes what is another's; the last good
// policy for as long as there is no better one; and that a warm tenant that is
// not asked owns no goroutine.
package tenants

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// Config says how a Pool runs. A zero field means its default.
type Config struct {
	// Settings returns the settings of a tenant. An error refuses the tenant;
	// one that wraps ErrUnknown says that there is no such tenant. Required.
	Settings func(ID) (*Settings, error)

	Capacity int           // warm tenants; default 10,000
	Parked   int           // parked tenants at most; default 1,000, negative: none
	Grace    time.Duration // how long a tenant stays parked; default 5 min

	// Guard is the operator's own policy, which must allow too, for every
	// tenant: its bundles and its entry point. Optional. No answer allows
	// before the guard does, whatever a tenant's OnError says.
	Guard *Settings

	Preload  []ID // loaded at start
	Required []ID // loaded at start; Ready waits for them

	Loads       int           // tenants that load at once; default 16
	LoadQueue   int           // tenants that wait for that; default 4,096
	LoadTimeout time.Duration // for one load, and for one fetch of a poll; default 60 s
	Refused     int           // refused tenants that are remembered; default 10,000
	RefusedFor  time.Duration // how long an unknown one is, at most; default 10 s
	RetryAfter  time.Duration // how long one that failed otherwise is, at most; default 30 s

	// Schedule has the polls and reports of the tenants; the pool runs it.
	// Optional: by default the pool makes one.
	Schedule *schedule.Schedule

	// Workers is how many evaluations run at once; default four for each CPU
	// that the process may use, at least 8.
	Workers int

	// Parallel bounds how many questions of one call run at once, beside the
	// tenant's slots. Below one full CPU more than one makes a batch slower.
	// Default: no bound.
	Parallel int

	// Lend gives the Go runtime n processors more than it has by itself, while
	// n evaluations run long. Optional; without it they delay all else.
	Lend func(n int)

	// BodyMemory bounds the bodies of all tenants that are being read at once;
	// default 256 MiB. What is over it is answered with ErrBusy.
	BodyMemory int64

	// Store keeps the last good bundles on disk, for loads while their sources
	// are away. Optional.
	Store *bundles.Store

	// MaxStale is how long a tenant may go on deciding by bundles that its
	// sources do not confirm; after that it is not ready. Default: for ever.
	MaxStale time.Duration

	// Memory bounds the estimate of what the tenants' policies and data take,
	// in bytes; default none. Tenants that were not asked for longest are
	// forgotten to stay within it.
	Memory int64

	// Console takes the status of tenants that want it there, a line in each
	// Write, of which there may be several at once. Optional.
	Console io.Writer

	// Activated is called after a tenant has begun to decide by a new policy or
	// by new settings, or is gone from its source. For the operator's own policy
	// the ID is "". It must neither block nor call the pool. Optional.
	Activated func(ID)

	// Logs keeps the decision logs of the tenants that want one. It is the
	// caller's to run and to drain. Optional: then none is kept.
	Logs *decisionlog.Logs

	// Labels is how many tenants have a label of their own in metrics; default
	// 10,000; negative: none has. The others share one.
	Labels int

	// Instance names this process, as the label id of what tenants report.
	// Default: a random UUID.
	Instance string

	// Tracing says where spans go. Default: there are none.
	Tracing Tracing

	Registerer prometheus.Registerer // optional
	Logger     *slog.Logger          // required
}

func (c Config) withDefaults() Config {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	defTime := func(v *time.Duration, d time.Duration) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&c.Capacity, 10_000)
	def(&c.Parked, 1000)
	def(&c.Loads, 16)
	def(&c.LoadQueue, 4096)
	def(&c.Refused, 10_000)
	def(&c.Labels, 10_000)
	if c.Schedule == nil {
		c.Schedule = schedule.New(100)
	}
	if c.BodyMemory <= 0 {
		c.BodyMemory = 256 << 20
	}
	if c.Memory <= 0 {
		c.Memory = math.MaxInt64
	}
	def(&c.Workers, max(8, 4*runtime.GOMAXPROCS(0)))
	c.Parked = max(c.Parked, 0)
	defTime(&c.Grace, 5*time.Minute)
	defTime(&c.LoadTimeout, time.Minute)
	defTime(&c.RefusedFor, 10*time.Second)
	defTime(&c.RetryAfter, 30*time.Second)
	return c
}

// Pool holds the tenants. Its methods may be called by any number of goroutines.
type Pool struct {
	cfg      Config
	cpus     int
	log      *slog.Logger
	metrics  *metrics
	sched    *scheduler
	feeds    *feeds
	library  *library
	schedule *schedule.Schedule

	calls, jobs sync.Pool // *call, *job: used again and again
	id          string    // of this process, as an OPA has one
	verifier    *verifier
	asides      chan struct{} // has room for as many as run at once
	explaining  chan struct{} // has room for one: an explanation is being made

	work sync.WaitGroup // loads
	ctx  context.Context
	stop context.CancelFunc

	mu     sync.Mutex
	closed bool

	generation int // of the settings: counts reloads

	misses  misses
	guard   *instance // in no list; nil: there is none
	memory  *memory
	named   map[ID]bool // required or loaded at start: the operator knows them
	unready map[ID]bool // required, and never loaded yet
	loading map[ID]*instance
	queue   []*instance // loading, and waiting for their turn
	loads   int         // loading right now, in their turn
	slow    int         // loading for long, which have left their turn
	warm    *simplelru.LRU[ID, *instance]
	parked  *simplelru.LRU[ID, *instance] // oldest first
	refused *simplelru.LRU[ID, *instance]
}

// stopTime bounds the wait for evaluations that do not heed their cancellation.
const stopTime = 5 * time.Second

// New returns a Pool. It answers once Run is called.
func New(cfg Config) *Pool {
	cfg = cfg.withDefaults()
	p := &Pool{
		cfg:     cfg,
		cpus:    runtime.GOMAXPROCS(0),
		log:     cfg.Logger,
		library: newLibrary(runtime.GOMAXPROCS(0)),
		sched:   newScheduler(cfg.Workers, cfg.BodyMemory, cfg.Lend, cfg.Logger),
		loading: map[ID]*instance{},
		named:   map[ID]bool{},
		unready: map[ID]bool{},
		id:      cmp.Or(cfg.Instance, NewDecisionID()),
		asides:  make(chan struct{}, asides),

		explaining: make(chan struct{}, 1),
		memory:     newMemory(),
	}
	p.verifier = newVerifier(p, cfg.Registerer)
	for _, id := range cfg.Required {
		p.unready[id], p.named[id] = true, true
	}
	for _, id := range cfg.Preload {
		p.named[id] = true
	}
	p.metrics = newMetrics(p, cfg.Registerer)
	p.schedule = cfg.Schedule
	p.feeds = newFeeds(cfg.Logger, p.metrics, p.library, p.schedule, cfg.LoadTimeout, cfg.Store, &p.cfg.Tracing)
	p.library.prints = cfg.Tracing.Prints
	p.feeds.changed, p.feeds.checked, p.feeds.ended = p.reactivate, p.confirm, p.end
	p.feeds.turned = p.turned
	if cfg.Guard != nil {
		p.guard = newInstance("", cfg.Guard, p.cpus)
	}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.warm = newList(cfg.Capacity)
	p.parked = newList(cfg.Parked)
	p.refused = newList(cfg.Refused)
	return p
}

// newList returns a list of tenants. Its bound is enforced by who adds to it:
// what falls out must be moved on, which the list's own callback, called for
// every removal, cannot tell from one that was meant.
func newList(size int) *simplelru.LRU[ID, *instance] {
	l, err := simplelru.NewLRU[ID, *instance](size+1, nil)
	if err != nil {
		panic(err) // only for a size that is not positive
	}
	return l
}

// noSettings are those of a tenant that has none.
var noSettings = &Settings{Tenant: &control.Tenant{}}

// Run runs the pool until ctx ends, and returns when all that it started has
// ended. Its error counts evaluations that did not.
func (p *Pool) Run(ctx context.Context) error {
	p.sched.start()
	p.work.Go(func() { p.schedule.Run(p.ctx) })
	p.work.Go(func() { p.preload(p.ctx) })
	p.work.Go(func() { p.verifier.run(p.ctx) })
	if p.guard != nil {
		p.work.Go(func() { p.loadGuard(p.ctx) })
	}

	<-ctx.Done()
	p.mu.Lock()
	p.closed = true
	for _, in := range p.parked.Values() {
		in.expiry.Stop()
	}
	p.mu.Unlock()
	p.stop()
	p.work.Wait()
	return p.sched.stop(stopTime)
}

// instanceOf returns the tenant's instance, which may still be loading, or one
// with a fault where there can be none.
func (p *Pool) instanceOf(id ID) *instance {
	p.mu.Lock()
	defer p.mu.Unlock()
	if in, ok := p.warm.Get(id); ok {
		return in
	}
	if in, ok := p.parked.Peek(id); ok {
		p.revive(in)
		return in
	}
	if in, ok := p.loading[id]; ok {
		return in
	}
	tries := 0
	if in, ok := p.refused.Get(id); ok {
		if time.Now().Before(in.until) {
			return in
		}
		p.refused.Remove(id)
		p.bury(in)
		tries = in.tries
	}
	return p.load(id, tries)
}

// load is the arrow into loading. p.mu is held.
func (p *Pool) load(id ID, tries int) *instance {
	id = ID(strings.Clone(string(id))) // what names it may be a part of a large message
	settings, err := p.cfg.Settings(id)
	if err != nil {
		in := newInstance(id, noSettings, p.cpus)
		in.tries = tries
		p.refuse(in, fmt.Errorf("settings: %w", err))
		return in
	}
	in := newInstance(id, settings, p.cpus)
	in.tries = tries
	switch {
	case p.closed:
		in.fault = fmt.Errorf("%w: stopping", ErrNotReady)
		return in
	case !p.misses.allow(time.Now()):
		in.fault = fmt.Errorf("%w: not looked up, too many unknown ones are asked for", ErrUnknown)
		return in
	case p.loads >= p.cfg.Loads && len(p.queue) >= p.cfg.LoadQueue:
		in.fault = fmt.Errorf("%w: %d tenants wait to be loaded", ErrBusy, len(p.queue))
		return in
	}
	in.generation = p.generation
	p.loading[id] = in
	p.start(in)
	return in
}

// start has in loaded now, or in its turn. p.mu is held.
func (p *Pool) start(in *instance) {
	if p.loads >= p.cfg.Loads {
		p.queue = append(p.queue, in)
		return
	}
	p.loads++
	p.work.Go(func() { p.loader(in) })
}

// A load that takes longer than slowLoad leaves its turn to the next, so that
// sources that hang hold up no other tenant; at most slowLoads do.
const (
	slowLoad  = time.Second
	slowLoads = 256
)

// loader loads in, and then what waits, until nothing does.
func (p *Pool) loader(in *instance) {
	for in != nil {
		left, ended := false, false // guarded by p.mu
		slow := time.AfterFunc(slowLoad, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			if ended || p.slow >= slowLoads || p.closed {
				return
			}
			left = true
			p.slow++
			p.loads--
			if next := p.dequeue(); next != nil {
				p.start(next)
			}
		})
		feeds, err := p.fill(in)
		slow.Stop()

		p.mu.Lock()
		ended = true
		switch {
		case in.replaces != nil:
			p.replace(in, feeds, err)
		case err == nil:
			delete(p.loading, in.id)
			in.feeds = feeds
			p.admit(in)
		default:
			delete(p.loading, in.id)
			p.refuse(in, err)
		}
		if left { // its turn is another's
			p.slow--
			in = nil
		} else if in = p.dequeue(); in == nil {
			p.loads--
		}
		p.mu.Unlock()
	}
}

// dequeue takes the tenant that waits longest for its load; nil: none does. When
// the pool is closed those that wait are refused. p.mu is held.
func (p *Pool) dequeue() *instance {
	if p.closed {
		for _, rest := range p.queue {
			if rest.replaces == nil {
				delete(p.loading, rest.id)
				p.refuse(rest, errors.New("stopping"))
			}
		}
		p.queue = nil
	}
	if len(p.queue) == 0 {
		return nil
	}
	in := p.queue[0]
	p.queue[0] = nil
	p.queue = p.queue[1:]
	return in
}

// fill fetches the bundles of in and makes its first revision.
func (p *Pool) fill(in *instance) (feeds []*feed, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("loading: panic: %v", r)
		}
		if err != nil {
			for _, f := range feeds {
				p.feeds.leave(in, f)
			}
			feeds = nil
			p.leave(in)
		}
	}()
	ctx, cancel := context.WithTimeout(p.ctx, p.cfg.LoadTimeout)
	defer cancel()
	p.reportTo(in, in.base.Status)
	if err := p.discover(ctx, in); err != nil {
		return nil, err
	}
	if !in.settings.Status.Equal(in.base.Status) {
		p.reportTo(in, in.settings.Status)
	}
	for _, b := range in.settings.Bundles {
		feeds = append(feeds, p.feeds.join(in, b, nil))
	}
	p.mu.Lock()
	in.known = slices.Clone(feeds)
	p.mu.Unlock()
	for i, f := range feeds {
		if err := p.feeds.load(ctx, f); err != nil {
			if in.discovery != nil && errors.Is(err, bundles.ErrNotFound) {
				err = errors.New(err.Error()) // the tenant is known
			}
			return feeds, fmt.Errorf("bundle %q: %w", in.settings.Bundles[i].Name, err)
		}
	}
	in.again = &p.metrics.again
	p.recordOf(in)
	err = p.activate(in, feeds)
	for _, f := range feeds {
		p.feeds.settle(f, err == nil)
	}
	in.confirmed.Store(oldestOf(feeds).UnixNano())
	return feeds, err
}

// admit is the arrow from loading to warm. p.mu is held.
func (p *Pool) admit(in *instance) {
	in.state = Warm
	delete(p.unready, in.id)
	p.warm.Add(in.id, in)
	p.metrics.name(in)
	p.metrics.loaded(in)
	close(in.ready)
	p.update(in)
	p.makeRoom()
}

// update has in, which has just become warm, loaded anew if what it is to run by
// changed while it loaded. p.mu is held.
func (p *Pool) update(in *instance) {
	if f := in.discovery; in.behind() && !p.closed {
		p.work.Go(func() { p.rediscover(in, f) })
	}
	if in.generation != p.generation {
		p.renew(in)
	}
}

// leave ends in's use of all its feeds.
func (p *Pool) leave(in *instance) {
	for _, f := range in.feeds {
		p.feeds.leave(in, f)
	}
	in.feeds = nil
	if in.discovery != nil {
		p.feeds.leave(in, in.discovery)
	}
}

// makeRoom parks the tenants that the warm ones have no room for. p.mu is held.
func (p *Pool) makeRoom() {
	for p.warm.Len() > p.cfg.Capacity {
		if _, in, ok := p.warm.RemoveOldest(); ok {
			p.park(in)
		}
	}
}

// refuse is the arrow from loading to refused. p.mu is held.
func (p *Pool) refuse(in *instance, err error) {
	in.tries++
	wait := min(time.Second<<min(in.tries-1, 10), p.cfg.RetryAfter)
	unknown := errors.Is(err, bundles.ErrNotFound) || errors.Is(err, ErrUnknown)
	if unknown {
		in.refusal = fmt.Errorf("%w: %w", ErrUnknown, err)
		wait = p.cfg.RefusedFor
		p.misses.add(time.Now())
	} else {
		in.refusal = fmt.Errorf("%w: %w", ErrNotReady, err)
		p.log.Warn("tenant not loaded", "tenant", in.id, "error", err, "tries", in.tries)
	}
	// A source that is polled often, like a directory, may be asked often.
	for _, b := range in.settings.Bundles {
		wait = min(wait, max(b.MaxDelay, time.Second))
	}
	if unknown && !p.named[in.id] { // anybody may have invented the name
		p.reportTo(in, nil)
	} else {
		p.recordOf(in) // that it is not ready is a decision, too
	}
	in.state = Refused
	in.until = time.Now().Add(wait/2 + rand.N(wait/2))
	in.report(err, time.Time{})
	p.refused.Add(in.id, in)
	if !unknown {
		p.metrics.name(in)
	}
	p.metrics.loaded(in)
	close(in.ready)
	for p.refused.Len() > p.cfg.Refused {
		if _, oldest, ok := p.refused.RemoveOldest(); ok { // the arrow from refused to gone
			p.bury(oldest)
		}
	}
}

// park is the arrow from warm to parked. p.mu is held.
func (p *Pool) park(in *instance) {
	in.state = Parked
	in.until = time.Now().Add(p.cfg.Grace)
	in.expiry = time.AfterFunc(p.cfg.Grace, func() { p.expire(in) })
	rev := in.current.Load()
	for i, f := range in.feeds {
		in.seeds = append(in.seeds, f.seed())
		if s := in.seeds[i]; s != nil && !s.content.equal(rev.content[i]) {
			// What came last was refused. Begin with what decides.
			*s = feedSeed{content: rev.content[i]}
		}
	}
	if in.discovery != nil {
		in.discoverySeed = in.discovery.seed()
	}
	p.leave(in)
	p.reportTo(in, nil)
	p.metrics.moves.WithLabelValues("parked").Inc()
	p.parked.Add(in.id, in)
	for p.parked.Len() > p.cfg.Parked {
		if _, oldest, ok := p.parked.GetOldest(); ok {
			p.forget(oldest)
		}
	}
}

// revive is the arrow from parked back to warm: without a fetch, but the
// sources are asked at once. p.mu is held.
func (p *Pool) revive(in *instance) {
	in.expiry.Stop()
	p.parked.Remove(in.id)
	p.metrics.moves.WithLabelValues("revived").Inc()
	in.state = Warm
	for i, b := range in.settings.Bundles {
		f := p.feeds.join(in, b, in.seeds[i])
		in.feeds = append(in.feeds, f)
		f.pollNow()
	}
	if in.discovery != nil {
		in.discovery = p.feeds.join(in, in.base.Discovery.Bundle, in.discoverySeed)
		in.discovery.pollNow()
	}
	in.seeds, in.discoverySeed = nil, nil
	in.known = in.feeds
	p.reportTo(in, in.settings.Status)
	p.warm.Add(in.id, in)
	p.makeRoom()
}

// forget is the arrow from parked to gone. p.mu is held.
func (p *Pool) forget(in *instance) {
	in.expiry.Stop()
	p.parked.Remove(in.id)
	p.metrics.moves.WithLabelValues("gone").Inc()
	p.bury(in)
}

// bury ends an instance that is in no list any more. p.mu is held.
func (p *Pool) bury(in *instance) {
	if in.state == Gone {
		return
	}
	in.state = Gone
	p.reportTo(in, nil)
	in.retireLog()
	rev := in.current.Load()
	p.memory.release(rev)
	rev.forget()
	p.metrics.forget(in)
}

// expire forgets in at the end of its grace period.
func (p *Pool) expire(in *instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if in.state == Parked && !time.Now().Before(in.until) && !p.closed {
		p.forget(in)
	}
}

// reactivate has the users of a feed decide by its new content.
func (p *Pool) reactivate(changed *feed, users []*instance) {
	good := map[*feed]bool{}
	for _, in := range users {
		p.mu.Lock()
		feeds, discovers := in.feeds, in.discovery == changed
		p.mu.Unlock()
		if len(feeds) == 0 {
			continue // it is loading still, or parked by now
		}
		if discovers {
			p.rediscover(in, changed)
			continue
		}
		err := p.activate(in, feeds) // reported there
		for _, f := range feeds {
			good[f] = good[f] || err == nil
		}
	}
	for f, ok := range good {
		p.feeds.settle(f, ok)
	}
}

// end is the arrow from warm straight to gone, for tenants whose bundle is gone.
func (p *Pool) end(users []*instance) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, in := range users {
		if current, ok := p.warm.Peek(in.id); !ok || current != in {
			continue // parked by now, or the guard
		}
		p.log.Warn("tenant is gone from its source", "tenant", in.id)
		p.warm.Remove(in.id)
		p.metrics.moves.WithLabelValues("gone").Inc()
		p.leave(in)
		p.bury(in)
		if told := p.cfg.Activated; told != nil {
			told(in.id)
		}
	}
}

// confirm notes how old what its users decide by is, after a check of a feed, and
// what it takes by now.
func (p *Pool) confirm(users []*instance) {
	for _, in := range users {
		p.mu.Lock()
		feeds := in.feeds
		if in.state != Gone {
			p.memory.measure(in.current.Load())
			p.shrink(in)
		}
		p.mu.Unlock()
		if len(feeds) > 0 {
			in.confirmed.Store(oldestOf(feeds).UnixNano())
		}
	}
}

// turned has the users of a feed report that it fails, or no more does.
func (p *Pool) turned(users []*instance) {
	for _, in := range users {
		in.reportSoon()
	}
}

// oldestOf returns when the feed was confirmed for which that is longest ago.
func oldestOf(feeds []*feed) (oldest time.Time) {
	for i, f := range feeds {
		if _, checked, _ := f.state(); i == 0 || checked.Before(oldest) {
			oldest = checked
		}
	}
	return oldest
}

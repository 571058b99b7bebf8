package tenants

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
)

// feed is one bundle at its source, polled once for all tenants that name it.
type feed struct {
	key     string
	service string
	source  bundles.Source
	name    string
	final   bool                                     // what it does not have is gone
	reread  func(io.Reader) (*bundles.Bundle, error) // reads a saved archive; nil: none is saved

	// turn has room for the one that fetches; others wait for it.
	turn chan struct{}

	mu      sync.Mutex
	content content // the newest that could be read; guarded by mu
	loaded  bool
	etag    string
	err     error     // why the last check gave nothing; nil: it did
	stale   time.Time // since when checks give nothing; zero: they do
	checked time.Time // the last check that gave an answer
	fails   int       // in a row
	missing int       // of these, answers that there is no such bundle

	unsaved *bundles.Bundle // the newest, until it has been activated or refused
	noted   time.Time       // when the store was last told that it is confirmed

	// Guarded by feeds.mu.
	slow     bool // its fetches take long
	waits    bool // it is due, and waits for its lane
	users    map[*instance]struct{}
	min, max time.Duration // the polling delays
	due      time.Time
	index    int // in the queue; -1: a worker has it
}

// latest returns the newest content, if there is any.
func (f *feed) latest() (content, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.content, f.loaded
}

// state returns since when checks fail, when the content was last known to be
// that of the source, and the error of the last check.
func (f *feed) state() (stale, checked time.Time, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.stale, f.checked, f.err
}

// feeds polls the bundles of all warm tenants on one jittered schedule, with a
// few workers. A feed is polled as long as a tenant uses it.
type feeds struct {
	log     *slog.Logger
	metrics *metrics
	library *library
	timeout time.Duration
	store   *bundles.Store          // of last good bundles; nil: none are kept
	changed func(users []*instance) // told after a feed has new content
	checked func(users []*instance) // told after each check that gave an answer
	ended   func(users []*instance) // told of a bundle that its source no longer has, for good

	mu    sync.Mutex
	byKey map[string]*feed
	queue feedQueue
	lanes map[string]*lane // :: service → its lane, while anything runs or waits there
	slow  lane
	ready []poll        // waited for their lane, and have a place there now
	wake  chan struct{} // has room for one: the schedule changed
}

// Bounds of the schedule.
const (
	// pollWorkers poll at once, serviceWorkers at most for one service, and
	// slowWorkers at most what took longer than fastFetch the last time: a
	// source that is slow or stalled holds up no other.
	pollWorkers    = 32
	serviceWorkers = 16
	slowWorkers    = 8
	fastFetch      = time.Second

	minBackoff = time.Second
	// sourceFirst is how long a source is waited for before a saved bundle is
	// looked for; the source is asked again soon after.
	sourceFirst = 250 * time.Millisecond
	// noteInterval is how often the store is told at most that a saved bundle
	// is that of its source still.
	noteInterval = time.Minute
)

func newFeeds(log *slog.Logger, m *metrics, l *library, timeout time.Duration, store *bundles.Store) *feeds {
	return &feeds{
		log: log, metrics: m, library: l, timeout: timeout, store: store,
		byKey: map[string]*feed{},
		lanes: map[string]*lane{},
		slow:  lane{limit: slowWorkers},
		wake:  make(chan struct{}, 1),
	}
}

// join makes in a user of the feed of b, and of the polling schedule. A feed
// that is new begins with the content and ETag that seed gives.
func (fs *feeds) join(in *instance, b control.Bundle, seed *feedSeed) *feed {
	key := b.Service + "\x00" + b.Resource
	fs.mu.Lock()
	defer fs.mu.Unlock()
	f := fs.byKey[key]
	if f == nil {
		f = &feed{
			key: key, service: b.Service, source: b.Source, name: b.Resource, final: b.Final, reread: b.Read,
			turn:  make(chan struct{}, 1),
			users: map[*instance]struct{}{},
			min:   b.MinDelay, max: b.MaxDelay,
			index: -1,
		}
		if seed != nil {
			f.content, f.etag, f.checked, f.loaded = seed.content, seed.etag, seed.checked, true
		}
		fs.byKey[key] = f
	}
	f.users[in] = struct{}{}
	f.min, f.max = min(f.min, b.MinDelay), min(f.max, b.MaxDelay)
	return f
}

// feedSeed is what a parked tenant keeps of a feed.
type feedSeed struct {
	content content
	etag    string
	checked time.Time
}

func (f *feed) seed() *feedSeed {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.loaded {
		return nil
	}
	return &feedSeed{f.content, f.etag, f.checked}
}

// leave ends in's use of f. A feed without users is forgotten.
func (fs *feeds) leave(in *instance, f *feed) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	delete(f.users, in)
	if len(f.users) > 0 {
		return
	}
	delete(fs.byKey, f.key)
	if f.index >= 0 {
		heap.Remove(&fs.queue, f.index)
	}
}

// poll has f checked at that time, or before.
func (fs *feeds) poll(f *feed, at time.Time) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	fs.schedule(f, at)
}

// schedule is poll; fs.mu is held.
func (fs *feeds) schedule(f *feed, at time.Time) {
	if len(f.users) == 0 || fs.byKey[f.key] != f {
		return
	}
	switch {
	case f.waits:
		return
	case f.index < 0:
		f.due = at
		heap.Push(&fs.queue, f)
	case at.Before(f.due):
		f.due = at
		heap.Fix(&fs.queue, f.index)
	default:
		return
	}
	fs.rouse()
}

// rouse has run look at the schedule.
func (fs *feeds) rouse() {
	select {
	case fs.wake <- struct{}{}:
	default: // it will anyway
	}
}

// run polls until ctx ends, and then waits for its workers.
func (fs *feeds) run(ctx context.Context) {
	work := make(chan poll)
	var wg sync.WaitGroup
	for range pollWorkers {
		wg.Go(func() {
			for p := range work {
				_ = fs.check(ctx, p.feed, p.lane == &fs.slow) // noted by the feed
				fs.done(p)
			}
		})
	}
	defer wg.Wait()
	defer close(work)

	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		p, wait := fs.next()
		if p.feed == nil {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-fs.wake:
			case <-ctx.Done():
				return
			}
			continue
		}
		select {
		case work <- p:
		case <-ctx.Done():
			return
		}
	}
}

// poll is one check of a feed, and the lane in which it has a place. A feed may
// be due again before its last poll has given back its own.
type poll struct {
	feed *feed
	lane *lane
}

// next takes the feed that is due and whose lane has room, or returns how long
// to wait for one.
func (fs *feeds) next() (poll, time.Duration) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if len(fs.ready) > 0 {
		p := fs.ready[0]
		fs.ready = fs.ready[1:]
		return p, 0
	}
	for len(fs.queue) > 0 {
		if wait := time.Until(fs.queue[0].due); wait > 0 {
			return poll{}, wait
		}
		f := heap.Pop(&fs.queue).(*feed)
		l := fs.laneOf(f)
		if l.running < l.limit {
			l.running++
			return poll{f, l}, 0
		}
		f.waits = true
		l.waiting = append(l.waiting, f)
	}
	return poll{}, time.Hour
}

// lane is a share of the workers. What waits for it is no longer in the queue.
type lane struct {
	limit   int
	running int
	waiting []*feed
}

// laneOf returns the lane of a feed: that of its service, or that of all feeds
// which take long. fs.mu is held.
func (fs *feeds) laneOf(f *feed) *lane {
	if f.slow {
		return &fs.slow
	}
	l := fs.lanes[f.service]
	if l == nil {
		l = &lane{limit: serviceWorkers}
		fs.lanes[f.service] = l
	}
	return l
}

// done gives back the place of a poll in its lane, to the feed that waited for it
// longest. That feed has the place from now on: were it only due again, and went
// elsewhere or away before its turn, nobody would wake those behind it.
func (fs *feeds) done(p poll) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	l := p.lane
	l.running--
	for len(l.waiting) > 0 && l.running < l.limit {
		w := l.waiting[0]
		l.waiting[0] = nil
		l.waiting = l.waiting[1:]
		w.waits = false
		if len(w.users) > 0 {
			l.running++
			fs.ready = append(fs.ready, poll{w, l})
		}
	}
	if l.running == 0 && l != &fs.slow {
		delete(fs.lanes, p.feed.service)
	}
	fs.rouse()
}

// check is one poll of f: it fetches, tells the users of new content, and sets
// the time of the next. A poll that is not patient ends after fastFetch; the feed
// is slow then, and checked again at once among those that are. The error is that
// of the fetch.
func (fs *feeds) check(ctx context.Context, f *feed, patient bool) error {
	limit := fs.timeout
	if !patient {
		limit = min(limit, fastFetch)
	}
	begun := time.Now()
	changed, err := fs.fetch(ctx, f, false, limit, patient)
	fs.mu.Lock()
	if errors.Is(err, errSlow) {
		f.slow = true
		fs.schedule(f, time.Now())
		fs.mu.Unlock()
		return err
	}
	f.slow = patient && time.Since(begun) > fastFetch
	users := make([]*instance, 0, len(f.users))
	for in := range f.users {
		users = append(users, in)
	}
	fs.schedule(f, time.Now().Add(f.delay()))
	fs.mu.Unlock()
	if changed && len(users) > 0 {
		fs.changed(users)
	}
	if err == nil {
		fs.checked(users)
		fs.note(f)
	}
	if f.gone() {
		fs.ended(users)
	}
	return err
}

// missingInRow is how often a source must say that there is no such bundle, one
// time after the other, before it is believed: a folder may be in the midst of
// being replaced.
const missingInRow = 3

// gone reports whether the source's bundle is gone, and its word final.
func (f *feed) gone() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.final && f.missing >= missingInRow
}

// load returns once f has content: at once where it has, else after a fetch, or
// from the store where that fails. It returns the fetch's error.
func (fs *feeds) load(ctx context.Context, f *feed) error {
	first := fs.timeout
	if fs.store != nil && f.reread != nil {
		first = min(first, sourceFirst)
	}
	_, err := fs.fetch(ctx, f, true, first, true)
	if err != nil {
		cause := err
		err = fs.saved(f, cause)
		if err != nil && first < fs.timeout && errors.Is(cause, context.DeadlineExceeded) {
			_, err = fs.fetch(ctx, f, true, fs.timeout, true) // slow, and nothing is saved
		}
	}
	if err == nil {
		fs.poll(f, time.Now().Add(fs.delayOf(f)))
	}
	return err
}

func (fs *feeds) delayOf(f *feed) time.Duration {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return f.delay()
}

// delay is the jittered time to the next check: between the polling delays, or
// after a failure anywhere up to a delay that doubles with each. feeds.mu is held.
func (f *feed) delay() time.Duration {
	f.mu.Lock()
	fails := f.fails
	f.mu.Unlock()
	if fails > 0 {
		ceiling := min(minBackoff<<min(fails, 20), max(f.max, minBackoff))
		return minBackoff/2 + rand.N(ceiling)
	}
	return f.min + rand.N(max(f.max-f.min, time.Millisecond))
}

// fetch asks the source for what is newer than the content. With first it only
// fetches where there is no content at all. One fetch of a feed runs at a time.
// One that is not patient and runs out of time is errSlow: not a failure yet.
func (fs *feeds) fetch(ctx context.Context, f *feed, first bool, timeout time.Duration, patient bool) (changed bool, err error) {
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return false, fmt.Errorf("waiting for bundle %q: %w", f.name, ctx.Err())
	}
	f.mu.Lock()
	etag, loaded, old := f.etag, f.loaded, f.content.digest
	f.mu.Unlock()
	if first && loaded {
		return false, nil
	}

	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	b, err := f.source.Fetch(ctx, f.name, etag)
	if err != nil && !patient && ctx.Err() != nil && outer.Err() == nil {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.err == nil {
			f.err, f.stale = errSlow, time.Now()
		}
		return false, errSlow
	}
	var c content
	if err == nil {
		c, err = fs.library.prepare(b)
		if err != nil {
			err = fmt.Errorf("%w: %w", bundles.ErrRefused, err)
		}
	}
	now := time.Now()

	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err == nil:
		f.content, f.etag, f.loaded = c, b.ETag, true
		changed = !loaded || c.digest != old
		if fs.store != nil && b.Archive != nil {
			f.unsaved = b
		}
	case errors.Is(err, bundles.ErrNotModified) && loaded:
		err = nil
	default:
		if f.fails++; f.stale.IsZero() {
			f.stale = now
		}
		if f.missing++; !errors.Is(err, bundles.ErrNotFound) {
			f.missing = 0
		}
		if f.err == nil || f.err.Error() != err.Error() {
			fs.log.Warn("bundle not updated", "bundle", f.name, "error", err, "serving", loaded)
		}
		f.err = err
		fs.metrics.failed(reasonOf(err))
		return false, err
	}
	if f.err != nil && loaded {
		fs.log.Info("bundle source is back", "bundle", f.name)
	}
	f.err, f.stale, f.fails, f.missing, f.checked = nil, time.Time{}, 0, 0, now
	return changed, nil
}

// errSlow: a fetch that was given little time takes longer.
var errSlow = errors.New("bundle takes long")

// reasonOf classes an error of a fetch for the metric.
func reasonOf(err error) string {
	switch {
	case errors.Is(err, bundles.ErrNotFound):
		return "not_found"
	case errors.Is(err, bundles.ErrRefused):
		return "refused"
	}
	return "fetch"
}

// feedQueue is a heap of feeds by the time they are due.
type feedQueue []*feed

func (q feedQueue) Len() int { return len(q) }

func (q feedQueue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }

func (q feedQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

func (q *feedQueue) Push(x any) {
	f := x.(*feed)
	f.index = len(*q)
	*q = append(*q, f)
}

func (q *feedQueue) Pop() any {
	last := len(*q) - 1
	f := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	f.index = -1
	return f
}

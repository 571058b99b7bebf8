package tenants

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// feed is one bundle at its source, polled once for all tenants that name it.
type feed struct {
	key    string
	source bundles.Source
	name   string
	final  bool                                     // what it does not have is gone
	reread func(io.Reader) (*bundles.Bundle, error) // reads a saved archive; nil: none is saved

	// turn has room for the one that fetches; others wait for it, and end what
	// the source is waited for.
	turn      chan struct{}
	interrupt atomic.Pointer[context.CancelFunc] // of that one, where it waits; nil: it does not

	long time.Duration // how long the source may be asked to wait; 0: it may not

	mu      sync.Mutex
	content content // the newest that could be read; guarded by mu
	loaded  bool
	etag    string
	waits   bool      // the source can wait for something new
	rest    time.Time // not to be asked before then, after it was waited for
	err     error     // why the last check gave nothing; nil: it did
	stale   time.Time // since when checks give nothing; zero: they do
	checked time.Time // the last check that gave an answer
	fails   int       // in a row
	missing int       // of these, answers that there is no such bundle
	// What is reported of it: when the source was last asked, when it last gave
	// something new, of which kind and size.
	requested, downloaded time.Time
	took                  time.Duration // to get that
	kind                  string

	traced trace.SpanContext // the request that gave the newest content; not valid: it has no span

	unsaved   *bundles.Bundle // the newest, until it has been activated or refused
	unsavable bool            // the newest came as a delta to what is saved
	noted     time.Time       // when the store was last told that it is confirmed

	task      *schedule.Task // polls it
	restraint *restraint     // of its service

	// Guarded by feeds.mu.
	users    map[*instance]struct{}
	min, max time.Duration // the polling delays
	manual   bool          // polled only when somebody asks
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

// feeds polls the bundles of all warm tenants. A feed is polled as long as a
// tenant uses it.
type feeds struct {
	log      *slog.Logger
	metrics  *metrics
	library  *library
	schedule *schedule.Schedule
	timeout  time.Duration
	tracing  *Tracing
	store    *bundles.Store                   // of last good bundles; nil: none are kept
	changed  func(f *feed, users []*instance) // told after a feed has new content
	checked  func(users []*instance)          // told after each check that gave an answer
	turned   func(users []*instance)          // told when checks begin to fail, or fail otherwise, and when they do no more
	ended    func(users []*instance)          // told of a bundle that its source no longer has, for good

	mu         sync.Mutex
	byKey      map[string]*feed
	restraints map[string]*restraint // :: service → its
}

// Times of a feed.
const (
	minBackoff = time.Second
	// sourceFirst is how long a source is waited for before a saved bundle is
	// looked for; the source is asked again soon after.
	sourceFirst = 250 * time.Millisecond
	// noteInterval is how often the store is told at most that a saved bundle
	// is that of its source still.
	noteInterval = time.Minute
)

func newFeeds(log *slog.Logger, m *metrics, l *library, s *schedule.Schedule, timeout time.Duration, store *bundles.Store, tracing *Tracing) *feeds {
	return &feeds{
		tracing: tracing, log: log, metrics: m, library: l, schedule: s, timeout: timeout, store: store,
		byKey: map[string]*feed{}, restraints: map[string]*restraint{},
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
			key: key, source: b.Source, name: b.Resource, final: b.Final, reread: b.Read,
			turn:  make(chan struct{}, 1),
			users: map[*instance]struct{}{},
			min:   b.MinDelay, max: b.MaxDelay,
			restraint: fs.restraintOf(b.Service),
		}
		f.task = fs.schedule.NewTask(b.Service, func(ctx context.Context, patient bool) (time.Duration, bool) {
			return fs.poll(ctx, f, patient)
		})
		f.long = b.LongPoll
		f.manual = b.Manual
		if seed != nil {
			f.content, f.etag, f.checked, f.loaded = seed.content, seed.etag, seed.checked, true
			f.unsavable = seed.unsavable
		}
		fs.byKey[key] = f
	}
	f.users[in] = struct{}{}
	f.manual = f.manual && b.Manual
	f.min, f.max = min(f.min, b.MinDelay), min(f.max, b.MaxDelay)
	return f
}

// feedSeed is what a parked tenant keeps of a feed.
type feedSeed struct {
	content   content
	etag      string
	checked   time.Time
	unsavable bool
}

func (f *feed) seed() *feedSeed {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.loaded {
		return nil
	}
	return &feedSeed{f.content, f.etag, f.checked, f.unsavable}
}

// pollNow has the feed checked at once, unless it is only when somebody asks.
func (f *feed) pollNow() {
	if !f.manual {
		f.task.At(time.Now())
	}
}

// leave ends in's use of f. A feed without users is forgotten.
func (fs *feeds) leave(in *instance, f *feed) {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	if _, ok := f.users[in]; !ok {
		return
	}
	delete(f.users, in)
	if len(f.users) > 0 {
		return
	}
	delete(fs.byKey, f.key)
	f.task.Stop()
}

// check is one poll of f: it fetches, and tells the users of new content. A poll
// that is not patient ends after schedule.Fast, with errSlow. The error is that
// of the fetch.
func (fs *feeds) check(ctx context.Context, f *feed, patient bool) error {
	limit := fs.timeout
	if !patient {
		limit = min(limit, schedule.Fast)
	}
	return fs.checkAs(ctx, f, ask{timeout: limit, patient: patient})
}

// checkAs is check in one of the ways to ask.
func (fs *feeds) checkAs(ctx context.Context, f *feed, a ask) error {
	_, _, before := f.state()
	changed, err := fs.fetch(ctx, f, a)
	if errors.Is(err, errSlow) || errors.Is(err, errInterrupted) {
		return err
	}
	users := fs.usersOf(f)
	if _, _, now := f.state(); !sameError(before, now) {
		fs.turned(users)
	}
	if changed && len(users) > 0 {
		fs.changed(f, users)
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

func sameError(a, b error) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Error() == b.Error()
}

func (fs *feeds) usersOf(f *feed) []*instance {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return slices.Collect(maps.Keys(f.users))
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
	_, err := fs.fetch(ctx, f, ask{first: true, timeout: first, patient: true})
	if err != nil {
		cause := err
		err = fs.saved(f, cause)
		if err != nil && first < fs.timeout && errors.Is(cause, context.DeadlineExceeded) {
			_, err = fs.fetch(ctx, f, ask{first: true, timeout: fs.timeout, patient: true}) // slow, and nothing is saved
		}
	}
	if err == nil {
		wait := fs.delayOf(f)
		switch {
		case f.canWait():
			f.task.At(time.Now())
		case wait >= 0:
			f.task.At(time.Now().Add(wait))
		}
	}
	return err
}

func (fs *feeds) delayOf(f *feed) time.Duration {
	fs.mu.Lock()
	defer fs.mu.Unlock()
	return f.delay()
}

// delay is the jittered time to the next check: between the polling delays, or
// after a failure anywhere up to a delay that doubles with each. It is negative
// for a feed that is not polled. feeds.mu is held.
func (f *feed) delay() time.Duration {
	if f.manual {
		return -1
	}
	f.mu.Lock()
	fails, err := f.fails, f.err
	f.mu.Unlock()
	if fails > 0 {
		return backoff(fails, f.max, err)
	}
	return f.min + rand.N(max(f.max-f.min, time.Millisecond))
}

// ask says how a source is asked.
type ask struct {
	first   bool          // only where there is no content at all
	timeout time.Duration // for the answer
	patient bool          // else running out of time is errSlow: not a failure yet
	wait    time.Duration // how long the source is asked to wait for something new
}

// fetch asks the source for what is newer than the content. One fetch of a feed
// runs at a time.
func (fs *feeds) fetch(ctx context.Context, f *feed, a ask) (changed bool, err error) {
	if err := f.takeTurn(ctx, a.wait > 0); err != nil {
		return false, err
	}
	defer f.endTurn()
	f.mu.Lock()
	etag, loaded, old := f.etag, f.loaded, f.content
	if !a.first || !loaded {
		f.requested = time.Now()
	}
	f.mu.Unlock()
	if a.first && loaded {
		return false, nil
	}
	if !f.restraint.ask(time.Now()) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.fails++
		return false, held(f.name)
	}
	begun := time.Now()
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, a.timeout+a.wait)
	defer cancel()
	if a.wait > 0 {
		f.interruptible(cancel)
	}
	ctx, span := fs.traceFetch(ctx, f)
	b, err := f.next(ctx, bundles.Have{ETag: etag, Digest: old.digest, Wait: a.wait})
	if err != nil && ctx.Err() != nil && outer.Err() == nil {
		switch {
		case a.wait > 0 && errors.Is(context.Cause(ctx), context.Canceled): // somebody else wants to ask
			fs.fetched(span, f, nil, errInterrupted, begun)
			return false, errInterrupted
		case !a.patient:
			fs.fetched(span, f, nil, errSlow, begun)
			f.mu.Lock()
			defer f.mu.Unlock()
			if f.err == nil {
				f.err, f.stale = errSlow, time.Now()
			}
			return false, errSlow
		}
	}
	f.restraint.answered(err)
	var c content
	if err == nil {
		c, err = fs.library.prepare(b, old)
		b.Done()
		if err != nil {
			err = fmt.Errorf("%w: %w", bundles.ErrRefused, err)
		}
	}
	now := time.Now()
	traced := fs.fetched(span, f, b, err, begun)

	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case err == nil:
		f.traced = traced
		changed = !loaded || c.digest != old.digest
		f.content, f.etag, f.loaded = c, b.ETag, true
		f.downloaded, f.took, f.kind, f.waits = now, now.Sub(begun), "snapshot", b.Waits
		fs.metrics.fetches.WithLabelValues("new").Inc()
		if a.wait == 0 {
			fs.metrics.fetchTime.Observe(f.took.Seconds())
		}
		f.unsaved, f.unsavable = nil, b.Delta
		if b.Delta {
			f.kind = "delta"
		} else if fs.store != nil && b.Archive != nil {
			f.unsaved = &bundles.Bundle{Name: b.Name, ETag: b.ETag, Digest: b.Digest, Archive: b.Archive}
		}
	case errors.Is(err, bundles.ErrNotModified) && loaded:
		err = nil
		fs.metrics.fetches.WithLabelValues("not_modified").Inc()
	default:
		if b != nil && b.Delta {
			f.etag = "" // the whole bundle is needed
		}
		fs.failed(f, err, now)
		return false, err
	}
	if f.err != nil && loaded {
		fs.log.Info("bundle source is back", "bundle", f.name)
	}
	f.err, f.stale, f.fails, f.missing, f.checked = nil, time.Time{}, 0, 0, now
	return changed, nil
}

// next asks the source, if it can for less than the whole bundle.
func (f *feed) next(ctx context.Context, have bundles.Have) (*bundles.Bundle, error) {
	if s, ok := f.source.(*bundles.HTTP); ok {
		return s.Next(ctx, f.name, have)
	}
	return f.source.Fetch(ctx, f.name, have.ETag)
}

// failed notes a check that gave nothing. f.mu is held.
func (fs *feeds) failed(f *feed, err error, now time.Time) {
	if f.fails++; f.stale.IsZero() {
		f.stale = now
	}
	if f.missing++; !errors.Is(err, bundles.ErrNotFound) {
		f.missing = 0
	}
	if !sameError(f.err, err) {
		fs.log.Warn("bundle not updated", "bundle", f.name, "error", err, "serving", f.loaded)
	}
	f.err = err
	fs.metrics.fetches.WithLabelValues("failed").Inc()
	fs.metrics.failed(reasonOf(err))
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

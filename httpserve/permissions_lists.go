package httpserve

import (
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// lists remembers the permission lists of those who have asked for theirs.
//
// A list is remembered with the State that has answered, and is given as long as
// that is the State of its tenant: a new revision counts from its first moment,
// and no list from before is given after it. Right after it the lists of the
// subjects in use are computed by a few workers, before they are asked for.
//
// A list is computed once however many wait for it. Each waits for as long as it
// may itself; when nobody waits any more, it is not computed on.
//
// What is remembered is bounded in bytes, for each tenant and for all together;
// what was not asked for longest goes first. A list does not outlive the
// credentials by which it was asked for.
//
// Nothing here is called by the pool but signal, and the pool is never called
// while mu is held.
type lists struct {
	pool   Pool
	inputs Inputs // nil: actions cannot stand for requests
	limit  int64  // bytes that are remembered, of all tenants
	bound  int    // of streams, of all tenants
	log    *slog.Logger

	mu      sync.Mutex
	tenants map[tenants.ID]*tenantLists
	recent  *list.List // of *entry, of all tenants: asked for last is first
	bytes   int64
	streams int
	turns   []*tenantLists // that have work for the workers, in turn
	workers int            // that run

	remembered, computed uint64 // lists that were asked for, and were there or not
}

// tenantLists are those of one tenant. Guarded by lists.mu.
type tenantLists struct {
	id      tenants.ID
	limit   int64 // bytes
	entries map[key]*entry
	recent  *list.List // of *entry: asked for last is first
	bytes   int64
	pinned  int64 // of these, what has streams

	shelf   *entry           // has the catalogue, and no list; nil: there is none
	reading *catalogueFlight // nil: the catalogue is not being read

	streams  int
	subjects map[subject]int // :: subject → its streams
	keeper   *time.Timer     // looks at the tenant as long as there are streams

	dirty    bool     // it is to be looked at
	pending  []*entry // to be computed; may be gone by now
	inTurns  bool
	retrying bool // it is looked at again soon
	tries    int  // in a row that left something to retry
}

// key names a list within its tenant: a digest of all that it follows from,
// beside the State.
type key [sha256.Size]byte

// subject is a type and an ID.
type subject struct{ kind, id string }

// entry is the list of one caller, or the catalogue of a tenant. Guarded by
// lists.mu.
type entry struct {
	of      *tenantLists
	key     key
	mode    mode
	who     *who
	used    time.Time // asked for last
	until   time.Time // when the last credential of those who asked expires; zero: never
	list    *listing  // nil: there is none yet
	made    time.Time // of the list
	flight  *flight   // nil: it is not being computed
	base    int64     // bytes without the list
	size    int64     // bytes
	streams map[*stream]struct{}
	queued  bool // in of.pending

	catalogue *catalogue // of a shelf, which has nobody

	inAll, inOwn *list.Element
}

// who is a caller, and what its list can follow from. It is never changed.
type who struct {
	tenant   tenants.ID
	caller   *Caller
	identity CheckedRequest

	asked tenants.Question // what its questions have in common
}

// Estimates of what is remembered beside bodies, in bytes.
const (
	entrySize  = 1 << 10
	pairSize   = 128
	headerSize = 64
)

// How long, and how often.
const (
	inUse      = 5 * time.Minute  // since it was asked for, a list is in use
	keepTime   = 20 * time.Second // between two looks at a tenant that has streams
	scanTime   = 5 * time.Second  // for one look
	retryTime  = time.Second      // until what has failed is tried again,
	maxRetry   = 30 * time.Second // and at most
	maxWorkers = 4                // that compute lists before they are asked for
)

const (
	defaultLists   = 64 << 20
	defaultStreams = 10_000
)

func newLists(c *Config) *lists {
	l := &lists{
		pool: c.Pool, inputs: c.Inputs, limit: c.ListMemory, bound: c.Streams, log: c.Logger,
		tenants: map[tenants.ID]*tenantLists{}, recent: list.New(),
	}
	if l.limit <= 0 {
		l.limit = defaultLists
	}
	if l.bound <= 0 {
		l.bound = defaultStreams
	}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	return l
}

// whoOf returns who asks.
func whoOf(r *request) *who {
	return &who{tenant: r.Tenant, caller: r.Caller, identity: r.identity(), asked: r.asked()}
}

// keyOf returns the name of who's list, and what who takes in memory.
func keyOf(w *who, m mode) (k key, size int64, err error) {
	size = entrySize
	buf := make([]byte, 0, 512)
	text := func(s string) { buf = fmt.Appendf(buf, "%d:%s,", len(s), s) }
	buf = fmt.Appendf(buf, "%t %t %t ", m.rule, m.token, m.identity)
	text(w.caller.Type)
	text(w.caller.Subject)
	if claims := w.caller.Claims; claims != nil {
		start := len(buf)
		buf = append(buf, '{') // to have no claims is not to have empty ones
		err := claims.Iter(func(k, v *ast.Term) error {
			if !m.token && slices.ContainsFunc(policy.TokenClaims(), func(name ast.Value) bool { return name.Compare(k.Value) == 0 }) {
				return nil
			}
			var err error
			if buf, err = appendValue(append(buf, ';'), k.Value); err == nil {
				buf, err = appendValue(append(buf, '='), v.Value)
			}
			return err
		})
		if err != nil {
			return k, 0, err
		}
		size += valueFactor * int64(len(buf)-start)
	}
	if m.identity {
		text(w.identity.Host)
		text(w.identity.Principal)
		for _, h := range w.identity.Headers {
			text(h.Name)
			text(h.Value)
		}
	}
	for _, h := range w.identity.Headers {
		size += headerSize + int64(len(h.Name)+len(h.Value))
	}
	return sha256.Sum256(buf), size, nil
}

// errMoved: the policy has come to look at callers in another way, so that what
// was one list may be two.
var errMoved = errors.New("the policy looks at callers in another way")

// get returns who's list, as the policy of this moment has it: that of view, or of
// one that has come after it.
func (l *lists) get(ctx context.Context, view *tenants.View, w *who) (*listing, error) {
	for range maxMoves {
		c, err := l.catalogue(ctx, w.tenant, view)
		if err != nil {
			return nil, err
		}
		k, size, err := keyOf(w, c.mode)
		if err != nil {
			return nil, err
		}
		list, err := l.enter(ctx, view, w, c.mode, k, size)
		if !errors.Is(err, errMoved) {
			return list, err
		}
		if view, err = l.pool.View(ctx, w.tenant); err != nil {
			return nil, err
		}
	}
	return nil, errMoving
}

// enter returns the list of a key: the one that is remembered, or the one that is
// computed, for this caller or for one that came before.
func (l *lists) enter(ctx context.Context, view *tenants.View, w *who, m mode, k key, size int64) (*listing, error) {
	now := time.Now()
	l.mu.Lock()
	t := l.of(w.tenant, view)
	e := t.entries[k]
	if e == nil || e.expired(now) {
		l.drop(e)
		e = l.add(t, k, m, w, size)
	}
	e.asked(w, now)
	if e.inAll != nil { // else there is no room for it, and it is not remembered
		l.recent.MoveToFront(e.inAll)
		t.recent.MoveToFront(e.inOwn)
	}
	if e.good(view.State, now) {
		defer l.mu.Unlock()
		l.remembered++
		return e.list, nil
	}
	l.computed++
	f, first := l.fly(e, view)
	f.waiting++
	l.mu.Unlock()
	list, err := l.wait(ctx, f)
	switch {
	case err != nil:
		return nil, err
	case first || list.state == view.State:
		return list, nil
	}
	return nil, errMoved // it was begun before we came, and answers for before
}

// good reports whether there is a list that may be given while this is the State.
func (e *entry) good(state string, now time.Time) bool {
	return e.list != nil && e.list.state == state && (e.list.keep == 0 || now.Sub(e.made) < e.list.keep)
}

func (e *entry) expired(now time.Time) bool { return !e.until.IsZero() && !now.Before(e.until) }

// asked notes that a caller has asked.
func (e *entry) asked(w *who, now time.Time) {
	e.used = now
	if expiry := w.caller.Expiry; !e.until.IsZero() && (expiry.IsZero() || expiry.After(e.until)) {
		e.until, e.who = expiry, w
	}
}

// flight is one computing of a list. Its list and err are set before done is
// closed.
type flight struct {
	entry   *entry
	cancel  context.CancelFunc
	waiting int // guarded by lists.mu
	done    chan struct{}
	list    *listing
	err     error
}

// fly returns the flight of an entry. It reports whether that begins now. l.mu is
// held.
func (l *lists) fly(e *entry, view *tenants.View) (f *flight, first bool) {
	if e.flight != nil {
		return e.flight, false
	}
	ctx, cancel := context.WithTimeout(context.Background(), listTime)
	f = &flight{entry: e, cancel: cancel, done: make(chan struct{})}
	e.flight = f
	w := e.who
	go func() {
		defer cancel()
		defer close(f.done)
		defer func() {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.land(f)
		}()
		defer l.caught(&f.err)
		f.list, f.err = l.compute(ctx, w, e.mode, view)
	}()
	return f, true
}

// caught makes an error of a panic.
func (l *lists) caught(err *error) {
	if p := recover(); p != nil {
		l.log.Error("panic while a permission list is computed", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
		*err = tenants.ErrPanic
	}
}

// wait waits for a flight, no longer than ctx lasts.
func (l *lists) wait(ctx context.Context, f *flight) (*listing, error) {
	select {
	case <-f.done:
		return f.list, f.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if f.waiting--; f.waiting == 0 {
		f.cancel()
		if f.entry.flight == f { // who comes now begins another
			f.entry.flight = nil
			l.dropEmpty(f.entry)
		}
	}
	return nil, ctx.Err()
}

// land remembers the list of a flight, and tells the streams of it. l.mu is held.
func (l *lists) land(f *flight) {
	e := f.entry
	if e.flight != f {
		return // it was given up
	}
	e.flight = nil
	if f.err != nil {
		l.dropEmpty(e)
		return
	}
	if e.of.entries[e.key] != e { // pushed out meanwhile
		return
	}
	e.list, e.made = f.list, time.Now()
	l.resize(e, e.base+f.list.size)
	if !f.list.passing { // else clients keep what they have
		for st := range e.streams {
			st.tell(f.list.version)
		}
	}
	l.makeRoom(e.of)
}

// of returns the lists of a tenant. l.mu is held.
func (l *lists) of(id tenants.ID, view *tenants.View) *tenantLists {
	t := l.tenants[id]
	if t == nil {
		t = &tenantLists{id: id, entries: map[key]*entry{}, recent: list.New(), subjects: map[subject]int{}}
		l.tenants[id] = t
	}
	if offers := view.Settings.HTTP; offers != nil && offers.Permissions != nil {
		t.limit = offers.Permissions.Memory
	}
	return t
}

// add adds the entry of a caller. l.mu is held.
func (l *lists) add(t *tenantLists, k key, m mode, w *who, size int64) *entry {
	e := &entry{of: t, key: k, mode: m, who: w, until: w.caller.Expiry, base: size, streams: map[*stream]struct{}{}}
	t.entries[k] = e
	l.tenants[t.id] = t // it may have been forgotten with its last entry
	l.shelve(e)
	l.resize(e, size)
	l.makeRoom(t)
	return e
}

// shelve puts an entry, which is new, before all others. l.mu is held.
func (l *lists) shelve(e *entry) {
	e.inAll, e.inOwn = l.recent.PushFront(e), e.of.recent.PushFront(e)
}

// resize says what an entry takes. l.mu is held.
func (l *lists) resize(e *entry, size int64) {
	grown := size - e.size
	e.size = size
	l.bytes += grown
	e.of.bytes += grown
	if len(e.streams) > 0 {
		e.of.pinned += grown
	}
}

// drop forgets an entry, and the tenant if that was all. l.mu is held.
func (l *lists) drop(e *entry) {
	if e == nil || e.inAll == nil {
		return
	}
	t := e.of
	l.resize(e, 0)
	l.recent.Remove(e.inAll)
	t.recent.Remove(e.inOwn)
	e.inAll, e.inOwn = nil, nil
	if e == t.shelf {
		t.shelf = nil
	} else {
		delete(t.entries, e.key)
	}
	l.tidy(t)
}

// tidy forgets a tenant of which nothing is left. l.mu is held.
func (l *lists) tidy(t *tenantLists) {
	if t.recent.Len() == 0 && t.reading == nil && t.streams == 0 && l.tenants[t.id] == t {
		delete(l.tenants, t.id)
	}
}

// dropEmpty forgets an entry that has neither a list nor anybody who waits for it.
// l.mu is held.
func (l *lists) dropEmpty(e *entry) {
	if e.list == nil && e.flight == nil && len(e.streams) == 0 {
		l.drop(e)
	}
}

// makeRoom forgets what was not asked for longest, until the rest is within its
// bounds. What has streams stays: they are bounded themselves. l.mu is held.
func (l *lists) makeRoom(t *tenantLists) {
	l.evict(t.recent, func() bool { return t.bytes > t.limit })
	l.evict(l.recent, func() bool { return l.bytes > l.limit })
}

func (l *lists) evict(recent *list.List, over func() bool) {
	for at := recent.Back(); at != nil && over(); {
		e := at.Value.(*entry)
		at = at.Prev()
		if len(e.streams) == 0 {
			l.drop(e)
		}
	}
}

// catalogueFlight is one reading of a catalogue.
type catalogueFlight struct {
	done      chan struct{}
	catalogue *catalogue
	err       error
}

// catalogue returns what a tenant's lists are made of, as view's policy or one
// that has come after it says.
func (l *lists) catalogue(ctx context.Context, id tenants.ID, view *tenants.View) (*catalogue, error) {
	for range maxMoves {
		l.mu.Lock()
		t := l.of(id, view)
		if c := t.known(view.State); c != nil {
			l.recent.MoveToFront(t.shelf.inAll)
			t.recent.MoveToFront(t.shelf.inOwn)
			l.mu.Unlock()
			return c, nil
		}
		f, first := t.reading, false
		if f == nil {
			f, first = &catalogueFlight{done: make(chan struct{})}, true
			t.reading = f
			go l.read(t, f, view)
		}
		l.mu.Unlock()
		select {
		case <-f.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		switch {
		case f.err != nil:
			return nil, f.err
		case first || f.catalogue.state == view.State:
			return f.catalogue, nil
		}
		var err error
		if view, err = l.pool.View(ctx, id); err != nil {
			return nil, err
		}
	}
	return nil, errMoving
}

// known returns the catalogue if it is that of a State. l.mu is held.
func (t *tenantLists) known(state string) *catalogue {
	if t.shelf == nil {
		return nil
	}
	c := t.shelf.catalogue
	if c.state != state || c.varies && time.Since(c.made) >= keepVarying {
		return nil
	}
	return c
}

// read reads a catalogue, and remembers it.
func (l *lists) read(t *tenantLists, f *catalogueFlight, view *tenants.View) {
	ctx, cancel := context.WithTimeout(context.Background(), listTime)
	defer cancel()
	defer close(f.done)
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		t.reading = nil
		if l.drop(t.shelf); f.err == nil {
			l.tenants[t.id] = t // it may have been forgotten with the shelf
			t.shelf = &entry{of: t, catalogue: f.catalogue}
			l.shelve(t.shelf)
			l.resize(t.shelf, f.catalogue.size)
			l.makeRoom(t)
		}
		l.tidy(t)
	}()
	defer l.caught(&f.err)
	f.catalogue, f.err = l.readCatalogue(ctx, t.id, view)
}

// check answers items about who, as one batch. It reports whether the answer to
// one of them is not known.
func (l *lists) check(ctx context.Context, view *tenants.View, w *who, items []checkItem) (results []bool, failed bool, err error) {
	for range maxMoves {
		c, err := l.catalogue(ctx, w.tenant, view)
		if err != nil {
			return nil, false, err
		}
		if c.state == view.State {
			results, failed, state, err := l.checkBy(ctx, view, c, w, items)
			if err != nil || state == c.state {
				return results, failed, err
			}
		}
		if view, err = l.pool.View(ctx, w.tenant); err != nil {
			return nil, false, err
		}
		if offers := view.Settings.HTTP; offers == nil || offers.Permissions == nil {
			return nil, false, errRoute
		}
	}
	return nil, false, errMoving
}

// checkBy is check under the State of one catalogue; it says which has answered.
func (l *lists) checkBy(ctx context.Context, view *tenants.View, c *catalogue, w *who, items []checkItem) (results []bool, failed bool, state string, err error) {
	results = make([]bool, len(items))
	if len(items) == 0 {
		return results, false, c.state, nil
	}
	allow := view.Settings.HTTP.Permissions.Allow
	if c.mode.rule && !view.Has(allow) {
		// There is nothing that could be asked about one resource, and the list
		// says all about types.
		list, err := l.get(ctx, view, w)
		if err != nil {
			return nil, false, "", err
		}
		for i, it := range items {
			results[i] = it.id == nil && list.allows(it.kind, it.action)
		}
		return results, list.passing, c.state, nil
	}
	subject := ast.NewTerm(w.caller.Value())
	batch := tenants.NewDecisionID()
	questions := make([]tenants.Question, len(items))
	pairs := make([]pair, len(items))
	for i, it := range items {
		pairs[i] = pair{kind: it.kind, action: it.action}
		if p := c.find(it.kind, it.action); p != nil && it.id == nil {
			pairs[i] = *p
		}
		q := l.questionAbout(w, allow, subject, &pairs[i], it.id)
		q.BatchDecisionID, q.Batch = batch, &decisionlog.Batch{Key: pairs[i].key(), Index: i, Size: len(items)}
		questions[i] = q
	}
	passing := 0
	var first error
	err = l.pool.Decide(ctx, w.tenant, questions, func(i int, a tenants.Answer) {
		state = a.State
		var err error
		if results[i], err = allowedIn(&a, pairs[i].request()); err == nil {
			return
		}
		failed = true
		if transient(err) {
			if passing++; first == nil {
				first = err
			}
		}
	})
	if err == nil && passing == len(items) {
		err = first
	}
	return results, failed, state, err
}

// allows reports whether the list has an action.
func (l *listing) allows(kind, action string) bool {
	for _, t := range l.types {
		if t.name == kind {
			return slices.Contains(t.actions, action)
		}
	}
	return false
}

// Activated says that a tenant, or with "" any, may have begun to decide by
// another policy or other settings, or may be gone. It is for tenants.Config: it
// neither blocks nor calls the pool.
func (s *Server) Activated(id tenants.ID) { s.lists.signal(id) }

// signal says that a tenant, or with "" any, may have another policy. It does not
// block.
func (l *lists) signal(id tenants.ID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if id == "" {
		for _, t := range l.tenants {
			t.dirty = true
			l.enqueue(t)
		}
	} else if t := l.tenants[id]; t != nil {
		t.dirty = true
		l.enqueue(t)
	}
}

// enqueue has a worker turn to a tenant. l.mu is held.
func (l *lists) enqueue(t *tenantLists) {
	if !t.inTurns {
		t.inTurns = true
		l.turns = append(l.turns, t)
	}
	if l.workers < maxWorkers && l.workers < len(l.turns)+len(t.pending) {
		l.workers++
		go l.work()
	}
}

// work does what is to be done, one thing for one tenant at a time, until nothing
// is.
func (l *lists) work() {
	for {
		l.mu.Lock()
		t, e := l.next()
		if t == nil {
			l.workers--
			l.mu.Unlock()
			return
		}
		l.mu.Unlock()
		if e == nil {
			l.look(t)
		} else {
			l.renew(e)
		}
	}
}

// next returns a tenant that is to be looked at, or an entry that is to be
// computed. l.mu is held.
func (l *lists) next() (*tenantLists, *entry) {
	for len(l.turns) > 0 {
		t := l.turns[0]
		l.turns[0] = nil
		l.turns = l.turns[1:]
		t.inTurns = false
		var e *entry
		if t.dirty {
			t.dirty = false
		} else if len(t.pending) > 0 {
			e = t.pending[0]
			t.pending[0] = nil
			t.pending = t.pending[1:]
			e.queued = false
		} else {
			continue
		}
		if t.dirty || len(t.pending) > 0 {
			l.enqueue(t)
		}
		return t, e
	}
	return nil, nil
}

// look looks at a tenant whose policy may have changed: what nobody uses goes, and
// what is in use is computed.
func (l *lists) look(t *tenantLists) {
	var fault error
	defer func() {
		if fault != nil {
			l.log.Debug("permission lists not renewed", "tenant", t.id, "error", fault)
			l.retry(t)
		}
	}()
	defer l.caught(&fault)
	l.mu.Lock()
	wanted := t.wanted()
	l.mu.Unlock()
	if !wanted {
		l.forget(t) // and a tenant that nobody asks is not loaded for that
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), scanTime)
	defer cancel()
	view, err := l.pool.View(ctx, t.id)
	if errors.Is(err, tenants.ErrUnknown) || err == nil && (view.Settings.HTTP == nil || view.Settings.HTTP.Permissions == nil) {
		l.forget(t)
		return
	}
	if err != nil {
		fault = err
		return
	}
	l.mu.Lock()
	offers := view.Settings.HTTP.Identity()
	for at := t.recent.Front(); at != nil; at = at.Next() {
		for st := range at.Value.(*entry).streams {
			if st.offers != offers {
				st.stop() // who may ask is perhaps another's to say: it asks anew
			}
		}
	}
	l.mu.Unlock()
	c, err := l.catalogue(ctx, t.id, view)
	if err != nil {
		fault = err
		return
	}
	l.sweep(t, view, c)
}

// wanted reports whether a list of the tenant is in use. l.mu is held.
func (t *tenantLists) wanted() bool {
	for _, e := range t.entries {
		if e.wanted(time.Now()) {
			return true
		}
	}
	return false
}

func (e *entry) wanted(now time.Time) bool {
	return !e.expired(now) && (len(e.streams) > 0 || now.Sub(e.used) < inUse)
}

// sweep goes through the entries of a tenant.
func (l *lists) sweep(t *tenantLists, view *tenants.View, c *catalogue) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	passing := false
	for at := t.recent.Front(); at != nil; {
		e := at.Value.(*entry)
		at = at.Next()
		switch {
		case e == t.shelf:
		case e.wanted(now) && e.mode != c.mode:
			for st := range e.streams {
				st.stop() // what was one list may be two
			}
			if e.flight == nil {
				l.drop(e)
			}
		case e.good(view.State, now):
			passing = passing || e.list.passing
		case e.wanted(now):
			passing = passing || e.list != nil && e.list.passing
			if !e.queued {
				e.queued = true
				t.pending = append(t.pending, e)
			}
		case e.flight == nil:
			l.drop(e)
		}
	}
	if len(t.pending) > 0 {
		l.enqueue(t)
	}
	if !passing && len(t.pending) == 0 {
		t.tries = 0
	}
}

// renew computes the list of an entry, if it is not there.
func (l *lists) renew(e *entry) {
	var fault error
	defer func() {
		if fault != nil {
			l.retry(e.of)
		}
	}()
	defer l.caught(&fault)
	ctx, cancel := context.WithTimeout(context.Background(), listTime)
	defer cancel()
	view, err := l.pool.View(ctx, e.of.id)
	if err != nil {
		fault = err
		return
	}
	l.mu.Lock()
	if e.inAll == nil || e.good(view.State, time.Now()) {
		l.mu.Unlock()
		return
	}
	f, _ := l.fly(e, view)
	f.waiting++
	l.mu.Unlock()
	list, err := l.wait(ctx, f)
	switch {
	case errors.Is(err, errMoved):
		l.signal(e.of.id)
	case err != nil:
		fault = err
	case list.passing:
		l.retry(e.of)
	case list.state != view.State:
		l.signal(e.of.id) // it was begun before
	}
}

// retry looks at a tenant that has streams again soon, later each time.
func (l *lists) retry(t *tenantLists) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.streams == 0 || t.retrying {
		return
	}
	t.retrying = true
	wait := min(retryTime<<min(t.tries, 10), maxRetry)
	t.tries++
	time.AfterFunc(wait/2+rand.N(wait/2), func() {
		l.mu.Lock()
		t.retrying = false
		l.mu.Unlock()
		l.signal(t.id)
	})
}

// forget ends all streams of a tenant, and forgets its lists.
func (l *lists) forget(t *tenantLists) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for at := t.recent.Front(); at != nil; {
		e := at.Value.(*entry)
		at = at.Next()
		for st := range e.streams {
			st.stop()
		}
		l.drop(e)
	}
}

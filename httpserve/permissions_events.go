package httpserve

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"time"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Streams of events.
const (
	heartbeat  = 20 * time.Second // between two signs of life
	writeTime  = 10 * time.Second // for an event to leave; a client that takes it no faster is cut off
	streamTime = time.Hour        // that a stream lasts, at most
	reconnect  = 2 * time.Second  // that clients wait before they ask for another

	// A change is told to the streams of a tenant over a while, so that not all
	// ask for their lists at once: spread for each of them, at most maxSpread.
	spread    = 5 * time.Millisecond
	maxSpread = time.Second
)

// Events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
const (
	eventVersion = "permissions" // the caller's list has another version
	eventExpired = "expired"     // the caller's credential has expired
)

var (
	errSubjectStreams = &fault{http.StatusTooManyRequests, codeBusy, "the subject has as many streams of events as it may have", "", 10 * time.Second}
	errStreams        = &fault{http.StatusServiceUnavailable, codeBusy, "there are as many streams of events as there may be", "", 10 * time.Second}
)

// stream is one stream of events.
type stream struct {
	entry   *entry
	subject subject
	offers  string // identity of what the tenant offered when the caller was admitted
	wake    chan struct{}
	end     chan struct{}

	// Guarded by lists.mu.
	version string
	stopped bool
}

// tell says which version the list has now. lists.mu is held.
func (st *stream) tell(version string) {
	if st.version == version {
		return
	}
	st.version = version
	select {
	case st.wake <- struct{}{}:
	default: // it looks soon anyway
	}
}

// stop ends the stream. lists.mu is held.
func (st *stream) stop() {
	if !st.stopped {
		st.stopped = true
		close(st.end)
	}
}

// follow opens a stream of who's list. The caller leaves it.
func (l *lists) follow(ctx context.Context, view *tenants.View, w *who) (*stream, error) {
	offers := view.Settings.HTTP.Identity() // by which the caller was admitted
	for range maxMoves {
		list, err := l.get(ctx, view, w)
		if err != nil {
			return nil, err
		}
		c, err := l.catalogue(ctx, w.tenant, view)
		if err != nil {
			return nil, err
		}
		if list.state == view.State && c.state == view.State {
			st, err := l.attach(view, w, c.mode, list)
			if err != nil {
				return nil, err
			}
			if now, err := l.pool.View(ctx, w.tenant); err != nil || now.State != list.state {
				l.signal(w.tenant) // this was perhaps told before the stream was there
			}
			return st, nil
		}
		if view, err = l.pool.View(ctx, w.tenant); err != nil {
			return nil, err
		}
		if view.Settings.HTTP.Identity() != offers {
			break
		}
	}
	return nil, errMoving
}

// attach adds a stream to the entry of a list.
func (l *lists) attach(view *tenants.View, w *who, m mode, list *listing) (*stream, error) {
	k, size, err := keyOf(w, m)
	if err != nil {
		return nil, err
	}
	st := &stream{
		subject: subject{w.caller.Type, w.caller.Subject}, offers: view.Settings.HTTP.Identity(),
		wake: make(chan struct{}, 1), end: make(chan struct{}), version: list.version,
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.of(w.tenant, view)
	defer l.tidy(t)
	bounds := view.Settings.HTTP.Permissions
	switch {
	case t.subjects[st.subject] >= bounds.SubjectStreams:
		return nil, errSubjectStreams
	case t.streams >= bounds.Streams, l.streams >= l.bound:
		return nil, errStreams
	}
	e := t.entries[k]
	if e == nil { // pushed out
		e = l.add(t, k, m, w, size)
	}
	if e.inAll == nil || len(e.streams) == 0 && t.pinned+e.base+list.size > t.limit {
		l.dropEmpty(e)
		return nil, errStreams // there is no memory for another list that stays
	}
	if e.list == nil {
		e.list, e.made = list, time.Now()
		l.resize(e, e.base+list.size)
	}
	st.entry = e
	if len(e.streams) == 0 {
		t.pinned += e.size
	}
	e.streams[st] = struct{}{}
	e.used = time.Now()
	t.subjects[st.subject]++
	l.streams++
	if t.streams++; t.streams == 1 {
		l.keep(t)
	}
	st.tell(e.list.version)
	return st, nil
}

// leave ends a stream's part.
func (l *lists) leave(st *stream) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, t := st.entry, st.entry.of
	delete(e.streams, st)
	if len(e.streams) == 0 {
		t.pinned -= e.size
		l.makeRoom(t)
	}
	if t.subjects[st.subject]--; t.subjects[st.subject] == 0 {
		delete(t.subjects, st.subject)
	}
	l.streams--
	if t.streams--; t.streams == 0 {
		t.keeper.Stop()
		l.tidy(t)
	}
}

// keep looks at a tenant now and then while it has streams: it stays in use, that
// it is gone is noticed, and lists that change by themselves are computed. l.mu is
// held.
func (l *lists) keep(t *tenantLists) {
	next := func() time.Duration { return keepTime - rand.N(keepTime/4) }
	t.keeper = time.AfterFunc(next(), func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if t.streams == 0 {
			return
		}
		t.dirty = true
		l.enqueue(t)
		t.keeper.Reset(next())
	})
}

// news returns the version that a stream is to tell, and how long it may wait with
// that.
func (l *lists) news(st *stream) (version string, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return st.version, min(spread*time.Duration(st.entry.of.streams), maxSpread)
}

// permissionEvents tells the caller when its list has another version, for as long
// as its credential holds.
func (s *Server) permissionEvents(w http.ResponseWriter, r *request) error {
	ctx, cancel := r.bounded(listTime)
	defer cancel()
	st, err := s.lists.follow(ctx, r.View, whoOf(r))
	if err != nil {
		return err
	}
	defer s.lists.leave(st)
	cancel()

	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	h.Set("X-Accel-Buffering", "no")
	e := &events{w: w, control: http.NewResponseController(w)}
	_ = e.control.SetReadDeadline(time.Time{}) // nothing more is to arrive
	w.WriteHeader(http.StatusOK)
	e.run(s, r, st)
	return nil // what could not be written ends the connection
}

// events writes a stream of events.
type events struct {
	w       http.ResponseWriter
	control *http.ResponseController
}

// run writes events until the stream ends.
func (e *events) run(s *Server, r *request, st *stream) {
	last := r.Header.Get("Last-Event-ID")
	version, _ := s.lists.news(st)
	hello := fmt.Sprintf("retry: %d\n\n", reconnect.Milliseconds())
	if version != last {
		hello += event(version)
	}
	if !e.write(hello) {
		return
	}
	beat := time.NewTicker(heartbeat)
	defer beat.Stop()
	over := time.NewTimer(streamTime - rand.N(streamTime/4))
	defer over.Stop()
	var expired, tell <-chan time.Time
	if expiry := r.Caller.Expiry; !expiry.IsZero() {
		timer := time.NewTimer(time.Until(expiry))
		defer timer.Stop()
		expired = timer.C
	}
	wait := time.NewTimer(time.Hour)
	defer wait.Stop()
	for ok := true; ok; {
		select {
		case <-st.wake:
			if tell == nil {
				_, most := s.lists.news(st)
				wait.Reset(rand.N(most))
				tell = wait.C
			}
		case <-tell:
			tell = nil
			now, _ := s.lists.news(st)
			if now != version { // it may have changed back meanwhile
				version = now
				ok = e.write(event(version))
			}
		case <-beat.C:
			ok = e.write(":\n\n")
		case <-expired:
			e.write("event: " + eventExpired + "\ndata: {}\n\n")
			return
		case <-over.C:
			return
		case <-st.end:
			return
		case <-s.draining:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// event returns the event that a list has a version.
func event(version string) string {
	return fmt.Sprintf("event: %s\nid: %s\ndata: {\"version\":%q}\n\n", eventVersion, version, version)
}

// write writes and sends a text. It reports whether the client takes it in time.
func (e *events) write(text string) bool {
	_ = e.control.SetWriteDeadline(time.Now().Add(writeTime)) // what has none, like a recorder, is not slow
	if _, err := e.w.Write([]byte(text)); err != nil {
		return false
	}
	if err := e.control.Flush(); err != nil {
		return false
	}
	// Over HTTP/2 a deadline ends a stream also where nothing is to be written.
	_ = e.control.SetWriteDeadline(time.Time{})
	return true
}

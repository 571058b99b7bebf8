package httpserve

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Config is what a Server works with. A zero field means its default.
type Config struct {
	// Pool decides. Required.
	Pool Pool

	// Local says that the listener is reached from this machine alone. Only
	// there a tenant may be asked by anybody. Reload does not change it.
	Local bool

	// URL is the public address of the API, without a path. Optional.
	URL string

	// TrustedPeers are those whose word about other callers is believed: CIDRs
	// or addresses, patterns of IDs like "spiffe://example.org/*", or "unix" for
	// whoever reaches a socket. Default: nobody.
	TrustedPeers []string

	// Peers say which trusted peers may ask in forward-auth for which tenants,
	// by the ID of their certificates. Empty: all may for all.
	Peers map[string][]string // :: pattern of an ID → patterns of tenants

	// Inputs makes the input documents of forward-auth and of responses that a
	// policy writes. Without it there are neither.
	Inputs Inputs

	// Memory bounds the bodies that are being answered, in bytes together. One
	// that it has no room for is answered with 503. Default 256 MiB.
	Memory int64

	// ListMemory bounds the permission lists that are remembered, of all tenants
	// together, in bytes. Default 64 MiB.
	ListMemory int64

	// Streams bounds the streams of events of all tenants. Default 10,000.
	Streams int

	// Client fetches the keys of issuers. Default: one that follows no
	// redirects.
	Client *http.Client

	// Propagators are the ways in which callers name their traces. Default: that
	// of W3C.
	Propagators tenants.Propagators

	// Logger gets panics as errors, tenants that are refused as warnings, and
	// what was wrong with refused requests for debugging. Default: none.
	Logger *slog.Logger

	// Answered counts an answer: the route, as routes.go has it, and the status.
	// Optional.
	Answered func(route string, status int)
}

// Pool is what a Server needs of tenants.Pool.
type Pool interface {
	// Decide asks a tenant's policy and calls answer once for each question,
	// before it returns. It returns an error, which may wrap ErrUnknown, where
	// it has no answers.
	Decide(ctx context.Context, id tenants.ID, questions []tenants.Question, answer func(i int, a tenants.Answer)) error

	// View returns what a tenant is. Its error wraps ErrUnknown, ErrNotReady or
	// ErrBusy.
	View(ctx context.Context, id tenants.ID) (*tenants.View, error)
}

// Bounds of every request.
const (
	bodyTime   = 15 * time.Second // for the body to arrive
	answerTime = 60 * time.Second // for the answer to leave
	maxPath    = 8 << 10          // bytes of a path with its query
)

const defaultMemory = 256 << 20

// Server answers HTTP requests.
type Server struct {
	pool     Pool
	local    bool
	memory   memory
	inputs   Inputs
	lists    *lists
	keys     *keyring
	open     openLog
	log      *slog.Logger
	answered func(string, int)
	requests atomic.Uint64 // answered since the start: numbers them in logs
	draining chan struct{} // closed when what does not end by itself is to end
	drain    sync.Once

	propagators tenants.Propagators

	// place is always replaced, never changed.
	place atomic.Pointer[place]
}

// place is what a Server makes of those parts of its Config that can change.
type place struct {
	url     *url.URL // nil: not known
	trusted trusted
	peers   map[string][]string // as Config has them
}

// New returns a Server, or an error that says what in its Config is wrong.
func New(c Config) (*Server, error) {
	s := &Server{
		pool:     c.Pool,
		local:    c.Local,
		memory:   memory{limit: c.Memory},
		inputs:   c.Inputs,
		lists:    newLists(&c),
		keys:     newKeyring(c.Client),
		log:      c.Logger,
		answered: c.Answered,
		draining: make(chan struct{}),

		propagators: c.Propagators,
	}
	if err := s.Reload(c); err != nil {
		return nil, err
	}
	if s.memory.limit <= 0 {
		s.memory.limit = defaultMemory
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.answered == nil {
		s.answered = func(string, int) {}
	}
	return s, nil
}

// Reload makes the Server work with the URL, TrustedPeers and Peers of c. On an
// error those that it has stay.
func (s *Server) Reload(c Config) error {
	p := &place{peers: c.Peers}
	var err error
	if p.trusted, err = trustedOf(c.TrustedPeers); err != nil {
		return err
	}
	if c.URL != "" {
		if p.url, err = ParseURL(c.URL); err != nil {
			return err
		}
	}
	s.place.Store(p)
	return nil
}

// Drain ends what does not end by itself, such as streams of events. Requests are
// answered as before.
func (s *Server) Drain() { s.drain.Do(func() { close(s.draining) }) }

// ParseURL parses the public address of the API: a scheme and a host, with a port
// where there is one, and no more.
func ParseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || strings.TrimSuffix(text, "/") != u.Scheme+"://"+u.Host {
		return nil, fmt.Errorf("%q is not an address like https://authz.example.com", text)
	}
	u.Path = ""
	return u, nil
}

// request is one request on its way through a route.
type request struct {
	*http.Request
	server *Server
	place  *place
	route  *route
	id     uint64 // of this request, for the logs

	Tenant tenants.ID
	View   *tenants.View // what the tenant is
	Offers *control.HTTP // what it offers: View.Settings.HTTP, never nil
	Caller *Caller       // who asks; nil on a route that does not say who may

	// unready is why the tenant has no policy. Nil: it has, as on all routes but
	// those that answer without, too.
	unready error

	// Rest is what follows the route's path in the path of the request, as it
	// was sent.
	Rest string
}

// ServeHTTP answers a request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rec := &recorder{ResponseWriter: w}
	req := &request{Request: r, server: s, place: s.place.Load(), route: noRoute, id: s.requests.Add(1)}
	defer func() { s.answered(req.route.path, rec.status) }()
	defer func() {
		if p := recover(); p != nil {
			if p == http.ErrAbortHandler { // the connection is to be closed
				panic(p)
			}
			s.log.Error("panic in a request", "tenant", req.Tenant, "route", req.route.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			s.fail(rec, req, tenants.ErrPanic)
		}
	}()
	now := time.Now()
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(now.Add(bodyTime)) // what has none, like a recorder, is not slow
	_ = control.SetWriteDeadline(now.Add(answerTime))
	secure(w.Header())
	if id := r.Header.Get("X-Request-ID"); isRequestID(id) {
		w.Header().Set("X-Request-ID", id)
	}
	if err := s.serve(rec, req); err != nil {
		s.fail(rec, req, err)
	}
}

// isRequestID reports whether a client's name for its request is one that is
// given back.
func isRequestID(id string) bool {
	return id != "" && len(id) <= 128 && !strings.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r >= 0x7f })
}

// serve answers a request, or returns why there is no answer.
func (s *Server) serve(w *recorder, r *request) error {
	if err := s.find(w, r); err != nil {
		return err
	}
	if done, err := s.cors(w, r); done || err != nil {
		return err
	}
	if !r.route.allows(r.Method) {
		w.Header().Set("Allow", strings.Join(r.route.methods, ", "))
		return errMethod
	}
	if err := r.route.content.check(r); err != nil {
		return err
	}
	if err := s.admit(r); err != nil {
		return err
	}
	return r.route.serve(s, w, r)
}

// find finds the route and the tenant that the request names, and what the tenant
// offers.
func (s *Server) find(w http.ResponseWriter, r *request) error {
	if len(r.RequestURI) > maxPath {
		return errPath
	}
	route, tenant, rest, ok := routeOf(r.URL.EscapedPath())
	if !ok {
		return errRoute
	}
	r.route, r.Rest = route, rest
	id, err := tenants.ParseID(tenant)
	if err != nil {
		return errTenant
	}
	r.Tenant = id
	if r.View, err = s.pool.View(r.Context(), id); err != nil {
		if r.View == nil || !route.unready {
			return err
		}
		r.unready = err
	}
	r.Offers = r.View.Settings.HTTP
	if r.Offers == nil || !route.offered(r.Offers) {
		return errRoute
	}
	return nil
}

// admit finds out who asks, as far as the route wants to know.
func (s *Server) admit(r *request) error {
	switch r.route.access {
	case forCallers:
		if r.Offers.Auth.None() && !s.local {
			s.open.warn(s.log, r.Tenant, r.View.State)
			return errOpen
		}
		caller, err := s.callerOf(r)
		r.Caller = caller
		return err
	case forPeers:
		if !r.place.trusted.has(r.Request) || !r.place.permits(r) {
			return errPeer
		}
	}
	return nil
}

// fail answers a request that has no answer.
func (s *Server) fail(w *recorder, r *request, err error) {
	f := failureOf(err)
	if _, wanted := err.(upstreamError); r.route.closed && f.status >= 500 && !wanted {
		denial := *f
		denial.status = http.StatusForbidden
		f = &denial
	}
	if s.log.Enabled(r.Context(), slog.LevelDebug) {
		log := s.log
		if id := w.Header().Get(decisionHeader); id != "" {
			q := r.asked()
			q.DecisionID = id
			log = log.With(q.Attrs())
		}
		log.DebugContext(r.Context(), "request refused", "tenant", r.Tenant, "route", r.route.path, "status", f.status, "error", err)
	}
	if w.status != 0 { // half of an answer is there, so that the other half must not look whole
		panic(http.ErrAbortHandler)
	}
	if f.status == http.StatusRequestEntityTooLarge {
		w.Header().Set("Connection", "close") // the rest of the body is not read
	}
	f.write(w, r.route.form)
}

// recorder notes which status an answer has.
type recorder struct {
	http.ResponseWriter
	status int // 0: none yet
}

// WriteHeader notes the status.
func (r *recorder) WriteHeader(status int) {
	if status >= 200 && r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write notes that the status is 200 where none was written.
func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	return r.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController see what the recorder stands before.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

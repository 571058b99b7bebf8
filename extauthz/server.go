package extauthz

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// Config is what a Server works with.
type Config struct {
	// Pool decides. Required.
	Pool Pool

	// Resolve finds the tenant of a check: the first that names one wins, and
	// one that names something invalid refuses the check.
	Resolve []Resolver

	// Default is the tenant of a check that names none. Empty: it is refused.
	Default string

	// Peers say which proxies may name which tenants, by the ID of their
	// certificates. Empty: all may name all.
	Peers map[string][]string // :: pattern of an ID → patterns of tenants

	// Descriptors are those that tenants may name in their settings.
	Descriptors map[string]*Descriptors // :: file name, as in tenants.Needs → what it holds

	// Propagators are the ways in which checks, and the requests that they are
	// about, name their traces. Default: that of W3C.
	Propagators tenants.Propagators

	// MaxMessageBytes bounds a CheckRequest, compressed or not. Default 64 MiB.
	// The bound of the grpc.Server itself does not apply to checks.
	MaxMessageBytes int

	// MessageMemory bounds the messages that are being answered, in bytes
	// together. One that it has no room for is denied with 503 unread.
	// Default 512 MiB.
	MessageMemory int64

	// Logger gets panics as errors, and what was wrong with refused checks for
	// debugging. Default: none.
	Logger *slog.Logger

	// Refused counts a check that was denied without asking the pool: as
	// "invalid", "too_large", "busy", "no_tenant", "canceled" or "panic".
	// Optional.
	Refused func(outcome string)
}

// Pool is what a Server needs of tenants.Pool.
type Pool interface {
	// Decide asks a tenant's policy and calls answer once for each question,
	// before it returns. It returns an error, which may wrap ErrUnknown, where
	// it has no answers.
	Decide(ctx context.Context, id tenants.ID, questions []tenants.Question, answer func(i int, a tenants.Answer)) error
}

const (
	defaultMaxMessageBytes = 64 << 20
	defaultMessageMemory   = 512 << 20
)

// Server answers checks.
type Server struct {
	pool       Pool
	maxMessage int
	memory     memory
	log        *slog.Logger
	refused    func(string)

	propagators tenants.Propagators

	// routing is always replaced, never changed.
	routing atomic.Pointer[routing]
}

// routing is what a Server makes of those parts of its Config that can change.
type routing struct {
	router      *router
	descriptors map[string]*Descriptors
}

// memory bounds the messages that are being answered.
type memory struct {
	limit int64
	used  atomic.Int64
}

// reserve takes n bytes, or returns an error that wraps ErrBusy.
func (m *memory) reserve(n int64) error {
	if used := m.used.Add(n); used > m.limit {
		m.used.Add(-n)
		return fmt.Errorf("%w: messages of %d bytes are being answered, limit %d", tenants.ErrBusy, used-n, m.limit)
	}
	return nil
}

func (m *memory) release(n int64) { m.used.Add(-n) }

// MessageBytes is what messages that are being answered take at this moment.
func (s *Server) MessageBytes() int64 { return s.memory.used.Load() }

// New returns a Server, or an error that says what in its Config is wrong.
func New(c Config) (*Server, error) {
	s := &Server{
		pool:       c.Pool,
		maxMessage: c.MaxMessageBytes,
		memory:     memory{limit: c.MessageMemory},
		log:        c.Logger,
		refused:    c.Refused,

		propagators: c.Propagators,
	}
	if err := s.Reload(c); err != nil {
		return nil, err
	}
	if s.memory.limit <= 0 {
		s.memory.limit = defaultMessageMemory
	}
	if s.maxMessage <= 0 {
		s.maxMessage = defaultMaxMessageBytes
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.refused == nil {
		s.refused = func(string) {}
	}
	return s, nil
}

// Reload makes the Server find tenants by the Resolve, Default, Peers and
// Descriptors of c. On an error those that it has stay.
func (s *Server) Reload(c Config) error {
	router, err := newRouter(c.Resolve, c.Default, c.Peers)
	if err != nil {
		return err
	}
	s.routing.Store(&routing{router, c.Descriptors})
	return nil
}

// Register makes g serve envoy.service.auth.v3.Authorization.
//
// Check is registered with a handler that receives the message itself: a message
// that cannot be received is to be denied, and the handler of a unary call would
// never see it. Unary interceptors of g do not see checks.
func (s *Server) Register(g grpc.ServiceRegistrar) {
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: authv3.Authorization_ServiceDesc.ServiceName,
		HandlerType: authv3.Authorization_ServiceDesc.HandlerType,
		Streams:     []grpc.StreamDesc{{StreamName: "Check", Handler: serve}},
		Metadata:    authv3.Authorization_ServiceDesc.Metadata,
	}, s)
}

// serve handles one call of Check.
func serve(server any, stream grpc.ServerStream) (err error) {
	s := server.(*Server)
	defer func() { // a panic while sending cannot be answered, but it is not the end of the process
		if r := recover(); r != nil {
			s.logPanic(r)
			err = status.Error(codes.Internal, "internal error")
		}
	}()
	r, err := s.receiveAndCheck(stream)
	if err != nil {
		return err
	}
	return stream.SendMsg(&r)
}

func (s *Server) receiveAndCheck(stream grpc.ServerStream) (r reply, err error) {
	defer s.recoverTo(&r, &err)
	text, size, err := receive(stream, s.maxMessage, &s.memory)
	defer s.memory.release(size)
	if err != nil {
		return s.refuse(err, &tenants.Question{DecisionID: tenants.NewDecisionID()})
	}
	return s.check(stream.Context(), text)
}

// Check answers one check. An error is a gRPC status; there is one only for a
// fault of a tenant that wants its callers to see it.
func (s *Server) Check(ctx context.Context, req *authv3.CheckRequest) (*authv3.CheckResponse, error) {
	r, err := s.checkMessage(ctx, req)
	if err != nil {
		return nil, err
	}
	return r.response(), nil
}

func (s *Server) checkMessage(ctx context.Context, req *authv3.CheckRequest) (r reply, err error) {
	defer s.recoverTo(&r, &err)
	text, err := proto.Marshal(req)
	if err != nil {
		return s.refuse(fmt.Errorf("%w: %w", tenants.ErrInvalid, err), &tenants.Question{DecisionID: tenants.NewDecisionID()})
	}
	return s.check(ctx, string(text))
}

// check is one check as the question that it asks.
type check struct {
	asked
	descriptors map[string]*Descriptors
	question    [1]tenants.Question
	weight      int64 // of what is kept of it once it is answered, in bytes
	answer      tenants.Answer
	answered    bool
}

// check answers the check of a message.
func (s *Server) check(ctx context.Context, text string) (reply, error) {
	c := new(check)
	if err := c.decode(text); err != nil {
		return s.refuse(err, &tenants.Question{DecisionID: tenants.NewDecisionID()})
	}
	routing := s.routing.Load()
	id, err := routing.router.tenantOf(ctx, &c.asked)
	if err != nil {
		q := tenants.Question{DecisionID: tenants.NewDecisionID(), Trace: traceOf(ctx, &c.asked, s.propagators)}
		return s.refuse(err, &q)
	}
	c.descriptors, c.weight = routing.descriptors, sizeCheck+int64(len(text))
	c.question[0] = tenants.Question{
		DecisionID: tenants.NewDecisionID(),
		Entry:      entryOf(&c.asked),
		Input:      c,
		BodyBytes:  int64(c.http.bodySize()),
		Trace:      traceOf(ctx, &c.asked, s.propagators),
	}
	decisionID := c.question[0].DecisionID

	ctx, cancel := earlier(ctx, c.question[0].BodyBytes)
	defer cancel()
	err = s.pool.Decide(ctx, id, c.question[:], c.take)
	if err == nil && !c.answered {
		err = errors.New("no answer")
	}
	if err != nil {
		c.answer = tenants.Answer{Err: err}
	}
	if err := c.answer.Err; err != nil && s.log.Enabled(ctx, slog.LevelDebug) {
		s.log.DebugContext(ctx, "check has no decision", "tenant", id, c.question[0].Attrs(), "error", err)
	}
	r, err := replyOf(&c.answer, decisionID)
	c.answer = tenants.Answer{} // a decision log may keep the check
	return r, err
}

// A proxy's time runs while it sends, and ours only from when the call begins.
// Of the time that a large message leaves, sendTime is taken for each MiB.
const (
	largeMessage = 256 << 10 // bytes
	sendTime     = 8 * time.Millisecond
)

// earlier returns ctx with the deadline of a message with a body of that size.
func earlier(ctx context.Context, size int64) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok || size < largeMessage {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, deadline.Add(-time.Duration(size)*sendTime>>20))
}

// Input makes the input document, at any time and any number of times.
func (c *check) Input(needs tenants.Needs) (ast.Value, error) {
	return inputOf(&c.asked, c.question[0].DecisionID, needs, c.descriptors)
}

func (c *check) take(_ int, a tenants.Answer) { c.answer, c.answered = a, true }

// refuse denies a check that reaches no tenant. Of q it is what names it.
func (s *Server) refuse(err error, q *tenants.Question) (reply, error) {
	outcome := "canceled"
	switch {
	case errors.Is(err, tenants.ErrInvalid):
		outcome = "invalid"
	case errors.Is(err, tenants.ErrTooLarge):
		outcome = "too_large"
	case errors.Is(err, tenants.ErrBusy):
		outcome = "busy"
	case errors.Is(err, errTenant):
		outcome = "no_tenant"
	case errors.Is(err, tenants.ErrPanic):
		outcome = "panic"
	}
	s.refused(outcome)
	s.log.Debug("check refused", "outcome", outcome, q.Attrs(), "error", err)
	return replyOf(&tenants.Answer{Err: err}, q.DecisionID)
}

// recoverTo, deferred, makes a denial of a panic.
func (s *Server) recoverTo(r *reply, err *error) {
	if p := recover(); p != nil {
		q := tenants.Question{DecisionID: tenants.NewDecisionID()}
		s.logPanic(p, q.Attrs())
		*r, *err = s.refuse(tenants.ErrPanic, &q)
	}
}

func (s *Server) logPanic(r any, attrs ...any) {
	s.log.Error("panic in a check", append(attrs, "panic", fmt.Sprint(r), "stack", string(debug.Stack()))...)
}

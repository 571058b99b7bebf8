package extauthz

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/reflection"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

var _ Pool = (*tenants.Pool)(nil)

// poolFunc is a Pool that answers each question with one function.
type poolFunc func(ctx context.Context, id tenants.ID, q tenants.Question) (tenants.Answer, error)

func (f poolFunc) Decide(ctx context.Context, id tenants.ID, questions []tenants.Question, answer func(int, tenants.Answer)) error {
	for i, q := range questions {
		a, err := f(ctx, id, q)
		if err != nil {
			return err
		}
		answer(i, a)
	}
	return nil
}

// allowAll makes the input and allows.
var allowAll = poolFunc(func(_ context.Context, _ tenants.ID, q tenants.Question) (tenants.Answer, error) {
	_, err := q.Input.Input(everything)
	return tenants.Answer{Decision: policy.Decision{Allowed: err == nil}, Err: err}, nil
})

// site is a Server on loopback and what it counted and logged.
type site struct {
	*Server
	conn *grpc.ClientConn

	mu      sync.Mutex
	refused []string
	log     bytes.Buffer
}

func (s *site) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(p)
}

// newSite serves with a bound of 64 KiB for messages.
func newSite(t *testing.T, c Config) *site {
	t.Helper()
	s := &site{}
	c.MaxMessageBytes = 64 << 10
	if c.Resolve == nil {
		c.Resolve = []Resolver{{ContextExtension: "tenant"}}
	}
	c.Logger = slog.New(slog.NewJSONHandler(s, &slog.HandlerOptions{Level: slog.LevelDebug}))
	c.Refused = func(outcome string) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.refused = append(s.refused, outcome)
	}
	s.Server = newServer(t, c)

	g := grpc.NewServer(grpc.ForceServerCodecV2(Codec()), grpc.MaxRecvMsgSize(1024)) // the bound does not apply
	s.Register(g)
	reflection.Register(g)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(listener)
	t.Cleanup(g.Stop)
	s.conn, err = grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.conn.Close() })
	return s
}

// wire sends bytes as a message, whatever they are.
type wire struct{}

func (wire) Name() string { return "proto" }
func (wire) Marshal(v any) ([]byte, error) {
	if b, ok := v.([]byte); ok {
		return b, nil
	}
	return proto.Marshal(v.(proto.Message))
}
func (wire) Unmarshal(data []byte, v any) error { return proto.Unmarshal(data, v.(proto.Message)) }

// send sends bytes as a CheckRequest.
func (s *site) send(t *testing.T, message []byte, opts ...grpc.CallOption) *authv3.CheckResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	resp := new(authv3.CheckResponse)
	opts = append(opts, grpc.ForceCodec(wire{}))
	if err := s.conn.Invoke(ctx, authv3.Authorization_Check_FullMethodName, message, resp, opts...); err != nil {
		t.Fatalf("got RPC error %v", err)
	}
	return resp
}

func (s *site) counted(t *testing.T, want ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.refused, want) {
		t.Errorf("refused %v, want %v", s.refused, want)
	}
}

func checkDenied(t *testing.T, resp *authv3.CheckResponse, status string) {
	t.Helper()
	if got := responseJSON(t, resp); !reflect.DeepEqual(got, refusal(status)) {
		t.Errorf("got %v, want a denial with %s", got, status)
	}
}

func marshal(t *testing.T, req *authv3.CheckRequest) []byte {
	t.Helper()
	data, err := proto.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestCheck(t *testing.T) {
	var got tenants.Question
	var tenant tenants.ID
	var deadline bool
	s := newSite(t, Config{Pool: poolFunc(func(ctx context.Context, id tenants.ID, q tenants.Question) (tenants.Answer, error) {
		tenant, got = id, q
		_, deadline = ctx.Deadline()
		return tenants.Answer{Decision: policy.Decision{Allowed: true, Object: true, Headers: []policy.Header{{Name: "x", Value: "1"}}}}, nil
	})})
	req := benchmarkRequest()
	req.Attributes.ContextExtensions["path"] = "/other/allow"
	for _, opts := range [][]grpc.CallOption{nil, {grpc.UseCompressor(gzip.Name)}} {
		resp := s.send(t, marshal(t, req), opts...)
		id := resp.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue()
		if tenant != "orders" || got.Entry != "other/allow" || got.DecisionID != id || !deadline {
			t.Errorf("tenant %q, question %+v, decision ID %q, deadline %v", tenant, got, id, deadline)
		}
		if resp.Status.Code != 0 || len(resp.GetOkResponse().GetHeaders()) != 1 {
			t.Errorf("got %v", resp)
		}
	}
	s.counted(t)

	// The client that go-control-plane makes.
	resp, err := authv3.NewAuthorizationClient(s.conn).Check(t.Context(), req)
	if err != nil || resp.Status.Code != 0 {
		t.Errorf("got %v, %v", resp, err)
	}
}

// TestUnreceivable: what a client of Envoy sends makes no RPC error, which a
// failure mode of Envoy may let in.
func TestUnreceivable(t *testing.T) {
	large := withBody("text/plain", strings.Repeat("a", 65<<10))
	large.Attributes.ContextExtensions = map[string]string{"tenant": "orders"}
	huge := withBody("text/plain", strings.Repeat("a", 10<<20))
	invalid := bytes.Replace(marshal(t, withBody("text/plain", "valid")), []byte("valid"), []byte("\xff\xfe\xfd\xfc\xfb"), 1)
	for _, c := range []struct {
		name    string
		message []byte
		opts    []grpc.CallOption
		status  string
		outcome string
	}{
		{"over the bound", marshal(t, large), nil, "PayloadTooLarge", "too_large"},
		{"far over the bound", marshal(t, huge), nil, "PayloadTooLarge", "too_large"},
		{"over the bound when decompressed", marshal(t, huge), []grpc.CallOption{grpc.UseCompressor(gzip.Name)}, "PayloadTooLarge", "too_large"},
		{"garbage", []byte("\xff\xff\xff\xff"), nil, "BadRequest", "invalid"},
		{"truncated", marshal(t, benchmarkRequest())[:100], nil, "BadRequest", "invalid"},
		{"compressed garbage", []byte("\x0a\xff"), []grpc.CallOption{grpc.UseCompressor(gzip.Name)}, "BadRequest", "invalid"},
		{"not UTF-8", invalid, nil, "BadRequest", "invalid"},
		{"empty", nil, nil, "Forbidden", "no_tenant"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, Config{Pool: allowAll})
			checkDenied(t, s.send(t, c.message, c.opts...), c.status)
			s.counted(t, c.outcome)
			// The connection is still of use.
			if resp := s.send(t, marshal(t, benchmarkRequest())); resp.Status.Code != 0 {
				t.Errorf("then: got %v", resp)
			}
		})
	}
}

// TestBrokenStreams: frames that no client library would send.
func TestBrokenStreams(t *testing.T) {
	s := newSite(t, Config{Pool: allowAll})
	message := marshal(t, benchmarkRequest())
	desc := &grpc.StreamDesc{StreamName: "Check", ClientStreams: true}
	for _, messages := range [][][]byte{
		{},                 // no message
		{message, message}, // more than one
	} {
		stream, err := s.conn.NewStream(t.Context(), desc, authv3.Authorization_Check_FullMethodName, grpc.ForceCodec(wire{}))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range messages {
			if err := stream.SendMsg(m); err != nil {
				t.Fatal(err)
			}
		}
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		resp := new(authv3.CheckResponse)
		if err := stream.RecvMsg(resp); err != nil {
			t.Fatalf("%d messages: got RPC error %v", len(messages), err)
		}
		checkDenied(t, resp, "BadRequest")
	}
}

// TestBadRequests: what cannot be made into an input.
func TestBadRequests(t *testing.T) {
	s := newSite(t, Config{Pool: allowAll})
	tenant := func(req *authv3.CheckRequest) *authv3.CheckRequest {
		req.Attributes.ContextExtensions = map[string]string{"tenant": "orders"}
		return req
	}
	checkDenied(t, s.send(t, marshal(t, tenant(httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/secret%"})))), "BadRequest")
	checkDenied(t, s.send(t, marshal(t, tenant(withBody("application/json", "{secret")))), "BadRequest")
	s.counted(t) // the pool has seen them
	if s.mu.Lock(); !strings.Contains(s.log.String(), `invalid URL escape`) {
		t.Errorf("log has no cause: %s", s.log.String())
	}
	s.mu.Unlock()
}

func TestTenantRefused(t *testing.T) {
	s := newSite(t, Config{Pool: poolFunc(func(_ context.Context, id tenants.ID, _ tenants.Question) (tenants.Answer, error) {
		if id == "unknown" {
			return tenants.Answer{}, tenants.ErrUnknown
		}
		panic("asked for " + id)
	})})
	for _, extensions := range []string{`{}`, `{"tenant":""}`, `{"tenant":"No"}`, `{"tenant":"unknown"}`} {
		checkDenied(t, s.send(t, marshal(t, request(t, `{"attributes":{"contextExtensions":`+extensions+`}}`))), "Forbidden")
	}
	s.counted(t, "no_tenant", "no_tenant", "no_tenant") // the pool counts the unknown ones
}

// TestPanic: a panic is a denial, and the server lives on.
func TestPanic(t *testing.T) {
	s := newSite(t, Config{Pool: poolFunc(func(_ context.Context, id tenants.ID, q tenants.Question) (tenants.Answer, error) {
		if id == "bad" {
			panic("boom")
		}
		return allowAll(t.Context(), id, q)
	})})
	checkDenied(t, s.send(t, marshal(t, request(t, `{"attributes":{"contextExtensions":{"tenant":"bad"}}}`))), "InternalServerError")
	s.counted(t, "panic")
	if resp := s.send(t, marshal(t, benchmarkRequest())); resp.Status.Code != 0 {
		t.Errorf("then: got %v", resp)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var entry struct{ Level, Panic, Stack string }
	line, _, _ := strings.Cut(s.log.String(), "\n")
	if err := json.Unmarshal([]byte(line), &entry); err != nil {
		t.Fatal(err)
	}
	if entry.Level != "ERROR" || entry.Panic != "boom" || !strings.Contains(entry.Stack, "TestPanic") {
		t.Errorf("logged %s", line)
	}
}

// TestNoAnswer: a pool that says nothing has not allowed.
func TestNoAnswer(t *testing.T) {
	s := newServer(t, Config{Default: "orders", Pool: silentPool{}})
	resp, err := s.Check(t.Context(), benchmarkRequest())
	if err != nil {
		t.Fatal(err)
	}
	checkDenied(t, resp, "InternalServerError")
}

type silentPool struct{}

func (silentPool) Decide(context.Context, tenants.ID, []tenants.Question, func(int, tenants.Answer)) error {
	return nil
}

// TestEndedContext: it is the pool's to say that there is no time, and it is
// answered all the same.
func TestEndedContext(t *testing.T) {
	s := newServer(t, Config{Default: "orders", Pool: poolFunc(func(ctx context.Context, _ tenants.ID, _ tenants.Question) (tenants.Answer, error) {
		return tenants.Answer{Err: ctx.Err()}, nil
	})})
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	expired, cancel := context.WithTimeout(t.Context(), -time.Second)
	defer cancel()
	for _, ctx := range []context.Context{canceled, expired} {
		resp, err := s.Check(ctx, benchmarkRequest())
		if err != nil {
			t.Fatal(err)
		}
		checkDenied(t, resp, "ServiceUnavailable")
	}
}

// TestUpstream: the tenant's own wish is the one way to an RPC error.
func TestUpstream(t *testing.T) {
	s := newSite(t, Config{Pool: poolFunc(func(context.Context, tenants.ID, tenants.Question) (tenants.Answer, error) {
		return tenants.Answer{Err: tenants.ErrNotReady, OnError: tenants.OnErrorUpstream}, nil
	})})
	_, err := authv3.NewAuthorizationClient(s.conn).Check(t.Context(), benchmarkRequest())
	if status.Code(err) != codes.Unavailable || status.Convert(err).Message() != tenants.ErrNotReady.Error() {
		t.Errorf("got %v", err)
	}
}

// TestReflection: tools find the service as if it were registered the usual way.
func TestReflection(t *testing.T) {
	s := newSite(t, Config{Pool: allowAll})
	stream, err := reflectionv1.NewServerReflectionClient(s.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_FileContainingSymbol{
		FileContainingSymbol: "envoy.service.auth.v3.Authorization.Check",
	}})
	if err != nil {
		t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	files := resp.GetFileDescriptorResponse().GetFileDescriptorProto()
	if len(files) == 0 {
		t.Fatalf("got %v", resp)
	}
	file := new(descriptorpb.FileDescriptorProto)
	if err := proto.Unmarshal(files[0], file); err != nil || file.GetName() != "envoy/service/auth/v3/external_auth.proto" {
		t.Errorf("got %s, %v", protojson.Format(file), err)
	}
	g := grpc.NewServer()
	s.Register(g)
	want := []grpc.MethodInfo{{Name: "Check"}}
	if got := g.GetServiceInfo()["envoy.service.auth.v3.Authorization"]; !slices.Equal(got.Methods, want) || got.Metadata != "envoy/service/auth/v3/external_auth.proto" {
		t.Errorf("got %+v", got)
	}
}

// TestTransport: grpc-go offers what receive needs. Without it a message that
// cannot be received would be an RPC error.
func TestTransport(t *testing.T) {
	found := make(chan bool, 1)
	g := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		_, ok := grpc.ServerTransportStreamFromContext(stream.Context()).(transport)
		found <- ok
		return nil
	}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go g.Serve(listener)
	defer g.Stop()
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Invoke(t.Context(), "/any/Method", &authv3.CheckRequest{}, &authv3.CheckResponse{}) // its answer is no answer
	if !<-found {
		t.Error("the streams of this grpc-go do not offer what receive needs")
	}
}

func TestReceiveError(t *testing.T) {
	other := errors.New("other")
	if got := receiveError(other); got != other {
		t.Errorf("got %v", got)
	}
}

func BenchmarkCheck(b *testing.B) {
	s := newServer(b, Config{Pool: allowAll, Resolve: []Resolver{{ContextExtension: "tenant"}}})
	data, err := proto.Marshal(benchmarkRequest())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.check(b.Context(), textOf(mem.BufferSlice{mem.SliceBuffer(data)})); err != nil {
			b.Fatal(err)
		}
	}
}

// TestMessageMemory: messages that are being answered are bounded together.
func TestMessageMemory(t *testing.T) {
	hold, holding := make(chan struct{}), make(chan struct{})
	pool := poolFunc(func(_ context.Context, id tenants.ID, _ tenants.Question) (tenants.Answer, error) {
		if id == "slow" {
			holding <- struct{}{}
			<-hold
		}
		return tenants.Answer{Decision: policy.Decision{Allowed: true}}, nil
	})
	s := newSite(t, Config{Pool: pool, MessageMemory: 48 << 10})
	message := func(id string, size int) []byte {
		return marshal(t, &authv3.CheckRequest{Attributes: &authv3.AttributeContext{ContextExtensions: map[string]string{
			"tenant": id, "fill": strings.Repeat("x", size),
		}}})
	}
	done := make(chan *authv3.CheckResponse)
	go func() { done <- s.send(t, message("slow", 30<<10)) }()
	<-holding
	checkDenied(t, s.send(t, message("fast", 30<<10)), "ServiceUnavailable")
	if got := s.send(t, message("fast", 10<<10)); got.GetStatus().GetCode() != 0 {
		t.Errorf("one that there is room for: got %v", got)
	}
	close(hold)
	if got := <-done; got.GetStatus().GetCode() != 0 {
		t.Errorf("the one that took the room: got %v", got)
	}
	for range 3 {
		if got := s.send(t, message("fast", 30<<10)); got.GetStatus().GetCode() != 0 {
			t.Errorf("after it: got %v", got)
		}
	}
	s.counted(t, "busy")
	if got := s.memory.used.Load(); got != 0 {
		t.Errorf("%d bytes stay reserved", got)
	}
}

// TestReload: a Server finds tenants another way while it serves.
func TestReload(t *testing.T) {
	var asked []tenants.ID
	s := newSite(t, Config{Pool: poolFunc(func(_ context.Context, id tenants.ID, _ tenants.Question) (tenants.Answer, error) {
		asked = append(asked, id)
		return tenants.Answer{}, nil
	})})
	message := marshal(t, &authv3.CheckRequest{Attributes: &authv3.AttributeContext{ContextExtensions: map[string]string{"tenant": "a", "team": "b"}}})
	s.send(t, message)
	if err := s.Reload(Config{Resolve: []Resolver{{}}}); err == nil {
		t.Error("a resolver of no kind: got no error")
	}
	s.send(t, message)
	if err := s.Reload(Config{Resolve: []Resolver{{ContextExtension: "team"}}}); err != nil {
		t.Fatal(err)
	}
	s.send(t, message)
	if want := []tenants.ID{"a", "a", "b"}; !slices.Equal(asked, want) {
		t.Errorf("asked %v, want %v", asked, want)
	}
}

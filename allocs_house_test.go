//go:build !race

package gatehouse_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/extauthz"
	"github.com/gatehouse-authz/gatehouse/httpserve"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// benchCase is a policy of e2e/bench, and a check that it allows.
type benchCase struct {
	name    string
	rego    string
	data    map[string]any
	headers map[string]string // of the check, beside the usual ones
	path    string
}

const allocEntry = "envoy/authz/allow"

func benchCases(t *testing.T) []benchCase {
	t.Helper()
	cases := []benchCase{{name: "trivial", path: "/orders/42?expand=items"}, rolesCase(), jwtCase()}
	for i := range cases {
		text, err := os.ReadFile("e2e/bench/policies/" + cases[i].name + "/policy.rego")
		if err != nil {
			t.Fatal(err)
		}
		cases[i].rego = string(text)
	}
	return cases
}

func rolesCase() benchCase {
	roles, users := map[string]any{}, map[string]any{}
	for r := range 20 {
		var list []any
		for p := range 5 {
			list = append(list, map[string]any{"method": "GET", "path": fmt.Sprintf("/area-%d/*/item-%d/**", r, p)})
		}
		roles[fmt.Sprintf("role-%02d", r)] = list
	}
	for u := range 1000 {
		users[fmt.Sprintf("user-%04d", u)] = map[string]any{"roles": []any{fmt.Sprintf("role-%02d", u%20), fmt.Sprintf("role-%02d", (u+7)%20)}}
	}
	return benchCase{
		name: "roles", data: map[string]any{"users": users, "roles": roles},
		path: "/area-7/0/item-4/notes/1?expand=all", headers: map[string]string{"x-user": "user-0000"},
	}
}

func jwtCase() benchCase {
	const secret = "a secret of the benchmark, shared with nobody"
	encode := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	text := encode(`{"alg":"HS256","typ":"JWT"}`) + "." + encode(`{"iss":"https://login.example.com","sub":"user-0001","aud":"orders",`+
		`"exp":4000000000,"iat":1600000000,"scope":"read write","email":"user-0001@example.com"}`)
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return benchCase{
		name: "jwt", data: map[string]any{"secret": secret}, path: "/orders/42?expand=items",
		headers: map[string]string{"authorization": "Bearer " + text + "." + encode(string(mac.Sum(nil)))},
	}
}

// of is the case for one of its users, where it has some: what is remembered of one
// must not make all look cheap.
func (c benchCase) of(user int) *benchCase {
	if c.name == "roles" {
		c.path = fmt.Sprintf("/area-%d/%d/item-4/notes/1?expand=all", (user+7)%20, user)
		c.headers = map[string]string{"x-user": fmt.Sprintf("user-%04d", user)}
	}
	return &c
}

const allocUsers = 1000

// request is a check with 14 headers.
func (c *benchCase) request() *authv3.CheckRequest {
	headers := map[string]string{
		":authority": "shop.example.com", ":method": "GET", ":path": c.path, ":scheme": "https",
		"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "accept-encoding": "gzip, deflate, br",
		"accept-language": "en-GB,en;q=0.5", "cookie": "theme=dark; consent=1", "sec-fetch-mode": "navigate",
		"user-agent":      "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
		"x-forwarded-for": "203.0.113.7", "x-forwarded-proto": "https", "x-request-id": "5d1d1b6e-6d3c-4f8e-9f0c-1f9a7c1f7f11",
	}
	maps.Copy(headers, c.headers)
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		ContextExtensions: map[string]string{"tenant": "orders"},
		Request: &authv3.AttributeContext_Request{
			Time: &timestamppb.Timestamp{Seconds: 1_700_000_000},
			Http: &authv3.AttributeContext_HttpRequest{
				Id: "7382093487234987", Method: "GET", Path: c.path, Host: "shop.example.com", Scheme: "https", Protocol: "HTTP/1.1", Headers: headers,
			},
		},
	}}
}

// input is what the policy reads of that check.
func (c *benchCase) input() ast.Value {
	headers := map[string]any{}
	for k, v := range c.headers {
		headers[k] = v
	}
	return ast.MustInterfaceToValue(map[string]any{
		"attributes": map[string]any{"request": map[string]any{
			"http": map[string]any{"method": "GET", "path": c.path, "headers": headers},
			"time": map[string]any{"seconds": 1_700_000_000},
		}},
		"parsed_path": []any{"area-7", "0", "item-4", "notes", "1"},
	})
}

// batch is the body of a batch of different questions.
func (c *benchCase) batch(first, items int) []byte {
	inputs := map[string]any{}
	for u := first; u < first+items; u++ {
		inputs[fmt.Sprintf("item-%d", u)] = map[string]any{
			"attributes":  map[string]any{"request": map[string]any{"http": map[string]any{"method": "GET", "headers": map[string]any{"x-user": fmt.Sprintf("user-%04d", u)}}}},
			"parsed_path": []any{fmt.Sprintf("area-%d", (u+7)%20), fmt.Sprint(u), "item-4", "notes", "1"},
		}
	}
	text, err := json.Marshal(map[string]any{"inputs": inputs})
	if err != nil {
		panic(err) // of our own making
	}
	return text
}

func (c *benchCase) bundle() string {
	data, err := json.Marshal(c.data)
	if err != nil {
		panic(err) // of our own making
	}
	if c.data == nil {
		data = []byte("{}")
	}
	return "-- policy.rego --\n" + c.rego + "\n-- data.json --\n" + string(data) + "\n"
}

// evaluated is a compiled policy with what evaluating it takes.
type evaluated struct {
	*policy.Policy
	env   *policy.Env
	input ast.Value
}

func (c *benchCase) policy(t *testing.T, evaluator string) *evaluated {
	t.Helper()
	b, err := authztest.Bundle(c.bundle())
	if err != nil {
		t.Fatal(err)
	}
	part, err := policy.Prepare(b.Bundle)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile([]policy.Named{{Name: "policy", Part: part}},
		policy.Options{Entries: []string{allocEntry}, Evaluator: policy.Evaluator(evaluator)})
	if err != nil {
		t.Fatal(err)
	}
	return &evaluated{p, policy.NewEnv(nil), c.input()}
}

func (c *benchCase) eval(t *testing.T, p *evaluated) {
	if v, err := p.Eval(context.Background(), allocEntry, p.input, p.env, nil); err != nil || v != ast.Boolean(true) {
		t.Fatalf("%s: got %v, %v, want true", c.name, v, err)
	}
}

// house is a pool with one tenant, and the two that speak before it.
type house struct {
	pool    *tenants.Pool
	handler grpc.StreamDesc // of Check
	server  any
	http    *httpserve.Server
	logs    *decisionlog.Logs
	sink    taker
	input   made
	checks  [][]byte // messages, each with what gRPC puts before it
	next    int      // of them
}

func newHouse(t *testing.T, c benchCase, evaluator string, logged bool) *house {
	t.Helper()
	h := &house{sink: make(taker, 1), input: made{c.input()}}
	h.logs, _ = authztest.LogsWith(t, decisionlog.Config{Redact: true, Workers: 1})
	block := map[string]any{"plugins": map[string]any{"gatehouse_http": map[string]any{"data": []any{allocEntry}}}}
	template, _, err := control.Parse(block, control.Options{Dir: new(bundles.Dir)})
	if err != nil {
		t.Fatal(err)
	}
	offers, err := template.Tenant("orders")
	if err != nil {
		t.Fatal(err)
	}
	source := new(authztest.Memory)
	source.Set("orders", c.bundle())
	h.pool = authztest.Pool(t, tenants.Config{Logs: h.logs, Settings: authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) {
		s.Evaluator, s.HTTP = policy.Evaluator(evaluator), offers.HTTP
		s.Bundles[0].MinDelay, s.Bundles[0].MaxDelay = time.Hour, time.Hour
		if logged {
			s.Log = authztest.Logged()
			s.Log.Sinks = []decisionlog.Sink{decisionlog.NewService(decisionlog.ServiceConfig{
				HTTP: decisionlog.HTTPConfig{URL: "http://taker", Client: &http.Client{Transport: h.sink}},
			})}
			s.Log.Reporting = decisionlog.Reporting{
				Trigger: decisionlog.Immediate, MinDelay: time.Millisecond, MaxDelay: time.Millisecond, BufferBytes: 64 << 20, UploadBytes: 1 << 20,
			}
		}
	})})
	checks, err := extauthz.New(extauthz.Config{Pool: h.pool, Resolve: []extauthz.Resolver{{ContextExtension: "tenant"}}})
	if err != nil {
		t.Fatal(err)
	}
	checks.Register(h)
	if h.http, err = httpserve.New(httpserve.Config{Pool: h.pool, Local: true}); err != nil {
		t.Fatal(err)
	}
	for user := range allocUsers {
		message, err := proto.Marshal(c.of(user).request())
		if err != nil {
			t.Fatal(err)
		}
		h.checks = append(h.checks, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...))
	}
	for range allocUsers {
		answer := new(authv3.CheckResponse)
		if h.check(t, answer); answer.GetStatus().GetCode() != 0 || answer.GetDynamicMetadata() == nil {
			t.Fatalf("got %v, want it allowed", answer)
		}
	}
	return h
}

// RegisterService notes how Check is served.
func (h *house) RegisterService(desc *grpc.ServiceDesc, server any) {
	h.handler, h.server = desc.Streams[0], server
}

// check is a whole check, from the bytes of the request to those of the answer,
// which is read into answer unless that is nil.
func (h *house) check(t *testing.T, answer *authv3.CheckResponse) {
	s := &stream{message: h.checks[h.next], answer: answer}
	h.next = (h.next + 1) % len(h.checks)
	s.ctx = grpc.NewContextWithServerTransportStream(context.Background(), transport{s})
	if err := h.handler.Handler(h.server, s); err != nil {
		t.Fatal(err)
	}
}

// decide asks the pool with an input that is there.
func (h *house) decide(t *testing.T) {
	q := [1]tenants.Question{{DecisionID: "d", Input: h.input}}
	if err := h.pool.Decide(context.Background(), "orders", q[:], func(_ int, a tenants.Answer) {
		if a.Err != nil || !a.Decision.Allowed {
			t.Errorf("got %+v, want it allowed", a)
		}
	}); err != nil {
		t.Fatal(err)
	}
}

func (h *house) batch(t *testing.T, body []byte) {
	r := httptest.NewRequest("POST", "http://localhost/t/orders/v1/batch/data/"+allocEntry, bytes.NewReader(body))
	w := httptest.NewRecorder()
	h.http.ServeHTTP(w, r)
	if got, want := bytes.Count(w.Body.Bytes(), []byte(`"result":true`)), bytes.Count(body, []byte(`"item-`)); w.Code != http.StatusOK || got == 0 || got > want {
		t.Fatalf("got %d with %d answers, want 200: %.300s", w.Code, got, w.Body)
	}
}

// delivered returns once all decisions are.
func (h *house) delivered(t *testing.T) {
	timeout := time.After(30 * time.Second)
	for h.logs.Books().Buffered > 0 {
		select {
		case <-h.sink:
		case <-time.After(time.Millisecond): // what was taken is counted a moment later
		case <-timeout:
			t.Fatalf("decisions are not delivered: %+v", h.logs.Books())
		}
	}
	if b := h.logs.Books(); len(b.Dropped) > 0 || b.Recorded != b.Delivered {
		t.Fatalf("got %+v, want all delivered", b)
	}
}

// made is an input that is made already.
type made struct{ v ast.Value }

func (m made) Input(tenants.Needs) (ast.Value, error) { return m.v, nil }

// taker is a service of decision logs without a network. It says when it was sent
// something.
type taker chan struct{}

func (k taker) RoundTrip(r *http.Request) (*http.Response, error) {
	_, _ = io.Copy(io.Discard, r.Body)
	select {
	case k <- struct{}{}:
	default:
	}
	return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody, Request: r}, nil
}

// stream is a call of Check without a network.
type stream struct {
	grpc.ServerStream
	ctx     context.Context
	message []byte                // what was not read yet
	answer  *authv3.CheckResponse // is read into this; nil: nobody asks for it
}

func (s *stream) Context() context.Context { return s.ctx }

// SendMsg encodes the answer, as grpc-go does.
func (s *stream) SendMsg(m any) error {
	out, err := extauthz.Codec().Marshal(m)
	if err != nil {
		return err
	}
	defer out.Free()
	if s.answer == nil {
		return nil
	}
	return proto.Unmarshal(out.Materialize(), s.answer)
}

// transport is what grpc-go offers below a stream.
type transport struct{ *stream }

func (transport) Method() string               { return authv3.Authorization_Check_FullMethodName }
func (transport) SetHeader(metadata.MD) error  { return nil }
func (transport) SendHeader(metadata.MD) error { return nil }
func (transport) SetTrailer(metadata.MD) error { return nil }
func (transport) RecvCompress() string         { return "" }

func (t transport) ReadMessageHeader(b []byte) error {
	if len(t.message) == 0 {
		return io.EOF
	}
	t.message = t.message[copy(b, t.message):]
	return nil
}

func (t transport) Read(n int) (mem.BufferSlice, error) {
	b := t.message[:n]
	t.message = t.message[n:]
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

package extauthz

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

const someID = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"

// rendered is an answer as JSON, without the decision ID, which is checked.
func rendered(t *testing.T, a tenants.Answer) map[string]any {
	t.Helper()
	resp, err := responseOf(&a, someID)
	if err != nil {
		t.Fatal(err)
	}
	if id := resp.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue(); id != someID {
		t.Errorf("got decision ID %q", id)
	}
	if _, err := proto.Marshal(resp); err != nil {
		t.Error(err)
	}
	return responseJSON(t, proto.CloneOf(resp))
}

func checkRendered(t *testing.T, a tenants.Answer, want string) {
	t.Helper()
	if got := rendered(t, a); !reflect.DeepEqual(got, response(t, []byte(want))) {
		t.Errorf("%+v:\ngot  %v\nwant %v", a, got, want)
	}
}

// TestAppendFlags: a value of the policy takes the place of what the client
// sent, and a list keeps all its values.
func TestAppendFlags(t *testing.T) {
	headers := []policy.Header{{Name: "x-user", Value: "a"}, {Name: "x-user", Value: "b"}, {Name: "y", Value: "1"}, {Name: "X-User", Value: "c"}}
	checkRendered(t, tenants.Answer{Decision: policy.Decision{
		Allowed: true, Object: true, Headers: headers, ResponseHeaders: headers[:2],
	}}, `{"status":{}, "dynamicMetadata":{}, "okResponse":{
		"headers": [{"header":{"key":"x-user","value":"a"},"append":false}, {"header":{"key":"x-user","value":"b"},"append":true},
			{"header":{"key":"y","value":"1"},"append":false}, {"header":{"key":"X-User","value":"c"},"append":true}],
		"responseHeadersToAdd": [{"header":{"key":"x-user","value":"a"}}, {"header":{"key":"x-user","value":"b"}}]}}`)
	checkRendered(t, tenants.Answer{Decision: policy.Decision{Object: true, Headers: headers[:2], Status: 401, Body: "no"}},
		`{"status":{"code":7}, "dynamicMetadata":{}, "deniedResponse":{"status":{"code":"Unauthorized"}, "body":"no",
		"headers": [{"header":{"key":"x-user","value":"a"}}, {"header":{"key":"x-user","value":"b"}}]}}`)
}

func TestMetadata(t *testing.T) {
	metadata := ast.MustParseTerm(`{"decision_id": "mine", "set": {3, 1, 2}, "nested": {"l": [null, {"x": true}]},
		1: "number", ["<", 2]: "array", null: "null", "big": 12345678901234567890}`).Value.(ast.Object)
	checkRendered(t, tenants.Answer{Decision: policy.Decision{Allowed: true, Metadata: metadata}},
		`{"status":{}, "dynamicMetadata":{"set":[1,2,3], "nested":{"l":[null,{"x":true}]},
		"1":"number", "[\"\\u003c\",2]":"array", "null":"null", "big":12345678901234567890}}`)
}

// TestUnsendable: what protobuf would refuse is an ill-typed result, not an RPC
// error.
func TestUnsendable(t *testing.T) {
	bad := "\xff"
	object := func(k, v ast.Value) ast.Object {
		return ast.NewObject(ast.Item(ast.StringTerm("l"), ast.ArrayTerm(ast.ObjectTerm(ast.Item(ast.NewTerm(k), ast.NewTerm(v))))))
	}
	for i, d := range []policy.Decision{
		{Metadata: object(ast.String("k"), ast.String(bad))}, {Metadata: object(ast.String(bad), ast.Null{})},
		{Metadata: object(ast.String("k"), ast.Number("1e400"))},
		{Metadata: object(ast.String("k"), ast.NewSet(ast.StringTerm(bad)))},
	} {
		d.Allowed, d.Object = i%2 == 0, true
		checkRendered(t, tenants.Answer{Decision: d, DryRun: true}, `{"status":{"code":7}, "deniedResponse":{"status":{"code":"Forbidden"}}, "dynamicMetadata":{}}`)
		if _, err := responseOf(&tenants.Answer{Decision: d, OnError: tenants.OnErrorUpstream}, someID); status.Code(err) != codes.Unknown {
			t.Errorf("%+v: got %v, want UNKNOWN", d, err)
		}
	}
}

// TestDryRun: it softens decisions, never faults.
func TestDryRun(t *testing.T) {
	metadata := ast.MustParseTerm(`{"a": 1}`).Value.(ast.Object)
	for _, d := range []policy.Decision{{Metadata: metadata}, {Object: true, Status: 401, Metadata: metadata}} {
		checkRendered(t, tenants.Answer{Decision: d, DryRun: true}, `{"status":{}, "okResponse":{}, "dynamicMetadata":{"a":1}}`)
	}
	checkRendered(t, tenants.Answer{Decision: policy.Decision{Allowed: true}, DryRun: true}, `{"status":{}, "dynamicMetadata":{}}`)
	checkRendered(t, tenants.Answer{Err: policy.ErrUndefined, DryRun: true},
		`{"status":{"code":7}, "deniedResponse":{"status":{"code":"Forbidden"}}, "dynamicMetadata":{}}`)
}

func TestFailures(t *testing.T) {
	for _, c := range []struct {
		err    error
		status string
		code   codes.Code
	}{
		{tenants.ErrInvalid, "BadRequest", codes.InvalidArgument},
		{tenants.ErrTooLarge, "PayloadTooLarge", codes.ResourceExhausted},
		{errTenant, "Forbidden", codes.PermissionDenied},
		{tenants.ErrUnknown, "Forbidden", codes.PermissionDenied},
		{tenants.ErrEntry, "Forbidden", codes.PermissionDenied},
		{policy.ErrUndefined, "Forbidden", codes.Unknown},
		{policy.ErrConflict, "Forbidden", codes.Unknown},
		{policy.ErrResult, "Forbidden", codes.Unknown},
		{policy.ErrEval, "InternalServerError", codes.Unknown},
		{policy.ErrEntry, "InternalServerError", codes.Unknown},
		{tenants.ErrPanic, "InternalServerError", codes.Unknown},
		{errors.New("anything else"), "InternalServerError", codes.Unknown},
		{tenants.ErrNotReady, "ServiceUnavailable", codes.Unavailable},
		{tenants.ErrBusy, "ServiceUnavailable", codes.Unavailable},
		{tenants.ErrDeadline, "ServiceUnavailable", codes.DeadlineExceeded},
		{context.DeadlineExceeded, "ServiceUnavailable", codes.DeadlineExceeded},
		{policy.ErrCanceled, "ServiceUnavailable", codes.Canceled},
		{context.Canceled, "ServiceUnavailable", codes.Canceled},
	} {
		err := fmt.Errorf("secret: %w", c.err)
		checkRendered(t, tenants.Answer{Err: err}, `{"status":{"code":7}, "deniedResponse":{"status":{"code":"`+c.status+`"}}, "dynamicMetadata":{}}`)
		checkRendered(t, tenants.Answer{Err: err, OnError: tenants.OnErrorAllow}, `{"status":{}, "okResponse":{}, "dynamicMetadata":{}}`)
		resp, got := responseOf(&tenants.Answer{Err: err, OnError: tenants.OnErrorUpstream}, someID)
		if resp != nil || status.Code(got) != c.code || status.Convert(got).Message() != err.Error() {
			t.Errorf("%v: got %v, %v, want %v", c.err, resp, got, c.code)
		}
	}
}

func TestNewDecisionID(t *testing.T) {
	seen := map[string]bool{}
	for range 1000 {
		id := tenants.NewDecisionID()
		if len(id) != 36 || id[14] != '4' || id[8] != '-' || id[13] != '-' || id[18] != '-' || id[23] != '-' || seen[id] {
			t.Fatalf("got %q", id)
		}
		if v := id[19]; v != '8' && v != '9' && v != 'a' && v != 'b' {
			t.Fatalf("got variant %q in %q", v, id)
		}
		seen[id] = true
	}
}

func FuzzResponse(f *testing.F) {
	for _, text := range []string{
		`true`, `{"allowed":true,"headers":{"x":["1","2"]},"dynamic_metadata":{"a":[1,null]}}`,
		`{"allowed":false,"http_status":401,"body":"no","headers":[{"a":"b"}]}`, `{"allowed":true,"query_parameters_to_set":{"a":"1"}}`, "null",
	} {
		f.Add(text, false)
	}
	pool := newPolicyPool(f, "package envoy.authz\n\nallow := input.decision\n")
	f.Fuzz(func(t *testing.T, text string, dryRun bool) {
		v, err := policy.ParseJSON(text, nil)
		if err != nil {
			return
		}
		a := tenants.Answer{DryRun: dryRun}
		input := ast.NewObject(ast.Item(ast.StringTerm("decision"), ast.NewTerm(v)))
		a.Decision, a.Err = pool.policy.Decide(t.Context(), entry, input, nil, nil)
		resp, err := responseOf(&a, someID)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := proto.Marshal(resp); err != nil {
			t.Fatal(err)
		}
		if allowed := resp.Status.Code == 0; allowed != (a.Err == nil && (a.Decision.Allowed || dryRun)) {
			// A result may yet be one that no response can carry.
			if allowed || decidedOK(&a.Decision) {
				t.Fatalf("%s: got %v", text, resp)
			}
		}
	})
}

// TestReply: what a reply sends is what responseOf gives.
func TestReply(t *testing.T) {
	plain := 0
	for _, err := range append([]error{nil, errors.New("other")}, faults()...) {
		for n := range 64 {
			flag := func(bit int) bool { return n>>bit&1 == 1 }
			a := tenants.Answer{Err: err, DryRun: flag(0), OnError: tenants.OnError(n % 3)}
			if err == nil {
				a.Decision = policy.Decision{Allowed: flag(1), Object: flag(2)}
				if flag(3) {
					a.Decision.Metadata = ast.NewObject(ast.Item(ast.StringTerm("k"), ast.StringTerm("v")))
				}
			}
			if flag(4) {
				a.Naming = &tenants.Naming{Header: "x-decision", Client: flag(5), Upstream: true}
			}
			const id = "6ba7b810-9dad-41d1-80b4-00c04fd430c8"
			want, wantErr := responseOf(&a, id)
			if a.Naming.On() {
				name(want, a.Naming, id)
			}
			r, err := replyOf(&a, id)
			if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
				t.Fatalf("%+v: got %v, want %v", a, err, wantErr)
			}
			if err != nil {
				continue
			}
			for _, c := range []encoding.CodecV2{Codec(), encoding.GetCodecV2("proto")} {
				sent, err := c.Marshal(&r)
				if err != nil {
					t.Fatal(err)
				}
				got := new(authv3.CheckResponse)
				if err := c.Unmarshal(sent, got); err != nil || !proto.Equal(got, want) {
					t.Fatalf("%+v: got %v, %v, want %v", a, got, err, want)
				}
			}
			if r.plain != nil {
				plain++
			}
		}
	}
	if plain < 100 {
		t.Errorf("%d replies were plain", plain)
	}
	if r, err := replyOf(&tenants.Answer{}, strings.Repeat("x", 500)); err != nil || r.plain != nil {
		t.Errorf("a long ID: got %v, %v", r, err)
	}
	// Anything else is sent as by protobuf.
	sent, err := Codec().Marshal(benchmarkRequest())
	if err != nil || sent.Len() != proto.Size(benchmarkRequest()) {
		t.Errorf("got %d bytes, %v", sent.Len(), err)
	}
}

func faults() (all []error) {
	for _, f := range failures {
		all = append(all, f.err, fmt.Errorf("wrapped: %w", f.err))
	}
	return all
}

func decidedOK(d *policy.Decision) bool {
	_, err := decided(d, someID)
	return err == nil
}

func BenchmarkResponse(b *testing.B) {
	for name, d := range map[string]policy.Decision{
		"boolean": {Allowed: true},
		"headers": {Allowed: true, Object: true, Headers: []policy.Header{{Name: "x-user", Value: "ada"}, {Name: "x-roles", Value: "a"}, {Name: "x-roles", Value: "b"}}},
		"denied":  {Object: true, Status: 403, Body: "no"},
	} {
		b.Run(name, func(b *testing.B) {
			a := tenants.Answer{Decision: d}
			b.ReportAllocs()
			for b.Loop() {
				resp, err := responseOf(&a, someID)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := proto.Marshal(resp); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

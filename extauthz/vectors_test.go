package extauthz

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/bundle"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// recorded is testdata/opa-envoy-plugin.json: what opa-envoy-plugin answers.
type recorded struct {
	Policies map[string]string `json:"policies"` // :: config → its policy
	Cases    []recordedCase    `json:"cases"`
}

type recordedCase struct {
	Group     string          `json:"group"`
	Name      string          `json:"name"`
	Config    string          `json:"config"`
	Request   json.RawMessage `json:"request"`
	InputJSON string          `json:"input_json"`
	Response  json.RawMessage `json:"response"`
}

// The differences to opa-envoy-plugin that recorded cases meet, and which cases
// those are. That a fault and a request that cannot be parsed are answered by a
// denial that says nothing is checked for all such cases.
var (
	// A result that opa-envoy-plugin refuses is a decision.
	moreStatuses = map[string]string{ // :: case → the response
		"deny 418": `{"status":{"code":7},"deniedResponse":{"status":{"code":418}},"dynamicMetadata":{}}`,
		"deny 451": `{"status":{"code":7},"deniedResponse":{"status":{"code":451}},"dynamicMetadata":{}}`,
	}
	// A request that opa-envoy-plugin takes is refused.
	refusedPaths = map[string]bool{
		"path '/%00'": true,
	}
	// The input differs.
	inputs = map[string]string{ // :: case → the input
		// JSON content types
		"problem+json": `{"attributes":{"request":{"http":{"body":"{\"a\":1}","headers":{"content-type":"application/problem+json"}}}},"parsed_body":{"a":1},"parsed_path":[""],"parsed_query":{},"truncated_body":false,"version":{"encoding":"protojson","ext_authz":"v3"}}`,
		// headers from the header map
		"json in header_map": `{"attributes":{"request":{"http":{"body":"{}","headers":{"content-type":"application/json"},"headerMap":{"headers":[{"key":"content-type","rawValue":"YXBwbGljYXRpb24vanNvbg=="}]}}}},"parsed_body":{},"parsed_path":[""],"parsed_query":{},"truncated_body":false,"version":{"encoding":"protojson","ext_authz":"v3"}}`,
		"misc-95":            `{"attributes":{"request":{"http":{"headers":{"content-type":"application/json"},"headerMap":{"headers":[{"key":"content-type","rawValue":"YXBwbGljYXRpb24vanNvbg=="}]}}}},"parsed_body":null,"parsed_path":[""],"parsed_query":{},"truncated_body":false,"version":{"encoding":"protojson","ext_authz":"v3"}}`,
	}
	// The headers of an allowing decision carry append flags.
	appendFlags = map[string]string{ // :: case → the headers
		"ok headers":             `[{"header":{"key":"x","value":"1"},"append":false}]`,
		"ok headers arr val":     `[{"header":{"key":"x","value":"1"},"append":false},{"header":{"key":"x","value":"2"},"append":true}]`,
		"ok headers list of obj": `[{"header":{"key":"x","value":"1"},"append":false},{"header":{"key":"x","value":"2"},"append":true},{"header":{"key":"y","value":"3"},"append":false}]`,
		"headers upper":          `[{"header":{"key":"X-Foo","value":"1"},"append":false}]`,
		"headers empty val":      `[{"header":{"value":"v"},"append":false},{"header":{"key":"x"},"append":false}]`,
		"set types":              `[{"header":{"key":"x","value":"a"},"append":false},{"header":{"key":"x","value":"b"},"append":true}]`,
	}
)

// recordedRequests are the requests of testdata/opa-envoy-plugin.json.
func recordedRequests(t testing.TB) (requests []*authv3.CheckRequest) {
	t.Helper()
	data, err := os.ReadFile("testdata/opa-envoy-plugin.json")
	if err != nil {
		t.Fatal(err)
	}
	var r recorded
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Cases {
		requests = append(requests, request(t, string(c.Request)))
	}
	return requests
}

// TestRecorded answers what opa-envoy-plugin has answered, with the same policies.
func TestRecorded(t *testing.T) {
	data, err := os.ReadFile("testdata/opa-envoy-plugin.json")
	if err != nil {
		t.Fatal(err)
	}
	var r recorded
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	descriptors := exampleDescriptors(t)
	pools := map[string]*policyPool{}
	for config, source := range r.Policies {
		pool := newPolicyPool(t, source)
		switch config {
		case "decision+dry-run":
			pool.dryRun = true
		case "proto-descriptor":
			pool.needs.ProtoDescriptor = exampleFile
		case "skip-body":
			pool.needs.SkipBody = true
		}
		pools[config] = pool
	}
	for _, c := range r.Cases {
		t.Run(c.Config+"/"+c.Group+"/"+c.Name, func(t *testing.T) {
			pool := *pools[c.Config]
			req := new(authv3.CheckRequest)
			if err := protojson.Unmarshal(c.Request, req); err != nil {
				t.Fatal(err)
			}
			s := newServer(t, Config{Pool: &pool, Default: "orders", Descriptors: descriptors})
			got, err := s.Check(t.Context(), req)
			if err != nil {
				t.Fatalf("got RPC error %v", err)
			}
			want := response(t, c.Response)
			input := takeInput(t, got)
			answer := responseJSON(t, got)

			if text, ok := moreStatuses[c.Name]; ok {
				want = response(t, []byte(text))
			}
			if refusedPaths[c.Name] {
				want, c.InputJSON = refusal("BadRequest"), ""
			}
			if code, ok := want["GRPC_ERROR"]; ok {
				checkUpstream(t, pool, req, code.(string), want["details"].(string))
				want = refusal("Forbidden")
			}
			if denied, ok := want["deniedResponse"].(map[string]any); ok && want["dynamicMetadata"] == nil {
				want = refusal(denied["status"].(map[string]any)["code"])
			}
			if text, ok := appendFlags[c.Name]; ok && want["okResponse"] != nil {
				var headers any
				if err := json.Unmarshal([]byte(text), &headers); err != nil {
					t.Fatal(err)
				}
				want["okResponse"].(map[string]any)["headers"] = headers
			}
			if !reflect.DeepEqual(answer, want) {
				t.Errorf("got response  %v\nwant response %v", answer, want)
			}
			if text, ok := inputs[c.Name]; ok {
				c.InputJSON = text
			}
			if c.InputJSON == "" {
				if input != nil {
					t.Errorf("got input %v, want none", input)
				}
				return
			}
			if want := object(t, []byte(c.InputJSON)); !reflect.DeepEqual(input, want) {
				t.Errorf("got input  %v\nwant input %v", input, want)
			}
		})
	}
}

// checkUpstream checks that a fault is opa-envoy-plugin's RPC error for a tenant
// that wants it.
func checkUpstream(t *testing.T, pool policyPool, req *authv3.CheckRequest, code, details string) {
	t.Helper()
	pool.onError = tenants.OnErrorUpstream
	s := newServer(t, Config{Pool: &pool, Default: "orders"})
	resp, err := s.Check(t.Context(), req)
	if resp != nil || status.Code(err) != codes.Unknown || code != "UNKNOWN" {
		t.Fatalf("upstream: got %v, %v, want %s", resp, err, code)
	}
	if got := status.Convert(err).Message(); got != details {
		t.Errorf("upstream: got %q, want %q", got, details)
	}
}

// refusal is an explicit denial that says nothing.
func refusal(code any) map[string]any {
	return map[string]any{
		"status":          map[string]any{"code": 7.0},
		"deniedResponse":  map[string]any{"status": map[string]any{"code": code}},
		"dynamicMetadata": map[string]any{},
	}
}

// takeInput takes the input out of a response that has it in its metadata, and
// the decision ID out of the input, with parents that were made for it.
func takeInput(t *testing.T, resp *authv3.CheckResponse) map[string]any {
	t.Helper()
	fields := resp.GetDynamicMetadata().GetFields()
	text, ok := fields["input"]
	if !ok {
		return nil
	}
	delete(fields, "input")
	input := object(t, []byte(text.GetStringValue()))

	// attributes.metadataContext.filterMetadata.open_policy_agent.decision_id
	path := []string{"attributes", "metadataContext", "filterMetadata", "open_policy_agent", "decision_id"}
	parents := []map[string]any{input}
	for _, name := range path[:4] {
		parent, _ := parents[len(parents)-1][name].(map[string]any)
		if parent == nil {
			t.Fatalf("no %s in %v", name, parents[len(parents)-1])
		}
		parents = append(parents, parent)
	}
	if id := fields["decision_id"].GetStringValue(); parents[4]["decision_id"] != id {
		t.Fatalf("decision ID is %v in the input, %v in the response", parents[4]["decision_id"], id)
	}
	for i := len(path) - 1; i >= 0; i-- {
		delete(parents[i], path[i])
		if len(parents[i]) > 0 || i <= 1 { // requests have attributes
			break
		}
	}
	return input
}

// responseJSON returns a response as JSON, without the decision ID that it must
// have.
func responseJSON(t *testing.T, resp *authv3.CheckResponse) map[string]any {
	t.Helper()
	id := resp.GetDynamicMetadata().GetFields()["decision_id"].GetStringValue()
	if len(id) != 36 {
		t.Errorf("got decision ID %q", id)
	}
	delete(resp.DynamicMetadata.Fields, "decision_id")
	text, err := protojson.Marshal(resp)
	if err != nil {
		t.Fatal(err)
	}
	return response(t, text)
}

// response parses a CheckResponse as JSON.
func response(t testing.TB, text []byte) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(text, &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

// object parses an input document as JSON: the text of its numbers counts.
func object(t testing.TB, text []byte) map[string]any {
	t.Helper()
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v map[string]any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}

// policyPool answers for every tenant with one policy.
type policyPool struct {
	policy  *policy.Policy
	needs   tenants.Needs
	onError tenants.OnError
	dryRun  bool
}

const entry = "envoy/authz/allow"

func newPolicyPool(t testing.TB, source string) *policyPool {
	t.Helper()
	b := &bundle.Bundle{Data: map[string]any{}, Modules: []bundle.ModuleFile{{
		Path:   "policy.rego",
		Raw:    []byte(source),
		Parsed: ast.MustParseModule(source),
	}}}
	part, err := policy.Prepare(b)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Compile([]policy.Named{{Name: "test", Part: part}}, policy.Options{Entries: []string{entry}})
	if err != nil {
		t.Fatal(err)
	}
	return &policyPool{policy: p, needs: tenants.Needs{All: true, BodyBytes: 1 << 20}}
}

func (p *policyPool) Decide(ctx context.Context, _ tenants.ID, questions []tenants.Question, answer func(int, tenants.Answer)) error {
	for i, q := range questions {
		a := tenants.Answer{OnError: p.onError, DryRun: p.dryRun}
		input, err := q.Input.Input(p.needs)
		if err == nil {
			a.Decision, err = p.policy.Decide(ctx, entry, input, nil, nil)
		}
		if errors.Is(err, tenants.ErrInvalid) || errors.Is(err, tenants.ErrTooLarge) {
			a.OnError = tenants.OnErrorDeny
		}
		a.Err = err
		answer(i, a)
	}
	return nil
}

func newServer(t testing.TB, c Config) *Server {
	t.Helper()
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

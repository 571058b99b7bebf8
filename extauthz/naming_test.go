package extauthz

import (
	"reflect"
	"testing"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"
	"google.golang.org/protobuf/proto"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// A header names the decision where the tenant says so, and nothing that a client
// or a policy says takes its place. Responses that others share stay as they are.
func TestNaming(t *testing.T) {
	const on = `{"header":{"key":"x-id","value":"` + someID + `"},"append":false}`
	object := policy.Decision{
		Object: true, Allowed: true,
		Headers:         []policy.Header{{Name: "X-Id", Value: "forged"}, {Name: "x-user", Value: "a"}},
		RemoveHeaders:   []string{"x-id", "x-old"},
		ResponseHeaders: []policy.Header{{Name: "x-id", Value: "forged"}},
	}
	denied := object
	denied.Allowed, denied.Status, denied.Body = false, 401, "no"
	for _, c := range []struct {
		name             string
		upstream, client bool
		answer           tenants.Answer
		want             string
	}{
		{"a boolean, towards the backend", true, false, tenants.Answer{Decision: policy.Decision{Allowed: true}},
			`{"status":{}, "dynamicMetadata":{}, "okResponse":{"headers":[` + on + `]}}`},
		{"a boolean, towards the client", false, true, tenants.Answer{Decision: policy.Decision{Allowed: true}},
			`{"status":{}, "dynamicMetadata":{}, "okResponse":{"headersToRemove":["x-id"], "responseHeadersToAdd":[` + on + `]}}`},
		{"an object, both", true, true, tenants.Answer{Decision: object},
			`{"status":{}, "dynamicMetadata":{}, "okResponse":{"headers":[{"header":{"key":"x-user","value":"a"},"append":false},` + on + `],
			"headersToRemove":["x-old"], "responseHeadersToAdd":[` + on + `]}}`},
		{"a denial by a boolean", true, true, tenants.Answer{},
			`{"status":{"code":7}, "dynamicMetadata":{}, "deniedResponse":{"status":{"code":"Forbidden"}, "headers":[` + on + `]}}`},
		{"a denial, not towards the client", true, false, tenants.Answer{}, `{"status":{"code":7}, "dynamicMetadata":{}}`},
		{"a denial by an object", false, true, tenants.Answer{Decision: denied},
			`{"status":{"code":7}, "dynamicMetadata":{}, "deniedResponse":{"status":{"code":"Unauthorized"}, "body":"no",
			"headers":[{"header":{"key":"x-user","value":"a"}},` + on + `]}}`},
		{"a fault", false, true, tenants.Answer{Err: tenants.ErrBusy},
			`{"status":{"code":7}, "dynamicMetadata":{}, "deniedResponse":{"status":{"code":"ServiceUnavailable"}, "headers":[` + on + `]}}`},
		{"a fault that allows", true, false, tenants.Answer{Err: tenants.ErrBusy, OnError: tenants.OnErrorAllow},
			`{"status":{}, "dynamicMetadata":{}, "okResponse":{"headers":[` + on + `]}}`},
		{"a dry run", true, true, tenants.Answer{Decision: denied, DryRun: true},
			`{"status":{}, "dynamicMetadata":{}, "okResponse":{"headers":[` + on + `], "responseHeadersToAdd":[` + on + `]}}`},
	} {
		resp, err := responseOf(&c.answer, someID)
		if err != nil {
			t.Fatal(err)
		}
		name(resp, &tenants.Naming{Header: "x-id", Upstream: c.upstream, Client: c.client}, someID)
		if got, want := responseJSON(t, proto.CloneOf(resp)), response(t, []byte(c.want)); !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %v\nwant %v", c.name, got, want)
		}
	}
	name(nil, &tenants.Naming{Header: "x-id", Upstream: true}, "D") // an RPC error has no headers
	if !proto.Equal(emptyOK.OkResponse, &authv3.OkHttpResponse{}) {
		t.Errorf("what responses share was changed: %v", emptyOK)
	}
}

package extauthz

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/encoding/protojson"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// The logged input of a check is what its policy saw: given to the policy again as
// it stands, the result is the same.
func TestReplay(t *testing.T) {
	const text = "package envoy.authz\nallow := {\"allowed\": count(input.parsed_path) > 1, \"saw\": json.marshal(input)}"
	data, err := os.ReadFile("testdata/opa-envoy-plugin.json")
	if err != nil {
		t.Fatal(err)
	}
	var r recorded
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	logs, console := authztest.Logs(t)
	bundles := &authztest.Memory{}
	bundles.Set("orders", text)
	pool := authztest.Pool(t, tenants.Config{Logs: logs, Settings: authztest.Settings(bundles, func(_ tenants.ID, s *tenants.Settings) {
		s.Log, s.ProtoDescriptor = authztest.Logged(), exampleFile
	})})
	s := newServer(t, Config{Pool: pool, Default: "orders", Descriptors: exampleDescriptors(t)})
	for _, c := range r.Cases {
		req := new(authv3.CheckRequest)
		if err := protojson.Unmarshal(c.Request, req); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Check(t.Context(), req); err != nil {
			t.Fatalf("%s/%s: %v", c.Group, c.Name, err)
		}
	}

	p := authztest.Policy(t, text)
	lines := console.Lines(len(r.Cases))
	if len(lines) != len(r.Cases) {
		t.Fatalf("got %d events of %d checks", len(lines), len(r.Cases))
	}
	replayed := 0
	for _, line := range lines {
		v, err := ast.ValueFromReader(bytes.NewReader(line))
		if err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		event := v.(ast.Object)
		want := event.Get(ast.StringTerm("result"))
		if want == nil {
			continue // it was refused before the policy saw it
		}
		// JSON has no other bytes than UTF-8: what was not is U+FFFD in the event.
		saw := strings.ReplaceAll(want.String(), `\\ufffd`, "\ufffd")
		got, err := p.Eval(context.Background(), "envoy/authz/allow", event.Get(ast.StringTerm("input")).Value, policy.NewEnv(nil), nil)
		if err != nil || got.String() != saw {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
		replayed++
	}
	if replayed < len(r.Cases)/2 {
		t.Errorf("only %d of %d checks had a result", replayed, len(r.Cases))
	}
}

package kubernetes

import (
	"strings"
	"testing"

	"github.com/google/cel-go/cel"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	kyaml "sigs.k8s.io/yaml"
)

// The admission policy of deploy/envoy-gateway lets the example's policies pass in
// the namespaces of their tenants, and refuses what would take a team out of its own
// tenant.
func TestAdmission(t *testing.T) {
	docs, err := split(manifests(t, "envoy-gateway/admission.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	env, err := cel.NewEnv(cel.Variable("object", cel.DynType), cel.Variable("namespaceObject", cel.DynType))
	if err != nil {
		t.Fatal(err)
	}
	var programs []cel.Program
	for _, v := range decode[admissionv1.ValidatingAdmissionPolicy](t, docs[0]).Spec.Validations {
		parsed, issues := env.Compile(v.Expression)
		if issues.Err() != nil {
			t.Fatalf("%s: %v", v.Expression, issues.Err())
		}
		program, err := env.Program(parsed)
		if err != nil {
			t.Fatal(err)
		}
		programs = append(programs, program)
	}
	decode[admissionv1.ValidatingAdmissionPolicyBinding](t, docs[1])

	admitted := func(policy, namespace string) bool {
		t.Helper()
		var o object
		if err := kyaml.Unmarshal([]byte(policy), &o); err != nil {
			t.Fatal(err)
		}
		for _, program := range programs {
			out, _, err := program.Eval(object{"object": o, "namespaceObject": object{"metadata": object{"labels": object{"gatehouse/tenant": namespace}}}})
			if err != nil || out.Value() != true { // failurePolicy: Fail
				return false
			}
		}
		return true
	}
	for _, tenant := range []string{"orders", "payments"} {
		parts, err := split(manifests(t, "envoy-gateway/"+tenant+".yaml"))
		if err != nil {
			t.Fatal(err)
		}
		policy := string(parts[1])
		if !admitted(policy, tenant) {
			t.Errorf("the policy of %s is refused in its own namespace", tenant)
		}
		if admitted(policy, "other") {
			t.Errorf("the policy of %s is admitted in the namespace of another tenant", tenant)
		}
		for _, c := range []struct{ old, bad string }{
			{"failOpen: false", "failOpen: true"},
			{"contextExtensions: [{name: tenant, type: Value, value: " + tenant + "}]", "contextExtensions: []"},
			{"type: Value, value: " + tenant, "type: ValueRef, valueRef: {kind: ConfigMap, group: '', name: x, key: y}"},
			{"namespace: gatehouse, port", "namespace: mine, port"},
			{"{name: gatehouse, namespace", "{name: allow-all, namespace"},
			{"    grpc:\n      backendRefs", "    http:\n      backendRefs"},
			{"  extAuth:", "  cors: {allowOrigins: ['*']}\n  other:"},
		} {
			if !strings.Contains(policy, c.old) {
				t.Fatalf("the policy of %s has no %q", tenant, c.old)
			}
			if admitted(strings.Replace(policy, c.old, c.bad, 1), tenant) {
				t.Errorf("with %q the policy of %s is admitted", c.bad, tenant)
			}
		}
	}
}

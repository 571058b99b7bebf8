package kubernetes

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	meshv1alpha1 "istio.io/api/mesh/v1alpha1"
	networkingv1 "istio.io/api/networking/v1"
	securityv1 "istio.io/api/security/v1"
	typev1beta1 "istio.io/api/type/v1beta1"
	corev1 "k8s.io/api/core/v1"
	kyaml "sigs.k8s.io/yaml"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// protoOf decodes an object of Istio strictly, as its own type.
func protoOf(t *testing.T, v any, into proto.Message) {
	t.Helper()
	if err := protojson.Unmarshal(marshal(t, v), into); err != nil {
		t.Fatalf("%v in %s", err, marshal(t, v))
	}
}

// meshConfig returns the meshConfig of deploy/istio.
func meshConfig(t *testing.T) *meshv1alpha1.MeshConfig {
	t.Helper()
	var values object
	if err := kyaml.UnmarshalStrict(manifests(t, "istio/mesh-config.yaml"), &values); err != nil {
		t.Fatal(err)
	}
	if len(values) != 1 {
		t.Fatalf("mesh-config.yaml has %d keys, want meshConfig alone", len(values))
	}
	mesh := &meshv1alpha1.MeshConfig{}
	protoOf(t, values["meshConfig"], mesh)
	return mesh
}

// authorization returns the AuthorizationPolicies of action CUSTOM, by namespace.
func authorization(t *testing.T) map[string]*securityv1.AuthorizationPolicy {
	t.Helper()
	docs, err := split(manifests(t, "istio/policies.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	custom := map[string]*securityv1.AuthorizationPolicy{}
	for _, doc := range docs {
		var o struct {
			Kind     string
			Metadata struct{ Namespace string }
			Spec     object
		}
		if err := kyaml.Unmarshal(doc, &o); err != nil {
			t.Fatal(err)
		}
		switch o.Kind {
		case "AuthorizationPolicy":
			p := &securityv1.AuthorizationPolicy{}
			protoOf(t, o.Spec, p)
			if p.Action == securityv1.AuthorizationPolicy_CUSTOM {
				custom[o.Metadata.Namespace] = p
			}
		case "PeerAuthentication":
			protoOf(t, o.Spec, &securityv1.PeerAuthentication{})
		case "DestinationRule":
			protoOf(t, o.Spec, &networkingv1.DestinationRule{})
		default:
			t.Errorf("the test knows no %s", o.Kind)
		}
	}
	return custom
}

// Services that the providers name are Services of the chart, with those ports; each
// AuthorizationPolicy names a provider; nothing fails open or waits for ever.
func TestIstioProviders(t *testing.T) {
	docs, err := split(render(t, "istio"))
	if err != nil {
		t.Fatal(err)
	}
	ports := map[string][]uint32{} // :: host → ports
	for _, doc := range docs {
		if kind, _ := kind(t, doc); kind == "Service" {
			s := decode[corev1.Service](t, doc)
			for _, p := range s.Spec.Ports {
				host := s.Name + "." + s.Namespace + ".svc.cluster.local"
				ports[host] = append(ports[host], uint32(p.Port))
			}
		}
	}
	providers := map[string]bool{}
	for _, p := range meshConfig(t).ExtensionProviders {
		providers[p.Name] = true
		var service string
		var port uint32
		var open bool
		var timeout int64
		if grpc := p.GetEnvoyExtAuthzGrpc(); grpc != nil {
			service, port, open, timeout = grpc.Service, grpc.Port, grpc.FailOpen, grpc.Timeout.AsDuration().Milliseconds()
		} else if web := p.GetEnvoyExtAuthzHttp(); web != nil {
			service, port, open, timeout = web.Service, web.Port, web.FailOpen, web.Timeout.AsDuration().Milliseconds()
		}
		if !slices.Contains(ports[service], port) {
			t.Errorf("provider %s: the chart has no Service %s with port %d, it has %v", p.Name, service, port, ports)
		}
		if open || timeout == 0 || timeout > 1000 {
			t.Errorf("provider %s: fail open %v, timeout %d ms", p.Name, open, timeout)
		}
	}
	for namespace, p := range authorization(t) {
		if !providers[p.GetProvider().GetName()] {
			t.Errorf("the policy of namespace %s names provider %q, which is none of %v", namespace, p.GetProvider().GetName(), providers)
		}
	}
}

// istioFilters are what Istio puts before the router for an AuthorizationPolicy of
// action CUSTOM: RBAC in shadow, which marks the requests that its rules fit, and the
// ext_authz of the provider for those that are marked. The shapes are those of Istio's
// authorization builder; istiod itself does not run here.
func istioFilters(t *testing.T, policy *securityv1.AuthorizationPolicy, provider *meshv1alpha1.MeshConfig_ExtensionProvider) []any {
	t.Helper()
	policies := object{}
	for i, rule := range policy.Rules {
		permission := object{"any": true}
		for _, to := range rule.To {
			for _, path := range to.Operation.NotPaths {
				permission = object{"not_rule": object{"url_path": object{"path": object{"exact": path}}}}
			}
		}
		if len(rule.From)+len(rule.When) > 0 || len(rule.To) > 1 {
			t.Fatalf("the test makes no RBAC of rule %v", rule)
		}
		policies[fmt.Sprintf("istio-ext-authz-ns[x]-policy[gatehouse]-rule[%d]", i)] = object{
			"permissions": []any{object{"and_rules": object{"rules": []any{permission}}}},
			"principals":  []any{object{"and_ids": object{"ids": []any{object{"any": true}}}}},
		}
	}
	authz := object{
		"@type":                 "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
		"transport_api_version": "V3",
		"filter_enabled_metadata": object{
			"filter": "envoy.filters.http.rbac",
			"path":   []any{object{"key": "istio_ext_authz_shadow_effective_policy_id"}},
			"value":  object{"string_match": object{"prefix": "istio-ext-authz"}},
		},
	}
	body := func(b *meshv1alpha1.MeshConfig_ExtensionProvider_EnvoyExternalAuthorizationRequestBody) {
		if b != nil {
			authz["with_request_body"] = object{"max_request_bytes": b.MaxRequestBytes, "allow_partial_message": b.AllowPartialMessage, "pack_as_bytes": b.PackAsBytes}
		}
	}
	if p := provider.GetEnvoyExtAuthzGrpc(); p != nil {
		name := fmt.Sprintf("outbound|%d||%s", p.Port, p.Service)
		authz["failure_mode_allow"] = p.FailOpen
		authz["status_on_error"] = object{"code": "ServiceUnavailable"}
		if p.StatusOnError != "503" {
			t.Fatalf("statusOnError: got %q, want 503", p.StatusOnError)
		}
		authz["grpc_service"] = object{
			"envoy_grpc": object{"cluster_name": name, "authority": strings.ReplaceAll(name, "|", "_.")},
			"timeout":    fmt.Sprintf("%.3fs", p.Timeout.AsDuration().Seconds()),
		}
		body(p.IncludeRequestBodyInCheck)
	} else if p := provider.GetEnvoyExtAuthzHttp(); p != nil {
		exact := func(names []string) object {
			var patterns []any
			for _, name := range names {
				patterns = append(patterns, object{"exact": name})
			}
			return object{"patterns": patterns}
		}
		var add []any
		for key, value := range p.IncludeAdditionalHeadersInCheck {
			add = append(add, object{"key": key, "value": value})
		}
		authz["failure_mode_allow"] = p.FailOpen
		authz["http_service"] = object{
			"path_prefix":            p.PathPrefix,
			"server_uri":             object{"uri": "http://" + p.Service, "cluster": fmt.Sprintf("outbound|%d||%s", p.Port, p.Service), "timeout": fmt.Sprintf("%.3fs", p.Timeout.AsDuration().Seconds())},
			"authorization_request":  object{"allowed_headers": exact(p.IncludeRequestHeadersInCheck), "headers_to_add": add},
			"authorization_response": object{"allowed_upstream_headers": exact(p.HeadersToUpstreamOnAllow), "allowed_client_headers": exact(p.HeadersToDownstreamOnDeny)},
		}
		body(p.IncludeRequestBodyInCheck)
	} else {
		t.Fatalf("provider %s is of a kind that the test does not know", provider.Name)
	}
	return []any{
		object{"name": "envoy.filters.http.rbac", "typed_config": object{
			"@type":                    "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
			"shadow_rules":             object{"action": "DENY", "policies": policies},
			"shadow_rules_stat_prefix": "istio_ext_authz_",
		}},
		object{"name": "envoy.filters.http.ext_authz", "typed_config": authz},
	}
}

// The providers of deploy/istio, in the shape that Istio gives them, in a real Envoy:
// the tenant by the authority of the call, and by the path of forward-auth with a
// header that the proxy sets.
func TestIstio(t *testing.T) {
	old := rego["payments"]
	rego["payments"] = `package envoy.authz

default allow := false

allow := {"allowed": true, "headers": {"x-user": "bob of payments"}} if {
	input.attributes.request.http.headers["x-user"] == "bob"
	input.attributes.request.http.headers["x-mesh-workload"] == "payments"
	input.parsed_path[0] == "pay"
}
`
	t.Cleanup(func() { rego["payments"] = old })
	mesh, policies := meshConfig(t), authorization(t)
	g, echo := startGatehouse(t, render(t, "istio")), startEcho(t)

	clusters := []any{cluster("backend", echo.Addr, false)}
	var listeners []any
	for namespace, policy := range policies {
		for _, p := range mesh.ExtensionProviders {
			if p.Name != policy.GetProvider().GetName() {
				continue
			}
			listeners = append(listeners, httpListener(namespace, istioFilters(t, policy, p)...))
			if grpc := p.GetEnvoyExtAuthzGrpc(); grpc != nil {
				clusters = append(clusters, cluster(fmt.Sprintf("outbound|%d||%s", grpc.Port, grpc.Service), g.GRPC, true))
			} else if web := p.GetEnvoyExtAuthzHttp(); web != nil {
				clusters = append(clusters, cluster(fmt.Sprintf("outbound|%d||%s", web.Port, web.Service), g.HTTP, false))
			}
		}
	}
	n := startEnvoy(t, echo, t.TempDir(), marshal(t, object{
		"admin":            object{"address": address("127.0.0.1:0")},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
	}))

	if seen := n.allowed(t, n.get(t, "orders", "/any/path", "x-user: alice", "x-tenant: payments")); seen.Headers["x-tenant"][0] != "orders" {
		t.Errorf("orders: got x-tenant %q, want orders", seen.Headers["x-tenant"])
	}
	n.denied(t, n.get(t, "orders", "/pay", "x-user: bob", "x-mesh-workload: payments"), http.StatusForbidden)
	n.denied(t, n.do(t, "orders", stage.Request{Path: "/pay", Host: "outbound_.9191_._.payments.gatehouse.svc.cluster.local", Headers: []string{"x-user: bob"}}), http.StatusForbidden)
	n.allowed(t, n.get(t, "orders", "/healthz")) // notPaths: nobody is asked

	seen := n.allowed(t, n.get(t, "payments", "/pay/1?x=y", "x-user: bob"))
	if got := seen.Headers["x-user"]; len(got) != 1 || got[0] != "bob of payments" {
		t.Errorf("payments: got x-user %q, want what the policy says", got)
	}
	if seen.Path != "/pay/1?x=y" {
		t.Errorf("payments: the backend got path %q, want the client's", seen.Path)
	}
	// What the proxy sets, a client can neither replace nor add to.
	n.allowed(t, n.get(t, "payments", "/pay/1", "x-user: bob", "x-mesh-workload: orders"))
	n.denied(t, n.get(t, "payments", "/pay/1", "x-user: alice", "x-mesh-workload: payments"), http.StatusForbidden)
	n.denied(t, n.get(t, "payments", "/orders", "x-user: alice"), http.StatusForbidden)
	n.denied(t, n.get(t, "payments", "/pay/../../../t/orders/check", "x-user: alice"), http.StatusForbidden)
}

// A provider's field that Istio does not know is refused.
func TestIstioRefuses(t *testing.T) {
	for _, bad := range []string{
		`{"extensionProviders": [{"name": "x", "envoyExtAuthzGrpc": {"service": "a", "port": 1, "contextExtensions": {"tenant": "x"}}}]}`,
		`{"extensionProviders": [{"name": "x", "envoyExtAuthzHttp": {"service": "a", "port": 1, "timeout": "soon"}}]}`,
	} {
		if err := protojson.Unmarshal([]byte(bad), &meshv1alpha1.MeshConfig{}); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
	var selector typev1beta1.WorkloadSelector
	if err := protojson.Unmarshal([]byte(`{"matchLabel": {}}`), &selector); err == nil {
		t.Error("a selector without matchLabels is accepted")
	}
}

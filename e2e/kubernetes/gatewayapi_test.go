package kubernetes

import (
	"fmt"
	"testing"

	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
	gatewayv1beta1 "sigs.k8s.io/gateway-api/apis/v1beta1"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// The filter ExternalAuth of deploy/gateway-api, read by the API's own type, and in a
// real Envoy what its fields ask of an implementation: for HTTP, the path before the
// client's, the headers that are listed and those that always are; for gRPC, the
// Service as the authority. Which implementation does it so, its own tests say.
func TestGatewayAPI(t *testing.T) {
	rendered := render(t, "istio") // the chart with a Service for each tenant
	g, echo := startGatehouse(t, rendered), startEcho(t)
	_, ips := services(t, rendered)

	docs, err := split(manifests(t, "gateway-api/routes.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	clusters := []any{cluster("backend", echo.Addr, false)}
	var listeners []any
	grants := 0
	for _, doc := range docs {
		kind, _ := kind(t, doc)
		if kind == "ReferenceGrant" {
			decode[gatewayv1beta1.ReferenceGrant](t, doc)
			grants++
			continue
		}
		route := decode[gatewayv1.HTTPRoute](t, doc)
		filter := route.Spec.Rules[0].Filters[0]
		auth := filter.ExternalAuth
		if filter.Type != gatewayv1.HTTPRouteFilterExternalAuth || auth == nil {
			t.Fatalf("route %s: got filter %+v, want ExternalAuth", route.Name, filter)
		}
		service := fmt.Sprintf("%s/%s", *auth.BackendRef.Namespace, auth.BackendRef.Name)
		if _, ok := ips[service]; !ok {
			t.Errorf("route %s: the chart has no Service %s", route.Name, service)
		}
		authz := object{
			"@type":                 "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
			"transport_api_version": "V3",
		}
		name := "authz-" + route.Name
		switch auth.ExternalAuthProtocol {
		case gatewayv1.HTTPRouteExternalAuthHTTPProtocol:
			exact := func(names []string) object {
				var patterns []any
				for _, name := range names {
					patterns = append(patterns, object{"exact": name})
				}
				return object{"patterns": patterns}
			}
			authz["http_service"] = object{
				"path_prefix":            auth.HTTPAuthConfig.Path,
				"server_uri":             object{"uri": "http://" + service, "cluster": name, "timeout": "0.5s"},
				"authorization_request":  object{"allowed_headers": exact(auth.HTTPAuthConfig.AllowedRequestHeaders)},
				"authorization_response": object{"allowed_upstream_headers": exact(append(auth.HTTPAuthConfig.AllowedResponseHeaders, "x-tenant"))},
			}
			clusters = append(clusters, cluster(name, g.HTTP, false))
		case gatewayv1.HTTPRouteExternalAuthGRPCProtocol:
			authority := fmt.Sprintf("outbound_.%d_._.%s.%s.svc.cluster.local", *auth.BackendRef.Port, auth.BackendRef.Name, *auth.BackendRef.Namespace)
			authz["grpc_service"] = object{"envoy_grpc": object{"cluster_name": name, "authority": authority}, "timeout": "0.5s"}
			authz["with_request_body"] = object{"max_request_bytes": auth.ForwardBody.MaxSize}
			clusters = append(clusters, cluster(name, g.GRPC, true))
		default:
			t.Fatalf("route %s: protocol %q", route.Name, auth.ExternalAuthProtocol)
		}
		listeners = append(listeners, httpListener(route.Name, object{"name": "envoy.filters.http.ext_authz", "typed_config": authz}))
	}
	if grants != 1 || len(listeners) != 2 {
		t.Fatalf("got %d grants and %d routes, want 1 and 2", grants, len(listeners))
	}
	n := startEnvoy(t, echo, t.TempDir(), marshal(t, object{
		"admin":            object{"address": address("127.0.0.1:0")},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
	}))
	isolated(t, n,
		func(h ...string) *stage.Response { return n.get(t, "orders", "/orders/1", h...) },
		func(h ...string) *stage.Response { return n.get(t, "payments", "/payments/1", h...) })
}

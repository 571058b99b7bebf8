package e2e

import (
	"net/http"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// who is a policy that says whose it is.
func who(name string) string {
	return `allow := {"allowed": true, "headers": {"x-tenant": "` + name + `"}}`
}

// The tenant of a check is what the operator's places say, the first first.
func TestTenantOf(t *testing.T) {
	ten := tenants{}
	for _, name := range []string{"orders", "payments", "storefront", "fallback"} {
		ten[name] = who(name)
	}
	resolve := `
tenants:
  resolve:
  - context_extension: tenant
  - route_metadata: {namespace: gatehouse, key: tenant}
  - authority: {pattern: '([a-z]+)\.authz\.internal'}
  - host: {map: {orders.example: orders, "*.pay.example": payments}}
`
	g, dir := startGatehouse(t, resolve, ten)
	withDefault := serve(t, resolve+"  default: fallback\n", dir)

	metadata := func(value any) object { return object{"gatehouse": object{"tenant": value}} }
	routes := []route{
		{Prefix: "/context/orders", Context: map[string]string{"tenant": "orders"}},
		{Prefix: "/context/payments", Context: map[string]string{"tenant": "payments"}, Metadata: metadata("orders")},
		{Prefix: "/context/unknown", Context: map[string]string{"tenant": "nobody"}},
		{Prefix: "/context/invalid", Context: map[string]string{"tenant": "../orders"}},
		{Prefix: "/context/capital", Context: map[string]string{"tenant": "Orders"}},
		{Prefix: "/context/empty", Context: map[string]string{"tenant": ""}, Metadata: metadata("orders")},
		{Prefix: "/metadata/orders", Metadata: metadata("orders")},
		{Prefix: "/metadata/number", Metadata: metadata(7)},
		{Prefix: "/"},
	}
	filter := object{"route_metadata_context_namespaces": []string{"gatehouse"}}
	listeners := []listener{
		{Name: "main", Timeout: slack, Routes: routes, Filter: filter},
		{Name: "storefront", Timeout: slack, Routes: routes, Filter: filter, Authority: "storefront.authz.internal"},
	}
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listeners...)
		get := func(listener, path, host string) *stage.Response {
			t.Helper()
			return n.do(t, listener, stage.Request{Path: path, Host: host})
		}
		is := func(resp *stage.Response, want string) {
			t.Helper()
			equal(t, "tenant", n.allowed(t, resp).Headers["x-tenant"], []string{want})
		}
		refused := func(resp *stage.Response) {
			t.Helper()
			n.denied(t, resp, http.StatusForbidden)
		}

		is(get("main", "/context/orders/a", ""), "orders")
		is(get("main", "/context/payments/a", ""), "payments") // before the metadata
		is(get("storefront", "/context/orders/a", ""), "orders")
		is(get("main", "/metadata/orders/a", ""), "orders")
		is(get("storefront", "/a", ""), "storefront") // by the authority of the call
		is(get("main", "/a", "orders.example"), "orders")
		is(get("main", "/a", "ORDERS.example:80"), "orders")
		is(get("main", "/a", "eu.pay.example"), "payments")
		is(get("storefront", "/a", "orders.example"), "storefront") // before the host

		refused(get("main", "/context/unknown/a", "orders.example"))
		refused(get("main", "/context/invalid/a", "orders.example"))
		refused(get("main", "/context/capital/a", "orders.example"))
		refused(get("main", "/context/empty/a", "orders.example"))
		refused(get("main", "/metadata/number/a", "orders.example"))
		refused(get("main", "/a", "other.example"))
		refused(get("main", "/a", "pay.example"))

		n = startEnvoy(t, envoy, withDefault.GRPC, options{}, listeners...)
		is(get("main", "/a", "other.example"), "fallback")
		is(get("main", "/a", "orders.example"), "orders")
		refused(get("main", "/context/unknown/a", ""))
		refused(get("main", "/context/invalid/a", ""))
	})
}

// A route may name one of the entry points that the operator lists.
func TestEntryPoint(t *testing.T) {
	ten := tenants{"orders": map[string]string{
		"a.rego": "package envoy.authz\n\nallow := true",
		"b.rego": "package admin\n\nallow := false\n\nopen := true",
	}}
	g, _ := startGatehouse(t, `
opa: {plugins: {envoy_ext_authz_grpc: {path: envoy/authz/allow, paths: [admin/allow]}}}
`, ten)
	entry := func(path string) route {
		return route{Prefix: "/" + path + "/", Context: map[string]string{"tenant": "orders", "path": path}}
	}
	eachEnvoy(t, func(t *testing.T, envoy string) {
		n := startEnvoy(t, envoy, g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: []route{
			entry("envoy/authz/allow"), entry("admin/allow"), entry("admin/open"),
		}})
		n.allowed(t, n.get(t, "main", "/envoy/authz/allow/a"))
		n.denied(t, n.get(t, "main", "/admin/allow/a"), 403)
		n.denied(t, n.get(t, "main", "/admin/open/a"), 403) // allows, but is not listed
	})
}

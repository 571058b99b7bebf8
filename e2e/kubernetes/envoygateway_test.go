package kubernetes

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	kyaml "sigs.k8s.io/yaml"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// manifests returns a folder's or a file's manifests.
func manifests(t *testing.T, path string) []byte {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(deploy, path))
	if err != nil || len(files) == 0 {
		t.Fatalf("there is no %s: %v", path, err)
	}
	var all bytes.Buffer
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&all, "%s\n---\n", text)
	}
	return all.Bytes()
}

func TestManifestsConform(t *testing.T) {
	for _, path := range []string{"istio/policies.yaml", "envoy-gateway/*.yaml", "gateway-api/*.yaml"} {
		t.Run(path, func(t *testing.T) {
			for _, wrong := range conform(t, manifests(t, path)) {
				t.Error(wrong)
			}
		})
	}
}

// services returns the Services of a rendered chart, and those of the backends, with
// the addresses that a cluster would give them.
func services(t *testing.T, rendered []byte, backends ...string) (text []byte, addresses map[string]string) {
	t.Helper()
	docs, err := split(rendered)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range backends {
		docs = append(docs, []byte("apiVersion: v1\nkind: Service\nmetadata: {name: "+name+", namespace: "+name+"}\nspec: {ports: [{port: 8080}]}\n"))
	}
	addresses = map[string]string{} // :: namespace/name → address
	for _, doc := range docs {
		if kind, _ := kind(t, doc); kind != "Service" {
			continue
		}
		s := decode[corev1.Service](t, doc)
		if s.Spec.ClusterIP == "" {
			s.Spec.ClusterIP = fmt.Sprintf("10.96.0.%d", 10+len(addresses))
			addresses[s.Namespace+"/"+s.Name] = s.Spec.ClusterIP
		}
		out, err := kyaml.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		text = fmt.Appendf(text, "%s---\n", out)
	}
	return text, addresses
}

// translate returns what Envoy Gateway makes of manifests: the resources of xDS by
// their kind, as in Envoy's config dump, and its objects with their status.
func translate(t *testing.T, text []byte) (dumps map[string]object, statuses object) {
	t.Helper()
	docs, err := split(text)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "in.yaml")
	if err := os.WriteFile(file, bytes.Join(docs, []byte("\n---\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "egctl"), "x", "translate", "--from", "gateway-api", "--to", "gateway-api,xds", "-o", "json", "-f", file)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("egctl: %v\n%s", err, stderr.String())
	}
	if err := json.Unmarshal(out, &statuses); err != nil {
		t.Fatalf("egctl: %v\n%s", err, out)
	}
	dumps = map[string]object{}
	for _, gateway := range statuses["xds"].(object) {
		for _, dump := range gateway.(object)["configs"].([]any) {
			name := dump.(object)["@type"].(string)
			dumps[name[strings.LastIndex(name, ".")+1:]] = dump.(object)
		}
	}
	return dumps, statuses
}

// conditions returns the conditions in a status that are not true.
func conditions(v any) (wrong []string) {
	switch v := v.(type) {
	case object:
		if v["lastTransitionTime"] != nil || v["reason"] != nil && v["status"] != nil {
			if v["status"] != "True" {
				wrong = append(wrong, fmt.Sprint(v))
			}
		}
		for _, v := range v {
			wrong = append(wrong, conditions(v)...)
		}
	case []any:
		for _, v := range v {
			wrong = append(wrong, conditions(v)...)
		}
	}
	return wrong
}

// edit calls f for each object in v.
func edit(v any, f func(object)) {
	switch v := v.(type) {
	case object:
		f(v)
		for _, v := range v {
			edit(v, f)
		}
	case []any:
		for _, v := range v {
			edit(v, f)
		}
	}
}

// fromDumps starts an Envoy with the listeners, routes, clusters and endpoints of
// dumps, as files that it reads as it would read them from Envoy Gateway. Two things
// are changed: addresses, of listeners and of Services, to maps; and where a resource
// names ADS as the place of another, that is the file. The bootstrap is the test's,
// since Envoy Gateway's own connects to Envoy Gateway.
func fromDumps(t *testing.T, echo *stage.Echo, dumps map[string]object, to map[string]string) *network {
	t.Helper()
	dir := t.TempDir()
	used := map[string]bool{}
	place := func(file string) object {
		return object{"path": filepath.Join(dir, file)}
	}
	// Envoy wants a file of endpoints for each cluster.
	endpoints := func(cluster string) string { return "eds-" + strings.ReplaceAll(cluster, "/", "-") + ".json" }
	put := func(file string, resources []any) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, file), marshal(t, object{"resources": resources}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list := func(dump, list, resource string) (resources []any) {
		t.Helper()
		entries, _ := dumps[dump][list].([]any)
		for _, entry := range entries {
			if state, ok := entry.(object)["activeState"]; ok {
				entry = state
			}
			resources = append(resources, entry.(object)[resource])
		}
		if len(resources) == 0 {
			t.Fatalf("Envoy Gateway made no %s", list)
		}
		edit(resources, func(o object) {
			if config, ok := o["edsClusterConfig"].(object); ok {
				source := config["edsConfig"].(object)
				delete(source, "ads")
				source["pathConfigSource"] = place(endpoints(config["serviceName"].(string)))
			}
			if rds, ok := o["rds"].(object); ok {
				source := rds["configSource"].(object)
				delete(source, "ads")
				source["pathConfigSource"] = place("rds.json")
			}
			socket, ok := o["socketAddress"].(object)
			if !ok {
				return
			}
			old := fmt.Sprintf("%v:%v", socket["address"], socket["portValue"])
			next, ok := to[old]
			if !ok {
				t.Fatalf("%s: the test knows no address for %s", list, old)
			}
			used[old] = true
			n := address(next)["socket_address"].(object)
			o["socketAddress"] = object{"address": n["address"], "portValue": n["port_value"]}
		})
		return resources
	}
	put("lds.json", list("ListenersConfigDump", "dynamicListeners", "listener"))
	put("rds.json", list("RoutesConfigDump", "dynamicRouteConfigs", "routeConfig"))
	put("cds.json", list("ClustersConfigDump", "dynamicActiveClusters", "cluster"))
	for _, e := range list("EndpointsConfigDump", "dynamicEndpointConfigs", "endpointConfig") {
		put(endpoints(e.(object)["clusterName"].(string)), []any{e})
	}
	for old := range to {
		if !used[old] {
			t.Errorf("Envoy Gateway made nothing of %s", old)
		}
	}
	return startEnvoy(t, echo, t.TempDir(), marshal(t, object{
		"node": object{"id": "gateway", "cluster": "gateways"}, "admin": object{"address": address("127.0.0.1:0")},
		"dynamic_resources": object{
			"lds_config": object{"resource_api_version": "V3", "path_config_source": place("lds.json")},
			"cds_config": object{"resource_api_version": "V3", "path_config_source": place("cds.json")},
		},
	}))
}

// The manifests of deploy/envoy-gateway and the Services of the chart, as Envoy
// Gateway translates them, in a real Envoy.
func TestEnvoyGateway(t *testing.T) {
	rendered := render(t, "envoy-gateway")
	text, ips := services(t, rendered, "orders", "payments", "forgotten")
	// A route whose team has written no SecurityPolicy.
	text = append(text, `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: forgotten, namespace: forgotten}
spec:
  parentRefs: [{name: public, namespace: gateways}]
  hostnames: ["shop.example.com"]
  rules: [{matches: [{path: {type: PathPrefix, value: /forgotten}}], backendRefs: [{name: forgotten, port: 8080}]}]
---
`...)
	for _, file := range []string{"gateway", "orders", "payments"} {
		text = append(text, manifests(t, "envoy-gateway/"+file+".yaml")...)
	}
	dumps, statuses := translate(t, text)
	delete(statuses, "xds")
	for _, wrong := range conditions(statuses) {
		if !strings.Contains(wrong, "Overridden") { // the Gateway's policy, by those of the routes
			t.Errorf("Envoy Gateway says: %s", wrong)
		}
	}

	g, echo := startGatehouse(t, rendered), startEcho(t)
	n := fromDumps(t, echo, dumps, map[string]string{
		"0.0.0.0:8080": "127.0.0.1:0", "0.0.0.0:19003": "127.0.0.1:0",
		ips["gatehouse/gatehouse"] + ":9191": g.GRPC,
		ips["orders/orders"] + ":8080":       echo.Addr, ips["payments/payments"] + ":8080": echo.Addr, ips["forgotten/forgotten"] + ":8080": echo.Addr,
	})
	ask := func(path string) func(h ...string) *stage.Response {
		return func(h ...string) *stage.Response {
			return n.do(t, "gateways/public/http", stage.Request{Path: path, Host: "shop.example.com", Headers: h})
		}
	}
	isolated(t, n, ask("/orders/1"), ask("/payments/1"))
	n.denied(t, ask("/forgotten/1")("x-user: alice"), http.StatusForbidden)
	n.denied(t, ask("/orders%2fx")("x-user: alice"), http.StatusBadRequest)
	n.denied(t, ask("/payments/../orders/1")("x-user: bob"), http.StatusForbidden)

	// Bodies are sent to the policy up to the limit, which is more than the 32 KiB
	// that the listener buffers of a connection.
	body := func(size int) *stage.Response {
		return n.do(t, "gateways/public/http", stage.Request{Path: "/orders/1", Host: "shop.example.com", Headers: []string{"x-user: alice"}, Body: strings.Repeat("x", size)})
	}
	n.allowed(t, body(60<<10))
	n.denied(t, body(70<<10), http.StatusRequestEntityTooLarge)

	g.Kill()
	n.denied(t, ask("/orders/1")("x-user: alice"), http.StatusServiceUnavailable)
}

// Envoy Gateway refuses what its own checks refuse: the translation above is no
// formality.
func TestEnvoyGatewayRefuses(t *testing.T) {
	text, _ := services(t, render(t, "envoy-gateway"), "orders", "payments")
	gateway := manifests(t, "envoy-gateway/gateway.yaml")
	orders := manifests(t, "envoy-gateway/orders.yaml")
	grant := []byte("{group: gateway.envoyproxy.io, kind: SecurityPolicy, namespace: orders}")
	if !bytes.Contains(gateway, grant) {
		t.Fatalf("gateway.yaml does not have %s", grant)
	}
	gateway = bytes.Replace(gateway, grant, []byte("{group: gateway.envoyproxy.io, kind: SecurityPolicy, namespace: others}"), 1)
	_, statuses := translate(t, bytes.Join([][]byte{text, gateway, orders}, []byte("\n---\n")))
	delete(statuses, "xds")
	if wrong := fmt.Sprint(conditions(statuses)); !strings.Contains(wrong, "ReferenceGrant") && !strings.Contains(wrong, "not permitted") {
		t.Errorf("without the ReferenceGrant: got %q, want a condition that says so", wrong)
	}
}

// A SecurityPolicy of a route takes the place of the Gateway's as a whole, so one that
// asks nobody opens the route. It is why the admission policy refuses it.
func TestEnvoyGatewayReplaces(t *testing.T) {
	text, _ := services(t, render(t, "envoy-gateway"), "orders", "payments")
	for _, file := range []string{"gateway", "orders", "payments"} {
		text = append(text, manifests(t, "envoy-gateway/"+file+".yaml")...)
	}
	docs, err := split(text)
	if err != nil {
		t.Fatal(err)
	}
	for i, doc := range docs {
		if kind, _ := kind(t, doc); kind == "SecurityPolicy" && bytes.Contains(doc, []byte("namespace: orders")) {
			docs[i] = []byte(`apiVersion: gateway.envoyproxy.io/v1alpha1
kind: SecurityPolicy
metadata: {name: cors, namespace: orders}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: orders}]
  cors: {allowOrigins: ["https://example.com"]}
`)
		}
	}
	dumps, _ := translate(t, bytes.Join(docs, []byte("\n---\n")))
	asked := map[string]bool{} // :: route → whether Gatehouse is asked
	edit(dumps["RoutesConfigDump"], func(o object) {
		if route, ok := o["name"].(string); ok && strings.HasPrefix(route, "httproute/") {
			filters, _ := o["typedPerFilterConfig"].(object)
			for filter := range filters {
				asked[strings.Split(route, "/")[1]] = asked[strings.Split(route, "/")[1]] || strings.HasPrefix(filter, "envoy.filters.http.ext_authz/")
			}
		}
	})
	if asked["orders"] || !asked["payments"] {
		t.Errorf("got %v, want payments asked about and orders not: the documentation says so", asked)
	}
}

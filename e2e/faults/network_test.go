package faults

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

type object = map[string]any

// network is an Envoy with its backend: each tenant is a host.
type network struct {
	*stage.Envoy
	http *http.Client
}

// options of an Envoy.
type options struct {
	gatehouses []string // addresses
	tls        object   // the context of connections to them; nil: they are plain
}

func startEnvoy(t *testing.T, opts options) *network {
	t.Helper()
	echo, err := stage.StartEcho()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(echo.Close)
	service := object{"timeout": "2s", "envoy_grpc": object{"cluster_name": "gatehouse"}}
	gatehouse := cluster("gatehouse", opts.gatehouses...)
	gatehouse["typed_extension_protocol_options"] = object{
		"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
			"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
			"explicit_http_config": object{"http2_protocol_options": object{}},
		},
	}
	gatehouse["health_checks"] = []object{{
		"timeout": "1s", "interval": "0.2s", "no_traffic_interval": "0.2s", "unhealthy_threshold": 1, "healthy_threshold": 1,
		"grpc_health_check": object{"service_name": "envoy.service.auth.v3.Authorization"},
	}}
	gatehouse["outlier_detection"] = object{"consecutive_gateway_failure": 1, "consecutive_5xx": 1, "interval": "0.1s", "base_ejection_time": "1s", "max_ejection_percent": 50}
	if opts.tls != nil {
		gatehouse["transport_socket"] = object{"name": "envoy.transport_sockets.tls", "typed_config": opts.tls}
	}
	config, err := json.Marshal(object{
		"admin": object{"address": address("127.0.0.1:0")},
		"static_resources": object{
			"listeners": []object{{
				"name": "main", "address": address("127.0.0.1:0"),
				"filter_chains": []object{{"filters": []object{{
					"name": "envoy.filters.network.http_connection_manager",
					"typed_config": object{
						"@type":       "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
						"stat_prefix": "main", "codec_type": "HTTP1",
						"http_filters": []object{
							{"name": "envoy.filters.http.ext_authz", "typed_config": object{
								"@type":                 "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
								"transport_api_version": "V3", "grpc_service": service, "status_on_error": object{"code": "BadGateway"},
							}},
							{"name": "envoy.filters.http.router", "typed_config": object{
								"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router",
							}},
						},
						"route_config": object{"virtual_hosts": []object{host("orders"), host("payments"), host("storefront")}},
					},
				}}}},
			}},
			"clusters": []object{gatehouse, cluster("backend", echo.Addr)},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	envoy, err := stage.StartEnvoy(tool(t, "envoy"), t.TempDir(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		envoy.Kill()
		if t.Failed() {
			out := envoy.Output()
			t.Logf("output of Envoy:\n%s", out[max(0, len(out)-2<<10):])
		}
	})
	n := &network{Envoy: envoy, http: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}, Timeout: 5 * time.Second}}
	eventually(t, "Envoy finds all gatehouses healthy", func() bool {
		text, err := n.Get("/clusters")
		return err == nil && strings.Count(text, "gatehouse::") > 0 && !strings.Contains(text, "/failed_active_hc")
	})
	return n
}

func address(addr string) object {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		panic(err)
	}
	number, err := strconv.Atoi(port)
	if err != nil {
		panic(err)
	}
	return object{"socket_address": object{"address": host, "port_value": number}}
}

func cluster(name string, addrs ...string) object {
	var endpoints []object
	for _, a := range addrs {
		endpoints = append(endpoints, object{"endpoint": object{"address": address(a)}})
	}
	return object{
		"name": name, "connect_timeout": "1s",
		"load_assignment": object{"cluster_name": name, "endpoints": []object{{"lb_endpoints": endpoints}}},
	}
}

func host(tenant string) object {
	return object{"name": tenant, "domains": []string{tenant}, "routes": []object{{
		"match": object{"prefix": "/"},
		"route": object{"cluster": "backend"},
		"typed_per_filter_config": object{"envoy.filters.http.ext_authz": object{
			"@type":          "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
			"check_settings": object{"context_extensions": object{"tenant": tenant}},
		}},
	}}}
}

// ask sends a question through Envoy.
func (n *network) ask(tenant string, q int) answer {
	question := questions[q]
	req, err := http.NewRequest(question.method, "http://"+n.Listeners["main"]+question.path, nil)
	if err != nil {
		return answer{err: err}
	}
	req.Host = tenant
	if question.user != "" {
		req.Header.Set("x-user", question.user)
	}
	resp, err := n.http.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{err: err}
	}
	a := answer{status: resp.StatusCode, tenant: resp.Header.Get("x-tenant"), revision: resp.Header.Get("x-revision")}
	if resp.StatusCode == http.StatusOK {
		var seen stage.Seen
		if err := json.NewDecoder(bytes.NewReader(body)).Decode(&seen); err != nil {
			return answer{err: fmt.Errorf("backend: %w", err)}
		}
		first := func(name string) string { return strings.Join(seen.Headers[name], ",") }
		a.allowed, a.tenant, a.revision = true, first("x-tenant"), first("x-revision")
	}
	return a
}

// errors returns how many checks Envoy got no answer to.
func (n *network) errors(t *testing.T) string {
	t.Helper()
	text, err := n.Get("/stats?filter=ext_authz")
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if strings.HasSuffix(name, ".error") || strings.HasSuffix(name, ".failure_mode_allowed") {
			lines = append(lines, name+"="+value)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, " ")
}

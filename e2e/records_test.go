package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/gatehouse-authz/gatehouse/e2e/stage"
)

// record is a log record as the collector has it.
type record struct {
	TraceID, SpanID, EventName, SeverityText string
	Body                                     otelValue
	Attributes                               otelAttrs
}

// records are all those that the collector has, by decision.
func (c *collector) records(t *testing.T) map[string][]record {
	t.Helper()
	all := map[string][]record{}
	for line := range bytes.Lines(c.written(t)) {
		var batch struct {
			ResourceLogs []struct {
				ScopeLogs []struct{ LogRecords []record }
			}
		}
		if json.Unmarshal(line, &batch) != nil {
			continue // it is not whole yet
		}
		for _, r := range batch.ResourceLogs {
			for _, s := range r.ScopeLogs {
				for _, r := range s.LogRecords {
					id := r.Attributes.get("gatehouse.decision.id")
					all[id] = append(all[id], r)
				}
			}
		}
	}
	return all
}

func recordsConfig(endpoint, protocol string) string {
	return fmt.Sprintf(`
telemetry: {otlp: {endpoint: %q, protocol: %s, timeout: 1s}, traces: {enabled: false}, metrics: {enabled: false}}
opa:
  decision_logs:
    otlp: true
    reporting: {min_delay_seconds: 0.1, max_delay_seconds: 0.2}
`, endpoint, protocol)
}

// A decision arrives at a collector as one record, under the ID that Envoy has of
// it and with the trace of the request, and without what is secret.
func TestRecords(t *testing.T) {
	const secret = "the-secret-of-a-client"
	ten := tenants{"orders": `default allow := false`}
	c := startCollector(t)
	for protocol, endpoint := range map[string]string{"grpc": "http://" + c.grpc, "http": "http://" + c.http} {
		g, _ := startGatehouse(t, recordsConfig(endpoint, protocol), ten)
		n := startEnvoy(t, envoyBinary(t, versions[0]), g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})
		const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
		resp := n.get(t, "main", "/orders/42", "authorization: Bearer "+secret, "cookie: session="+secret,
			"traceparent: 00-"+trace+"-00f067aa0ba902b7-01")
		n.denied(t, resp, 403)
		id := n.logged(t, resp)["decision_id"].(string)
		eventually(t, "the record of decision "+id+" arrives", func() bool { return len(c.records(t)[id]) > 0 })
		all := c.records(t)[id]
		r := all[0]
		equal(t, "records of the decision", len(all), 1)
		equal(t, "event name", r.EventName, "gatehouse.decision")
		equal(t, "severity", r.SeverityText, "INFO")
		equal(t, "trace", r.TraceID, trace)
		equal(t, "tenant", r.Attributes.get("gatehouse.tenant"), "orders")
		equal(t, "outcome", r.Attributes.get("gatehouse.decision.outcome"), "denied")
		equal(t, "entry point", r.Attributes.get("gatehouse.entry_point"), "envoy/authz/allow")
		var event struct {
			DecisionID string `json:"decision_id"`
			Result     any
			Input      object
		}
		if err := json.Unmarshal([]byte(r.Body.StringValue), &event); err != nil || event.DecisionID != id || event.Result != false || len(event.Input) == 0 {
			t.Errorf("%s: body: got %s", protocol, r.Body.StringValue)
		}
	}
	if bytes.Contains(c.written(t), []byte(secret)) {
		t.Error("the collector was sent a secret")
	}
}

var logEvents = regexp.MustCompile(`(?m)^gatehouse_decision_log_(events_total\{state="(\w+)"\}|(buffered)_events) (\d+)$`)

// books are those of the decision logs, as /metrics has them.
func books(t *testing.T, g *stage.Gatehouse) map[string]int {
	t.Helper()
	_, text := admin(t, g, "GET", "/metrics", "")
	b := map[string]int{}
	for _, m := range logEvents.FindAllStringSubmatch(text, -1) {
		n, err := strconv.Atoi(m[4])
		if err != nil {
			t.Fatal(err)
		}
		b[m[2]+m[3]] = n
	}
	if len(b) != 4 || b["recorded"] != b["delivered"]+b["dropped"]+b["buffered"] {
		t.Errorf("the books do not balance: %v", b)
	}
	return b
}

// A collector that takes connections and says nothing holds no check up. What it
// has not confirmed is sent again when it speaks, and each decision is counted.
func TestRecordsOfACollectorThatHangs(t *testing.T) {
	const checks = 50
	ten := tenants{"orders": `default allow := true`}
	c := startCollector(t)
	g, _ := startGatehouse(t, recordsConfig("http://"+c.grpc, "grpc"), ten)
	n := startEnvoy(t, envoyBinary(t, versions[0]), g.GRPC, options{}, listener{Name: "main", Timeout: slack, Routes: byTenant(ten)})
	n.allowed(t, n.get(t, "main", "/orders/first"))
	eventually(t, "the first is delivered", func() bool { return books(t, g)["delivered"] == 1 })

	if err := c.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for i := range checks {
		resp := n.get(t, "main", fmt.Sprintf("/orders/%d", i))
		n.allowed(t, resp)
		ids = append(ids, n.logged(t, resp)["decision_id"].(string))
	}
	eventually(t, "the collector is said to fail", func() bool { return strings.Contains(g.Output(), "decision log not delivered") })
	if b := books(t, g); b["recorded"] != checks+1 || b["delivered"] != 1 || b["dropped"] != 0 {
		t.Errorf("while it hangs: got %v", b)
	}
	if err := c.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all are delivered", func() bool { return books(t, g)["delivered"] == checks+1 })
	eventually(t, "the collector has all", func() bool {
		all := c.records(t)
		for _, id := range ids {
			if len(all[id]) == 0 {
				return false
			}
		}
		return true
	})
}

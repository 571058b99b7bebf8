package telemetry_test

import (
	"compress/gzip"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/resource"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
	"github.com/gatehouse-authz/gatehouse/telemetry"
)

// collector takes records, and answers as it is told.
type collector struct {
	collogs.UnimplementedLogsServiceServer

	mu       sync.Mutex
	requests []*collogs.ExportLogsServiceRequest
	answers  []func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) // of the first requests
	tokens   []string
	hang     chan struct{} // not nil: nothing is answered before it is closed
}

func (c *collector) Export(ctx context.Context, req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	return c.take(ctx, req, strings.Join(md.Get("x-token"), ""))
}

func (c *collector) take(ctx context.Context, req *collogs.ExportLogsServiceRequest, token string) (*collogs.ExportLogsServiceResponse, error) {
	c.mu.Lock()
	c.requests, c.tokens = append(c.requests, req), append(c.tokens, token)
	var answer func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error)
	if len(c.answers) > 0 {
		answer, c.answers = c.answers[0], c.answers[1:]
	}
	hang := c.hang
	c.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-ctx.Done():
		}
	}
	if answer != nil {
		return answer(req)
	}
	return &collogs.ExportLogsServiceResponse{}, nil
}

// ServeHTTP is the collector over HTTP.
func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body io.Reader = r.Body
	if r.Header.Get("Content-Encoding") == "gzip" {
		body, _ = gzip.NewReader(r.Body)
	}
	text, err := io.ReadAll(body)
	req := new(collogs.ExportLogsServiceRequest)
	if err != nil || proto.Unmarshal(text, req) != nil || r.URL.Path != "/base/v1/logs" || r.Header.Get("Content-Type") != "application/x-protobuf" {
		http.Error(w, "no", http.StatusBadRequest)
		return
	}
	resp, err := c.take(r.Context(), req, r.Header.Get("X-Token"))
	switch status.Code(err) {
	case codes.OK:
		out, _ := proto.Marshal(resp)
		w.Header().Set("Content-Type", "application/x-protobuf")
		_, _ = w.Write(out)
	case codes.ResourceExhausted:
		w.WriteHeader(http.StatusRequestEntityTooLarge)
	case codes.InvalidArgument:
		w.WriteHeader(http.StatusBadRequest)
	default:
		w.Header().Set("Retry-After", "1")
		w.WriteHeader(http.StatusServiceUnavailable)
	}
}

// records are all that were sent.
func (c *collector) records() (all []*logspb.LogRecord) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.requests {
		for _, rl := range r.ResourceLogs {
			for _, sl := range rl.ScopeLogs {
				all = append(all, sl.LogRecords...)
			}
		}
	}
	return all
}

// overBoth runs a test over both protocols.
func overBoth(t *testing.T, test func(t *testing.T, c *collector, o telemetry.OTLP)) {
	t.Run("grpc", func(t *testing.T) {
		c := &collector{}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		g := grpc.NewServer()
		collogs.RegisterLogsServiceServer(g, c)
		var serving sync.WaitGroup
		serving.Go(func() { _ = g.Serve(l) })
		t.Cleanup(func() { g.Stop(); serving.Wait() })
		test(t, c, telemetry.OTLP{Endpoint: l.Addr().String(), Insecure: true, Gzip: true, Headers: map[string]string{"X-Token": "t0ken"}})
	})
	t.Run("http", func(t *testing.T) {
		c := &collector{}
		s := httptest.NewServer(c)
		t.Cleanup(s.Close)
		test(t, c, telemetry.OTLP{Endpoint: s.URL + "/base", Protocol: telemetry.HTTP, Gzip: true, Headers: map[string]string{"X-Token": "t0ken"}})
	})
}

func newRecords(t *testing.T, o telemetry.OTLP) *telemetry.Records {
	t.Helper()
	r, err := telemetry.NewRecords(o, resource.NewSchemaless(attribute.String("service.name", "gatehouse")))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

const (
	aTrace = "4bf92f3577b34da6a3ce929d0e0e4736"
	aSpan  = "00f067aa0ba902b7"
)

func event(i int) *decisionlog.Event {
	return &decisionlog.Event{
		DecisionID: fmt.Sprint("d", i), TraceID: aTrace, SpanID: aSpan, Path: "envoy/authz/allow", Outcome: "denied",
		Timestamp: time.Unix(1_700_000_000, 5), Result: ast.Boolean(false),
		Bundles: []decisionlog.Bundle{{Name: "policy", Revision: "r1"}},
		Input:   ast.MustParseTerm(`{"n": 12345678901234567890, "headers": {"authorization": "Bearer s3cret"}}`).Value,
	}
}

// logging runs a log that goes to the collector, and perhaps to others.
func logging(t *testing.T, r *telemetry.Records, others ...decisionlog.Sink) (*decisionlog.Logs, *decisionlog.Log) {
	t.Helper()
	work := schedule.New(1)
	logs := decisionlog.New(decisionlog.Config{Schedule: work, Redact: true, Exporter: r, Console: io.Discard})
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { work.Run(ctx) })
	running.Go(func() { logs.Run(ctx) })
	t.Cleanup(func() { stop(); running.Wait() })
	return logs, logs.Open(decisionlog.Settings{
		Tenant: "orders", Labels: map[string]string{"tenant": "orders"},
		Sinks:     append([]decisionlog.Sink{decisionlog.Records{}}, others...),
		Reporting: decisionlog.Reporting{MinDelay: time.Millisecond, MaxDelay: 2 * time.Millisecond},
	})
}

// settle drains logs and returns their books, which balance.
func settle(t *testing.T, logs *decisionlog.Logs, within time.Duration) decisionlog.Books {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	logs.Drain(ctx)
	b := logs.Books()
	dropped := uint64(0)
	for _, n := range b.Dropped {
		dropped += n
	}
	if b.Recorded != b.Delivered+dropped+b.Buffered || b.Buffered != 0 {
		t.Errorf("the books do not balance: %+v", b)
	}
	return b
}

// A decision arrives as one record: what it is found by as attributes, and the
// event as its body, with what is secret hidden.
func TestRecord(t *testing.T) {
	overBoth(t, func(t *testing.T, c *collector, o telemetry.OTLP) {
		logs, log := logging(t, newRecords(t, o))
		for i := range 3 {
			if err := log.Record(time.Time{}, event(i)); err != nil {
				t.Fatal(err)
			}
		}
		if b := settle(t, logs, 10*time.Second); b.Delivered != 3 {
			t.Errorf("books: got %+v", b)
		}
		all := c.records()
		if len(all) != 3 {
			t.Fatalf("got %d records, want 3", len(all))
		}
		r := all[0]
		if got := hex.EncodeToString(r.TraceId) + " " + hex.EncodeToString(r.SpanId); got != aTrace+" "+aSpan {
			t.Errorf("IDs: got %s", got)
		}
		if r.TimeUnixNano != 1_700_000_000_000_000_005 || r.ObservedTimeUnixNano == 0 || r.EventName != "gatehouse.decision" || r.SeverityText != "INFO" || r.SeverityNumber != 9 {
			t.Errorf("got %v", r)
		}
		attrs := map[string]string{}
		for _, a := range r.Attributes {
			attrs[a.Key] = a.Value.GetStringValue()
			for _, v := range a.Value.GetArrayValue().GetValues() {
				attrs[a.Key] += v.GetStringValue()
			}
		}
		want := map[string]string{
			"gatehouse.tenant": "orders", "gatehouse.decision.id": "d0", "gatehouse.decision.outcome": "denied",
			"gatehouse.entry_point": "envoy/authz/allow", "gatehouse.bundle.names": "policy", "gatehouse.bundle.revisions": "r1",
		}
		if fmt.Sprint(attrs) != fmt.Sprint(want) {
			t.Errorf("attributes: got %v, want %v", attrs, want)
		}
		body := r.Body.GetStringValue()
		if !json.Valid([]byte(body)) || strings.Contains(body, "s3cret") || !strings.Contains(body, `"n":12345678901234567890`) || !strings.Contains(body, `"decision_id":"d0"`) {
			t.Errorf("body: got %s", body)
		}
		if c.tokens[0] != "t0ken" {
			t.Errorf("header: got %q", c.tokens[0])
		}
		if got := c.requests[0].ResourceLogs[0].Resource.Attributes[0].String(); !strings.Contains(got, "gatehouse") {
			t.Errorf("resource: got %s", got)
		}
	})
}

// Each record that a collector refuses is counted, also where there is another
// sink that has it.
func TestRecordsRefusedInPart(t *testing.T) {
	overBoth(t, func(t *testing.T, c *collector, o telemetry.OTLP) {
		for name, others := range map[string][]decisionlog.Sink{"alone": nil, "beside the console": {decisionlog.Console{}}} {
			logs, log := logging(t, newRecords(t, o), others...)
			c.mu.Lock()
			c.answers = []func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error){
				func(req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
					n := int64(len(req.ResourceLogs[0].ScopeLogs[0].LogRecords))
					return &collogs.ExportLogsServiceResponse{PartialSuccess: &collogs.ExportLogsPartialSuccess{RejectedLogRecords: min(n, 2), ErrorMessage: "no"}}, nil
				}}
			c.hang = make(chan struct{})
			c.mu.Unlock()
			for i := range 5 {
				_ = log.Record(time.Time{}, event(i))
			}
			close(c.hang)
			b := settle(t, logs, 10*time.Second)
			if refused := b.Dropped["rejected"]; refused < 1 || refused > 2 || b.Delivered != 5-refused {
				t.Errorf("%s: got %+v, want what was refused counted, and the rest delivered", name, b)
			}
		}
	})
}

// What a collector does not take is sent again, in halves where it is too large,
// and given up where it is no good.
func TestRecordsSentAgain(t *testing.T) {
	overBoth(t, func(t *testing.T, c *collector, o telemetry.OTLP) {
		fail := func(code codes.Code) func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
			return func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
				return nil, status.Error(code, "of the collector")
			}
		}
		c.answers = append(c.answers, fail(codes.Unavailable), fail(codes.ResourceExhausted))
		logs, log := logging(t, newRecords(t, o))
		for i := range 4 {
			_ = log.Record(time.Time{}, event(i))
		}
		if b := settle(t, logs, 20*time.Second); b.Delivered != 4 {
			t.Errorf("got %+v, want all delivered in the end", b)
		}
		for range 10 {
			c.answers = append(c.answers, fail(codes.InvalidArgument))
		}
		logs, log = logging(t, newRecords(t, o))
		_ = log.Record(time.Time{}, event(1))
		if b := settle(t, logs, 20*time.Second); b.Dropped["rejected"] != 1 {
			t.Errorf("got %+v, want one given up", b)
		}
	})
}

// A collector that takes what it is sent and says nothing holds nobody up for
// longer than its time, and what it was sent is not delivered.
func TestRecordsUnanswered(t *testing.T) {
	overBoth(t, func(t *testing.T, c *collector, o telemetry.OTLP) {
		c.hang = make(chan struct{})
		defer close(c.hang)
		o.Timeout = 50 * time.Millisecond
		r := newRecords(t, o)
		if _, err := r.Export(context.Background(), []decisionlog.Record{{Body: []byte("{}")}}); err == nil || strings.Contains(err.Error(), "t0ken") {
			t.Errorf("got %v, want an error", err)
		}
		logs, log := logging(t, r)
		_ = log.Record(time.Time{}, event(1))
		if b := settle(t, logs, 200*time.Millisecond); b.Dropped["shutdown"] != 1 {
			t.Errorf("got %+v, want it dropped at the end", b)
		}
	})
	// nobody listens
	r := newRecords(t, telemetry.OTLP{Endpoint: "127.0.0.1:1", Insecure: true, Headers: map[string]string{"authorization": "s3cret"}})
	if _, err := r.Export(context.Background(), []decisionlog.Record{{Body: []byte("{}")}}); err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("got %v, want an error", err)
	}
}

// A collector that asks to be left alone is.
func TestRecordsRetryInfo(t *testing.T) {
	overBoth(t, func(t *testing.T, c *collector, o telemetry.OTLP) {
		c.answers = append(c.answers, func(*collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
			s, err := status.New(codes.Unavailable, "busy").WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
			if err != nil {
				t.Error(err)
			}
			return nil, s.Err()
		})
		_, err := newRecords(t, o).Export(context.Background(), []decisionlog.Record{{Body: []byte("{}")}})
		if s, ok := errors.AsType[*decisionlog.StatusError](err); !ok || s.RetryAfter != time.Second {
			t.Errorf("got %v, want a second to wait", err)
		}
	})
}

package telemetry_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.opentelemetry.io/otel/trace"

	"github.com/gatehouse-authz/gatehouse/telemetry"
)

// lines is what is logged.
type lines struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func start(t *testing.T, c telemetry.Config) *telemetry.Telemetry {
	t.Helper()
	c.Traces, c.Sampling, c.ControlSampling = true, 1, 1
	tele, err := telemetry.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return tele
}

// record ends n spans.
func record(t *testing.T, tracer trace.Tracer, n int) {
	t.Helper()
	for range n {
		_, span := tracer.Start(context.Background(), "decision")
		if !span.IsRecording() {
			t.Fatal("it is not recorded")
		}
		span.End()
	}
}

// silent is a listener that accepts and says nothing.
func silent(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	t.Cleanup(func() { l.Close(); open.Wait() })
	open.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				_, _ = io.Copy(io.Discard, c)
				c.Close()
			})
		}
	})
	return l.Addr().String()
}

// away is an address where nobody listens.
func away(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// A collector that says nothing, or is away, costs no goroutine for what is
// recorded meanwhile, and what does not fit into the queue is dropped. In the end
// nothing is left.
func TestIllCollector(t *testing.T) {
	for name, endpoint := range map[string]func(*testing.T) string{"silent": silent, "away": away} {
		for _, protocol := range []string{telemetry.GRPC, telemetry.HTTP} {
			t.Run(name+" "+protocol, func(t *testing.T) {
				before := runtime.NumGoroutine()
				log := new(lines)
				registry := prometheus.NewRegistry()
				tele := start(t, telemetry.Config{
					OTLP: telemetry.OTLP{Endpoint: endpoint(t), Protocol: protocol, Insecure: true, Headers: map[string]string{"authorization": "Bearer hunter2"},
						Timeout: 200 * time.Millisecond},
					Metrics: true, Interval: 10 * time.Millisecond, Gatherer: registry, Registerer: registry,
					Logger: slog.New(slog.NewTextHandler(log, nil)),
				})
				record(t, tele.Decisions(), telemetry.QueueSpans) // and the first requests are sent
				eventually(t, "something is logged", func() bool { return strings.Contains(log.String(), "telemetry not sent") })
				warm := runtime.NumGoroutine()
				record(t, tele.Decisions(), 10*telemetry.QueueSpans)
				if n := runtime.NumGoroutine(); n > warm+8 { // those of connections come and go
					t.Errorf("got %d goroutines, %d before more was recorded", n, warm)
				}
				ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
				defer cancel()
				if err := tele.Shutdown(ctx); err == nil {
					t.Error("nothing was sent, and nothing said so")
				}
				if states := spanStates(t, registry); states["recorded"] != 11*telemetry.QueueSpans || states["sent"] != 0 {
					t.Errorf("got %v", states)
				}
				eventually(t, "all goroutines end", func() bool { return runtime.NumGoroutine() <= before+2 }) // of the listener
				if n := strings.Count(log.String(), "telemetry not sent"); n > 2 {
					t.Errorf("got %d lines logged", n)
				}
				if strings.Contains(log.String(), "hunter2") {
					t.Errorf("the log has the secret: %s", log)
				}
			})
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("never: %s", what)
		}
	}
}

// spanStates are the counts of spans by state.
func spanStates(t *testing.T, g prometheus.Gatherer) map[string]int {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	states := map[string]int{}
	for _, f := range families {
		if f.GetName() == "gatehouse_telemetry_spans_total" {
			for _, m := range f.GetMetric() {
				states[m.GetLabel()[0].GetValue()] = int(value(m))
			}
		}
	}
	return states
}

func value(m *dto.Metric) float64 { return m.GetCounter().GetValue() }

// A collector that refuses, and quotes the credentials: they are not logged.
func TestRefused(t *testing.T) {
	log := new(lines)
	paths := make(chan string, 16)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case paths <- r.URL.Path:
		default:
		}
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, "no: %v", r.Header)
	}))
	defer server.Close()
	tele := start(t, telemetry.Config{
		OTLP:   telemetry.OTLP{Endpoint: server.URL + "/tenant/1", Protocol: telemetry.HTTP, Headers: map[string]string{"authorization": "Bearer hunter2"}},
		Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	record(t, tele.Decisions(), 1)
	_ = tele.Shutdown(context.Background())
	if path := <-paths; path != "/tenant/1/v1/traces" {
		t.Errorf("got %s", path)
	}
	if text := log.String(); !strings.Contains(text, "telemetry not sent") || strings.Contains(text, "hunter2") {
		t.Errorf("got %s", text)
	}
}

// What is recorded before the end is sent by the end, to a collector that takes it.
func TestSentByTheEnd(t *testing.T) {
	for name, value := range map[string]string{ // what it says of the exporters is not for us
		"ENDPOINT": "http://127.0.0.1:1", "HEADERS": "x-env=1", "COMPRESSION": "none", "INSECURE": "false", "TRACES_ENDPOINT": "http://127.0.0.1:1/x",
		"CERTIFICATE": "/nonexistent", "TIMEOUT": "1",
	} {
		t.Setenv("OTEL_EXPORTER_OTLP_"+name, value)
	}
	got := make(chan *http.Request, 16)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r }))
	defer server.Close()
	registry := prometheus.NewRegistry()
	tele := start(t, telemetry.Config{
		OTLP:    telemetry.OTLP{Endpoint: server.URL, Protocol: telemetry.HTTP, Gzip: true, Headers: map[string]string{"x-key": "k"}},
		Metrics: true, Gatherer: registry, Registerer: registry,
	})
	record(t, tele.Decisions(), 3)
	record(t, tele.Control(), 2)
	if err := tele.Shutdown(context.Background()); err != nil {
		t.Fatal(err)
	}
	paths := map[string]bool{}
	for range 2 {
		r := <-got
		paths[r.URL.Path] = true
		if r.Header.Get("X-Env") != "" || r.Header.Get("X-Key") != "k" || r.Header.Get("Content-Encoding") != "gzip" || r.Header.Get("Content-Type") != "application/x-protobuf" {
			t.Errorf("%s: got %v", r.URL.Path, r.Header)
		}
	}
	if !paths["/v1/traces"] || !paths["/v1/metrics"] {
		t.Errorf("got %v", paths)
	}
	if states := spanStates(t, registry); states["recorded"] != 5 || states["sent"] != 5 || states["failed"] != 0 {
		t.Errorf("got %v", states)
	}
}

// What begins here is recorded as often as is said; a caller's word stands above.
func TestSampling(t *testing.T) {
	tele, err := telemetry.New(telemetry.Config{OTLP: telemetry.OTLP{Endpoint: away(t), Insecure: true}, Traces: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	defer func() { _ = tele.Shutdown(ctx) }()
	if tele.Control() != nil {
		t.Error("there are spans of the control plane, none are wanted")
	}
	if _, span := tele.Decisions().Start(context.Background(), "decision"); span.IsRecording() {
		t.Error("a trace was begun, none is wanted")
	}
	parent := func(flags trace.TraceFlags) context.Context {
		return trace.ContextWithRemoteSpanContext(context.Background(), trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceFlags: flags, Remote: true,
		}))
	}
	if _, span := tele.Decisions().Start(parent(trace.FlagsSampled), "decision"); !span.IsRecording() {
		t.Error("what the caller records is not recorded")
	}
	if _, span := tele.Decisions().Start(parent(0), "decision"); span.IsRecording() {
		t.Error("what the caller does not record is recorded")
	}
	if n := testing.AllocsPerRun(100, func() { tele.Decisions().Start(context.Background(), "decision") }); n > 1 {
		t.Errorf("a trace that is not begun costs %v allocations", n)
	}
}

// Off, there is nothing.
func TestOff(t *testing.T) {
	var tele *telemetry.Telemetry
	if tele.Decisions() != nil || tele.Control() != nil || tele.Shutdown(context.Background()) != nil {
		t.Error("there is something")
	}
}

func TestEndpoint(t *testing.T) {
	for _, o := range []telemetry.OTLP{
		{Endpoint: "collector:4317"},
		{Endpoint: "[::1]:4317", Insecure: true},
		{Endpoint: "http://collector:4317"},
		{Endpoint: "https://collector"},
		{Endpoint: "https://collector/otlp", Protocol: "http"},
		{Endpoint: "https://collector", TLS: &tls.Config{MinVersion: tls.VersionTLS13}},
	} {
		if err := o.Check(); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
	for want, o := range map[string]telemetry.OTLP{
		"endpoint is not host:port":                                        {Endpoint: "collector"},
		"endpoint is not host:port, http://host:port or https://host:port": {Endpoint: "collector:4317/x"},
		`scheme "ftp"`:                          {Endpoint: "ftp://collector:4317"},
		"credentials belong into headers":       {Endpoint: "https://user:hunter2@collector:4317"},
		"a query":                               {Endpoint: "https://collector:4317?token=hunter2"},
		"a path, which gRPC has not":            {Endpoint: "https://collector:4317/otlp"},
		`protocol "udp"`:                        {Endpoint: "collector:4317", Protocol: "udp"},
		"insecure is set":                       {Endpoint: "https://collector:4317", Insecure: true},
		"tls is set, and the endpoint is asked": {Endpoint: "http://collector:4317", TLS: &tls.Config{MinVersion: tls.VersionTLS13}},
	} {
		err := o.Check()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %s", o.Endpoint, err, want)
		} else if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error has the secret: %v", err)
		}
	}
}

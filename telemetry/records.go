package telemetry

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/sdk/resource"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/encoding/gzip" // requests may go compressed
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"go.opentelemetry.io/otel/attribute"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
)

// Records sends decisions as log records: one request for each Export, and no
// other attempt, since who exports keeps the records until they are taken. It
// speaks OTLP itself and not by the SDK's exporters of logs: these tell nobody how
// many records a collector has refused, and a decision log's books count each.
//
// The body of a record is the event's JSON as a string. It is what other sinks
// have, byte for byte: numbers keep their digits, and a collector makes a map of it
// with ParseJSON where it wants one.
type Records struct {
	target   target
	resource *resourcepb.Resource
	secrets  *strings.Replacer

	conn   *grpc.ClientConn // over gRPC
	logs   collogs.LogsServiceClient
	client *http.Client // over HTTP
	url    string
}

var _ decisionlog.Exporter = (*Records)(nil)

// eventName is that of each record.
const eventName = "gatehouse.decision"

// The bounds of an answer.
const (
	maxAnswer     = 64 << 10 // bytes
	maxRetryAfter = 10 * time.Minute
)

// NewRecords returns what sends records of r. It asks nobody before there are some.
func NewRecords(o OTLP, r *resource.Resource) (*Records, error) {
	t, err := o.target()
	if err != nil {
		return nil, err
	}
	rec := &Records{target: t, resource: &resourcepb.Resource{}}
	for _, a := range r.Attributes() {
		rec.resource.Attributes = append(rec.resource.Attributes, &commonpb.KeyValue{Key: string(a.Key), Value: valueOf(a.Value)})
	}
	var pairs []string
	for _, s := range o.secrets() {
		pairs = append(pairs, s, "***")
	}
	rec.secrets = strings.NewReplacer(pairs...)
	if t.Protocol == HTTP {
		scheme := "https"
		if t.plain {
			scheme = "http"
		}
		rec.client, rec.url = t.client(), scheme+"://"+t.host+t.path+"/v1/logs"
		return rec, nil
	}
	security := insecure.NewCredentials()
	if !t.plain {
		security = credentials.NewTLS(t.secure())
	}
	call := []grpc.CallOption{grpc.MaxCallRecvMsgSize(maxAnswer)}
	if t.Gzip {
		call = append(call, grpc.UseCompressor("gzip"))
	}
	rec.conn, err = grpc.NewClient("passthrough:///"+t.host, noProxy,
		grpc.WithTransportCredentials(security),
		grpc.WithUserAgent("gatehouse"),
		grpc.WithDefaultCallOptions(call...),
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 2, Jitter: .2, MaxDelay: retryMost},
			MinConnectTimeout: dialTime,
		}),
	)
	if err != nil {
		return nil, err
	}
	rec.logs = collogs.NewLogsServiceClient(rec.conn)
	return rec, nil
}

// valueOf is an attribute of the resource: those are strings, or written as such.
func valueOf(v attribute.Value) *commonpb.AnyValue { return text(v.String()) }

func text(s string) *commonpb.AnyValue {
	return &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: s}}
}

// Close ends the connections. Nothing may be exported after it.
func (r *Records) Close() error {
	if r == nil {
		return nil
	}
	if r.client != nil {
		r.client.CloseIdleConnections()
		return nil
	}
	return r.conn.Close()
}

// Export implements decisionlog.Exporter.
func (r *Records) Export(ctx context.Context, records []decisionlog.Record) (rejected int, err error) {
	ctx, cancel := context.WithTimeout(ctx, r.target.timeout)
	defer cancel()
	req := &collogs.ExportLogsServiceRequest{ResourceLogs: []*logspb.ResourceLogs{{
		Resource: r.resource,
		ScopeLogs: []*logspb.ScopeLogs{{
			Scope:      &commonpb.InstrumentationScope{Name: scope},
			LogRecords: make([]*logspb.LogRecord, len(records)),
		}},
	}}}
	now := uint64(time.Now().UnixNano())
	for i := range records {
		req.ResourceLogs[0].ScopeLogs[0].LogRecords[i] = recordOf(&records[i], now)
	}
	var resp *collogs.ExportLogsServiceResponse
	if r.client != nil {
		resp, err = r.post(ctx, req)
	} else {
		resp, err = r.call(ctx, req)
	}
	if err != nil {
		return 0, err
	}
	n := resp.GetPartialSuccess().GetRejectedLogRecords()
	return int(min(max(n, 0), int64(len(records)))), nil
}

// severities are those of records, by outcome; of faults it is that of a warning.
var severities = map[string]logspb.SeverityNumber{
	"allowed": logspb.SeverityNumber_SEVERITY_NUMBER_INFO,
	"denied":  logspb.SeverityNumber_SEVERITY_NUMBER_INFO,
}

// recordOf returns a record as OTLP has it. IDs that are not those of a trace are
// left out.
func recordOf(d *decisionlog.Record, now uint64) *logspb.LogRecord {
	r := &logspb.LogRecord{
		TimeUnixNano: uint64(d.Time.UnixNano()), ObservedTimeUnixNano: now,
		SeverityNumber: logspb.SeverityNumber_SEVERITY_NUMBER_WARN, SeverityText: "WARN",
		EventName: eventName, Body: text(strings.ToValidUTF8(string(d.Body), "\uFFFD")),
	}
	if s, ok := severities[d.Outcome]; ok {
		r.SeverityNumber, r.SeverityText = s, "INFO"
	}
	if id, err := hex.DecodeString(d.TraceID); err == nil && len(id) == 16 {
		r.TraceId = id
		if id, err := hex.DecodeString(d.SpanID); err == nil && len(id) == 8 {
			r.SpanId = id
		}
	}
	add := func(key, value string) {
		if value != "" {
			r.Attributes = append(r.Attributes, &commonpb.KeyValue{Key: key, Value: text(strings.ToValidUTF8(value, "\uFFFD"))})
		}
	}
	add("gatehouse.tenant", d.Tenant)
	add("gatehouse.decision.id", d.DecisionID)
	add("gatehouse.decision.batch_id", d.BatchDecisionID)
	add("gatehouse.decision.outcome", d.Outcome)
	add("gatehouse.entry_point", d.Path)
	if len(d.Bundles) > 0 {
		names, revisions := &commonpb.ArrayValue{}, &commonpb.ArrayValue{}
		for _, b := range d.Bundles {
			names.Values, revisions.Values = append(names.Values, text(b.Name)), append(revisions.Values, text(b.Revision))
		}
		for key, list := range map[string]*commonpb.ArrayValue{"gatehouse.bundle.names": names, "gatehouse.bundle.revisions": revisions} {
			r.Attributes = append(r.Attributes, &commonpb.KeyValue{Key: key, Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_ArrayValue{ArrayValue: list}}})
		}
	}
	return r
}

// call sends over gRPC.
func (r *Records) call(ctx context.Context, req *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
	if len(r.target.Headers) > 0 {
		ctx = metadata.NewOutgoingContext(ctx, metadata.New(r.target.Headers))
	}
	resp, err := r.logs.Export(ctx, req)
	if err == nil {
		return resp, nil
	}
	s := status.Convert(err)
	shown := fmt.Errorf("sending records: the collector says %s", s.Code())
	if s.Code() == codes.Unavailable { // it may be away, and then the text is ours
		shown = fmt.Errorf("sending records: %s", r.shown(s.Message()))
	}
	if answer := answerOf(s); answer != nil {
		return nil, fmt.Errorf("%w: %w", shown, answer)
	}
	return nil, shown
}

// answerOf is what an error of a collector means for the records, as a status of
// HTTP (https://opentelemetry.io/docs/specs/otlp/#failures). Nil: no more than
// that they are to be sent again.
func answerOf(s *status.Status) *decisionlog.StatusError {
	var wait time.Duration
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.RetryInfo); ok {
			wait = min(max(info.GetRetryDelay().AsDuration(), 0), maxRetryAfter)
		}
	}
	switch {
	case s.Code() == codes.InvalidArgument:
		return &decisionlog.StatusError{Code: http.StatusBadRequest}
	case s.Code() == codes.ResourceExhausted && wait == 0: // the message is larger than it takes
		return &decisionlog.StatusError{Code: http.StatusRequestEntityTooLarge}
	case s.Code() == codes.ResourceExhausted:
		return &decisionlog.StatusError{Code: http.StatusTooManyRequests, RetryAfter: wait}
	case wait > 0:
		return &decisionlog.StatusError{Code: http.StatusServiceUnavailable, RetryAfter: wait}
	}
	return nil
}

// shown is an error's text as it may be logged.
func (r *Records) shown(text string) string {
	text = r.secrets.Replace(text)
	return strings.ToValidUTF8(text[:min(len(text), maxErrorText)], "")
}

// post sends over HTTP.
func (r *Records) post(ctx context.Context, message *collogs.ExportLogsServiceRequest) (*collogs.ExportLogsServiceResponse, error) {
	body, err := proto.Marshal(message)
	if err != nil {
		return nil, fmt.Errorf("sending records: %w", err)
	}
	if r.target.Gzip {
		var b bytes.Buffer
		w := gzip.NewWriter(&b) // writing to memory does not fail
		_, _ = w.Write(body)
		_ = w.Close()
		body = b.Bytes()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.url, bytes.NewReader(body))
	if err != nil {
		return nil, errors.New("sending records: the endpoint is not a URL")
	}
	for name, value := range r.target.Headers {
		req.Header.Set(name, value)
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	req.Header.Set("User-Agent", "gatehouse")
	if r.target.Gzip {
		req.Header.Set("Content-Encoding", "gzip")
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("sending records: %s", r.shown(err.Error()))
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if resp.StatusCode < 200 || resp.StatusCode >= 300 {
		return nil, &decisionlog.StatusError{Code: resp.StatusCode, RetryAfter: retryAfter(resp.Header.Get("Retry-After"))}
	}
	if err != nil || len(answer) > maxAnswer {
		return nil, errors.New("sending records: the answer cannot be read")
	}
	out := new(collogs.ExportLogsServiceResponse)
	if kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type")); kind != "application/x-protobuf" {
		return out, nil // it was taken; whether in part was not said
	}
	if err := proto.Unmarshal(answer, out); err != nil {
		return nil, errors.New("sending records: the answer is not one of OTLP")
	}
	return out, nil
}

// retryAfter reads a Retry-After header, in seconds or as a date.
func retryAfter(value string) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseInt(value, 10, 64); err == nil {
		d = time.Duration(min(max(seconds, 0), int64(maxRetryAfter/time.Second))) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = time.Until(at)
	}
	return min(max(d, 0), maxRetryAfter)
}

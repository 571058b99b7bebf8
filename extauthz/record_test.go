package extauthz

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net/netip"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/schedule"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// keptInput is the input of a question as an event has it.
type keptInput struct {
	tenants.Recorded
	needs  tenants.Needs
	writes bool // it wrote itself
}

func (r *keptInput) Value() (ast.Value, error) { return r.Input(r.needs) }

func (r *keptInput) Write(w decisionlog.Writer) bool {
	r.writes = r.WriteInput(w, r.needs)
	return r.writes
}

// compareRecorded checks that an input that writes itself into an event makes the
// event that its value makes, with and without secrets, or writes nothing where it
// has no value.
func compareRecorded(t testing.TB, input tenants.Recorded, needs tenants.Needs) {
	t.Helper()
	value, err := input.Input(needs)
	for _, redact := range []bool{false, true} {
		logs := decisionlog.New(decisionlog.Config{Redact: redact, Schedule: schedule.New(0)})
		own := &keptInput{Recorded: input, needs: needs}
		memories := []*decisionlog.Memory{
			{Event: decisionlog.Event{DecisionID: "d", Document: own}},
			{Event: decisionlog.Event{DecisionID: "d", Input: value}},
		}
		var texts [][]byte
		var faults []error
		if err := logs.Show(context.Background(), memories, nil, time.Second, func(s decisionlog.Shown, err error) bool {
			texts, faults = append(texts, s.JSON), append(faults, err)
			return true
		}); err != nil {
			t.Fatal(err)
		}
		switch {
		case err != nil && (own.writes || faults[0] == nil):
			t.Fatalf("%v: was written: %s", err, texts[0])
		case err == nil && (!own.writes || faults[0] != nil || !bytes.Equal(texts[0], texts[1])):
			t.Fatalf("redact %t: wrote %t, %v:\ngot  %s\nwant %s", redact, own.writes, faults[0], texts[0], texts[1])
		}
	}
}

// compareRecords compares what is recorded of a message, if it is one.
func compareRecords(t testing.TB, data []byte, descriptors map[string]*Descriptors) (taken bool) {
	t.Helper()
	c := &check{descriptors: descriptors}
	if c.decode(string(data)) != nil {
		return false
	}
	for _, id := range []string{"", "id"} {
		c.question[0].DecisionID = id
		for _, needs := range []tenants.Needs{
			{All: true, BodyBytes: 1 << 20},
			{All: true, BodyBytes: 1 << 20, SkipBody: true},
			{All: true, BodyBytes: 1 << 20, ProtoDescriptor: exampleFile},
			{All: true, BodyBytes: 2},
		} {
			compareRecorded(t, c, needs)
		}
	}
	return true
}

// secretRequests have secrets wherever a request can have one.
func secretRequests(t testing.TB) (all [][]byte) {
	t.Helper()
	filter, err := structpb.NewStruct(map[string]any{
		"headers": map[string]any{"Cookie": "SECRET", "x": []any{map[string]any{"key": "authorization", "value": "SECRET", "values": []any{1.5}}}},
		"header":  map[string]any{"name": "x-api-key", "raw_value": nil}, "authorization": map[string]any{"role": "plain"}, "n": 1e100,
	})
	if err != nil {
		t.Fatal(err)
	}
	metadata := &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"a": filter, openPolicyAgent: filter, "source": {Fields: map[string]*structpb.Value{"certificate": structpb.NewStringValue("SECRET")}}}}
	for _, req := range []*authv3.CheckRequest{
		{Attributes: &authv3.AttributeContext{
			Source:               &authv3.AttributeContext_Peer{Certificate: "SECRET", Principal: "p", Service: "s", Labels: map[string]string{"b": "2", "a": "1", "cookie": "SECRET"}},
			Destination:          &authv3.AttributeContext_Peer{Certificate: "SECRET", Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/p"}}}},
			ContextExtensions:    map[string]string{"authorization": "SECRET", "z": "", "tenant": "orders"},
			MetadataContext:      metadata,
			RouteMetadataContext: metadata,
			TlsSession:           &authv3.AttributeContext_TLSSession{Sni: "a.example.com"},
			Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
				Method: "POST", Path: "/a%2Fb/%ff?x=1&x=%ff&a=%fe&%ff=1&%fe=2&cookie=plain&y", Size: -1, RawBody: []byte("\xff\x00"), Fragment: "f", Query: "q",
				Headers: map[string]string{"cookie": "SECRET", "Authorization": "SECRET", "x-amz-date": "SECRET", "x-\"\\\n": "\u2028<é>", "": "", "content-type": "application/json", "content-length": "100"},
				HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
					{Key: "Cookie", RawValue: []byte("SECRET\xff")}, {Key: "x", Value: "plain"}, {Key: "set-cookie", Value: "SECRET", RawValue: []byte("SECRET")},
				}},
			}},
		}},
		{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Path: "//a//b/", Body: `{"headers": {"cookie": "SECRET"}, "a": [1.50, 1e3, {"key": "cookie", "value": "SECRET"}], "": null}`,
			Headers: map[string]string{"content-type": "application/json"},
		}}}},
		{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			Path: "/", Body: "cookie=SECRET&cookie=SECRET&b=2&%ff=x", Headers: map[string]string{"content-type": "application/x-www-form-urlencoded"},
		}}}},
		{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: &authv3.AttributeContext_HttpRequest{
			HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{{Key: "Cookie", Value: "SECRET"}, {Key: "cookie", RawValue: []byte("SECRET")}}},
		}}}},
		{Attributes: &authv3.AttributeContext{MetadataContext: &corev3.Metadata{}, RouteMetadataContext: &corev3.Metadata{}, Source: &authv3.AttributeContext_Peer{}}},
		{},
	} {
		data, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, data)
	}
	return all
}

// TestKeptInput: what is recorded of a check is its input document, without making
// it.
func TestKeptInput(t *testing.T) {
	descriptors := exampleDescriptors(t)
	for _, data := range secretRequests(t) {
		if !compareRecords(t, data, descriptors) {
			t.Errorf("%x is no message", data)
		}
	}
	for _, req := range recordedRequests(t) {
		data, err := proto.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		compareRecords(t, data, descriptors)
	}
	taken := 0
	for seed := range uint64(2000) {
		p := pieces{rand.New(rand.NewPCG(seed, 2)), false}
		if compareRecords(t, p.message((*authv3.CheckRequest)(nil).ProtoReflect().Descriptor(), 0), descriptors) {
			taken++
		}
	}
	if taken < 1000 {
		t.Errorf("%d messages were taken", taken)
	}
}

// TestKeptRequest is TestKeptInput for a request that no Envoy describes.
func TestKeptRequest(t *testing.T) {
	s, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*Request{
		{},
		{Path: "\xff"},
		{Path: "/%"},
		{
			ID: "7", Method: "POST", Path: "//a%2Fb?x=1&a=2", Host: "shop.example.com", Scheme: "https", Protocol: "HTTP/2",
			Headers:     []policy.Header{{Name: "X-Tag", Value: "t\xffwo"}, {Name: "cookie", Value: "SECRET"}, {Name: "content-type", Value: "application/json"}},
			Body:        []byte(`{"a": 1}`),
			Source:      netip.MustParseAddrPort("[::ffff:203.0.113.9]:4711"),
			Destination: netip.MustParseAddrPort("10.0.0.1:443"),
			Principal:   "spiffe://example.org/alice", Context: map[string]string{"k": "v", "a": "b"},
		},
	} {
		input := s.Input(r, "id-1").(tenants.Recorded)
		compareRecorded(t, input, tenants.Needs{All: true, BodyBytes: 1 << 20})
		if input.Weight() < int64(len(r.Body)) {
			t.Errorf("weighs %d", input.Weight())
		}
	}
}

// TestWeight: a check weighs what it takes, as far as that is known.
func TestWeight(t *testing.T) {
	if size := int64(reflect.TypeFor[check]().Size()); size > sizeCheck || size < sizeCheck/2 {
		t.Errorf("a check takes %d bytes, %d are counted", size, sizeCheck)
	}
	c := new(check)
	data, err := proto.Marshal(benchmarkRequest())
	if err != nil {
		t.Fatal(err)
	}
	if err := c.decode(string(data)); err != nil {
		t.Fatal(err)
	}
	if w := c.asked.weight(); w != 0 {
		t.Errorf("of what most messages have, %d bytes are counted beside the text", w)
	}
	labels := c.asked
	labels.source.labels = make(pairs, 100)
	labels.metadata = namespaces{true, &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{"a": {Fields: map[string]*structpb.Value{"b": structpb.NewStringValue("c")}}}}}
	if w := labels.weight(); w < 100*int64(reflect.TypeFor[pair]().Size())+int64(proto.Size(labels.metadata.message)) {
		t.Errorf("100 labels and metadata are counted as %d bytes", w)
	}
}

// TestParameters: a query string is read as net/url reads it.
func TestParameters(t *testing.T) {
	for _, query := range []string{
		"", "a", "a=", "=a", "&&a=1&", "a=1&b=2&a=3", "b=%41+c&a=%2b", "%zz", "a=%", "a;b", "a=1;b=2&c", "%ff=%fe&%ff", "a==1", "a=1&%61=2&a=3",
		strings.Repeat("b=1&a=2&", 10), strings.Repeat("a&", 20) + "%", strings.Repeat("a&", 20_000),
	} {
		var q queryValues
		ok := q.parse(query)
		want, err := url.ParseQuery(query)
		if ok != (err == nil) {
			t.Errorf("%.40q: got %t, want %v", query, ok, err)
		}
		if !ok {
			continue
		}
		got := url.Values{}
		for i, p := range q.list {
			if i > 0 && p.key < q.list[i-1].key {
				t.Errorf("%.40q: %q comes after %q", query, p.key, q.list[i-1].key)
			}
			got.Add(p.key, p.value)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%.40q: got %v, want %v", query, got, want)
		}
	}
}

func FuzzKeptInput(f *testing.F) {
	for _, data := range secretRequests(f) {
		f.Add(data)
	}
	for _, req := range recordedRequests(f) {
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	descriptors := exampleDescriptors(f)
	f.Fuzz(func(t *testing.T, data []byte) { compareRecords(t, data, descriptors) })
}

// BenchmarkKeptInput makes the JSON of an event with its input: as the input writes
// itself, and by its value.
func BenchmarkKeptInput(b *testing.B) {
	data, err := proto.Marshal(benchmarkRequest())
	if err != nil {
		b.Fatal(err)
	}
	needs := tenants.Needs{All: true, BodyBytes: 1 << 20}
	c := new(check)
	if err := c.decode(string(data)); err != nil {
		b.Fatal(err)
	}
	c.question[0].DecisionID = "3b1a2f0c-1f8c-4c5c-9d2d-7f1c1f9e2a11"
	logs := decisionlog.New(decisionlog.Config{Redact: true, Schedule: schedule.New(0)})
	const n = 100 // events at once
	for _, written := range []bool{true, false} {
		b.Run(map[bool]string{true: "written", false: "value"}[written], func(b *testing.B) {
			memories := make([]*decisionlog.Memory, n)
			b.ReportAllocs()
			for b.Loop() {
				for i := range memories {
					e := decisionlog.Event{DecisionID: "d", Document: &keptInput{Recorded: c, needs: needs}}
					if !written {
						e = decisionlog.Event{DecisionID: "d"}
						if e.Input, err = c.Input(needs); err != nil {
							b.Fatal(err)
						}
					}
					memories[i] = &decisionlog.Memory{Event: e}
				}
				if err := logs.Show(context.Background(), memories, nil, time.Second, func(decisionlog.Shown, error) bool { return true }); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/event")
		})
	}
}

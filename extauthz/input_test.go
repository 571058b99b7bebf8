package extauthz

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

var everything = tenants.Needs{All: true, BodyBytes: 1 << 20}

// request makes a CheckRequest from protobuf-JSON.
func request(t testing.TB, text string) *authv3.CheckRequest {
	t.Helper()
	req := new(authv3.CheckRequest)
	if err := protojson.Unmarshal([]byte(text), req); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return req
}

// httpRequest makes a CheckRequest of an HTTP request.
func httpRequest(http *authv3.AttributeContext_HttpRequest) *authv3.CheckRequest {
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{Request: &authv3.AttributeContext_Request{Http: http}}}
}

// withBody makes a CheckRequest with a body.
func withBody(contentType, body string) *authv3.CheckRequest {
	return httpRequest(&authv3.AttributeContext_HttpRequest{
		Headers: map[string]string{"content-type": contentType},
		Body:    body,
	})
}

// mustInput returns the input of a request without a decision ID.
func mustInput(t testing.TB, req *authv3.CheckRequest) ast.Value {
	t.Helper()
	v, err := inputOf(askedOf(req), "", everything, nil)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// at returns the value at a path of keys in a document, nil where there is none.
func at(v ast.Value, path ...string) ast.Value {
	for _, key := range path {
		object, ok := v.(ast.Object)
		if !ok {
			return nil
		}
		term := object.Get(ast.StringTerm(key))
		if term == nil {
			return nil
		}
		v = term.Value
	}
	return v
}

// checkAt checks one value of a document against Rego text; "" is none.
func checkAt(t testing.TB, doc ast.Value, want string, path ...string) {
	t.Helper()
	got := at(doc, path...)
	if want == "" {
		if got != nil {
			t.Errorf("%s: got %v, want none", strings.Join(path, "."), got)
		}
		return
	}
	if got == nil || got.Compare(ast.MustParseTerm(want).Value) != 0 {
		t.Errorf("%s: got %v, want %s", strings.Join(path, "."), got, want)
	}
}

func refused(t testing.TB, req *authv3.CheckRequest, want error) {
	t.Helper()
	if _, err := inputOf(askedOf(req), "", everything, nil); !errors.Is(err, want) {
		t.Errorf("%v: got %v, want %v", req, err, want)
	}
}

// TestEmptyRequest: a check of a network filter has no HTTP request, and one of
// a test may have nothing at all.
func TestEmptyRequest(t *testing.T) {
	v := mustInput(t, &authv3.CheckRequest{})
	want := `{"parsed_body": null, "parsed_path": [""], "parsed_query": {}, "truncated_body": false,
		"version": {"encoding": "protojson", "ext_authz": "v3"}}`
	checkAt(t, v, want)
}

// TestJSONContentTypes: a JSON body is recognised in any spelling, and "+json"
// is JSON, but messages of gRPC are never.
func TestJSONContentTypes(t *testing.T) {
	for _, contentType := range []string{
		"application/json", "application/json; charset=utf-8", "application/json-patch+json",
		"Application/JSON", "APPLICATION/JSON;charset=UTF-8",
		"application/problem+json", "application/vnd.api+json; version=1", "Application/LD+JSON ;x=y", "text/x+json",
	} {
		checkAt(t, mustInput(t, withBody(contentType, `{"a":1}`)), `{"a": 1}`, "parsed_body")
	}
	for _, contentType := range []string{
		"", "text/plain", "text/json", "application/grpc", "application/grpc+json", "Application/gRPC+JSON", "application/grpc-web+json",
		"application/xml; x=+json", "Application/X-WWW-Form-Urlencoded", "Multipart/Form-Data; boundary=x",
	} {
		checkAt(t, mustInput(t, withBody(contentType, `{"a":1}`)), `null`, "parsed_body")
	}
	part := func(contentType string) string {
		return "--x\r\nContent-Disposition: form-data; name=a\r\nContent-Type: " + contentType + "\r\n\r\n{\"b\":1}\r\n--x--\r\n"
	}
	for contentType, want := range map[string]string{
		"application/json":      `{"a": [{"b": 1}]}`,
		"Application/Json":      `{"a": [{"b": 1}]}`,
		"application/x+json":    `{"a": [{"b": 1}]}`,
		"text/plain":            `{"a": ["{\"b\":1}"]}`,
		"application/grpc+json": `{"a": ["{\"b\":1}"]}`,
	} {
		checkAt(t, mustInput(t, withBody("multipart/form-data; boundary=x", part(contentType))), want, "parsed_body")
	}
}

func TestDuplicateKeys(t *testing.T) {
	refused(t, withBody("application/json", `{"a":1,"a":2}`), policy.ErrDuplicateKey)
	refused(t, withBody("application/json", `{"a":1,"a":2}`), tenants.ErrInvalid)
	refused(t, withBody("multipart/form-data; boundary=x",
		"--x\r\nContent-Disposition: form-data; name=a\r\nContent-Type: application/json\r\n\r\n{\"b\":1,\"b\":1}\r\n--x--\r\n"), tenants.ErrInvalid)
}

func TestPaths(t *testing.T) {
	for path, want := range map[string]string{
		"/a/b": `["a", "b"]`, "//a": `["a"]`, "///a//b/": `["a", "", "b", ""]`, "/a/./b": `["a", ".", "b"]`,
		"/..;/a": `["..;", "a"]`, "/...": `["..."]`, "/a%252e%252e/b": `["a%2e%2e", "b"]`, "/%252e%252e/b": `["%2e%2e", "b"]`,
		"/a\\b": `["a\\b"]`, "/a%5Cb": `["a\\b"]`, "/a;v=1": `["a;v=1"]`, "/a#b": `["a#b"]`, "/a?/../b": `["a"]`,
		"/%2F%2Fa": `["a"]`, "/ä": `["ä"]`, "http://h/p": `["http:", "", "h", "p"]`,
		"/" + strings.Repeat("a", 32<<10): `["` + strings.Repeat("a", 32<<10) + `"]`,
	} {
		checkAt(t, mustInput(t, httpRequest(&authv3.AttributeContext_HttpRequest{Path: path})), want, "parsed_path")
	}
	// What is not UTF-8 stays as it is.
	v := mustInput(t, httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/%c0%ae?%ff=%fe"}))
	if got := at(v, "parsed_path").(*ast.Array).Elem(0).Value; got != ast.String("\xc0\xae") {
		t.Errorf("parsed_path: got %v", got)
	}
	if got := at(v, "parsed_query", "\xff"); got == nil {
		t.Errorf("parsed_query: got %v", at(v, "parsed_query"))
	}
}

// TestDotDotSegment: what a segment means depends on who reads the path.
func TestDotDotSegment(t *testing.T) {
	for _, path := range []string{"..", "/..", "/a/../b", "/a/..", "/%2e%2e/a", "/a%2F..%2Fb", "/a/.%2E?x=1", "//../a"} {
		refused(t, httpRequest(&authv3.AttributeContext_HttpRequest{Path: path}), tenants.ErrInvalid)
	}
}

func TestNULInPath(t *testing.T) {
	for _, path := range []string{"/%00", "/a%00b/c", "\x00"} {
		refused(t, httpRequest(&authv3.AttributeContext_HttpRequest{Path: path}), tenants.ErrInvalid)
	}
	checkAt(t, mustInput(t, httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/?a=%00"})), `{"a": ["\u0000"]}`, "parsed_query")
}

func TestManyParameters(t *testing.T) {
	refused(t, httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/?" + strings.Repeat("a&", 10_000)}), tenants.ErrInvalid)
	refused(t, withBody("application/x-www-form-urlencoded", strings.Repeat("a&", 10_000)), tenants.ErrInvalid)
}

// TestHeaderMap: encode_raw_headers fills headers too.
func TestHeaderMap(t *testing.T) {
	entry := func(key, value string) *corev3.HeaderValue { return &corev3.HeaderValue{Key: key, Value: value} }
	raw := func(key, value string) *corev3.HeaderValue {
		return &corev3.HeaderValue{Key: key, RawValue: []byte(value)}
	}
	http := &authv3.AttributeContext_HttpRequest{
		HeaderMap: &corev3.HeaderMap{Headers: []*corev3.HeaderValue{
			raw("Content-Type", "application/json"), entry("x-a", "1"), raw("X-A", "2"), raw("cookie", "a=1"), raw("cookie", "b=2"),
			{Key: "x-both", Value: "value", RawValue: []byte("raw")}, raw("x-latin", "caf\xe9 \xed\xa0\x80 ä"), raw("x-empty", ""), raw("x-empties", ""), raw("x-empties", ""),
		}},
		Body: "[1]",
	}
	v := mustInput(t, httpRequest(http))
	checkAt(t, v, `{"content-type": "application/json", "x-a": "1,2", "cookie": "a=1; b=2", "x-both": "raw",
		"x-latin": "caf! !!! ä", "x-empty": "", "x-empties": ","}`, "attributes", "request", "http", "headers")
	checkAt(t, v, `[1]`, "parsed_body")
	if got := at(v, "attributes", "request", "http", "headerMap", "headers").(*ast.Array).Len(); got != 10 {
		t.Errorf("headerMap has %d headers", got)
	}
	// Headers that are there are not touched.
	http.Headers = map[string]string{"x-a": "3"}
	v = mustInput(t, httpRequest(http))
	checkAt(t, v, `{"x-a": "3"}`, "attributes", "request", "http", "headers")
	checkAt(t, v, `null`, "parsed_body")
}

// TestDecisionIDInInput: it stands where Skipper has it.
func TestDecisionIDInInput(t *testing.T) {
	for text, want := range map[string]string{
		`{}`:                                     `{"filterMetadata": {"open_policy_agent": {"decision_id": "x"}}}`,
		`{"attributes": {}}`:                     `{"filterMetadata": {"open_policy_agent": {"decision_id": "x"}}}`,
		`{"attributes": {"metadataContext":{}}}`: `{"filterMetadata": {"open_policy_agent": {"decision_id": "x"}}}`,
		`{"attributes": {"metadataContext":{"filterMetadata":{"a":{"b":1}}}}}`:                                      `{"filterMetadata": {"a": {"b": 1}, "open_policy_agent": {"decision_id": "x"}}}`,
		`{"attributes": {"metadataContext":{"filterMetadata":{"open_policy_agent":{"a":1,"decision_id":"mine"}}}}}`: `{"filterMetadata": {"open_policy_agent": {"a": 1, "decision_id": "x"}}}`,
	} {
		v, err := inputOf(askedOf(request(t, text)), "x", everything, nil)
		if err != nil {
			t.Fatal(err)
		}
		checkAt(t, v, want, "attributes", "metadataContext")
	}
}

// TestLargeBody: a body over the bound is refused before anything is parsed.
// TestWholeBody: where the policy reads the body, and the tenant wants all of it
// or nothing (on_partial_body: deny).
func TestWholeBody(t *testing.T) {
	type headers = map[string]string
	for name, c := range map[string]struct {
		http    *authv3.AttributeContext_HttpRequest
		partial bool
	}{
		"no body":             {&authv3.AttributeContext_HttpRequest{}, false},
		"JSON":                {&authv3.AttributeContext_HttpRequest{Body: `{}`, Headers: headers{"content-type": "application/json", "content-length": "2"}}, false},
		"JSON null":           {&authv3.AttributeContext_HttpRequest{Body: `null`, Headers: headers{"content-type": "application/json"}}, false},
		"form":                {&authv3.AttributeContext_HttpRequest{Body: `a=1`, Headers: headers{"content-type": "application/x-www-form-urlencoded"}}, false},
		"cut by Envoy":        {&authv3.AttributeContext_HttpRequest{Body: `{}`, Headers: headers{"content-type": "application/json", "x-envoy-auth-partial-body": "true"}}, true},
		"cut, of no type":     {&authv3.AttributeContext_HttpRequest{Body: `{}`, Headers: headers{"x-envoy-auth-partial-body": "true"}}, true},
		"shorter than said":   {&authv3.AttributeContext_HttpRequest{Body: `{}`, Headers: headers{"content-type": "application/json", "content-length": "3"}}, true},
		"short, other type":   {&authv3.AttributeContext_HttpRequest{Body: `x`, Headers: headers{"content-type": "text/plain", "content-length": "3"}}, true},
		"not sent by Envoy":   {&authv3.AttributeContext_HttpRequest{Headers: headers{"content-type": "application/json", "content-length": "3"}}, true},
		"no type":             {&authv3.AttributeContext_HttpRequest{Body: `{}`}, true},
		"another type":        {&authv3.AttributeContext_HttpRequest{RawBody: []byte(`x`), Headers: headers{"content-type": "text/plain"}}, true},
		"gRPC, no descriptor": {&authv3.AttributeContext_HttpRequest{RawBody: []byte{0, 0, 0, 0, 0}, Path: "/a/b", Headers: headers{"content-type": "application/grpc"}}, true},
		"form, no boundary":   {&authv3.AttributeContext_HttpRequest{Body: `x`, Headers: headers{"content-type": "multipart/form-data"}}, true},
	} {
		for _, whole := range []bool{false, true} {
			needs := everything
			needs.WholeBody = whole
			_, err := inputOf(askedOf(httpRequest(c.http)), "", needs, nil)
			if got, want := errors.Is(err, tenants.ErrPartialBody), c.partial && whole; got != want || !want && err != nil {
				t.Errorf("%s, whole %t: got %v, want it refused: %t", name, whole, err, want)
			}
		}
	}
}

func TestLargeBody(t *testing.T) {
	needs := tenants.Needs{All: true, BodyBytes: 10}
	large := strings.Repeat("x", 11)
	for _, http := range []*authv3.AttributeContext_HttpRequest{
		{Body: large}, {RawBody: []byte(large)}, {Body: large, Path: "/a%"},
		{Body: "x", RawBody: []byte(large)}, {Body: large, Headers: map[string]string{"content-type": "text/plain"}},
	} {
		for _, skip := range []bool{false, true} {
			needs.SkipBody = skip
			if _, err := inputOf(askedOf(httpRequest(http)), "", needs, nil); !errors.Is(err, tenants.ErrTooLarge) {
				t.Errorf("%v: got %v, want ErrTooLarge", http, err)
			}
		}
	}
	if _, err := inputOf(askedOf(httpRequest(&authv3.AttributeContext_HttpRequest{Body: large[1:]})), "", needs, nil); err != nil {
		t.Error(err)
	}
}

func TestForms(t *testing.T) {
	for _, c := range []struct{ contentType, body, want string }{
		{"application/x-www-form-urlencoded", "a=1&a=2&b", `{"a": ["1", "2"], "b": [""]}`},
		{"application/x-www-form-urlencoded", "a=%ff%fe&%ff=1", `{"a": ["\ufffd\ufffd"], "\ufffd": ["1"]}`},
		// Names that are one once they are UTF-8: the one that sorts last counts.
		{"application/x-www-form-urlencoded", "%80=1&%EF%BF%BD=2&%EF%BF%BD=3", `{"\ufffd": ["2", "3"]}`},
		{"application/x-www-form-urlencoded", "%ff=1&%EF%BF%BD=2&a=b", `{"\ufffd": ["1"], "a": ["b"]}`},
		{"multipart/form-data", "--x--\r\n", `null`},
		{"multipart/form-data; boundary=x", "--x--\r\n", `{}`},
		{"multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data; name=f; filename=a\r\n\r\n\xff\r\n--x--\r\n", `{"f": ["\ufffd"]}`},
	} {
		http := &authv3.AttributeContext_HttpRequest{Headers: map[string]string{"content-type": c.contentType}, RawBody: []byte(c.body)}
		checkAt(t, mustInput(t, httpRequest(http)), c.want, "parsed_body")
	}
}

func grpcRequest(t testing.TB, path string, m proto.Message) *authv3.CheckRequest {
	t.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	frame := append([]byte{0, 0, 0, byte(len(data) >> 8), byte(len(data))}, data...)
	return httpRequest(&authv3.AttributeContext_HttpRequest{
		Path: path, Headers: map[string]string{"content-type": "application/grpc"}, RawBody: frame,
	})
}

// registration is a message as example.proto has it, with an Any.
func registration(t testing.TB, extra *anypb.Any) proto.Message {
	t.Helper()
	d, err := newDescriptors(exampleSet())
	if err != nil {
		t.Fatal(err)
	}
	mt, err := d.types.FindMessageByName("Example.Test.GRPC.Registration")
	if err != nil {
		t.Fatal(err)
	}
	m := mt.New()
	m.Set(mt.Descriptor().Fields().ByName("Extra"), protoreflect.ValueOfMessage(extra.ProtoReflect()))
	return m.Interface()
}

// TestAnyInBody: the type of an Any may be one of the descriptor set.
func TestAnyInBody(t *testing.T) {
	const path = "/Example.Test.GRPC.ProtoServiceIExampleApplication/RegisterExample"
	needs := tenants.Needs{All: true, BodyBytes: 1 << 20, ProtoDescriptor: exampleFile}
	descriptors := exampleDescriptors(t)
	for _, c := range []struct {
		any  *anypb.Any
		want string
	}{
		{&anypb.Any{TypeUrl: "type.googleapis.com/com.book.GetBookRequest", Value: []byte{8, 42}},
			`{"@type": "type.googleapis.com/com.book.GetBookRequest", "isbn": "42"}`},
		{&anypb.Any{TypeUrl: "type.googleapis.com/google.protobuf.StringValue", Value: []byte{10, 1, 'a'}},
			`{"@type": "type.googleapis.com/google.protobuf.StringValue", "value": "a"}`},
		{&anypb.Any{TypeUrl: "type.googleapis.com/google.protobuf.Struct"}, // built in
			`{"@type": "type.googleapis.com/google.protobuf.Struct", "value": {}}`},
	} {
		v, err := inputOf(askedOf(grpcRequest(t, path, registration(t, c.any))), "", needs, descriptors)
		if err != nil {
			t.Fatal(err)
		}
		checkAt(t, v, c.want, "parsed_body", "Extra")
	}

	unknown := &anypb.Any{TypeUrl: "type.googleapis.com/no.such.Type"}
	if _, err := inputOf(askedOf(grpcRequest(t, path, registration(t, unknown))), "", needs, descriptors); !errors.Is(err, tenants.ErrInvalid) {
		t.Errorf("unknown type: got %v", err)
	}
	nested := new(anypb.Any)
	for range maxAny + 1 {
		var err error
		if nested, err = anypb.New(nested); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := inputOf(askedOf(grpcRequest(t, path, registration(t, nested))), "", needs, descriptors); !errors.Is(err, tenants.ErrInvalid) {
		t.Errorf("nested: got %v", err)
	}
	// A file that nobody has loaded is no fault of the request.
	needs.ProtoDescriptor = "other.pb"
	if _, err := inputOf(askedOf(grpcRequest(t, path, registration(t, unknown))), "", needs, descriptors); err == nil || errors.Is(err, tenants.ErrInvalid) {
		t.Errorf("descriptors not loaded: got %v", err)
	}
}

// full sets each field of a message, and of the messages in it, in turn to each
// of some values.
func full(m protoreflect.Message, variant int) {
	if s, ok := m.Interface().(*structpb.Struct); ok {
		example, err := structpb.NewStruct(map[string]any{
			"s": "x", "n": 1.5, "i": 1e21, "small": 7.0, "b": true, "z": nil, "l": []any{1.0, map[string]any{"k": "v"}}, "o": map[string]any{"decision_id": "y"},
		})
		if err != nil {
			panic(err)
		}
		proto.Merge(s, example)
		return
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if o := fd.ContainingOneof(); o != nil && i%o.Fields().Len() != variant%o.Fields().Len() && m.WhichOneof(o) != nil {
			continue
		}
		switch {
		case fd.IsMap():
			mp := m.Mutable(fd).Map()
			for _, k := range []string{"a", "open_policy_agent", ":path"} {
				v := mp.NewValue()
				if fd.MapValue().Message() != nil {
					full(v.Message(), variant)
				} else {
					v = scalar(fd.MapValue(), variant)
				}
				mp.Set(protoreflect.ValueOfString(k).MapKey(), v)
			}
		case fd.IsList():
			list := m.Mutable(fd).List()
			for range 2 {
				full(list.AppendMutable().Message(), variant)
			}
		case fd.Message() != nil:
			full(m.Mutable(fd).Message(), variant)
		default:
			m.Set(fd, scalar(fd, variant))
		}
	}
}

func scalar(fd protoreflect.FieldDescriptor, variant int) protoreflect.Value {
	n := []int64{0, 1, -1, 600, 1 << 30}[variant%5]
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString([]string{"", "x", "/ä", "true", "GET"}[variant%5])
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{0, 1, byte(variant)}[:variant%4%3])
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(variant%2 == 1)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(n))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(n << 20)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(n))
	}
	panic(fmt.Sprint("no value for ", fd.FullName()))
}

// TestEveryField sets each field that a CheckRequest can have: the functions of
// attributes.go know them all, and give what message does.
func TestEveryField(t *testing.T) {
	for variant := range 60 {
		req := new(authv3.CheckRequest)
		full(req.ProtoReflect(), variant)
		compareWalk(t, req)
	}
	// Messages that are there and empty.
	for _, text := range []string{
		`{"attributes":{"source":{},"destination":{"address":{}},"request":{},"metadataContext":{},"routeMetadataContext":{},"tlsSession":{}}}`,
		`{"attributes":{"source":{"address":{"socketAddress":{}}},"request":{"time":"1970-01-01T00:00:00Z","http":{"headerMap":{}}},"metadataContext":{"filterMetadata":{"a":{}},"typedFilterMetadata":{"b":{}}}}}`,
		`{"attributes":{"source":{"address":{"socketAddress":{"portValue":0}}},"destination":{"address":{"socketAddress":{"namedPort":""}}}}}`,
		`{"attributes":{"source":{"address":{"pipe":{"mode":420}}},"destination":{"address":{"envoyInternalAddress":{"serverListenerName":"x"}}}}}`,
	} {
		compareWalk(t, request(t, text))
	}
}

// compareWalk checks that both ways to walk a request give one document.
func compareWalk(t testing.TB, req *authv3.CheckRequest) {
	t.Helper()
	a := req.GetAttributes()
	if a == nil {
		return
	}
	var generic, own termMaker
	want := generic.message(a.ProtoReflect()).Value
	got := own.attributes(askedOf(req), pairsOf(a.GetRequest().GetHttp().GetHeaders()), "").Value
	if got.Compare(want) != 0 || got.Hash() != want.Hash() || got.String() != want.String() {
		t.Fatalf("%v:\ngot  %v\nwant %v", req, got, want)
	}
}

func seedRequests(f *testing.F) {
	for variant := range 5 {
		req := new(authv3.CheckRequest)
		full(req.ProtoReflect(), variant)
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	typed, err := anypb.New(wrapperspb.String("hi"))
	if err != nil {
		f.Fatal(err)
	}
	for _, req := range []*authv3.CheckRequest{
		withBody("application/json", `{"a":[1]}`), benchmarkRequest(),
		{Attributes: &authv3.AttributeContext{MetadataContext: &corev3.Metadata{TypedFilterMetadata: map[string]*anypb.Any{"t": typed}}}},
	} {
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
}

func FuzzInput(f *testing.F) {
	seedRequests(f)
	descriptors := exampleDescriptors(f)
	needs := tenants.Needs{All: true, BodyBytes: 1 << 20, ProtoDescriptor: exampleFile}
	f.Fuzz(func(t *testing.T, data []byte) {
		req := new(authv3.CheckRequest)
		if proto.Unmarshal(data, req) != nil {
			return
		}
		compareWalk(t, req)
		v, err := inputOf(askedOf(req), "id", needs, descriptors)
		if err != nil {
			if !errors.Is(err, tenants.ErrInvalid) && !errors.Is(err, tenants.ErrTooLarge) {
				t.Fatalf("%v: %v", req, err)
			}
			return
		}
		if at(v, "attributes", "metadataContext", "filterMetadata", "open_policy_agent", "decision_id") != ast.String("id") {
			t.Fatalf("no decision ID in %v", v)
		}
		if _, err := ast.JSON(v); err != nil {
			t.Fatal(err)
		}
	})
}

func FuzzPath(f *testing.F) {
	for _, path := range []string{"", "/", "//a", "/a%2Fb?c=d%20e+f&c", "/a?b=1;c", "/a%", "/%00", "/a/%2e%2E", "/%ff?%ff=%fe", "/??&&="} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		v, err := inputOf(askedOf(httpRequest(&authv3.AttributeContext_HttpRequest{Path: path})), "", everything, nil)
		if err != nil && !errors.Is(err, tenants.ErrInvalid) {
			t.Fatal(err)
		}
		raw, query, _ := strings.Cut(path, "?")
		decoded, pathErr := url.PathUnescape(raw)
		values, queryErr := url.ParseQuery(query)
		segments := strings.Split(strings.TrimLeft(decoded, "/"), "/")
		bad := pathErr != nil || queryErr != nil || strings.Contains(decoded, "\x00") || slices.Contains(segments, "..")
		if bad != (err != nil) {
			t.Fatalf("%q: got error %v, want %v", path, err, bad)
		}
		if bad {
			return
		}
		want := ast.MustInterfaceToValue(map[string]any{"path": segments, "query": maps.Collect(lists(values))})
		got := ast.NewObject(ast.Item(ast.StringTerm("path"), ast.NewTerm(at(v, "parsed_path"))), ast.Item(ast.StringTerm("query"), ast.NewTerm(at(v, "parsed_query"))))
		if got.Compare(want) != 0 {
			t.Fatalf("%q: got %v, want %v", path, got, want)
		}
	})
}

func lists(values url.Values) func(func(string, any) bool) {
	return func(yield func(string, any) bool) {
		for k, v := range values {
			if !yield(k, v) {
				return
			}
		}
	}
}

func FuzzBody(f *testing.F) {
	f.Add("application/json", `{"a":[1,"x"]}`, false)
	f.Add("application/problem+json", `{"a":1,"a":2}`, true)
	f.Add("application/x-www-form-urlencoded", "a=1&b=%ff", false)
	f.Add("multipart/form-data; boundary=x", "--x\r\nContent-Disposition: form-data; name=a\r\n\r\n1\r\n--x--\r\n", false)
	f.Add("application/grpc", "\x00\x00\x00\x00\x02\x08\x2a", true)
	descriptors := exampleDescriptors(f)
	needs := tenants.Needs{All: true, BodyBytes: 1 << 20, ProtoDescriptor: exampleFile}
	f.Fuzz(func(t *testing.T, contentType, body string, raw bool) {
		http := &authv3.AttributeContext_HttpRequest{
			Path: "/com.book.BookService/GetBook", Headers: map[string]string{"content-type": contentType},
		}
		if raw {
			http.RawBody = []byte(body)
		} else {
			http.Body = body
		}
		v, err := inputOf(askedOf(httpRequest(http)), "", needs, descriptors)
		if err != nil {
			if !errors.Is(err, tenants.ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		parsed := at(v, "parsed_body")
		if parsed == nil || at(v, "truncated_body") == nil {
			t.Fatalf("got %v", v)
		}
		// A body that is read has been through JSON: what it holds is UTF-8.
		x, err := ast.JSON(parsed)
		if err != nil {
			t.Fatal(err)
		}
		text, err := json.Marshal(x)
		if err != nil {
			t.Fatal(err)
		}
		again, err := policy.ParseJSON(text, nil)
		if err != nil || again.Compare(parsed) != 0 {
			t.Fatalf("%v became %v, %v", parsed, again, err)
		}
	})
}

// benchmarkRequest is a request with 14 headers, as Envoy sends it.
func benchmarkRequest() *authv3.CheckRequest {
	peer := func(address string, port uint32) *authv3.AttributeContext_Peer {
		return &authv3.AttributeContext_Peer{Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: address, PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
		}}}}
	}
	return &authv3.CheckRequest{Attributes: &authv3.AttributeContext{
		Source:      peer("10.1.2.3", 43210),
		Destination: peer("10.4.5.6", 8080),
		Request: &authv3.AttributeContext_Request{
			Time: &timestamppb.Timestamp{Seconds: 1767225600, Nanos: 123456000},
			Http: &authv3.AttributeContext_HttpRequest{
				Id: "13359530607844510314", Method: "GET", Path: "/api/v1/orders/17?expand=items", Host: "orders.example.com",
				Scheme: "https", Protocol: "HTTP/1.1", Size: -1,
				Headers: map[string]string{
					":authority": "orders.example.com", ":method": "GET", ":path": "/api/v1/orders/17?expand=items", ":scheme": "https",
					"accept": "*/*", "accept-encoding": "gzip, deflate, br", "accept-language": "en-GB,en;q=0.9",
					"authorization":     "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJl",
					"user-agent":        "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36",
					"x-forwarded-for":   "192.0.2.7",
					"x-forwarded-proto": "https", "x-request-id": "0f0a7d6e-5f7d-4a4e-9c55-9a3f0e6f2a11",
					"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "cookie": "session=abc; theme=dark",
				},
			},
		},
		ContextExtensions:    map[string]string{"tenant": "orders"},
		MetadataContext:      &corev3.Metadata{},
		RouteMetadataContext: &corev3.Metadata{},
	}}
}

func BenchmarkInput(b *testing.B) {
	a := askedOf(benchmarkRequest())
	b.ReportAllocs()
	for b.Loop() {
		if _, err := inputOf(a, "6ba7b810-9dad-41d1-80b4-00c04fd430c8", everything, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDecode reads a message as Envoy sends it, and as protobuf does.
func BenchmarkDecode(b *testing.B) {
	data, err := proto.Marshal(benchmarkRequest())
	if err != nil {
		b.Fatal(err)
	}
	b.Run("own", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := new(check).decode(textOf(mem.BufferSlice{mem.SliceBuffer(data)})); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("protobuf", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := proto.Unmarshal(data, new(authv3.CheckRequest)); err != nil {
				b.Fatal(err)
			}
		}
	})
}

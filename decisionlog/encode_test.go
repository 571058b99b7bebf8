package decisionlog

import (
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/plugins/logs"
	"github.com/open-policy-agent/opa/v1/util"
)

func value(t testing.TB, text string) ast.Value {
	t.Helper()
	v, err := ast.ParseTerm(text)
	if err != nil {
		t.Fatal(err)
	}
	return v.Value
}

func parse(t testing.TB, text []byte) any {
	t.Helper()
	var v any
	if err := util.UnmarshalJSON(text, &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}

// opaError is an error as those of OPA's evaluator are.
type opaError struct {
	Code     string        `json:"code"`
	Message  string        `json:"message"`
	Location *ast.Location `json:"location,omitempty"`
}

func (e *opaError) Error() string { return e.Code + ": " + e.Message }

// messageError is an error as those of opa-envoy-plugin are.
type messageError struct {
	Message string `json:"message"`
}

func (e messageError) Error() string { return e.Message }

// twins are an event and the same event of OPA.
type twins struct {
	name  string
	event Event
	opa   logs.EventV1
}

func allTwins(t *testing.T) []twins {
	at := time.Date(2026, 2, 3, 4, 5, 6, 700, time.FixedZone("", 3600))
	input := `{"attributes": {"request": {"http": {"headers": {"x": "<&>\u2028\"\\\t\u0001", "é": "\u00e9"}}}}, "n": [1, 2.50, 1e100, -0], "b": [true, false, null], "e": {}, "f": []}`
	anyOf := func(text string) *any { v := parse(t, []byte(text)); return &v }
	valueOf := func(text string) ast.Value { return ast.MustInterfaceToValue(parse(t, []byte(text))) }
	null := any(nil)
	labels := map[string]string{"id": "x", "app": `a"b`}
	return []twins{
		{"empty", Event{}, logs.EventV1{}},
		{
			"all",
			Event{
				DecisionID: "d", BatchDecisionID: "b", TraceID: "t", SpanID: "s", Path: "envoy/authz/allow", Query: "data.x",
				RequestedBy: "1.2.3.4:5", RequestID: 18446744073709551615, Timestamp: at,
				Bundles: []Bundle{{"z", "r1"}, {"a", ""}}, Input: valueOf(input), Result: valueOf(`{"allowed": true, "headers": {"a": "b"}}`),
				NDBuiltinCache: valueOf(`{"time.now_ns": {"[]": 1}}`).(ast.Object),
				RuleLabels:     []ast.Value{valueOf(`{"severity": "high", "n": 1}`), valueOf(`{}`)},
				Error:          &opaError{"eval_internal_error", "no <good>", &ast.Location{File: "f.rego", Row: 1, Col: 2}},
				Headers:        map[string][]string{"X-A": {"1", "2"}, "X-B": {"3"}},
				ServerHandler:  1234, QueryEval: 99, Metrics: []Metric{{"counter_a", -1}, {"timer_z_ns", 1}},
				Batch: &Batch{Key: "k", Index: 3, Size: 7}, Custom: valueOf(`{"guard": true}`).(ast.Object),
			},
			logs.EventV1{
				Labels: labels, DecisionID: "d", BatchDecisionID: "b", TraceID: "t", SpanID: "s", Path: "envoy/authz/allow", Query: "data.x",
				RequestedBy: "1.2.3.4:5", RequestID: 18446744073709551615, Timestamp: at,
				Bundles: map[string]logs.BundleInfoV1{"z": {Revision: "r1"}, "a": {}}, Input: anyOf(input), Result: anyOf(`{"allowed": true, "headers": {"a": "b"}}`),
				NDBuiltinCache: anyOf(`{"time.now_ns": {"[]": 1}}`),
				RuleLabels:     []map[string]any{{"severity": "high", "n": 1}, {}},
				Error:          &opaError{"eval_internal_error", "no <good>", &ast.Location{File: "f.rego", Row: 1, Col: 2}},
				RequestContext: &logs.RequestContext{HTTPRequest: &logs.HTTPRequestContext{Headers: map[string][]string{"X-A": {"1", "2"}, "X-B": {"3"}}}},
				Metrics:        map[string]any{"timer_server_handler_ns": int64(1234), "timer_rego_query_eval_ns": int64(99), "counter_a": -1, "timer_z_ns": 1},
				Custom:         map[string]any{"guard": true, "batch": map[string]any{"key": "k", "index": 3, "size": 7}},
			},
		},
		{
			"null input, plain error",
			Event{DecisionID: "d", Input: ast.NullValue, Timestamp: at.UTC(), Error: errors.New("bad")},
			logs.EventV1{Labels: labels, DecisionID: "d", Input: &null, Timestamp: at.UTC(), Error: messageError{"bad"}},
		},
		{
			"result of sets and numbers as keys",
			Event{DecisionID: "d", Result: value(t, `{1: {"b", "a"}, [2]: {3: {4}}}`), Timestamp: at},
			logs.EventV1{Labels: labels, DecisionID: "d", Result: anyOf(`{"1": ["a", "b"], "[2]": {"3": [4]}}`), Timestamp: at},
		},
	}
}

func (w twins) labels() map[string]string { return w.opa.Labels }

func TestEventIsOPAs(t *testing.T) {
	e := newEncoder()
	for _, test := range allTwins(t) {
		want, err := json.Marshal(test.opa)
		if err != nil {
			t.Fatal(err)
		}
		for _, hide := range []bool{false, true} {
			c := newConstants(test.labels())
			for range 2 { // the second time with what the first left
				e.reset(hide)
				p := parts{input: test.event.Input, result: test.event.Result}
				if nd := test.event.NDBuiltinCache; nd != nil {
					p.ndCache = nd
				}
				e.event(&test.event, &p, &c)
				if e.err != nil {
					t.Fatal(e.err)
				}
				if got, want := parse(t, e.buf), parse(t, want); !reflect.DeepEqual(got, want) {
					t.Errorf("%s: got\n%s, want\n%s", test.name, e.buf, want)
				}
			}
		}
	}
}

func TestFilterSeesWhatOPAsSees(t *testing.T) {
	e := newEncoder()
	for _, test := range allTwins(t) {
		want, err := test.opa.AST()
		if err != nil {
			t.Fatal(err)
		}
		got, err := test.event.value(test.labels(), e)
		if err != nil {
			t.Fatal(err)
		}
		if got.Compare(want) != 0 {
			t.Errorf("%s: got\n%v, want\n%v", test.name, got, want)
		}
	}
}

func TestConsoleLine(t *testing.T) {
	e := newEncoder()
	e.reset(false)
	c := newConstants(map[string]string{"tenant": "orders"})
	at := time.Date(2026, 2, 3, 4, 5, 6, 7, time.FixedZone("", 3600))
	event := Event{DecisionID: "d", Timestamp: at, Error: errors.New("bad"), ServerHandler: 5, Bundles: []Bundle{{"b", "1"}}}
	e.consoleLine(&event, &parts{input: ast.NullValue}, &c, at)
	want := `{"bundles":{"b":{"revision":"1"}},"decision_id":"d","error":"bad","input":null,"labels":{"tenant":"orders"},"level":"info",
		"metrics":{"timer_server_handler_ns":5},"msg":"Decision Log","time":"2026-02-03T04:05:06+01:00","timestamp":"2026-02-03T03:05:06.000000007Z",
		"type":"openpolicyagent.org/decision_logs"}`
	if got, want := parse(t, e.buf), parse(t, []byte(want)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %s", e.buf)
	}
}

func TestEncodingErrors(t *testing.T) {
	for _, v := range []ast.Value{ast.Number("1x"), ast.Number("NaN"), ast.Number("01"), ast.Number("-"), ast.Var("x"), ast.NewArray(ast.RefTerm(ast.VarTerm("x")))} {
		e := newEncoder()
		e.reset(true)
		if e.value(v); e.err == nil {
			t.Errorf("%v: got %s, want an error", v, e.buf)
		}
	}
}

func TestErrorObject(t *testing.T) {
	inner := &opaError{Code: "c", Message: "m"}
	for _, test := range []struct {
		err  error
		want string
	}{
		{errors.New(`x "y"`), `{"message":"x \"y\""}`},
		{inner, `{"code":"c","message":"m"}`},
		{errors.Join(errors.New("other"), inner), `{"code":"c","message":"m"}`},
		{&json.UnsupportedValueError{Str: "s"}, `{"message":"json: unsupported value: s"}`},
	} {
		if got := string(errorJSON(test.err)); got != test.want {
			t.Errorf("%v: got %s, want %s", test.err, got, test.want)
		}
	}
}

// FuzzEncode compares the encoder with encoding/json of what ast.JSON gives.
func FuzzEncode(f *testing.F) {
	for _, seed := range []string{
		`{"a": [1, -2.5e7, "x\"\\\u0000\u2028<>&"], "": {"b": null}}`, `["\ud800", "\u00e9", ""]`, `"\x7f"`, `0`, `{"a":{"a":{"a":[[[]]]}}}`,
	} {
		f.Add(seed, "k\xff")
	}
	f.Fuzz(func(t *testing.T, text, raw string) {
		var x any
		if util.UnmarshalJSON([]byte(text), &x) != nil {
			t.Skip()
		}
		v := ast.MustInterfaceToValue(x)
		v = ast.NewArray(ast.NewTerm(v), ast.StringTerm(raw), ast.ObjectTerm(ast.Item(ast.StringTerm(raw), ast.NewTerm(v))),
			ast.ObjectTerm(ast.Item(ast.ArrayTerm(ast.NewTerm(v)), ast.SetTerm(ast.NewTerm(v)))))
		native, err := ast.JSON(v)
		if err != nil {
			t.Skip()
		}
		want, err := json.Marshal(native)
		if err != nil {
			t.Skip() // a number out of range, which a parser lets pass
		}
		e := newEncoder()
		e.reset(false)
		e.value(v)
		if e.err != nil {
			t.Fatal(e.err)
		}
		// The key that is an array is text that has been escaped otherwise.
		if got, want := normal(t, e.buf), normal(t, want); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
		if got := e.jsonValue(v); !isJSON(got) {
			t.Errorf("%v is no JSON", got)
		}
	})
}

// normal writes a JSON text in one way, the texts in keys included.
func normal(t *testing.T, text []byte) string {
	var write func(x any) string
	write = func(x any) string {
		switch x := x.(type) {
		case []any:
			var all []string
			for _, y := range x {
				all = append(all, write(y))
			}
			return "[" + strings.Join(all, ",") + "]"
		case map[string]any:
			fixed := map[string]string{}
			for k, y := range x {
				var key any
				if strings.HasPrefix(k, "[") && util.UnmarshalJSON([]byte(k), &key) == nil {
					k = write(key)
				}
				fixed[k] = write(y)
			}
			out, _ := json.Marshal(fixed)
			return string(out)
		}
		out, _ := json.Marshal(x)
		return string(out)
	}
	return write(parse(t, text))
}

// BenchmarkEncode writes a typical event of ext_authz.
func BenchmarkEncode(b *testing.B) {
	input := value(b, `{"attributes": {"request": {"http": {
		"headers": {":authority": "example.com", ":method": "GET", ":path": "/orders/7?x=1", ":scheme": "https", "accept": "*/*", "accept-encoding": "gzip",
			"authorization": "Bearer abcdefghijklmnopqrstuvwxyz", "cookie": "session=1234567890", "content-type": "application/json", "user-agent": "curl/8.0",
			"x-envoy-internal": "true", "x-forwarded-for": "10.0.0.1", "x-forwarded-proto": "https", "x-request-id": "3b1a2f0c-1f8c-4c5c-9d2d-7f1c1f9e2a11"},
		"host": "example.com", "id": "1234567890", "method": "GET", "path": "/orders/7?x=1", "protocol": "HTTP/1.1", "scheme": "https", "size": "0"},
		"time": "2026-02-03T04:05:06Z"},
		"source": {"address": {"socketAddress": {"address": "10.0.0.1", "portValue": 4711}}},
		"destination": {"address": {"socketAddress": {"address": "10.0.0.2", "portValue": 8080}}}, "contextExtensions": {"tenant": "orders"}},
		"parsed_path": ["orders", "7"], "parsed_query": {"x": ["1"]}, "truncated_body": false, "version": {"encoding": "protojson", "ext_authz": "v3"}}`)
	event := Event{
		DecisionID: "3b1a2f0c-1f8c-4c5c-9d2d-7f1c1f9e2a11", Path: "envoy/authz/allow", Timestamp: time.Now(), Bundles: []Bundle{{"policy", "r1"}},
		Input: input, Result: value(b, `{"allowed": true, "headers": {"x-user": "alice"}}`), ServerHandler: 1000, QueryEval: 500,
	}
	p := parts{input: event.Input, result: event.Result}
	c := newConstants(map[string]string{"app": "orders", "tenant": "orders"})
	for _, hide := range []bool{false, true} {
		b.Run(map[bool]string{false: "redact=none", true: "redact=default"}[hide], func(b *testing.B) {
			e := newEncoder()
			b.ReportAllocs()
			for b.Loop() {
				e.reset(hide)
				e.event(&event, &p, &c)
			}
			b.SetBytes(int64(len(e.buf)))
		})
	}
	b.Run("document", func(b *testing.B) {
		p := parts{document: written{input}, result: event.Result}
		e := newEncoder()
		b.ReportAllocs()
		for b.Loop() {
			e.reset(true)
			e.event(&event, &p, &c)
		}
		b.SetBytes(int64(len(e.buf)))
	})
	b.Run("compress", func(b *testing.B) {
		e := newEncoder()
		var g gathering
		for range 100 {
			e.reset(true)
			e.event(&event, &p, &c)
			g.add(e.buf, ',', nil)
		}
		size := 0
		b.ReportAllocs()
		for b.Loop() {
			size = len(compress(kindService, g.blocks))
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/100, "ns/event")
		b.ReportMetric(float64(size)/100, "bytes/event")
	})
}

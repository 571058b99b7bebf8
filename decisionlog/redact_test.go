package decisionlog

import (
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

// redacted encodes an event of these parts with secrets hidden, and returns it and
// what it lists as masked, sorted.
func redacted(t testing.TB, p parts, headers map[string][]string) (string, []string) {
	t.Helper()
	e := newEncoder()
	e.reset(true)
	c := newConstants(nil)
	e.event(&Event{Headers: headers}, &p, &c)
	if e.err != nil {
		t.Fatal(e.err)
	}
	var list []string
	if all, ok := parse(t, e.buf).(map[string]any)["masked"].([]any); ok {
		for _, s := range all {
			list = append(list, s.(string))
		}
	}
	slices.Sort(list)
	return string(e.buf), list
}

// TestRedact hides what has SECRET in it, and leaves what has plain.
func TestRedact(t *testing.T) {
	for _, test := range []struct {
		part, value string
		masked      []string
	}{
		{
			"input",
			`{"attributes": {"request": {"http": {"headers": {"authorization": "Bearer SECRET", "Cookie": "SECRET", "X-AMZ-Security-Token": "SECRET",
				"x-amz-date": "SECRET", "x-api-key": "SECRET", "x-forwarded-client-cert": "SECRET", "proxy-authorization": "SECRET", "x-amz-": "plain1", "x-other": "plain2", ":path": "/plain3"}}}}}`,
			[]string{
				"/input/attributes/request/http/headers/Cookie", "/input/attributes/request/http/headers/X-AMZ-Security-Token",
				"/input/attributes/request/http/headers/authorization", "/input/attributes/request/http/headers/proxy-authorization",
				"/input/attributes/request/http/headers/x-amz-date", "/input/attributes/request/http/headers/x-api-key",
				"/input/attributes/request/http/headers/x-forwarded-client-cert",
			},
		},
		{
			"input",
			`{"request": {"http": {"headerMap": {"headers": [{"key": "Authorization", "rawValue": "SECRET"}, {"key": "x", "value": "plain1"}, {"name": "cookie", "value": "SECRET"}]}}}}`,
			[]string{"/input/request/http/headerMap/headers/0/rawValue", "/input/request/http/headerMap/headers/2/value"},
		},
		{
			"input",
			`{"attributes": {"source": {"certificate": "SECRET", "principal": "plain1"}, "destination": {"certificate": "SECRET"}, "other": {"certificate": "plain2"}}}`,
			[]string{"/input/attributes/destination/certificate", "/input/attributes/source/certificate"},
		},
		{"input", `{"authorization": {"role": "plain1"}, "cookie": null, "x-api-key": true}`, nil},
		{"input", `{"headers": {"cookie": {"session": "SECRET"}, "authorization": ["SECRET"]}}`, []string{"/input/headers/authorization", "/input/headers/cookie"}},
		{"input", `[[{"set-cookie": ["SECRET", "SECRET"]}]]`, []string{"/input/0/0/set-cookie"}},
		{
			"result",
			`{"allowed": true, "headers": {"Authorization": "SECRET", "x": "plain1"}, "response_headers_to_add": [{"set-cookie": "SECRET"}, {"y": "plain2"},
				{"header": {"key": "Set-Cookie", "value": "SECRET"}}, {"key": "cookie", "values": ["SECRET"], "authorization": "SECRET"}]}`,
			[]string{
				"/result/headers/Authorization", "/result/response_headers_to_add/0/set-cookie", "/result/response_headers_to_add/2/header/value",
				"/result/response_headers_to_add/3/authorization", "/result/response_headers_to_add/3/values",
			},
		},
		{
			"nd_builtin_cache",
			`{"http.send": {
				[{"method": "GET", "url": "https://SECRET:SECRET@plain1.example.com/p?key=SECRET", "headers": {"Authorization": "SECRET", "x": "plain2"}, "body": {"a": "SECRET"}}]:
					{"status_code": 200, "body": {"access_token": "SECRET", "x": "plain3"}, "raw_body": "SECRET", "headers": {"set-cookie": ["SECRET"]}},
				[{"method": "GET", "url": "https://plain4.example.com/"}]: {"status_code": 200}}}`,
			[]string{`/nd_builtin_cache/http.send/%5B%7B%22body%22:%22%2A%2AREDACTED%2A%2A%22%2C%22headers%22:%7B%22Authorization%22:%22%2A%2AREDACTED%2A%2A%22%2C%22x%22:%22plain2%22%7D%2C%22method%22:%22GET%22%2C%22url%22:%22https:%2F%2Fplain1.example.com%2Fp%3F%2A%2AREDACTED%2A%2A%22%7D%5D`},
		},
		{
			"nd_builtin_cache",
			`{"io.jwt.decode_verify": {["SECRET1", {"secret": "SECRET"}]: [true, {"alg": "plain1"}, {"sub": "plain2"}], ["SECRET2", {"secret": "SECRET"}]: [false, {}, {}]},
				"io.jwt.encode_sign": {[{}, {}, {"k": "SECRET"}]: "SECRET"}, "opa.runtime": {[]: {"env": {"A": "SECRET"}, "config": {"labels": {"a": "plain3"}}}}, "time.now_ns": {[]: 7}}`,
			[]string{
				`/nd_builtin_cache/io.jwt.decode_verify/%5B%22%2A%2AREDACTED%2A%2A%22%5D`, `/nd_builtin_cache/io.jwt.decode_verify/%5B%22%2A%2AREDACTED%2A%2A%22%5D%202`,
				`/nd_builtin_cache/io.jwt.encode_sign/%5B%22%2A%2AREDACTED%2A%2A%22%5D`, `/nd_builtin_cache/opa.runtime/%5B%5D`,
			},
		},
		{"nd_builtin_cache", `{"http.send": {"[{\"headers\": {\"authorization\": \"SECRET\"}}]": {"raw_body": "SECRET"}}}`, []string{"/nd_builtin_cache/http.send/%2A%2AREDACTED%2A%2A"}},
	} {
		var p parts
		*p.named(test.part) = value(t, test.value)
		got, list := redacted(t, p, nil)
		if strings.Contains(got, "SECRET") {
			t.Errorf("%s %s: a secret is left in %s", test.part, test.value, got)
		}
		for _, word := range []string{"plain1", "plain2", "plain3", "plain4"} {
			if strings.Contains(test.value, word) && !strings.Contains(got, word) {
				t.Errorf("%s %s: %s is missing in %s", test.part, test.value, word, got)
			}
		}
		slices.Sort(test.masked)
		if !slices.Equal(list, test.masked) {
			t.Errorf("%s %s: masked\n%s, want\n%s", test.part, test.value, strings.Join(list, "\n"), strings.Join(test.masked, "\n"))
		}
	}
}

func TestRedactContext(t *testing.T) {
	got, list := redacted(t, parts{}, map[string][]string{"Cookie": {"SECRET"}, "X": {"plain"}})
	if strings.Contains(got, "SECRET") || !strings.Contains(got, "plain") {
		t.Errorf("got %s", got)
	}
	if want := []string{"/request_context/http/headers/Cookie"}; !slices.Equal(list, want) {
		t.Errorf("masked %q, want %q", list, want)
	}
}

// What a mask has done is not listed twice, and cannot bring a secret back.
func TestRedactAfterMask(t *testing.T) {
	p := parts{input: value(t, `{"headers": {"cookie": "SECRET"}}`)}
	rules, err := maskRules(value(t, `[{"op": "upsert", "path": "/input/headers/cookie", "value": "again SECRET"}]`))
	if err != nil {
		t.Fatal(err)
	}
	p.apply(rules, newEncoder())
	got, list := redacted(t, p, nil)
	if strings.Contains(got, "SECRET") || !slices.Equal(list, []string{"/input/headers/cookie"}) {
		t.Errorf("got %s", got)
	}
}

// Estimates of sizes are within a factor of two.
func TestSize(t *testing.T) {
	text := `{"attributes": {"headers": {"a": "bcdefghijkl", "accept": "text/html", "x": "yz"}, "list": [1, "xyz", {"b": {"c", "d"}}], "none": null}}`
	const n = 2000
	values := make([]ast.Value, n)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range values {
		values[i] = value(t, text)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	got, took := sizeOf(values[0]), int64(after.HeapAlloc-before.HeapAlloc)/n
	if got < took/2 || got > took*2 {
		t.Errorf("estimate is %d bytes, it takes %d", got, took)
	}
	runtime.KeepAlive(values)
}

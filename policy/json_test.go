package policy_test

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/policy"
)

func TestParseJSON(t *testing.T) {
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	for _, text := range []string{
		// accepted
		`null`, `true`, `false`, `0`, `-0`, `42`, `-1`, `1.0`, `1E2`, `1e+2`, `1e-2`, `1e400`, `513`,
		`123456789012345678901234567890.5`,
		`""`, `"a"`, `"ä€😀"`, `"\"\\\/\b\f\n\r\t"`, `"\u0041\u00e4\ud83d\ude00"`,
		`"\ud800"`, `"\ude00"`, `"\ud800\u0041"`, `"\ud800\ud800\udc00"`, `"\ud800x"`, `"\ud800\n"`,
		"\"\xff\xfe\"", "\"a\xc3\"", "\"\xed\xa0\x80\"", "\"\\n\xff\"", "\"\xc3\\u0041\"",
		`[]`, `[ ]`, `[1,[2,{"a":[]}],null]`, `{}`, `{ }`, `{"a":1,"b":{"c":[true,false]}}`,
		" \t\r\n{ \"a\" : [ 1 , 2 ] } \n", `{"":1}`, `{"a":{"a":{"a":1}}}`,
		`{"a":0,"b":1,"c":2,"d":3,"e":4,"f":5,"g":6,"h":7,"i":8,"j":9,"k":10,"l":11,"m":12,"n":13}`,
		deep(10000),
		// refused
		``, ` `, `nul`, `nulll`, `True`, `+1`, `01`, `-`, `1.`, `.5`, `1e`, `1e+`, `0x1`, `NaN`, `1 2`,
		`"`, `"\`, `"\u12`, `"\u12g4"`, `"\x"`, "\"\n\"", "\"\x00\"", "\"\\\n\"", `'a'`,
		`[`, `[1`, `[1,`, `[1,]`, `[,1]`, `[1 2]`, `[1}`, `{`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,}`, `{a:1}`, `{1:1}`,
		`{"a" 1}`, `{"a":1]`, `{"a":1} x`, `{"a":1}]`, "\ufeff{}", "a: 1", "// c\n1", `null null`,
		deep(10001), strings.Repeat("[", 1_000_000), strings.Repeat(`{"a":`, 20_000),
		"1e999999999", "1e-999999999",
	} {
		compareJSON(t, text)
	}
}

func TestParseJSONDuplicateKey(t *testing.T) {
	var many strings.Builder
	for i := range 1000 {
		many.WriteString(`,"` + strings.Repeat("k", i+1) + `":1`)
	}
	for _, text := range []string{
		`{"a":1,"a":2}`, `{"a":1,"\u0061":1}`, `[{"x":{"b":1,"a":1,"b":1}}]`, "{\"\xff\":1,\"\ufffd\":2}",
		`{"":1,"":1}`, `{"kkk":0` + many.String() + `}`,
	} {
		if _, err := policy.ParseJSON(text, nil); !errors.Is(err, policy.ErrDuplicateKey) {
			t.Errorf("ParseJSON(%.40q, nil) = %v, want ErrDuplicateKey", text, err)
		}
		compareJSON(t, text)
	}
	// One key in two objects is no duplicate.
	if _, err := policy.ParseJSON(`[{"a":1},{"a":{"a":1}}]`, nil); err != nil {
		t.Error(err)
	}
}

func TestParseJSONErrorQuotesNothing(t *testing.T) {
	for _, text := range []string{`{"secret": tru}`, `{"secret" 1}`, `{"secret":1,"secret":2}`, `"secret\q"`, `[1e999999999secret]`} {
		_, err := policy.ParseJSON(text, nil)
		if err == nil || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "999") {
			t.Errorf("ParseJSON(%q, nil) = %v", text, err)
		}
	}
}

func FuzzParseJSON(f *testing.F) {
	f.Add([]byte(`{"a":[1,-2.5e3,"x\u00e4\ud83d\ude00",null,true,{}],"b":{"a":"\ud800"}}`))
	f.Add([]byte("{\"a\xff\":\"\\n\xfe\", \"b\":[[]] } "))
	f.Add([]byte(`{"a":1,"a":2}`))
	f.Fuzz(func(t *testing.T, data []byte) { compareJSON(t, string(data)) })
}

// compareJSON checks that ParseJSON and encoding/json agree about text.
func compareJSON(t *testing.T, text string) {
	t.Helper()
	got, err := policy.ParseJSON(text, nil)
	fromBytes, errBytes := policy.ParseJSON([]byte(text), nil)
	if (err == nil) != (errBytes == nil) || err == nil && got.Compare(fromBytes) != 0 {
		t.Fatalf("%.80q: string gives %v, %v; bytes give %v, %v", text, got, err, fromBytes, errBytes)
	}
	if checked := policy.CheckJSON(text, nil); (checked == nil) != (err == nil) || err != nil && checked.Error() != err.Error() {
		t.Fatalf("%.80q: it is checked with %v, parsed with %v", text, checked, err)
	}
	if errors.Is(err, policy.ErrDuplicateKey) {
		return // the one difference
	}
	want, wantErr := standardJSON(text)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%.80q: got error %v, encoding/json gives %v", text, err, wantErr)
	}
	if err != nil {
		return
	}
	// Compare would take 1.0 for 1: the text shows the difference.
	if got.Compare(want) != 0 || got.Hash() != want.Hash() || got.String() != want.String() {
		t.Fatalf("%.80q: got %v, encoding/json gives %v", text, got, want)
	}
}

func standardJSON(text string) (ast.Value, error) {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var x any
	if err := d.Decode(&x); err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("more than one value")
	}
	return ast.InterfaceToValue(x)
}

// jsonBody is a body as an API has it.
const jsonBody = `{"user":{"id":"b5c1a1f2","name":"Ada Lovelace","roles":["admin","auditor"],"age":36,"active":true,"manager":null},
"items":[{"sku":"A-1","count":2,"price":19.95,"tags":["new","sale"]},{"sku":"B-22","count":1000,"price":5,"tags":[]}],
"note":"two\nlines","total":44.9}`

func BenchmarkParseJSON(b *testing.B) {
	b.Run("policy", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := policy.ParseJSON(jsonBody, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("check", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := policy.CheckJSON(jsonBody, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("encoding-json", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := standardJSON(jsonBody); err != nil {
				b.Fatal(err)
			}
		}
	})
}

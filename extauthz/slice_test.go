package extauthz

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
	"google.golang.org/protobuf/proto"

	authv3 "github.com/envoyproxy/go-control-plane/envoy/service/auth/v3"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// inputPaths are places in an input, and some where nothing ever is.
var inputPaths = []string{
	"version", "version.encoding", "parsed_path", "parsed_path[0]", "parsed_path[_]", "parsed_query", "parsed_query.c", `parsed_query["a"][0]`,
	"parsed_body", "parsed_body.a", "parsed_body[_]", "truncated_body", "source_principal", "attributes",
	"attributes.source", "attributes.source.address", "attributes.source.address.socketAddress.portValue", "attributes.source.principal",
	"attributes.source.labels.a", "attributes.source.labels", "attributes.source.service", "attributes.destination.certificate",
	"attributes.destination.address.pipe", "attributes.request", "attributes.request.time", "attributes.request.time.seconds",
	"attributes.request.time.nanos", "attributes.request.http", "attributes.request.http.method", "attributes.request.http.headers",
	`attributes.request.http.headers["content-type"]`, "attributes.request.http.headers.a", `attributes.request.http.headers[":path"]`,
	"attributes.request.http.headers[_]", "attributes.request.http.headerMap", "attributes.request.http.headerMap.headers[0].key",
	"attributes.request.http.path", "attributes.request.http.host", "attributes.request.http.scheme", "attributes.request.http.query",
	"attributes.request.http.fragment", "attributes.request.http.size", "attributes.request.http.protocol", "attributes.request.http.body",
	"attributes.request.http.rawBody", "attributes.request.http.id", "attributes.request.http.method.x", "attributes.request.http.nothing",
	"attributes.contextExtensions", "attributes.contextExtensions.a", "attributes.contextExtensions.tenant", "attributes.metadataContext",
	"attributes.metadataContext.filterMetadata.open_policy_agent.decision_id", "attributes.metadataContext.filterMetadata.a.s",
	"attributes.routeMetadataContext", "attributes.routeMetadataContext.typedFilterMetadata.a", "attributes.tlsSession", "attributes.tlsSession.sni",
	"nothing", "nothing.at.all", "attributes.nothing",
}

// ruleShapes are ways to read a part of the input: I is the document, P a part of
// it, N a number.
var ruleShapes = []string{
	"P", "not P", "P == P", "x := P; x", "x := P; x == P", "count(P) > N", "is_object(P)", "is_string(P)", "some k, v in P; k != v",
	"every v in P { v != P }", "walk(P, [p, v]); count(p) > N", `object.get(P, "a", "none") == "none"`, "x := [v | v := P[_]]; count(x) > N",
	"x := {v | some v in P}; count(x) >= N", `x := I; x.attributes.request.http.method == "GET"`, "some k; I[k]; k == \"parsed_path\"",
	`k := "attributes"; I[k].request`, "f(P)", "g(P, P)", "h(I)", "r", "other.r", "data.other.r", "data.other[P]", "p[P]", `data.other[k]; k == "r"`,
	"r with input as P", "r with input.attributes.request.http.method as P", "r with input as {}", "data.other.r with data.other.s as P",
	"json.marshal(P) != \"\"", "walk(I, [p, v]); count(p) == N", `json.filter(I, ["attributes/source"]) != {}`, "count(I) > N",
	`sprintf("%v", [P]) != "x"`, `$"{P}" != "x"`, "startswith(P, \"/\")", "{P, P} & {P} != set()", `I[k][l] == P`, "object.union(P, {\"a\": 1}).a == 1",
}

// randomPolicy is a policy that reads parts of its input in many ways.
func randomPolicy(r *rand.Rand) string {
	read := func(shape string) string {
		var b strings.Builder
		for i := range len(shape) {
			alone := (i == 0 || !isWord(shape[i-1])) && (i == len(shape)-1 || !isWord(shape[i+1]))
			switch {
			case alone && shape[i] == 'P':
				b.WriteString("input." + inputPaths[r.IntN(len(inputPaths))])
			case alone && shape[i] == 'I':
				b.WriteString("input")
			case alone && shape[i] == 'N':
				fmt.Fprint(&b, r.IntN(4))
			default:
				b.WriteByte(shape[i])
			}
		}
		return b.String()
	}
	body := func(from int) string {
		var lines []string
		for range 1 + r.IntN(3) {
			lines = append(lines, read(ruleShapes[r.IntN(len(ruleShapes)-from)]))
		}
		for i := range lines { // variables are of their line
			for _, v := range []string{"x", "k", "v", "p", "l"} {
				lines[i] = renamed(lines[i], v, fmt.Sprintf("%s%d", v, i))
			}
		}
		return "{ " + strings.Join(lines, "; ") + " }"
	}
	plain := func() string {
		return read([]string{"P", "not P", "is_object(P)", "count(P) > N", "some k, v in P; k != v"}[r.IntN(5)])
	}
	return fmt.Sprintf(`package envoy.authz
import rego.v1
import data.other
default allow := %q
allow := 1 if %s
else := 2 if %s
else := %s
f(x) if { x; %s }
g(x, y) if { x != y; %s }
h(x) if x.parsed_path
r if { %s }
p contains x if { some x in %s; %s }
`, "none", body(0), body(0), read("P"), plain(), plain(), plain(), read("P"), plain()) + `
-- other.rego --
package other
import rego.v1
r if { ` + plain() + `; s }
default s := false
s if ` + plain() + `
GET := 1 if ` + plain() + `
`
}

func isWord(c byte) bool {
	return c == '_' || c == '.' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// renamed gives a variable of a rule's body another name.
func renamed(line, from, to string) string {
	var b strings.Builder
	for i := 0; i < len(line); i++ {
		word := line[i] == from[0] && (i == 0 || !isWord(line[i-1]) && line[i-1] != '"') && (i == len(line)-1 || !isWord(line[i+1]) || line[i+1] == '.') &&
			(i == len(line)-1 || line[i+1] != '"')
		switch {
		case word && from == "p" && strings.HasPrefix(line[i:], "p[input"): // the rule of that name
			b.WriteString("p")
		case word:
			b.WriteString(to)
		default:
			b.WriteByte(line[i])
		}
	}
	return b.String()
}

// compiled are a policy's evaluations by both evaluators.
func compiled(text string) (both []*policy.Policy, err error) {
	for _, evaluator := range []policy.Evaluator{policy.Topdown, policy.Plan} {
		b, err := authztest.Bundle(text)
		if err != nil {
			return nil, err
		}
		part, err := policy.Prepare(b.Bundle)
		if err != nil {
			return nil, err
		}
		p, err := policy.Compile([]policy.Named{{Name: "test", Part: part}}, policy.Options{Entries: []string{entry}, Evaluator: evaluator})
		if err != nil {
			return nil, err
		}
		both = append(both, p)
	}
	return both, nil
}

// compareSlice checks that policies answer the same for what they read of a request
// as for all of it, and that it is refused the same way.
func compareSlice(t testing.TB, text string, policies []*policy.Policy, a *asked, needs tenants.Needs, descriptors map[string]*Descriptors) (decided bool) {
	t.Helper()
	needs.All = true
	whole, wantErr := inputOf(a, "id", needs, descriptors)
	needs.All = false
	for _, p := range policies {
		needs.Slice = p.Slice(entry)
		some, err := inputOf(a, "id", needs, descriptors)
		if (err == nil) != (wantErr == nil) || err != nil && err.Error() != wantErr.Error() {
			t.Fatalf("%s\n%v: got %v, want %v", text, whole, err, wantErr)
		}
		if err != nil {
			continue
		}
		got, gotErr := p.Eval(context.Background(), entry, some, policy.NewEnv(nil), nil)
		want, wantErr := p.Eval(context.Background(), entry, whole, policy.NewEnv(nil), nil)
		if (got == nil) != (want == nil) || got != nil && got.Compare(want) != 0 || kindOf(gotErr) != kindOf(wantErr) {
			t.Fatalf("%s\nof %v\ngot  %v, %v\nof %v\nwant %v, %v", text, some, got, gotErr, whole, want, wantErr)
		}
		decided = decided || want != nil && want.Compare(ast.String("none")) != 0
	}
	return decided
}

func kindOf(err error) error {
	for _, kind := range []error{policy.ErrUndefined, policy.ErrConflict, policy.ErrEval} {
		if errors.Is(err, kind) {
			return kind
		}
	}
	return err
}

// sliceRequests are requests of many kinds: recorded ones and full ones.
func sliceRequests(t testing.TB) (all []*asked) {
	t.Helper()
	for variant := range 10 {
		req := new(authv3.CheckRequest)
		full(req.ProtoReflect(), variant)
		all = append(all, askedOf(req))
	}
	for _, req := range append(recordedRequests(t), benchmarkRequest(),
		httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/a?a=1&c&a=2&=x&&c=3"}), httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/request"}),
		httpRequest(&authv3.AttributeContext_HttpRequest{Path: "/parsed_path"}),
	) {
		all = append(all, askedOf(req))
	}
	return all
}

// TestSlice: policies of all shapes, on requests of all kinds.
func TestSlice(t *testing.T) {
	requests, descriptors := sliceRequests(t), exampleDescriptors(t)
	policies, decided := 0, 0
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 2))
		text := randomPolicy(r)
		both, err := compiled(text)
		if err != nil {
			continue
		}
		policies++
		for range 12 {
			needs := tenants.Needs{BodyBytes: 1 << 20, SkipBody: r.IntN(4) == 0, WholeBody: r.IntN(4) == 0}
			if r.IntN(2) == 0 {
				needs.ProtoDescriptor = exampleFile
			}
			if compareSlice(t, text, both, requests[r.IntN(len(requests))], needs, descriptors) {
				decided++
			}
		}
	}
	if policies < 40 || decided < 4*policies {
		t.Errorf("%d policies compiled, %d decisions of them were not the default", policies, decided)
	}
}

// TestSliceParts: each part of a document is the same where it alone is made.
func TestSliceParts(t *testing.T) {
	descriptors := exampleDescriptors(t)
	parts := 0
	for _, a := range sliceRequests(t) {
		needs := tenants.Needs{BodyBytes: 1 << 20, ProtoDescriptor: exampleFile}
		whole, err := inputOf(a, "id", needs, descriptors)
		if err != nil {
			continue
		}
		var walk func(v ast.Value, path []string)
		walk = func(v ast.Value, path []string) {
			needs.Slice = policy.All
			for _, name := range slices.Backward(path) {
				needs.Slice = &policy.Slice{Members: []policy.Member{{Name: name, Key: ast.StringTerm(name), Slice: needs.Slice}}}
			}
			some, err := inputOf(a, "id", needs, descriptors)
			if err != nil {
				t.Fatal(err)
			}
			parts++
			if got := at(some, path...); got == nil || got.Compare(v) != 0 {
				t.Fatalf("%q: got %v, want %v", path, got, v)
			}
			if got := some.(ast.Object).Len(); len(path) > 0 && got != 1 {
				t.Fatalf("%q: made %v", path, some)
			}
			if obj, ok := v.(ast.Object); ok && len(path) < 6 {
				obj.Foreach(func(k, v *ast.Term) {
					if name, ok := k.Value.(ast.String); ok {
						walk(v.Value, append(slices.Clone(path), string(name)))
					}
				})
			}
		}
		walk(whole, nil)
	}
	if parts < 1000 {
		t.Errorf("looked at %d parts", parts)
	}
}

// TestSliceShapes: each way to read the input, alone, on every request.
func TestSliceShapes(t *testing.T) {
	requests, descriptors := sliceRequests(t), exampleDescriptors(t)
	for _, shape := range []string{
		`[y | x := input; y := x.attributes.request.http.method]`, `object.get(input, ["attributes", "request", "http", "headers", "a"], "none")`,
		`json.filter(input, ["attributes/source"])`, "[p | walk(input, [p, _])]", "[p | walk(input.attributes.request, [p, _])]",
		`{k | some k; input[k]}`, `{k | some k, _ in input.attributes}`, "data.other[input.attributes.request.http.method]",
		`input.attributes[input.parsed_path[0]]`, `input[input.parsed_path[0]]`, "json.marshal(input)", "input.parsed_query", "input.parsed_query.a",
		"input.version", "[input.parsed_body, input.truncated_body]", "input.attributes.request.http", "input.attributes", "input",
		`input.attributes.request.http.headers["content-type"]`, "input.attributes.source.address.socketAddress", "input.attributes.tlsSession",
	} {
		text := "package envoy.authz\nimport rego.v1\nallow := " + shape + "\n-- other.rego --\npackage other\nGET := 1 if input.parsed_path\nPOST := input.source_principal\n"
		both, err := compiled(text)
		if err != nil {
			t.Fatalf("%s: %v", shape, err)
		}
		decided := 0
		for _, a := range requests {
			if compareSlice(t, shape, both, a, tenants.Needs{BodyBytes: 1 << 20, ProtoDescriptor: exampleFile}, descriptors) {
				decided++
			}
		}
		if decided == 0 {
			t.Errorf("%s is never defined", shape)
		}
	}
}

func FuzzSlice(f *testing.F) {
	for seed, req := range append(recordedRequests(f), benchmarkRequest()) {
		if seed%20 != 0 {
			continue
		}
		data, err := proto.Marshal(req)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint64(seed), data, seed%3 == 0, seed%4 == 0)
	}
	descriptors := exampleDescriptors(f)
	f.Fuzz(func(t *testing.T, seed uint64, data []byte, skip, wholeBody bool) {
		a := new(asked)
		if a.decode(string(data)) != nil {
			return
		}
		text := randomPolicy(rand.New(rand.NewPCG(seed, 3)))
		both, err := compiled(text)
		if err != nil {
			return
		}
		compareSlice(t, text, both, a, tenants.Needs{BodyBytes: 1 << 10, ProtoDescriptor: exampleFile, SkipBody: skip, WholeBody: wholeBody}, descriptors)
	})
}

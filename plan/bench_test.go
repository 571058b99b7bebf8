package plan

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/topdown/cache"
)

// The policies of e2e/bench, each with an input that it allows.

func trivialCase(t testing.TB) benchCase {
	return benchCase{policyFile(t, "trivial"), map[string]any{}, checkInput("/orders/42", nil)}
}

func rolesCase(t testing.TB) benchCase {
	type permission map[string]any
	roles, users := map[string]any{}, map[string]any{}
	for r := range 20 {
		var list []any
		for p := range 5 {
			list = append(list, map[string]any(permission{"method": "GET", "path": fmt.Sprintf("/area-%d/*/item-%d/**", r, p)}))
		}
		roles[fmt.Sprintf("role-%02d", r)] = list
	}
	for u := range 1000 {
		users[fmt.Sprintf("user-%04d", u)] = map[string]any{"roles": []any{fmt.Sprintf("role-%02d", u%20), fmt.Sprintf("role-%02d", (u+7)%20)}}
	}
	return benchCase{
		policyFile(t, "roles"), map[string]any{"roles": roles, "users": users},
		checkInput("/area-7/0/item-4/notes/1", map[string]any{"x-user": "user-0000"}),
	}
}

func jwtCase(t testing.TB) benchCase {
	const secret = "a secret of the benchmark, shared with nobody"
	encode := func(s string) string { return base64.RawURLEncoding.EncodeToString([]byte(s)) }
	claims, err := json.Marshal(map[string]any{
		"iss": "https://login.example.com", "sub": "user-0001", "aud": "orders", "exp": 4_000_000_000,
		"iat": 1_600_000_000, "scope": "read write", "email": "user-0001@example.com",
	})
	if err != nil {
		t.Fatal(err)
	}
	text := encode(`{"alg":"HS256","typ":"JWT"}`) + "." + encode(string(claims))
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(text))
	return benchCase{
		policyFile(t, "jwt"), map[string]any{"secret": secret},
		checkInput("/orders/42", map[string]any{"authorization": "Bearer " + text + "." + encode(string(mac.Sum(nil)))}),
	}
}

// rulesCase has a thousand rules that each allow one path.
func rulesCase(testing.TB) benchCase {
	module := "package envoy.authz\n\ndefault allow := false\n"
	for i := range 1000 {
		module += fmt.Sprintf("\nallow if {\n\tinput.attributes.request.http.path == \"/orders/%d\"\n\tinput.attributes.request.http.method == \"GET\"\n}\n", i)
	}
	return benchCase{module, map[string]any{}, checkInput("/orders/742", nil)}
}

// sharesCase has bindings of so many users to roles, in one list as a database
// would give them.
func sharesCase(n int) benchCase {
	bindings, permissions, members := make([]any, 0, n), map[string]any{}, map[string]any{}
	for i := range n {
		bindings = append(bindings, map[string]any{"user": fmt.Sprintf("user-%06d", i), "role": fmt.Sprintf("role-%02d", i%20)})
	}
	for r := range 20 {
		permissions[fmt.Sprintf("role-%02d", r)] = []any{map[string]any{"method": "GET", "path": fmt.Sprintf("/area-%d/*/item-1/**", r)}}
		var list []any
		for i := r; i < n; i += 20 {
			list = append(list, fmt.Sprintf("user-%06d", i))
		}
		members[fmt.Sprintf("role-%02d", r)] = map[string]any{"members": list}
	}
	return benchCase{`package envoy.authz

default allow := false

allow if {
	some b in data.bindings
	b.user == input.attributes.request.http.headers["x-user"]
	data.members[b.role].members[_] == b.user
	some p in data.permissions[b.role]
	p.method == input.attributes.request.http.method
	glob.match(p.path, ["/"], input.attributes.request.http.path)
}
`, map[string]any{"bindings": bindings, "permissions": permissions, "members": members},
		checkInput("/area-9/0/item-1/notes/1", map[string]any{"x-user": fmt.Sprintf("user-%06d", n-n%20-11)})}
}

type benchCase struct {
	module string
	data   map[string]any
	input  ast.Value
}

func policyFile(t testing.TB, name string) string {
	text, err := os.ReadFile("../e2e/bench/policies/" + name + "/policy.rego")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// checkInput is the input of a check of Envoy.
func checkInput(path string, headers map[string]any) ast.Value {
	all := map[string]any{
		":authority": "shop.example.com", ":method": "GET", ":path": path, ":scheme": "https", "accept": "application/json",
		"user-agent": "bench", "x-forwarded-for": "10.0.0.1", "x-forwarded-proto": "https", "x-request-id": "6c1f", "cookie": "a=b",
	}
	for k, v := range headers {
		all[k] = v
	}
	var parsed []any
	for part := range split(path) {
		parsed = append(parsed, part)
	}
	return ast.MustInterfaceToValue(map[string]any{
		"attributes": map[string]any{
			"request": map[string]any{
				"http": map[string]any{"method": "GET", "path": path, "host": "shop.example.com", "headers": all, "scheme": "https"},
				"time": map[string]any{"seconds": 1_700_000_000, "nanos": 0},
			},
			"source": map[string]any{"address": map[string]any{"socketAddress": map[string]any{"address": "10.0.0.1", "portValue": 4711}}},
		},
		"parsed_path": parsed,
	})
}

func split(path string) func(func(string) bool) {
	return func(yield func(string) bool) {
		from := 1
		for i := 1; i <= len(path); i++ {
			if i == len(path) || path[i] == '/' {
				if !yield(path[from:i]) {
					return
				}
				from = i + 1
			}
		}
	}
}

var benchQuery = ast.MustParseBody("data.envoy.authz.allow = result")

func (c *benchCase) compiler(t testing.TB) *ast.Compiler {
	compiler, err := ast.CompileModulesWithOpt(map[string]string{"p.rego": c.module}, ast.CompileOpts{})
	if err != nil {
		t.Fatal(err)
	}
	return compiler
}

func (c *benchCase) program(t testing.TB) *Program {
	data := documentOf(c.data)
	p, err := Of(c.compiler(t), benchQuery)
	if err != nil {
		t.Fatal(err)
	}
	prog, err := Compile(p, data)
	if err != nil {
		t.Fatal(err)
	}
	return prog
}

var benchCases = []struct {
	name string
	make func(testing.TB) benchCase
}{
	{"trivial", trivialCase},
	{"roles", rolesCase},
	{"jwt", jwtCase},
	{"rules1000", rulesCase},
	{"data10", func(testing.TB) benchCase { return sharesCase(20) }},
	{"data100000", func(testing.TB) benchCase { return sharesCase(100_000) }},
}

func BenchmarkPlan(b *testing.B) {
	for _, bc := range benchCases {
		b.Run(bc.name, func(b *testing.B) {
			c := bc.make(b)
			prog := c.program(b)
			env := &Env{JSON: parseJSON, InterQueryBuiltinValueCache: cache.NewInterQueryValueCache(b.Context(), nil)}
			for range scansBefore + 1 { // after which there are indexes
				if _, err := prog.Eval(b.Context(), c.input, env); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				v, err := prog.Eval(b.Context(), c.input, env)
				if err != nil || v != ast.Boolean(true) {
					b.Fatal(v, err)
				}
			}
		})
	}
}

func BenchmarkTopdown(b *testing.B) {
	for _, bc := range benchCases {
		b.Run(bc.name, func(b *testing.B) {
			c := bc.make(b)
			compiler := c.compiler(b)
			body, err := compiler.QueryCompiler().Compile(benchQuery)
			if err != nil {
				b.Fatal(err)
			}
			store := inmem.NewFromObjectWithOpts(c.data, inmem.OptReturnASTValuesOnRead(true))
			q := topdown.NewQuery(body).
				WithCompiler(compiler).
				WithStore(store).
				WithTransaction(storage.NewTransactionOrDie(b.Context(), store)).
				WithMetrics(metrics.NoOp()).
				WithInterQueryBuiltinValueCache(cache.NewInterQueryValueCache(b.Context(), nil)).
				WithInput(ast.NewTerm(c.input))
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				found := false
				err := q.Iter(b.Context(), func(r topdown.QueryResult) error {
					found = r["result"].Value == ast.Boolean(true)
					return nil
				})
				if err != nil || !found {
					b.Fatal(found, err)
				}
			}
		})
	}
}

// reportCPU reports the processor time of an operation when its result is called,
// which says more than the time on a machine that has other work.
func reportCPU(b *testing.B) func() {
	used := func() time.Duration {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}

// BenchmarkCompile tells what it takes to have a Program beside a compiled policy.
func BenchmarkCompile(b *testing.B) {
	for _, bc := range benchCases {
		c := bc.make(b)
		compiler := c.compiler(b)
		data := documentOf(c.data)
		b.Run("policy/"+bc.name, func(b *testing.B) {
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				c.compiler(b)
			}
		})
		b.Run("plan/"+bc.name, func(b *testing.B) {
			b.ReportAllocs()
			defer reportCPU(b)()
			for b.Loop() {
				p, err := Of(compiler, benchQuery)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := Compile(p, data); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

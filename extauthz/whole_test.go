package extauthz

import (
	"fmt"
	"os"
	"testing"
	"time"

	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// BenchmarkWhole is a whole check, from the bytes of the message to those of the
// response, with policies of e2e/bench.
func BenchmarkWhole(b *testing.B) {
	for _, name := range []string{"trivial", "roles"} {
		b.Run(name, func(b *testing.B) {
			text, err := os.ReadFile("../e2e/bench/policies/" + name + "/policy.rego")
			if err != nil {
				b.Fatal(err)
			}
			bundles := &authztest.Memory{}
			bundles.Set("orders", "-- policy.rego --\n"+string(text)+"-- data.json --\n"+rolesData())
			pool := authztest.Pool(b, tenants.Config{Settings: authztest.Settings(bundles, func(_ tenants.ID, s *tenants.Settings) { s.Limits.EvaluationTime = time.Minute })})
			s := newServer(b, Config{Pool: pool, Resolve: []Resolver{{ContextExtension: "tenant"}}})
			req := benchmarkRequest()
			req.Attributes.Request.Http.Headers["x-user"] = "user-0007"
			req.Attributes.Request.Http.Path = "/area-14/7/item-4/notes/1?expand=all"
			data, err := proto.Marshal(req)
			if err != nil {
				b.Fatal(err)
			}
			if a := authztest.Ask(b.Context(), pool, "orders", "{}"); a.Err != nil { // it is loaded
				b.Fatal(a.Err)
			}
			b.ReportAllocs()
			for b.Loop() {
				r, err := s.check(b.Context(), textOf(mem.BufferSlice{mem.SliceBuffer(data)}))
				if err != nil {
					b.Fatal(err)
				}
				sent, err := Codec().Marshal(&r)
				if err != nil {
					b.Fatal(err)
				}
				if sent.Len() != allowedBytes {
					b.Fatal(r.response())
				}
			}
		})
	}
}

// allowedBytes are those of a response that says yes.
const allowedBytes = 59

// rolesData gives each of a thousand users two of twenty roles.
func rolesData() string {
	text := `{"users": {`
	for u := range 1000 {
		text += fmt.Sprintf(`"user-%04d": {"roles": ["role-%02d", "role-%02d"]},`, u, u%20, (u+7)%20)
	}
	text = text[:len(text)-1] + `}, "roles": {`
	for r := range 20 {
		text += fmt.Sprintf(`"role-%02d": [`, r)
		for p := range 5 {
			text += fmt.Sprintf(`{"method": "GET", "path": "/area-%d/*/item-%d/**"},`, r, p)
		}
		text = text[:len(text)-1] + "],"
	}
	return text[:len(text)-1] + "}}"
}

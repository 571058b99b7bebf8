package document

import (
	"encoding/json"
	"fmt"
	"runtime"
	"testing"

	"github.com/open-policy-agent/opa/v1/ast"
)

// shapes are documents as people have them.
var shapes = []struct {
	name string
	make func() any
}{
	{"roles of 100,000 users", func() any {
		all := map[string]any{}
		for i := range 100_000 {
			roles := []any{}
			for r := range 1 + i%5 {
				roles = append(roles, fmt.Sprintf("role-%03d", (i*7+r*31)%200))
			}
			all[fmt.Sprintf("user-%06d", i)] = roles
		}
		return map[string]any{"user_roles": all}
	}},
	{"objects with the same keys", func() any {
		list := []any{}
		for i := range 50_000 {
			list = append(list, map[string]any{
				"id": fmt.Sprintf("8f14e45f-%06x-4c1d", i), "team": fmt.Sprintf("team-%d", i%300), "active": i%3 > 0, "level": i % 7,
				"tags": []any{"eu", fmt.Sprintf("tag-%d", i%50)},
			})
		}
		return map[string]any{"accounts": list}
	}},
	{"distinct short strings", func() any {
		list := []any{}
		for i := range 200_000 {
			list = append(list, fmt.Sprintf("%07x", i*2654435761%(1<<28)))
		}
		return map[string]any{"blocked": list}
	}},
	{"keys with true", func() any {
		all := map[string]any{}
		for i := range 200_000 {
			all[fmt.Sprintf("%07x", i*2654435761%(1<<28))] = true
		}
		return map[string]any{"allowed": all}
	}},
	{"numbers", func() any {
		list := []any{}
		for i := range 200_000 {
			switch i % 3 {
			case 0:
				list = append(list, i)
			case 1:
				list = append(list, json.Number(fmt.Sprintf("%d.%02d", i, i%100)))
			default:
				list = append(list, 1_700_000_000_000+i*977)
			}
		}
		return map[string]any{"limits": list}
	}},
	{"digits", func() any {
		list := []any{}
		for i := range 500_000 {
			list = append(list, i%10)
		}
		return map[string]any{"digits": list}
	}},
	{"nested configuration", func() any {
		all := map[string]any{}
		for i := range 5_000 {
			all[fmt.Sprintf("service-%d", i)] = map[string]any{
				"owner": fmt.Sprintf("team-%d", i%200), "description": fmt.Sprintf("What service %d does for its callers, in a sentence.", i),
				"routes": []any{
					map[string]any{"path": fmt.Sprintf("/service-%d/*", i), "methods": []any{"GET", "HEAD"}, "roles": []any{"reader", "admin"}},
					map[string]any{"path": fmt.Sprintf("/service-%d/items/**", i), "methods": []any{"POST"}, "roles": []any{"admin"}},
				},
				"limits": map[string]any{"rate": 100 * (i % 9), "burst": 10, "timeout": map[string]any{"seconds": i % 30, "retry": nil}},
			}
		}
		return map[string]any{"services": all}
	}},
}

// text is the JSON that v is, as small as it gets.
func text(b testing.TB, v any) string {
	b.Helper()
	out, err := json.Marshal(v)
	if err != nil {
		b.Fatal(err)
	}
	return string(out)
}

// BenchmarkMemory tells what a document takes for each byte of its JSON, as the
// heap has it after a collection: as ast.Value, as a Document, and as one of
// which all small values have been asked for as terms.
func BenchmarkMemory(b *testing.B) {
	for _, s := range shapes {
		b.Run(s.name, func(b *testing.B) {
			json := text(b, s.make())
			per := func(n int64) float64 { return float64(n) / float64(len(json)) }
			before := heap()
			value := asValue(b, json)
			b.ReportMetric(per(heap()-before), "ast/byte")
			runtime.KeepAlive(value)
			value = nil
			before = heap()
			doc := of(b, decoded(b, json))
			b.ReportMetric(per(heap()-before), "document/byte")
			readSmall(doc.Root())
			b.ReportMetric(per(heap()-before), "read/byte")
			b.ReportMetric(per(doc.Size()), "size/byte")
			b.ReportMetric(float64(len(json))/(1<<20), "json-MiB")
			runtime.KeepAlive(doc)
			runtime.KeepAlive(json)
		})
	}
}

//go:noinline
func asValue(b testing.TB, json string) ast.Value { return ast.MustInterfaceToValue(decoded(b, json)) }

// readSmall asks for the terms of all values but the large ones, and holds these.
func readSmall(v Value) (values int) {
	values = 1
	for k, e := range v.All() {
		k.Term()
		values += readSmall(e)
	}
	if values < 20 {
		v.Term()
	}
	v.Hold()
	return values
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// BenchmarkLoad tells what it takes to make a document of what was decoded.
func BenchmarkLoad(b *testing.B) {
	for _, s := range shapes {
		json := text(b, s.make())
		v := decoded(b, json)
		b.Run("ast/"+s.name, func(b *testing.B) {
			b.SetBytes(int64(len(json)))
			b.ReportAllocs()
			for b.Loop() {
				ast.MustInterfaceToValue(v)
			}
		})
		b.Run("document/"+s.name, func(b *testing.B) {
			b.SetBytes(int64(len(json)))
			b.ReportAllocs()
			for b.Loop() {
				of(b, v)
			}
		})
	}
}

// BenchmarkMember tells what it takes to find a member of a large object.
func BenchmarkMember(b *testing.B) {
	v := shapes[0].make()
	value := ast.MustInterfaceToValue(v).(ast.Object).Get(ast.StringTerm("user_roles")).Value.(ast.Object)
	root := of(b, v).Root().Member("user_roles")
	keys := make([]*ast.Term, 1024)
	for i := range keys {
		keys[i] = ast.StringTerm(fmt.Sprintf("user-%06d", i*7919%100_000))
	}
	i := 0
	b.Run("ast", func(b *testing.B) {
		for b.Loop() {
			i++
			if value.Get(keys[i&1023]) == nil {
				b.Fatal("not there")
			}
		}
	})
	b.Run("document", func(b *testing.B) {
		for b.Loop() {
			i++
			if !root.Member(string(keys[i&1023].Value.(ast.String))).Defined() {
				b.Fatal("not there")
			}
		}
	})
}

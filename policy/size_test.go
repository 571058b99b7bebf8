package policy_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// TestSizes compares the estimates with what the heap says.
func TestSizes(t *testing.T) {
	var users, rules strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&users, `%q: {"roles": ["reader", "writer-%d"], "id": %d, "active": true},`, fmt.Sprintf("user-%d", i), i%10, i)
	}
	for i := range 200 {
		fmt.Fprintf(&rules, "allow if {\n\tinput.parsed_path == [\"area\", \"%d\"]\n\tsome role in data.users[input.user].roles\n\trole == \"writer-%d\"\n}\n\n", i, i)
	}
	for name, text := range map[string]string{
		"data":   "package envoy.authz\nallow := true\n-- data.json --\n{\"users\": {" + strings.TrimSuffix(users.String(), ",") + "}}",
		"rules":  "package envoy.authz\n\n" + rules.String(),
		"little": "package envoy.authz\nallow := true",
	} {
		t.Run(name, func(t *testing.T) {
			const copies = 20
			parts := make([]*policy.Part, copies)
			policies := make([]*policy.Policy, copies)
			before := heap()
			for i := range copies {
				b, err := authztest.Bundle(text)
				if err != nil {
					t.Fatal(err)
				}
				if parts[i], err = policy.Prepare(b.Bundle); err != nil {
					t.Fatal(err)
				}
			}
			prepared := heap()
			for i, part := range parts {
				var err error
				if policies[i], err = policy.Compile([]policy.Named{{Name: "p", Part: part}}, policy.Options{Entries: []string{entry}}); err != nil {
					t.Fatal(err)
				}
			}
			compiled := heap()
			within := func(what string, estimate, real int64) {
				t.Logf("%s: estimated %d, really %d", what, estimate, real)
				if real > 32<<10 && (estimate < real/2 || estimate > real*2) {
					t.Errorf("%s: estimated %d bytes, want half to twice %d", what, estimate, real)
				}
			}
			within("part", parts[0].Size(), (prepared-before)/copies)
			within("policy", policies[0].Size(), (compiled-prepared)/copies)
			runtime.KeepAlive(parts)
			runtime.KeepAlive(policies)
		})
	}
}

func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

package policy_test

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// remembering uses each cache that builtins have for a tenant.
const remembering = `
package envoy.authz

token := "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiJhbGljZSJ9.MkDBRXGbDCAZrEwNdUxuiyTwxSSQH9Gj-bNbwRAwWII"

keys := json.marshal({"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}]})

allow := {"allowed": true, "headers": {"x": sprintf("%v", [[
	regex.match(sprintf("^a%v$", [input.n]), "b"),
	glob.match(sprintf("a%v*", [input.n]), [], "b"),
	json.match_schema({}, {"title": sprintf("%v", [input.n])}),
	io.jwt.verify_hs256(token, "secret"),
	io.jwt.verify_rs256(token, keys),
	io.jwt.decode_verify(token, {"secret": "secret"}),
]]) } }

long if json.match_schema({}, {"title": input.pad})[0]
`

func TestEnvRemembersForItself(t *testing.T) {
	p := authztest.Policy(t, remembering)
	caching := policy.Caching{Named: map[string]policy.NamedCaching{"io_jwt": {}}}
	a, b := policy.NewEnvWith(policy.EnvOptions{Caching: caching}), policy.NewEnv(nil)
	ask := func(env *policy.Env, n int) {
		t.Helper()
		if _, err := p.Decide(context.Background(), entry, value(t, fmt.Sprintf(`{"n": %d}`, n)), env, nil); err != nil {
			t.Fatal(err)
		}
	}
	ask(a, 1)
	ask(a, 1)
	if got := a.Remembered(""); got != 3 {
		t.Errorf("got %d values remembered, want a pattern, a glob and a schema", got)
	}
	if got := a.Remembered("io_jwt"); got == 0 {
		t.Error("a token that was verified is not remembered, though that is configured")
	}
	if got := a.Remembered("io_jwt_keys"); got != 1 {
		t.Errorf("got %d key sets remembered, want 1", got)
	}
	for _, name := range []string{"", "io_jwt", "io_jwt_keys"} {
		if got := b.Remembered(name); got != 0 {
			t.Errorf("another tenant has %d values in %q, want none", got, name)
		}
	}
	ask(b, 2)
	if got := b.Remembered("io_jwt"); got != 0 {
		t.Errorf("got %d tokens remembered, want none where nobody configures it", got)
	}
	if got := b.Remembered(""); got != 3 {
		t.Errorf("got %d values remembered, want 3", got)
	}
}

func TestEnvBounds(t *testing.T) {
	p := authztest.Policy(t, remembering, "envoy/authz/long")
	for configured, want := range map[int]int{0: 1000, -1: 1000, 7: 7, 1100: 1100} {
		env := policy.NewEnvWith(policy.EnvOptions{Caching: policy.Caching{Values: configured}})
		var group sync.WaitGroup
		for worker := range 4 {
			group.Go(func() {
				for n := range 100 {
					input := value(t, fmt.Sprintf(`{"n": %d}`, worker*1000+n))
					if _, err := p.Decide(context.Background(), entry, input, env, nil); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		group.Wait()
		if got := env.Remembered(""); got != want {
			t.Errorf("configured %d: got %d values remembered, want %d", configured, got, want)
		}
	}

	env := policy.NewEnv(nil)
	for n := range 40 { // 400 KiB each
		input := value(t, fmt.Sprintf(`{"pad": "%d%s"}`, n, strings.Repeat("x", 400<<10)))
		_, _ = p.Eval(context.Background(), "envoy/authz/long", input, env, nil)
	}
	if got := env.Remembered(""); got == 0 || got > 10 {
		t.Errorf("got %d large schemas remembered, want what is within 4 MiB", got)
	}
	env = policy.NewEnv(nil)
	_, _ = p.Eval(context.Background(), "envoy/authz/long", value(t, `{"pad": "`+strings.Repeat("x", 2<<20)+`"}`), env, nil)
	if got := env.Remembered(""); got != 0 {
		t.Errorf("got %d schemas remembered, want none of that size", got)
	}
	disabled := policy.NewEnvWith(policy.EnvOptions{Caching: policy.Caching{Named: map[string]policy.NamedCaching{"io_jwt_keys": {Disabled: true}}}})
	if _, err := p.Decide(context.Background(), entry, value(t, `{"n": 1}`), disabled, nil); err != nil {
		t.Fatal(err)
	}
	if got := disabled.Remembered("io_jwt_keys"); got != 0 {
		t.Errorf("got %d keys remembered, want none in a cache that is disabled", got)
	}
}

// An Env that has been asked nothing takes little, and no goroutine.
func TestEnvIdle(t *testing.T) {
	network, err := policy.NewNetwork(policy.NetworkOptions{Hosts: []string{"svc.test"}})
	if err != nil {
		t.Fatal(err)
	}
	const n = 1000
	labels := map[string]string{"app": "orders"}
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	goroutines, before := runtime.NumGoroutine(), heap()
	envs := make([]*policy.Env, n)
	for i := range envs {
		envs[i] = policy.NewEnvWith(policy.EnvOptions{Labels: labels, Network: network})
	}
	took := int64(heap()-before) / n
	if took > 5000 {
		t.Errorf("got %d bytes for each, want at most 5,000", took)
	}
	if got := runtime.NumGoroutine(); got > goroutines {
		t.Errorf("got %d goroutines more", got-goroutines)
	}
	runtime.KeepAlive(envs)
	t.Logf("%d bytes for each", took)
}

package tenants

import (
	"sync"
	"testing"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/policy"
)

// All evaluations of a tenant share what they remember, also the first ones.
func TestOneEnv(t *testing.T) {
	for range 100 {
		in := newInstance("orders", &Settings{Tenant: &control.Tenant{}}, 1)
		envs := make([]*policy.Env, 8)
		var wg sync.WaitGroup
		for i := range envs {
			wg.Go(func() { envs[i] = in.env() })
		}
		wg.Wait()
		for _, env := range envs {
			if env == nil || env != envs[0] {
				t.Fatalf("got %p, want one: %p", env, envs)
			}
		}
	}
}

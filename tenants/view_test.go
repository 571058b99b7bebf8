package tenants_test

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// The State of a tenant changes with what decides, the operator's own policy
// included, and an answer has the one by which it was given. Whoever wants to know
// of each change is told.
func TestViewState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const rules = "package envoy.authz\n\nallow if data.n > %d\n-- data.json --\n{\"n\": 9}"
		source := new(authztest.Memory)
		source.Set("orders", fmt.Sprintf(rules, 1))
		source.Set("guard", fmt.Sprintf(rules, 1))
		settings := authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) { s.Bundles[0].Final = true })
		guard, err := settings("guard")
		if err != nil {
			t.Fatal(err)
		}
		var mu sync.Mutex
		var told []tenants.ID
		p := authztest.Pool(t, tenants.Config{Settings: settings, Guard: guard, Activated: func(id tenants.ID) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, id)
		}})
		synctest.Wait()

		var states []string
		look := func(what string) {
			t.Helper()
			v, err := p.View(t.Context(), "orders")
			if err != nil {
				t.Fatal(err)
			}
			if a := authztest.Ask(t.Context(), p, "orders", ""); a.State != v.State || !a.Decision.Allowed {
				t.Errorf("%s: got an answer by %q, want %q", what, a.State, v.State)
			}
			if slices.Contains(states, v.State) {
				t.Errorf("%s: the state is one that there was", what)
			}
			states = append(states, v.State)
		}
		look("at first")
		source.Set("orders", fmt.Sprintf(rules, 2))
		time.Sleep(2 * time.Second)
		look("another policy")
		source.Set("guard", fmt.Sprintf(rules, 3))
		time.Sleep(2 * time.Second)
		look("another policy of the operator's")
		source.Fail("orders", bundles.ErrNotFound)
		time.Sleep(5 * time.Second)

		mu.Lock()
		defer mu.Unlock()
		if want := []tenants.ID{"", "orders", "orders", "", "orders"}; !slices.Equal(told, want) {
			t.Errorf("told of %q, want %q", told, want)
		}
	})
}

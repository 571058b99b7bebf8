package tenants_test

import (
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// A service that fails for many is asked a bounded number of times a second, and
// by all again once it answers.
func TestFailingServiceIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 500
		s := newStage(t, tenants.Config{}, nil)
		id := func(i int) string { return fmt.Sprintf("t%d", i) }
		for i := range n {
			s.Set(id(i), allow)
			s.allows(tenants.ID(id(i)))
		}
		fetches := func() (sum int) {
			for i := range n {
				sum += s.Fetches(id(i))
			}
			return sum
		}
		before := fetches()
		time.Sleep(10 * time.Second)
		if got := fetches() - before; got < 5*n {
			t.Fatalf("%d polls in ten seconds while all is well, want about %d", got, 10*n)
		}
		for i := range n {
			s.Fail(id(i), errors.New("away"))
		}
		time.Sleep(2 * time.Second)
		for range 30 {
			before := fetches()
			time.Sleep(time.Second)
			if got := fetches() - before; got > 2*50 { // the second may straddle two of the service's
				t.Errorf("%d requests within a second to a service that fails", got)
			}
		}
		for i := range n {
			s.Set(id(i), deny)
		}
		time.Sleep(10 * time.Second)
		for i := range n {
			s.denies(tenants.ID(id(i)))
		}
	})
}

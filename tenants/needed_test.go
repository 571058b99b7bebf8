package tenants_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/tenants"
)

// given is an input that is there already.
type given struct{ ast.Value }

func (g given) Input(tenants.Needs) (ast.Value, error) { return g.Value, nil }

// A question that may not be needed is asked when all before it are answered, and
// one that is not needed is neither asked nor answered.
func TestNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		questions := make([]tenants.Question, 6)
		var answered []int
		for i := range questions {
			questions[i] = tenants.Question{Input: given{ast.NewObject()}}
			if i < 2 {
				continue
			}
			questions[i].Needed = func() bool {
				if len(answered) < 2 {
					t.Errorf("question %d: its turn came after %v", i, answered)
				}
				return i%2 == 1
			}
		}
		err := s.Decide(context.Background(), "orders", questions, func(i int, a tenants.Answer) {
			if a.Err != nil {
				t.Error(a.Err)
			}
			answered = append(answered, i)
		})
		slices.Sort(answered)
		if err != nil || !slices.Equal(answered, []int{0, 1, 3, 5}) {
			t.Errorf("got answers to %v, error %v, want 0, 1, 3 and 5", answered, err)
		}
	})
}

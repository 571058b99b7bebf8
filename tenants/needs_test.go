package tenants_test

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// document is an input that makes what it is asked for, and remembers that.
type document struct {
	mu    sync.Mutex
	asked []string
}

func (d *document) Input(needs tenants.Needs) (ast.Value, error) {
	var names []string
	var items [][2]*ast.Term
	for _, name := range []string{"a", "b", "c"} {
		if needs.Reads().Of(name) != nil {
			names = append(names, name)
			items = append(items, ast.Item(ast.StringTerm(name), ast.StringTerm("value of "+name)))
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, strings.Join(names, ""))
	return ast.NewObject(items...), nil
}

// An input has what its policy reads, and the operator's own. All of it is made
// where it is recorded.
func TestSlicedInput(t *testing.T) {
	const orders = "package envoy.authz\nallow if { input.a; not input.x }"
	var guards authztest.Memory
	guards.Set("guard", "package guard\nallow if input.b")
	guard, err := authztest.Settings(&guards, nil)("guard")
	if err != nil {
		t.Fatal(err)
	}
	guard.Entry = "guard/allow"
	for name, c := range map[string]struct {
		cfg    tenants.Config
		rules  string
		logged bool
		want   []string
	}{
		"what is read":    {tenants.Config{}, orders, false, []string{"a"}},
		"nothing is read": {tenants.Config{}, "package envoy.authz\nallow := true", false, []string{""}},
		"all is read":     {tenants.Config{}, "package envoy.authz\nallow if count(input) == 3", false, []string{"abc"}},
		"guarded":         {tenants.Config{Guard: guard}, orders, false, []string{"ab"}},
		"logged":          {tenants.Config{}, orders, true, []string{"abc"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				logs, console := authztest.Logs(t)
				c.cfg.Logs = logs
				s := newStage(t, c.cfg, func(_ tenants.ID, s *tenants.Settings) {
					if c.logged {
						s.Log = authztest.Logged()
					}
				})
				s.Set("sliced", c.rules)
				synctest.Wait() // for the guard
				d := new(document)
				for range 2 {
					q := []tenants.Question{{DecisionID: "d", Input: d}}
					if err := s.Decide(context.Background(), "sliced", q, func(_ int, a tenants.Answer) {
						if a.Err != nil || !a.Decision.Allowed {
							t.Errorf("got %v, %v, want allowed", a.Decision.Allowed, a.Err)
						}
					}); err != nil {
						t.Fatal(err)
					}
				}
				if want := append(c.want, c.want...); !slices.Equal(d.asked, want) {
					t.Errorf("asked for %q, want %q", d.asked, want)
				}
				if c.logged {
					if line := console.Lines(1)[0]; !strings.Contains(string(line), "value of c") {
						t.Errorf("logged %s", line)
					}
				}
			})
		})
	}
}

// slow is an input in whose making something happens.
type slow struct {
	document
	meanwhile func()
}

func (s *slow) Input(needs tenants.Needs) (ast.Value, error) {
	s.meanwhile()
	return s.document.Input(needs)
}

// A guard that is replaced while a question is on its way does not decide about the
// input that was made for the one before.
func TestReplacedGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stage{t: t}
		s.Set("orders", allow)
		s.Set("guard", "package guard\ndefault allow := false\nallow if input.b == 1")
		settings := authztest.Settings(&s.Memory, func(_ tenants.ID, s *tenants.Settings) { s.Limits.EvaluationTime = time.Minute })
		guard, err := settings("guard")
		if err != nil {
			t.Fatal(err)
		}
		guard.Entry = "guard/allow"
		s.Pool = authztest.Pool(t, tenants.Config{Settings: settings, Guard: guard})
		synctest.Wait()
		s.denies("orders")
		in := &slow{meanwhile: func() {
			s.Set("guard", "package guard\ndefault allow := false\nallow if not input.c")
			time.Sleep(10 * time.Second) // the new one is there by now
		}}
		for _, want := range []string{"b", "c"} {
			q := []tenants.Question{{DecisionID: "d", Input: in}}
			if err := s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) {
				if a.Err != nil || a.Decision.Allowed || !a.Guard {
					t.Errorf("got %v, %v, want a denial of the guard", a.Decision.Allowed, a.Err)
				}
			}); err != nil {
				t.Fatal(err)
			}
			if got := in.asked[len(in.asked)-1]; got != want {
				t.Errorf("asked for %q, want %q", got, want)
			}
		}
	})
}

func TestNeeds(t *testing.T) {
	needs := tenants.Needs{Slice: new(policy.Slice)}
	if needs.Reads().Whole {
		t.Error("what reads nothing reads all")
	}
	if needs = (tenants.Needs{}); !needs.Reads().Whole {
		t.Error("without a slice all is read")
	}
	if needs = (tenants.Needs{All: true, Slice: new(policy.Slice)}); !needs.Reads().Whole {
		t.Error("all is all")
	}
}

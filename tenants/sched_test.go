package tenants_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

func TestLoopingPolicy(t *testing.T) {
	s := newStage(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) {
		s.Limits.EvaluationTime = 100 * time.Millisecond
	})
	s.allows("orders")
	start := time.Now()
	s.fails("loops", tenants.ErrDeadline)
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("got an answer after %s, want it at the deadline", took)
	}
	s.allows("orders")
}

// stuck is an input that a worker cannot be called back from: it stands for a
// builtin that heeds no cancellation.
type stuck chan struct{}

func (s stuck) Input(tenants.Needs) (ast.Value, error) {
	<-s
	return ast.NewObject(), nil
}

func TestStuckEvaluation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Workers: 2}, func(_ tenants.ID, s *tenants.Settings) {
			s.Limits.Concurrency = 2
		})
		s.allows("orders")
		s.denies("payments")
		hold := make(stuck)
		var wg sync.WaitGroup
		for range 3 { // both slots, and one that waits
			wg.Go(func() {
				q := []tenants.Question{{DecisionID: "d", Input: hold}}
				err := s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) {
					if !errors.Is(a.Err, tenants.ErrDeadline) || a.Decision.Allowed {
						t.Errorf("got %v, want %v", a, tenants.ErrDeadline)
					}
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		s.fails("orders", tenants.ErrDeadline) // its slots are taken still,
		for range 10 {
			s.denies("payments") // and nobody else's
		}
		close(hold)
		synctest.Wait()
		s.allows("orders")
	})
}

func TestWaitingBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) { s.Limits.Concurrency = 1 })
		s.allows("orders")
		hold := make(stuck)
		var mu sync.Mutex
		busy, late := 0, 0
		var wg sync.WaitGroup
		for range 1500 {
			wg.Go(func() {
				q := []tenants.Question{{DecisionID: "d", Input: hold}}
				_ = s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) {
					mu.Lock()
					defer mu.Unlock()
					switch {
					case errors.Is(a.Err, tenants.ErrBusy):
						busy++
					case errors.Is(a.Err, tenants.ErrDeadline):
						late++
					}
				})
			})
		}
		wg.Wait()
		if busy != 499 || late != 1001 {
			t.Errorf("got %d busy and %d late, want 499 and 1001", busy, late)
		}
		close(hold)
		synctest.Wait()
		s.allows("orders")
	})
}

type panics struct{}

func (panics) Input(tenants.Needs) (ast.Value, error) { panic("no input") }

func TestPanic(t *testing.T) {
	s := newStage(t, tenants.Config{}, nil)
	q := []tenants.Question{{DecisionID: "d", Input: panics{}}}
	if err := s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) {
		if !errors.Is(a.Err, tenants.ErrPanic) || a.Decision.Allowed {
			t.Errorf("got %v, want %v", a, tenants.ErrPanic)
		}
	}); err != nil {
		t.Error(err)
	}
	s.allows("orders")
}

func TestBatch(t *testing.T) {
	logs, console := authztest.Logs(t)
	s := newStage(t, tenants.Config{Logs: logs}, func(_ tenants.ID, s *tenants.Settings) { s.Log = authztest.Logged() })
	s.Set("even", "package envoy.authz\nallow := input.n % 2 == 0")
	questions := make([]tenants.Question, 100)
	for i := range questions {
		questions[i] = tenants.Question{DecisionID: fmt.Sprint(i), Input: authztest.Input(fmt.Sprintf(`{"n": %d}`, i))}
	}
	answers := make([]*tenants.Answer, len(questions))
	if err := s.Decide(context.Background(), "even", questions, func(i int, a tenants.Answer) {
		if answers[i] != nil {
			t.Errorf("question %d is answered twice", i)
		}
		answers[i] = &a
	}); err != nil {
		t.Fatal(err)
	}
	for i, a := range answers {
		if a == nil || a.Err != nil || a.Decision.Allowed != (i%2 == 0) {
			t.Errorf("question %d: got %+v", i, a)
		}
	}
	for _, e := range console.Events(100) {
		n := e["input"].(map[string]any)["n"].(float64)
		if e["decision_id"] != fmt.Sprint(n) || e["result"] != (int(n)%2 == 0) {
			t.Errorf("got event %v", e)
		}
		answers[int(n)] = nil
	}
	for i, a := range answers {
		if a != nil {
			t.Errorf("question %d is not logged", i)
		}
	}
}

func TestCallerIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.allows("orders")
		ctx, cancel := context.WithCancel(context.Background())
		hold := make(stuck)
		time.AfterFunc(10*time.Millisecond, cancel)
		q := []tenants.Question{{DecisionID: "d", Input: hold}, {DecisionID: "e", Input: hold}}
		n := 0
		if err := s.Decide(ctx, "orders", q, func(_ int, a tenants.Answer) {
			n++
			if !errors.Is(a.Err, tenants.ErrDeadline) {
				t.Errorf("got %v, want %v", a.Err, tenants.ErrDeadline)
			}
		}); err != nil || n != 2 {
			t.Errorf("got %d answers, %v, want 2", n, err)
		}
		close(hold)
	})
}

func BenchmarkDecide(b *testing.B) {
	s := newStage(b, tenants.Config{}, nil)
	s.allows("orders")
	q := []tenants.Question{{DecisionID: "d", Input: made{ast.NewObject()}}}
	b.ReportAllocs()
	for b.Loop() {
		if err := s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) {
			if a.Err != nil {
				b.Fatal(a.Err)
			}
		}); err != nil {
			b.Fatal(err)
		}
	}
}

// made is an input that is made already.
type made struct{ v ast.Value }

func (m made) Input(tenants.Needs) (ast.Value, error) { return m.v, nil }

// A tenant whose evaluations keep running past their deadline is not evaluated
// for a while; then one question tells whether it has become better.
func TestQuarantine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.allows("orders")
		slow := time.Minute
		ask := func() error {
			var err error
			q := []tenants.Question{{DecisionID: "d", Input: sleeps(slow)}}
			if e := s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) { err = a.Err }); e != nil {
				t.Error(e)
			}
			return err
		}
		for range 10 {
			if err := ask(); !errors.Is(err, tenants.ErrDeadline) {
				t.Fatalf("got %v, want %v", err, tenants.ErrDeadline)
			}
			time.Sleep(time.Minute) // its slot is free again
		}
		start := time.Now()
		if err := ask(); !errors.Is(err, tenants.ErrDeadline) || time.Since(start) == 0 {
			t.Errorf("the question after the quarantine: got %v after %s, want it tried", err, time.Since(start))
		}
		start = time.Now()
		if err := ask(); !errors.Is(err, tenants.ErrBusy) || time.Since(start) != 0 {
			t.Errorf("in quarantine again: got %v after %s, want %v at once", err, time.Since(start), tenants.ErrBusy)
		}
		if got, _ := s.Tenant("orders"); got.QuarantinedUntil == nil {
			t.Errorf("got status %+v, want its quarantine", got)
		}
		s.denies("payments")
		time.Sleep(time.Minute)
		slow = 0
		if err := ask(); err != nil {
			t.Errorf("when it is fast again: got %v", err)
		}
		if got, _ := s.Tenant("orders"); got.QuarantinedUntil != nil {
			t.Errorf("got status %+v, want no quarantine", got)
		}
		s.allows("orders")
	})
}

// sleeps is an input that takes some time.
type sleeps time.Duration

func (s sleeps) Input(tenants.Needs) (ast.Value, error) {
	time.Sleep(time.Duration(s))
	return ast.NewObject(), nil
}

// A new policy ends a quarantine.
func TestQuarantineOfAnOldPolicy(t *testing.T) {
	s := newStage(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) {
		s.Limits.EvaluationTime = 20 * time.Millisecond
		s.Bundles[0].MinDelay, s.Bundles[0].MaxDelay = 10*time.Millisecond, 10*time.Millisecond
	})
	for range 10 {
		s.fails("loops", tenants.ErrDeadline)
	}
	s.fails("loops", tenants.ErrBusy)
	s.Set("loops", allow)
	for deadline := time.Now().Add(10 * time.Second); ; {
		a := s.ask("loops")
		if a.Err == nil && a.Decision.Allowed {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %v long after the new policy", a.Err)
		}
	}
}

func TestBodyMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{BodyMemory: 5 << 20}, func(_ tenants.ID, s *tenants.Settings) {
			s.Limits.BodyMemory = 3 << 20
		})
		s.allows("orders")
		s.denies("payments")
		hold := make(stuck)
		var mu sync.Mutex
		got := map[string]int{}
		ask := func(id tenants.ID) {
			q := []tenants.Question{{DecisionID: "d", Input: hold, BodyBytes: 1 << 20}}
			_ = s.Decide(context.Background(), id, q, func(_ int, a tenants.Answer) {
				mu.Lock()
				defer mu.Unlock()
				if errors.Is(a.Err, tenants.ErrBusy) {
					got[string(id)]++
				}
			})
		}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { ask("orders") })
		}
		synctest.Wait()
		for range 5 {
			wg.Go(func() { ask("payments") })
		}
		wg.Wait()
		if got["orders"] != 2 || got["payments"] != 3 {
			t.Errorf("got %v turned away, want 2 by the tenant's budget and 3 by that of all", got)
		}
		close(hold)
		synctest.Wait()
		s.allows("orders")
		s.denies("payments")
	})
}

// While evaluations run long, processors are lent; then they are taken back.
func TestLend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var lent []int
		s := newStage(t, tenants.Config{Lend: func(n int) {
			mu.Lock()
			defer mu.Unlock()
			lent = append(lent, n)
		}}, nil)
		for range 100 {
			s.allows("orders") // short ones borrow none
		}
		got := func(want ...int) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(lent, want) {
				t.Errorf("got %v lent, want %v", lent, want)
			}
		}
		got()
		hold := make(stuck)
		for i := range 2 {
			go func() {
				q := []tenants.Question{{DecisionID: "d", Input: hold}}
				_ = s.Decide(context.Background(), "orders", q, func(int, tenants.Answer) {})
			}()
			time.Sleep(30 * time.Millisecond)
			got([]int{1, 2}[:i+1]...)
		}
		time.Sleep(time.Minute)
		got(1, 2)
		close(hold)
		time.Sleep(500 * time.Millisecond)
		got(1, 2) // not at once,
		time.Sleep(time.Second)
		got(1, 2, 0) // but when it stays calm
		s.allows("orders")
		time.Sleep(time.Minute)
		got(1, 2, 0)
	})
}

package tenants_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// takes is an input that takes a while to make.
type takes struct {
	n    int
	long time.Duration
	made *atomic.Int64 // inputs, nil: nobody counts
}

func (in takes) Input(needs tenants.Needs) (ast.Value, error) {
	if in.made != nil {
		in.made.Add(1)
	}
	time.Sleep(in.long)
	if needs.Cancel.Cancelled() {
		return nil, policy.ErrCanceled
	}
	return ast.NewObject(ast.Item(ast.StringTerm("n"), ast.IntNumberTerm(in.n))), nil
}

// echoes returns a pool of one tenant whose entry point tells the number of the
// question, and has answered once.
func echoes(t *testing.T, cfg tenants.Config, change func(*tenants.Settings)) *tenants.Pool {
	t.Helper()
	source := new(authztest.Memory)
	source.Set("orders", "package envoy.authz\n\nallow := {\"allowed\": true, \"n\": input.n}")
	cfg.Settings = authztest.Settings(source, func(_ tenants.ID, s *tenants.Settings) {
		if change != nil {
			change(s)
		}
	})
	pool := authztest.Pool(t, cfg)
	if a := authztest.Ask(t.Context(), pool, "orders", `{"n": 1}`); a.Err != nil {
		t.Fatal(a.Err)
	}
	return pool
}

// However long each of many questions takes, each gets its own answer once: those
// that take too long ErrDeadline, and the others are not held up by them.
func TestManyQuestions(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := rand.New(rand.NewPCG(seed, 2))
				slots := 1 + r.IntN(4)
				const limit = 100 * time.Millisecond
				pool := echoes(t, tenants.Config{Workers: 1 + r.IntN(4)}, func(s *tenants.Settings) {
					s.Limits.Concurrency, s.Limits.EvaluationTime = slots, limit
				})
				questions := make([]tenants.Question, 1+r.IntN(300))
				long := make([]time.Duration, len(questions))
				stuck := 0 // that keep their slots
				for i := range questions {
					switch r.IntN(60) {
					case 0:
						if long[i] = time.Duration(r.IntN(1000)) * time.Millisecond; long[i] > limit { // heedless of its time
							stuck++
						}
					case 1, 2, 3, 4, 5:
						long[i] = time.Duration(r.IntN(3000)) * time.Microsecond
					}
					questions[i] = tenants.Question{DecisionID: fmt.Sprint(i), BodyBytes: int64(r.IntN(1000)), Input: takes{n: i, long: long[i]}}
				}
				told := make([]bool, len(questions))
				err := pool.Decide(context.Background(), "orders", questions, func(i int, a tenants.Answer) {
					if told[i] {
						t.Errorf("question %d is answered twice", i)
					}
					told[i] = true
					switch {
					case errors.Is(a.Err, tenants.ErrDeadline):
						if long[i] < limit/2 && stuck < slots { // else there may be no slot
							t.Errorf("question %d: got %v after %s", i, a.Err, long[i])
						}
					case a.Err != nil:
						if !errors.Is(a.Err, tenants.ErrBusy) { // in quarantine
							t.Errorf("question %d: got %v", i, a.Err)
						}
					case a.Decision.Value.Compare(ast.MustParseTerm(fmt.Sprintf(`{"allowed": true, "n": %d}`, i)).Value) != 0:
						t.Errorf("question %d: got %v", i, a.Decision.Value)
					case long[i] > limit:
						t.Errorf("question %d: got an answer after %s", i, long[i])
					}
				})
				if err != nil {
					t.Error(err)
				}
				for i, ok := range told {
					if !ok {
						t.Errorf("question %d is not answered", i)
					}
				}
				time.Sleep(2 * time.Second) // until all workers are free
				synctest.Wait()
				if a := authztest.Ask(t.Context(), pool, "orders", `{"n": 1}`); a.Err != nil {
					t.Errorf("afterwards: %v", a.Err)
				}
			})
		})
	}
}

// Answers are told as they come, also while a worker is at a question that takes
// long.
func TestAnswersAsTheyCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := echoes(t, tenants.Config{}, func(s *tenants.Settings) {
			s.Limits.Concurrency, s.Limits.EvaluationTime = 1, time.Minute
		})
		var questions []tenants.Question
		var due []time.Duration
		for i := range 30 {
			long := time.Duration(0)
			if i%3 == 2 {
				long = 10 * time.Millisecond
			}
			last := time.Duration(0)
			if i > 0 {
				last = due[i-1]
			}
			due = append(due, last+long)
			questions = append(questions, tenants.Question{DecisionID: "d", Input: takes{n: i, long: long}})
		}
		start := time.Now()
		next := 0
		err := pool.Decide(context.Background(), "orders", questions, func(i int, a tenants.Answer) {
			if a.Err != nil || i != next {
				t.Errorf("question %d: got %v, as answer %d", i, a.Err, next)
			}
			next++
			if took := time.Since(start); took > due[i]+2*time.Millisecond {
				t.Errorf("question %d: answered after %s, want %s", i, took, due[i])
			}
		})
		if err != nil || next != 30 {
			t.Errorf("got %d answers, %v", next, err)
		}
	})
}

// A caller with many questions does not keep the tenant's slot, nor the worker,
// from others.
func TestManyQuestionsLetOthersIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := echoes(t, tenants.Config{Workers: 1}, func(s *tenants.Settings) {
			s.Limits.Concurrency, s.Limits.EvaluationTime = 1, time.Minute
		})
		var made atomic.Int64
		questions := make([]tenants.Question, 1000)
		for i := range questions {
			questions[i] = tenants.Question{DecisionID: "d", Input: takes{n: i, long: 100 * time.Microsecond, made: &made}}
		}
		done := make(chan error)
		go func() {
			done <- pool.Decide(context.Background(), "orders", questions, func(int, tenants.Answer) {})
		}()
		time.Sleep(5 * time.Millisecond)
		before := made.Load()
		if a := authztest.Ask(t.Context(), pool, "orders", `{"n": 1}`); a.Err != nil {
			t.Error(a.Err)
		}
		if more := made.Load() - before; before == 0 || more > 10 {
			t.Errorf("%d questions were taken before, and %d before another was answered", before, more)
		}
		if err := <-done; err != nil || made.Load() != 1000 {
			t.Errorf("got %v, and %d questions were asked", err, made.Load())
		}
	})
}

// A pool that stops answers what it has begun, and begins nothing more.
func TestManyQuestionsAtTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pool := echoes(t, tenants.Config{Workers: 2}, func(s *tenants.Settings) { s.Limits.EvaluationTime = time.Minute })
		questions := make([]tenants.Question, 10_000)
		for i := range questions {
			questions[i] = tenants.Question{DecisionID: "d", Input: takes{n: i, long: time.Millisecond}}
		}
		ctx, cancel := context.WithCancel(context.Background())
		answered := 0
		err := pool.Decide(ctx, "orders", questions, func(_ int, a tenants.Answer) {
			if answered++; answered == 100 {
				cancel()
			}
			if answered > 200 && a.Err == nil {
				t.Error("got an answer after the caller was gone")
			}
		})
		if err != nil || answered != 10_000 {
			t.Errorf("got %d answers, %v", answered, err)
		}
	})
}

package tenants_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/policy"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

const (
	allow = "package envoy.authz\ndefault allow := true"
	deny  = "package envoy.authz\ndefault allow := false"
	bad   = "package envoy.authz\nallow if x"
	loops = `package envoy.authz
allow if {
	some x in numbers.range(1, 100000)
	some y in numbers.range(1, 100000)
	x * y == -1
}`
)

// stage is a source with some tenants, and a pool over it.
type stage struct {
	authztest.Memory
	*tenants.Pool
	t testing.TB
}

func newStage(t testing.TB, cfg tenants.Config, change func(tenants.ID, *tenants.Settings)) *stage {
	s := &stage{t: t}
	s.Set("orders", allow)
	s.Set("payments", deny)
	s.Set("loops", loops)
	cfg.Settings = authztest.Settings(&s.Memory, change)
	s.Pool = authztest.Pool(t, cfg)
	return s
}

func (s *stage) ask(id tenants.ID) tenants.Answer {
	return authztest.Ask(context.Background(), s.Pool, id, "{}")
}

func (s *stage) allows(id tenants.ID) {
	s.t.Helper()
	if a := s.ask(id); a.Err != nil || !a.Decision.Allowed {
		s.t.Errorf("%s: got allowed %t, error %v, want allowed", id, a.Decision.Allowed, a.Err)
	}
}

func (s *stage) denies(id tenants.ID) {
	s.t.Helper()
	if a := s.ask(id); a.Err != nil || a.Decision.Allowed {
		s.t.Errorf("%s: got allowed %t, error %v, want denied", id, a.Decision.Allowed, a.Err)
	}
}

func (s *stage) fails(id tenants.ID, want error) {
	s.t.Helper()
	if a := s.ask(id); !errors.Is(a.Err, want) || a.Decision.Allowed {
		s.t.Errorf("%s: got allowed %t, error %v, want error %v", id, a.Decision.Allowed, a.Err, want)
	}
}

func (s *stage) fetched(name string, want int) {
	s.t.Helper()
	if got := s.Fetches(name); got != want {
		s.t.Errorf("%s: got %d fetches, want %d", name, got, want)
	}
}

func (s *stage) in(id tenants.ID, want tenants.State) {
	s.t.Helper()
	if got, _ := s.Tenant(id); got.State != want {
		s.t.Errorf("%s: got state %q, want %q", id, got.State, want)
	}
}

func TestEachTenantItsOwnPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.allows("orders")
		s.denies("payments")
		s.allows("orders")
		s.fetched("orders", 1)
		s.in("orders", tenants.Warm)
	})
}

func TestOneLoadHoweverManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		release := s.Hold("orders")
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { s.allows("orders") })
		}
		synctest.Wait()
		s.in("orders", tenants.Loading)
		release()
		wg.Wait()
		s.fetched("orders", 1)
	})
}

// A caller does not wait for a load longer than it may; the load goes on.
func TestSlowLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		release := s.Hold("orders")
		start := time.Now()
		s.fails("orders", tenants.ErrNotReady)
		if took := time.Since(start); took != 500*time.Millisecond {
			t.Errorf("got an answer after %s, want 500ms", took)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 240*time.Millisecond)
		defer cancel()
		start = time.Now()
		a := authztest.Ask(ctx, s.Pool, "orders", "{}")
		if took := time.Since(start); took != 160*time.Millisecond || !errors.Is(a.Err, tenants.ErrNotReady) {
			t.Errorf("caller with 240ms: got error %v after %s, want %v after 160ms", a.Err, took, tenants.ErrNotReady)
		}
		release()
		synctest.Wait()
		s.allows("orders")
		s.fetched("orders", 1)
	})
}

func TestUnknownTenantIsRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		for range 3 {
			s.fails("nobody", tenants.ErrUnknown)
		}
		s.fetched("nobody", 1)
		s.in("nobody", tenants.Refused)
		s.Set("nobody", allow)
		time.Sleep(10 * time.Second)
		s.allows("nobody")
	})
}

func TestFailingSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.Fail("orders", errors.New("connection refused"))
		s.fails("orders", tenants.ErrNotReady)
		s.fails("orders", tenants.ErrNotReady)
		s.fetched("orders", 1)
		if got, _ := s.Tenant("orders"); got.State != tenants.Refused || !strings.Contains(got.Error, "connection refused") {
			t.Errorf("got status %+v, want it refused with the source's error", got)
		}
		s.Fail("orders", nil)
		time.Sleep(time.Second)
		s.allows("orders")

		// After that, the last good policy serves however long the source is away.
		s.Fail("orders", errors.New("connection reset"))
		time.Sleep(time.Hour)
		s.allows("orders")
		got, _ := s.Tenant("orders")
		if !strings.Contains(got.Error, "connection reset") || got.StaleSince == nil || time.Since(*got.StaleSince) < 59*time.Minute {
			t.Errorf("got status %+v, want the error and since when it is stale", got)
		}
		before := s.Fetches("orders")
		time.Sleep(time.Minute)
		if n := s.Fetches("orders") - before; n > 90 {
			t.Errorf("got %d fetches in a minute of failing, want them spaced", n)
		}
		s.Fail("orders", nil)
		time.Sleep(3 * time.Second)
		if got, _ := s.Tenant("orders"); got.Error != "" || got.StaleSince != nil {
			t.Errorf("got status %+v, want no error once the source is back", got)
		}
	})
}

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.allows("orders")
		s.Set("orders", deny)
		time.Sleep(1100 * time.Millisecond)
		s.denies("orders")

		// A bad bundle leaves the old one serving, and says why.
		s.Set("orders", bad)
		time.Sleep(1100 * time.Millisecond)
		s.denies("orders")
		if got, _ := s.Tenant("orders"); !strings.Contains(got.Error, "x is unsafe") {
			t.Errorf("got error %q, want that of the compiler", got.Error)
		}
		s.Set("orders", allow)
		time.Sleep(1100 * time.Millisecond)
		s.allows("orders")
		if got, _ := s.Tenant("orders"); got.Error != "" {
			t.Errorf("got error %q after a good bundle", got.Error)
		}
	})
}

func TestBadFirstBundle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.Set("orders", bad)
		s.fails("orders", tenants.ErrNotReady)
		if got, _ := s.Tenant("orders"); got.State != tenants.Refused || !strings.Contains(got.Error, "x is unsafe") {
			t.Errorf("got status %+v, want it refused with the compiler's error", got)
		}
	})
}

func TestGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Capacity: 1, Grace: time.Minute}, nil)
		s.allows("orders")
		s.denies("payments") // pushes orders out
		s.in("orders", tenants.Parked)

		time.Sleep(30 * time.Second)
		s.fetched("orders", 1) // polling has stopped
		s.Set("orders", deny)
		release := s.Hold("orders")
		s.allows("orders") // revived: what it has answers at once,
		s.in("orders", tenants.Warm)
		s.in("payments", tenants.Parked)
		release()
		synctest.Wait() // and the source is asked at once
		s.denies("orders")
		s.fetched("orders", 2)

		s.denies("payments")
		time.Sleep(61 * time.Second)
		if got, ok := s.Tenant("orders"); ok {
			t.Errorf("after its grace period: got status %+v, want it gone", got)
		}
		s.denies("orders") // loaded anew
	})
}

func TestParkedBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Capacity: 1, Parked: 2}, nil)
		for i := range 5 {
			name := fmt.Sprintf("t%d", i)
			s.Set(name, allow)
			s.allows(tenants.ID(name))
		}
		var got []string
		for _, st := range s.Tenants() {
			got = append(got, string(st.Tenant)+" "+string(st.State))
		}
		want := []string{"t2 parked", "t3 parked", "t4 warm"}
		if !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	})
}

// Regression: a flood of invented names must not push real tenants out, and
// must not be remembered without bound.
func TestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStage(t, tenants.Config{Capacity: 2, Refused: 100, Registerer: reg}, nil)
		s.allows("orders")
		s.denies("payments")
		for i := range 2000 {
			s.fails(tenants.ID(fmt.Sprintf("invented-%d", i)), tenants.ErrUnknown)
		}
		s.in("orders", tenants.Warm)
		s.in("payments", tenants.Warm)
		s.fetched("invented-999", 1)
		s.fetched("invented-1999", 0) // the source is not flooded, too
		s.Set("new", allow)
		s.fails("new", tenants.ErrUnknown)
		time.Sleep(time.Second)
		if n := len(s.Tenants()); n > 102 {
			t.Errorf("got %d tenants remembered, want at most 102", n)
		}
		want := `
# HELP gatehouse_checks_total Questions answered, by tenant and outcome. The tenant _unknown stands for all names that no tenant has, _other for tenants forgotten long ago.
# TYPE gatehouse_checks_total counter
gatehouse_checks_total{outcome="allowed",tenant="orders"} 1
gatehouse_checks_total{outcome="denied",tenant="payments"} 1
gatehouse_checks_total{outcome="unknown_tenant",tenant="_unknown"} 2001
`
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "gatehouse_checks_total"); err != nil {
			t.Error(err)
		}
		s.allows("new") // a second later
	})
}

func TestLoadBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Loads: 1, LoadQueue: 1}, nil)
		release := s.Hold("orders")
		var wg sync.WaitGroup
		wg.Go(func() { s.allows("orders") })
		synctest.Wait()
		wg.Go(func() { s.denies("payments") }) // waits
		synctest.Wait()
		s.fails("loops", tenants.ErrBusy)
		s.fetched("payments", 0)
		release()
		wg.Wait()
	})
}

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

// What the caller did wrong is never softened by the tenant's on_error.
func TestOnError(t *testing.T) {
	s := newStage(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) {
		s.OnError = tenants.OnErrorAllow
		s.Entries = []string{"other/allow"}
	})
	s.Set("undefined", "package envoy.authz\nallow if false")
	if a := s.ask("undefined"); !errors.Is(a.Err, policy.ErrUndefined) || a.OnError != tenants.OnErrorAllow {
		t.Errorf("undefined: got %v, on_error %d, want %d", a.Err, a.OnError, tenants.OnErrorAllow)
	}
	if a := authztest.Ask(context.Background(), s.Pool, "orders", "{"); !errors.Is(a.Err, tenants.ErrInvalid) || a.OnError != tenants.OnErrorDeny {
		t.Errorf("invalid input: got %v, on_error %d, want %d", a.Err, a.OnError, tenants.OnErrorDeny)
	}
	q := []tenants.Question{{DecisionID: "d", Entry: "not/listed", Input: authztest.Input("{}")}}
	if err := s.Decide(context.Background(), "orders", q, func(_ int, a tenants.Answer) {
		if !errors.Is(a.Err, tenants.ErrEntry) || a.OnError != tenants.OnErrorDeny {
			t.Errorf("entry that is not listed: got %v, on_error %d, want %d", a.Err, a.OnError, tenants.OnErrorDeny)
		}
	}); err != nil {
		t.Error(err)
	}
}

func TestBatch(t *testing.T) {
	var records []string
	s := newStage(t, tenants.Config{Record: func(r *tenants.Record) {
		records = append(records, fmt.Sprintf("%s %s %t", r.Tenant, r.DecisionID, r.Answer.Decision.Allowed))
	}}, nil)
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
	if len(records) != 100 || !slices.Contains(records, "even 42 true") || !slices.Contains(records, "even 43 false") {
		t.Errorf("got records %v, want one for each question", records)
	}
}

func TestEntryPoints(t *testing.T) {
	s := newStage(t, tenants.Config{}, func(id tenants.ID, s *tenants.Settings) {
		if id == "listed" {
			s.Entries = []string{"other/allow"}
		}
	})
	text := "package envoy.authz\ndefault allow := false\n-- other.rego --\npackage other\ndefault allow := true"
	s.Set("listed", text)
	s.Set("unlisted", text)
	for _, c := range []struct {
		id    tenants.ID
		entry string
		want  bool
	}{{"listed", "", false}, {"listed", "other/allow", true}, {"listed", "envoy/authz/allow", false}, {"unlisted", "other/allow", false}} {
		q := []tenants.Question{{DecisionID: "d", Entry: c.entry, Input: authztest.Input("{}")}}
		if err := s.Decide(context.Background(), c.id, q, func(_ int, a tenants.Answer) {
			if a.Err != nil || a.Decision.Allowed != c.want {
				t.Errorf("%s asked for %q: got %t, %v, want %t", c.id, c.entry, a.Decision.Allowed, a.Err, c.want)
			}
		}); err != nil {
			t.Error(err)
		}
	}
}

func TestPreloadAndRequired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stage{t: t}
		s.Set("orders", allow)
		s.Fail("payments", errors.New("connection refused"))
		s.Pool = authztest.Pool(t, tenants.Config{
			Settings: authztest.Settings(&s.Memory, nil),
			Preload:  []tenants.ID{"orders"}, Required: []tenants.ID{"payments"},
		})
		synctest.Wait()
		s.in("orders", tenants.Warm)
		if got := s.Unready(); len(got) != 1 || !strings.Contains(got["payments"], "connection refused") {
			t.Errorf("got unready %v, want payments with its error", got)
		}
		s.Set("payments", deny)
		time.Sleep(time.Minute) // nobody asks
		if got := s.Unready(); len(got) != 0 {
			t.Errorf("got unready %v, want none", got)
		}
		s.denies("payments")
	})
}

// A required tenant that is pushed out later does not make the server unready.
func TestRequiredOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Capacity: 1, Grace: time.Second, Required: []tenants.ID{"orders"}}, nil)
		synctest.Wait()
		s.denies("payments")
		time.Sleep(time.Minute)
		if _, ok := s.Tenant("orders"); ok {
			t.Error("orders is known still")
		}
		if got := s.Unready(); len(got) != 0 {
			t.Errorf("got unready %v, want none", got)
		}
	})
}

// Equal content is compiled once and polled once, and each tenant keeps what is
// its own.
func TestSharedContent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		var m authztest.Memory
		m.Set("shared", "package envoy.authz\nallow := opa.runtime().config.labels.app == \"t1\"")
		s := &stage{t: t}
		s.Pool = authztest.Pool(t, tenants.Config{
			Registerer: reg,
			Settings: authztest.Settings(&m, func(_ tenants.ID, s *tenants.Settings) {
				s.Bundles[0].Resource = "shared"
			}),
		})
		for i := range 20 {
			if id := tenants.ID(fmt.Sprintf("t%d", i)); i == 1 {
				s.allows(id)
			} else {
				s.denies(id)
			}
		}
		if got := m.Fetches("shared"); got != 1 {
			t.Errorf("got %d fetches for 20 tenants, want 1", got)
		}
		time.Sleep(10 * time.Second)
		if got := m.Fetches("shared"); got < 9 || got > 11 {
			t.Errorf("got %d fetches after ten polls, want one each", got)
		}
		for i := range 30 { // loading more does not put the polls off
			s.denies(tenants.ID(fmt.Sprintf("more%d", i)))
			time.Sleep(time.Second / 3)
		}
		if got := m.Fetches("shared"); got < 18 {
			t.Errorf("got %d fetches after twenty polls with tenants loading, want one each", got)
		}
		want := "# HELP gatehouse_policies Compiled policies in memory; tenants with the same content share one.\n# TYPE gatehouse_policies gauge\ngatehouse_policies 1\n"
		if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "gatehouse_policies"); err != nil {
			t.Error(err)
		}
		m.Set("shared", allow)
		time.Sleep(1100 * time.Millisecond)
		s.allows("t7")
		s.allows("t8")
	})
}

func TestSettingsFault(t *testing.T) {
	s := &stage{t: t}
	s.Pool = authztest.Pool(t, tenants.Config{
		Settings: func(tenants.ID) (*tenants.Settings, error) { return nil, errors.New("no service") },
	})
	s.fails("orders", tenants.ErrNotReady)
}

func TestNotFoundAfterGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.allows("orders")
		s.Fail("orders", bundles.ErrNotFound)
		time.Sleep(time.Minute)
		s.allows("orders")
	})
}

// Where the source's word is final, like a directory's, a tenant ends with its
// bundle; but not while the folder is only being replaced.
func TestFinalSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, func(_ tenants.ID, s *tenants.Settings) { s.Bundles[0].Final = true })
		s.allows("orders")
		s.Fail("orders", bundles.ErrNotFound)
		time.Sleep(1500 * time.Millisecond)
		s.allows("orders")
		s.Fail("orders", nil)
		time.Sleep(time.Minute)
		s.Fail("orders", errors.New("stale file handle"))
		time.Sleep(time.Minute)
		s.allows("orders")
		s.Fail("orders", bundles.ErrNotFound)
		time.Sleep(10 * time.Second)
		s.fails("orders", tenants.ErrUnknown)
		s.denies("payments")
		s.Fail("orders", nil)
		time.Sleep(2 * time.Second)
		s.allows("orders")
	})
}

// Load, eviction, revival and forgetting, over and over, leave nothing behind.
func TestCycles(t *testing.T) {
	var before, after runtime.MemStats
	goroutines := runtime.NumGoroutine()
	func() {
		s := &stage{t: t}
		s.Pool = authztest.Pool(t, tenants.Config{
			Capacity: 5, Parked: 5, Grace: time.Hour,
			Settings: authztest.Settings(&s.Memory, nil),
		})
		for i := range 20 {
			s.Set(fmt.Sprintf("t%d", i), fmt.Sprintf("package envoy.authz\nallow := %d == %d", i, i))
		}
		cycle := func(n int) {
			for i := range n {
				s.allows(tenants.ID(fmt.Sprintf("t%d", i%20)))
			}
		}
		cycle(500)
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&before)
		idle := runtime.NumGoroutine()
		cycle(10_000)
		runtime.GC()
		runtime.GC()
		runtime.ReadMemStats(&after)
		if n := runtime.NumGoroutine(); n > idle+5 {
			t.Errorf("got %d goroutines after 10,000 cycles, want %d", n, idle)
		}
		if after.HeapInuse > before.HeapInuse*3/2+4<<20 {
			t.Errorf("got %d bytes of heap after 10,000 cycles, want %d", after.HeapInuse, before.HeapInuse)
		}
	}()
	t.Logf("goroutines before the pool: %d; heap %d → %d bytes", goroutines, before.HeapInuse, after.HeapInuse)
}

// Eviction and revival while the evicted is being asked.
func TestChurnUnderLoad(t *testing.T) {
	s := newStage(t, tenants.Config{Capacity: 2, Parked: 1, Grace: time.Millisecond}, nil)
	for i := range 6 {
		s.Set(fmt.Sprintf("t%d", i), allow)
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				a := s.ask(tenants.ID(fmt.Sprintf("t%d", (g+i)%6)))
				if a.Err == nil && !a.Decision.Allowed || a.Err != nil && !errors.Is(a.Err, tenants.ErrNotReady) && !errors.Is(a.Err, tenants.ErrDeadline) {
					t.Errorf("got %v, %v", a.Decision.Allowed, a.Err)
				}
			}
		})
	}
	wg.Wait()
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

func TestParseID(t *testing.T) {
	long := strings.Repeat("a", 128)
	for _, ok := range []string{"a", "0", "orders", "a.b-c_d", long, "a1"} {
		if id, err := tenants.ParseID(ok); err != nil || string(id) != ok {
			t.Errorf("ParseID(%q): got %q, %v", ok, id, err)
		}
	}
	for _, no := range []string{"", "A", "a/b", "../a", "a..b", ".a", "a.", "-a", "a-", "_", "a b", "a\x00", "ä", "{{.}}", "a?x", long + "a"} {
		if id, err := tenants.ParseID(no); err == nil || id != "" {
			t.Errorf("ParseID(%q): got %q, want an error", no, id)
		}
	}
}

func FuzzParseID(f *testing.F) {
	f.Add("orders")
	f.Add("a/../b")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := tenants.ParseID(s)
		if err == nil && (string(id) != s || strings.ContainsAny(s, "/\\%?#&{}\x00 ") || strings.Contains(s, "..") || len(s) > 128) {
			t.Errorf("ParseID(%q): got %q", s, id)
		}
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

// The budget evicts who was not asked for longest; what is shared counts once.
func TestMemoryBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Memory: 250 << 10}, nil) // about three small policies
		for i := range 6 {
			s.Set(fmt.Sprintf("own%d", i), fmt.Sprintf("package envoy.authz\nallow := %d == %d", i, i))
			s.Set(fmt.Sprintf("same%d", i), allow)
		}
		for i := range 6 {
			s.allows(tenants.ID(fmt.Sprintf("same%d", i)))
		}
		if n := len(s.Tenants()); n != 6 {
			t.Errorf("got %d tenants that share a policy, want 6", n)
		}
		for i := range 6 {
			s.allows(tenants.ID(fmt.Sprintf("own%d", i)))
		}
		list := s.Tenants()
		if n := len(list); n != 3 || list[2].Tenant != "own5" {
			t.Errorf("got %d tenants in memory, want the last 3: %+v", n, list)
		}
		if got := list[2]; got.MemoryBytes < 60<<10 || got.OwnBytes != got.MemoryBytes {
			t.Errorf("got an estimate of %d bytes, %d its own", got.MemoryBytes, got.OwnBytes)
		}
		s.allows("own0") // again
		s.allows("same3")
	})
}

// reads is an input that says whether the whole body is asked for.
type reads struct{}

func (reads) Input(n tenants.Needs) (ast.Value, error) {
	if n.WholeBody {
		return nil, tenants.ErrPartialBody
	}
	return ast.NewObject(), nil
}

func TestWholeBody(t *testing.T) {
	s := newStage(t, tenants.Config{}, func(id tenants.ID, s *tenants.Settings) {
		s.WholeBody = id != "lenient"
		s.OnError = tenants.OnErrorAllow
	})
	body := "package envoy.authz\ndefault allow := true\nallow := false if input.parsed_body.x"
	s.Set("reads", body)
	s.Set("lenient", body)
	for id, want := range map[tenants.ID]error{"reads": tenants.ErrPartialBody, "orders": nil, "lenient": nil} {
		q := []tenants.Question{{DecisionID: "d", Input: reads{}}}
		if err := s.Decide(context.Background(), id, q, func(_ int, a tenants.Answer) {
			if !errors.Is(a.Err, want) || a.OnError != tenants.OnErrorDeny && want != nil {
				t.Errorf("%s: got %v, on_error %d, want %v", id, a.Err, a.OnError, want)
			}
		}); err != nil {
			t.Error(err)
		}
	}
}

func TestRefresh(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Capacity: 1}, func(_ tenants.ID, s *tenants.Settings) {
			s.Bundles[0].MinDelay, s.Bundles[0].MaxDelay = time.Hour, time.Hour
		})
		refresh := func(id tenants.ID, want string) {
			t.Helper()
			err := s.Refresh(context.Background(), id)
			if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("refresh of %s: got %v, want %q", id, err, want)
			}
		}
		s.allows("orders")
		s.Set("orders", deny)
		s.allows("orders")
		refresh("orders", "")
		s.denies("orders")
		s.Set("orders", bad)
		refresh("orders", "x is unsafe")
		s.denies("orders")
		s.Fail("orders", errors.New("connection refused"))
		refresh("orders", "connection refused")
		s.denies("orders")

		// Parked, refused, and not known at all.
		s.denies("payments")
		s.in("orders", tenants.Parked)
		s.Set("orders", allow)
		refresh("orders", "")
		s.allows("orders")
		s.fails("nobody", tenants.ErrUnknown)
		s.Set("nobody", allow)
		refresh("nobody", "")
		s.allows("nobody")
		refresh("never-seen", "unknown tenant")
	})
}

// The operator's policy must allow too, and comes first: nothing of a tenant
// softens it.
func TestGuard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stage{t: t}
		s.Set("orders", allow)
		s.Set("payments", deny)
		s.Set("undefined", "package envoy.authz\nallow if false")
		s.Set("dry", deny)
		settings := authztest.Settings(&s.Memory, func(id tenants.ID, s *tenants.Settings) {
			s.OnError = tenants.OnErrorAllow
			s.DryRun = id == "dry"
		})
		guard, err := settings("guard")
		if err != nil {
			t.Fatal(err)
		}
		guard.Entry = "guard/allow"
		var records []tenants.Record
		s.Pool = authztest.Pool(t, tenants.Config{Settings: settings, Guard: guard, Record: func(r *tenants.Record) { records = append(records, *r) }})
		synctest.Wait()
		if got := s.Unready()["guard"]; !strings.Contains(got, "not loaded") {
			t.Errorf("got unready %q without the guard's bundle", got)
		}
		ask := func(id tenants.ID, input string) tenants.Answer {
			return authztest.Ask(context.Background(), s.Pool, id, input)
		}
		if a := ask("orders", "{}"); !errors.Is(a.Err, tenants.ErrNotReady) || a.OnError != tenants.OnErrorDeny {
			t.Errorf("before the guard is there: got %+v, want it denied whatever on_error says", a)
		}
		s.Set("guard", "package guard\nallow := {\"allowed\": false, \"body\": \"guard\"} if input.evil\nallow if not input.evil\nallow := 1 if input.broken")
		time.Sleep(3 * time.Second)
		if got := s.Unready(); len(got) != 0 {
			t.Errorf("got unready %v", got)
		}
		s.allows("orders")
		s.denies("payments")
		if a := ask("undefined", "{}"); !errors.Is(a.Err, policy.ErrUndefined) || a.OnError != tenants.OnErrorAllow {
			t.Errorf("a fault of the tenant after the guard: got %+v", a)
		}
		if a := ask("dry", "{}"); a.Err != nil || !a.DryRun || a.Guard {
			t.Errorf("dry run: got %+v", a)
		}
		for _, id := range []tenants.ID{"orders", "payments", "undefined", "dry"} {
			a := ask(id, `{"evil": true}`)
			if a.Err != nil || a.Decision.Allowed || a.Decision.Body != "guard" || !a.Guard || a.DryRun {
				t.Errorf("%s: got %+v, want the guard's denial", id, a)
			}
			a = ask(id, `{"broken": true}`)
			if !errors.Is(a.Err, policy.ErrConflict) || a.OnError != tenants.OnErrorDeny {
				t.Errorf("%s with a broken guard: got %+v, want it denied", id, a)
			}
		}
		if r := records[len(records)-1]; len(r.Guard) != 1 || r.Guard[0].Name != "policy" {
			t.Errorf("got record %+v, want the guard's revision", r)
		}
		s.Set("guard", "package guard\nallow := false") // polled as any bundle
		time.Sleep(2 * time.Second)
		s.denies("orders")
	})
}

func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Capacity: 3}, nil)
		for i := range 4 { // t0 is parked in the end
			name := fmt.Sprintf("t%d", i)
			s.Set(name, "package envoy.authz\ndefault allow := false\nallow if opa.runtime().config.labels.color == \"red\"")
			s.denies(tenants.ID(name))
		}
		s.fails("nobody", tenants.ErrUnknown)
		s.Set("nobody", allow)

		change := func(id tenants.ID, s *tenants.Settings) {
			if id == "t1" || id == "t0" {
				s.Labels = map[string]string{"color": "red"}
			}
		}
		before := s.Fetches("t2")
		if n := s.Reload(tenants.Live{Settings: authztest.Settings(&s.Memory, change), Capacity: 3}); n != 1 {
			t.Errorf("got %d tenants moving, want 1", n)
		}
		synctest.Wait()
		s.fetched("t2", before)
		s.allows("t1")
		s.denies("t2")
		s.allows("t0") // it was parked: it is loaded anew
		s.allows("nobody")

		// Settings that do not work leave the old ones, and are tried again.
		before = s.Fetches("t1")
		s.fetched("t1", before)
		broken := func(id tenants.ID, s *tenants.Settings) {
			change(id, s)
			if id == "nobody" {
				s.Bundles[0].Resource = "elsewhere"
			}
		}
		s.Reload(tenants.Live{Settings: authztest.Settings(&s.Memory, broken), Capacity: 3})
		synctest.Wait()
		s.allows("nobody")
		if got, _ := s.Tenant("nobody"); !strings.Contains(got.Error, "new settings") {
			t.Errorf("got status %+v, want the error of its new settings", got)
		}
		s.Set("elsewhere", deny)
		time.Sleep(11 * time.Second)
		s.denies("nobody")

		// The bounds change, too.
		s.Reload(tenants.Live{Settings: authztest.Settings(&s.Memory, broken), Capacity: 1, Parked: 1})
		if n := len(s.Tenants()); n != 2 {
			t.Errorf("got %d tenants, want one warm and one parked", n)
		}
		s.Reload(tenants.Live{Settings: authztest.Settings(&s.Memory, broken), Capacity: 10})
		for i := range 4 {
			s.ask(tenants.ID(fmt.Sprintf("t%d", i)))
			s.in(tenants.ID(fmt.Sprintf("t%d", i)), tenants.Warm)
		}
		s.in("t0", tenants.Warm)
	})
}

// A tenant that loads while the settings change ends up with the new ones.
func TestReloadWhileLoading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, nil)
		s.Set("t", "package envoy.authz\ndefault allow := false\nallow if opa.runtime().config.labels.color == \"red\"")
		release := s.Hold("t")
		go s.ask("t")
		synctest.Wait()
		s.Reload(tenants.Live{Settings: authztest.Settings(&s.Memory, func(_ tenants.ID, s *tenants.Settings) {
			s.Labels = map[string]string{"color": "red"}
		})})
		release()
		synctest.Wait()
		s.allows("t")
	})
}

func TestReloadUnderLoad(t *testing.T) {
	s := newStage(t, tenants.Config{Capacity: 4}, nil)
	for i := range 6 {
		s.Set(fmt.Sprintf("t%d", i), allow)
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := g; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if a := s.ask(tenants.ID(fmt.Sprintf("t%d", i%6))); a.Err == nil && !a.Decision.Allowed {
					t.Error("got a denial")
				}
			}
		})
	}
	for n := range 50 {
		s.Reload(tenants.Live{Capacity: 3 + n%3, Settings: authztest.Settings(&s.Memory, func(id tenants.ID, s *tenants.Settings) {
			if id == tenants.ID(fmt.Sprintf("t%d", n%6)) {
				s.Labels = map[string]string{"n": fmt.Sprint(n)}
			}
		})})
	}
	close(stop)
	wg.Wait()
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

// What was good last serves a start while its source is away; nothing that did
// not compile is ever saved.
func TestStore(t *testing.T) {
	dir := t.TempDir()
	store, err := bundles.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	var source authztest.Memory
	settings := authztest.Settings(&source, func(_ tenants.ID, s *tenants.Settings) {
		s.Bundles[0].MinDelay, s.Bundles[0].MaxDelay = 10*time.Millisecond, 10*time.Millisecond
	})
	run := func(maxStale time.Duration, f func(s *stage)) {
		t.Helper()
		ctx, stop := context.WithCancel(context.Background())
		s := &stage{t: t, Pool: tenants.New(tenants.Config{
			Settings: settings, Store: store, MaxStale: maxStale, Logger: slog.New(slog.DiscardHandler),
		})}
		ended := make(chan error, 1)
		go func() { ended <- s.Run(ctx) }()
		f(s)
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}
	eventually := func(what string, f func() bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); !f(); {
			if time.Now().After(deadline) {
				t.Fatalf("not %s after 10 s", what)
			}
			runtime.Gosched()
		}
	}
	source.Set("orders", allow)
	source.Set("payments", deny)
	run(0, func(s *stage) {
		s.allows("orders")
		s.denies("payments")
		source.Set("orders", deny)
		eventually("updated", func() bool { a := s.ask("orders"); return a.Err == nil && !a.Decision.Allowed })
		source.Set("orders", bad)
		eventually("refused", func() bool { st, _ := s.Tenant("orders"); return st.Error != "" })
	})

	away := errors.New("connection refused")
	source.Fail("orders", away)
	source.Fail("payments", bundles.ErrNotFound) // it is gone for good
	run(0, func(s *stage) {
		s.denies("orders")
		st, _ := s.Tenant("orders")
		if st.StaleSince == nil || time.Since(*st.StaleSince) > time.Minute || !strings.Contains(st.Error, "connection refused") {
			t.Errorf("got status %+v, want since when it is stale, and why", st)
		}
		s.fails("payments", tenants.ErrUnknown)
		source.Set("orders", allow)
		eventually("fresh", func() bool { a := s.ask("orders"); return a.Err == nil && a.Decision.Allowed })
		if st, _ := s.Tenant("orders"); st.StaleSince != nil {
			t.Errorf("got status %+v, want it fresh", st)
		}
	})

	// A source that hangs is not waited for long.
	release := source.Hold("orders")
	run(0, func(s *stage) {
		s.fails("orders", tenants.ErrNotReady)
		eventually("loaded from disk", func() bool { a := s.ask("orders"); return a.Err == nil && a.Decision.Allowed })
	})
	release()

	// Too old is not ready.
	source.Fail("orders", away)
	run(time.Nanosecond, func(s *stage) { s.fails("orders", tenants.ErrNotReady) })
	run(time.Hour, func(s *stage) { s.allows("orders") })

	// A corrupt file is no bundle, and a store that cannot be written to does
	// not keep anybody from being served.
	files, err := os.ReadDir(dir)
	if err != nil || len(files) == 0 {
		t.Fatalf("got files %v, %v", files, err)
	}
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		text[len(text)/2] ^= 1
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run(0, func(s *stage) { s.fails("orders", tenants.ErrNotReady) })
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	source.Set("orders", allow)
	run(0, func(s *stage) { s.allows("orders") })
}

func TestMaxStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{MaxStale: time.Minute}, nil)
		s.allows("orders")
		time.Sleep(time.Hour)
		s.allows("orders") // it is confirmed every second
		s.Fail("orders", errors.New("connection refused"))
		time.Sleep(58 * time.Second)
		s.allows("orders")
		time.Sleep(5 * time.Second)
		s.fails("orders", tenants.ErrNotReady)
		s.denies("payments")
		s.Fail("orders", nil)
		time.Sleep(time.Minute)
		s.allows("orders")
	})
}

package tenants_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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
# HELP gatehouse_checks_total Questions answered, by tenant and outcome. The tenant _unknown stands for all names that no tenant has, _other for the tenants that have no label of their own.
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

// The budget evicts who was not asked for longest; what is shared counts once.
func TestMemoryBudget(t *testing.T) {
	for _, c := range []struct {
		evaluator     policy.Evaluator
		budget, least int64 // about three small policies, and what one takes
	}{{policy.Topdown, 80 << 10, 20 << 10}, {policy.Plan, 18 << 10, 4 << 10}} {
		t.Run(string(c.evaluator), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStage(t, tenants.Config{Memory: c.budget}, func(_ tenants.ID, s *tenants.Settings) { s.Evaluator = c.evaluator })
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
					t.Fatalf("got %d tenants in memory, want the last 3: %+v", n, list)
				}
				if got := list[2]; got.MemoryBytes < c.least || got.OwnBytes != got.MemoryBytes {
					t.Errorf("got an estimate of %d bytes, %d its own", got.MemoryBytes, got.OwnBytes)
				}
				s.allows("own0") // again
				s.allows("same3")
			})
		})
	}
}

// Loads that hang leave their turn to others after a second.
func TestHangingLoads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{Loads: 4}, nil)
		var release []func()
		for i := range 40 {
			name := fmt.Sprintf("ill%d", i)
			s.Set(name, allow)
			release = append(release, s.Hold(name))
			go s.ask(tenants.ID(name))
		}
		synctest.Wait()
		s.fails("orders", tenants.ErrNotReady) // it waits for its turn
		time.Sleep(10 * time.Second)
		s.allows("orders")
		for _, r := range release {
			r()
		}
		synctest.Wait()
		for i := range 40 {
			s.allows(tenants.ID(fmt.Sprintf("ill%d", i)))
		}
		s.denies("payments")
	})
}

// A source that stalls holds up no other, and one slow bundle of a service none
// of its others.
func TestStalledSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStage(t, tenants.Config{}, func(id tenants.ID, s *tenants.Settings) {
			if strings.HasPrefix(string(id), "ill") {
				s.Bundles[0].Service = "ill"
			}
		})
		s.allows("orders")
		for i := range 100 {
			name := fmt.Sprintf("ill%d", i)
			s.Set(name, allow)
			s.allows(tenants.ID(name))
		}
		s.Set("near", allow) // of the good service, and slow
		s.allows("near")
		var release []func()
		for i := range 100 {
			release = append(release, s.Hold(fmt.Sprintf("ill%d", i)))
		}
		release = append(release, s.Hold("near"))
		for n := range 20 {
			text := deny
			if n%2 == 1 {
				text = allow
			}
			s.Set("orders", text)
			time.Sleep(2 * time.Second)
			if n%2 == 0 {
				s.denies("orders")
			} else {
				s.allows("orders")
			}
		}
		if got, _ := s.Tenant("ill7"); got.StaleSince == nil || got.Error == "" {
			t.Errorf("got status %+v, want that it is stale", got)
		}
		for _, r := range release {
			r()
		}
		time.Sleep(3 * time.Minute)
		for _, st := range s.Tenants() {
			if st.Error != "" || st.StaleSince != nil {
				t.Errorf("got status %+v, want it fresh again", st)
			}
		}
	})
}

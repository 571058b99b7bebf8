package tenants_test

import (
	"context"
	"errors"
	"fmt"
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
			s.Log = authztest.Logged()
		})
		guard, err := settings("guard")
		if err != nil {
			t.Fatal(err)
		}
		guard.Entry = "guard/allow"
		logs, console := authztest.Logs(t)
		s.Pool = authztest.Pool(t, tenants.Config{Settings: settings, Guard: guard, Logs: logs})
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
		answered := 0
		for _, e := range console.Events(12) {
			if custom, _ := e["custom"].(map[string]any); custom != nil && custom["guard"].(map[string]any)["answered"] == true {
				answered++
			}
		}
		if answered != 4 {
			t.Errorf("%d events say that the guard answered, want 4", answered)
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

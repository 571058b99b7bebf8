package tenants_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/authztest"
	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

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

	// A source that hangs is not waited for as long as a caller waits.
	release := source.Hold("orders")
	run(0, func(s *stage) { s.allows("orders") })
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

package tenants_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/gatehouse-authz/gatehouse/bundles"
	"github.com/gatehouse-authz/gatehouse/tenants"
)

// checks are the samples of gatehouse_checks_total, by tenant and outcome.
func checks(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	return samples(t, reg, "gatehouse_checks_total")
}

// samples are the samples of a metric by the values of its labels in the order of
// their names, joined with spaces.
func samples(t *testing.T, reg *prometheus.Registry, name string) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetValue())
			}
			v := m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			got[strings.Join(labels, " ")] = v
		}
	}
	return got
}

func sum(m map[string]float64) (n float64) {
	for _, v := range m {
		n += v
	}
	return n
}

// Those that come first have a label of their own, the rest share one, and no sum
// ever goes down.
func TestLabels(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStage(t, tenants.Config{Labels: 2, Registerer: reg}, nil)
		for i := range 4 {
			name := fmt.Sprintf("t%d", i)
			s.Set(name, allow)
			for range i + 1 {
				s.allows(tenants.ID(name))
			}
		}
		want := map[string]float64{"allowed t0": 1, "allowed t1": 2, "allowed _other": 7}
		got := checks(t, reg)
		for k, n := range want {
			if got[k] != n {
				t.Errorf("got %v, want %q %v", got, k, n)
			}
		}
		if len(got) != len(want) {
			t.Errorf("got %v, want %v", got, want)
		}
		if ages := samples(t, reg, "gatehouse_bundle_age_seconds"); len(ages) != 3 {
			t.Errorf("got the ages %v, want those of t0, t1 and _other", ages)
		}
	})
}

// A tenant that is known no more leaves its label to one that is, and what was
// counted under it to the rest.
func TestLabelsOfThePast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStage(t, tenants.Config{Capacity: 1, Parked: -1, Labels: 2, Registerer: reg}, nil)
		total := 0.0
		for i := range 20 {
			name := fmt.Sprintf("t%d", i%5)
			s.Set(name, allow)
			s.allows(tenants.ID(name)) // and the one before is gone
			total++
			got := checks(t, reg)
			if sum(got) != total || len(got) > 3 {
				t.Fatalf("after %d checks: got %v", i+1, got)
			}
			if got["allowed "+name] == 0 {
				t.Fatalf("after %d checks: %s has no label of its own: %v", i+1, name, got)
			}
		}
	})
}

// Regression: what was refused since too many tenants wait to be loaded was
// counted nowhere.
func TestRefusedLoadIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStage(t, tenants.Config{Loads: 1, LoadQueue: 1, Registerer: reg}, nil)
		for _, name := range []string{"a", "b", "c"} {
			s.Set(name, allow)
		}
		release := s.Hold("a")
		defer release()
		for _, name := range []tenants.ID{"a", "b"} {
			go s.ask(name)
			synctest.Wait()
		}
		s.fails("c", tenants.ErrBusy)
		if got := checks(t, reg); got["busy _unknown"] != 1 {
			t.Errorf("got %v, want one busy", got)
		}
		if got := samples(t, reg, "gatehouse_waiting_loads"); got[""] != 1 {
			t.Errorf("got %v waiting loads, want 1", got)
		}
	})
}

// The life of tenants and of their bundles is counted.
func TestLifeIsCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewRegistry()
		s := newStage(t, tenants.Config{Capacity: 1, Grace: time.Hour, Registerer: reg}, nil)
		s.allows("orders")
		s.denies("payments") // orders is parked
		s.allows("orders")   // and revived
		s.Set("broken", "-- p.rego --\npackage\n")
		s.fails("broken", tenants.ErrNotReady)
		s.fails("nobody", tenants.ErrUnknown)
		s.Set("orders", allow+"\n")
		if err := s.Refresh(t.Context(), "orders"); err != nil {
			t.Fatal(err)
		}
		s.Fail("orders", bundles.ErrRefused)
		if err := s.Refresh(t.Context(), "orders"); err == nil {
			t.Fatal("a source that fails was asked without an error")
		}
		for _, c := range []struct {
			name, labels string
			want         float64
		}{
			{"gatehouse_tenant_loads_total", "loaded", 2},
			{"gatehouse_tenant_loads_total", "refused", 1},
			{"gatehouse_tenant_loads_total", "unknown", 1},
			{"gatehouse_tenant_load_seconds", "", 4},
			{"gatehouse_tenant_moves_total", "parked", 2},
			{"gatehouse_tenant_moves_total", "revived", 1},
			{"gatehouse_tenant_moves_total", "gone", 0},
			{"gatehouse_tenants", "warm", 1},
			{"gatehouse_tenants", "parked", 1},
			{"gatehouse_tenants", "refused", 2},
		} {
			if got := samples(t, reg, c.name); got[c.labels] != c.want {
				t.Errorf("%s: got %v, want %q %v", c.name, got, c.labels, c.want)
			}
		}
		if got := samples(t, reg, "gatehouse_bundle_fetches_total"); got["new"] < 3 || got["failed"] < 1 {
			t.Errorf("got the fetches %v", got)
		}
		if problems, err := testutil.GatherAndLint(reg); err != nil || len(problems) > 0 {
			t.Errorf("lint: %v, %v", problems, err)
		}
	})
}

package tenants

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/gatehouse-authz/gatehouse/control"
	"github.com/gatehouse-authz/gatehouse/decisionlog"
	"github.com/gatehouse-authz/gatehouse/schedule"
)

// stalled is a console that takes nothing.
type stalled struct{}

func (stalled) Write([]byte) (int, error) { return 0, errors.New("takes nothing") }

// A decision log is opened once, for the first decision. That of a tenant that is
// gone is retired, also where it is opened later: what it cannot deliver is
// dropped in the end.
func TestLogOpenedLate(t *testing.T) {
	for _, gone := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			s := schedule.New(0)
			logs := decisionlog.New(decisionlog.Config{Schedule: s, Console: stalled{}})
			wg.Go(func() { s.Run(ctx) })
			wg.Go(func() { logs.Run(ctx) })
			defer wg.Wait()
			defer cancel()

			p := &Pool{cfg: Config{Logs: logs}, id: "1"}
			in := newInstance("orders", &Settings{Tenant: &control.Tenant{Log: &control.Log{Settings: decisionlog.Settings{
				Sinks: []decisionlog.Sink{decisionlog.Console{}},
			}}}}, 1)
			if _, ok := in.logStatus(); ok || p.logOf(in) != nil {
				t.Error("it has a log before its settings are known")
			}
			p.recordOf(in)
			if s, ok := in.logStatus(); !ok || s.Recorded != 0 || in.log.Load() != nil {
				t.Errorf("before the first decision: %+v, %v, opened: %v", s, ok, in.log.Load() != nil)
			}
			if gone {
				in.retireLog()
			}
			opened := make([]*decisionlog.Log, 8)
			var opening sync.WaitGroup
			for i := range opened {
				opening.Go(func() { opened[i] = p.logOf(in) })
			}
			opening.Wait()
			for _, log := range opened {
				if log == nil || log != opened[0] {
					t.Fatalf("got %v", opened)
				}
			}
			if err := opened[0].Record(time.Time{}, &decisionlog.Event{DecisionID: "1", Timestamp: time.Now(), Result: ast.Boolean(true)}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour)
			synctest.Wait()
			st, _ := in.logStatus()
			if dropped := st.Dropped["retired"] == 1; dropped != gone || st.Recorded != 1 {
				t.Errorf("gone %v: got %+v", gone, st)
			}
		})
	}
}

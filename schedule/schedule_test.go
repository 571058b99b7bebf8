package schedule_test

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gatehouse-authz/gatehouse/schedule"
)

// run runs a Schedule while f does, in time that passes only when all wait.
func run(t *testing.T, long int, f func(ctx context.Context, s *schedule.Schedule)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		s := schedule.New(long)
		var wg sync.WaitGroup
		wg.Go(func() { s.Run(ctx) })
		f(ctx, s)
		cancel()
		wg.Wait()
	})
}

func TestAt(t *testing.T) {
	run(t, 0, func(_ context.Context, s *schedule.Schedule) {
		begin := time.Now()
		var done []time.Duration
		task := s.NewTask("a", func(context.Context, bool) (time.Duration, bool) {
			done = append(done, time.Since(begin))
			return time.Minute, false
		})
		task.At(begin.Add(3 * time.Second))
		task.At(begin.Add(2 * time.Second)) // earlier wins
		task.At(begin.Add(9 * time.Second))
		time.Sleep(70 * time.Second)
		task.Stop()
		time.Sleep(time.Hour)
		synctest.Wait()
		if len(done) != 2 || done[0] != 2*time.Second || done[1] != 62*time.Second {
			t.Errorf("done at %v, want [2s 1m2s]", done)
		}
	})
}

// A task that is wanted while it is done is done again, and never twice at once.
func TestNeverTwiceAtOnce(t *testing.T) {
	run(t, 0, func(_ context.Context, s *schedule.Schedule) {
		var now, most, times int
		task := s.NewTask("a", func(context.Context, bool) (time.Duration, bool) {
			now++
			most = max(most, now)
			times++
			time.Sleep(100 * time.Millisecond)
			now--
			return -1, false
		})
		task.At(time.Now())
		time.Sleep(50 * time.Millisecond)
		task.At(time.Now())
		task.At(time.Now())
		time.Sleep(time.Hour)
		synctest.Wait()
		if times != 2 || most != 1 {
			t.Errorf("done %d times, %d at once; want 2 and 1", times, most)
		}
	})
}

// A lane whose tasks hang keeps no other from being done.
func TestLanes(t *testing.T) {
	run(t, 0, func(_ context.Context, s *schedule.Schedule) {
		var hung, most atomic.Int32
		for range 200 {
			s.NewTask("hung", func(context.Context, bool) (time.Duration, bool) {
				most.Store(max(most.Load(), hung.Add(1)))
				time.Sleep(30 * time.Second)
				hung.Add(-1)
				return 0, false
			}).At(time.Now())
		}
		var others atomic.Int32
		for range 100 {
			s.NewTask("well", func(context.Context, bool) (time.Duration, bool) {
				others.Add(1)
				return -1, false
			}).At(time.Now())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if others.Load() != 100 {
			t.Errorf("%d of 100 tasks done while another lane hangs", others.Load())
		}
		if most.Load() != schedule.LaneWorkers {
			t.Errorf("%d tasks of one lane at once, want %d", most.Load(), schedule.LaneWorkers)
		}
	})
}

// What takes long is done patiently, apart from what does not, and comes back.
func TestSlow(t *testing.T) {
	run(t, 0, func(_ context.Context, s *schedule.Schedule) {
		var patience []bool
		begin := time.Now()
		task := s.NewTask("a", func(_ context.Context, patient bool) (time.Duration, bool) {
			patience = append(patience, patient)
			if !patient && time.Since(begin) < time.Minute {
				return 0, true
			}
			if time.Since(begin) < time.Minute {
				time.Sleep(2 * schedule.Fast)
			}
			return 40 * time.Second, false
		})
		task.At(begin)
		time.Sleep(150 * time.Second)
		synctest.Wait()
		want := []bool{false, true, true, true, false}
		if len(patience) < len(want) {
			t.Fatalf("got %v, want %v", patience, want)
		}
		for i := range want {
			if patience[i] != want[i] {
				t.Fatalf("got %v, want %v", patience, want)
			}
		}
	})
}

// Tasks that wait for their lane, and are stopped there, leave their place to
// those behind them.
func TestStopWhileWaiting(t *testing.T) {
	run(t, 0, func(_ context.Context, s *schedule.Schedule) {
		var tasks []*schedule.Task
		var done atomic.Int32
		for range 3 * schedule.LaneWorkers {
			task := s.NewTask("a", func(context.Context, bool) (time.Duration, bool) {
				time.Sleep(time.Second)
				done.Add(1)
				return -1, false
			})
			task.At(time.Now())
			tasks = append(tasks, task)
		}
		time.Sleep(500 * time.Millisecond)
		for _, task := range tasks[schedule.LaneWorkers : 2*schedule.LaneWorkers] {
			task.Stop()
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if want := int32(2 * schedule.LaneWorkers); done.Load() != want {
			t.Errorf("%d tasks done, want %d", done.Load(), want)
		}
	})
}

// At most so many tasks wait long; their workers are free meanwhile.
func TestLong(t *testing.T) {
	run(t, 10, func(_ context.Context, s *schedule.Schedule) {
		var long, short atomic.Int32
		for range 30 {
			var task *schedule.Task
			task = s.NewTask("a", func(ctx context.Context, _ bool) (time.Duration, bool) {
				if task.Long(ctx, func(ctx context.Context) {
					long.Add(1)
					select {
					case <-time.After(time.Minute):
					case <-ctx.Done():
					}
				}) {
					return -1, false
				}
				short.Add(1)
				return time.Hour, false
			})
			task.At(time.Now())
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if long.Load() != 10 || short.Load() != 20 {
			t.Errorf("%d wait long and %d do not, want 10 and 20", long.Load(), short.Load())
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if long.Load() != 20 {
			t.Errorf("%d long waits in a minute and a second, want 20", long.Load())
		}
	})
}
